"""Token ids to text, one token at a time, never splitting a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6
"""Prompt tokens decoded along with the first output token: some tokenizers strip the space before a
text's first word."""
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Follows one sequence. A token whose bytes end inside a character adds no text until the
    character is complete.

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
        self._prefix, self._read = 0, len(self._token_ids)
        self.text = ""

    def append(self, token_id: int) -> str:
        """Add a token to the text; return what it added, which may be empty."""
        self._token_ids.append(token_id)
        before = self._decode(self._token_ids[self._prefix : self._read])
        after = self._decode(self._token_ids[self._prefix :])
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self._prefix, self._read = self._read, len(self._token_ids)
        added = after[len(before) :]
        self.text += added
        return added

    def copy(self) -> Detokenizer:
        """A detokenizer for a fork."""
        twin = object.__new__(Detokenizer)
        twin._decode, twin._token_ids = self._decode, list(self._token_ids)
        twin._prefix, twin._read, twin.text = self._prefix, self._read, self.text
        return twin


def decoder_of(tokenizer: Any, skip_special_tokens: bool) -> Any:
    """Return ids -> text, through the Rust tokenizer where there is one: it is called twice per
    token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
