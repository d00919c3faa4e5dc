"""Random and odd requests: each is served, or refused with a ValueError, and the engine serves an
innocent request with it and after it, with the tokens it has alone."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_llm, save_tiny_llama
from letter_tokenizer import save_with_tokenizer
from native_builds import require_native

from folospec import LLM, SamplingParams

INNOCENT = [5, 6, 7, 8, 5, 6, 7]
INNOCENT_PARAMS = SamplingParams(temperature=0.9, seed=3, max_tokens=4, ignore_eos=True, n=2)
NUM_SOAK_REQUESTS = int(os.environ.get("FOLOSPEC_SOAK_REQUESTS", "20000"))
ODD_NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 5, 60, 61, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1e-300, 5e-324, 1e-45, 1e300, 3e38, -3e38, 3.5e38, 0.1),
    *(float("nan"), float("inf"), float("-inf"), True, False, None, "1", "", b"1", [], {}, 1j),
    *(np.int64(3), np.float32(0.5), np.float64(0.5), np.array(1), torch.tensor(1.0)),
]
ODD_TEXTS: list[Any] = [
    *(
        "2",
        "2*3",
        "3",
        "2*2*2",
        "<known>",
        "",
        " ",
        "<tool>",
        "\ud83d",
        "a\udc00b",
        "\0",
        "\u2028",
        "~",
        "é",
    ),
    *("\U0001f600", "\ufffd", "2" * 500, 3, None, b"2", ["2"], {"2"}),
]


USUAL: dict[str, list[Any]] = {
    "n": [1, 2, 3],
    "temperature": [0.5, 1.0, 1e-300, 1e300],
    "top_k": [-1, 0, 1, 7, 10**30],
    "top_p": [1.0, 0.5, 5e-324],
    "min_p": [0.0, 0.1, 1.0],
    "repetition_penalty": [1.0, 1.3, 5e-324],
    "presence_penalty": [-2, 0.5],
    "frequency_penalty": [-2, 0.5],
    "min_tokens": [0, 2, 4],
    "logprobs": [0, 2, 61],
    "prompt_logprobs": [0, 2, 61],
    "seed": [0, -1, 10**30],
    "num_speculative_tokens": [0, 1, 3],
    "ignore_eos": [True, False],
    "skip_special_tokens": [True, False],
    "include_stop_str_in_output": [True, False],
    "drafters": [None, [], ["ngram"], ["prediction", "ngram"], ["nobody"]],
}


class Odd:
    """Draws values of every kind, odd ones often."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def number(self) -> Any:
        return self.random.choice(ODD_NUMBERS)

    def text(self) -> Any:
        return self.random.choice(ODD_TEXTS)

    def token_id(self) -> Any:
        if self.random.random() < 0.99:
            return self.random.randrange(61)
        return self.number()

    def token_ids(self) -> Any:
        ids = [self.token_id() for _ in range(self.random.choice([0, 1, 2, 3, 5, 8, 200]))]
        return self.container(ids)

    def texts(self) -> Any:
        return self.container([self.text() for _ in range(self.random.randint(0, 3))])

    def container(self, items: list[Any]) -> Any:
        if self.random.random() < 0.85:
            return items
        kinds: list[Callable[[list[Any]], Any]] = [
            *(tuple, iter, str, np.array, len, lambda i: {str(v): v for v in i}),
            *(lambda i: set(map(str, i)), lambda i: [i], lambda i: bytes(len(i)), lambda i: None),
        ]
        try:
            return self.random.choice(kinds)(items)
        except (TypeError, ValueError, OverflowError):
            return items

    def prompt(self) -> Any:
        drawn = self.random.choice([*[self.token_ids] * 5, self.text, self.number])()
        key = self.random.choice([*[None] * 5, "prompt", "prompt_token_ids", "tokens", 3])
        if key is None:
            return drawn
        other = {"prompt": self.text()} if self.random.random() < 0.3 else {}
        return {**other, key: drawn}

    def settings(self) -> dict[str, Any]:
        """A few fields; one value in four is odd."""
        fields: dict[str, Callable[[], Any]] = {
            **dict.fromkeys(("stop", "bad_words"), self.texts),
            **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "prediction"), self.token_ids),
            "logit_bias": self.logit_bias,
            **{name: lambda values=v: self.usual(values) for name, v in USUAL.items()},
        }
        chosen = self.random.sample(sorted(fields), self.random.choice([0, 1, 2, 3, 4]))
        settings = {"max_tokens": 4, **{name: fields[name]() for name in chosen}}
        if self.random.random() < 0.25:
            settings["logits_processors"] = [self.processor()]
        return settings

    def logit_bias(self) -> dict[Any, Any]:
        keys = [self.token_id() for _ in range(3)]
        return {key: self.usual([0.5, -3.0]) for key in keys if isinstance(key, Hashable)}

    def usual(self, values: list[Any]) -> Any:
        return self.random.choice(values) if self.random.random() < 0.75 else self.number()

    def processor(self) -> Any:
        returned: list[Any] = [
            *(None, 5, torch.zeros(3), torch.full((61,), float("nan")), torch.zeros(61)),
            *(torch.full((61,), -torch.inf), torch.zeros(61, dtype=torch.complex64)),
            *(torch.zeros(61, dtype=torch.int64), torch.zeros(61, requires_grad=True)),
            *(torch.zeros(61).to_sparse(), torch.zeros(61, device="meta"), np.zeros(61)),
        ]
        value = self.random.choice(returned)
        return lambda token_ids, logits: value

    def messages(self) -> Any:
        def message() -> Any:
            one = {"role": self.random.choice(["user", "user", self.text()]), "content": "2*3"}
            if self.random.random() < 0.4:
                one["content"] = self.random.choice(
                    [self.text(), [{"type": "text", "text": self.text()}], self.number()]
                )
            if self.random.random() < 0.2:
                one.pop(self.random.choice(["role", "content"]))
            return self.random.choice([one, one, one, one, self.text()])

        return self.container([message() for _ in range(self.random.randint(0, 3))])


