"""Small tokenizers of every kind that decodes in its own way, with special and added tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHAR_OF_BYTE = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + place) for place, byte in enumerate(_OTHERS)
}
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "▁a", "a", "▁yes", "b▁", "▁é", "\ufffd", "x\ufffd", "."]


def _as_byte_level(raw: bytes) -> str:
    return "".join(CHAR_OF_BYTE[byte] for byte in raw)


def _byte_level_tokens() -> list[str]:
    """Single bytes, whole words, and tokens that begin or end inside a character."""
    smile = "🙂".encode()
    parts = [b" a", " é".encode(), smile[:2], smile[2:], b"x" + smile[:3], smile[3:] + b" y"]
    parts += ["\ufffd".encode(), b" \xff", "雪だ".encode()]
    return [CHAR_OF_BYTE[byte] for byte in range(256)] + [_as_byte_level(part) for part in parts]


def make(model: Any, decoder: Any, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with two special tokens and an added one."""
    backend = Tokenizer(model)
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(["<s>", "<|end|>"])
    backend.add_tokens([AddedToken("<added> 雪", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def _bpe(tokens: list[str], **options: Any) -> Any:
    return models.BPE({token: place for place, token in enumerate(tokens)}, [], **options)


def _fallback(*last: Any) -> Any:
    first = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*first, *last])


class Opaque:
    """A tokenizer written in Python: no more than `decode` is known of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.all_special_tokens = ["<s>", "<|end|>"]

    def __len__(self) -> int:
        return len(self._tokenizer)

    def decode(self, token_ids: Any, **options: Any) -> str:
        return self._tokenizer.decode(token_ids, **options)

    def convert_tokens_to_ids(self, token: str) -> int:
        return self._tokenizer.convert_tokens_to_ids(token)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token_id)


def byte_level() -> PreTrainedTokenizerFast:
    return make(_bpe(_byte_level_tokens()), decoders.ByteLevel())


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2: the first space of a text is stripped."""
    return make(_bpe([*BYTE_TOKENS, *WORDS]), _fallback(decoders.Strip(" ", 1, 0)))


def all_kinds() -> dict[str, Any]:
    """By name; `clean_up_tokenization_spaces` is on where it would change something."""
    pieces = ["[UNK]", "a", "##b", "##ing", "yes", ".", "don", "'", "t", "\ufffd", "##\ufffd"]
    word_piece = models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]")
    unigram = models.Unigram([(word, -float(place)) for place, word in enumerate(WORDS)], 0)
    suffixed = _bpe(["a", "b", "a</w>", "yes</w>", "</w>", ".</w>", "\ufffd</w>"])
    clean = {"clean_up_tokenization_spaces": True}
    in_sequence = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return {
        "byte_level": byte_level(),
        "byte_level_clean": make(_bpe(_byte_level_tokens()), decoders.ByteLevel(), **clean),
        "byte_level_in_sequence": make(_bpe(_byte_level_tokens()), in_sequence),
        "byte_fallback": byte_fallback(),
        "byte_fallback_unstripped": make(_bpe([*BYTE_TOKENS, *WORDS]), _fallback()),
        "metaspace": make(unigram, decoders.Metaspace()),
        "word_piece": make(word_piece, decoders.WordPiece(), **clean),
        "word_piece_uncleaned": make(word_piece, decoders.WordPiece(cleanup=False)),
        "suffixed": make(suffixed, decoders.BPEDecoder()),
        "no_decoder": make(_bpe(["a", "b", " c", "\ufffd"]), None),
        "opaque": Opaque(byte_level()),
    }
