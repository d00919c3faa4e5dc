"""Defines the options of one request.

Names and defaults follow vLLM where the meaning is the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any

from folospec.option_names import SAMPLING_NAMES, constructor_takes_names

LogitsProcessor = Callable[[list[int], Any], Any]
"""`processor(output_token_ids, logits) -> logits`: a row of logits, float32 [vocab_size], given the
tokens generated before it. It is called once per verified node with that node's own history, so it
must depend on its arguments alone."""


@constructor_takes_names(SAMPLING_NAMES)
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it stops.

    Names of other engines are taken where they mean the same (`max_new_tokens`); see
    `option_names`.

    Raises:
        ValueError: a value is out of range, or a name is unknown; the message names it and what is
            allowed.
    """

    n: int = 1
    """Number of completions returned."""
    best_of: int | None = None
    """Number of completions generated; the `n` with the highest cumulative logprob are returned.
    Default: `n`."""
    temperature: float = 1.0
    """0 is greedy: the arg-max, never a softmax."""
    top_k: int = -1
    """Keep the `top_k` most likely tokens; -1 or 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches `top_p`."""
    min_p: float = 0.0
    """Drop tokens less likely than `min_p` times the most likely one."""
    repetition_penalty: float = 1.0
    """Divide the positive and multiply the negative logits of tokens seen in prompt or output
    (arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token seen in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits, by token id."""
    allowed_token_ids: Sequence[int] | None = None
    """Only these token ids may be generated."""
    bad_words: Sequence[str] = ()
    """Words whose token sequences may not be completed."""
    min_tokens: int = 0
    """No EOS and no stop before this many tokens."""
    max_tokens: int | None = 16
    """Most tokens generated; None is as many as `max_model_len` leaves."""
    stop: str | Sequence[str] | None = ()
    """Strings that end the output; the string itself is left out of the text unless
    `include_stop_str_in_output`. One that is the text of a special token ends the output at that
    token, also while special tokens are left out of the text."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the output; they stay in `token_ids` and are left out of the text, as EOS
    is."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Generate past the end tokens of the model and its tokenizer."""
    seed: int | None = None
    """Same seed, same tokens, whatever else is in the batch. None derives one from the engine's
    seed. Under the acceptance rules that promise the distribution only, the request's number in the
    engine counts too: there the same requests in the same order have the same tokens."""
    logprobs: int | None = None
    """Return the logprob of each output token and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    logits_processors: Sequence[LogitsProcessor] = ()
    skip_special_tokens: bool = True
    num_speculative_tokens: int | None = None
    """Draft tokens per step for this request: None as the engine is set, 0 turns speculation off,
    and a larger number than the engine's is an error."""
    drafters: Sequence[str] | None = None
    """Those of the engine's drafters that may draft for this request, by name; None is all."""
    prediction: str | Sequence[int] | None = None
    """What the output is expected to be, as text or token ids, for drafters that can use it: an
    edited file, say. It changes the speed, never the output."""

    _stop: tuple[str, ...] = field(init=False, repr=False, default=())

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "stop_token_ids", "logits_processors"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "_stop", _frozen("stop", stop))
        # Copies, so that nobody changes them after they were checked.
        for name in ("bad_words", "stop_token_ids", "logits_processors"):
            object.__setattr__(self, name, _frozen(name, getattr(self, name)))
        for name, items in (("allowed_token_ids", "token ids"), ("drafters", "names")):
            if getattr(self, name) is not None:
                frozen = _frozen(name, getattr(self, name), f"None or a list of {items}")
                object.__setattr__(self, name, frozen)
        if is_token_list(self.prediction):
            object.__setattr__(self, "prediction", tuple(self.prediction or ()))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        self._check_counts()
        self._check_ranges()
        self._check_lists()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was given."""
        return self._stop

    @property
    def num_sequences(self) -> int:
        """How many sequences the request runs: `best_of`, or `n`."""
        return self.n if self.best_of is None else self.best_of

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def detached(self) -> SamplingParams:
        """A copy that shares nothing which can be changed in place."""
        own = copy(self)
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(own, name, dict(value))
            elif isinstance(value, (list, set)):
                object.__setattr__(own, name, tuple(value))
        return own

    def _check_counts(self) -> None:
        _require(is_int(self.n) and self.n >= 1, "n", self.n, "an integer of at least 1")
        _require(
            self.best_of is None or (is_int(self.best_of) and self.best_of >= self.n),
            "best_of",
            self.best_of,
            f"None or an integer of at least n={self.n}",
        )
        _require(
            not (self.greedy and self.num_sequences > 1),
            "n or best_of",
            self.num_sequences,
            "1 at temperature 0, where every completion would be the same",
        )
        _require(
            self.max_tokens is None or (is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens",
            self.max_tokens,
            "None or an integer of at least 1",
        )
        upper = self.max_tokens if self.max_tokens is not None else float("inf")
        _require(
            is_int(self.min_tokens) and 0 <= self.min_tokens <= upper,
            "min_tokens",
            self.min_tokens,
            f"an integer between 0 and max_tokens={self.max_tokens}",
        )
        for name in ("logprobs", "prompt_logprobs", "num_speculative_tokens"):
            value = getattr(self, name)
            _require(
                value is None or (is_int(value) and value >= 0),
                name,
                value,
                "None or an integer of at least 0",
            )
        _require(self.seed is None or is_int(self.seed), "seed", self.seed, "None or an integer")
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "a bool")

    def _check_ranges(self) -> None:
        _require(
            _is_number(self.temperature) and 0 <= self.temperature <= sys.float_info.max,
            "temperature",
            self.temperature,
            "a finite number of at least 0",
        )
        _require(
            is_int(self.top_k) and self.top_k >= -1,
            "top_k",
            self.top_k,
            "-1 or 0 (all), or a positive integer",
        )
        _require(
            _is_number(self.top_p) and 0 < self.top_p <= 1,
            "top_p",
            self.top_p,
            "a number in (0, 1]",
        )
        _require(
            _is_number(self.min_p) and 0 <= self.min_p <= 1,
            "min_p",
            self.min_p,
            "a number in [0, 1]",
        )
        _require(
            _is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= 2,
            "repetition_penalty",
            self.repetition_penalty,
            "a number in (0, 2]",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and -2 <= value <= 2, name, value, "a number in [-2, 2]")

    def _check_lists(self) -> None:
        for name, values in (("stop", self._stop), ("bad_words", self.bad_words)):
            ok = all(isinstance(value, str) and value for value in values)
            _require(ok, name, values, "a list of non-empty strings")
            for value in values:
                check_text(name, value)
        _require(
            all(is_int(t) for t in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "token ids",
        )
        allowed = self.allowed_token_ids
        _require(
            allowed is None or (len(allowed) > 0 and all(is_int(t) for t in allowed)),
            "allowed_token_ids",
            allowed,
            "None or a non-empty list of token ids",
        )
        _require(
            self.logit_bias is None or _is_bias(self.logit_bias),
            "logit_bias",
            self.logit_bias,
            "None or a map from token ids to -inf or numbers that float32 holds",
        )
        _require(
            all(callable(p) for p in self.logits_processors),
            "logits_processors",
            self.logits_processors,
            "callables",
        )
        _require(
            self.drafters is None or all(isinstance(name, str) for name in self.drafters),
            "drafters",
            self.drafters,
            "None or a list of names",
        )
        prediction = self.prediction
        if isinstance(prediction, str):
            check_text("prediction", prediction)
        elif prediction is not None:
            ok = is_token_list(prediction) and all(is_int(token_id) for token_id in prediction)
            _require(ok, "prediction", prediction, "None, a text or a list of token ids")


def is_int(value: object) -> bool:
    """Whether it is an integer of Python: no bool, and no number of another library."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_token_list(value: object) -> bool:
    """Whether it is a sequence that may hold token ids: not text, bytes, a set, an array."""
    return isinstance(value, Sequence) and not isinstance(
        value, (str, bytes, bytearray, memoryview)
    )


def check_text(name: str, text: str) -> None:
    """
    Raises:
        ValueError: the text has half a surrogate pair, which no tokenizer reads.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid Unicode, got {text[error.start]!r} at position {error.start}"
        ) from None


def shown(value: object) -> str:
    """A value as an error message shows it: the beginning, if it is long."""
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


_MOST_SHOWN = 200
_MAX_FLOAT32 = 3.4028234663852886e38


def _frozen(name: str, values: Any, allowed: str = "a list") -> tuple[Any, ...]:
    ok = isinstance(values, Collection) and not isinstance(
        values, (str, bytes, bytearray, memoryview, Mapping)
    )
    _require(ok, name, values, allowed)
    try:
        return tuple(values)
    except TypeError:  # an array without dimensions
        raise ValueError(f"{name} must be {allowed}, got {shown(values)}") from None


def _is_bias(bias: object) -> bool:
    return isinstance(bias, Mapping) and all(
        is_int(token_id)
        and _is_number(value)
        and (value == -math.inf or abs(value) <= _MAX_FLOAT32)
        for token_id, value in bias.items()
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
