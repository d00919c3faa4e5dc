"""A request as the engine holds it: its group of sequences, what was resolved from its parameters,
and its text so far."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, fields

from folospec.core.sequence import Sequence, SequenceGroup
from folospec.engine.detokenizer import Detokenizer
from folospec.engine.stop_strings import StopSearch, StopStrings
from folospec.outputs import Logprob
from folospec.sampling.constraints import SamplingRow, TokenCounts, is_constrained
from folospec.sampling.pipeline import pack_filters
from folospec.sampling_params import SamplingParams


@dataclass(slots=True)
class SequenceOutput:
    """The text and logprobs of one sequence, and how it ended."""

    detokenizer: Detokenizer | None
    search: StopSearch | None = None
    """The search for stop strings, where there are any."""
    cut_text: str | None = None
    """The text up to a stop string, where one has ended the output."""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_counts: TokenCounts = field(default_factory=TokenCounts)
    """Of the output, for penalties."""
    error: str | None = None

    def fork(self) -> SequenceOutput:
        detokenizer = self.detokenizer.copy() if self.detokenizer else None
        search = self.search.fork() if self.search else None
        twin = SequenceOutput(detokenizer, search, self.cut_text, list(self.logprobs))
        twin.cumulative_logprob = self.cumulative_logprob
        return twin

    @property
    def text(self) -> str:
        """The text so far; empty without a tokenizer."""
        if self.cut_text is not None or self.detokenizer is None:
            return self.cut_text or ""
        if self.finish_reason is not None:
            self.detokenizer.finish()
        return self.detokenizer.text

    def new_text(self, start: int) -> str:
        """The text from character `start` on that later tokens cannot take back: while running,
        the beginning of a stop string is held, and so is what another byte may change."""
        if self.finish_reason is not None or self.detokenizer is None:
            return self.text[start:]
        detokenizer, search = self.detokenizer, self.search
        num_safe = search.num_safe if search is not None else detokenizer.num_settled
        return detokenizer.text_from(start)[: max(0, num_safe - start)]

    def fail(self, error: str, *, is_finished: bool) -> None:
        """End the output with an error; one that is finished and can be read stays as it is."""
        try:
            text = self.text
        except Exception:
            text = ""  # The detokenizer is what failed.
        else:
            if is_finished:
                return
        self.cut_text, self.stop_reason = text, None
        self.finish_reason, self.error = "error", error


@dataclass(slots=True)
class Request:
    """`seed`, `max_num_tokens` (prompt and output) and the token id lists are resolved from the
    parameters at admission; what follows from them alone is worked out once."""

    group: SequenceGroup
    seed: int
    max_num_tokens: int
    eos_token_ids: frozenset[int]
    """EOS ids that end the output; empty with `ignore_eos`."""
    bad_words_token_ids: list[list[int]]
    outputs: dict[str, SequenceOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prediction_token_ids: list[int] = field(default_factory=list)
    special_stops: dict[int, str] = field(default_factory=dict)
    """Token id -> stop string, of stop strings that are the text of one special token which the
    output's text leaves out."""
    error: str | None = None
    """What has ended the request, where it did not end by itself."""

    params: SamplingParams = field(init=False)
    draft_params: SamplingParams = field(init=False)
    """A copy for drafters, whose lists and mappings are not those of the request."""
    stop_ids: frozenset[int] = field(init=False)
    """Every token id that ends the output."""
    needs_logprobs: bool = field(init=False)
    """Whether the logprobs of output tokens are computed: when asked for, and to choose among
    `best_of`."""
    is_constrained: bool = field(init=False)
    """Whether a stage before temperature may ever change its logits."""
    _prompt_counts: TokenCounts = field(init=False, default_factory=TokenCounts)
    filters: bytes = field(init=False)
    """See `pipeline.pack_filters`."""

    def __post_init__(self) -> None:
        self.params = params = self.group.params
        if params.stop_strings:
            stops = StopStrings(params.stop_strings)
            for output in self.outputs.values():
                output.search = StopSearch(stops)
        self.draft_params = _copy_of(params)
        self.stop_ids = self.eos_token_ids.union(params.stop_token_ids)
        self.needs_logprobs = params.logprobs is not None or params.num_sequences > params.n
        self.is_constrained = is_constrained(self.sampling_row(self.group.sequences[0]))
        self.filters = pack_filters(params)

    def sampling_row(self, seq: Sequence, draft_token_ids: list[int] | None = None) -> SamplingRow:
        """What is asked of the row after the sequence's last token, or after drafts below it."""
        return SamplingRow(
            params=self.params,
            prompt_token_ids=seq.prompt_token_ids,
            output_token_ids=seq.output_token_ids,
            draft_token_ids=draft_token_ids or (),
            bad_words_token_ids=self.bad_words_token_ids,
            stop_ids=self.stop_ids,
            prompt_counts=self._prompt_counts,
            output_counts=self.outputs[seq.seq_id].token_counts,
        )

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs were asked for and some are still missing."""
        taken = self.prompt_logprobs
        return taken is not None and len(taken) < len(self.group.prompt_token_ids)

    def fail(self, error: str) -> None:
        """End the outputs that are not finished with an error; the blocks are the caller's."""
        self.error = error
        for seq in self.group.sequences:
            output = self.outputs.setdefault(seq.seq_id, SequenceOutput(None))
            output.fail(error, is_finished=seq.status.is_finished)

    def room(self, seq: Sequence) -> int:
        """How many tokens the sequence may still generate."""
        return self.max_num_tokens - seq.num_tokens


def _copy_of(params: SamplingParams) -> SamplingParams:
    """A copy that shares nothing which can be changed in place."""
    own = copy(params)
    for name in (f.name for f in fields(params)):
        value = getattr(params, name)
        if isinstance(value, Mapping):
            object.__setattr__(own, name, dict(value))
        elif isinstance(value, (list, set)):
            object.__setattr__(own, name, tuple(value))
    return own
