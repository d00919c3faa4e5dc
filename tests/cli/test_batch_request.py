"""A line's fields become a request, over the command's options; what is wrong with one is said."""

from __future__ import annotations

import json

import pytest

from folospec.cli.batch_input import InputRecord
from folospec.cli.batch_request import (
    SAMPLING_FIELDS,
    RequestTemplate,
    chat_prompt,
    derived_seed,
    record_id,
)
from folospec.sampling_params import SamplingParams
from folospec.text.chat import render

TEMPLATE = RequestTemplate(sampling={"temperature": 0.5, "max_tokens": 7}, seed=3)
HELLO = {"role": "user", "content": "hello"}
BRIEF = {"role": "system", "content": "be brief"}


def record(value, index=0):
    return InputRecord(index, f"line {index + 1}", "digest", "file", index + 1, value)


def read(value, index=0, **options):
    template = RequestTemplate(sampling=TEMPLATE.sampling, seed=TEMPLATE.seed, **options)
    return template.read(record(value, index))


def test_a_lines_own_fields_stand_above_the_options():
    params = read({"prompt": "a", "temperature": 0.25, "sampling_params": {"top_k": 4}}).params
    assert params == SamplingParams(temperature=0.25, top_k=4, max_tokens=7, seed=3)
    assert read("a").params == SamplingParams(temperature=0.5, max_tokens=7, seed=3)
    assert read({"prompt": "a", "seed": 9}).params.seed == 9
    assert read({"prompt": "a", "max_tokens": None}).params.max_tokens is None


def test_every_sampling_parameter_that_json_can_hold_is_a_field():
    values = {"logit_bias": {"5": 1.5}, "n": 2, "stop": ["x"], "logprobs": 1, "drafters": ["ngram"]}
    params = read({"prompt": "a", **values}).params
    assert params.logit_bias == {5: 1.5}
    assert {"seed", "prediction", "allowed_token_ids"} <= set(SAMPLING_FIELDS)
    assert "logits_processors" not in SAMPLING_FIELDS


@pytest.mark.parametrize("request_id", ["a", 7, None])
def test_the_id_is_kept(request_id):
    assert read({"prompt": "a", "id": request_id}).id == request_id


def test_the_id_of_a_failing_line_is_kept():
    assert record_id(record({"id": "a", "nonsense": 1})) == "a"
    assert record_id(record("text")) is None


def test_prompts_are_texts_token_ids_or_messages():
    assert read("a").prompt == read({"prompt": "a"}).prompt == "a"
    assert read({"prompt_token_ids": [1, 2]}).prompt == read({"prompt": [1, 2]}).prompt == [1, 2]
    request = read({"messages": [HELLO]})
    assert (request.prompt, request.is_chat) == ([HELLO], True)


def test_with_chat_a_prompt_is_a_users_message():
    assert read("hello", chat=True).prompt == [HELLO]
    assert read("hello", chat=True, system="be brief").prompt == [BRIEF, HELLO]
    assert read({"messages": [HELLO]}, chat=True, system="be brief").prompt == [BRIEF, HELLO]
    own = [{"role": "system", "content": "rhyme"}, HELLO]
    assert read({"messages": own}, chat=True, system="be brief").prompt == own


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"prompt": "a", "temprature": 1},
            "'temprature'; did you mean 'temperature'",
        ),
        ({"prompt": "a", "xyz": 1}, "unknown field 'xyz'; known: id, prompt"),
        ({"prompt": "a", "logits_processors": []}, "unknown field 'logits_processors'"),
        ({"prompt": "a", "sampling_params": {"top": 1}}, "unknown field of sampling_params 'top'"),
        ({"prompt": "a", "sampling_params": 1}, "sampling_params must be an object, got 1"),
        ({"prompt": "a", "n": 1, "sampling_params": {"n": 2}}, "n is given twice"),
        ({"prompt": "a", "temperature": -1}, "temperature must be a finite number"),
        ({"prompt": "a", "temperature": 0, "n": 2}, "1 at temperature 0"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "keys of logit_bias must be token ids"),
        ({"prompt": "a", "id": 1.5}, "id must be a text or an integer, got 1.5"),
        ({"prompt": "a", "id": True}, "id must be a text or an integer, got true"),
        ({"prompt": 5}, "prompt must be a text or a list of token ids, got 5"),
        ({"prompt": None}, "prompt must be a text or a list of token ids, got null"),
        ({"prompt_token_ids": "a"}, 'prompt_token_ids must be a list of token ids, got "a"'),
        ({"prompt": "a", "messages": [HELLO]}, "must have one of .*, got prompt and messages"),
        ({"id": "a"}, "must have one of prompt, prompt_token_ids, messages, got none"),
        ({"messages": "hello"}, 'messages must be a list of objects with "role"'),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"content": "x"}]}, "messages must be a list"),
        ([1], r"must be a text or an object with .*, got \[1\]"),
        (None, "must be a text or an object"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(value, words):
    with pytest.raises(ValueError, match=words):
        read(value)


def test_token_ids_are_no_message():
    with pytest.raises(ValueError, match="with --chat a prompt is a text, got token ids"):
        read({"prompt_token_ids": [1]}, chat=True)


def test_a_line_that_could_not_be_read_keeps_its_error():
    broken = InputRecord(0, "line 1", "digest", error="not JSON: x")
    with pytest.raises(ValueError, match="not JSON: x"):
        TEMPLATE.read(broken)


def test_every_prompt_has_a_seed_of_its_own():
    seeds = {read("a", index).params.seed for index in range(1000)}
    assert len(seeds) == 1000
    assert seeds.isdisjoint({derived_seed(4, index) for index in range(1000)})


def test_a_seed_goes_with_the_id_and_not_with_the_place():
    line = {"prompt": "a", "id": "x"}
    assert read(line, 0).params.seed == read(line, 5).params.seed
    assert read(line).params.seed != read({**line, "id": "y"}).params.seed
    assert read({**line, "id": 1}).params.seed != read({**line, "id": "1"}).params.seed
    assert read("a", 5).params.seed != read("a", 6).params.seed


class Tokenizer:
    chat_template = "a template"

    def apply_chat_template(self, messages, *, add_generation_prompt, return_dict, **options):
        assert add_generation_prompt
        assert return_dict
        return {"input_ids": [len(message["content"]) for message in messages]}


class Engine:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def render_chat(self, conversation, **options):
        return render(self.tokenizer, conversation, **options)


def test_names_of_other_engines_are_read_or_refused_with_advice():
    assert read({"prompt": "a", "max_new_tokens": 5}).params.max_tokens == 5
    assert read({"prompt": "a", "sampling_params": {"temp": 0.25}}).params.temperature == 0.25
    with pytest.raises(ValueError, match="there is no field 'do_sample': temperature=0 is greedy"):
        read({"prompt": "a", "do_sample": True})


def test_messages_go_through_the_chat_template():
    assert chat_prompt(Engine(Tokenizer()), [BRIEF, HELLO]) == {"prompt_token_ids": [8, 5]}


def test_messages_that_are_wrong_or_have_no_template_are_refused():
    bare = Tokenizer()
    bare.chat_template = None
    for tokenizer in (None, bare):
        with pytest.raises(ValueError, match="the model has none"):
            chat_prompt(Engine(tokenizer), [HELLO])
    with pytest.raises(ValueError, match=r"messages\[0\] must have 'content'"):
        chat_prompt(Engine(Tokenizer()), json.loads('[{"role": "user"}]'))
