"""Trees drafted by a model are the trees that the papers describe, every node of them was computed
from its own ancestors, and its slot is where it is said to be."""

from __future__ import annotations

import random

import pytest
from fake_model import (
    VOCAB_SIZE,
    likeliest,
    logits_after,
    make_copy,
    make_drafter,
    make_row,
    mixed_rows,
    nested,
    slot_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from folospec.core.token_tree import ROOT, TokenTree
from folospec.sampling import noise
from folospec.spec.trees.builders import TreeBuilder
from folospec.spec.trees.tree_shapes import expansion, sequoia

RANK_ACCEPTANCE = (0.55, 0.3, 0.1)

# The reference: the papers' recursions, one path at a time, on the true tokens


def fill(drafter, row, shape, node=ROOT, path=()):
    """A static tree: the children of a node are the best tokens after its path."""
    places = shape.children(node)
    return [
        (token, fill(drafter, row, shape, place, (*path, token)))
        for place, (token, _) in zip(
            places, likeliest(drafter, row, path, len(places)), strict=True
        )
    ]


def expand_and_rerank(drafter, row):
    """EAGLE-2: expand the likeliest nodes of every level, then keep the likeliest of all. Returns
    the confidence of each path that is kept, in the order of the siblings."""
    plan = drafter.plan
    beam, everything = [((), 1.0)], []
    for _ in range(min(plan.depth, row.max_depth)):
        level = [
            ((*path, token), joint * chance, chance)
            for path, joint in beam
            for token, chance in likeliest(drafter, row, path, plan.branching)
        ]
        everything += level
        grown = sorted(level, key=lambda node: -node[1])[: plan.branching]
        beam = [(path, joint) for path, joint, _ in grown if joint > plan.threshold]
    best = sorted(everything, key=lambda node: -node[1])[: row.max_draft_tokens]
    return {path: chance for path, _, chance in best}


STATIC = {
    "chain": {},
    "expansion": {"tree": [3, 2, 1, 2]},
    "sequoia": {"tree": "sequoia", "rank_acceptance": RANK_ACCEPTANCE, "branching": 3},
}


def static_shape(kind, row, depth=6):
    if kind == "chain":
        return TokenTree.chain([0] * min(row.max_draft_tokens, row.max_depth))
    if kind == "expansion":
        return expansion([3, 2, 1, 2][: row.max_depth], row.max_draft_tokens)
    return sequoia(RANK_ACCEPTANCE, row.max_draft_tokens, min(row.max_depth, depth))


each_static = pytest.mark.parametrize("kind", STATIC)
each_children = pytest.mark.parametrize("how", ["coupled", "top_k"])


@each_children
@each_static
@pytest.mark.parametrize("limits", [{}, {"nodes": 7}, {"depth": 2}, {"nodes": 1}], ids=str)
def test_a_static_tree_is_the_shape_filled_with_the_best_tokens(kind, how, limits):
    drafter = make_drafter(children=how, **STATIC[kind])
    rows = mixed_rows(**limits)
    for row, proposal in zip(rows, drafter.propose(rows), strict=True):
        shape = static_shape(kind, row)
        assert nested(proposal.tree) == fill(drafter, row, shape)
        assert proposal.draft_probs is None
        for node in range(len(proposal)):
            above = proposal.tree.path_token_ids(node)[:-1]
            chances = dict(likeliest(drafter, row, above, VOCAB_SIZE))
            expected = chances[proposal.tree.token_ids[node]]
            assert proposal.confidence[node] == pytest.approx(expected, rel=1e-9)


DYNAMIC = [
    {},
    {"depth": 3, "branching": 2},
    {"depth": 5, "branching": 3, "threshold": 0.1},
    {"depth": 4, "branching": 9},
    {"depth": 1, "branching": 3},
]


@each_children
@pytest.mark.parametrize("options", DYNAMIC, ids=str)
@pytest.mark.parametrize("limits", [{}, {"nodes": 3}, {"depth": 2}, {"nodes": 30}], ids=str)
def test_a_dynamic_tree_is_what_expand_and_rerank_keep(options, how, limits):
    drafter = make_drafter(tree="dynamic", children=how, **options)
    nodes = limits.get("nodes", 16)
    needed = nodes + drafter.plan.num_scratch_slots(nodes)
    rows = mixed_rows(**{**limits, "slots": needed})
    for row, proposal in zip(rows, drafter.propose(rows), strict=True):
        expected = expand_and_rerank(drafter, row)
        paths = [tuple(proposal.tree.path_token_ids(node)) for node in range(len(proposal))]
        assert dict(zip(paths, proposal.confidence, strict=True)) == pytest.approx(expected)
        for node in (ROOT, *range(len(proposal))):
            siblings = [proposal.tree.token_ids[child] for child in proposal.tree.children(node)]
            path = tuple(proposal.tree.path_token_ids(node))
            ranked = [token for token, _ in likeliest(drafter, row, path, VOCAB_SIZE)]
            assert siblings == [token for token in ranked if token in siblings]


def test_nothing_is_run_for_children_that_cannot_be_proposed():
    """With three nodes to keep, deep levels are too unlikely to matter."""
    drafter = make_drafter(tree="dynamic", depth=9, branching=4)
    rows = [make_row(nodes=3, depth=20)]
    drafter.propose(rows)
    assert drafter.runner.num_passes < 5


@pytest.mark.parametrize("kind", [*STATIC, "dynamic"])
def test_every_node_is_run_once_at_most(kind):
    drafter = make_drafter(**STATIC.get(kind, {"tree": "dynamic"}))
    [proposal] = drafter.propose([make_row(length=6)])
    num_inner = len({parent for parent in proposal.tree.parents if parent != ROOT})
    assert num_inner > 1
    assert drafter.runner.num_rows == len(drafter.runner.written)
    if kind != "dynamic":
        assert drafter.runner.num_rows == 6 + num_inner


def test_a_chain_that_ends_early_does_not_disturb_the_others():
    drafter = make_drafter()
    rows = mixed_rows()
    rows[1].max_depth, rows[2].max_draft_tokens, rows[3].max_depth = 1, 2, 3
    lengths = [len(proposal) for proposal in drafter.propose(rows)]
    assert lengths == [9, 1, 2, 3, 9]


def test_a_row_that_may_not_draft_does_not_disturb_the_others():
    drafter = make_drafter(tree=[2, 2])
    rows = mixed_rows()
    rows[0].max_depth = rows[2].max_draft_tokens = 0
    proposals = drafter.propose(rows)
    assert proposals[0] is None
    assert proposals[2] is None
    for number in (1, 3, 4):
        expected = fill(drafter, rows[number], expansion([2, 2]))
        assert nested(proposals[number].tree) == expected


class TestControls:
    """Each breaks what the tests above rest on."""

    def trees_differ(self):
        drafter = make_drafter(tree=[3, 2, 1])
        rows = mixed_rows()
        return [
            nested(proposal.tree) != fill(drafter, row, expansion([3, 2, 1]))
            for row, proposal in zip(rows, drafter.propose(rows), strict=True)
        ]

    def test_the_right_trees_do_not_differ(self):
        assert not any(self.trees_differ())

    def test_nodes_that_see_their_uncles_are_noticed(self, monkeypatch):
        def as_a_comb(self):
            rows = real(self)
            rows.parents = rows.parents and [min(r - 1, 1) for r in range(len(rows.parents))]
            return rows

        real = TreeBuilder.next_rows
        monkeypatch.setattr(TreeBuilder, "next_rows", as_a_comb)
        assert all(self.trees_differ())

    def test_rows_one_slot_late_are_noticed(self, monkeypatch):
        def late(self):
            rows = real(self)
            rows.start += rows.parents is not None
            return rows

        real = TreeBuilder.next_rows
        monkeypatch.setattr(TreeBuilder, "next_rows", late)
        with pytest.raises((AssertionError, KeyError)):
            self.trees_differ()

    def test_noise_of_another_position_is_noticed(self, monkeypatch):
        real = noise.key
        monkeypatch.setattr(noise, "key", lambda s, i, position, p: real(s, i, position + 1, p))
        drafter = make_drafter(tree=[3, 2, 1])
        [proposal] = drafter.propose([make_row(1, temperature=1.0)])
        monkeypatch.undo()
        assert nested(proposal.tree) != fill(
            drafter, make_row(1, temperature=1.0), expansion([3, 2, 1])
        )


# Slots and budgets

every_tree = st.sampled_from(
    [
        {},
        {"tree": [3, 2, 1]},
        {"tree": [1, 1, 4]},
        {"tree": "sequoia"},
        {"tree": "dynamic"},
        {"tree": "dynamic", "depth": 4, "branching": 2},
        {"tree": "dynamic", "branching": 6, "threshold": 0.05},
    ]
)


@st.composite
def limited_rows(draw):
    rows = []
    for number in range(draw(st.integers(1, 3))):
        nodes = draw(st.integers(0, 12))
        rows.append(
            make_row(
                number,
                temperature=draw(st.sampled_from([0.0, 1.0])),
                length=draw(st.integers(1, 9)),
                nodes=nodes,
                depth=draw(st.integers(0, 5)),
                slots=nodes + draw(st.integers(0, 12)),
            )
        )
    return rows


@settings(max_examples=150, deadline=None)
@given(options=every_tree, rows=limited_rows(), data=st.data())
def test_limits_are_kept_and_slots_hold_the_nodes(options, rows, data):
    how = data.draw(st.sampled_from(["coupled", "top_k", "iid", "without_replacement"]))
    drafter = make_drafter(children=how, **options)
    proposals = drafter.propose(rows)
    for row, proposal in zip(rows, proposals, strict=True):
        assert row.num_draft_computed == len(row.token_ids)
        if min(row.max_draft_tokens, row.max_depth) == 0:
            assert proposal is None
            continue
        assert 1 <= len(proposal) <= row.max_draft_tokens
        assert max(proposal.tree.depths) <= row.max_depth
        assert_slots_hold_the_nodes(drafter.runner, row, proposal)
    allowed = {
        slot_of(row.block_table, index)
        for row in rows
        for index in range(len(row.token_ids) + row.num_slots)
    }
    assert drafter.runner.written <= allowed


def assert_slots_hold_the_nodes(runner, row, proposal):
    offsets = proposal.draft_slots["fake"]
    used = [offset for offset in offsets if offset is not None]
    assert len(set(used)) == len(used)
    for node, offset in enumerate(offsets):
        if offset is not None:
            assert 1 <= offset <= row.num_slots
            slot = slot_of(row.block_table, row.root_position + offset)
            entry = (proposal.tree.token_ids[node], row.root_position + proposal.tree.depths[node])
            assert runner.kv[slot] == entry
    inner = {parent for parent in proposal.tree.parents if parent != ROOT}
    assert all(offsets[node] is not None for node in inner), "a parent was never run"


@pytest.mark.parametrize("branching", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_dynamic_tree_never_needs_more_than_the_scratch_slots_it_asks_for(branching, depth):
    options = {"tree": "dynamic", "depth": depth, "branching": branching}
    drafter = make_drafter(num_speculative_tokens=4, **options)
    asked = 4 + drafter.max_scratch_slots
    for number in range(8):
        trees = []
        for slots in (asked, asked + 50):
            row = make_row(number, temperature=number / 4, nodes=4, slots=slots)
            [proposal] = make_drafter(num_speculative_tokens=4, **options).propose([row])
            trees.append(nested(proposal.tree))
        assert trees[0] == trees[1]


def test_a_node_with_too_few_possible_children_keeps_its_place_in_the_shape():
    """top_k leaves two tokens, of which the shape wanted three; the third has nothing below it."""
    drafter = make_drafter(tree=[3, 1, 2])
    row = make_row(1, temperature=1.0, top_k=2)
    [proposal] = drafter.propose([row])
    tree = proposal.tree
    assert [tree.depths.count(depth) for depth in (1, 2, 3)] == [2, 2, 4]
    for node in (ROOT, *range(len(tree))):
        logits = logits_after((*row.token_ids, *tree.path_token_ids(node)))
        best = sorted(range(VOCAB_SIZE), key=lambda token: -logits[token])[:2]
        assert {tree.token_ids[child] for child in tree.children(node)} <= set(best)


# Many steps


def commit(drafter, row, proposal, path, next_token_id):
    """What the engine does after a step: keep the accepted rows, and append the tokens."""
    kv, offsets = drafter.runner.kv, proposal.draft_slots["fake"]
    kept = []
    for node in path:
        if offsets[node] is None:
            break
        kept.append(kv[slot_of(row.block_table, row.root_position + offsets[node])])
    for depth, entry in enumerate(kept, start=1):
        kv[slot_of(row.block_table, row.root_position + depth)] = entry
    row.num_draft_computed = row.root_position + 1 + len(kept)
    new = [*(proposal.tree.token_ids[node] for node in path), next_token_id]
    row.token_ids = [*row.token_ids, *new]
    row.output_token_ids = [*row.output_token_ids, *new]


@pytest.mark.parametrize("kind", [*STATIC, "dynamic"])
def test_the_tree_is_right_after_every_kind_of_acceptance(kind):
    """Accepted nodes of any branch, with draft KV and without, lead to the same next tree as a
    drafter has that starts afresh."""
    options = STATIC.get(kind, {"tree": "dynamic"})
    drafter, rng = make_drafter(**options), random.Random(3)
    rows = mixed_rows()
    lengths, without_kv, moved = set(), 0, 0
    for _ in range(12):
        for row, proposal in zip(rows, drafter.propose(rows), strict=True):
            [fresh] = make_drafter(**options).propose([make_copy(row)])
            assert nested(proposal.tree) == nested(fresh.tree)
            path = list(proposal.tree.path(rng.randrange(-1, len(proposal))))
            offsets = proposal.draft_slots["fake"]
            lengths.add(len(path))
            without_kv += any(offsets[node] is None for node in path)
            moved += any(offsets[n] not in (None, d) for d, n in enumerate(path, start=1))
            commit(drafter, row, proposal, path, rng.randrange(VOCAB_SIZE))
    assert len(lengths) > 2
    assert without_kv > 0
    assert moved > 0 or kind == "chain"


def test_rows_left_where_they_were_are_noticed(monkeypatch):
    """Control: accepted rows of a tree are not moved beside each other."""
    drafter = make_drafter(tree=[2, 2, 2])
    row = make_row()
    [proposal] = drafter.propose([row])
    second = proposal.tree.children()[1]
    before = dict(drafter.runner.kv)
    commit(drafter, row, proposal, [second], 0)
    drafter.runner.kv.update(before)
    [proposal] = drafter.propose([row])
    assert nested(proposal.tree) != fill(drafter, row, expansion([2, 2, 2]))
