"""From a record to a request: the fields of a line, over the options of the command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from folospec.cli.batch_input import InputRecord
from folospec.option_names import SAMPLING_NAMES
from folospec.sampling_params import SamplingParams
from folospec.text.chat import conversation_of

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine

RecordId = str | int | None
Messages = Sequence[Mapping[str, Any]]

PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")
SAMPLING_FIELDS = tuple(
    f.name for f in fields(SamplingParams) if f.init and f.name != "logits_processors"
)
_LINE_FIELDS = ("id", *PROMPT_FIELDS, "sampling_params", *SAMPLING_FIELDS)


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A record that can be served, as far as it can be checked without the model.

    `prompt` is a text, token ids, or a list of messages for the chat template (`is_chat`).
    """

    record: InputRecord
    id: RecordId
    prompt: Any
    is_chat: bool
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTemplate:
    """What the command line says about every request; a line's own fields stand above it."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`, without the seed."""
    seed: int = 0
    chat: bool = False
    """Whether a prompt is a user's message."""
    system: str | None = None
    """The first message of every conversation that has no system message of its own."""

    def read(self, record: InputRecord) -> BatchRequest:
        """Turn a record into a request.

        Raises:
            ValueError: the record cannot be read, or a field is unknown, missing or out of range.
        """
        if record.error is not None:
            raise ValueError(record.error)
        line = {"prompt": record.value} if isinstance(record.value, str) else record.value
        if not isinstance(line, dict):
            raise ValueError(
                'must be a text or an object with "prompt", "prompt_token_ids" or "messages", '
                f"got {_short(record.value)}"
            )
        line = SAMPLING_NAMES.own(line, _LINE_FIELDS, "field")
        request_id = record_id(record)
        if request_id is None and line.get("id") is not None:
            raise ValueError(f"id must be a text or an integer, got {_short(line['id'])}")
        prompt, is_chat = self._prompt(line)
        sampling = {**self.sampling, **_line_sampling(line)}
        sampling.setdefault("seed", derived_seed(self.seed, record.index, request_id))
        return BatchRequest(record, request_id, prompt, is_chat, SamplingParams(**sampling))

    def _prompt(self, line: Mapping[str, Any]) -> tuple[Any, bool]:
        """Return the prompt, and whether it goes through the chat template."""
        given = [name for name in PROMPT_FIELDS if name in line]
        if len(given) != 1:
            raise ValueError(
                f"must have one of {', '.join(PROMPT_FIELDS)}, got {' and '.join(given) or 'none'}"
            )
        name, value = given[0], line[given[0]]
        if name == "messages":
            return self._with_system(_checked_messages(value)), True
        if not (isinstance(value, list) or (name == "prompt" and isinstance(value, str))):
            allowed = "a text or a list of token ids" if name == "prompt" else "a list of token ids"
            raise ValueError(f"{name} must be {allowed}, got {_short(value)}")
        if not self.chat:
            return value, False
        if not isinstance(value, str):
            raise ValueError("with --chat a prompt is a text, got token ids")
        return self._with_system([{"role": "user", "content": value}]), True

    def _with_system(self, messages: Messages) -> Messages:
        if self.system is None or messages[0].get("role") == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]


def record_id(record: InputRecord) -> RecordId:
    """The id that a record brings, None if it has none that can be used."""
    value = record.value.get("id") if isinstance(record.value, dict) else None
    return value if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def derived_seed(seed: int, index: int, request_id: RecordId = None) -> int:
    """The seed of one request of many that share `--seed`.

    Noise is keyed by seed and position: with one seed for all, prompts of one length would get
    correlated samples. The seed depends on the id, or on the prompt's position if there is no id;
    the first prompt without one keeps `seed`, so that a single prompt has the tokens that
    `LLM.generate` gives it.
    """
    if index == 0 and request_id is None:
        return seed
    key = json.dumps([seed, index if request_id is None else {"id": request_id}])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big")


def chat_prompt(engine: LLMEngine, messages: Messages) -> dict[str, list[int]]:
    """Write a conversation with the tokenizer's chat template.

    Raises:
        ValueError: there is no template, or it cannot write these messages.
    """
    token_ids = engine.render_chat(conversation_of(messages), add_generation_prompt=True)
    return {"prompt_token_ids": token_ids}


def _line_sampling(line: Mapping[str, Any]) -> dict[str, Any]:
    nested = line.get("sampling_params", {})
    if not isinstance(nested, dict):
        raise ValueError(f"sampling_params must be an object, got {_short(nested)}")
    nested = SAMPLING_NAMES.own(nested, SAMPLING_FIELDS, "field of sampling_params")
    top = {name: line[name] for name in SAMPLING_FIELDS if name in line}
    if twice := sorted(set(top) & set(nested)):
        raise ValueError(f"{twice[0]} is given twice, in the line and in its sampling_params")
    sampling = {**nested, **top}
    if isinstance(sampling.get("logit_bias"), dict):
        sampling["logit_bias"] = _with_token_ids(sampling["logit_bias"])
    return sampling


def _with_token_ids(bias: Mapping[str, Any]) -> dict[int, Any]:
    """The keys of a JSON object are texts."""
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except ValueError:
        raise ValueError(f"the keys of logit_bias must be token ids, got {_short(bias)}") from None


def _checked_messages(messages: Any) -> Messages:
    ok = isinstance(messages, list) and len(messages) > 0
    if not ok or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise ValueError(
            f'messages must be a list of objects with "role" and "content", got {_short(messages)}'
        )
    return messages


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
