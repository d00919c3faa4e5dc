"""What is judged of a sequence in a step: which rows, drawn how often, under which options; and how
that goes to the kernels that draw and verify in one call."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

import torch
from torch import Tensor

from folospec.core.sequence import Sequence
from folospec.core.token_tree import TokenTree
from folospec.engine.request import Request
from folospec.kernels.native_sampling import Walk, Walks, pack_law
from folospec.sampling.constraints import NoTokenError, SamplingRow, constrain, is_constrained
from folospec.sampling.pipeline import no_token_error
from folospec.sampling.sampler import NO_TOKEN
from folospec.spec.proposal import Proposal
from folospec.spec.verify import AcceptanceRule, Verdict, verify_coupled

_NO_DRAFT = TokenTree.chain([])


@dataclass(slots=True)
class Judgement:
    """One sequence's part of a step: its committed tokens [start, start + num_tokens), then the
    nodes of its proposal.

    `first_row` is its first row among the packed rows of the step. `rows` are its rows of logits,
    root first; none if the last token is not among the step's, and then there is nothing to judge.
    `verdicts` has one entry, or one per sibling where a request with n > 1 draws its first tokens
    from one row.
    """

    request: Request
    seq: Sequence
    start: int
    num_tokens: int
    first_row: int
    proposal: Proposal | None = None
    rows: range = range(0)
    num_draws: int = 1
    verdicts: list[Verdict] | None = None
    run_ahead: TokenTree | None = None
    """Tokens that the target drew before the host looked: the chain that the verdict walks, where
    nobody proposed one."""

    @property
    def judged_rows(self) -> collections.abc.Sequence[int]:
        """Those of `rows` that can decide anything: the root's and the candidates'. Of scratch rows
        nothing is asked, so none of the request's options are applied to them."""
        if self.proposal is None or self.proposal.candidate is None:
            return self.rows
        judged = [True, *self.proposal.candidate]
        return [row for row, is_judged in zip(self.rows, judged, strict=True) if is_judged]

    @property
    def judged_positions(self) -> collections.abc.Sequence[int]:
        """The position of the token that each of `judged_rows` is about."""
        begin, tree = self.seq.num_tokens, self.tree
        if tree.is_chain:
            positions: collections.abc.Sequence[int] = range(begin, begin + len(self.rows))
        else:
            positions = [begin, *(begin + depth for depth in tree.depths)]
        if self.proposal is None or self.proposal.candidate is None:
            return positions
        return [positions[row - self.rows.start] for row in self.judged_rows]

    @property
    def judged_token_ids(self) -> collections.abc.Sequence[int]:
        """The tokens of the nodes, `NO_TOKEN` for those that are not judged."""
        token_ids = self.tree.token_ids
        if self.proposal is None or self.proposal.candidate is None:
            return token_ids
        judged = zip(token_ids, self.proposal.candidate, strict=True)
        return [token_id if candidate else NO_TOKEN for token_id, candidate in judged]

    @property
    def tree(self) -> TokenTree:
        return self.proposal.tree if self.proposal else self.run_ahead or _NO_DRAFT

    def walk(self, drawn: Iterator[int], rule: AcceptanceRule) -> None:
        """Take the target's tokens, those of the judged rows for each draw, and verify a proposal
        by the rule."""
        registered = self.proposal is not None and not rule.has_kernels
        verify = rule.verify if registered else verify_coupled
        tree, candidate = self.tree, self.proposal.candidate if self.proposal else None
        self.verdicts = []
        for _ in range(self.num_draws):
            if candidate is None:
                tokens = list(islice(drawn, len(self.rows)))
            else:
                tokens = [next(drawn) if judged else NO_TOKEN for judged in (True, *candidate)]
            self.verdicts.append(verify(tree, tokens, candidate))


def find_judgement(judgements: list[Judgement], row: int) -> Judgement:
    """Return the judgement that the given judged row belongs to."""
    for judgement in judgements:
        num_rows = len(judgement.judged_rows)
        if row < num_rows:
            return judgement
        row -= num_rows
    raise IndexError(f"there is no judged row {row}")


def sampling_rows(judgement: Judgement) -> list[SamplingRow]:
    seq, request, tree = judgement.seq, judgement.request, judgement.tree
    nodes = [row - judgement.rows.start - 1 for row in judgement.judged_rows]
    paths = [tree.path_token_ids(node) if node >= 0 else None for node in nodes]
    return [request.sampling_row(seq, path) for path in paths]


def pack_walks(judgements: list[Judgement]) -> Walks:
    """What the judgements ask for, as one call draws and verifies it."""
    walks = Walks()
    for judgement in judgements:
        seq, request, parents = judgement.seq, judgement.request, judgement.tree.parents
        token_ids = judgement.judged_token_ids
        for draw in range(judgement.num_draws):
            law = pack_law(request.seed, seq.sample_index + draw, request.filters)
            walks.add(law, judgement.rows.start, seq.num_tokens, token_ids, parents)
    return walks


def take_walks(judgements: list[Judgement], found: Iterable[Walk]) -> None:
    """Fill in the verdicts from what came of `pack_walks`.

    Raises:
        NoTokenError: see `judge`.
    """
    walked = iter(found)
    for judgement in judgements:
        judgement.verdicts = []
        for walk in islice(walked, judgement.num_draws):
            # Below drafts, where plain decoding might not come, there need be no token.
            if walk.token_id == NO_TOKEN and not walk.path:
                before = takewhile(lambda other: other is not judgement, judgements)  # noqa: B023
                place = sum(len(other.judged_rows) for other in before)
                root = judgement.request.sampling_row(judgement.seq)
                raise no_token_error(place, root, walk.peak)
            judgement.verdicts.append(Verdict(walk.path, walk.token_id))


def constrained(judgements: list[Judgement], logits: Tensor) -> Tensor:
    """The logits with the stages before temperature applied where a request asks for them."""
    indices: list[int] = []
    asked: list[SamplingRow] = []
    places: list[int] = []  # among the judged rows of the step
    place = 0
    for judgement in judgements:
        judged = judgement.judged_rows
        if judgement.request.is_constrained:
            indices.extend(judged)
            asked.extend(sampling_rows(judgement))
            places.extend(range(place, place + len(judged)))
        place += len(judged)
    if not any(is_constrained(row) for row in asked):
        return logits
    try:
        changed = constrain(logits[indices], asked)
    except NoTokenError as error:
        raise NoTokenError(places[error.row], str(error)) from error.__cause__
    return logits.index_copy(0, torch.tensor(indices, device=logits.device), changed)
