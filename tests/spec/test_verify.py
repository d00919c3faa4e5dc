"""The acceptance rules on cases small enough to work out by hand."""

import pytest
import torch

from folospec.core.token_tree import TokenTree
from folospec.spec.acceptance import ACCEPTANCE
from folospec.spec.proposal import Proposal
from folospec.spec.verify import KeyedCoins, Verdict, verify_block, verify_coupled, verify_rejection
from folospec.speculative_config import ACCEPTANCE_RULES

#   root -- 0: token 5 -- 1: token 6
#      |          `------ 3: token 7
#      `--- 2: token 8
TREE = TokenTree([5, 6, 8, 7], [-1, 0, -1, 0])
#   root -- 0: token 5 -- 2: token 6
#      `--- 1: token 5 -- 3: token 7        two merged proposals that agree on the first token
DUPLICATES = TokenTree([5, 5, 6, 7], [-1, -1, 0, 1])


class ScriptedCoins:
    """Accepts the given nodes, draws the likeliest token, and writes down what it was asked."""

    def __init__(self, *accepted):
        self.accepted, self.asked, self.row, self.distribution = accepted, {}, None, None

    def accept(self, probability, node):
        self.asked[node] = probability
        return node in self.accepted

    def draw(self, probs, row):
        self.row, self.distribution = row, probs
        return int(probs.argmax())


@pytest.mark.parametrize(
    ("tree", "target_token_ids", "verdict"),
    [
        (TokenTree([], []), [3], Verdict([], 3)),
        (TREE, [9, 0, 0, 0, 0], Verdict([], 9)),
        (TREE, [5, 9, 0, 0, 0], Verdict([0], 9)),
        (TREE, [5, 6, 4, 0, 0], Verdict([0, 1], 4)),
        (TREE, [5, 7, 0, 0, 4], Verdict([0, 3], 4)),
        (TREE, [8, 0, 0, 4, 0], Verdict([2], 4)),
        (TREE, [8, 6, 0, 6, 0], Verdict([2], 6)),  # token 6 is no child of node 2
        (TokenTree.chain([1, 1, 1]), [1, 1, 2, 1], Verdict([0, 1], 2)),
        (TokenTree.chain([1, 1, 1]), [1, 1, 1, 1], Verdict([0, 1, 2], 1)),
        (DUPLICATES, [5, 6, 6, 4, 0], Verdict([0, 2], 4)),
        (DUPLICATES, [5, 7, 7, 0, 4], Verdict([1, 3], 4)),
        (DUPLICATES, [5, 9, 9, 0, 0], Verdict([0], 9)),
    ],
)
def test_coupled_descends_while_a_child_is_the_targets_token(tree, target_token_ids, verdict):
    assert verify_coupled(tree, target_token_ids) == verdict


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        ([True, True, True, True], Verdict([0, 1], 4)),
        ([True, False, True, True], Verdict([0], 6)),
        ([False, True, True, True], Verdict([], 5)),
    ],
)
def test_coupled_never_accepts_a_scratch_row_or_what_hangs_under_it(candidate, verdict):
    assert verify_coupled(TREE, [5, 6, 4, 0, 0], candidate) == verdict


def test_verdict_spells_the_tokens_it_emits():
    verdict = Verdict([0, 3], 4)
    assert verdict.token_ids(TREE) == [5, 7, 4]
    assert verdict.num_accepted == 2


