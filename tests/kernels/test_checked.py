"""What would make the native kernels read or write elsewhere is refused before they run."""

from __future__ import annotations

import math
from array import array

import numpy as np
import pytest
import torch
from native_builds import require_native

from folospec.kernels import native_children, native_sampling
from folospec.kernels.checked import array_pointer, check_ids, pack_ids, pointer
from folospec.kernels.native import Native, floats, matrix
from folospec.kernels.native_children import NO_NOISE, pack_wanted
from folospec.kernels.native_suffix import NativeSuffixIndex, SuffixAsk, SuffixRules
from folospec.kernels.sampling_records import PackedTrees, pack_filters, pack_sampling
from folospec.kernels.torch_ops import Int8Weight

PARAMS = pack_sampling(0, 0, pack_filters(1.0, 0, 1.0, 0.0))
NO_INTEGERS = [[1, 2.5], [math.nan], [np.float64(3.0)], ["1"], "12", b"12345678", [None], [2**63]]


@pytest.fixture(scope="module")
def native() -> Native:
    return require_native()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 4, dtype=torch.float64),
        torch.zeros(4, 3),
        torch.zeros(3, 8)[:, ::2],
        torch.zeros(4, 3).T,
        torch.zeros(12),
        torch.zeros(3, 4, device="meta"),
    ],
    ids=["type", "shape", "strides", "order", "axes", "device"],
)
def test_a_tensor_of_another_kind_has_no_pointer(tensor):
    with pytest.raises(
        ValueError, match=r"x must be float32 \[3, \*\], contiguous on the CPU, got"
    ):
        pointer("x", tensor, torch.float32, (3, None))


def test_a_tensor_of_the_right_kind_has_one():
    tensor = torch.zeros(3, 4)
    assert pointer("x", tensor, torch.float32, (3, None)) == tensor.data_ptr()
    values = np.zeros((2, 3), np.int32)
    assert array_pointer("x", values, np.int32, (2, 3)) == values.ctypes.data


@pytest.mark.parametrize(
    "values", [np.zeros((2, 3), np.int64), np.zeros((3, 2), np.int32), np.zeros((3, 2), np.int32).T]
)
def test_an_array_of_another_kind_has_no_pointer(values):
    with pytest.raises(ValueError, match=r"x must be int32 \[2, 3\], contiguous, got int"):
        array_pointer("x", values, np.int32, (2, 3))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_have_a_first_and_a_last(dtype):
    check_ids("ids", np.array([0, 4], dtype), 5)
    check_ids("ids", np.array([], dtype), 0)
    for wrong in (-1, 5, np.iinfo(dtype).min, np.iinfo(dtype).max):
        with pytest.raises(ValueError, match=rf"ids must be in 0 .. 4, got {wrong}"):
            check_ids("ids", np.array([0, wrong], dtype), 5)


@pytest.mark.parametrize("ids", NO_INTEGERS)
def test_what_is_no_integer_is_not_packed(ids):
    with pytest.raises(ValueError, match="ids must be integers of 64 bits, got"):
        pack_ids("ids", ids)


def test_integers_of_any_kind_are_packed():
    given = [1, np.int64(2), True, torch.tensor(3)]
    assert pack_ids("ids", given).tolist() == [1, 2, 1, 3]
    assert pack_ids("ids", array("i", [4]), "i") == array("i", [4])
    with pytest.raises(ValueError, match="ids must be integers of 32 bits"):
        pack_ids("ids", [2**31], "i")


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.zeros(4, 8, dtype=torch.float64), None),
        (torch.zeros(4, 8, dtype=torch.int8), None),
        (torch.zeros(4, 16)[:, ::2], None),
        (torch.zeros(8), None),
        (torch.zeros(4, 8), torch.zeros(3)),
        (torch.zeros(4, 8), torch.zeros(4, dtype=torch.bfloat16)),
        (Int8Weight(torch.zeros(4, 8, dtype=torch.int8), torch.ones(3)), None),
        (Int8Weight(torch.zeros(4, 8), torch.ones(4)), None),
    ],
)
def test_a_weight_that_the_kernels_would_misread_is_refused(weight, bias):
    with pytest.raises(ValueError, match="must be"):
        matrix(weight, bias)


def test_a_product_needs_as_many_columns_as_its_weight(native):
    weight = torch.zeros(4, 8)
    assert native.apply_linear(torch.zeros(2, 8), matrix(weight)).shape == (2, 4)
    for x in (torch.zeros(2, 7), torch.zeros(8), torch.zeros(2, 8, device="meta")):
        with pytest.raises(ValueError, match="x must be"):
            native.apply_linear(x, matrix(weight))


@pytest.mark.parametrize(
    ("sources", "targets"),
    [([4], [0]), ([0], [-1]), ([0], [4]), ([0, 1], [2]), ([0.0], [1]), ([0], [math.nan])],
)
def test_rows_that_are_not_there_do_not_move(native, sources, targets):
    tensors = [torch.arange(8.0).view(4, 2), torch.zeros(5, 1)]
    with pytest.raises(ValueError, match="rows|must be"):
        native.move(tensors, sources, targets)
    assert torch.equal(tensors[0], torch.arange(8.0).view(4, 2))


