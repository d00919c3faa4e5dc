"""Text that no tokenizer reads, and tokens of it that the model does not have, are refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from harness import MAX_LEN, make_llm
from letter_tokenizer import save_with_tokenizer

from folospec import LLM, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=2)


@pytest.fixture(scope="module")
def llm(models: Any, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model") / "with_tokenizer"
    save_with_tokenizer(models.target, folder)
    return make_llm(str(folder), "prediction", skip_tokenizer_init=False)


def assert_serves(llm: LLM) -> None:
    assert not llm.engine.requests
    llm.engine.scheduler.check_integrity()
    assert len(llm.generate("2*3", PARAMS, use_tqdm=False)[0].outputs[0].token_ids) == 2


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a\ud83d", {}, r"prompt must be valid Unicode, got '\\ud83d' at position 1"),
        ("", {}, "the prompt is empty"),
        ("<tool>", {}, "prompt token ids must be integers between 0 and 60, got 61"),
        ("2", {"bad_words": ["<tool>"]}, "bad word '<tool>': token ids .* got 61"),
        ("2", {"prediction": "<tool>"}, "prediction token ids .* got 61"),
        ("2", {"stop_token_ids": [61]}, "stop_token_ids must be"),
        ("2", {"bad_words": ["~~"]}, "words with tokens, got '~~'"),
    ],
)
def test_a_request_with_such_text_is_refused(
    prompt: str, settings: dict[str, Any], message: str, llm: LLM
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, SamplingParams(max_tokens=2, **settings), use_tqdm=False)
    assert_serves(llm)


def test_only_the_engine_says_that_a_text_is_too_long(
    llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    text = "2" * (MAX_LEN + 1)
    for prompt in (
        lambda: llm.generate(text, use_tqdm=False),
        lambda: llm.chat([{"role": "U", "content": text}], use_tqdm=False),
    ):
        with pytest.raises(ValueError, match="the prompt has 19. tokens; with max_model_len=192"):
            prompt()
    suffix = {"method": "suffix", "preload": [text]}
    make_llm(llm.engine.config.model, suffix, skip_tokenizer_init=False)
    assert caplog.text == ""
    llm.tokenizer(text)
    assert "Token indices sequence length is longer" in caplog.text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of mappings, got 'hello'"),
        ([], "at least one message, got none"),
        ([[]], r"messages\[0\] must hold at least one"),
        (["hello"], r"messages\[0\] must be a mapping"),
        (
            [{"role": "user", "content": "2"}, {"role": "user"}],
            r"messages\[1\] must have 'content'",
        ),
        ([{"content": "2"}], r"messages\[0\] must have a 'role'"),
        ([{"role": 3, "content": "2"}], r"messages\[0\] must have a 'role'"),
        ([{"role": "user", "content": 3}], r"messages\[0\] must have 'content'"),
        ([{"role": "user", "content": b"2"}], r"messages\[0\] must have 'content'"),
        ([{"role": "user", "content": "\ud83d"}], r"messages\[0\]\['content'\] must be valid"),
        ([[{"role": "user", "content": None}]], r"messages\[0\]\[0\] must have 'content'"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"\['content'\]\[0\] must be"),
        ([{"role": "user", "content": "<tool>"}], "prompt token ids .* got 61"),
    ],
)
def test_a_message_that_is_wrong_is_named(messages: Any, message: str, llm: LLM) -> None:
    with pytest.raises(ValueError, match=message):
        llm.chat(messages, PARAMS, use_tqdm=False)
    assert_serves(llm)


def test_what_a_chat_template_refuses_is_a_value_error(llm: LLM) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.tokenizer, "chat_template", "{{ raise_exception('users first') }}")
        with pytest.raises(ValueError, match="users first"):
            llm.chat([{"role": "user", "content": "2"}], PARAMS, use_tqdm=False)


def test_a_template_and_its_options_are_the_callers(llm: LLM) -> None:
    messages = [{"role": "U", "content": "2"}, {"role": "A", "content": "3"}]
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if not loop.last %}*{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}{{ mark or '' }}{{ tools | length }}"
    )
    for options, text in (
        ({"tools": []}, "2*3=0"),
        ({"tools": [], "add_generation_prompt": False}, "2*30"),
        ({"tools": [], "chat_template_kwargs": {"mark": "!"}}, "2*3=!0"),
    ):
        output = llm.chat(messages, PARAMS, False, chat_template=template, **options)[0]
        assert llm.tokenizer.decode(output.prompt_token_ids) == text
    output = llm.chat(
        messages,
        PARAMS,
        False,
        chat_template="{% for m in messages %}{{ m['content'] }};{% endfor %}",
        add_generation_prompt=False,
        continue_final_message=True,
    )[0]
    assert llm.tokenizer.decode(output.prompt_token_ids) == "2;3"
    with pytest.raises(ValueError, match="the chat template refuses"):
        llm.chat(messages, PARAMS, False, continue_final_message=True)
    for wrong in (5, {3: 4}, {"tokenize": False}):
        with pytest.raises(ValueError, match="chat_template_kwargs must be"):
            llm.chat(messages, PARAMS, False, chat_template_kwargs=wrong)


def test_parts_of_a_message_are_read_as_one_text(llm: LLM) -> None:
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "*3"}]
    outputs = llm.chat(
        [[{"role": "U", "content": parts}], [{"role": "U", "content": "2*3"}]], PARAMS, False
    )
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_whatever_a_tokenizer_raises_is_a_value_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(text: str, **options: Any) -> Any:
        raise TypeError("no such text")

    monkeypatch.setattr(llm.engine.inputs, "tokenizer", fail)
    with pytest.raises(ValueError, match="cannot read prompt '2': no such text"):
        llm.generate("2", PARAMS, use_tqdm=False)


def test_a_tokenizer_that_makes_numbers_of_another_kind_is_checked(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(text: str, **options: Any) -> Any:
        return {"input_ids": [1.0]}

    monkeypatch.setattr(llm.engine.inputs, "tokenizer", odd)
    with pytest.raises(ValueError, match="must be integers"):
        llm.generate("2", PARAMS, use_tqdm=False)


def test_many_bad_words_are_compared_by_their_hash(llm: LLM) -> None:
    """A word is looked up among those before it, not compared with each of them."""
    comparisons = []

    class Counted(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            comparisons.append(other)
            return int(self) == other

    inputs = llm.engine.inputs
    count = 2000
    ids = iter(range(10**6))

    def tokenizer(text: str, **options: Any) -> Any:
        place = next(ids)
        return {"input_ids": [Counted(place % 60), Counted(place // 60 % 60), 1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "tokenizer", tokenizer)
        found = inputs._bad_words([str(number) for number in range(count)])
    assert len(found) == min(2 * count, 3600)
    assert len(comparisons) < 10 * count


def test_the_model_of_these_tests_has_no_row_for_the_second_word(llm: LLM) -> None:
    """The control: the first word is served, and banned."""
    known = SimpleNamespace(word="<known>", token_id=60)
    assert llm.tokenizer(known.word)["input_ids"] == [known.token_id]
    params = SamplingParams(
        max_tokens=1, allowed_token_ids=[known.token_id, 5], bad_words=[known.word]
    )
    assert llm.generate("2", params, use_tqdm=False)[0].outputs[0].token_ids == [5]
