"""The kernels around a decoder's products, and those products, equal their oracles in Triton's
interpreter; every rule of theirs, broken, is seen."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import gpu_cases_decoder
import torch
from gpu_mutants import mutant

from folospec.kernels.gpu import kv, kv_kernels, launch, linear, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(
        not launch.is_interpreted(), reason="the interpreter is for machines without a GPU"
    ),
]
CASES = list(gpu_cases_decoder.cases(torch.device("cpu")))
FEW_ROWS = (1, 2, 7, 16, 33)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_kernel_equals_its_oracle(case):
    case.check()


def test_inputs_of_another_seed_pass_too():
    for case in gpu_cases_decoder.cases(torch.device("cpu"), seed=1):
        case.check()


WRITE_RULES = [
    # slots and heads
    (
        "slot = tl.load(slots + row).to(tl.int64)\n    if slot >= 0:\n        inside",
        "slot = tl.abs(tl.load(slots + row).to(tl.int64))\n    if slot >= 0:\n        inside",
    ),
    ("if slot >= 0:\n        inside", "if slot > 0:\n        inside"),
    ("inside = (head < num_kv_heads)", "inside = (head < num_kv_heads - 1)"),
    ("(column < SIZE)", "(column < SIZE - 1)"),
    ("(slot * num_kv_heads + head) * SIZE", "(slot + head) * SIZE"),
    # strides
    ("row * key_row_stride + head * key_head_stride", "row * key_row_stride + head * SIZE"),
    ("row * key_row_stride", "row * value_row_stride"),
    ("row * value_row_stride + head * value_head_stride", "row * value_row_stride + head * SIZE"),
    ("head * value_head_stride", "head * key_head_stride"),
    ("(key_cache + place, keys", "(value_cache + place, keys"),
]
ROTATE_RULES = [
    # slots
    (
        "slot = tl.load(slots + row).to(tl.int64)\n    if slot >= 0:\n        is_key",
        "slot = tl.abs(tl.load(slots + row).to(tl.int64))\n    if slot >= 0:\n        is_key",
    ),
    ("if slot >= 0:\n        is_key", "if slot > 0:\n        is_key"),
    # which heads are what, and where they are
    ("first_value = num_heads, num_heads + num", "first_value = num_heads, 2 * num"),
    ("head < first_value + num_kv_heads) &", "head < first_value + num_kv_heads - 1) &"),
    ("is_query = inside & (head < first_key)", "is_query = inside & (head < first_key - 1)"),
    ("is_key = inside & (head >= first_key) &", "is_key = inside & (head > first_key) &"),
    ("(head < first_value)\n", "(head <= first_value)\n"),
    ("is_value = inside & (head >= first_value)", "is_value = inside & (head > first_value)"),
    ("(slot * num_kv_heads + head - first_key)", "(slot * num_kv_heads + 0 * head)"),
    ("(slot * num_kv_heads + head - first_value)", "(slot * num_kv_heads + 0 * head)"),
    ("(slot * num_kv_heads + head - first_key)", "(slot + head - first_key)"),
    ("query + (row * num_heads + head)", "query + (row + head)"),
    ("heads + row * row_stride + head * head_stride", "heads + row * row_stride + head * 2 * HALF"),
    ("heads + row * row_stride", "heads + row * num_heads * head_stride"),
    ("in_half = column < HALF", "in_half = column < HALF - 1"),
    ("place + HALF, turned_second.to(kind)", "place + HALF - 1, turned_second.to(kind)"),
    # rotation
    ("first * c - second * s", "first * c + second * s"),
    ("second * c + first * s", "second * c - first * s"),
    ("tl.load(source + HALF,", "tl.load(source + HALF - 1,"),
    ("cos + position * HALF", "cos + row * HALF"),
    ("sin + position * HALF", "sin + row * HALF"),
    ("position < num_positions", "position < num_positions - 1"),
    # norms
    ("tl.where(head < first_key,", "tl.where(head <= first_key,"),
    ("query_norm, key_norm) + column", "key_norm, query_norm) + column"),
    ("tl.load(weight + HALF,", "tl.load(weight,"),
    ("squares / (2 * HALF) + eps", "squares / (2 * BLOCK) + eps"),
    ("squares / (2 * HALF) + eps", "squares / (2 * HALF)"),
    ("first * first + second * second", "first * first + first * first"),
    ("raw_first.to(raw_kind)", "first.to(raw_kind)"),
    ("raw_second.to(raw_kind)", "turned_second.to(raw_kind)"),
]
MOVE_RULES = [
    ("move < num_moves", "move < num_moves - 1"),
    ("(word < row_words)", "(word < row_words - 1)"),
    ("start + source * row_words", "start + target * row_words"),
    ("start + target * row_words", "start + source * row_words"),
    ("tl.load(from_table + tensor)", "tl.load(from_table)"),
    ("tl.load(to_table + tensor)", "tl.load(to_table)"),
    ("(tl.program_id(1) * WORDS", "(0 * WORDS"),
    ("tl.program_id(2) * MOVES", "0"),
]
MOVE_WRAPPER_RULES = [
    # one move is made before the next one reads
    ("moves = FEW_MOVES if num_moves <= FEW_MOVES else MOST_MOVES", "moves = 1"),
    ("if num_moves <= MOST_MOVES:", "if True:"),
    ("device=device) * (8 * words)", "device=device) * (4 * words)"),
    ("math.gcd(8, row_bytes, *pointers)", "8"),
]
NORM_RULES = [
    ("inside = column < SIZE\n    place", "inside = column < SIZE - 1\n    place"),
    ("x += tl.load(delta", "x -= tl.load(delta"),
    ("x = rounded.to(tl.float32)", "x = x"),
    ("tl.store(stream + place", "tl.store(normed + place"),
    ("axis=0) / SIZE + eps", "axis=0) / BLOCK + eps"),
    ("axis=0) / SIZE + eps", "axis=0) / SIZE"),
    ("tl.load(weight + column,", "tl.load(weight + 0 * column,"),
    (".to(tl.int64) * SIZE + column", ".to(tl.int64) * (SIZE - 1) + column"),
]
GATE_RULES = [
    ("inside = column < SIZE\n    source", "inside = column < SIZE - 1\n    source"),
    ("tl.load(source + SIZE,", "tl.load(source + SIZE - 1,"),
    ("row * (2 * SIZE)", "row * SIZE"),
    ("product + row * SIZE", "product + row * (SIZE - 1)"),
    ("tl.program_id(1) * BLOCK", "0 * BLOCK"),
    ("tl.exp(-gate)", "tl.exp(gate)"),
]
PRODUCT_RULES = [
    ("start + inner < size", "start + inner < size - 1"),
    ("start + inner < size", "start + inner <= size"),
    ("range(0, size, INNER)", "range(INNER, size, INNER)"),
    ("column < num_columns", "column < num_columns - 1"),
    ("row < num_rows", "row < num_rows - 1"),
    ("row < num_rows", "row < num_rows + 1"),
    ("tl.load(bias + column,", "tl.load(bias + 0 * column,"),
    ("tl.program_id(0) * ROWS", "0"),
    ("tl.program_id(1) * COLUMNS", "0"),
    ("(tl.int64)[:, None] * num_columns", "(tl.int64)[:, None] * COLUMNS"),
    ("rows, columns, total,", "rows, columns, 0.0 * total,"),
]
RULES = [
    *(("write", kv_kernels, *rule) for rule in WRITE_RULES),
    *(("rotate", kv_kernels, *rule) for rule in ROTATE_RULES),
    *(("move", kv_kernels, *rule) for rule in MOVE_RULES),
    *(("move", kv, *rule) for rule in MOVE_WRAPPER_RULES),
    *(("norm", rows, *rule) for rule in NORM_RULES),
    *(("gate", rows, *rule) for rule in GATE_RULES),
    *(("product", linear, *rule) for rule in PRODUCT_RULES),
]


@pytest.mark.parametrize(("kind", "module", "old", "new"), RULES)
def test_a_broken_rule_is_seen(kind, module, old, new, tmp_path, monkeypatch):
    changed = mutant(module, old, new, tmp_path)
    if module is kv_kernels:
        monkeypatch.setattr(kv, "kv_kernels", changed)
    else:
        monkeypatch.setattr(gpu_cases_decoder, module.__name__.rpartition(".")[2], changed)
    assert any(_fails(case) for case in CASES if case.name.startswith(kind))


def _fails(case) -> bool:
    try:
        case.check()
    except (AssertionError, IndexError):
        return True
    return False


@pytest.mark.parametrize("slot_type", [torch.int32, torch.int64])
def test_slots_beyond_two_billion_elements_are_found(slot_type):
    key, value = _huge_pools()
    _write_at_the_end(key, value, slot_type)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "slot = tl.load(slots + row).to(tl.int64)\n    if slot >= 0:\n        is_key",
            "slot = tl.load(slots + row)\n    if slot >= 0:\n        is_key",
        ),
        (
            "slot = tl.load(slots + row).to(tl.int64)\n    if slot >= 0:\n        inside",
            "slot = tl.load(slots + row)\n    if slot >= 0:\n        inside",
        ),
        (
            "tl.load(sources + move, mask=is_move, other=0).to(tl.int64)[:, None]",
            "tl.load(sources + move, mask=is_move, other=0)[:, None]",
        ),
        (
            "tl.load(targets + move, mask=is_move, other=0).to(tl.int64)[:, None]",
            "tl.load(targets + move, mask=is_move, other=0)[:, None]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_slots_whose_offset_is_32_bits_wide_are_not(old, new, tmp_path, monkeypatch):
    """Control."""
    monkeypatch.setattr(kv, "kv_kernels", mutant(kv_kernels, old, new, tmp_path))
    key, value = _huge_pools()
    with pytest.raises(AssertionError):
        _write_at_the_end(key, value, torch.int32)


def _huge_pools() -> tuple[torch.Tensor, torch.Tensor]:
    """Pools of more than 2^31 elements, of which only touched pages are there; before them is as
    much again, where an offset that has wrapped leads. They lie so that rows are moved by two
    bytes."""
    num_slots = 2**31 // 32 + 8
    memory = torch.empty(2**31 + 4096 + num_slots * 32, dtype=torch.float16)
    starts = (2**31 + 1025, 2**31 + 4095)
    return tuple(memory[start:][: num_slots * 32].view(num_slots, 1, 32) for start in starts)


def _write_at_the_end(key, value, slot_type) -> None:
    last = len(key) - 1
    draws = gpu_cases_decoder.Draws(torch.device("cpu"), 0)
    heads = draws.floats(1, 3, 32, dtype=torch.float16)
    cos, sin = torch.ones(1, 16), torch.zeros(1, 16)
    slots = torch.tensor([last], dtype=slot_type)
    kv.rotate_and_write(heads, 1, torch.tensor([0]), slots, cos, sin, (key, value))
    kv.write_kv(heads[:, 1:2], heads[:, 2:], slots - 1, (key, value))
    kv.move_slots([key, value], slots, slots - 2)
    kv.move_slots([key, value], torch.zeros(1, dtype=slot_type), torch.ones(1, dtype=slot_type))
    for slot in (last - 2, last - 1, last):
        assert torch.equal(key[slot], heads[:, 1])
        assert torch.equal(value[slot], heads[:, 2])


@pytest.mark.parametrize("dtype", list(linear.BLOCKS))
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(dtype):
    assert _same_bits_in_any_company(linear, rows, dtype)


def test_a_product_whose_blocks_depend_on_the_number_of_rows_has_other_bits(tmp_path):
    """Control."""
    by_rows = "INNER=blocks.inner if num_rows > 4 else 64,"
    changed = mutant(linear, "INNER=blocks.inner,", by_rows, tmp_path)
    assert not _same_bits_in_any_company(changed, rows, torch.bfloat16)


def test_a_norm_whose_sum_depends_on_the_number_of_rows_has_other_bits(tmp_path):
    """Control."""
    halves = "tl.sum(tl.where({}, x * x, 0.0), axis=0)"
    split = f"{halves.format('column < 99')} + {halves.format('column >= 99')}"
    plain = "tl.sum(x * x, axis=0)"
    by_rows = f"tl.where(tl.num_programs(0) > 4, {plain}, {split})"
    changed = mutant(rows, plain, by_rows, tmp_path)
    assert not _same_bits_in_any_company(linear, changed, torch.float32)


def _same_bits_in_any_company(linear_module, rows_module, dtype) -> bool:
    draws = gpu_cases_decoder.Draws(torch.device("cpu"), 0)
    stream, delta = (draws.floats(33, 300, dtype=dtype) for _ in "sd")
    weight, norm = draws.floats(50, 300, dtype=dtype), draws.floats(300, dtype=dtype)

    def run(first: int, end: int) -> torch.Tensor:
        part = stream[first:end].clone()
        normed = rows_module.add_rms_norm(part, delta[first:end], norm, 1e-6)
        product = linear_module.linear(normed, weight, out_dtype=torch.float32)
        return torch.cat([part.float(), normed.float(), product], dim=1)

    whole = run(0, 33)
    return all(
        torch.equal(run(first, first + count), whole[first : first + count])
        for count in FEW_ROWS
        for first in {0, 1, 5, 33 - count}
        if first + count <= 33
    )


def test_moves_reuse_the_table_of_a_pool():
    """So that a graph may capture a launch: nothing is sent to the device then."""
    pools = [torch.randn(4, 2, 32) for _ in range(3)]
    kv.move_slots(pools, [1], [2])
    before = kv._table.cache_info()
    kv.move_slots(pools, [2], [3])
    after = kv._table.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


def test_shapes_that_do_not_fit_are_refused():
    heads, cache = torch.randn(2, 4, 32), torch.zeros(8, 1, 32)
    positions, angles = torch.zeros(2, dtype=torch.int64), torch.zeros(4, 16)
    good = {"cos": angles, "sin": angles, "kv": (cache, cache)}
    for name, bad in [
        ("kv", (cache, torch.zeros(8, 2, 32))),
        ("kv", (cache, torch.zeros(8, 1, 64)[..., ::2])),
        ("cos", angles.double()),
        ("sin", torch.zeros(4, 32)),
    ]:
        with pytest.raises(ValueError, match=name):
            kv.rotate_and_write(heads, 2, positions, positions, **{**good, name: bad})
    with pytest.raises(ValueError, match="heads must be"):
        kv.rotate_and_write(heads, 1, positions, positions, **good)
    with pytest.raises(ValueError, match="value must have"):
        kv.write_kv(heads[:, :1], heads[:, :2], positions, (cache, cache))
    with pytest.raises(ValueError, match="as many, got 2 and 1"):
        kv.move_slots([cache], [0, 1], [2])
    with pytest.raises(ValueError, match="contiguous"):
        kv.move_slots([cache[..., ::2]], [0], [1])
    with pytest.raises(ValueError, match="weight"):
        rows.add_rms_norm(heads[0], None, torch.ones(31), 1e-6)
    with pytest.raises(ValueError, match="alike"):
        rows.add_rms_norm(heads[0], heads[0, :2], torch.ones(32), 1e-6)
    with pytest.raises(ValueError, match="gate_up"):
        rows.silu_mul(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="of one type"):
        linear.linear(heads[0], torch.zeros(3, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="weight must be"):
        linear.linear(heads[0], torch.zeros(3, 31))
    with pytest.raises(ValueError, match="bias must have"):
        linear.linear(heads[0], torch.zeros(3, 32), torch.zeros(4))
