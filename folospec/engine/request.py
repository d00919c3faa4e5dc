"""A request as the engine holds it: its group of sequences, what was resolved from its parameters,
and its text so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from folospec.core.sequence import Sequence, SequenceGroup
from folospec.engine.detokenizer import Detokenizer
from folospec.outputs import Logprob
from folospec.sampling_params import SamplingParams


@dataclass(slots=True)
class SequenceOutput:
    """The text and logprobs of one sequence, and how it ended."""

    detokenizer: Detokenizer | None
    text: str = ""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def fork(self) -> SequenceOutput:
        detokenizer = self.detokenizer.copy() if self.detokenizer else None
        return SequenceOutput(detokenizer, self.text, list(self.logprobs), self.cumulative_logprob)


@dataclass(slots=True)
class Request:
    """`seed`, `max_num_tokens` (prompt and output) and the token id lists are resolved from the
    parameters at admission."""

    group: SequenceGroup
    seed: int
    max_num_tokens: int
    eos_token_ids: frozenset[int]
    """EOS ids that end the output; empty with `ignore_eos`."""
    bad_words_token_ids: list[list[int]]
    outputs: dict[str, SequenceOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prediction_token_ids: list[int] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return self.group.params

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token id that ends the output."""
        return self.eos_token_ids.union(self.params.stop_token_ids)

    @property
    def needs_logprobs(self) -> bool:
        """Whether the logprobs of output tokens are computed: when asked for, and to choose among
        `best_of`."""
        return self.params.logprobs is not None or self.params.num_sequences > self.params.n

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs were asked for and some are still missing."""
        taken = self.prompt_logprobs
        return taken is not None and len(taken) < len(self.group.prompt_token_ids)

    def room(self, seq: Sequence) -> int:
        """How many tokens the sequence may still generate."""
        return self.max_num_tokens - seq.num_tokens
