"""Triton attention through its backend agrees with the gather attention in float64; deterministic,
it sums a row's keys in an order that depends on them alone.

In the interpreter equal bits show that the same numbers are summed in the same order, no more: what
a card makes of it, a run on a card must show.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch  # noqa: E402
from gpu_mutants import mutant  # noqa: E402
from steps import BLOCK_SIZE, NUM_SLOTS, Step, random_step  # noqa: E402
from torch import Tensor  # noqa: E402

from folospec.attention import paged_rows  # noqa: E402
from folospec.attention.base import LayerKV, get_backend  # noqa: E402
from folospec.attention.metadata import AttentionMetadata, SequenceRows  # noqa: E402
from folospec.attention.triton_paged import TritonAttention  # noqa: E402
from folospec.kernels.gpu import attention, attention_kernels, launch  # noqa: E402

MIX = ["decode", "tree", "chunk", "chain", "prompt", "decode"]
CONTEXTS = (63, 64, 65, 130, 0, 1)
TOLERANCES = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Values are averages of standard normals; weights are rounded to the type of the values."""
pytestmark = pytest.mark.skipif(
    not launch.is_interpreted(), reason="the interpreter is for machines without a GPU"
)


def attend(backend, step: Step, window=None, softcap=None, metadata=None) -> Tensor:
    return backend.forward(
        step.query,
        step.key,
        step.value,
        LayerKV(*(cache.clone() for cache in step.kv)),
        metadata or step.metadata,
        scale=step.query.shape[2] ** -0.5,
        sliding_window=window,
        softcap=softcap,
    )


def error(backend, step: Step, window=None, softcap=None) -> float:
    """The largest difference to the oracle in float64; infinite where anything is not a number."""
    wide = replace(
        step,
        query=step.query.double(),
        key=step.key.double(),
        value=step.value.double(),
        kv=LayerKV(*(cache.double() for cache in step.kv)),
    )
    exact = attend(get_backend("torch"), wide, window, softcap)
    found = attend(backend, step, window, softcap).double()
    return float((found - exact).abs().nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(9, None), (70, 2.0)])
def test_every_kind_of_row_agrees_with_the_oracle(dtype, deterministic, window, softcap):
    step = random_step(MIX, (4, 2), seed=1, dtype=dtype, head_size=32, contexts=CONTEXTS)
    assert error(TritonAttention(deterministic), step, window, softcap) < TOLERANCES[dtype]


@pytest.mark.parametrize("num_nodes", [1, 2, 33, 64])
@pytest.mark.parametrize("deterministic", [False, True])
def test_trees_of_any_size_agree_with_the_oracle(num_nodes, deterministic):
    step = random_step(
        ["tree", "tree"], (2, 1), seed=num_nodes, dtype=torch.float32, head_size=40,
        contexts=(67, 0), num_rows=num_nodes,
    )  # fmt: skip
    assert error(TritonAttention(deterministic), step) < TOLERANCES[torch.float32]


def test_a_tree_is_not_a_chain():
    step = random_step(["tree"], (2, 1), seed=0, dtype=torch.float32, head_size=32)
    backend = TritonAttention()
    assert not torch.equal(attend(backend, step), attend(backend, step.without_masks()))


def test_rows_that_are_on_the_device_are_used_as_they_are():
    step = random_step(MIX[:4], (4, 2), seed=2, dtype=torch.float32, head_size=32)
    for backend in (TritonAttention(), TritonAttention(deterministic=True)):
        wanted = attend(backend, step)
        metadata = step.metadata
        size = backend.rows_per_tile(metadata.num_tokens, metadata.num_seqs, 2)
        rows = paged_rows.on_device(
            metadata, torch.device("cpu"), rows_per_tile=size, expands=backend.expands
        )
        bare = AttentionMetadata(
            query_start_loc=None, context_lens=None, block_table=None, block_size=BLOCK_SIZE,
            positions=metadata.positions, slot_mapping=metadata.slot_mapping, suffix_start_loc=None,
            suffix_slots=None, suffix_positions=None, suffix_masks=None,
            plan={paged_rows.PLAN_KEY: rows},
        )  # fmt: skip
        assert torch.equal(attend(backend, step, metadata=bare), wanted)


