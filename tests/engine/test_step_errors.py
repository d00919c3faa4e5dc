"""An error at any stage of a step ends the request that caused it, or breaks the engine, which says
so; it never comes back step after step, and never changes the tokens of others."""

from __future__ import annotations

import _signal
import signal
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from harness import Run, as_prompts, make_llm

from folospec import LLM, EngineBrokenError, RequestError, SamplingParams
from folospec.core.sequence import Sequence, SequenceGroup
from folospec.requests.logprobs import LogprobsProcessor
from folospec.spec import verifier
from folospec.spec.verify_batch import verify_batch

PROMPTS = harness.PROMPTS[:4]
CULPRIT = "request-1"
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}


def params_of_four() -> list[SamplingParams]:
    common: dict[str, Any] = {"max_tokens": 10, "ignore_eos": True, "temperature": 0.9}
    return [
        SamplingParams(seed=1, **common),
        SamplingParams(seed=2, n=2, logprobs=1, prompt_logprobs=1, **common),
        SamplingParams(seed=3, n=2, logprobs=1, **common),
        SamplingParams(seed=4, **common),
    ]


@pytest.fixture(scope="module")
def alone(models: Any) -> list[list[list[int]]]:
    llm = make_llm(models.target)
    prompts = zip(as_prompts(PROMPTS), params_of_four(), strict=True)
    outputs = [llm.generate(p, q, use_tqdm=False)[0] for p, q in prompts]
    return [[c.token_ids for c in output.outputs] for output in outputs]


def make(models: Any, **options: Any) -> LLM:
    settings = {**DRAFT, "model": models.near}
    return make_llm(models.target, settings, **{"strict_drafters": False, **options})


def generate(llm: LLM, params: list[SamplingParams] | None = None, **options: Any) -> list[Any]:
    prompts = as_prompts(PROMPTS)
    return llm.generate(prompts, params or params_of_four(), use_tqdm=False, **options)


def assert_free(llm: LLM) -> None:
    assert not llm.engine.requests
    llm.engine.scheduler.check_integrity()
    assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks


class Fault:
    """Wraps a function that gets a request, or a sequence of one, as its first argument, and raises
    at the third call for the culprit."""

    def __init__(self, function: Callable[..., Any], error: BaseException) -> None:
        self.function, self.error, self.calls = function, error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seen = next(a for a in args if isinstance(a, (SequenceGroup, Sequence)))
        group = seen if isinstance(seen, SequenceGroup) else seen.group
        assert group is not None
        if group.request_id == CULPRIT:
            self.calls += 1
            if self.calls == 3:
                raise self.error
        return self.function(*args, **kwargs)


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> Fault:
    fault = Fault(getattr(owner, name), error)
    patch.setattr(owner, name, lambda *args, **kwargs: fault(*args, **kwargs))
    return fault


STAGES_OF_A_REQUEST: dict[str, Callable[[pytest.MonkeyPatch, LLM, BaseException], Fault]] = {
    "detokenize and stop": lambda patch, llm, error: wrap(
        patch, llm.engine.outputs, "append_token", error
    ),
    "logprobs": lambda patch, llm, error: wrap(patch, llm.engine.logprobs, "take_output", error),
    "commit": lambda patch, llm, error: wrap(patch, llm.engine.manager, "rollback", error),
    "output": lambda patch, llm, error: wrap(patch, llm.engine.outputs, "make_output", error),
}


