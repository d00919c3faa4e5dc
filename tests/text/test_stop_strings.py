"""Stops and streams: at which token an output ends, and what is sent of it before."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_detokenizer import random_ids
from tokenizers_for_text import all_kinds, byte_level

from folospec import SamplingParams
from folospec.core.sequence import SequenceGroup
from folospec.requests.inbox import Stream
from folospec.requests.output_processor import GroupOutput, OutputProcessor, SequenceOutput
from folospec.sampling.metadata import SamplingMetadata
from folospec.text.detokenizer import Detokenizer
from folospec.text.stop_strings import StopSearch, StopStrings

KINDS = {
    kind: tokenizer
    for kind, tokenizer in all_kinds().items()
    if kind in ("byte_level", "byte_fallback", "metaspace", "suffixed", "opaque")
}


class OneRequest:
    """A request of one sequence, in an output processor of its own."""

    def __init__(
        self,
        tokenizer: Any,
        prompt: list[int],
        max_tokens: int,
        special_stops: dict[int, str] | None = None,
        **params: Any,
    ) -> None:
        wanted = SamplingParams(max_tokens=max_tokens, **params)
        self.group = SequenceGroup(
            "r",
            prompt,
            wanted,
            arrival=0,
            max_num_tokens=len(prompt) + max_tokens,
            sampling=SamplingMetadata(wanted, (), frozenset(wanted.stop_token_ids)),
        )
        detokenizer = None
        if tokenizer is not None:
            detokenizer = Detokenizer(tokenizer, prompt, wanted.skip_special_tokens)
        self.output = SequenceOutput(detokenizer)
        if wanted.stop_strings:
            self.output.search = StopSearch(StopStrings(wanted.stop_strings))
        self.outputs = OutputProcessor()
        own = GroupOutput({"r-0": self.output}, special_stops=special_stops or {})
        self.outputs.add(self.group, own)

    def append(self, token_id: int) -> bool:
        return self.outputs.append_token(self.group.sequences[0], token_id)

    def completion(self) -> Any:
        return self.outputs.make_output(self.group).outputs[0]

    def stream_to(self, stream: Stream) -> None:
        stream.take(self.outputs.completions(self.group))


def feed(request: OneRequest, token_ids: list[int], after_token: Any = lambda: None) -> int:
    """Add tokens until the output ends; return how many."""
    for count, token_id in enumerate(token_ids, start=1):
        ended = request.append(token_id)
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
        request = OneRequest(tokenizer, prompt, len(output), stop=stops, min_tokens=min_tokens)
        stream, often = Stream(), rng.choice([0.2, 1.0])
        count = feed(
            request,
            output,
            lambda s=stream, r=request, o=often: rng.random() < o and r.stream_to(s),
        )
        request.stream_to(stream)
        completion = request.completion()
        assert (count, completion.text, completion.stop_reason) == expected, (output, stops)
        assert "".join(delta.text for delta in stream.arrived) == completion.text
        streamed = [t for delta in stream.arrived for t in delta.token_ids]
        assert streamed == completion.token_ids
        num_stopped += completion.stop_reason is not None
    assert 10 < num_stopped < 60


@pytest.mark.parametrize("kind", KINDS)
def test_the_increments_of_a_stream_add_up_to_the_text(kind: str) -> None:
    tokenizer, rng = KINDS[kind], random.Random(kind)
    for _ in range(40):
        output = random_ids(rng, tokenizer, 30)
        request, stream = OneRequest(tokenizer, output[:1], len(output)), Stream()
        feed(request, output, lambda s=stream, r=request: r.stream_to(s))
        text = request.completion().text
        assert "".join(delta.text for delta in stream.arrived) == text
        assert stream.arrived[-1].finish_reason == "length"


def test_the_text_of_an_ended_output_is_that_of_the_tokenizer() -> None:
    tokenizer = byte_level()
    output = [tokenizer.convert_tokens_to_ids("a"), 0xE9 - 0x21]
    request = OneRequest(tokenizer, output[:1], len(output))
    feed(request, output)
    assert request.completion().text == tokenizer.decode(output) == "a\ufffd"


def test_the_beginning_of_a_stop_string_is_held_until_it_cannot_be_one() -> None:
    tokenizer = byte_level()
    request = OneRequest(tokenizer, [5], 9, stop=["abc", "bd"])
    output, shown = request.output, []
    for char in "xabab!":
        request.append(tokenizer.convert_tokens_to_ids(char))
        shown.append(output.new_text(0))
    assert shown == ["x", "x", "x", "xab", "xab", "xabab!"]


def test_a_stop_that_came_too_early_is_not_held() -> None:
    tokenizer = byte_level()
    request = OneRequest(tokenizer, [5], 9, stop=["ab"], min_tokens=5)
    for char in "ab":
        request.append(tokenizer.convert_tokens_to_ids(char))
    assert request.output.new_text(0) == "ab"


def test_of_several_stops_the_first_then_the_shortest_counts() -> None:
    """All end in the text of one token."""
    tokenizer = byte_level()
    token_id = tokenizer.convert_tokens_to_ids("<added> 雪")
    for stops, text, stop in (
        (["雪", "added", "adde"], "<", "adde"),
        (["> 雪", "d> "], "<adde", "d> "),
        (["雪", " 雪"], "<added>", " 雪"),
    ):
        request = OneRequest(tokenizer, [5], 9, stop=stops)
        assert request.append(token_id)
        completion = request.completion()
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
    request = OneRequest(
        tokenizer,
        [5],
        9,
        stop=["<|end|>"],
        include_stop_str_in_output=include,
        special_stops={END: "<|end|>"},
    )
    assert feed(request, [*tokenizer.convert_tokens_to_ids(["a", "Ã"]), END]) == 3
    completion = request.completion()
    assert (completion.text, completion.stop_reason) == (text, "<|end|>")
    assert (completion.finish_reason, completion.token_ids[-1]) == ("stop", END)


def test_a_special_token_stops_no_sooner_than_min_tokens() -> None:
    request = OneRequest(
        byte_level(), [5], 9, stop=["<|end|>"], min_tokens=2, special_stops={END: "<|end|>"}
    )
    assert feed(request, [END, END]) == 2
