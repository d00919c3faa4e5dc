"""Text: stops inside accepted runs, whole characters, and the bundled models in float64."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from harness import assert_speculated

from folospec import LLM, SamplingParams
from folospec.cli.demo import held_out_prompts
from folospec.text.detokenizer import Detokenizer

PROMPT = "def add(first, second):"
DRAFT = {"method": "draft_model", "model": "folospec-demo-draft", "num_speculative_tokens": 5}
SELF = {"method": "draft_model", "model": "folospec-demo", "num_speculative_tokens": 6}


@pytest.fixture(scope="module")
def llms() -> dict[str, LLM]:
    options: dict[str, Any] = {"dtype": "float64", "num_blocks": 128, "max_model_len": 512}
    return {
        name: LLM("folospec-demo", speculative, strict_drafters=True, **options)
        for name, speculative in (("plain", None), ("draft", DRAFT), ("self", SELF))
    }


def complete(llm: LLM, prompt: str = PROMPT, **params: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, **params}
    return llm.generate(prompt, SamplingParams(**settings), use_tqdm=False)[0].outputs[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_demo_pair_gives_plain_tokens_in_float64(
    temperature: float, llms: dict[str, LLM]
) -> None:
    params: dict[str, Any] = {"temperature": temperature, "seed": 1, "logprobs": 1}
    plain, fast = complete(llms["plain"], **params), complete(llms["draft"], **params)
    assert fast.token_ids == plain.token_ids
    assert fast.text == plain.text
    assert fast.cumulative_logprob == pytest.approx(plain.cumulative_logprob, abs=1e-8)
    assert_speculated(llms["draft"].stats())


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_inside_an_accepted_run_ends_the_output_there(
    include: bool, llms: dict[str, LLM]
) -> None:
    """The target drafts for itself, so that all runs are accepted whole and the stop is inside."""
    whole = complete(llms["plain"]).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop) + (len(stop) if include else 0)]
    for name in ("plain", "self", "draft"):
        result = complete(llms[name], stop=stop, include_stop_str_in_output=include, logprobs=0)
        assert result.text == expected, name
        assert result.finish_reason == "stop"
        assert result.stop_reason == stop
        assert len(result.logprobs) == len(result.token_ids) < 40
        decoded = llms[name].tokenizer.decode(result.token_ids)
        assert stop in decoded
        assert stop not in llms[name].tokenizer.decode(result.token_ids[:-1])


def test_a_stop_token_ends_the_output_and_is_not_in_the_text(llms: dict[str, LLM]) -> None:
    whole = complete(llms["plain"])
    stop_id = whole.token_ids[17]
    first = whole.token_ids.index(stop_id)
    for name in ("plain", "self"):
        result = complete(llms[name], stop_token_ids=[stop_id])
        assert result.token_ids == whole.token_ids[: first + 1]
        assert result.text == llms[name].tokenizer.decode(whole.token_ids[:first])
        assert (result.finish_reason, result.stop_reason) == ("stop", stop_id)


def test_eos_ends_the_output_unless_it_is_ignored_or_too_early(llms: dict[str, LLM]) -> None:
    eos = llms["plain"].tokenizer.eos_token_id
    for name in ("plain", "self"):
        bias = {eos: 100.0}
        assert complete(llms[name], ignore_eos=False, logit_bias=bias).token_ids == [eos]
        assert len(complete(llms[name], logit_bias=bias).token_ids) == 40
        late = complete(llms[name], ignore_eos=False, logit_bias=bias, min_tokens=4)
        assert len(late.token_ids) == 5
        assert late.finish_reason == "stop"
        assert late.stop_reason is None


def test_the_tokens_of_bad_words_are_never_completed(llms: dict[str, LLM]) -> None:
    tokenizer = llms["plain"].tokenizer
    whole = complete(llms["plain"])
    words = {
        word: [tokenizer.encode(word), tokenizer.encode(" " + word)]
        for word in re.findall(r"[a-z]{3,}", whole.text)
    }
    said = [w for w, runs in words.items() if any(has_run(whole.token_ids, run) for run in runs)]
    word, bad = said[0], words[said[0]]
    results = [complete(llms[n], bad_words=[word]).token_ids for n in ("plain", "draft", "self")]
    assert results[0] == results[1] == results[2] != whole.token_ids
    assert not any(has_run(results[0], run) for run in bad)


def has_run(token_ids: list[int], run: list[int]) -> bool:
    """Whether `run` stands somewhere in `token_ids`."""
    return any(token_ids[i : i + len(run)] == run for i in range(len(token_ids)))


def test_the_draft_model_halves_the_targets_passes_on_held_out_code(llms: dict[str, LLM]) -> None:
    """A count, not a time: greedy, on functions of modules that training left out."""
    passes = {"plain": 0, "draft": 0}
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    prompts = [prompt for _, prompt in held_out_prompts()]
    for name in passes:
        for output in llms[name].generate(prompts, params, use_tqdm=False):
            passes[name] += output.metrics.num_target_passes
    assert 2 * passes["draft"] <= passes["plain"]


def test_a_character_is_never_split(llms: dict[str, LLM]) -> None:
    tokenizer = llms["plain"].tokenizer
    text = "naïve — ☃ 雪だるま 🙂 é"
    token_ids = tokenizer.encode(text)
    assert len(token_ids) > len(text)
    follower = Detokenizer(tokenizer, tokenizer.encode("x = "), skip_special_tokens=True)
    texts = [""]
    for token_id in token_ids:
        follower.append(token_id)
        texts.append(follower.text)
    assert texts[-1] == text
    assert all(text.startswith(shown) for shown in texts)
    assert len(set(texts)) < len(texts), "no token ended inside a character"


@pytest.mark.parametrize("seed", range(5))
def test_text_is_the_same_however_seldom_it_is_asked_for(seed: int, llms: dict[str, LLM]) -> None:
    """Half characters, wrong bytes and special tokens among the tokens."""
    tokenizer, rng = llms["plain"].tokenizer, random.Random(seed)
    token_ids = tokenizer.encode("naïve — ☃ 雪だるま 🙂 é")
    for _ in range(12):
        token_ids.insert(rng.randrange(len(token_ids)), rng.choice([*token_ids, *range(300)]))
    always, seldom = (Detokenizer(tokenizer, [5, 6], skip_special_tokens=True) for _ in range(2))
    for token_id in token_ids:
        always.append(token_id)
        seldom.append(token_id)
        shown = always.text
        if rng.random() < 0.2:
            assert seldom.text == shown
    assert seldom.text == always.text


def test_streamed_text_is_the_final_text_and_holds_back_half_a_stop(llms: dict[str, LLM]) -> None:
    whole = complete(llms["plain"]).text
    stop = whole[20:26]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=stop)
    for name in ("plain", "self"):
        streamed = ""
        for delta in llms[name].engine.stream(PROMPT, params):
            streamed += delta.text
            assert whole.startswith(streamed)
        assert streamed == whole[: whole.index(stop)]


def test_chat_uses_the_template(llms: dict[str, LLM]) -> None:
    messages = [{"role": "user", "content": "add two numbers"}]
    params = SamplingParams(temperature=0, max_tokens=4)
    output = llms["plain"].chat(messages, params, use_tqdm=False)[0]
    expected = llms["plain"].tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert llms["plain"].tokenizer.decode(output.prompt_token_ids) == expected
    with pytest.raises(ValueError, match="at least one message"):
        llms["plain"].chat([], params)


def test_text_in_every_form_of_prompt(llms: dict[str, LLM]) -> None:
    token_ids = llms["plain"].tokenizer.encode(PROMPT)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    forms = [PROMPT, token_ids, {"prompt": PROMPT}, {"prompt_token_ids": token_ids}]
    outputs = [llms["plain"].generate(form, params, use_tqdm=False)[0] for form in forms]
    outputs += llms["plain"].generate(forms, params, use_tqdm=False)
    assert len({o.outputs[0].text for o in outputs}) == 1
