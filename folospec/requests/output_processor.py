"""Turns tokens into what the user gets: text, stops, logprobs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from folospec.core.sequence import Sequence, SequenceGroup
from folospec.outputs import CompletionOutput, Logprob, RequestOutput
from folospec.text.detokenizer import Detokenizer
from folospec.text.stop_strings import StopSearch


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
    error: str | None = None

    def fork(self) -> SequenceOutput:
        detokenizer = self.detokenizer.copy() if self.detokenizer else None
        search = self.search.fork() if self.search else None
        own = SequenceOutput(detokenizer, search, self.cut_text, list(self.logprobs))
        own.cumulative_logprob = self.cumulative_logprob
        return own

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
class GroupOutput:
    """The text and logprobs of one request."""

    sequences: dict[str, SequenceOutput]
    """By seq_id."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    special_stops: dict[int, str] = field(default_factory=dict)
    """Token id -> stop string, of stop strings that are the text of one special token which the
    output's text leaves out."""


class OutputProcessor:
    """Holds the outputs of the unfinished requests."""

    def __init__(self) -> None:
        self._groups: dict[str, GroupOutput] = {}

    def add(self, group: SequenceGroup, output: GroupOutput) -> None:
        """Take a request in, with its empty output."""
        self._groups[group.request_id] = output

    def forget(self, group: SequenceGroup) -> None:
        """Drop the output of a request that has ended."""
        del self._groups[group.request_id]

    def of_group(self, group: SequenceGroup) -> GroupOutput:
        return self._groups[group.request_id]

    def of(self, seq: Sequence) -> SequenceOutput:
        assert seq.group is not None
        return self._groups[seq.group.request_id].sequences[seq.seq_id]

    def add_fork(self, seq: Sequence, sibling: Sequence) -> None:
        """Give a new sibling the output that the sequence has."""
        assert seq.group is not None
        outputs = self._groups[seq.group.request_id].sequences
        outputs[sibling.seq_id] = outputs[seq.seq_id].fork()

    def append_token(self, seq: Sequence, token_id: int) -> bool:
        """Add a token to a sequence and its text; return whether it ended the output.

        Tokens are taken one at a time, so an accepted run ends exactly where plain decoding would
        have ended.
        """
        group = seq.group
        assert group is not None
        group_output, params = self._groups[group.request_id], group.params
        output = group_output.sequences[seq.seq_id]
        seq.add_token_id(token_id)
        may_stop = seq.num_output_tokens >= params.min_tokens
        if may_stop and token_id in group.sampling.stop_ids:
            is_eos = token_id in group.eos_token_ids
            return _finish(output, "stop", None if is_eos else token_id)
        if may_stop and token_id in group_output.special_stops:
            stop = group_output.special_stops[token_id]
            _finish(output, "stop", stop)
            if params.include_stop_str_in_output:
                output.cut_text = output.text + stop
            return True
        if output.detokenizer is not None:
            output.detokenizer.append(token_id)
            match = output.search.advance(output.detokenizer) if output.search is not None else None
            if match is not None and may_stop:
                is_included = params.include_stop_str_in_output
                end = match.begin + (len(match.stop) if is_included else 0)
                output.cut_text = output.text[:end]
                return _finish(output, "stop", match.stop)
        if group.room(seq) <= 0:
            return _finish(output, "length", None)
        return False

    def fail(self, group: SequenceGroup, error: str) -> None:
        """End the outputs that are not finished with an error; the blocks are the caller's."""
        group.error = error
        outputs = self._groups[group.request_id].sequences
        for seq in group.sequences:
            output = outputs.setdefault(seq.seq_id, SequenceOutput(None))
            output.fail(error, is_finished=seq.status.is_finished)

    def completions(self, group: SequenceGroup) -> list[tuple[Sequence, SequenceOutput]]:
        """The sequences that the user gets, in their order. With `best_of` there are none until all
        have finished and the best `n` are known."""
        outputs, params = self._groups[group.request_id].sequences, group.params
        found = [(seq, outputs[seq.seq_id]) for seq in group.sequences]
        if params.num_sequences > params.n:
            found.sort(key=lambda item: -item[1].cumulative_logprob)
            found = found if group.is_finished else []
        return found[: params.n]

    def make_output(self, group: SequenceGroup) -> RequestOutput:
        """Return a snapshot of a request: all its text and tokens, so a snapshot after every step
        costs the square of the output's length; `Stream` has what is new alone."""
        params, prompt_logprobs = group.params, self.of_group(group).prompt_logprobs
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=list(group.prompt_token_ids),
            outputs=[
                CompletionOutput(
                    index=index,
                    text=output.new_text(0),
                    token_ids=list(seq.output_token_ids),
                    cumulative_logprob=output.cumulative_logprob if group.needs_logprobs else None,
                    logprobs=list(output.logprobs) if params.logprobs is not None else None,
                    finish_reason=output.finish_reason,
                    stop_reason=output.stop_reason,
                    error=output.error,
                )
                for index, (seq, output) in enumerate(self.completions(group))
            ],
            finished=group.is_finished,
            prompt_logprobs=list(prompt_logprobs) if prompt_logprobs else None,
            metrics=replace(
                group.metrics,
                num_accepted_tokens_per_pos=list(group.metrics.num_accepted_tokens_per_pos),
                acceptance_histogram=list(group.metrics.acceptance_histogram),
                num_undrafted=dict(group.metrics.num_undrafted),
            ),
            error=group.error,
        )


def _finish(output: SequenceOutput, reason: str, stop_reason: str | int | None) -> bool:
    output.finish_reason, output.stop_reason = reason, stop_reason
    return True
