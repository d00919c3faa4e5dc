"""Turns token ids into text, a few at a time, equal to the decoding of the whole.

Which text a token adds depends on its neighbours in two ways. A character may be spread over
several tokens; and some tokenizers treat the first word of a text in another way than the next. So
new tokens are decoded after an earlier one, and what may still become another character is held.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from copy import copy
from typing import Any

from folospec.text.token_decoder import REPLACEMENT, TokenDecoder, token_decoder

_MAX_MISSING = 3
"""A character has at most 4 bytes: so many bytes of it, at most, may be there while one is missing.
"""
_MAX_WINDOW = 16
"""Tokens that are decoded again at most while a character is incomplete."""


class Detokenizer:
    """Follows one sequence; decodes when its text is asked for, every token a few times at most
    however often that is.

    The output's text is the part of `decode(prompt + output)` that begins where the complete
    characters of the prompt end: where the prompt ends inside a character, the whole character
    belongs to the output. While the output runs, an incomplete character at its end is left out;
    `finish` adds it, as the U+FFFD that `decode` makes of it. The text is a function of the tokens,
    not of when it is asked for.

    A tokenizer with byte fallback (Llama 2) decodes a run of byte tokens as a whole: one wrong byte
    makes U+FFFD of every byte of the run. `text` has the characters of a run as they are complete,
    but they are not settled before the run ends.

    Of a tokenizer written in Python nobody knows the bytes of a token. There up to three U+FFFD at
    the end of a text count as an incomplete character.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_token_ids: what the output follows.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        decoder = token_decoder(tokenizer)
        reader = _ByteReader if decoder.is_byte_level else _TokenReader
        self._reader: _ByteReader | _TokenReader = reader(
            decoder, skip_special_tokens, prompt_token_ids
        )
        self._text = _Text()
        self._unread: list[int] = []

    def append(self, token_id: int) -> None:
        """Add a token."""
        self._unread.append(token_id)

    def finish(self) -> None:
        """Add what is held of an incomplete character; no token follows."""
        self._read()
        self._reader.finish(self._text)

    @property
    def text(self) -> str:
        """The text of the tokens so far, without an incomplete character at the end."""
        return self.text_from(0)

    def text_from(self, start: int) -> str:
        """The same from character `start` on, at the cost of its length."""
        self._read()
        return self._text.text_from(start)

    @property
    def num_chars(self) -> int:
        """The length of `text`."""
        self._read()
        return self._text.num_chars

    @property
    def num_settled(self) -> int:
        """How many characters of `text` stay whatever tokens follow."""
        self._read()
        return self._text.num_settled

    @property
    def num_taken_back(self) -> int:
        """How often characters behind the settled ones have been replaced."""
        self._read()
        return self._text.num_taken_back

    def copy(self) -> Detokenizer:
        """A detokenizer for a fork."""
        fork = copy(self)
        fork._reader, fork._text = self._reader.fork(), self._text.fork()
        fork._unread = list(self._unread)
        return fork

    def _read(self) -> None:
        if self._unread:
            token_ids, self._unread = self._unread, []
            self._reader.read(token_ids, self._text)


class _Text:
    """A text in pieces: settled ones, then those that may be taken back."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._num_settled_pieces = 0
        self.num_chars = self.num_settled = 0
        self.num_taken_back = 0

    def add(self, text: str, *, settled: bool = True) -> None:
        if text:
            self._pieces.append(text)
            self.num_chars += len(text)
        if settled:
            self.settle()

    def settle(self) -> None:
        self._num_settled_pieces, self.num_settled = len(self._pieces), self.num_chars

    def take_back(self) -> None:
        """Drop what is not settled."""
        if self.num_chars > self.num_settled:
            del self._pieces[self._num_settled_pieces :]
            self.num_chars = self.num_settled
            self.num_taken_back += 1

    def text_from(self, start: int) -> str:
        missing, first = self.num_chars - start, len(self._pieces)
        while missing > 0:
            first -= 1
            missing -= len(self._pieces[first])
        text = "".join(self._pieces[first:])
        return text[-missing:] if missing else text

    def fork(self) -> _Text:
        fork = copy(self)
        fork._pieces = list(self._pieces)
        return fork


class _ByteReader:
    """Byte-level tokenizers: the UTF-8 decoding of the tokens' bytes, all settled at once."""

    def __init__(
        self, decoder: TokenDecoder, skip_special_tokens: bool, prompt_token_ids: Sequence[int]
    ) -> None:
        self._decoder, self._skips = decoder, skip_special_tokens
        # An incomplete character begins in the last bytes, whatever is before them.
        end = b""
        for token_id in reversed(prompt_token_ids):
            if len(end) >= _MAX_MISSING:
                break
            end = self._bytes_of([token_id]) + end
        self._held = end[codecs.utf_8_decode(end, "replace", False)[1] :]

    def read(self, token_ids: Sequence[int], text: _Text) -> None:
        new = self._held + self._bytes_of(token_ids)
        chars, num_read = codecs.utf_8_decode(new, "replace", False)
        self._held = new[num_read:]
        text.add(chars)

    def finish(self, text: _Text) -> None:
        text.add(self._held.decode("utf-8", "replace"))
        self._held = b""

    def fork(self) -> _ByteReader:
        return copy(self)

    def _bytes_of(self, token_ids: Sequence[int]) -> bytes:
        decoder, skips = self._decoder, self._skips
        kept = (t for t in token_ids if decoder.is_kept(t, skip_special_tokens=skips))
        return b"".join(decoder.bytes_of(token_id) or b"" for token_id in kept)


