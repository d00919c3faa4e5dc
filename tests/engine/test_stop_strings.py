"""Stops and streams: at which token an output ends, and what is sent of it before."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_detokenizer import random_ids
from tokenizers_for_text import all_kinds, byte_level

from folospec import SamplingParams
from folospec.core.sequence import SequenceGroup
from folospec.engine.detokenizer import Detokenizer
from folospec.engine.output_processor import Stream, append_token, make_output
from folospec.engine.request import Request, SequenceOutput
from folospec.engine.stop_strings import StopSearch, StopStrings

KINDS = {
    kind: tokenizer
    for kind, tokenizer in all_kinds().items()
    if kind in ("byte_level", "byte_fallback", "metaspace", "suffixed", "opaque")
}


def make_request(tokenizer: Any, prompt: list[int], max_tokens: int, **params: Any) -> Request:
    special_stops = params.pop("special_stops", {})
    group = SequenceGroup("r", prompt, SamplingParams(max_tokens=max_tokens, **params), arrival=0)
    skips = group.params.skip_special_tokens
    detokenizer = Detokenizer(tokenizer, prompt, skips) if tokenizer is not None else None
    return Request(
        group=group,
        seed=0,
        max_num_tokens=len(prompt) + max_tokens,
        eos_token_ids=frozenset(),
        bad_words_token_ids=[],
        outputs={group.sequences[0].seq_id: SequenceOutput(detokenizer)},
        special_stops=special_stops,
    )


def feed(request: Request, token_ids: list[int], after_token: Any = lambda: None) -> int:
    """Add tokens until the output ends; return how many."""
    for count, token_id in enumerate(token_ids, start=1):
        ended = append_token(request, request.group.sequences[0], token_id)
        after_token()
        if ended:
            return count
    raise AssertionError("the output did not end")


def expected_stop(
    tokenizer: Any, prompt: list[int], output: list[int], stops: list[str], min_tokens: int
) -> tuple[int, str, str | None]:
    """Number of tokens, text and stop string, from the texts after each token, found anew."""
    before, num_settled = "", 0
    for count in range(1, len(output) + 1):
        detokenizer = Detokenizer(tokenizer, prompt, True)
        for token_id in output[:count]:
            detokenizer.append(token_id)
        text = detokenizer.text
        seen = len(before) if text.startswith(before) else num_settled
        found = [
            (begin, len(stop), stop)
            for stop in stops
            for begin in range(len(text))
            if text.startswith(stop, begin) and begin + len(stop) > seen
        ]
        if found and count >= min_tokens:
            return count, text[: min(found)[0]], min(found)[2]
        before, num_settled = text, detokenizer.num_settled
    detokenizer.finish()
    return len(output), detokenizer.text, None


def random_stops(rng: random.Random, tokenizer: Any, prompt: list[int], output: list[int]) -> Any:
    """Parts of the texts that the output has while it runs, and strings that it has not."""
    detokenizer, texts = Detokenizer(tokenizer, prompt, True), []
    for token_id in output:
        detokenizer.append(token_id)
        texts.append(detokenizer.text)
    stops = []
    for text in rng.choices(texts, k=2):
        begin = rng.randrange(max(1, len(text)))
        stops.append(text[begin : begin + rng.randint(1, 4)] + rng.choice(["", "", "?"]))
    return [stop for stop in stops if stop]


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_ends_at_the_token_that_completes_a_stop(kind: str) -> None:
    """And what was streamed by then, however seldom, adds up to its text."""
    tokenizer, rng = KINDS[kind], random.Random(kind)
    num_stopped = 0
    for _ in range(60):
        prompt = [tokenizer.convert_tokens_to_ids("a")]
        output = random_ids(rng, tokenizer, 24)
        stops = random_stops(rng, tokenizer, prompt, output)
        min_tokens = rng.choice([0, 0, 8])
        expected = expected_stop(tokenizer, prompt, output, stops, min_tokens)
        request = make_request(tokenizer, prompt, len(output), stop=stops, min_tokens=min_tokens)
        stream, often = Stream(), rng.choice([0.2, 1.0])
        count = feed(
            request, output, lambda s=stream, r=request, o=often: rng.random() < o and s.take(r)
        )
        stream.take(request)
        completion = make_output(request).outputs[0]
        assert (count, completion.text, completion.stop_reason) == expected, (output, stops)
        assert "".join(increment.text for increment in stream.arrived) == completion.text
        streamed = [t for increment in stream.arrived for t in increment.token_ids]
        assert streamed == completion.token_ids
        num_stopped += completion.stop_reason is not None
    assert 10 < num_stopped < 60


@pytest.mark.parametrize("kind", KINDS)
def test_the_increments_of_a_stream_add_up_to_the_text(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    for _ in range(40):
        output = random_ids(rng, tokenizer, 30)
        request, stream = make_request(tokenizer, output[:1], len(output)), Stream()
        feed(request, output, lambda s=stream, r=request: s.take(r))
        text = make_output(request).outputs[0].text
        assert "".join(increment.text for increment in stream.arrived) == text
        assert stream.arrived[-1].finish_reason == "length"


def test_the_text_of_an_ended_output_is_that_of_the_tokenizer() -> None:
    tokenizer = byte_level()
    output = [tokenizer.convert_tokens_to_ids("a"), 0xE9 - 0x21]
    request = make_request(tokenizer, output[:1], len(output))
    feed(request, output)
    assert make_output(request).outputs[0].text == tokenizer.decode(output) == "a\ufffd"


def test_the_beginning_of_a_stop_string_is_held_until_it_cannot_be_one() -> None:
    tokenizer = byte_level()
    request = make_request(tokenizer, [5], 9, stop=["abc", "bd"])
    output, shown = request.outputs["r-0"], []
    for char in "xabab!":
        append_token(request, request.group.sequences[0], tokenizer.convert_tokens_to_ids(char))
        shown.append(output.new_text(0))
    assert shown == ["x", "x", "x", "xab", "xab", "xabab!"]


def test_a_stop_that_came_too_early_is_not_held() -> None:
    tokenizer = byte_level()
    request = make_request(tokenizer, [5], 9, stop=["ab"], min_tokens=5)
    for char in "ab":
        append_token(request, request.group.sequences[0], tokenizer.convert_tokens_to_ids(char))
    assert request.outputs["r-0"].new_text(0) == "ab"


def test_of_several_stops_the_first_then_the_shortest_counts() -> None:
    """All end in the text of one token."""
    tokenizer = byte_level()
    token_id = tokenizer.convert_tokens_to_ids("<added> 雪")
    for stops, text, stop in (
        (["雪", "added", "adde"], "<", "adde"),
        (["> 雪", "d> "], "<adde", "d> "),
        (["雪", " 雪"], "<added>", " 雪"),
    ):
        request = make_request(tokenizer, [5], 9, stop=stops)
        assert append_token(request, request.group.sequences[0], token_id)
        completion = make_output(request).outputs[0]
        assert (completion.text, completion.stop_reason) == (text, stop)


def test_the_search_reads_each_character_once_whatever_the_number_of_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_steps = 0
    step = StopStrings.step

    def counted(self: StopStrings, state: int, char: str) -> int:
        nonlocal num_steps
        num_steps += 1
        return step(self, state, char)

    tokenizer = byte_level()
    token_ids = [tokenizer.convert_tokens_to_ids(char) for char in "a" * 300]
    for num_stops in (1, 200):
        stops = StopStrings(["a" * length + "b" for length in range(1, num_stops + 1)])
        monkeypatch.setattr(StopStrings, "step", counted)
        num_steps = 0
        search, detokenizer = StopSearch(stops), Detokenizer(tokenizer, [5], True)
        for token_id in token_ids:
            detokenizer.append(token_id)
            assert search.advance(detokenizer) is None
        assert num_steps == len(token_ids)
        monkeypatch.undo()


END = byte_level().convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize(
    ("include", "text"), [(False, "a\ufffd"), (True, "a\ufffd<|end|>")], ids=["without", "with"]
)
def test_a_stop_that_is_a_special_token_ends_the_output(include: bool, text: str) -> None:
    tokenizer = byte_level()
    request = make_request(
        tokenizer,
        [5],
        9,
        stop=["<|end|>"],
        include_stop_str_in_output=include,
        special_stops={END: "<|end|>"},
    )
    assert feed(request, [*tokenizer.convert_tokens_to_ids(["a", "Ã"]), END]) == 3
    completion = make_output(request).outputs[0]
    assert (completion.text, completion.stop_reason) == (text, "<|end|>")
    assert (completion.finish_reason, completion.token_ids[-1]) == ("stop", END)


def test_a_special_token_stops_no_sooner_than_min_tokens() -> None:
    request = make_request(
        byte_level(), [5], 9, stop=["<|end|>"], min_tokens=2, special_stops={END: "<|end|>"}
    )
    assert feed(request, [END, END]) == 2
