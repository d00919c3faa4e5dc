"""Scores proposals: how likely their nodes are, which are kept, what is learned of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from folospec.spec.planner.acceptance_record import AcceptanceRecord
from folospec.spec.planner.plan_core import choose_nodes
from folospec.spec.planner.plan_terms import Offer


def make_offer(
    record: AcceptanceRecord,
    name: str,
    seq_id: str,
    parents: Sequence[int],
    depths: Sequence[int],
    stated: Sequence[float] | None,
    judged: Sequence[bool] | None,
    *,
    learn: bool = True,
) -> Offer:
    """Correct the stated confidence by what came of earlier nodes, and if `learn` note what the
    answer is worth. Where nothing is stated, a node is as likely as its depth and number of
    siblings say."""
    if not depths:
        if learn:
            record.add_ask(seq_id, ())
        return Offer(name, seq_id, parents, depths, stated, [], [], judged)
    if stated is not None:
        calibrated = record.calibrate(seq_id, stated)
    else:
        calibrated = [
            record.conditional(seq_id, depth) / sum(p == parent for p in parents)
            for depth, parent in zip(depths, parents, strict=True)
        ]
    chances: list[float] = []
    for node, (parent, chance) in enumerate(zip(parents, calibrated, strict=True)):
        if judged is not None and not judged[node]:
            chance = 0.0
        chances.append(chance if parent < 0 else chances[parent] * chance)
    if learn:
        num_scratch = 0 if judged is None else len(judged) - sum(judged)
        record.add_ask(seq_id, chances, num_scratch)
        record.add_shape(len(depths), max(depths))
    return Offer(name, seq_id, parents, depths, stated, calibrated, chances, judged)


def prune_offers(
    offers: Sequence[Offer],
    num_sequences: int,
    seconds: Sequence[float],
    drafting: float,
    weights: Mapping[str, float],
) -> None:
    """Say in `Offer.kept` what pays. A proposal that `stays_whole` is kept as it is. Of a
    probe the likeliest path is kept, two levels of it.

    Args:
        seconds: of the step with 0, 1, ... draft rows, one more than there are nodes.
        weights: what a token of each sequence counts; 1 if it is not there.
    """
    free = [offer for offer in offers if not offer.stays_whole]
    whole = [offer for offer in offers if offer.stays_whole]
    for offer in whole:
        offer.kept = list(range(len(offer.parents)))
    taken = sum(len(offer.parents) for offer in whole)
    base = num_sequences + sum(sum(offer.chances) for offer in whole)
    kept, _ = choose_nodes(
        [offer.chances for offer in free],
        base,
        seconds[taken:],
        drafting,
        [weights.get(offer.seq_id, 1.0) for offer in free],
    )
    for offer, nodes in zip(free, kept, strict=True):
        offer.kept = sorted({*nodes, *_likely_path(offer)}) if offer.is_probe else nodes


def _likely_path(offer: Offer) -> list[int]:
    path: list[int] = []
    for _ in range(2):
        end = path[-1] if path else -1
        below = [node for node, parent in enumerate(offer.parents) if parent == end]
        if not below:
            break
        path.append(max(below, key=lambda node: offer.chances[node]))
    return path


def learn_offer(record: AcceptanceRecord, offer: Offer, path: Sequence[int]) -> None:
    """Learn from a verdict: `path` are the accepted nodes, as they are numbered in the offer."""
    seq_id, accepted = offer.seq_id, set(path)
    parents_tried = {-1, *path}
    for node in offer.kept if offer.stated is not None else ():
        is_judged = offer.judged is None or offer.judged[node]
        if is_judged and offer.parents[node] in parents_tried:
            assert offer.stated is not None
            stated, expected = offer.stated[node], offer.calibrated[node]
            record.add_trial(seq_id, stated, expected, node in accepted)
    for level in range(1, len(path) + 1):
        record.add_level(seq_id, level, 1.0)
    learn_end(record, offer, path[-1] if path else -1)


def learn_end(record: AcceptanceRecord, offer: Offer, end: int) -> None:
    """Learn from where an accepted path ends: the next level failed, or, where it was cut off
    unseen, would have been accepted as likely as was said."""
    below = [node for node, parent in enumerate(offer.parents) if parent == end]
    if not below:
        return
    chance = 0.0
    if not any(node in offer.kept for node in below):
        chance = min(1.0, sum(offer.calibrated[node] for node in below))
    record.add_level(offer.seq_id, offer.depths[below[0]], chance)