def probs(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def test_rejection_accepts_a_sampled_token_with_the_ratio_of_the_distributions():
    coins = ScriptedCoins(0)
    proposal = Proposal(TokenTree.chain([1]), probs([0.2, 0.8, 0.0]))
    verdict = verify_rejection(proposal, probs([0.5, 0.2, 0.3], [0.1, 0.1, 0.8]), coins)
    assert verdict == Verdict([0], 2)
    assert coins.asked == {0: pytest.approx(0.25)}
    assert coins.row == 1


def test_rejection_draws_what_the_draft_did_not_cover():
    coins = ScriptedCoins()
    proposal = Proposal(TokenTree.chain([1]), probs([0.2, 0.8, 0.0]))
    verdict = verify_rejection(proposal, probs([0.5, 0.2, 0.3], [0.1, 0.1, 0.8]), coins)
    assert verdict == Verdict([], 0)
    assert coins.distribution.tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert coins.row == 0


def test_rejection_tries_each_sibling_against_what_the_earlier_ones_left():
    coins = ScriptedCoins()
    tree = TokenTree([0, 1], [-1, -1])
    proposal = Proposal(tree, probs([0.6, 0.2, 0.2], [0.0, 0.5, 0.5]))
    verify_rejection(proposal, probs([0.3, 0.3, 0.4], [1, 0, 0], [1, 0, 0]), coins)
    # left after the first: (0, 0.1, 0.2) / 0.3, so token 1 has 1/3 where the draft has 1/2
    assert coins.asked == {0: pytest.approx(0.5), 1: pytest.approx(2 / 3)}
    assert coins.distribution.tolist() == pytest.approx([0.0, 0.0, 1.0])


def test_rejection_of_one_hot_siblings_strikes_their_tokens_out():
    coins = ScriptedCoins()
    target = probs([0.5, 0.3, 0.1, 0.1], *[[1, 0, 0, 0]] * 3)
    verify_rejection(Proposal(TokenTree([0, 1, 0], [-1] * 3)), target, coins)
    assert coins.asked == {0: 0.5, 1: pytest.approx(0.6), 2: 0.0}  # the duplicate cannot win
    assert coins.distribution.tolist() == pytest.approx([0.0, 0.0, 0.5, 0.5])


def test_rejection_verifies_down_the_accepted_child_and_tries_only_its_children():
    coins = ScriptedCoins(2, 3)
    tree = TokenTree([0, 1, 1, 0, 1], [-1, 0, -1, 2, 3])
    verdict = verify_rejection(Proposal(tree), probs(*[[0.5, 0.5]] * 6), coins)
    assert verdict.path == [2, 3]
    assert set(coins.asked) == {0, 2, 3, 4}
    assert coins.row == 4


def test_rejection_does_not_try_scratch_rows_or_children_their_own_distribution_excludes():
    coins = ScriptedCoins()
    proposal = Proposal(
        TokenTree([0, 1, 2], [-1] * 3),
        probs([1, 0, 0], [1, 0, 0], [0, 0, 1]),
        candidate=[False, True, True],
    )
    verify_rejection(proposal, probs(*[[0.2, 0.3, 0.5]] * 4), coins)
    assert set(coins.asked) == {2}
    assert coins.distribution.tolist() == pytest.approx([0.4, 0.6, 0.0])


@pytest.mark.parametrize("verify", [verify_rejection, verify_block])
def test_greedy_rows_leave_nothing_to_chance(verify):
    greedy = probs([0, 1, 0], [0, 0, 1], [1, 0, 0], dtype=torch.float32)
    drafts = probs([0.3, 0.4, 0.3], [0.3, 0.4, 0.3], dtype=torch.float32)
    for token_ids, path in (([1, 2], [0, 1]), ([1, 1], [0]), ([0, 2], []), ([2, 0], [])):
        coins = KeyedCoins(seed=0, sample_index=0, root_position=7)
        verdict = verify(Proposal(TokenTree.chain(token_ids), drafts), greedy, coins)
        assert verdict == Verdict(path, [1, 2, 0][len(path)])


def test_block_weighs_prefixes_and_takes_the_longest_that_wins():
    target = probs([0.5, 0.5], [0.9, 0.1], [0.5, 0.5])
    proposal = Proposal(TokenTree.chain([0, 1]), probs([1.0, 0.0], [0.6, 0.4]))
    coins = ScriptedCoins(1)  # the whole chain wins, so nobody asks for the shorter prefix
    assert verify_block(proposal, target, coins) == Verdict([0, 1], 0)
    assert coins.asked == {1: pytest.approx(0.5 * 0.1 / 0.4)}
    # weight 0.5: excess is (0.45 - 0.6)+ + (0.05 - 0.4)+ = 0, the shorter prefix cannot win
    coins = ScriptedCoins()
    assert verify_block(proposal, target, coins) == Verdict([], 1)
    assert coins.asked == {0: 0.0, 1: pytest.approx(0.125)}
    assert coins.distribution.tolist() == pytest.approx([0.0, 1.0])


def test_block_draws_from_the_scaled_target():
    target = probs([0.5, 0.5, 0.0], [0.2, 0.2, 0.6], [1, 0, 0])
    proposal = Proposal(TokenTree.chain([0, 0]), probs([0.625, 0.375, 0.0], [0.5, 0.25, 0.25]))
    coins = ScriptedCoins(0)
    verdict = verify_block(proposal, target, coins)
    # weight 0.8: scaled target (0.16, 0.16, 0.48), minus the draft: (0, 0, 0.23)
    assert coins.asked == {0: pytest.approx(0.23 / 0.43), 1: pytest.approx(0.8 * 0.2 / 0.5)}
    assert verdict == Verdict([0], 2)
    assert coins.distribution.tolist() == pytest.approx([0.0, 0.0, 1.0])


def test_block_stops_the_chain_at_a_scratch_row():
    proposal = Proposal(TokenTree.chain([0, 0, 0]), candidate=[True, False, True])
    coins = ScriptedCoins()
    verify_block(proposal, probs(*[[0.5, 0.5]] * 4), coins)
    assert set(coins.asked) == {0}


@pytest.mark.parametrize("verify", [verify_rejection, verify_block])
def test_a_rejection_that_only_rounding_allows_leaves_the_target(verify):
    distribution = probs([0.1, 0.2, 0.7], dtype=torch.float32)
    tiny = torch.tensor([[3e-9, 0.0, 0.0]])
    coins = ScriptedCoins()
    verify(
        Proposal(TokenTree.chain([2]), distribution - tiny),
        torch.cat([distribution, distribution]),
        coins,
    )
    assert torch.equal(coins.distribution, distribution[0])


@pytest.mark.parametrize("verify", [verify_rejection, verify_block])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_tokens_stay_impossible_and_the_dtype_is_the_targets(verify, dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        target = torch.rand(3, 6, generator=generator, dtype=dtype)
        target[:, ::2] = 0.0
        target /= target.sum(-1, keepdim=True)
        drafts = torch.rand(2, 6, generator=generator).softmax(-1)
        coins = ScriptedCoins()
        verify(Proposal(TokenTree.chain([1, 2]), drafts), target, coins)
        assert coins.distribution.dtype == dtype
        assert (coins.distribution[::2] == 0.0).all()
        assert float(coins.distribution.sum()) == pytest.approx(1.0, abs=1e-6)


def test_block_refuses_a_tree():
    with pytest.raises(ValueError, match=r"verifies chains, got .* \[-1, 0, -1, 0\]"):
        verify_block(Proposal(TREE), probs(*[[0.5, 0.5]] * 5), ScriptedCoins())


@pytest.mark.parametrize("verify", [verify_rejection, verify_block])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.rand(2, 3), "root and each of the 2 nodes, got 2"),
        (torch.rand(3), r"got \[3\]"),
        (torch.rand(3, 4), "the target's 4 tokens, got 3"),
    ],
)
def test_target_rows_that_do_not_fit_are_refused(verify, target, message):
    proposal = Proposal(TokenTree.chain([0, 1]), torch.rand(2, 3))
    with pytest.raises(ValueError, match=message):
        verify(proposal, target, ScriptedCoins())


