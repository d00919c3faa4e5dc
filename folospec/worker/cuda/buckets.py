"""Chooses which shapes of steps have a CUDA graph: the smallest bucket that holds a step runs it.

    sequences  1  2  4  8  16  24  32  48  64 ...
    rows       1  2  3  4   6   8  12  16 ... 64 times as many, up to `MAX_ROWS`

A step of 5 sequences, three of them with a tree of 4 nodes, has 17 rows: it runs in the bucket of 8
sequences and 24 rows, and 7 of the rows are padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple

NUM_SEQS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
FACTORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows for each sequence of a bucket, on average."""
MAX_ROWS = 512
"""Larger steps are launched kernel by kernel."""


MAX_ROWS_EACH = 64
"""Most rows of a sequence: what is kept for masks grows with it."""


class Bucket(NamedTuple):
    """Most sequences, and most rows of all of them together."""

    num_seqs: int
    num_rows: int


def bucket_of(num_seqs: int, num_rows: int) -> Bucket | None:
    """The smallest bucket that holds a step; None if there is none."""
    seqs = next((size for size in NUM_SEQS if size >= num_seqs), None)
    if seqs is None:
        return None
    # Where every sequence has one row there are no masks, and no room for them.
    factors = FACTORS if num_rows == num_seqs else FACTORS[1:]
    rows = next((seqs * factor for factor in factors if seqs * factor >= num_rows), None)
    return None if rows is None or rows > MAX_ROWS else Bucket(seqs, rows)


def max_rows_each(bucket: Bucket) -> int:
    """Most rows of one sequence, in steps that run in a bucket because they fit no smaller one."""
    if bucket.num_rows == bucket.num_seqs:
        return 1
    fewer = max((size for size in NUM_SEQS if size < bucket.num_seqs), default=0)
    return min(bucket.num_rows - fewer, MAX_ROWS_EACH)


def buckets(max_num_seqs: int, max_rows_each: int) -> Iterator[Bucket]:
    """All buckets of steps with up to so many sequences, and so many rows of each: the largest
    first, since later recordings then find room in its memory."""
    seqs = [*takewhile(lambda size: size < max_num_seqs, NUM_SEQS)]
    seqs += [*NUM_SEQS[len(seqs) : len(seqs) + 1]]
    factors = [*takewhile(lambda factor: factor < max_rows_each, FACTORS)]
    factors += [*FACTORS[len(factors) : len(factors) + 1]]
    found = [Bucket(s, s * f) for s in seqs for f in factors if s * f <= MAX_ROWS]
    yield from sorted(found, key=lambda bucket: (-bucket.num_rows, -bucket.num_seqs))
