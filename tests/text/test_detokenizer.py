"""The increments of a text add up to the decoding of the whole, whenever they are asked for."""

from __future__ import annotations

import codecs
import os
import random
from itertools import takewhile
from typing import Any

import pytest
from tokenizers_for_text import CHAR_OF_BYTE, Opaque, all_kinds, byte_fallback, byte_level

from folospec.text.detokenizer import Detokenizer
from folospec.text.token_decoder import TokenDecoder

KINDS = all_kinds()
OPAQUE = ("opaque", "byte_level_in_sequence")
"""Nobody knows what the last character of a text is made of: their prompts end with a letter."""
ROUNDS = int(os.environ.get("FOLOSPEC_FUZZ_ROUNDS", "60"))
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}


def decode(tokenizer: Any, token_ids: list[int], skips: bool) -> str:
    return tokenizer.decode(
        token_ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False
    )


def expected_text(tokenizer: Any, prompt: list[int], output: list[int], skips: bool) -> str:
    """The decoding of the whole, from behind the complete characters of the prompt."""
    whole = decode(tokenizer, prompt + output, skips)
    if isinstance(tokenizer, Opaque):
        return whole[len(decode(tokenizer, prompt, skips)) :]
    skipped = tokenizer.convert_tokens_to_ids(["<s>", "<|end|>"]) if skips else ()
    kept, following = (
        tokenizer.convert_ids_to_tokens([t for t in ids if t not in skipped])
        for ids in (prompt, output)
    )
    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        return whole[len(codecs.utf_8_decode(raw_bytes(kept), "replace", False)[0]) :]
    run = [*takewhile(is_byte, reversed(kept))][::-1]
    before = decode(tokenizer, tokenizer.convert_tokens_to_ids(kept[: len(kept) - len(run)]), skips)
    try:
        complete, num_bytes = codecs.utf_8_decode(byte_values(run), "strict", False)
    except UnicodeDecodeError:
        return whole[len(before) + len(run) :]
    try:
        byte_values([*run, *takewhile(is_byte, following)]).decode()
    except UnicodeDecodeError:  # the tokenizer has U+FFFD for each byte
        return whole[len(before) + num_bytes :]
    shown = decode(tokenizer, tokenizer.convert_tokens_to_ids(run[:num_bytes]), skips)
    return whole[len(before) + (len(complete) if before else len(shown)) :]


def raw_bytes(tokens: list[str]) -> bytes:
    return b"".join(
        bytes(BYTE_OF_CHAR[c] for c in t) if set(t) <= set(BYTE_OF_CHAR) else t.encode()
        for t in tokens
    )


def is_byte(token: str) -> bool:
    return token.startswith("<0x")


def byte_values(tokens: list[str]) -> bytes:
    return bytes(int(token[3:5], 16) for token in tokens)


def random_ids(rng: random.Random, tokenizer: Any, length: int) -> list[int]:
    """Whole characters, parts of them, words and special tokens, and ids that do not exist."""
    size = len(tokenizer)
    ids: list[int] = []
    while len(ids) < length:
        kind = rng.random()
        if kind < 0.4 and size > 256:
            for byte in rng.choice(["🙂", "é", "\ufffd", " ", "a", "雪だ"]).encode():
                char = CHAR_OF_BYTE[byte]
                found = tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")
                ids.append(found if found else tokenizer.convert_tokens_to_ids(char) or 0)
        else:
            ids.append(rng.randrange(max(0, size - 24 if kind < 0.85 else 0), size))
    return ids


def read(detokenizer: Detokenizer, token_ids: list[int], ask: Any) -> str:
    """The text, after asking for it where `ask()` says so; what is settled stays."""
    settled = ""
    for token_id in token_ids:
        detokenizer.append(token_id)
        if ask():
            assert detokenizer.text.startswith(settled)
            settled = detokenizer.text[: detokenizer.num_settled]
    detokenizer.finish()
    assert detokenizer.text.startswith(settled)
    assert detokenizer.num_settled == detokenizer.num_chars == len(detokenizer.text)
    return detokenizer.text


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_decoding_of_the_whole(kind: str, skips: bool) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    for _ in range(ROUNDS):
        prompt = random_ids(rng, tokenizer, rng.randrange(0, 12))
        output = random_ids(rng, tokenizer, rng.randrange(0, 40))
        if kind in OPAQUE:
            prompt = [*prompt, tokenizer.convert_tokens_to_ids("a")]
        expected = expected_text(tokenizer, prompt, output, skips)
        for ask in (lambda: True, lambda: rng.random() < 0.3, lambda: False):
            detokenizer = Detokenizer(tokenizer, prompt, skips)
            assert read(detokenizer, output, ask) == expected, (prompt, output)


