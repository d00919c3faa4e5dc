"""The bucket of a step is the smallest that holds it, and all buckets are known beforehand."""

import pytest

from folospec.worker.cuda.buckets import (
    FACTORS,
    MAX_ROWS,
    NUM_SEQS,
    Bucket,
    bucket_of,
    buckets,
    max_rows_each,
)


@pytest.mark.parametrize(
    ("num_seqs", "num_rows", "bucket"),
    [
        (1, 1, (1, 1)),
        (1, 5, (1, 6)),
        (3, 3, (4, 4)),
        (5, 17, (8, 24)),
        (5, 8, (8, 16)),
        (5, 5, (8, 8)),
        (8, 9, (8, 16)),
        (1, 64, (1, 64)),
        (1, 65, None),
        (256, 256, (256, 256)),
        (257, 257, None),
        (200, 513, None),
    ],
)
def test_the_smallest_bucket_that_holds_a_step_is_taken(num_seqs, num_rows, bucket):
    assert bucket_of(num_seqs, num_rows) == bucket


def test_every_step_that_is_prepared_for_has_its_bucket_among_those_prepared():
    prepared = set(buckets(10, 5))
    wanted = {bucket_of(s, r) for s in range(1, 11) for r in range(s, 5 * s + 1)}
    assert wanted <= prepared
    assert max(bucket.num_seqs for bucket in prepared) == 16
    assert max(bucket.num_rows for bucket in prepared) == 16 * 6


def test_the_largest_buckets_come_first():
    rows = [bucket.num_rows for bucket in buckets(NUM_SEQS[-1], FACTORS[-1])]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] <= MAX_ROWS


def test_one_sequence_and_one_row_is_one_bucket():
    assert list(buckets(1, 1)) == [Bucket(1, 1)]


def test_no_sequence_has_more_rows_than_its_bucket_says():
    for num_seqs in range(1, 40):
        for num_rows in range(num_seqs, 2 * num_seqs + 60):
            bucket = bucket_of(num_seqs, num_rows)
            longest = num_rows - num_seqs + 1
            if bucket is not None and longest <= 64:
                assert longest <= max_rows_each(bucket)
    assert max_rows_each(Bucket(4, 4)) == 1, "where masks would cost plain decoding"
