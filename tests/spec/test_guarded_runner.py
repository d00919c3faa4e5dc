"""A drafter's runner refuses every wrong argument before it runs anything."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hostile_passes import BEFORE_THE_ROOT, FAIR_PASSES, WRONG_PASSES, rows

from folospec.models.forward import Rows
from folospec.spec.guarded_runner import GuardedRunner, RunnerAccess, SlotRange
from folospec.spec.read_only import ReadOnlyList

VOCAB_SIZE, MAX_MODEL_LEN, ROOT, NUM_SLOTS = 9, 32, 9, 6
REQUEST = SimpleNamespace(token_ids=[1] * (ROOT + 1), num_slots=NUM_SLOTS, block_table=(3, 1, 4, 2))
OTHER = SimpleNamespace(token_ids=[1] * 5, num_slots=2, block_table=(7, 8))


class Recorder:
    """A `DraftRunner`, and its chains, that only notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.draw_chains = self._note
        self.warm_up_chains = self._note
        self.keep = self._note
        self.begun: list[Any] = []

    def _note(self, *args: Any) -> None:
        self.calls.append(args)

    def forward(self, *args: Any) -> Any:
        self._note(*args)
        return torch.zeros(1, VOCAB_SIZE)

    def chains(self, *args: Any) -> Any:
        self.begun.append(args)
        return self


class Guarded:
    def __init__(self, *, is_self_draft: bool) -> None:
        self.inner, self.access = Recorder(), RunnerAccess()
        spec: Any = SimpleNamespace(
            vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, num_layers=2
        )
        inner: Any = self.inner
        self.runner = GuardedRunner(inner, spec, self.access, is_self_draft=is_self_draft)

    def granted(self, *requests: Any) -> Any:
        ranges = [SlotRange(r.block_table, len(r.token_ids) - 1, r.num_slots) for r in requests]
        return self.access.granted(ranges)


@pytest.fixture(params=[True, False], ids=["self-draft", "draft model"])
def guarded(request: pytest.FixtureRequest) -> Guarded:
    return Guarded(is_self_draft=request.param)


@pytest.mark.parametrize("name", WRONG_PASSES)
def test_a_wrong_pass_is_refused(name: str, guarded: Guarded) -> None:
    with guarded.granted(REQUEST, OTHER), pytest.raises(ValueError, match="must|at least"):
        WRONG_PASSES[name](guarded.runner, REQUEST)
    # A chain that is too long runs as far as its slots go.
    assert len(guarded.inner.calls) == (NUM_SLOTS if "on and on" in name else 0)


@pytest.mark.parametrize("name", BEFORE_THE_ROOT)
def test_only_a_draft_model_runs_rows_before_the_root(name: str) -> None:
    guarded = Guarded(is_self_draft=True)
    with guarded.granted(REQUEST), pytest.raises(ValueError, match="slots 9 to 15"):
        BEFORE_THE_ROOT[name](guarded.runner, REQUEST)
    assert not guarded.inner.calls
    guarded = Guarded(is_self_draft=False)
    with guarded.granted(REQUEST):
        BEFORE_THE_ROOT[name](guarded.runner, REQUEST)
    assert guarded.inner.calls


@pytest.mark.parametrize("name", FAIR_PASSES)
def test_a_fair_pass_runs(name: str, guarded: Guarded) -> None:
    with guarded.granted(REQUEST):
        FAIR_PASSES[name](guarded.runner, REQUEST)
    assert guarded.inner.calls


def test_the_runner_gets_rows_that_the_drafter_cannot_change(guarded: Guarded) -> None:
    token_ids = ReadOnlyList([1, 2])
    with guarded.granted(REQUEST):
        given = Rows(token_ids, ROOT, REQUEST.block_table, parents=[-1, 0])
        guarded.runner.forward([given])
    ((taken,), aux_layers) = guarded.inner.calls[0]
    assert taken == Rows((1, 2), ROOT, REQUEST.block_table, parents=(-1, 0))
    assert taken is not given
    assert aux_layers == ()


def test_positions_are_those_of_the_model() -> None:
    guarded = Guarded(is_self_draft=False)
    long = SimpleNamespace(token_ids=[1] * 31, num_slots=6, block_table=(5, 6))
    with guarded.granted(long):
        rows([1, 2])(guarded.runner, long)
        rows([1, 2, 2], parents=[-1, 0, 0])(guarded.runner, long)
        with pytest.raises(ValueError, match="positions must be below 32, got 3 from 30"):
            rows([1, 2, 3])(guarded.runner, long)
        with pytest.raises(ValueError, match="positions must be below 32"):
            rows([1, 2, 2], parents=[-1, 0, 1])(guarded.runner, long)


def test_outside_of_the_call_nothing_runs(guarded: Guarded) -> None:
    with guarded.granted(REQUEST):
        begun = guarded.runner.chains([ROOT + 1], [REQUEST.block_table])
    with guarded.granted(OTHER):
        for run in FAIR_PASSES.values():
            with pytest.raises(ValueError, match="block_table must be that of a DraftRequest"):
                run(guarded.runner, REQUEST)
    with guarded.granted(REQUEST):
        for use in (begun.forward, begun.keep):
            with pytest.raises(ValueError, match="inside the call of propose that began them"):
                use([0])
    with pytest.raises(ValueError, match="block_table must be that of a DraftRequest"):
        rows()(guarded.runner, REQUEST)
    assert not guarded.inner.calls


def test_a_call_ends_when_the_pass_of_another_thread_does(guarded: Guarded) -> None:
    is_running, may_end, order = threading.Event(), threading.Event(), []

    def slow(*_: Any) -> None:
        is_running.set()
        may_end.wait(10)
        order.append("pass")

    guarded.inner.forward = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=rows(), args=(guarded.runner, REQUEST))
    with guarded.granted(REQUEST):
        thread.start()
        assert is_running.wait(10)
        threading.Timer(0.05, may_end.set).start()
    order.append("end")
    thread.join()
    assert order == ["pass", "end"]
