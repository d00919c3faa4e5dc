"""What became of a record, and how JSON has it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from folospec.cli.batch_input import InputRecord
from folospec.cli.batch_request import RecordId, record_id

if TYPE_CHECKING:
    from folospec.outputs import CompletionOutput, Logprob, RequestOutput


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a record: an output or an error.

    `is_cut`: the run was interrupted before the request had finished.
    """

    record: InputRecord
    output: RequestOutput | None = None
    error: str | None = None
    is_cut: bool = False

    @property
    def id(self) -> RecordId:
        return record_id(self.record)

    @property
    def title(self) -> str:
        """Where the record stands, with its id: "prompts.jsonl, line 7 (id 'a')"."""
        return self.record.place + (f" (id {self.id!r})" if self.id is not None else "")

    def as_dict(self) -> dict[str, Any]:
        """The fields of its line."""
        record = self.record
        place = {"id": self.id, "index": record.index, "file": record.file, "line": record.line}
        if self.error is not None:
            return {**place, "error": self.error}
        assert self.output is not None
        return {**place, **output_record(self.output)}


def json_line(fields: Mapping[str, Any]) -> bytes:
    """One line of JSON in ASCII, whatever is in the texts: a U+2028 or half a character, say."""
    return json.dumps(fields).encode("ascii") + b"\n"


def output_record(output: RequestOutput) -> dict[str, Any]:
    """A request as JSON has it; times are seconds since its arrival."""
    metrics = asdict(output.metrics)
    arrival = metrics.pop("arrival_time")
    for name in ("first_token_time", "finished_time"):
        time_read = metrics.pop(name)
        metrics[f"seconds_to_{name.removesuffix('_time')}"] = (
            None if time_read is None else time_read - arrival
        )
    metrics["acceptance_length"] = output.metrics.acceptance_length
    record: dict[str, Any] = {
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "outputs": [_completion_record(completion) for completion in output.outputs],
        "metrics": metrics,
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [
            None if one is None else _logprobs(one) for one in output.prompt_logprobs
        ]
    return record


def _completion_record(completion: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.cumulative_logprob is not None:
        record["cumulative_logprob"] = _finite(completion.cumulative_logprob)
    if completion.logprobs is not None:
        record["logprobs"] = [_logprobs(one) for one in completion.logprobs]
    return record


def _logprobs(one: Mapping[int, Logprob]) -> dict[str, Any]:
    return {
        str(token_id): {**asdict(logprob), "logprob": _finite(logprob.logprob)}
        for token_id, logprob in one.items()
    }


def _finite(logprob: float) -> float | None:
    """JSON has no infinities: the logprob of a token that cannot be drawn is null."""
    return logprob if math.isfinite(logprob) else None
