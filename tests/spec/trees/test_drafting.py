"""How a model is to draft: which options go together, what sampled drafts tell of themselves, and
what is learned from their fate."""

from __future__ import annotations

import pytest
import torch
from fake_model import (
    VOCAB_SIZE,
    likeliest,
    make_copy,
    make_drafter,
    make_row,
    mixed_rows,
    penalised_logits,
    slot_of,
)

from folospec.core.token_tree import ROOT
from folospec.sampling import noise
from folospec.sampling.noise import Purpose
from folospec.spec.drafters.base import StepResult
from folospec.spec.trees import children as children_module
from folospec.spec.trees.drafting import DRAFTING_OPTIONS, RankAcceptance, Sharpness, read_drafting
from folospec.spec.trees.tree_shapes import sequoia
from folospec.spec.verify import Verdict

TREES = {
    "chain": {},
    "expansion": {"tree": [3, 2, 1]},
    "sequoia": {"tree": "sequoia", "rank_acceptance": (0.55, 0.3, 0.1), "branching": 3},
}


def read(acceptance="coupled", **options):
    return read_drafting({**DRAFTING_OPTIONS, **options}, acceptance)


# Options


@pytest.mark.parametrize(
    ("tree", "kind", "num_nodes"),
    [
        (None, "chain", 5),
        ([3, 2, 1], "expansion", 3 + 6 + 6),
        ((2,), "expansion", 2),
        ("sequoia", "sequoia", 16),
        ("dynamic", "dynamic", 16),
    ],
)
def test_a_tree_is_named_or_given_by_its_widths(tree, kind, num_nodes):
    plan = read(tree=tree)
    assert plan.kind == kind
    assert plan.default_num_nodes == num_nodes


@pytest.mark.parametrize(
    ("acceptance", "children", "sampled", "shares"),
    [
        ("coupled", "coupled", True, True),
        ("rejection", "without_replacement", True, False),
        ("block", "without_replacement", True, False),
    ],
)
def test_children_are_drawn_in_the_best_way_that_the_rule_allows(
    acceptance, children, sampled, shares
):
    plan = read(acceptance)
    assert plan.children == children
    assert plan.is_sampled is sampled
    assert plan.uses_target_noise is shares
    assert not read(acceptance, children="top_k").is_sampled