@pytest.mark.parametrize("stage", STAGES_OF_A_REQUEST)
def test_an_error_that_one_request_causes_ends_it_alone(
    stage: str, models: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(models)
    fault = STAGES_OF_A_REQUEST[stage](monkeypatch, llm, OSError("no such table"))
    ids = [
        llm.engine.add_request(p, q)
        for p, q in zip(as_prompts(PROMPTS), params_of_four(), strict=True)
    ]
    done = {}
    while llm.engine.has_unfinished_requests:
        for output in llm.engine.step():
            if output.finished:
                done[output.request_id] = output
        llm.engine.scheduler.check_integrity()
    assert fault.calls >= 3
    failed = done.pop(CULPRIT)
    assert failed.error == "OSError: no such table"
    assert [c.finish_reason for c in failed.outputs] == ["error", "error"]
    assert [c.error for c in failed.outputs] == [failed.error] * 2
    for request_id, output in done.items():
        assert output.error is None
        assert [c.token_ids for c in output.outputs] == alone[ids.index(request_id)]
        assert {c.finish_reason for c in output.outputs} == {"length"}
    assert_free(llm)
    again = generate(llm)
    assert [[c.token_ids for c in output.outputs] for output in again] == alone


def test_prompt_logprobs_that_fail_end_their_request(
    models: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: LogprobsProcessor, *args: Any) -> None:
        raise OSError("no such table")

    monkeypatch.setattr(LogprobsProcessor, "take_prompt", fail)
    llm = make(models)
    outputs = generate(llm)
    assert [output.error for output in outputs] == [None, "OSError: no such table", None, None]
    assert [[c.token_ids for c in o.outputs] for o in outputs[2:]] == alone[2:]
    assert_free(llm)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_a_request_that_cannot_be_verified_ends_alone(
    mode: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a step are verified in one call, so the culprit is looked for."""
    expected = generate(make(models, logprobs_mode=mode))

    def wrong(steps: list[Any], *args: Any, **kwargs: Any) -> Any:
        if any(step.group.request_id == CULPRIT for step in steps):
            raise ArithmeticError("no such row")
        return verify_batch(steps, *args, **kwargs)

    monkeypatch.setattr(verifier, "verify_batch", wrong)
    llm = make(models, logprobs_mode=mode)
    outputs = generate(llm)
    assert [o.error for o in outputs] == [None, "ArithmeticError: no such row", None, None]
    for output, other in zip(outputs[2:], expected[2:], strict=True):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in other.outputs]
    others = Run(expected[2:], {}).logprobs
    assert Run(outputs[2:], {}).logprobs == pytest.approx(others, abs=1e-9)
    assert_free(llm)


def test_what_a_logits_processor_raises_ends_its_request(models: Any, alone: Any) -> None:
    def fail(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("state")

    params = params_of_four()
    params[1] = SamplingParams(logits_processors=[fail])
    llm = make(models)
    outputs = generate(llm, params)
    assert outputs[1].error == "logits_processors[0] failed: KeyError('state')"
    for place in (0, 2, 3):
        assert [c.token_ids for c in outputs[place].outputs] == alone[place]
    assert_free(llm)


STAGES_OF_THE_ENGINE: dict[str, Callable[[LLM], tuple[Any, str]]] = {
    "plan": lambda llm: (llm.engine.proposer, "plan"),
    "schedule": lambda llm: (llm.engine.scheduler, "schedule"),
    "propose": lambda llm: (llm.engine.proposer, "propose"),
    "forward": lambda llm: (llm.engine.components.target, "forward"),
    "verify": lambda llm: (llm.engine.verifier, "verify"),
    "copy and move KV": lambda llm: (llm.engine.worker, "apply"),
    "commit": lambda llm: (llm.engine.committer, "commit"),
    "deliver": lambda llm: (llm.engine.open, "deliver"),
    "observe": lambda llm: (llm.engine.proposer, "observe"),
    "record": lambda llm: (llm.engine.proposer, "record_step"),
}


def break_at(patch: pytest.MonkeyPatch, llm: LLM, stage: str, error: BaseException) -> None:
    """Raise in the third step, once; `apply` is called twice in each."""
    owner, name = STAGES_OF_THE_ENGINE[stage](llm)
    function, calls = getattr(owner, name), []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == (6 if name == "apply" else 3):
            raise error
        return function(*args, **kwargs)

    patch.setattr(owner, name, fail)


@pytest.mark.parametrize("stage", STAGES_OF_THE_ENGINE)
def test_an_error_without_a_culprit_breaks_the_engine_and_is_told(
    stage: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(models)
    first = OSError("no such device")
    break_at(monkeypatch, llm, stage, first)
    hand = llm.engine.add_request([1, 2], SamplingParams(max_tokens=50, ignore_eos=True))
    with pytest.raises(EngineBrokenError, match="OSError: no such device") as caught:
        generate(llm)
    assert caught.value.__cause__ is first
    for call in (
        llm.engine.step,
        lambda: generate(llm),
        lambda: llm.engine.add_request([1]),
        lambda: next(llm.engine.stream([1])),
    ):
        with pytest.raises(EngineBrokenError, match="OSError: no such device") as caught:
            call()
        assert caught.value.__cause__ is first
    assert llm.stats()["num_steps"] >= 2
    aborted = llm.engine.abort(hand)
    assert aborted is not None
    assert aborted.finished
    assert [c.finish_reason for c in aborted.outputs] == ["abort"]
    assert not llm.engine.has_unfinished_requests


@pytest.mark.parametrize("stage", ["schedule", "forward", "copy and move KV"])
def test_a_keyboard_interrupt_raised_in_a_step_breaks_the_engine(
    stage: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can have left anything half done; a Ctrl-C comes after the step instead, see below."""
    llm = make(models)
    break_at(monkeypatch, llm, stage, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        generate(llm)
    with pytest.raises(EngineBrokenError, match="KeyboardInterrupt"):
        generate(llm)


@pytest.mark.parametrize("stage", STAGES_OF_THE_ENGINE)
def test_ctrl_c_in_a_step_leaves_a_usable_engine(
    stage: str, models: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(models)
    hand = llm.engine.add_request(as_prompts(PROMPTS)[0], params_of_four()[0])
    owner, name = STAGES_OF_THE_ENGINE[stage](llm)
    function, calls = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(llm)
    assert list(llm.engine.requests) == [hand]
    llm.engine.scheduler.check_integrity()
    outputs = generate(llm)
    assert [[c.token_ids for c in output.outputs] for output in outputs] == alone
    found = [o for o in llm.engine.step(finished_only=True) if o.finished]
    while llm.engine.has_unfinished_requests:
        found += llm.engine.step(finished_only=True)
    assert [o.outputs[0].token_ids for o in found] == [alone[0][0]]
    assert_free(llm)


def test_a_second_ctrl_c_does_not_wait(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make(models)

    def stuck(*args: Any, **kwargs: Any) -> Any:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one raises")

    monkeypatch.setattr(llm.engine.components.target, "forward", stuck)
    with pytest.raises(KeyboardInterrupt):
        generate(llm)
    with pytest.raises(EngineBrokenError, match="KeyboardInterrupt"):
        generate(llm)


def test_a_step_gives_the_handler_of_ctrl_c_back(models: Any) -> None:
    before = signal.getsignal(signal.SIGINT)
    generate(make(models))
    assert signal.getsignal(signal.SIGINT) is before


def test_generate_changes_the_handler_of_ctrl_c_once_for_all_its_steps(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, change, changes = make(models), _signal.signal, []

    def count(*args: Any) -> Any:
        changes.append(args)
        return change(*args)

    monkeypatch.setattr(_signal, "signal", count)
    generate(llm)
    assert llm.stats()["num_steps"] > 5
    assert len(changes) == 4  # for this call, and for stats


def test_a_step_by_hand_does_without_the_slow_functions_of_signal(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(models).engine
    engine.add_request([1, 2], SamplingParams(max_tokens=2, ignore_eos=True))
    changes: list[Any] = []
    fast = _signal.signal
    monkeypatch.setattr(_signal, "signal", lambda *args: changes.append(args) or fast(*args))
    for name in ("signal", "getsignal"):
        monkeypatch.setattr(signal, name, lambda *args: pytest.fail("slow"))
    engine.step()
    assert len(changes) == 2  # the engine's handler, and the one from before


def test_outputs_that_wait_come_before_the_news_that_the_engine_is_broken(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(models).engine
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=1), request_id="short")
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=9), request_id="long")

    def fail(*args: Any) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(engine.proposer, "observe", fail)
    with pytest.raises(EngineBrokenError):
        engine.step(finished_only=True)
    assert [output.request_id for output in engine.step()] == ["short"]
    with pytest.raises(EngineBrokenError):
        engine.step()


def test_a_strict_drafter_ends_the_step_and_breaks_nothing(
    models: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(models, strict_drafters=True)
    for stage in ("propose", "observe"):
        with monkeypatch.context() as patch:
            break_at(patch, llm, stage, OSError("no such draft"))
            with pytest.raises(OSError, match="no such draft"):
                generate(llm)
        assert_free(llm)
        outputs = generate(llm)
        assert [[c.token_ids for c in output.outputs] for output in outputs] == alone


def test_a_listener_that_fails_breaks_nothing(models: Any, alone: Any) -> None:
    llm = make(models)

    def fail(trace: Any) -> None:
        raise OSError("no such screen")

    llm.engine.on_step = fail
    with pytest.raises(OSError, match="no such screen"):
        generate(llm)
    llm.engine.on_step = None
    assert_free(llm)
    outputs = generate(llm)
    assert [[c.token_ids for c in output.outputs] for output in outputs] == alone


def test_a_step_that_cannot_be_traced_goes_on(
    models: Any, alone: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    llm = make(models, trace=tmp_path / "trace.jsonl")

    def fail(token_id: int) -> str:
        raise OSError("no such token")

    monkeypatch.setattr(llm.engine.tracer, "_text", fail)
    outputs = generate(llm)
    assert [[c.token_ids for c in output.outputs] for output in outputs] == alone


def test_generate_raises_the_error_of_a_request_if_asked(models: Any, alone: Any) -> None:
    def fail(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(token_ids) == 2:
            raise KeyError("state")
        return logits

    params = params_of_four()
    params[1] = SamplingParams(logits_processors=[fail])
    llm = make(models)
    with pytest.raises(RequestError, match=r"prompts\[1\] failed: .*KeyError") as caught:
        generate(llm, params, raise_on_error=True)
    assert len(caught.value.output.outputs[0].token_ids) == 2
    assert_free(llm)
    outputs = generate(llm, raise_on_error=True)
    assert [[c.token_ids for c in output.outputs] for output in outputs] == alone


def test_a_step_cannot_be_entered_from_inside(models: Any) -> None:
    llm = make(models)

    def nested(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        llm.engine.step()
        return logits

    def aborting(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        llm.engine.abort("request-0")
        return logits

    for processor, message in ((nested, "step cannot be"), (aborting, "abort cannot be")):
        params = SamplingParams(logits_processors=[processor], temperature=0)
        output = llm.generate([[1, 2]], params, use_tqdm=False)[0]
        assert message in (output.error or "")
    assert_free(llm)


def test_a_stream_that_the_garbage_collector_closes_in_a_step_ends_after_it(models: Any) -> None:
    llm = make(models)
    streams = [llm.engine.stream([1, 2], SamplingParams(max_tokens=50, ignore_eos=True))]
    next(streams[0])

    def forget(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        streams.clear()
        return logits

    params = SamplingParams(logits_processors=[forget], temperature=0)
    assert llm.generate([[1, 2]], params, use_tqdm=False)[0].error is None
    assert not streams
    assert_free(llm)
