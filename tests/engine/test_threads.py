"""Several threads around one LLM: every call returns its own results, with the tokens it would have
had alone."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import harness
import pytest
from harness import make_llm

from folospec import LLM, SamplingParams
from folospec.engine.exclusive import Exclusive

BACKENDS = {
    "float64": {"dtype": "float64"},
    "native": {"dtype": "float32"},
    "native bfloat16": {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
}
Alone = Callable[[str, int], tuple[list[Any], list[Any]]]
NUM_SOAK_CALLS = int(os.environ.get("FOLOSPEC_SOAK_CALLS", "1000"))


def calls_of(count: int, seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Requests of every kind, each with a seed of its own or greedy."""
    rng, calls = random.Random(seed), []
    for number in range(count):
        prompt = rng.choice(harness.PROMPTS)[: rng.randint(1, 9)]
        greedy = rng.random() < 0.3
        calls.append(
            (
                prompt,
                SamplingParams(
                    temperature=0 if greedy else rng.uniform(0.3, 1.2),
                    n=1 if greedy else rng.randint(1, 2),
                    seed=number,
                    max_tokens=rng.randint(1, 16),
                    ignore_eos=True,
                    top_k=rng.choice([-1, 5]),
                    num_speculative_tokens=rng.choice([None, 0, 2]),
                ),
            )
        )
    return calls


def ask(llm: LLM, call: tuple[list[int], SamplingParams]) -> list[list[int]]:
    outputs = llm.generate([call[0]], call[1], use_tqdm=False)
    assert len(outputs) == 1
    assert outputs[0].prompt_token_ids == call[0]
    return [c.token_ids for c in outputs[0].outputs]


def make(models: Any, backend: str, **options: Any) -> LLM:
    settings = {"method": "draft_model", "model": models.near, "num_speculative_tokens": 3}
    pool: dict[str, Any] = {"num_blocks": 24, "block_size": 8, "max_num_seqs": 6}
    return make_llm(models.target, settings, **{**pool, **BACKENDS[backend], **options})


@pytest.fixture(scope="module")
def alone(models: Any) -> Alone:
    """Calls for a backend, and the answer of each when nothing else runs; asked for once."""
    known: dict[str, tuple[LLM, list[list[list[int]]]]] = {}

    def calls_and_answers(backend: str, count: int) -> tuple[list[Any], list[Any]]:
        if backend not in known:
            known[backend] = make(models, backend), []
        llm, answers = known[backend]
        calls = calls_of(count, seed=5)
        answers += [ask(llm, call) for call in calls[len(answers) :]]
        return calls, answers[:count]

    return calls_and_answers


def assert_free(llm: LLM) -> None:
    assert not llm.engine.has_unfinished_requests
    llm.engine.scheduler.check_integrity()
    assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks


def check_threads(
    models: Any, alone: Alone, backend: str, *, num_calls: int, num_threads: int
) -> None:
    calls, expected = alone(backend, num_calls)
    llm = make(models, backend)
    with ThreadPoolExecutor(num_threads) as pool:
        answers = list(pool.map(lambda call: ask(llm, call), calls))
    assert answers == expected
    assert_free(llm)
    assert llm.stats()["num_accepted_tokens"] > 0


@pytest.mark.parametrize("backend", ["float64", "native"])
def test_calls_from_four_threads_have_the_tokens_they_have_alone(
    backend: str, models: Any, alone: Alone
) -> None:
    check_threads(models, alone, backend, num_calls=24, num_threads=4)


@pytest.mark.soak
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_calls_from_eight_threads_have_the_tokens_they_have_alone(
    backend: str, models: Any, alone: Alone
) -> None:
    check_threads(models, alone, backend, num_calls=NUM_SOAK_CALLS, num_threads=8)


def check_two_engines(models: Any, alone: Alone, *, num_calls: int) -> None:
    calls, expected = alone("native", num_calls)
    llms = [make(models, "native"), make(models, "native")]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda llm: [ask(llm, call) for call in calls], llms))
    assert answers == [expected, expected]


def test_two_engines_in_two_threads_share_no_memory_of_the_kernels(
    models: Any, alone: Alone
) -> None:
    check_two_engines(models, alone, num_calls=12)


@pytest.mark.soak
def test_two_engines_in_two_threads_share_no_memory_for_long(models: Any, alone: Alone) -> None:
    check_two_engines(models, alone, num_calls=NUM_SOAK_CALLS)