@pytest.mark.parametrize(
    ("acceptance", "options", "said"),
    [
        ("coupled", {"tree": "bush"}, "'sequoia' or 'dynamic', got 'bush'"),
        ("coupled", {"tree": []}, "widths of at least 1, got \\[\\]"),
        ("coupled", {"tree": [2, 0]}, "got \\[2, 0\\]"),
        ("coupled", {"tree": [2, True]}, "got \\[2, True\\]"),
        ("coupled", {"tree": 3}, "got 3"),
        (
            "coupled",
            {"children": "duplicates"},
            "top_k, without_replacement, iid, got 'duplicates'",
        ),
        ("block", {"tree": [2]}, "acceptance='block' verifies chains, got tree=\\[2\\]"),
        ("block", {"tree": "dynamic"}, "verifies chains"),
        ("rejection", {"children": "coupled"}, "acceptance='rejection' forbids"),
        ("block", {"children": "coupled"}, "acceptance='block' forbids"),
        ("rejection", {"tree": "dynamic"}, "biases the output under acceptance='rejection'"),
        ("rejection", {"tree": "dynamic", "children": "iid"}, "biases the output"),
        (
            "coupled",
            {"tree": "sequoia", "branching": 2, "rank_acceptance": [0.5, 0.2, 0.1]},
            "at most branching=2 ranks",
        ),
        ("coupled", {"depth": 3}, "depth has no effect with tree=None, got 3"),
        ("coupled", {"tree": [2], "branching": 2}, r"branching has no effect with tree=\[2\]"),
        ("coupled", {"tree": "sequoia", "threshold": 0.1}, "threshold has no effect"),
        ("coupled", {"tree": "dynamic", "rank_acceptance": [0.5]}, "rank_acceptance has no effect"),
        ("coupled", {"tree": "sequoia", "rank_acceptance": [0.2, 0.5]}, "not increase"),
        ("coupled", {"tree": "dynamic", "depth": 0}, "depth must be an integer of at least 1"),
        ("coupled", {"tree": "dynamic", "branching": 2.0}, "got 2.0"),
        ("coupled", {"tree": "dynamic", "threshold": 1.0}, "threshold must be in \\[0, 1\\)"),
        ("coupled", {"tree": "dynamic", "threshold": "low"}, "got 'low'"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(acceptance, options, said):
    with pytest.raises(ValueError, match=said):
        read(acceptance, **options)


def test_a_dynamic_tree_of_deterministic_drafts_goes_with_every_rule_for_trees():
    for acceptance in ("coupled", "rejection"):
        assert read(acceptance, tree="dynamic", children="top_k").kind == "dynamic"


def test_only_a_dynamic_tree_asks_for_slots_beyond_its_nodes():
    dynamic = read(tree="dynamic", depth=5, branching=4)
    assert dynamic.num_scratch_slots(10) == 4 * 4 - 10
    assert dynamic.num_scratch_slots(30) == 0
    assert read(tree=[3, 2]).num_scratch_slots(2) == read().num_scratch_slots(3) == 0


def test_an_expansion_that_is_too_wide_is_counted_without_being_built():
    assert read(tree=[4] * 4).default_num_nodes == (4**5 - 4) // 3
    with pytest.raises(ValueError, match=f"at most 1024 nodes, .* has {(4**15 - 4) // 3}"):
        read(tree=[4] * 14)


# Acceptance by rank, and sharpness


def test_measured_acceptance_moves_from_the_prior_to_what_happens():
    ranks = RankAcceptance()
    assert ranks.estimates() == RankAcceptance.PRIOR
    for _ in range(4000):
        ranks.record([(0, False), (1, True)])
    first, second, *_ = ranks.estimates()
    assert first < 0.05
    assert second == first, "an acceptance never increases with the rank"
    sequoia(ranks.estimates(), 8, 4)  # and is a vector that shapes are made from
    for _ in range(40000):
        ranks.record([(0, True)])
    assert ranks.estimates()[0] > 0.8


def test_measured_acceptance_changes_only_when_twice_as_much_was_seen():
    ranks, seen = RankAcceptance(), []
    for _ in range(1024):
        ranks.record([(0, True)])
        if not seen or seen[-1] != ranks.estimates():
            seen.append(ranks.estimates())
    assert len(seen) == 1 + 5  # at 64, 128, 256, 512, 1024
    assert [figures[0] for figures in seen] == sorted(figures[0] for figures in seen)


def test_ranks_beyond_the_table_are_not_counted():
    ranks = RankAcceptance()
    ranks.record([(99, True)] * 200)
    assert ranks.estimates() == RankAcceptance.PRIOR


def test_given_acceptance_is_never_measured():
    ranks = RankAcceptance((0.4, 0.3))
    ranks.record([(0, True)] * 500)
    assert ranks.estimates() == (0.4, 0.3)


def test_sharpness_follows_the_surprise_and_stays_in_range():
    low, high = Sharpness.RANGE
    for accepted, end in ((True, high), (False, low)):
        sharpness, values = Sharpness(), []
        for _ in range(2000):
            sharpness.record([(0.5, accepted)])
            values.append(sharpness.value)
        assert values == sorted(values, reverse=not accepted)
        assert values[-1] == end
    sharpness = Sharpness()
    for _ in range(100):
        sharpness.record([(0.5, True), (0.5, False)])
    assert sharpness.value == pytest.approx(Sharpness.START, rel=0.02)


# Distributions and noise of sampled drafts


@pytest.mark.parametrize("how", ["iid", "without_replacement"])
@pytest.mark.parametrize("kind", TREES)
def test_sampled_drafts_tell_the_distribution_they_were_drawn_from(kind, how):
    drafter = make_drafter("rejection", children=how, **TREES[kind])
    rows = mixed_rows()
    for row, proposal in zip(rows, drafter.propose(rows), strict=True):
        if row.params.greedy:
            assert proposal.draft_probs is None
            continue
        tree = proposal.tree
        assert proposal.draft_probs.shape == (len(tree), VOCAB_SIZE)
        for node in (ROOT, *range(len(tree))):
            path = tree.path_token_ids(node)
            left = (penalised_logits(row, path) / row.params.temperature).softmax(-1)
            for child in tree.children(node):
                assert torch.allclose(proposal.draft_probs[child], left, atol=1e-9)
                if how == "without_replacement":
                    left[tree.token_ids[child]] = 0.0
                    left = left / left.sum()


def keys_of(monkeypatch, drafters, rows):
    """Every key of noise that the drafters look up in a step, and in the one after it."""
    used = []

    def spy(log_probs, keys):
        used.extend(keys)
        return real(log_probs, keys)

    real = children_module.perturb
    monkeypatch.setattr(children_module, "perturb", spy)
    for _ in range(2):
        for drafter in drafters:
            drafter.propose([make_copy(row) for row in rows])
        for row in rows:
            row.token_ids = [*row.token_ids, 1]
    return used


@pytest.mark.parametrize("how", ["iid", "without_replacement"])
def test_no_two_draws_of_two_drafters_share_their_noise(how, monkeypatch):
    drafters = [
        make_drafter("rejection", stream, children=how, tree=[3, 2, 2]) for stream in (0, 1)
    ]
    rows = [make_row(number, temperature=1.0, nodes=21) for number in range(3)]
    used = keys_of(monkeypatch, drafters, rows)
    draws = {"iid": 3 + 6 + 12, "without_replacement": 1 + 3 + 6}[how]
    assert len(used) == 2 * 2 * 3 * draws
    assert len(set(used)) == len(used)
    targets = {
        noise.key(row.seed, row.sample_index, position, Purpose.TARGET)
        for row in rows
        for position in range(30)
    }
    assert not targets & set(used)


def test_coupled_draws_use_the_targets_noise_alone(monkeypatch):
    rows = [make_row(number, temperature=1.0) for number in range(3)]
    used = keys_of(monkeypatch, [make_drafter(tree=[3, 2, 2])], rows)
    targets = {
        noise.key(row.seed, row.sample_index, position, Purpose.TARGET)
        for row in rows
        for position in range(30)
    }
    assert set(used) <= targets


@pytest.mark.parametrize("how", ["iid", "without_replacement"])
def test_the_confidence_of_a_sampled_draft_looks_at_its_rank_alone(how):
    drafter = make_drafter("rejection", children=how, tree=[3, 2])
    by_rank = {}
    for number in range(1, 6):
        [proposal] = drafter.propose([make_row(number, temperature=1.0)])
        for node in (ROOT, *range(len(proposal))):
            for rank, child in enumerate(proposal.tree.children(node)):
                by_rank.setdefault(rank, set()).add(proposal.confidence[child])
    assert {rank: len(values) for rank, values in by_rank.items()} == {0: 1, 1: 1, 2: 1}


# Learning


def test_acceptance_is_learned_by_rank_of_the_nodes_that_were_tried():
    drafter = make_drafter(tree=[3, 1])
    row = make_row()
    for _ in range(64):
        [proposal] = drafter.propose([row])
        second = proposal.tree.children()[1]
        own = {node: node for node in range(len(proposal))}
        drafter.observe([StepResult("seq-0", proposal, Verdict([second], 0), [], own_nodes=own)])
    ranks = drafter.stats()["rank_acceptance"]
    # Of rank 0 two were tried in each step: the first child, and the one below the second child.
    prior, weight = drafter.ranks.PRIOR, drafter.ranks.WEIGHT
    assert ranks[0] == pytest.approx(prior[0] * weight / (weight + 2 * 64))
    assert ranks[0] >= ranks[1] >= ranks[2]


def test_a_pruned_tree_learns_by_the_rank_at_which_a_node_was_drawn():
    """Of a dynamic tree some siblings are not proposed; the ranks are those of the draft model."""
    drafter = make_drafter(tree="dynamic", branching=4)
    row = make_row(2, temperature=1.0, nodes=7)
    [proposal] = drafter.propose([row])
    expected = []
    for node in range(len(proposal)):
        *above, token = proposal.tree.path_token_ids(node)
        ranked = [best for best, _ in likeliest(drafter, row, above, VOCAB_SIZE)]
        expected.append(ranked.index(token))
    seen = []
    drafter.ranks.record = lambda trials: seen.extend(trials)
    own = {node: node for node in range(len(proposal))}
    path = proposal.tree.path(len(proposal) - 1)
    drafter.observe([StepResult("seq-2", proposal, Verdict(path, 0), [], own_nodes=own)])
    tried = [n for n, parent in enumerate(proposal.tree.parents) if parent in {ROOT, *path}]
    assert seen == [(expected[node], node in path) for node in tried]
    assert len(path) > 1
    assert expected != sorted(expected), "all ranks are in order, whatever was left out"


def test_what_was_dropped_is_not_learned_from():
    drafter = make_drafter(tree=[2])
    [proposal] = drafter.propose([make_row()])
    outcome = StepResult("seq-0", proposal, Verdict([0], 0), [], own_nodes={0: 0, 1: 1})
    learned = []
    drafter.ranks.record = lambda trials: learned.extend(trials)
    drafter.drop("seq-0")
    drafter.observe([outcome])
    assert learned == []
    drafter.propose([make_row()])  # control: without the drop it learns
    drafter.observe([outcome])
    assert learned


# A smaller vocabulary


def test_tokens_that_only_the_target_has_are_never_drafted_and_read_as_the_last():
    drafter = make_drafter(tree=[2, 2])
    drafter.target_vocab_size = VOCAB_SIZE + 3
    row = make_row(1, temperature=1.0)
    row.token_ids = [*row.token_ids, VOCAB_SIZE + 1]
    [proposal] = drafter.propose([row])
    assert max(proposal.tree.token_ids) < VOCAB_SIZE
    root = slot_of(row.block_table, row.root_position)
    assert drafter.runner.kv[root] == (VOCAB_SIZE - 1, row.root_position)
