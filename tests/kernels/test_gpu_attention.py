"""Paged attention on a GPU: every case in Triton's interpreter, and a control for every rule of who
sees what, and of where it lies.

Equal bits in the interpreter show that the same numbers are summed in the same order. That a card
computes them alike is for a run on a card to show.
"""

import numpy as np
import pytest

triton = pytest.importorskip("triton")

import gpu_cases_attention as room  # noqa: E402
import torch  # noqa: E402
from gpu_mutants import mutant  # noqa: E402

from folospec.kernels.gpu import attention, attention_kernels, launch  # noqa: E402

CPU = torch.device("cpu")
SHAPES = {shape.name: shape for shape in room.SHAPES}
pytestmark = pytest.mark.skipif(
    not launch.is_interpreted(), reason="the interpreter is for machines without a GPU"
)


@pytest.mark.parametrize("shape", room.SHAPES, ids=lambda shape: shape.name)
def test_every_row_sees_what_the_oracle_says(shape):
    room.make_case(shape, CPU, seed=1).check()


@pytest.mark.parametrize("shape", room.SUFFIX_SHAPES, ids=lambda shape: shape.name)
def test_the_suffix_alone_has_its_own_log_sum_exp(shape):
    room.make_suffix_case(shape, CPU, seed=1).check()


ROWS_BEHIND = "rows_behind = tl.load(query_start_loc + seq + 1) - 1 - row"
MUTATIONS = {
    # Which keys a row sees.
    "a key too few": ("mix", ROWS_BEHIND, ROWS_BEHIND.replace("1 - row", "row")),
    "a key too many": ("mix", ROWS_BEHIND, ROWS_BEHIND.replace("1 - row", "2 - row")),
    "a tree ends like a chain": ("mix", "tl.where(is_tree, 0, rows_behind)", "rows_behind"),
    "a tile ends too late": ("mix", "tl.where(is_tree, 0, rows_behind)", "0 - rows_behind"),
    "a node is blind beyond itself": (
        *("mix", "tl.where(row_is_node, end - 1, last_seen)"),
        "last_seen",
    ),
    "another bit": ("trees", "(words >> (nth % 32)", "(words >> (nth % 31)"),
    "the first word for all keys": ("trees", "nth[None, :] // 32", "nth[None, :] // 64"),
    "too few words for a row": ("trees", "tl.cdiv(suffix_len, 32)", "(suffix_len // 32)"),
    "the first mask for all": ("trees", "words_start + rank *", "rank *"),
    "a chain with a mask": ("trees", "tl.where(row_ok, words_start, -1) >= 0", "row_ok"),
    "no context for nodes": ("trees", "((bits != 0) | ~wanted)", "(bits != 0)"),
    "a window too wide": (
        *("mix, window", "(where[None, :] > row_positions[:, None] - WINDOW)"),
        "(where[None, :] >= row_positions[:, None] - WINDOW)",
    ),
    "a window too wide in the context": (
        *("long, window", "seen = keys[None, :] > row_positions[:, None] - WINDOW"),
        "seen = keys[None, :] >= row_positions[:, None] - WINDOW",
    ),
    "a window that opens late": ("mix, window", "(WINDOW - 1)", "(WINDOW - 2)"),
    "a window by key, not by position": (
        *("trees, window", "tl.where(in_suffix, where, keys)"),
        "keys",
    ),
    "keys before the window": ("long, window", "loaded = keys >= first\n", "pass\n"),
    # Where a key lies.
    "the first of the suffix in a table": ("mix", "nth >= 0", "nth > 0"),
    "the first suffix for all": ("mix", "suffix_slots += suffix_start", "suffix_slots += 0"),
    "positions of the first suffix": (
        *("mix, window", "suffix_positions += suffix_start"),
        "suffix_positions += 0",
    ),
    "a table for every sequence": ("mix, ordered", "tl.load(table_row + seq)", "(seq % 10)"),
    "the first place of a block": ("mix", "slots += keys % BLOCK_SIZE", "slots += 0"),
    "the first place of the last block": (
        *("mix", "blocks * BLOCK_SIZE + keys % BLOCK_SIZE"),
        "blocks * BLOCK_SIZE",
    ),
    "keys of head 0": ("mix", "key += kv_head", "key += 0 * kv_head"),
    "values of head 0": ("mix", "value += kv_head", "value += 0 * kv_head"),
    "heads dealt out in turn": (
        *("mix", "kv_head * FOLD + line % FOLD"),
        "kv_head + line % FOLD * tl.num_programs(1)",
    ),
    "columns of the next head": (
        *("mix, half", "loaded[:, None] & (column < HEAD_SIZE)"),
        "loaded[:, None]",
    ),
    "context in a suffix": (
        *("suffix of mix", "if CONTEXT:\n        context_len"),
        "if True:\n        context_len",
    ),
    # What is summed.
    "no rescaling": (
        *("long, ordered", "    rescale = tl.exp2(maximum - base)"),
        "    rescale = base * 0 + 1",
    ),
    "no cap": ("mix, cap", "if SOFTCAP:", "if False:"),
    "no base before the first key": (
        *("trees, window", "highest)\n    weights"),
        "float('-inf'))\n    weights",
    ),
    "rows behind the sequence's end": (
        *("mix", "row_ok = row < end_row\n    head"),
        "row_ok = row >= 0\n    head",
    ),
    "a part without an end": ("long, parts", "tl.minimum(start + length, end)", "end"),
    "parts from key 0": (
        *("long, window", "begin + part * length\n        stop"),
        "part * length\n        stop",
    ),
    "parts of half blocks": (
        *("long, parts", "length = tl.cdiv(length, BLOCK_N) * BLOCK_N"),
        "length += 7",
    ),
    "no last part": (
        *("long, parts", "tl.cdiv(end - begin, length))"),
        "tl.cdiv(end - begin, length) - 1)",
    ),
    "parts of equal weight": (
        *("long, parts", "tl.fma(other_total, other_rescale, total * rescale)"),
        "total + other_total",
    ),
    "maxima for sums": ("suffix of mix", "(maximum + tl.log2(total))", "maximum"),
}  # fmt: skip