def test_rows_advance_in_place():
    step = random_step(["decode"], (2, 1), seed=3, dtype=torch.float32, head_size=32)
    table = torch.arange(40, dtype=torch.int32)[None].numpy()
    backend = TritonAttention()
    found = []
    for advances in (True, False):
        kv = LayerKV(*(torch.zeros_like(cache) for cache in step.kv))
        metadata = AttentionMetadata.of_single_rows(torch.tensor([5]).numpy(), table, BLOCK_SIZE)
        for position in (5, 6, 7, 8):
            if not advances:
                metadata = AttentionMetadata.of_single_rows(
                    torch.tensor([position]).numpy(), table, BLOCK_SIZE
                )
            scaled = [t * position for t in (step.query, step.key, step.value)]
            out = backend.forward(*scaled, kv, metadata, scale=0.2)
            metadata.advance()
        found.append(out)
    assert torch.equal(*found)


class Text:
    """Tokens with a query, a key and a value each, of which a row's result is a function, however
    it is run. A part of the keys ends before the root."""

    LENGTH, ROOT = 220, 200

    def __init__(self, dtype: torch.dtype, window: int | None = None, head_size: int = 32) -> None:
        self.window = window
        noise = torch.Generator().manual_seed(5)
        shape = (self.LENGTH, 2, head_size)
        self.query = torch.randn(shape, generator=noise).to(dtype)
        self.key = torch.randn((self.LENGTH, 1, head_size), generator=noise).to(dtype)
        self.value = torch.randn((self.LENGTH, 1, head_size), generator=noise).to(dtype)
        blocks = NUM_SLOTS // BLOCK_SIZE
        self.table = torch.randperm(blocks, generator=noise).tolist()

    def slot(self, index: int) -> int:
        return self.table[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE

    def run(self, backend, *runs: tuple[int, list[int], list[int] | None], width=None) -> Tensor:
        """Rows of sequences, each (context, tokens, parents): the tokens lie one after the other in
        slots behind the context, whatever place they have in the text; parents of a tree."""
        sequences, tokens = [], []
        kv = LayerKV(*(t.new_zeros(NUM_SLOTS, *t.shape[1:]) for t in (self.key, self.value)))
        before = max(context for context, _, _ in runs)
        slots = [self.slot(index) for index in range(before)]
        kv.key[slots], kv.value[slots] = self.key[:before], self.value[:before]
        at = before
        for context, ids, parents in runs:
            assert all(len(run[1]) == 1 or run[0] == before for run in runs)
            own = [self.slot(at + nth) for nth in range(len(ids))]
            at += len(ids)
            mask = None
            if parents is not None:
                mask = torch.eye(len(ids), dtype=torch.bool)
                for row, parent in enumerate(parents):
                    if parent >= 0:
                        mask[row] |= mask[parent]
            sequences.append(
                SequenceRows(
                    positions=ids, slots=own, context_len=context, suffix_mask=mask,
                    block_table=self.table[: width or (context // BLOCK_SIZE + 1)],
                )
            )  # fmt: skip
            tokens += ids
        return backend.forward(
            self.query[tokens], self.key[tokens], self.value[tokens], kv,
            AttentionMetadata.from_rows(sequences, BLOCK_SIZE), scale=0.3,
            sliding_window=self.window,
        )  # fmt: skip


@pytest.fixture
def short_parts(monkeypatch):
    """Parts of keys so short that the interpreter need not see thousands."""
    monkeypatch.setattr(attention, "PART_LENGTH", 128)


def in_every_way(text: Text, backend) -> dict[str, Tensor]:
    """The last token of a path of five behind the root's context, run in all ways there are."""
    root = text.ROOT
    path = list(range(root, root + 5))
    shuffled = [root, root + 1, root + 1, root + 2, root + 2, root + 3, root + 4, root + 2]
    parents = [-1, 0, 0, 1, 2, 4, 5, 0]
    return {
        "decode": text.run(backend, (path[-1], path[-1:], None))[0],
        "a wider table": text.run(backend, (path[-1], path[-1:], None), width=400)[0],
        "chain": text.run(backend, (root, path, None))[-1],
        "chain with more behind": text.run(backend, (root, [*path, root + 5, root + 6], None))[4],
        "tree": text.run(backend, (root, shuffled, parents))[6],
        "chunk": text.run(backend, (root - 40, list(range(root - 40, root + 9)), None))[44],
        "chunk across a part": text.run(backend, (120, list(range(120, root + 6)), None))[84],
        "batch": text.run(backend, (path[-1], path[-1:], None), (3, [3], None), (190, [190], None))[
            0
        ],
        "batch with a chain": text.run(
            backend, (root, path, None), (root, path[:2], None), (7, [7], None)
        )[4],
    }


WAYS = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 50)]


@pytest.mark.parametrize(("dtype", "window"), WAYS)
@pytest.mark.usefixtures("short_parts")
def test_keys_alone_decide_about_bits(dtype, window):
    found = in_every_way(Text(dtype, window), TritonAttention(deterministic=True))
    different = [way for way, out in found.items() if not torch.equal(out, found["decode"])]
    assert different == []


@pytest.mark.usefixtures("short_parts")
def test_where_bits_do_not_count_keys_are_summed_in_other_orders(monkeypatch):
    # With two processors the keys of one sequence are cut into parts, those of a batch are not.
    monkeypatch.setattr(launch, "num_processors", lambda device: 2)
    found = in_every_way(Text(torch.float32), TritonAttention())
    assert any(not torch.equal(out, found["decode"]) for out in found.values())
    assert all(torch.allclose(out, found["decode"], atol=1e-5) for out in found.values())


@pytest.mark.usefixtures("short_parts")
def test_one_program_for_all_parts_sums_as_one_for_each(monkeypatch):
    text, backend = Text(torch.float32), TritonAttention(deterministic=True)
    found = []
    for processors in (1, 100):
        monkeypatch.setattr(launch, "num_processors", lambda device, count=processors: count)
        found.append(text.run(backend, (204, [204], None)))
    assert torch.equal(*found)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize(
    ("window", "old", "new"),
    [
        (50, "begin = first // PART_LENGTH * PART_LENGTH", "begin = first"),
        (None, "length = PART_LENGTH\n", "length = tl.cdiv(end - begin, 2)\n"),
    ],
)
def test_parts_at_other_places_change_bits(window, old, new, tmp_path, monkeypatch):
    changed = mutant(attention_kernels, old, new, tmp_path)
    monkeypatch.setattr(attention, "attend_kernel", changed.attend_kernel)
    monkeypatch.setattr(attention, "merge_kernel", changed.merge_kernel)
    monkeypatch.setattr(launch, "num_processors", lambda device: 100)
    found = in_every_way(Text(torch.float32, window), TritonAttention(deterministic=True))
    assert any(not torch.equal(out, found["decode"]) for out in found.values())


def test_what_it_cannot_serve_is_said_with_what_it_can():
    backend = TritonAttention()
    assert backend.supports(torch.bfloat16, 80, 1) is None
    assert backend.supports(torch.float32, 256, 17) is None
    assert "got torch.float64" in backend.supports(torch.float64, 64, 16)
    for size in (24, 33, 264):
        assert f"from 32 to 256, got {size}" in backend.supports(torch.float16, size, 16)


def test_it_runs_on_a_cpu_only_where_kernels_are_interpreted(monkeypatch):
    assert TritonAttention().devices == ("cuda", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        TritonAttention()
