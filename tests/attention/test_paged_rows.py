"""What kernels are told of a step equals what a slow and simple reading of it says."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folospec.attention import paged_rows
from folospec.attention.metadata import AttentionMetadata, SequenceRows, SuffixMask
from folospec.worker.input_batch import tree_rows

BLOCK_SIZE, NUM_SLOTS = 4, 1000
KINDS = ("chain", "late chain", "tree", "late tree", "chain by mask")


def random_rows(kind: str, num_rows: int, context: int, rng: random.Random) -> SequenceRows:
    parents = [rng.randrange(row) if "tree" in kind else row - 1 for row in range(1, num_rows)]
    tree = tree_rows((-1, *parents), num_rows // 2 if "late" in kind else 0)
    run = num_rows - len(tree.mask.seen)
    slots = rng.sample(range(NUM_SLOTS), num_rows)
    positions = [context + int(depth) for depth in tree.depths]
    return SequenceRows(
        positions=positions[run:],
        slots=slots[run:],
        context_len=context,
        block_table=rng.sample(range(NUM_SLOTS), -(-(context + num_rows) // BLOCK_SIZE)),
        suffix_slots=slots,
        suffix_positions=positions,
        suffix_mask=torch.from_numpy(tree.mask.seen) if kind.endswith(("tree", "mask")) else None,
    )


def seen_by(rows: SequenceRows, row: int) -> list[tuple[int, int]]:
    """(slot, position) of a row's keys, in order."""
    size = BLOCK_SIZE
    keys = [(rows.block_table[i // size] * size + i % size, i) for i in range(rows.context_len)]
    own = list(zip(rows.suffix_slots, rows.suffix_positions, strict=True))
    if rows.suffix_mask is None:
        return keys + own[: len(own) - len(rows.positions) + row + 1]
    return keys + [key for key, sees in zip(own, rows.suffix_mask[row], strict=True) if sees]


def told_of(fields: dict[str, np.ndarray], seq: int, row: int) -> list[tuple[int, int]]:
    """What a kernel makes of a packed row's keys."""
    f, size = fields, BLOCK_SIZE
    table = f["block_table"][f["table_row"][seq]].tolist()
    keys = [(table[i // size] * size + i % size, i) for i in range(f["context_lens"][seq])]
    begin, end = f["suffix_start_loc"][seq : seq + 2].tolist()
    length, start = end - begin, int(f["mask_start"][seq])
    if start < 0:
        seen = range(length - (int(f["query_start_loc"][seq + 1]) - 1 - row))
    else:
        first = start + (row - int(f["query_start_loc"][seq])) * -(-length // 32)
        words = f["mask_words"][first : first + -(-length // 32)]
        seen = [i for i in range(length) if int(words[i // 32]) >> (i % 32) & 1]
    own = list(zip(f["suffix_slots"].tolist(), f["suffix_positions"].tolist(), strict=True))
    return keys + [own[begin + i] for i in seen]


def tiles_of(fields: dict[str, np.ndarray], size: int) -> dict[int, int]:
    """The sequence of every row that some tile has."""
    found = {}
    for seq, first in zip(fields["tile_seq"].tolist(), fields["tile_row"].tolist(), strict=True):
        for row in range(first, min(first + size, int(fields["query_start_loc"][seq + 1]))):
            assert row not in found, "two tiles have the row"
            assert row >= fields["query_start_loc"][seq]
            found[row] = seq
    return found


sequences = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(1, 70), st.integers(0, 9)), min_size=1, max_size=5
)
singles = st.lists(st.tuples(st.just("chain"), st.just(1), st.integers(0, 9)), min_size=1)


@settings(max_examples=60, deadline=None)
@given(sequences | singles, st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_every_row_is_told_its_keys(facts, rows_per_tile, expands, seed):
    rng = random.Random(seed)
    batch = [random_rows(kind, n, context, rng) for kind, n, context in facts]
    metadata = AttentionMetadata.from_rows(batch, BLOCK_SIZE)
    fields = paged_rows.describe(metadata, rows_per_tile=rows_per_tile, expands=expands)
    assert all(array.dtype == np.int32 for array in fields.values())
    assert {*fields, "rows_per_tile"} == {*paged_rows.PagedRows._fields}
    seq_of = tiles_of(fields, rows_per_tile)
    assert sorted(seq_of) == list(range(metadata.num_tokens))
    packed = [(rows, row) for rows in batch for row in range(len(rows.positions))]
    for index, (rows, row) in enumerate(packed):
        assert told_of(fields, seq_of[index], index) == seen_by(rows, row)
    if expands:
        assert fields["mask_words"].size == 0
    limits = paged_rows.sizes(
        metadata.num_seqs,
        metadata.num_tokens,
        metadata.block_table.shape[1],
        rows_per_tile=rows_per_tile,
        expands=expands,
        max_rows_per_seq=int(np.diff(metadata.suffix_start_loc).max()),
    )
    assert limits.keys() == fields.keys()
    assert {n: a.size for n, a in fields.items() if a.size > limits[n]} == {}


def test_a_bucket_holds_any_step_within_it():
    """Also with fewer sequences and rows than it has."""
    limits = paged_rows.sizes(4, 17, 8, rows_per_tile=3, expands=False, max_rows_per_seq=9)
    rng = random.Random(0)
    for lengths in ([1], [9], [1, 1, 1, 1], [9, 6, 1, 1], [4, 4, 4, 4], [2, 2, 9]):
        batch = [random_rows("tree", n, 5, rng) for n in lengths]
        metadata = AttentionMetadata.from_rows(batch, BLOCK_SIZE)
        fields = paged_rows.describe(metadata, rows_per_tile=3, expands=False)
        assert {n: a.size for n, a in fields.items() if a.size > limits[n]} == {}
    # None of the limits is a waste: four trees of nine rows need more than there is.
    batch = [random_rows("tree", 9, 5, rng) for _ in range(4)]
    fields = paged_rows.describe(
        AttentionMetadata.from_rows(batch, BLOCK_SIZE), rows_per_tile=3, expands=False
    )
    assert len(fields["tile_seq"]) > limits["tile_seq"]


def test_a_step_of_single_rows_without_trees_has_no_masks():
    limits = paged_rows.sizes(4, 4, 8, rows_per_tile=4, expands=False, max_rows_per_seq=1)
    assert limits["mask_words"] == 0
    rng = random.Random(0)
    batch = [random_rows("tree", 1, 5, rng) for _ in range(4)]
    metadata = AttentionMetadata.from_rows(batch, BLOCK_SIZE)
    assert paged_rows.describe(metadata, rows_per_tile=4, expands=False)["mask_words"].size == 0


def test_a_chain_is_not_cut_into_sequences_though_it_comes_with_a_mask():
    rows = random_rows("chain by mask", 6, 5, random.Random(0))
    metadata = AttentionMetadata.from_rows([rows], BLOCK_SIZE)
    fields = paged_rows.describe(metadata, rows_per_tile=8, expands=True)
    assert fields["tile_seq"].tolist() == [0]
    assert SuffixMask(np.tri(2, 5, 3, np.bool_)).is_chain
    assert not SuffixMask(np.tri(2, 5, 2, np.bool_)).is_chain
    assert not SuffixMask(np.tri(2, 5, 4, np.bool_)).is_chain


def test_the_upload_has_the_same_numbers_each_at_a_multiple_of_16_bytes():
    rng = random.Random(1)
    batch = [random_rows("tree", 5, 6, rng), random_rows("chain", 7, 0, rng)]
    metadata = AttentionMetadata.from_rows(batch, BLOCK_SIZE)
    fields = paged_rows.describe(metadata, rows_per_tile=2, expands=False)
    rows = paged_rows.on_device(metadata, torch.device("cpu"), rows_per_tile=2)
    assert rows.rows_per_tile == 2
    base = rows.query_start_loc.data_ptr()
    for name, array in fields.items():
        assert np.array_equal(getattr(rows, name).numpy(), array)
        assert (getattr(rows, name).data_ptr() - base) % 16 == 0
    assert paged_rows.on_device(metadata, torch.device("cpu"), rows_per_tile=5) is rows


@pytest.mark.parametrize(
    ("num_rows", "num_seqs", "fold", "expected"),
    [(1, 1, 4, 4), (64, 64, 4, 4), (16, 1, 4, 16), (5, 1, 4, 8), (2048, 1, 4, 16), (9, 1, 1, 16),
     (1, 1, 71, 1), (300, 2, 3, 21), (0, 0, 4, 4)],
)  # fmt: skip
def test_tiles_grow_with_the_rows_of_a_sequence(num_rows, num_seqs, fold, expected):
    assert paged_rows.rows_per_tile(num_rows, num_seqs, fold) == expected
