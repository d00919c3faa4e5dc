"""Defines what a request returns: text, tokens, logprobs, and what speculation did for it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, fields
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlist, _SHORT.maxother = 60, 4, 250


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural logarithm of a token's probability, and its rank among all tokens (1 is the most
    likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None
    """The token's text as it stands inside a text, the space before a word and special tokens
    included; None without a tokenizer. Where no token has a part of a character, the texts of the
    output's tokens add up to its text. Bytes that are no whole character are written as `<0xC3>`.
    """


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request.

    `logprobs[i]` maps token ids to `Logprob`s for output token i: the token itself and the most
    likely ones. `finish_reason` is None while running, then "stop", "length", "abort" or "error";
    `stop_reason` is the stop string or the stop token id that matched, None for EOS and for the
    other reasons. `error` says what went wrong where `finish_reason` is "error"; text and tokens
    are then those from before.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None

    def __repr__(self) -> str:
        """The text from both ends, and the number of tokens."""
        reasons = {"stop_reason": self.stop_reason, "error": self.error}
        return _one_line(
            self,
            index=self.index,
            text=self.text,
            num_tokens=len(self.token_ids),
            finish_reason=self.finish_reason,
            **{name: reason for name, reason in reasons.items() if reason is not None},
        )


@dataclass(slots=True)
class SpeculationCounts:
    """What speculation did, counted alike for a request and for the engine. Times are in seconds.

    A draft is one proposal that was verified, with at least one draft token. `num_accepted_tokens`
    counts the accepted draft tokens that the output has: those behind a stop are not counted. It
    leaves the bonus token out, `acceptance_length` has it in.
    """

    num_target_passes: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    """Entry i counts the drafts of which the output has more than i tokens."""
    acceptance_histogram: list[int] = field(default_factory=list)
    """Entry i counts the drafts with exactly i accepted tokens."""
    num_undrafted: dict[str, int] = field(default_factory=dict)
    """By reason, how often a sequence took a step without a draft although its prompt was computed;
    docs/planner.md has the reasons. Empty without drafters."""
    num_drafter_errors: int = 0
    draft_time: float = 0.0
    target_time: float = 0.0
    sampling_time: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / drafts: the mean tokens per verified draft, bonus included; 1.0 without
        drafts. A draft within whose path the output ended had no bonus, and counts one too."""
        return 1.0 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / draft tokens; 0.0 without drafts."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_rate_per_pos(self) -> list[float]:
        """Entry i is the share of the drafts of which the output has more than i tokens."""
        return [count / self.num_drafts for count in self.num_accepted_tokens_per_pos]


@dataclass(slots=True)
class RequestMetrics(SpeculationCounts):
    """What one request cost; counts sum over its sequences.

    The sequences of a batch share a step: `num_target_passes` counts the passes in which the
    request had rows, once for each of its sequences, and the three times are those of whole steps.
    """

    arrival_time: float = 0.0
    """This and the next two are readings of `time.monotonic`."""
    first_token_time: float | None = None
    finished_time: float | None = None
    undrafted_reason: str | None = None
    """The last of these reasons, None if there was none."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""

    def __repr__(self) -> str:
        """The counts that are not 0, the acceptance length, and the seconds if finished."""
        names = [f.name for f in fields(self) if f.name.startswith("num_")]
        counts = {name: getattr(self, name) for name in names}
        shown: dict[str, Any] = {k: n for k, n in counts.items() if isinstance(n, int) and n > 0}
        if self.num_drafts:
            shown["acceptance_length"] = round(self.acceptance_length, 2)
        if self.finished_time is not None:
            shown["seconds"] = round(self.finished_time - self.arrival_time, 3)
        return _one_line(self, **shown)


@dataclass(slots=True)
class RequestOutput:
    """A request and what came of it; `outputs` is ordered by index, or by cumulative logprob with
    `best_of`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None
    """Why the request ended early, None unless an error ended it."""

    def __repr__(self) -> str:
        """The prompt from both ends, and the first completions."""
        name = "prompt_token_ids" if self.prompt is None else "prompt"
        return _one_line(
            self,
            request_id=self.request_id,
            **{name: getattr(self, name)},
            outputs=self.outputs,
            finished=self.finished,
            **({} if self.error is None else {"error": self.error}),
        )


def _one_line(value: object, **shown: Any) -> str:
    """`Name(field=value, ...)`; texts and lists are shortened."""
    described = ", ".join(f"{name}={_SHORT.repr(item)}" for name, item in shown.items())
    return f"{type(value).__name__}({described})"
