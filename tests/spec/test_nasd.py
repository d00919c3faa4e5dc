"""N-gram assisted drafting: what is counted, how long the drafts are, and that the output's
distribution is the target's. Each claim is one that other implementations of the method have
broken."""

from __future__ import annotations

import math

import pytest
import torch
from enumeration import Toy, distance, output_distribution
from lookup_rows import ask, chain_of, make, num_read_per_step, tell

from folospec.core.token_tree import TokenTree
from folospec.spec.drafters import nasd
from folospec.spec.drafters.nasd import EntropyGate
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import AcceptanceTable
from folospec.spec.verify import verify_block, verify_rejection


def test_drafts_follow_the_counts_one_token_at_a_time():
    drafter = make("nasd", n=3)
    assert chain_of(drafter, [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 4, 9, 1, 2]) == [3, 4, 9, 1, 2]


def test_a_context_of_one_token_is_used_and_bigrams_alone_are_enough():
    assert chain_of(make("nasd", n=2), [7, 8, 9, 7]) == [8, 9, 7, 8, 9]
    assert chain_of(make("nasd", n=4), [7, 8, 9, 5, 7])[:2] == [8, 9]
    assert chain_of(make("nasd", n=3, store="one_level"), [7, 8, 9, 5, 7]) == []


@pytest.mark.parametrize("token_ids", [[1], [1, 2], [1, 2, 3]])
def test_no_draft_is_made_where_nothing_is_known_and_nothing_breaks(token_ids):
    drafter = make("nasd", n=4, filler_top_k=2)
    assert ask(drafter, token_ids) is None
    tell(drafter, None, next_token_id=8, top_token_ids=[[8, 9]])
    drafter.drop("a")
    tell(drafter, None, next_token_id=8, top_token_ids=[[8, 9]])
    assert drafter.stats()["num_entries"] == 0


def test_drafts_keep_to_the_limits_of_the_row():
    for limits in ({"max_draft_tokens": 2}, {"max_depth": 2}):
        assert len(chain_of(make("nasd"), [1, 2, 3, 1, 2, 3], **limits)) == 2


def test_the_most_recent_of_equally_frequent_tokens_is_drafted():
    assert chain_of(make("nasd", n=2), [1, 2, 1, 3, 1], max_depth=1) == [3]


# What is counted, and what is guessed.


def counted(drafter, ngram):
    stores = [state.store for state in drafter._states.values()] or [drafter._shared]
    return stores[0].count(ngram)