class _TokenReader:
    """Other tokenizers: the tokenizer decodes a window of earlier tokens and the new ones; runs of
    byte-fallback tokens are decoded here.

    The window begins with the fewest tokens that have text, so that nothing in it is treated as the
    beginning of a text except where it is one.
    """

    def __init__(
        self, decoder: TokenDecoder, skip_special_tokens: bool, prompt_token_ids: Sequence[int]
    ) -> None:
        self._decoder, self._skips = decoder, skip_special_tokens
        self._run = _ByteRun()
        kept = filter(self._keeps, reversed(prompt_token_ids))
        run: list[int] = []
        before: list[int] = []
        for token_id in kept:
            if before or decoder.bytes_of(token_id) is None:
                before.append(token_id)
            else:
                run.append(token_id)
            if len(before) == _MAX_WINDOW:
                break
        self._window = before[::-1]
        if before and not self._decode(self._window):
            self._window = [*kept][::-1] + self._window
        decoded = self._decode(self._window)
        self._num_shown = len(decoded) - self._num_held(decoded)
        """Characters of the window's text that are in the output or in the prompt."""
        if self._num_shown == len(decoded):
            self._shrink()
        for token_id in reversed(run):
            self._add_byte(token_id, _Text())
        self._run.leave_to_prompt()

    def read(self, token_ids: Sequence[int], text: _Text) -> None:
        words: list[int] = []
        for token_id in filter(self._keeps, token_ids):
            if self._decoder.bytes_of(token_id) is None:
                self._end_run(text)
                words.append(token_id)
            else:
                self._read_words(words, text)
                words = []
                self._add_byte(token_id, text)
        self._read_words(words, text)

    def finish(self, text: _Text) -> None:
        self._end_run(text)
        decoded = self._decode(self._window)
        text.add(decoded[self._num_shown :])
        self._num_shown = len(decoded)

    def fork(self) -> _TokenReader:
        fork = copy(self)
        fork._run = self._run.fork()
        return fork

    def _read_words(self, token_ids: list[int], text: _Text) -> None:
        """Add tokens that stand for text."""
        if not token_ids:
            return
        before, self._window = self._window, self._window + token_ids
        decoded = self._decode(self._window)
        end = len(decoded) - self._num_held(decoded)
        new = decoded[self._num_shown : end]
        text.add(new)
        if end < len(decoded):
            self._num_shown = max(self._num_shown, end)
            if len(self._window) > _MAX_WINDOW:
                self._window = self._window[-_MAX_WINDOW // 2 :]
                self._num_shown = len(self._decode(self._window)) - (len(decoded) - end)
        elif new or not decoded:
            self._shrink()
        elif len(self._window) > _MAX_WINDOW:
            self._window = before

    def _shrink(self) -> None:
        """Keep the fewest last tokens that have text, of a window that is shown whole."""
        size = 1
        while size < len(self._window) and not self._decode(self._window[-size:]):
            size *= 2
        self._window = self._window[-size:]
        self._num_shown = len(self._decode(self._window))

    def _num_held(self, decoded: str) -> int:
        """How many characters at the end may be parts of one that is incomplete."""
        if not self._decoder.may_split_characters:
            return 0
        return min(_MAX_MISSING, len(decoded) - len(decoded.rstrip(REPLACEMENT)))

    def _add_byte(self, token_id: int, text: _Text) -> None:
        if not self._run.token_ids and not self._window:
            # The space that begins a text may be one that the tokenizer strips.
            self._run.num_stripped = int(not self._decode([token_id]))
        self._run.add(token_id, self._decoder.bytes_of(token_id) or b"", text)

    def _end_run(self, text: _Text) -> None:
        if self._run.token_ids:
            self._run.end(text)
            self._window = self._window + self._run.token_ids[-2:]
            self._shrink()
            self._run = _ByteRun()

    def _keeps(self, token_id: int) -> bool:
        return self._decoder.is_kept(token_id, skip_special_tokens=self._skips)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skips)


class _ByteRun:
    """Successive byte-fallback tokens: UTF-8 if all of them are, else one U+FFFD for each."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.num_stripped = 0
        """Characters at its beginning that the tokenizer strips."""
        self._num_bytes = 0
        """Of the output, with the incomplete character that the prompt ends with."""
        self._held = b""
        self._is_valid = True

    def add(self, token_id: int, byte: bytes, text: _Text) -> None:
        self.token_ids.append(token_id)
        self._num_bytes += 1
        if not self._is_valid:
            text.add(REPLACEMENT)
            return
        new = self._held + byte
        try:
            chars, num_read = codecs.utf_8_decode(new, "strict", False)
        except UnicodeDecodeError:
            self._replace(text)
            return
        self._held = new[num_read:]
        text.add(chars[self.num_stripped :], settled=False)
        self.num_stripped = max(0, self.num_stripped - len(chars))

    def end(self, text: _Text) -> None:
        if self._held:
            self._replace(text)
        text.settle()

    def leave_to_prompt(self) -> None:
        """Leave all to the prompt but its incomplete last character."""
        self._num_bytes = len(self._held)

    def fork(self) -> _ByteRun:
        fork = copy(self)
        fork.token_ids = list(self.token_ids)
        return fork

    def _replace(self, text: _Text) -> None:
        self._is_valid, self._held = False, b""
        text.take_back()
        text.add(REPLACEMENT * self._num_bytes)