@contextmanager
def server_around(llm: LLM) -> Iterator[Callable[[Any], Any]]:
    """A plain threading HTTP server; yields a function that asks it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            params = SamplingParams(**body["params"])
            data = json.dumps(ask(llm, (body["prompt"], params))).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    def post(call: tuple[list[int], SamplingParams]) -> Any:
        prompt, params = call
        names = ("temperature", "n", "seed", "max_tokens", "ignore_eos", "top_k")
        body = {"prompt": prompt, "params": {name: getattr(params, name) for name in names}}
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, json.dumps(body).encode(), timeout=300) as reply:
            return json.loads(reply.read())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield post
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check_server(models: Any, alone: Alone, backend: str, num_calls: int) -> None:
    calls, expected = alone(backend, num_calls)
    llm = make(models, backend)
    with server_around(llm) as post, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(post, calls)) == expected
    assert_free(llm)


def test_a_threading_server_answers_with_the_tokens_of_each_request(
    models: Any, alone: Alone
) -> None:
    check_server(models, alone, "native", 16)


@pytest.mark.soak
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threading_server_answers_for_long(backend: str, models: Any, alone: Alone) -> None:
    check_server(models, alone, backend, NUM_SOAK_CALLS)


def check_asyncio(models: Any, alone: Alone, backend: str, num_calls: int) -> None:
    calls, expected = alone(backend, num_calls)
    llm = make(models, backend)

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(ask, llm, call) for call in calls))

    assert asyncio.run(ask_all()) == expected
    assert_free(llm)


def test_asyncio_threads_have_the_tokens_they_have_alone(models: Any, alone: Alone) -> None:
    check_asyncio(models, alone, "native", 16)


@pytest.mark.soak
@pytest.mark.parametrize("backend", BACKENDS)
def test_asyncio_threads_have_the_tokens_they_have_alone_for_long(
    backend: str, models: Any, alone: Alone
) -> None:
    check_asyncio(models, alone, backend, NUM_SOAK_CALLS)


def test_streams_in_threads_have_the_tokens_they_have_alone(models: Any, alone: Alone) -> None:
    calls, expected = alone("native", 12)
    llm = make(models, "native")

    def stream(call: tuple[list[int], SamplingParams]) -> list[list[int]]:
        seen: list[list[int]] = [[] for _ in range(call[1].n)]
        for delta in llm.engine.stream(*call):
            seen[delta.index] += delta.token_ids
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(stream, calls)) == expected
    assert_free(llm)


def wait_until_one_waits(exclusive: Exclusive) -> None:
    """To be called from inside: return when another thread is next."""
    while exclusive._turn.acquire(blocking=False):
        exclusive._turn.release()
        time.sleep(0.001)


def test_requests_of_two_threads_share_steps(models: Any) -> None:
    """The second call comes during the first step of the first one."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm = make_llm(models.target)
    numbers: list[int] = []
    second = threading.Thread(target=lambda: llm.generate([[4, 5]], params, use_tqdm=False))

    def count(trace: Any) -> None:
        numbers.append(len(trace.sequences))
        if len(numbers) == 1:
            second.start()
            wait_until_one_waits(llm.engine._exclusive)

    llm.engine.on_step = count
    llm.generate([[1, 2, 3]], params, use_tqdm=False)
    second.join()
    assert numbers == [1, *[2] * 39, 1]


def test_outputs_of_requests_added_by_hand_wait_for_step(models: Any) -> None:
    llm = make_llm(models.target)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    expected = ask(llm, ([4, 5], params))
    mine = llm.engine.add_request([4, 5], params)
    others = SamplingParams(max_tokens=9, ignore_eos=True)
    assert len(llm.generate([[1, 2]] * 2, others, use_tqdm=False)) == 2
    assert mine not in llm.engine.requests
    assert llm.engine.has_unfinished_requests
    outputs = llm.engine.step()
    assert [output.request_id for output in outputs] == [mine]
    assert [c.token_ids for c in outputs[0].outputs] == expected
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.step() == []


def test_a_call_whose_request_is_aborted_by_another_thread_returns(models: Any) -> None:
    llm = make_llm(models.target)
    aborted: list[Any] = []

    def abort(trace: Any) -> None:
        if trace.step == 3:
            thread = threading.Thread(
                target=lambda: aborted.append(llm.engine.abort(trace.sequences[0].request_id))
            )
            threads.append(thread)
            thread.start()
            wait_until_one_waits(llm.engine._exclusive)

    threads: list[threading.Thread] = []
    llm.engine.on_step = abort
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    output = llm.generate([[1, 2]], params, use_tqdm=False)[0]
    threads[0].join()
    assert output.outputs[0].finish_reason == "abort"
    assert output.outputs[0].token_ids == aborted[0].outputs[0].token_ids
    assert len(output.outputs[0].token_ids) == 3
    assert_free(llm)


def test_a_thread_that_comes_back_lets_the_one_that_waits_go_first() -> None:
    exclusive, order = Exclusive(), list[str]()

    def other() -> None:
        with exclusive:
            order.append("other")

    with exclusive:
        thread = threading.Thread(target=other)
        thread.start()
        wait_until_one_waits(exclusive)
    with exclusive:
        order.append("first again")
    thread.join()
    assert order == ["other", "first again"]


def test_a_thread_may_enter_again_while_another_waits() -> None:
    exclusive = Exclusive()
    with exclusive:
        thread = threading.Thread(target=exclusive.__enter__)
        thread.start()
        wait_until_one_waits(exclusive)
        with exclusive:
            assert exclusive.depth == 2
        assert exclusive.depth == 1
    thread.join()
    assert exclusive.depth == 0
