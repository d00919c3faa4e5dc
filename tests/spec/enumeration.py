"""Exact output distributions of the acceptance rules on toy models, by walking through every
outcome.

An experiment is a function that asks a `Choices` for each random choice. `explore` calls it again
and again, each time with other answers, until every outcome of positive probability was seen. The
rules under test are the real ones: they get their coins from the same walk.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from folospec.core.token_tree import TokenTree
from folospec.spec.proposal import Proposal
from folospec.spec.verify import Verdict

Context = tuple[int, ...]
Distribution = tuple[float, ...]


class Choices:
    """One way through an experiment: scripted choices first, then the first possible one."""

    def __init__(self, script: list[int]):
        self.script, self.taken, self.untaken, self.weight = script, [], [], 1.0

    def choose(self, probs: Distribution) -> int:
        """Return an index of positive probability; the others are left for later runs."""
        depth = len(self.taken)
        if depth < len(self.script):
            choice = self.script[depth]
        else:
            choice, *others = [i for i, prob in enumerate(probs) if prob > 0.0]
            self.untaken += [[*self.taken, other] for other in others]
        self.taken.append(choice)
        self.weight *= probs[choice]
        return choice


def explore(experiment: Callable[[Choices], object]) -> Iterator[tuple[float, object]]:
    """Yield (probability, result) of every outcome, depth first."""
    scripts: list[list[int]] = [[]]
    while scripts:
        choices = Choices(scripts.pop())
        result = experiment(choices)
        scripts += choices.untaken
        yield choices.weight, result


class ReplayedCoins:
    """Coins whose outcomes a walk decides.

    The draw is the last act of every rule, so its tokens need no walk each: the distribution is
    kept, and any token of it is returned. A wrong rule may set `draw_from(probs, row)`, the
    distribution it takes.
    """

    def __init__(self, choices: Choices):
        self.choices, self.last_distribution, self.token = choices, None, None
        self.draw_from = lambda probs, row: probs

    def accept(self, probability: float, node: int) -> bool:
        return self.choices.choose((1.0 - probability, probability)) == 1

    def draw(self, probs: torch.Tensor, row: int) -> int:
        assert self.token is None, "a step draws once"
        distribution = self.draw_from(probs, row)
        self.last_distribution, self.token = distribution.tolist(), int(distribution.argmax())
        return self.token


@dataclass(frozen=True)
class Toy:
    """A target and a drafter over a tiny vocabulary, with random distributions for every
    context."""

    kind: str
    seed: int
    vocab_size: int = 3

    def target(self, context: Context) -> Distribution:
        return _target_distribution(self, context)

    def draft(self, context: Context) -> Distribution:
        return _draft_distribution(self, context)

    def target_probs(self, tree: TokenTree) -> torch.Tensor:
        """Distributions of the root and of every node: float64 [num_nodes + 1, vocab_size]."""
        return _target_probs(self, tuple(tree.token_ids), tuple(tree.parents))


@cache
def _target_probs(toy: Toy, token_ids: Context, parents: tuple[int, ...]) -> torch.Tensor:
    contexts: list[Context] = [()]
    for token_id, parent in zip(token_ids, parents, strict=True):
        contexts.append((*contexts[parent + 1], token_id))
    return torch.tensor([toy.target(context) for context in contexts], dtype=torch.float64)


@cache
def _target_distribution(toy: Toy, context: Context) -> Distribution:
    rng = random.Random(f"target {toy.seed} {context}")
    support = list(range(toy.vocab_size))
    if toy.kind in ("target zeros", "zeros"):
        support = rng.sample(support, rng.randint(1, toy.vocab_size - 1))
    if toy.kind == "disjoint":
        support = support[: toy.vocab_size // 2]
    if toy.kind == "greedy target":
        support = [rng.choice(support)]
    return random_distribution(rng, toy.vocab_size, support)


@cache
def _draft_distribution(toy: Toy, context: Context) -> Distribution:
    if toy.kind == "equal":
        return toy.target(context)
    rng = random.Random(f"draft {toy.seed} {context}")
    support = list(range(toy.vocab_size))
    if toy.kind in ("draft zeros", "zeros"):
        support = rng.sample(support, rng.randint(1, toy.vocab_size - 1))
    if toy.kind == "disjoint":
        support = support[toy.vocab_size // 2 :]
    if toy.kind == "one-hot draft":
        support = [rng.choice(support)]
    return random_distribution(rng, toy.vocab_size, support)


def random_distribution(rng: random.Random, vocab_size: int, support: list[int]) -> Distribution:
    """A distribution that is uneven on its support and zero elsewhere."""
    weights = [rng.expovariate(1.0) + 0.01 if t in support else 0.0 for t in range(vocab_size)]
    return normalised(weights)


def normalised(weights: list[float]) -> Distribution:
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def one_hot(token_id: int, vocab_size: int) -> Distribution:
    return tuple(float(t == token_id) for t in range(vocab_size))


KINDS = (
    *("dense",) * 4,
    *("target zeros", "draft zeros") * 2,
    *("zeros",) * 2,
    *("equal", "disjoint", "greedy target", "one-hot draft"),
)
TOYS = [Toy(kind, seed) for seed, kind in enumerate(KINDS)]
TOYS += [Toy("dense", 100, vocab_size=4), Toy("zeros", 101, vocab_size=4)]
DENSE_TOYS = [toy for toy in TOYS if toy.kind == "dense"]


# How children are drawn: (toy, context, earlier siblings, walk) -> token and the distribution it
# came from.


def sampled(
    toy: Toy, context: Context, earlier: list[int], choices: Choices
) -> tuple[int, Distribution]:
    """I.i.d. children of the drafter's distribution: duplicates happen."""
    distribution = toy.draft(context)
    return choices.choose(distribution), distribution