@pytest.mark.parametrize(
    ("target_token_ids", "candidate", "message"),
    [([1, 2], None, "4 nodes, got 2"), ([0] * 5, [True], "4 entries, got 1")],
)
def test_coupled_refuses_rows_that_do_not_fit(target_token_ids, candidate, message):
    with pytest.raises(ValueError, match=message):
        verify_coupled(TREE, target_token_ids, candidate)


def test_every_rule_of_the_config_is_there_and_says_what_it_promises():
    rules = {name: rule for name, rule in ACCEPTANCE.items() if rule.has_kernels}
    assert set(rules) == set(ACCEPTANCE_RULES)
    assert {name: rule.promise for name, rule in rules.items()} == {
        "coupled": "tokens",
        "rejection": "distribution",
        "block": "distribution",
    }
    assert [name for name, rule in rules.items() if rule.shares_noise] == ["coupled"]
    assert [name for name, rule in rules.items() if not rule.takes_trees] == ["block"]


def outcomes(coins):
    distribution = torch.full((50,), 0.02)
    return [coins.accept(0.5, node) for node in range(40)] + [
        coins.draw(distribution, row) for row in range(10)
    ]


def test_keyed_coins_repeat_for_the_same_step_and_for_no_other():
    first = outcomes(KeyedCoins(3, 1, 100))
    assert outcomes(KeyedCoins(3, 1, 100)) == first
    for other in (KeyedCoins(4, 1, 100), KeyedCoins(3, 2, 100), KeyedCoins(3, 1, 101)):
        assert outcomes(other) != first
    assert len(set(first[40:])) > 1


def test_keyed_coins_never_do_the_impossible():
    distribution = torch.tensor([0.0, 1e-30, 0.0, 1.0, 0.0])
    for position in range(200):
        coins = KeyedCoins(0, 0, position)
        assert coins.accept(1.0, 0)
        assert not coins.accept(0.0, 0)
        assert coins.draw(distribution, 0) in (1, 3)


def test_keyed_coins_win_as_often_as_they_should():
    wins = sum(KeyedCoins(0, 0, position).accept(0.3, 2) for position in range(4000))
    assert abs(wins - 1200) < 6 * (4000 * 0.3 * 0.7) ** 0.5
