"""Token ids to text, one token at a time, never splitting a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6
"""Prompt tokens decoded along with the first output token: some tokenizers strip the space before a
text's first word."""
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Follows one sequence; decodes when its text is asked for. A token whose bytes end inside a
    character adds no text until the character is complete.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_token_ids: what the output follows.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._decode = decoder_of(tokenizer, skip_special_tokens)
        self._token_ids = list(prompt_token_ids[-_CONTEXT:])
        # Tokens up to `read` are in the text; those from `prefix` on are decoded beside new ones.
        self._prefix, self._read, self._tried = 0, len(self._token_ids), len(self._token_ids)
        self._text = ""

    def append(self, token_id: int) -> None:
        """Add a token."""
        self._token_ids.append(token_id)

    @property
    def text(self) -> str:
        """The text of the tokens so far."""
        end = len(self._token_ids)
        # All new tokens at once, as a rule; one at a time if the last one ends inside a character.
        if self._tried < end and not self._read_up_to(end):
            for stop in range(self._tried + 1, end):
                self._read_up_to(stop)
        self._tried = end
        return self._text

    def _read_up_to(self, stop: int) -> bool:
        """Add tokens to the text if they make whole characters."""
        before = self._decode(self._token_ids[self._prefix : self._read])
        after = self._decode(self._token_ids[self._prefix : stop])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return False
        self._prefix, self._read = self._read, stop
        self._text += after[len(before) :]
        return True

    def copy(self) -> Detokenizer:
        """A detokenizer for a fork."""
        twin = object.__new__(Detokenizer)
        twin._decode, twin._token_ids = self._decode, list(self._token_ids)
        twin._prefix, twin._read, twin._tried = self._prefix, self._read, self._tried
        twin._text = self._text
        return twin


def decoder_of(tokenizer: Any, skip_special_tokens: bool) -> Any:
    """Return ids -> text, through the Rust tokenizer where there is one: it is called twice per
    run of new tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