def make_fuzzed(model: str, folder: Path, dtype: str) -> LLM:
    save_with_tokenizer(model, folder)
    drafters = {"drafters": ["prediction", "ngram"]}
    options: dict[str, Any] = {"num_blocks": 40, "block_size": 8, "max_num_seqs": 8}
    options |= {"skip_tokenizer_init": False, "strict_drafters": False}
    return make_llm(str(folder), drafters, dtype=dtype, **options)


@pytest.fixture(scope="module")
def llm(models: Any, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model") / "with_tokenizer"
    return make_fuzzed(models.target, folder, "float64")


@pytest.fixture(scope="module")
def native_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """On the native kernels; its heads are wide enough for them."""
    require_native()
    folder = tmp_path_factory.mktemp("wide")
    model = save_tiny_llama(folder / "model", layers=1, hidden=128, seed=4)
    return make_fuzzed(model, folder / "with_tokenizer", "float32")


def tokens_of(output: Any) -> list[list[int]]:
    return [c.token_ids for c in output.outputs]


def innocent(llm: LLM) -> list[list[int]]:
    return tokens_of(llm.generate([INNOCENT], INNOCENT_PARAMS, use_tqdm=False)[0])


def ask(llm: LLM, odd: Odd, expected: list[list[int]]) -> list[Any]:
    """Ask for something odd, with the innocent request beside it where that can be."""
    way = odd.random.choice(["batch", "batch", "batch", "alone", "chat", "stream", "params"])
    if way == "chat":
        return llm.chat(odd.messages(), SamplingParams(max_tokens=3), use_tqdm=False)
    if way == "params":
        odd_list = odd.container([INNOCENT_PARAMS, odd.number()])
        return llm.generate([INNOCENT, INNOCENT], odd_list, use_tqdm=False)
    params = SamplingParams(**odd.settings())
    if way == "stream":
        return list(llm.engine.stream(odd.prompt(), params))
    if way == "alone":
        return llm.generate(odd.prompt(), params, use_tqdm=False)
    prompts = [odd.prompt(), INNOCENT]
    outputs = llm.generate(prompts, [params, INNOCENT_PARAMS], use_tqdm=False)
    assert tokens_of(outputs[1]) == expected, "the tokens of the other request change"
    return outputs[:1]


def check(llm: LLM, seeds: range) -> tuple[int, int, int]:
    """Return how many requests were refused, ended with an error, and were served."""
    expected = innocent(llm)
    refused = failed = served = 0
    for seed in seeds:
        try:
            found = ask(llm, Odd(seed), expected)
        except ValueError as error:
            refused += 1 if str(error) else pytest.fail(f"seed {seed} is refused without a reason")
        except Exception as error:
            raise AssertionError(f"seed {seed} raises {error!r}") from error
        else:
            failed += any(getattr(output, "error", None) is not None for output in found)
            served += 1
        assert not llm.engine.has_unfinished_requests, f"seed {seed}"
        llm.engine.scheduler.check_integrity()
        if seed % 4 == 3:
            assert innocent(llm) == expected, f"seed {seed} or before changes later tokens"
    assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks
    return refused, failed, served


def test_odd_requests_are_refused_or_served_and_harm_nobody(llm: LLM) -> None:
    refused, failed, served = check(llm, range(200))
    assert refused > 50
    assert failed > 2
    assert served > 30


def test_odd_requests_harm_nobody_on_the_native_kernels(native_llm: LLM) -> None:
    assert native_llm.stats()["lossless"] == "bitwise"
    refused, _, served = check(native_llm, range(100))
    assert refused > 25
    assert served > 15


@pytest.mark.soak
def test_many_odd_requests_are_refused_or_served_and_harm_nobody(llm: LLM) -> None:
    check(llm, range(10**6, 10**6 + NUM_SOAK_REQUESTS))


def test_a_fuzz_of_an_engine_that_does_not_check_finds_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without the check of ranges, some odd request raises something else, or is
    served with an id that the model does not have."""
    monkeypatch.setattr(llm.engine.inputs, "_check_token_ids", lambda what, ids: None)
    monkeypatch.setattr(
        "folospec.requests.input_processor.check_token_ids", lambda params, size: None
    )
    with pytest.raises(AssertionError, match="seed"):
        check(llm, range(200))
