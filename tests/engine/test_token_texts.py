"""`decoded_token` says what each token stands for; the tokens of an output add up to its text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from tokenizers_for_text import all_kinds, byte_fallback, byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from folospec import LLM, SamplingParams
from folospec.requests.output_processor import OutputProcessor
from folospec.text.detokenizer import Detokenizer
from folospec.text.token_decoder import TokenDecoder

KINDS = all_kinds()
END = "<|end|>"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A random model with a byte-fallback tokenizer: its outputs are full of broken characters."""
    folder: Path = tmp_path_factory.mktemp("text")
    tokenizer = byte_fallback()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LLM(str(folder), dtype="float64")


def test_tokens_of_one_text_but_different_bytes_have_different_texts() -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        decoder = TokenDecoder(tokenizer)
        texts = {decoder.bytes_of(token_id): decoder.text_of(token_id) for token_id in range(256)}
        assert len(set(texts.values())) == 256
        assert texts[b"\xc3"] == "<0xC3>"
        assert texts[b"A"] == "A"


def test_a_token_that_ends_inside_a_character_shows_its_whole_characters() -> None:
    decoder = TokenDecoder(byte_level())
    texts = [decoder.text_of(token_id) for token_id in range(256, 266)]
    assert texts[2:6] == ["<0xF0><0x9F>", "<0x99><0x82>", "x<0xF0><0x9F><0x99>", "<0x82> y"]


def test_a_token_keeps_the_space_before_its_word() -> None:
    fallback, metaspace = TokenDecoder(byte_fallback()), TokenDecoder(KINDS["metaspace"])
    for decoder, first in ((fallback, 256), (metaspace, 0)):
        assert [decoder.text_of(first + i) for i in range(5)] == [" ", "  ", " a", "a", " yes"]
    word_piece = TokenDecoder(KINDS["word_piece"])
    assert [word_piece.text_of(i) for i in (1, 2)] == [" a", "b"]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"suffixed"}))
def test_the_texts_of_the_tokens_add_up_to_the_text(kind: str) -> None:
    """Where no token has a part of a character. (With suffixes, a space comes a token later.)"""
    tokenizer, rng = KINDS[kind], random.Random(kind)
    decoder = TokenDecoder(tokenizer)
    is_known = kind not in ("opaque", "byte_level_in_sequence")
    parts = ["<0x"] if is_known else ["<0x", "\ufffd"]
    whole = [
        i
        for i in range(len(tokenizer))
        if not any(part in decoder.text_of(i) + tokenizer.decode([i]) for part in parts)
    ]
    assert len(whole) > 3
    start = tokenizer.convert_tokens_to_ids("a")
    for _ in range(40):
        output = rng.choices(whole, k=20)
        detokenizer = Detokenizer(tokenizer, [start], False)
        for token_id in output:
            detokenizer.append(token_id)
        detokenizer.finish()
        assert "".join(map(decoder.text_of, output)) == detokenizer.text


def test_logprobs_have_the_texts_and_each_is_found_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    find = TokenDecoder._find_text
    monkeypatch.setattr(
        TokenDecoder, "_find_text", lambda self, i: found.append(i) or find(self, i)
    )
    size = len(llm.tokenizer)
    params = SamplingParams(max_tokens=6, seed=1, logprobs=size)
    word = llm.tokenizer.convert_tokens_to_ids("▁a")
    [output] = llm.generate([[word]], params, use_tqdm=False)
    for row in output.outputs[0].logprobs:
        assert row[word].decoded_token == " a"
        assert row[0xC3].decoded_token == "<0xC3>"
    assert len(found) == len(set(found)) <= size


def test_streams_of_siblings_add_up_to_their_texts(llm: LLM) -> None:
    word = llm.tokenizer.convert_tokens_to_ids("▁a")
    for stop in ((), ("\n", "a", "yes!")):
        params = SamplingParams(max_tokens=40, n=3, seed=5, stop=stop, temperature=1.5)
        final = llm.generate([[word, 0xE9]], params, use_tqdm=False)[0].outputs
        streamed = ["", "", ""]
        for delta in llm.engine.stream([word, 0xE9], params):
            streamed[delta.index] += delta.text
        assert streamed == [completion.text for completion in final]
        assert len(set(streamed)) == 3
        if not stop:
            whole = [llm.tokenizer.decode([word, 0xE9, *c.token_ids], True) for c in final]
            assert [text[len("a") :] for text in whole] == streamed


def test_a_stream_makes_no_snapshot_of_what_it_has_sent(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make_output = OutputProcessor.make_output

    def counted(outputs: Any, group: Any) -> Any:
        made.append(group)
        return make_output(outputs, group)

    monkeypatch.setattr(OutputProcessor, "make_output", counted)
    params = SamplingParams(max_tokens=30, seed=1)
    deltas = [*llm.engine.stream([5, 6], params)]
    assert sum(len(delta.token_ids) for delta in deltas) == 30
    assert made == []
    llm.generate([5, 6], params, use_tqdm=False)
    assert len(made) == 1


@pytest.mark.parametrize("skips", [True, False])
def test_a_request_stops_at_the_text_of_a_special_token(llm: LLM, skips: bool) -> None:
    end = llm.tokenizer.convert_tokens_to_ids(END)
    params = SamplingParams(
        max_tokens=6, seed=1, stop=["x", END], logit_bias={end: 1000.0}, skip_special_tokens=skips
    )
    completion = llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0]
    assert (completion.token_ids, completion.text) == ([end], "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", END)


def test_a_special_token_that_is_no_stop_string_ends_nothing(llm: LLM) -> None:
    end = llm.tokenizer.convert_tokens_to_ids(END)
    params = SamplingParams(max_tokens=6, seed=1, stop=["<s>"], logit_bias={end: 1000.0})
    completion = llm.generate([[5, 6]], params, use_tqdm=False)[0].outputs[0]
    assert completion.token_ids == [end] * 6


def test_without_a_tokenizer_tokens_have_no_text(models: Any) -> None:
    """A row's texts are None without one."""
    [output] = harness.run(
        harness.make_llm(models.target), [[1, 2]], SamplingParams(max_tokens=1, logprobs=2)
    ).outputs
    assert {p.decoded_token for p in output.outputs[0].logprobs[0].values()} == {None}