def test_committed_tokens_are_counted_once_whatever_was_proposed_and_told():
    drafter = make("nasd", n=3, filler_top_k=2)
    token_ids = [1, 2, 3, 1, 2]
    for _ in range(6):
        proposal = ask(drafter, token_ids)
        tops = [[t, 50] for t in (*proposal.tree.token_ids, 7)]
        path = range(len(proposal) // 2)
        token_ids += tell(drafter, proposal, path, tops[len(path)][0], tops)
    ask(drafter, token_ids)
    pairs = list(zip(token_ids, token_ids[1:], strict=False))
    for pair in set(pairs):
        assert counted(drafter, pair) == pairs.count(pair)
    assert counted(drafter, [1, 50]) == 0


def test_the_targets_likeliest_tokens_are_noted_after_every_verified_node():
    drafter = make("nasd", n=2, filler_top_k=2)
    ask(drafter, [1, 2])
    tree = TokenTree([10, 11, 12, 13], [-1, 0, -1, 2])
    another = Proposal(tree, candidate=[True, True, True, False])
    tops = [[10, 20], [30, 21], [41, 42], [32, 33], [43, 44]]
    tell(drafter, another, [0], 30, tops, is_own=False)
    store = drafter._states["a"].store
    found = {t: store.lookup([t]).continuations.filler for t in (2, 10, 11, 12)}
    assert found == {
        2: {20: 0.25},  # 10 was said: it is counted, not guessed
        10: {21: 0.25},
        11: {41: 0.5, 42: 0.25},
        12: {32: 0.5, 33: 0.25},
    }
    assert store.lookup([13]) is None, "nobody verifies a scratch row"


def test_a_step_without_a_draft_teaches_too():
    drafter = make("nasd", n=3, filler_top_k=1)
    ask(drafter, [1, 2])
    assert tell(drafter, None, next_token_id=5, top_token_ids=[[6]]) == [5]
    tell(drafter, None, next_token_id=7, top_token_ids=[[8]])
    store = drafter._states["a"].store
    assert store.lookup([1, 2]).token_id == 6
    assert store.lookup([2, 5]).token_id == 8


def test_only_a_filler_asks_the_target_for_its_top_tokens():
    assert make("nasd").needs.num_top_tokens == 1
    assert make("nasd", filler_top_k=4).needs.num_top_tokens == 4
    assert make("nasd", filler_top_k=0).needs.num_top_tokens == 0


@pytest.mark.parametrize("store", ["basic", "one_level"])
def test_a_step_costs_what_is_new(store):
    costs = {num_read_per_step(make("nasd", store=store), n) for n in (70, 7000)}
    assert len(costs) == 1


def test_counting_from_the_start_again_costs_the_whole_context(monkeypatch):
    """Control of the test above."""
    real = nasd.NgramStore.update
    monkeypatch.setattr(nasd.NgramStore, "update", lambda self, ids, start: real(self, ids, 0))
    short, long = (num_read_per_step(make("nasd"), n) for n in (70, 7000))
    assert long > 50 * short


# Stores of one sequence and of all.


def test_a_shared_store_knows_what_other_sequences_said():
    drafter = make("nasd", shared=True)
    ask(drafter, [1, 2, 3, 4], seq_id="a")
    assert chain_of(drafter, [9, 1, 2], seq_id="b")[:2] == [3, 4]
    alone = make("nasd")
    ask(alone, [1, 2, 3, 4], seq_id="a")
    assert chain_of(alone, [9, 1, 2], seq_id="b") == []


def test_a_shared_store_counts_nothing_again_after_a_preemption():
    drafter = make("nasd", shared=True)
    ask(drafter, [1, 2, 3], num_prompt_tokens=2)
    drafter.drop("a")
    ask(drafter, [1, 2, 3, 4], num_prompt_tokens=2)
    assert [counted(drafter, pair) for pair in ([1, 2], [2, 3], [3, 4])] == [1, 1, 1]


def test_a_shared_store_counts_the_prompt_of_siblings_once():
    drafter = make("nasd", shared=True)
    for index in range(3):
        ask(drafter, [1, 2, 3], f"a-{index}", sample_index=index, num_prompt_tokens=2)
    assert [counted(drafter, pair) for pair in ([1, 2], [2, 3])] == [1, 3]


@pytest.mark.parametrize("preempted", [False, True])
def test_a_shared_store_keeps_the_last_tokens_of_a_finished_sequence(preempted):
    drafter = make("nasd", shared=True)
    ask(drafter, [1, 2, 3])
    if preempted:
        drafter.drop("a")
    drafter.finish("a", [1, 2, 3, 4], 2)
    drafter.drop("a")
    assert [counted(drafter, pair) for pair in ([1, 2], [2, 3], [3, 4])] == [1, 1, 1]
    assert not drafter._states
    assert not drafter._num_counted


def test_a_shared_store_is_bounded():
    drafter = make("nasd", shared=True, max_entries=50)
    for number in range(20):
        ask(drafter, [(number * 7 + i * i) % 61 for i in range(40)], f"seq-{number}")
        assert drafter.stats()["num_entries"] <= 50
    assert drafter.stats() == {"num_stores": 1, "num_entries": drafter.stats()["num_entries"]}


def test_a_dropped_sequence_is_forgotten():
    drafter = make("nasd")
    ask(drafter, [1, 2, 3])
    assert drafter.stats()["num_entries"] > 0
    drafter.drop("a")
    assert drafter.stats() == {"num_stores": 0, "num_entries": 0}


# Unknown contexts.


def test_an_unknown_context_ends_the_draft_or_is_bridged_by_a_guess_that_can_be_repeated():
    token_ids = [1, 2, 3, 1, 9]
    assert chain_of(make("nasd", n=2), token_ids) == []
    guesses = [chain_of(make("nasd", n=2, stop_if_unknown=False), token_ids) for _ in range(2)]
    assert guesses[0] == guesses[1]
    assert len(guesses[0]) == 5
    first = {
        chain_of(make("nasd", stop_if_unknown=False), token_ids, seed=s)[0] for s in range(200)
    }
    assert min(first) >= 0
    assert max(first) < 61
    assert len(first) > 50


def test_a_guess_is_not_trusted():
    proposal = ask(make("nasd", n=2, stop_if_unknown=False), [1, 9])
    assert max(proposal.confidence[:1]) < 0.05


def test_confidence_follows_what_was_accepted():
    drafter = make("nasd", n=2, filler_top_k=0)
    before = ask(drafter, [1, 2, 1, 2, 1]).confidence
    for _ in range(40):
        tell(drafter, ask(drafter, [1, 2, 1, 2, 1]), path=[0, 1])
    after = ask(drafter, [1, 2, 1, 2, 1]).confidence
    assert before[0] == AcceptanceTable(prior=0.4).estimate("anything")
    assert 0.5 < after[0] < 0.8  # two of three that were tried


# The entropy gate.

SURE, UNSURE = [1, 2, 3, 4, 5] * 3 + [1], [1, 2, 1, 3, 1, 4, 1, 5, 1]


def test_the_gate_tells_sure_contexts_from_unsure_ones():
    options = {"n": 2, "egag": True, "num_speculative_tokens": 8}
    assert len(chain_of(make("nasd", **options), SURE, max_draft_tokens=8)) == 8
    assert len(chain_of(make("nasd", **options), UNSURE, max_draft_tokens=8)) == 1
    plain = make("nasd", n=2, num_speculative_tokens=8)
    assert len(chain_of(plain, UNSURE, max_draft_tokens=8)) == 8


def test_entropy_over_the_vocabulary_would_not_tell_them_apart():
    """What is wrong with log V, in numbers: 0.1 and 1 nat come to the same length."""
    assert {math.floor((1 - nats / math.log(128_000)) * 8) for nats in (0.1, 1.0)} == {7}


def test_a_small_doubt_costs_nothing_and_the_range_is_kept():
    gate = EntropyGate(gamma_min=1, gamma_max=8, ema=0.0)
    assert [gate.length(doubt) for doubt in (0.0, 0.05, 0.5, 0.95, 1.0)] == [8, 8, 4, 1, 1]
    assert EntropyGate(gamma_min=3, gamma_max=8, ema=0.0).length(1.0) == 3


def test_a_draft_that_comes_to_a_fork_is_cut_there():
    token_ids = [1, 2, 3, 4, 6, 4, 7, 4, 8, 4, 9, 1]
    options = {"n": 2, "num_speculative_tokens": 6}
    kept = {"max_draft_tokens": 6}
    assert chain_of(make("nasd", egag=True, **options), token_ids, **kept) == [2, 3, 4]
    assert len(chain_of(make("nasd", **options), token_ids, **kept)) == 6


def test_earlier_doubt_is_remembered_by_ema():
    options = {"n": 2, "num_speculative_tokens": 8, "egag": True}
    lengths = {}
    for ema in (0.0, 0.5):
        drafter = make("nasd", ema=ema, **options)
        chain_of(drafter, UNSURE, max_draft_tokens=8)
        lengths[ema] = len(chain_of(drafter, [*UNSURE, 9, 8, 9, 8, 9], max_draft_tokens=8))
    assert lengths == {0.0: 8, 0.5: 4}


def test_a_gate_that_closed_opens_again():
    drafter = make("nasd", n=2, num_speculative_tokens=8, egag=True, gamma_min=0, ema=0.95)
    assert chain_of(drafter, UNSURE) == []
    lengths = [len(chain_of(drafter, [*UNSURE, 9, 8, 9])) for _ in range(12)]
    assert lengths[0] == 0 < 1 < lengths[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 1}, "n must be an integer of at least 2, got 1"),
        ({"n": 2.5}, "n must be an integer of at least 2, got 2.5"),
        ({"store": "trie"}, "store must be one of basic, one_level, got 'trie'"),
        ({"filler_top_k": -1}, "filler_top_k must be an integer of at least 0, got -1"),
        ({"max_entries": 0}, "max_entries must be an integer of at least 1, got 0"),
        ({"shared": 1}, "shared must be True or False, got 1"),
        ({"gamma_min": 2}, "gamma_min must not be given without egag=True"),
        ({"egag": True, "gamma_max": 9}, r"gamma_max must be an integer in \[1, 5\], got 9"),
        ({"egag": True, "gamma_min": 6}, r"gamma_min must be an integer in \[0, 5\], got 6"),
        ({"egag": True, "ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"window": 3}, "unknown option"),
        ({"model": "x"}, "has no model"),
    ],
)
def test_bad_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make("nasd", **settings)


