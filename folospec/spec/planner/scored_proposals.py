"""Scores proposals: how likely their nodes are, which are kept, what is learned of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from folospec.spec.planner.acceptance_record import AcceptanceRecord
from folospec.spec.planner.plan_core import choose_nodes
from folospec.spec.planner.plan_terms import ScoredProposal


def score_proposal(
    record: AcceptanceRecord,
    name: str,
    seq_id: str,
    parents: Sequence[int],
    depths: Sequence[int],
    confidence: Sequence[float] | None,
    candidate: Sequence[bool] | None,
    *,
    learn: bool = True,
) -> ScoredProposal:
    """Correct the stated confidence by what came of earlier nodes, and if `learn` note what the
    answer is worth. Where nothing is stated, a node is as likely as its depth and number of
    siblings say."""
    if not depths:
        if learn:
            record.add_ask(seq_id, ())
        return ScoredProposal(name, seq_id, parents, depths, confidence, [], [], candidate)
    if confidence is not None:
        calibrated = record.calibrate(seq_id, confidence)
    else:
        calibrated = [
            record.conditional(seq_id, depth) / sum(p == parent for p in parents)
            for depth, parent in zip(depths, parents, strict=True)
        ]
    chances: list[float] = []
    for node, (parent, chance) in enumerate(zip(parents, calibrated, strict=True)):
        if candidate is not None and not candidate[node]:
            chance = 0.0
        chances.append(chance if parent < 0 else chances[parent] * chance)
    if learn:
        num_scratch = 0 if candidate is None else len(candidate) - sum(candidate)
        record.add_ask(seq_id, chances, num_scratch)
        record.add_shape(len(depths), max(depths))
    return ScoredProposal(name, seq_id, parents, depths, confidence, calibrated, chances, candidate)


def prune_scored(
    proposals: Sequence[ScoredProposal],
    num_sequences: int,
    seconds: Sequence[float],
    drafting: float,
    weights: Mapping[str, float],
) -> None:
    """Say in `ScoredProposal.kept` what pays. A proposal that `is_indivisible` is kept as it is. Of
    a probe the likeliest path is kept, two levels of it.

    Args:
        seconds: of the step with 0, 1, ... draft rows, one more than there are nodes.
        weights: what a token of each sequence counts; 1 if it is not there.
    """
    free = [scored for scored in proposals if not scored.is_indivisible]
    whole = [scored for scored in proposals if scored.is_indivisible]
    for scored in whole:
        scored.kept = list(range(len(scored.parents)))
    taken = sum(len(scored.parents) for scored in whole)
    base = num_sequences + sum(sum(scored.chances) for scored in whole)
    kept, _ = choose_nodes(
        [scored.chances for scored in free],
        base,
        seconds[taken:],
        drafting,
        [weights.get(scored.seq_id, 1.0) for scored in free],
    )
    for scored, nodes in zip(free, kept, strict=True):
        scored.kept = sorted({*nodes, *_likely_path(scored)}) if scored.is_probe else nodes


def _likely_path(scored: ScoredProposal) -> list[int]:
    path: list[int] = []
    for _ in range(2):
        end = path[-1] if path else -1
        below = [node for node, parent in enumerate(scored.parents) if parent == end]
        if not below:
            break
        path.append(max(below, key=lambda node: scored.chances[node]))
    return path


def learn_from_path(record: AcceptanceRecord, scored: ScoredProposal, path: Sequence[int]) -> None:
    """Learn from a verdict: `path` are the accepted nodes, as they are numbered in it."""
    seq_id, accepted = scored.seq_id, set(path)
    parents_tried = {-1, *path}
    for node in scored.kept if scored.confidence is not None else ():
        is_verified = scored.candidate is None or scored.candidate[node]
        if is_verified and scored.parents[node] in parents_tried:
            assert scored.confidence is not None
            confidence, expected = scored.confidence[node], scored.calibrated[node]
            record.add_trial(seq_id, confidence, expected, node in accepted)
    for level in range(1, len(path) + 1):
        record.add_level(seq_id, level, 1.0)
    learn_from_end(record, scored, path[-1] if path else -1)


def learn_from_end(record: AcceptanceRecord, scored: ScoredProposal, end: int) -> None:
    """Learn from where an accepted path ends: the next level failed, or, where it was cut off
    unseen, would have been accepted as likely as was said."""
    below = [node for node, parent in enumerate(scored.parents) if parent == end]
    if not below:
        return
    chance = 0.0
    if not any(node in scored.kept for node in below):
        chance = min(1.0, sum(scored.calibrated[node] for node in below))
    record.add_level(scored.seq_id, scored.depths[below[0]], chance)
