"""Draft tokens are the same whichever way they are drawn, and unlikely paths are not drafted on
where a rule allows to look."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from fake_model import make_drafter, make_row

from folospec.spec.trees.drawing import DraftPosition, DraftSampling

VOCAB_SIZE = 300


def constrained_rows():
    """Greedy and sampled rows, with and without constraints and filters."""
    options = [
        {},
        {"temperature": 0.9},
        {"temperature": 0.9, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 0.0, "logit_bias": {5: 4.0}},
        {"temperature": 1.2, "allowed_token_ids": [3, 4, 50, 200]},
        {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.4},
    ]
    rows = [make_row(number, **params) for number, params in enumerate(options)]
    return [replace(row, output_token_ids=[1, 2, 3]) for row in rows]


def draft_positions_of(drafter, rows):
    samplings = [DraftSampling(row, drafter.plan) for row in rows]
    return [
        DraftPosition(sampling, [7, 8][:depth], depth, 1 + depth)
        for sampling in samplings
        for depth in (0, 2)
    ]


@pytest.mark.parametrize("how", ["coupled", "top_k"])
def test_native_and_torch_draw_the_same_children(how):
    drafter = make_drafter(children=how)
    if drafter.drawer.native is None:
        pytest.skip("the native kernels do not run here")
    draft_positions = draft_positions_of(drafter, constrained_rows())
    logits = 3 * torch.randn(
        len(draft_positions), VOCAB_SIZE, generator=torch.Generator().manual_seed(0)
    )
    before = logits.clone()
    native = drafter.drawer.draw(logits, draft_positions, 1.5)
    drafter.drawer.native = None
    for ours, theirs in zip(native, drafter.drawer.draw(logits, draft_positions, 1.5), strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.confidence == pytest.approx(theirs.confidence, rel=1e-3, abs=1e-6)
    assert torch.equal(logits, before)


def test_constraints_do_change_what_is_drawn():
    """Control: without them the test above would compare less than it says."""
    drafter = make_drafter()
    if drafter.drawer.native is None:
        pytest.skip("the native kernels do not run here")
    draft_positions = draft_positions_of(drafter, constrained_rows())
    assert [draft_position.sampling.is_constrained for draft_position in draft_positions[::2]] == [
        False,
        False,
        *[True] * 4,
    ]
    logits = 3 * torch.randn(
        len(draft_positions), VOCAB_SIZE, generator=torch.Generator().manual_seed(0)
    )
    drawn = drafter.drawer.draw(logits, draft_positions, 1.5)
    for draft_position in draft_positions:
        draft_position.sampling.is_constrained = False
    free = drafter.drawer.draw(logits, draft_positions, 1.5)
    assert [a.token_ids == b.token_ids for a, b in zip(drawn, free, strict=True)].count(False)


def test_sampled_drafts_with_noise_of_their_own_keep_their_distributions():
    drafter = make_drafter("rejection")
    draft_positions = draft_positions_of(drafter, [make_row(1, temperature=0.9), make_row(2)])
    drawn = drafter.drawer.draw(torch.randn(len(draft_positions), VOCAB_SIZE), draft_positions, 1.0)
    assert [children.draft_probs is not None for children in drawn] == [True, True, False, False]


def paths_end_where_they_become_unlikely(proposal, least):
    """Every inner node is as likely as was asked, and some leaf is not."""
    joint = []
    for parent, chance in zip(proposal.tree.parents, proposal.confidence, strict=True):
        joint.append(chance * (joint[parent] if parent >= 0 else 1.0))
    inner = {parent for parent in proposal.tree.parents if parent >= 0}
    return all(joint[node] >= least for node in inner) and min(joint) < least


@pytest.mark.parametrize("tree", [None, [2, 2, 1, 1, 1], "dynamic"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_path_below_the_least_chance_is_not_drafted_on(tree, temperature):
    full = make_drafter(tree=tree).propose([make_row(3, temperature=temperature)])[0]
    drafter = make_drafter(tree=tree)
    row = make_row(3, temperature=temperature)
    joint = math.prod(full.confidence[:1])
    row.min_path_probability = least = joint * 0.9
    [short] = drafter.propose([row])
    assert paths_end_where_they_become_unlikely(short, least)
    assert not paths_end_where_they_become_unlikely(full, least)
    assert len(short) < len(full)


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_under_a_ratio_rule_the_length_of_a_sampled_draft_is_settled_before_it_is_drawn(acceptance):
    drafter = make_drafter(acceptance, num_speculative_tokens=5)
    rows = [make_row(3, temperature=0.9, nodes=5), make_row(3, nodes=5)]
    for row in rows:
        row.min_path_probability = 0.9999
    sampled, greedy = drafter.propose(rows)
    assert len(sampled) == 5
    assert len(greedy) == 1
