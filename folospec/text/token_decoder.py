"""Decodes single token ids: their bytes, their text, and which are special."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
REPLACEMENT = "\ufffd"


@lru_cache(maxsize=8)
def token_decoder(tokenizer: Any) -> TokenDecoder:
    """Return the decoder of a transformers tokenizer; requests share it and what it caches."""
    return TokenDecoder(tokenizer)


def text_function(tokenizer: Any) -> Callable[[int], str | None]:
    """Token id -> its text as it stands inside a text; None where there is no tokenizer."""
    return token_decoder(tokenizer).text_of if tokenizer is not None else lambda token_id: None


class TokenDecoder:
    """Decodes token ids, through the Rust tokenizer where there is one.

    `clean_up_tokenization_spaces` is never applied: it removes spaces that the model generated.

    Attributes:
        is_byte_level: whether every token stands for bytes (GPT-2, Llama 3, Qwen), so that a text
            is the UTF-8 decoding of the bytes of its tokens.
        may_split_characters: whether two tokens of text, not bytes, may be parts of one character:
            so little is known of decoders in Python, and of those that combine several.
        special_ids: the ids of special tokens, by their text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = backend = getattr(tokenizer, "backend_tokenizer", None)
        self.is_byte_level = type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"
        self.may_split_characters = _may_split_characters(backend)
        if backend is not None:
            added = backend.get_added_tokens_decoder().items()
            self.special_ids = {token.content: i for i, token in added if token.special}
        else:
            names = getattr(tokenizer, "all_special_tokens", ())
            self.special_ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        self._skipped = frozenset(self.special_ids.values())
        self._bytes: dict[int, bytes | None] = {}
        self._texts: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids, as the tokenizer has it for a whole text."""
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def is_kept(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether the decoder sees the token: it exists, and is no special token to be skipped."""
        if skip_special_tokens and token_id in self._skipped:
            return False
        return self.bytes_of(token_id) != b""

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for; empty where the tokenizer has no such token, None
        where it stands for text.

        Of a byte-level tokenizer every token has bytes; of others, byte-fallback tokens such as
        `<0xC3>` have one.
        """
        if token_id not in self._bytes:
            self._bytes[token_id] = self._find_bytes(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int) -> bytes | None:
        if self._backend is None:
            return None
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            values = [_BYTE_OF_CHAR.get(char) for char in token]
            # A token with any other character is an added one, and stands for itself.
            return token.encode() if None in values else bytes(v for v in values if v is not None)
        if _BYTE_TOKEN.fullmatch(token) and self._backend.decode([token_id], False) != token:
            return bytes([int(token[3:5], 16)])
        return None

    def text_of(self, token_id: int) -> str:
        """The text of one token as it stands inside a text, special tokens included.

        The space before a word is kept. Bytes that are no whole character are written as `<0xC3>`,
        so different parts of characters have different texts; where a tokenizer does not show its
        bytes, such a token has the name that it has in the vocabulary.
        """
        if token_id not in self._texts:
            self._texts[token_id] = self._find_text(token_id)
        return self._texts[token_id]

    def _find_text(self, token_id: int) -> str:
        token_bytes = self.bytes_of(token_id)
        if token_bytes is not None:
            return _show_bytes(token_bytes)
        # Some tokenizers strip the space before the first word, so the second one counts.
        once = self.decode([token_id], skip_special_tokens=False)
        twice = self.decode([token_id, token_id], skip_special_tokens=False)
        text = twice[len(once) :] or once
        is_part = self.may_split_characters and REPLACEMENT in text
        return self._tokenizer.convert_ids_to_tokens(token_id) if is_part else text


def _may_split_characters(backend: Any) -> bool:
    if backend is None:
        return True
    try:
        state = backend.decoder.__getstate__() if backend.decoder is not None else b""
    except Exception:  # a decoder in Python has none
        return True
    return b"ByteLevel" in state


def _show_bytes(token_bytes: bytes) -> str:
    text = token_bytes.decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)


def _byte_of_char() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes with: printable ones stand for
    themselves, the rest follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    return found | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