@pytest.mark.parametrize("kind", KINDS)
def test_text_while_running_depends_on_the_tokens_alone(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    for _ in range(ROUNDS):
        prompt, output = (random_ids(rng, tokenizer, rng.randrange(1, 20)) for _ in range(2))
        always, once = (Detokenizer(tokenizer, prompt, True) for _ in range(2))
        for token_id in output:
            always.append(token_id)
            once.append(token_id)
            assert always.text is not None
        assert always.text == once.text, (prompt, output)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_goes_on_by_itself(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    for _ in range(ROUNDS // 4):
        start, one, two = (random_ids(rng, tokenizer, rng.randrange(1, 12)) for _ in range(3))
        first = Detokenizer(tokenizer, [], True)
        read_before = rng.random() < 0.5
        for token_id in start:
            first.append(token_id)
            assert not read_before or first.text is not None
        second = first.copy()
        texts = [
            read(detokenizer, ids, lambda: True)
            for detokenizer, ids in ((first, one), (second, two))
        ]
        assert texts == [decode(tokenizer, start + ids, True) for ids in (one, two)]


def test_the_text_of_a_run_of_bytes_is_settled_when_the_run_ends() -> None:
    """A wrong byte turns its earlier characters into U+FFFD, so they may not be sent before."""
    tokenizer = byte_fallback()
    word = tokenizer.convert_tokens_to_ids("a")
    detokenizer = Detokenizer(tokenizer, [word], True)
    for byte in "é!".encode():
        detokenizer.append(byte)
    assert (detokenizer.text, detokenizer.num_settled) == ("é!", 0)
    ended, broken = detokenizer.copy(), detokenizer.copy()
    ended.append(word)
    broken.append(0xFF)
    assert (ended.text, ended.num_settled) == ("é!a", 3)
    assert (broken.text, broken.num_settled) == ("\ufffd" * 4, 4)


def test_a_character_that_the_prompt_begins_belongs_to_the_output() -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        decoder = TokenDecoder(tokenizer)
        id_of = {decoder.bytes_of(i): i for i in reversed(range(256))}
        smile = [id_of[bytes([byte])] for byte in "a🙂!".encode()]
        for cut in range(1, 5):
            detokenizer = Detokenizer(tokenizer, smile[:cut], True)
            assert read(detokenizer, smile[cut:], lambda: False) == "🙂!"
        assert read(Detokenizer(tokenizer, smile[:5], True), smile[5:], lambda: False) == "!"


def test_an_incomplete_character_is_held_and_flushed_at_the_end() -> None:
    for tokenizer in (byte_level(), byte_fallback(), Opaque(byte_level())):
        backend = tokenizer._tokenizer if isinstance(tokenizer, Opaque) else tokenizer
        decoder = TokenDecoder(backend)
        id_of = {decoder.bytes_of(i): i for i in reversed(range(256))}
        prompt, output = [id_of[b"a"]], [id_of[bytes([byte])] for byte in "é".encode()[:1]]
        detokenizer = Detokenizer(tokenizer, prompt, True)
        detokenizer.append(output[0])
        assert detokenizer.text == ""
        detokenizer.finish()
        assert detokenizer.text == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asks", [True, False])
def test_a_token_is_decoded_a_few_times_at_most(
    kind: str, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long runs without text, too: halves of characters, tokens that are skipped."""
    num_decoded = 0
    decode_ids = TokenDecoder.decode

    def counted(self: TokenDecoder, token_ids: Any, **options: Any) -> str:
        nonlocal num_decoded
        num_decoded += len(token_ids)
        return decode_ids(self, token_ids, **options)

    monkeypatch.setattr(TokenDecoder, "decode", counted)
    tokenizer, length = KINDS[kind], 200
    runs = [[token_id] * length for token_id in range(0, len(tokenizer), 13)]
    runs.append(random_ids(random.Random(3), tokenizer, length))
    for output in runs:
        num_decoded = 0
        read(Detokenizer(tokenizer, output[:5], True), output, lambda: asks)
        assert num_decoded < 40 * length, output[0]