def sampled_from_many(
    toy: Toy, context: Context, earlier: list[int], choices: Choices
) -> tuple[int, Distribution]:
    """Independent children of different drafters, as SpecInfer has them."""
    distribution = Toy(toy.kind, toy.seed + 1000 * len(earlier), toy.vocab_size).draft(context)
    return choices.choose(distribution), distribution


def without_replacement(
    toy: Toy, context: Context, earlier: list[int], choices: Choices
) -> tuple[int, Distribution]:
    """Distinct children; once the distribution is exhausted, uniform over the tokens not yet
    drawn."""
    distribution = toy.draft(context)
    rest = [0.0 if t in earlier else distribution[t] for t in range(toy.vocab_size)]
    if sum(rest) == 0.0:
        rest = [float(t not in earlier) for t in range(toy.vocab_size)]
    distribution = normalised(rest)
    return choices.choose(distribution), distribution


def most_likely(
    toy: Toy, context: Context, earlier: list[int], choices: Choices
) -> tuple[int, Distribution]:
    """The drafter's likeliest tokens in turn: a function of the context, hence one-hot
    distributions."""
    distribution = toy.draft(context)
    ranked = sorted(range(toy.vocab_size), key=lambda t: (-distribution[t], t))
    token_id = ranked[len(earlier) % toy.vocab_size]
    return token_id, one_hot(token_id, toy.vocab_size)


def repeated(
    toy: Toy, context: Context, earlier: list[int], choices: Choices
) -> tuple[int, Distribution]:
    """The same one-hot child again and again, as merged proposals of several sources have it."""
    return most_likely(toy, context, [], choices)


def sampled_then_likely(
    toy: Toy, context: Context, earlier: list[int], choices: Choices
) -> tuple[int, Distribution]:
    """A sampled first child and deterministic extras, which may repeat it."""
    if not earlier:
        return sampled(toy, context, earlier, choices)
    return most_likely(toy, context, earlier[1:], choices)


DRAFTINGS = (
    sampled,
    sampled_from_many,
    without_replacement,
    most_likely,
    repeated,
    sampled_then_likely,
)


def draft(toy: Toy, parents: list[int], drafting: Callable, choices: Choices) -> Proposal:
    """Fill a tree of the given shape; siblings are drawn in row order."""
    token_ids: list[int] = []
    contexts: list[Context] = [()]
    rows: list[Distribution] = []
    for node, parent in enumerate(parents):
        earlier = [token_ids[i] for i in range(node) if parents[i] == parent]
        token_id, distribution = drafting(toy, contexts[parent + 1], earlier, choices)
        token_ids.append(token_id)
        contexts.append((*contexts[parent + 1], token_id))
        rows.append(distribution)
    probs = torch.tensor(rows, dtype=torch.float64)
    return Proposal(tree=TokenTree(token_ids, parents), draft_probs=probs)


def drafter_of(toy: Toy, parents: list[int], drafting: Callable) -> Callable[[Choices], Proposal]:
    return lambda choices: draft(toy, parents, drafting, choices)


Rule = Callable[[Proposal, torch.Tensor, ReplayedCoins], Verdict]


def steps(
    toy: Toy, drafter: Callable[[Choices], Proposal], rule: Rule
) -> Iterator[tuple[float, Context, Distribution]]:
    """Yield (probability, accepted tokens, distribution of the next token) of every outcome of a
    step."""

    def step(choices: Choices) -> tuple[Context, Distribution]:
        proposal = drafter(choices)
        coins = ReplayedCoins(choices)
        verdict = rule(proposal, toy.target_probs(proposal.tree), coins)
        *accepted, token = verdict.token_ids(proposal.tree)
        assert token == coins.token
        return tuple(accepted), coins.last_distribution

    for weight, (accepted, distribution) in explore(step):
        yield weight, accepted, distribution


def output_distribution(
    toy: Toy, drafter: Callable[[Choices], Proposal], rule: Rule, length: int
) -> dict[Context, float]:
    """The joint distribution of the first `length` tokens: a step, then plain sampling."""
    distribution: dict[Context, float] = defaultdict(float)
    for weight, accepted, next_distribution in steps(toy, drafter, rule):
        for token_id, prob in enumerate(next_distribution):
            distribution[(*accepted, token_id)] += weight * prob
    for size in range(1, length):
        for context in [c for c in distribution if len(c) == size]:
            weight = distribution.pop(context)
            for token_id, prob in enumerate(toy.target(context)):
                distribution[(*context, token_id)] += weight * prob
    assert all(len(context) == length for context in distribution)
    return distribution


def plain_distribution(
    toy: Toy, length: int, distribution_at: Callable[[Context], Distribution]
) -> dict[Context, float]:
    """The joint distribution of `length` tokens drawn one after the other from
    `law_at(context)`."""
    distribution = {}
    for tokens in product(range(toy.vocab_size), repeat=length):
        distribution[tokens] = 1.0
        for i, token_id in enumerate(tokens):
            distribution[tokens] *= distribution_at(tokens[:i])[token_id]
    return distribution


def distance(toy: Toy, drafter: Callable[[Choices], Proposal], rule: Rule, length: int) -> float:
    """Total variation between the rule's output and plain sampling, over `length` tokens."""
    return total_variation(
        output_distribution(toy, drafter, rule, length), plain_distribution(toy, length, toy.target)
    )


def total_variation(a: dict[Context, float], b: dict[Context, float]) -> float:
    return 0.5 * sum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in {*a, *b})