# The distribution of the output.


class FixedToy(Toy):
    """A target that draws every token from one distribution."""

    distribution = (0.5, 0.3, 0.2)

    def target(self, context):
        return self.distribution


def drafter_over(token_ids, **options):
    """Proposes what the real drafter does after these tokens; a function of the context."""
    proposal = ask(make("nasd", vocab_size=3, n=2, **options), token_ids, max_draft_tokens=2)
    return lambda choices: Proposal(proposal.tree)


@pytest.mark.parametrize("rule", [verify_rejection, verify_block], ids=lambda j: j.__name__)
@pytest.mark.parametrize("token_ids", [[0, 1, 0], [1, 0, 1], [2, 2], [0]])
def test_a_drafted_token_is_emitted_with_the_targets_probability(rule, token_ids):
    toy = FixedToy("fixed", 0)
    drafter = drafter_over(token_ids, stop_if_unknown=False)
    assert distance(toy, drafter, rule, 3) < 1e-12


def test_drawing_again_after_a_mismatch_would_favour_the_draft():
    """Control: p (2 - p) instead of p, as the original method does."""

    def drawing_again(proposal, target_probs, coins):
        coins.draw_from = lambda residual, row: target_probs[row]
        return verify_rejection(proposal, target_probs, coins)

    toy, drafter = FixedToy("fixed", 0), drafter_over([1, 0, 1])
    first = [0.0] * 3
    for tokens, weight in output_distribution(toy, drafter, drawing_again, 3).items():
        first[tokens[0]] += weight
    assert first == pytest.approx([0.75, 0.15, 0.1])
    assert torch.tensor(first).argmax() == drafter(None).tree.token_ids[0]