def make(name: str) -> room.Case:
    if name.startswith("suffix of "):
        return room.make_suffix_case(SHAPES[name.removeprefix("suffix of ")], CPU, seed=1)
    return room.make_case(SHAPES[name], CPU, seed=1)


def fails(case: room.Case) -> bool:
    try:
        case.check()
    except (AssertionError, IndexError):
        return True
    return False


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", MUTATIONS)
def test_a_broken_rule_is_seen(rule, tmp_path, monkeypatch):
    name, old, new = MUTATIONS[rule]
    changed = mutant(attention_kernels, old, new, tmp_path)
    monkeypatch.setattr(attention, "attend_kernel", changed.attend_kernel)
    monkeypatch.setattr(attention, "merge_kernel", changed.merge_kernel)
    assert fails(make(name))


LAUNCH_MUTATIONS = {
    "a part too few": ("long, ordered", "-(-most_keys // PART_LENGTH)", "most_keys // PART_LENGTH"),
    "a weaker cap": ("mix, cap", "2 * scale / softcap * LOG2E", "2 * scale / softcap"),
    "powers of e": ("mix", "scale * LOG2E, 0.0", "scale, 0.0"),
}


@pytest.mark.parametrize("rule", LAUNCH_MUTATIONS)
def test_a_broken_launch_is_seen(rule, tmp_path, monkeypatch):
    name, old, new = LAUNCH_MUTATIONS[rule]
    monkeypatch.setattr(room, "attention", mutant(attention, old, new, tmp_path))
    assert fails(make(name))


def far_slots() -> tuple[torch.Tensor, torch.Tensor]:
    """What one row makes of keys that lie 2^32 elements into the pool, and what it should."""
    size, block_size, block = 256, 8, 2**32 // 256 // 8 + 3
    try:
        pool = torch.from_numpy(np.zeros(((block + 2) * block_size, 1, size), np.float16))
    except MemoryError:
        pytest.skip("8 GiB cannot be mapped, even where nothing is written to them")
    keys = torch.randn(block_size, 1, size, generator=torch.Generator().manual_seed(0)).half()
    pool[block * block_size : (block + 1) * block_size] = keys

    def ints(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    rows = room.paged_rows.PagedRows(
        query_start_loc=ints(0, 1), context_lens=ints(block_size - 1), table_row=ints(0),
        block_table=ints(block)[None], suffix_start_loc=ints(0, 1),
        suffix_slots=ints((block + 1) * block_size - 1), suffix_positions=ints(block_size - 1),
        mask_start=ints(-1), mask_words=ints(), tile_seq=ints(0), tile_row=ints(0),
        rows_per_tile=1,
    )  # fmt: skip
    query = keys[:1]
    found = attention.attend(
        query, (pool, pool), rows, torch.tensor([block_size - 1]), block_size=block_size, scale=0.1
    )
    rows64 = keys[:, 0].double()
    return found[0, 0].double(), (rows64 @ rows64[0] * 0.1).softmax(0) @ rows64


def test_slots_beyond_31_bits_of_elements_are_found(tmp_path, monkeypatch):
    found, wanted = far_slots()
    assert torch.allclose(found, wanted, atol=2e-3)
    changed = mutant(attention_kernels, "slots.to(tl.int64)[:, None]", "slots[:, None]", tmp_path)
    monkeypatch.setattr(attention, "attend_kernel", changed.attend_kernel)
    found, wanted = far_slots()
    assert not torch.allclose(found, wanted, atol=2e-3)


def test_keys_are_cut_only_where_processors_would_idle():
    assert attention.choose_parts(0, 4096, 132) == 1
    assert attention.choose_parts(132, 10**6, 132) == 1
    assert attention.choose_parts(8, 10**6, 132) == 33
    assert attention.choose_parts(1, 10**6, 132) == attention.MOST_PARTS
    assert attention.choose_parts(8, 2 * attention.LEAST_PART + 1, 132) == 3
    assert attention.choose_parts(8, 0, 132) == 1


def test_what_does_not_fit_is_refused():
    step = room.Step(SHAPES["mix"], CPU, 0)
    query, kv, positions = step.device_query, step.device_kv, step.positions
    good = {"block_size": 16, "scale": 1.0}
    with pytest.raises(ValueError, match="must have no masks, got"):
        attention.attend(query, kv, step.rows, positions, ordered=True, **good)
    with pytest.raises(ValueError, match="multiple of KV heads"):
        attention.attend(query[:, :3], kv, step.rows, positions, **good)
    with pytest.raises(ValueError, match="of one size"):
        attention.attend(query[:, :, :16], kv, step.rows, positions, **good)
    with pytest.raises(ValueError, match="must be contiguous"):
        attention.attend(query.mT.contiguous().mT, kv, step.rows, positions, **good)
    with pytest.raises(ValueError, match=r"positions must be \["):
        attention.attend(query, kv, step.rows, positions[1:], **good)
