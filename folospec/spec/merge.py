"""Merges several proposals for one sequence into one tree (SpecInfer, arXiv 2305.09781).

The merge is that of section 3.2.

    suffix        a -- b -- c          merged     a -- b -- c
    draft_model   a -- d                          |    `
                  e                               `-- d       e      (`coupled`: one node per token)

Where only the target's token decides (`coupled`), nodes that spell the same path are one node.
Under a ratio rule they stay separate siblings, tried in the order of the proposals, each against
its own distribution: merging them would lose a trial that the rule counts on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from folospec.core.token_tree import ROOT, TokenTree
from folospec.spec.proposal import Proposal
from folospec.spec.stores.acceptance_table import share_among_siblings


def merge_proposals(
    proposals: Sequence[Proposal],
    *,
    max_nodes: int,
    max_draft_tokens: int,
    max_depth: int,
    unite: bool,
    vocab_size: int,
) -> tuple[Proposal, list[dict[int, int]]]:
    """Put the proposals of one sequence into one tree, the first ones first.

    Args:
        proposals: at least one; drafts of different proposals must be independent of each other,
            given the context, unless `unite`.
        max_nodes, max_draft_tokens, max_depth: most nodes, most verified ones among them, and how
            deep they may be; what does not fit is left out, the last nodes first.
        unite: make one node of those that spell the same path; for rules that share noise.
        vocab_size: of the target, for one-hot distributions beside sampled ones.

    Returns:
        the tree, and for each proposal where its nodes are in it, as far as they are.
    """
    token_ids: list[int] = []
    parents: list[int] = []
    sources: list[dict[int, int]] = []  # per proposal: node there -> node here
    places: dict[tuple[int, int], int] = {}
    candidates: set[int] = set()
    for proposal in proposals:
        here = {ROOT: ROOT}
        tree = proposal.tree
        for node, (token_id, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True)):
            if parent not in here or tree.depths[node] > max_depth:
                continue
            place = places.get((here[parent], token_id)) if unite else None
            is_new = place is None
            if place is None:
                place = len(token_ids)
            adds = proposal.is_candidate(node) and place not in candidates
            if (is_new and place == max_nodes) or (adds and len(candidates) == max_draft_tokens):
                continue
            if adds:
                candidates.add(place)
            if is_new:
                places[here[parent], token_id] = place
                token_ids.append(token_id)
                parents.append(here[parent])
            here[node] = place
        del here[ROOT]
        sources.append(here)
    has_scratch = len(candidates) < len(token_ids)
    merged = Proposal(
        TokenTree(token_ids, parents),
        draft_probs=None if unite else _distributions(proposals, sources, token_ids, vocab_size),
        confidence=_confidence(proposals, sources, parents),
        candidate=[node in candidates for node in range(len(token_ids))] if has_scratch else None,
        draft_slots=_draft_slots(proposals, sources, len(token_ids)),
        drafter="+".join(dict.fromkeys(proposal.drafter for proposal in proposals)),
    )
    return merged, sources


def _distributions(
    proposals: Sequence[Proposal],
    sources: list[dict[int, int]],
    token_ids: list[int],
    vocab_size: int,
) -> torch.Tensor | None:
    sampled = [p.draft_probs for p in proposals if p.draft_probs is not None]
    if not sampled:
        return None
    draft_probs = sampled[0].new_zeros(len(token_ids), vocab_size)
    for proposal, here in zip(proposals, sources, strict=True):
        for node, place in here.items():
            if proposal.draft_probs is None:
                draft_probs[place, token_ids[place]] = 1.0
            else:
                draft_probs[place] = proposal.draft_probs[node]
    return draft_probs


def _confidence(
    proposals: Sequence[Proposal], sources: list[dict[int, int]], parents: list[int]
) -> list[float] | None:
    """The highest of those who proposed a node; what has no opinion has none here either."""
    if all(proposal.confidence is None for proposal in proposals):
        return None
    merged = [0.0] * len(parents)
    for proposal, here in zip(proposals, sources, strict=True):
        if proposal.confidence is not None:
            for node, place in here.items():
                merged[place] = max(merged[place], proposal.confidence[node])
    return share_among_siblings(parents, merged)


def _draft_slots(
    proposals: Sequence[Proposal], sources: list[dict[int, int]], num_nodes: int
) -> dict[str, list[int | None]]:
    merged: dict[str, list[int | None]] = {}
    for proposal, here in zip(proposals, sources, strict=True):
        for owner, offsets in proposal.draft_slots.items():
            slots = merged.setdefault(owner, [None] * num_nodes)
            for node, place in here.items():
                if offsets[node] is not None:  # of united duplicates, one may not have been run
                    slots[place] = offsets[node]
    return merged
