"""Drafters without an engine: rows by hand, and outputs that are known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import folospec.spec.drafters  # noqa: F401 - registers them
from folospec import SamplingParams
from folospec.spec.drafters.base import (
    Drafter,
    DrafterContext,
    DraftRequest,
    StepResult,
    make_drafter,
)
from folospec.spec.verify import Verdict, verify_coupled
from folospec.speculative_config import DrafterConfig


def drafter(
    method: str,
    *,
    acceptance: str = "coupled",
    vocab_size: int = 4096,
    encode: Any = None,
    **settings: Any,
) -> Any:
    """A drafter that has no model, on its own."""
    config = DrafterConfig.of({"method": method, **settings})
    none: Any = None
    return make_drafter(
        DrafterContext(
            config=config,
            name=method,
            stream=0,
            acceptance=acceptance,
            target=SimpleNamespace(vocab_size=vocab_size),  # type: ignore[arg-type]
            encode=encode,
            default_draft_model=None,
            load_draft_model=none,
            self_draft_model=none,
        )
    )


def row(
    token_ids: Sequence[int],
    *,
    num_prompt_tokens: int = 1,
    max_draft_tokens: int = 24,
    max_depth: int = 1000,
    prediction: Sequence[int] = (),
    seq_id: str = "s",
) -> DraftRequest:
    return DraftRequest(
        seq_id=seq_id,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        max_draft_tokens=max_draft_tokens,
        max_depth=max_depth,
        num_slots=max_draft_tokens,
        params=SamplingParams(),
        seed=0,
        sample_index=0,
        block_table=(),
        prediction_token_ids=prediction,
    )


class CountedList(list):
    """Tokens that count how often one of them is read; reading all of them is an error."""

    num_reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_reads += len(range(*index.indices(len(self)))) if type(index) is slice else 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        raise AssertionError("the whole sequence was read")


@dataclass
class Playback:
    num_tokens: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    confidence: float = 0.0
    """Sum over the nodes that were put to the test."""
    num_tried: int = 0

    @property
    def acceptance_length(self) -> float:
        return self.num_tokens / self.num_steps


def play(
    source: Drafter, prompt: list[int], output: list[int], prediction: Sequence[int] = ()
) -> Playback:
    """Decode `output` as an engine would whose target says nothing else."""
    tokens, played = [*prompt, output[0]], Playback(num_tokens=len(output) - 1)
    while (done := len(tokens) - len(prompt)) < len(output):
        limit = source.num_speculative_tokens
        asked = row(
            tokens,
            num_prompt_tokens=len(prompt),
            max_draft_tokens=limit,
            max_depth=len(output) - done - 1,
            prediction=prediction,
        )
        (proposal,) = source.propose([asked])
        played.num_steps += 1
        if proposal is None:
            tokens.append(output[done])
            continue
        tree = proposal.tree
        assert 0 < len(tree) <= limit
        assert max(tree.depths) <= asked.max_depth
        verdict = verify_coupled(tree, [output[done + depth] for depth in (0, *tree.depths)])
        new = verdict.token_ids(tree)
        assert new == output[done : done + len(new)]
        tokens += new
        _count(played, proposal, verdict)
        nodes = {node: node for node in range(len(tree))}
        source.observe([StepResult(asked.seq_id, proposal, verdict, new, own_nodes=nodes)])
    source.finish("s", tokens, len(prompt))
    source.drop("s")
    return played


def _count(played: Playback, proposal: Any, verdict: Verdict) -> None:
    tree = proposal.tree
    played.num_drafted += len(tree)
    played.num_accepted += verdict.num_accepted
    for node in range(-1, len(tree)):
        children = tree.children(node)
        assert sum(proposal.confidence[child] for child in children) <= 1 + 1e-9
        if node in (-1, *verdict.path):
            played.num_tried += len(children)
            played.confidence += sum(proposal.confidence[child] for child in children)