def test_rows_of_a_tensor_with_gaps_do_not_move(native):
    with pytest.raises(ValueError, match="contiguous"):
        native.move([torch.zeros(4, 4)[:, ::2]], [0], [1])


@pytest.mark.parametrize(
    "filters",
    [(-1.0, 0, 1.0, 0.0), (math.nan, 0, 1.0, 0.0), (math.inf, 0, 1.0, 0.0), (1.0, 0, 0.0, 0.0)]
    + [(1.0, 0, 1.5, 0.0), (1.0, 0, math.nan, 0.0), (1.0, 0, 1.0, math.nan), (1.0, 0, 1.0, 2.0)],
)
def test_filters_out_of_range_are_not_packed(filters):
    with pytest.raises(ValueError, match="temperature must be"):
        pack_filters(*filters)


@pytest.mark.parametrize("ids", NO_INTEGERS)
def test_a_sequence_of_other_things_than_tokens_is_not_verified(ids):
    packed_trees = PackedTrees()
    for token_ids, parents in ((ids, [-1] * len(ids)), ([0] * len(ids), ids)):
        with pytest.raises(ValueError, match="must be integers"):
            packed_trees.add(PARAMS, 0, 0, token_ids, parents)
    with pytest.raises(ValueError, match="a parameter set must have 48 bytes, got 47"):
        packed_trees.add(PARAMS[:-1], 0, 0)
    assert len(packed_trees) == 0


def test_logits_of_another_kind_are_not_sampled_from(native):
    sampling, children = native_sampling.load(), native_children.load()
    packed_trees = PackedTrees()
    packed_trees.add(PARAMS, 0, 0)
    wanted = [pack_wanted(0, NO_NOISE, 1, 1.0)]
    for logits in (torch.zeros(1, 8).double(), torch.zeros(8), torch.zeros(1, 16)[:, ::2]):
        for run in (
            lambda x: sampling.draw_and_verify(x, packed_trees),
            lambda x: sampling.log_probs(x, [PARAMS], [0]),
            lambda x: children.draw(x, [PARAMS], wanted, 1),
        ):
            with pytest.raises(ValueError, match="logits must be contiguous float32"):
                run(logits)


def test_parents_that_are_no_nodes_lead_nowhere(native):
    """They are compared, never followed."""
    packed_trees = PackedTrees()
    packed_trees.add(PARAMS, 0, 0, [0, 0, 0], [99, -7, 2**40])
    [one] = native_sampling.load().draw_and_verify(torch.zeros(4, 1), packed_trees)
    assert (one.path, one.token_id) == ([], 0)


@pytest.mark.parametrize(
    ("all_params", "wanted"),
    [
        ([PARAMS], [pack_wanted(1, 0, 1, 1.0)]),
        ([PARAMS], [pack_wanted(-1, 0, 1, 1.0)]),
        ([PARAMS], [pack_wanted(0, 0, 3, 1.0)]),
        ([PARAMS], [pack_wanted(0, 0, -1, 1.0)]),
        ([PARAMS], []),
        ([PARAMS[1:]], [pack_wanted(0, 0, 1, 1.0)]),
    ],
)
def test_children_of_a_distribution_or_a_count_that_is_not_there_are_refused(
    native, all_params, wanted
):
    with pytest.raises(ValueError, match="parameter set|wanted"):
        native_children.load().draw(torch.zeros(1, 8), all_params, wanted, 2)


def test_no_children_can_be_asked_for(native):
    drawn = native_children.load().draw(torch.zeros(1, 8), [PARAMS], [pack_wanted(0, 0, 0, 1.0)], 2)
    assert drawn == [([], [])]


def test_the_suffix_index_takes_tokens_alone(native):
    rules = SuffixRules(8, 100, 1.0, 0.0, 0.1, 0.1, False)
    for wrong in (rules._replace(max_depth=0), rules._replace(max_tokens=-1)):
        with pytest.raises(ValueError, match="max_depth must be at least 1"):
            NativeSuffixIndex(native.library, wrong)
    index = NativeSuffixIndex(native.library, rules)
    for ids in (*NO_INTEGERS, [-1], [2**31]):
        for run in (index.add, lambda x: index.draft([SuffixAsk("a", x, 4, 4)])):
            with pytest.raises(ValueError, match="token ids must be"):
                run(ids)
    assert index.stats().num_tokens == 0


def test_a_rule_that_is_no_number_drafts_nothing(native):
    rules = SuffixRules(8, 100, math.nan, 0.0, 0.1, 0.1, False)
    index = NativeSuffixIndex(native.library, rules)
    assert index.draft([SuffixAsk("a", [1, 2, 1, 2, 1], 4, 4)]) == [None]


def test_room_is_float32_on_the_cpu_whatever_the_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        assert floats(2).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
