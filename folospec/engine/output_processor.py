"""From tokens to what the user gets: text, stops, logprobs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from folospec.core.sequence import Sequence
from folospec.engine.request import Request, SequenceOutput
from folospec.outputs import CompletionOutput, RequestOutput


def append_token(request: Request, seq: Sequence, token_id: int) -> bool:
    """Add a token to a sequence and its text; return whether it ended the output.

    Tokens are taken one at a time, so an accepted run ends exactly where plain decoding would have
    ended.
    """
    output, params = request.outputs[seq.seq_id], request.params
    seq.add_token_id(token_id)
    may_stop = seq.num_output_tokens >= params.min_tokens
    if may_stop and token_id in request.stop_ids:
        is_eos = token_id in request.eos_token_ids
        return _finish(output, "stop", None if is_eos else token_id)
    if may_stop and token_id in request.special_stops:
        stop = request.special_stops[token_id]
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
    if seq.num_tokens >= request.max_num_tokens:
        return _finish(output, "length", None)
    return False


def _finish(output: SequenceOutput, reason: str, stop_reason: str | int | None) -> bool:
    output.finish_reason, output.stop_reason = reason, stop_reason
    return True


def make_output(request: Request) -> RequestOutput:
    """Return a snapshot of a request: all its text and tokens, so a snapshot after every step costs
    the square of the output's length; `Stream` has what is new alone."""
    group, params = request.group, request.params
    return RequestOutput(
        request_id=group.request_id,
        prompt=group.prompt,
        prompt_token_ids=list(group.prompt_token_ids),
        outputs=[
            CompletionOutput(
                index=index,
                text=output.new_text(0),
                token_ids=list(seq.output_token_ids),
                cumulative_logprob=output.cumulative_logprob if request.needs_logprobs else None,
                logprobs=list(output.logprobs) if params.logprobs is not None else None,
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
                error=output.error,
            )
            for index, (seq, output) in enumerate(_completions(request))
        ],
        finished=group.is_finished,
        prompt_logprobs=list(request.prompt_logprobs) if request.prompt_logprobs else None,
        metrics=replace(
            group.metrics,
            num_accepted_tokens_per_pos=list(group.metrics.num_accepted_tokens_per_pos),
            acceptance_histogram=list(group.metrics.acceptance_histogram),
            num_undrafted=dict(group.metrics.num_undrafted),
        ),
        error=request.error,
    )


def _completions(request: Request) -> list[tuple[Sequence, SequenceOutput]]:
    """The sequences that the user gets, in their order. With `best_of` there are none until all
    have finished and the best `n` are known."""
    group, params = request.group, request.params
    found = [(seq, request.outputs[seq.seq_id]) for seq in group.sequences]
    if params.num_sequences > params.n:
        found.sort(key=lambda item: -item[1].cumulative_logprob)
        found = found if group.is_finished else []
    return found[: params.n]


@dataclass(frozen=True, slots=True)
class Increment:
    """What `stream` yields: new text and tokens of completion `index`; the last one has a finish
    reason, and the error where that is "error"."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    error: str | None = None


@dataclass(slots=True)
class Sent:
    """How much of a completion has been streamed."""

    num_chars: int = 0
    num_tokens: int = 0
    finished: bool = False


class Stream:
    """The increments of one request. Each costs as much as it has, not as the output so far."""

    def __init__(self) -> None:
        self.arrived: deque[Increment] = deque()
        self._sent: dict[int, Sent] = {}

    def take(self, request: Request) -> None:
        """Add what a request has beyond what was taken, by completion; an end is taken once."""
        for index, (seq, output) in enumerate(_completions(request)):
            sent = self._sent.setdefault(index, Sent())
            text = output.new_text(sent.num_chars)
            token_ids = seq.output_token_ids[sent.num_tokens :]
            self._add(Increment(index, text, token_ids, output.finish_reason, output.error))

    def take_last(self, output: RequestOutput) -> None:
        """Add what the last output of a request has beyond what was taken."""
        for c in output.outputs:
            sent = self._sent.setdefault(c.index, Sent())
            text, token_ids = c.text[sent.num_chars :], c.token_ids[sent.num_tokens :]
            self._add(Increment(c.index, text, token_ids, c.finish_reason, c.error))

    def _add(self, increment: Increment) -> None:
        sent, is_last = self._sent[increment.index], increment.finish_reason is not None
        if sent.finished or not (increment.text or increment.token_ids or is_last):
            return
        sent.num_chars += len(increment.text)
        sent.num_tokens += len(increment.token_ids)
        sent.finished = is_last
        self.arrived.append(increment)
