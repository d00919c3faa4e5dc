"""From tokens to what the user gets: text, stops, logprobs."""

from __future__ import annotations

from collections.abc import Iterator
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
    if may_stop and token_id in request.eos_token_ids:
        return _finish(output, "stop", None)
    if may_stop and token_id in params.stop_token_ids:
        return _finish(output, "stop", token_id)
    if output.detokenizer is not None:
        stops = params.stop_strings
        num_before = len(output.detokenizer.text) if stops else 0
        output.detokenizer.append(token_id)
        if stops and may_stop and (found := _find_stop(output.text, num_before, stops)):
            begin, stop = found
            keep = begin + len(stop) if params.include_stop_str_in_output else begin
            output.cut_text = output.text[:keep]
            return _finish(output, "stop", stop)
    if seq.num_tokens >= request.max_num_tokens:
        return _finish(output, "length", None)
    return False


def _find_stop(text: str, num_before: int, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Return (where, which) of the first stop string that ends behind the first `num_before`
    characters."""
    found = []
    for stop in stops:
        begin = text.find(stop, max(0, num_before - len(stop) + 1))
        if begin >= 0:
            found.append((begin, stop))
    return min(found, key=lambda f: (f[0], len(f[1])), default=None)


def _finish(output: SequenceOutput, reason: str, stop_reason: str | int | None) -> bool:
    output.finish_reason, output.stop_reason = reason, stop_reason
    return True


def safe_text(request: Request, output: SequenceOutput) -> str:
    """The text that later tokens cannot take back: while running, the start of a stop string is
    held."""
    if output.finish_reason is not None or not request.params.stop_strings:
        return output.text
    longest = max(len(stop) for stop in request.params.stop_strings) - 1
    for begin in range(max(0, len(output.text) - longest), len(output.text)):
        if any(stop.startswith(output.text[begin:]) for stop in request.params.stop_strings):
            return output.text[:begin]
    return output.text


def make_output(request: Request) -> RequestOutput:
    """Return a snapshot of a request. With `best_of` it has no outputs until all sequences have
    finished and the best `n` are known."""
    group, params = request.group, request.params
    sequences = list(group.sequences)
    if params.num_sequences > params.n:
        sequences.sort(key=lambda s: -request.outputs[s.seq_id].cumulative_logprob)
        sequences = sequences if group.is_finished else []
    completions = []
    for index, seq in enumerate(sequences[: params.n]):
        output = request.outputs[seq.seq_id]
        completions.append(
            CompletionOutput(
                index=index,
                text=safe_text(request, output),
                token_ids=list(seq.output_token_ids),
                cumulative_logprob=output.cumulative_logprob if request.needs_logprobs else None,
                logprobs=list(output.logprobs) if params.logprobs is not None else None,
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
            )
        )
    return RequestOutput(
        request_id=group.request_id,
        prompt=group.prompt,
        prompt_token_ids=list(group.prompt_token_ids),
        outputs=completions,
        finished=group.is_finished,
        prompt_logprobs=list(request.prompt_logprobs) if request.prompt_logprobs else None,
        metrics=replace(
            group.metrics,
            num_accepted_tokens_per_pos=list(group.metrics.num_accepted_tokens_per_pos),
            acceptance_histogram=list(group.metrics.acceptance_histogram),
            num_undrafted=dict(group.metrics.num_undrafted),
        ),
    )


@dataclass(frozen=True, slots=True)
class Increment:
    """What `stream` yields: new text and tokens of completion `index`; the last one has a finish
    reason."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass(slots=True)
class Sent:
    """How much of a completion has been streamed."""

    num_chars: int = 0
    num_tokens: int = 0
    finished: bool = False


def increments(output: RequestOutput, sent: dict[int, Sent]) -> Iterator[Increment]:
    """Yield what a snapshot has beyond what was sent, by completion; an end is sent once."""
    for completion in output.outputs:
        before = sent.setdefault(completion.index, Sent())
        text = completion.text[before.num_chars :]
        token_ids = completion.token_ids[before.num_tokens :]
        finished = completion.finish_reason is not None
        if text or token_ids or finished != before.finished:
            sent[completion.index] = Sent(len(completion.text), len(completion.token_ids), finished)
            yield Increment(completion.index, text, token_ids, completion.finish_reason)
