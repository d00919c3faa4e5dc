"""The loop: a window of requests, results as they finish, errors that concern one record alone."""

from __future__ import annotations

import os
import signal

import pytest
import typer
from fake_engine import FakeEngine

from folospec.cli.batch import Batch
from folospec.cli.batch_input import InputRecord
from folospec.cli.batch_request import RequestTemplate
from folospec.cli.runner import Interrupt


def record(index, value, is_one_of_many=True):
    return InputRecord(index, f"line {index + 1}", "d", "f", index + 1, value, None, is_one_of_many)


def serve(engine, records, on_step=None):
    results = []
    batch = Batch(engine, RequestTemplate(), results.append, on_step)
    with Interrupt() as interrupt:
        totals = batch.run(records, interrupt)
    return results, totals


def test_results_come_as_they_finish():
    prompts = ["a b c d e", "a", "a b", "a"]
    results, totals = serve(FakeEngine(), [record(i, p) for i, p in enumerate(prompts)])
    assert [result.record.index for result in results] == [1, 2, 3, 0]
    assert (totals.num_prompts, totals.num_failed, totals.num_tokens) == (4, 0, 9)
    assert totals.counts.num_target_passes == 5


def test_the_window_bounds_what_is_read_ahead():
    engine, num_done, most_ahead = FakeEngine(max_num_seqs=3), [], 0

    def records():
        nonlocal most_ahead
        for index in range(100):
            most_ahead = max(most_ahead, index + 1 - len(num_done))
            yield record(index, "a b c"[: 1 + 2 * (index % 3)])

    batch = Batch(engine, RequestTemplate(), num_done.append)
    batch.run(records(), Interrupt())
    assert len(num_done) == 100
    assert most_ahead == engine.most_requests == batch.window == 6


def test_a_bad_record_fails_alone():
    values = ["a", {"nonsense": 1}, "refused", "b c"]
    results, totals = serve(FakeEngine(), [record(i, v) for i, v in enumerate(values)])
    errors = {r.record.index: r.error for r in results}
    assert errors == {
        0: None,
        1: "unknown field 'nonsense'; known: " + errors[1].partition("known: ")[2],
        2: "the prompt is refused",
        3: None,
    }
    assert (totals.num_prompts, totals.num_failed) == (4, 2)


def test_a_request_that_the_engine_ends_is_a_failure_with_its_reason():
    records = [record(0, "a b c"), record(1, "d e f")]
    results, totals = serve(FakeEngine(fails={"a b c"}), records)
    assert {r.record.index: r.error for r in results} == {0: "it broke", 1: None}
    assert totals.num_failed == 1


def test_a_prompt_that_stands_alone_ends_the_run_when_it_is_refused(capsys):
    with pytest.raises(typer.Exit) as caught:
        serve(FakeEngine(), [record(0, "refused", is_one_of_many=False)])
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == "folospec: line 1: the prompt is refused\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_says_what_was_cut(signum):
    def on_step(number):
        if number == 3:
            signal.raise_signal(signum)

    engine, results = FakeEngine(on_step=on_step), []
    batch = Batch(engine, RequestTemplate(), results.append)
    with Interrupt() as interrupt:
        totals = batch.run([record(i, "a b c"[: 1 + 4 * (i > 0)]) for i in range(9)], interrupt)
    assert engine.num_steps == 3
    assert engine.requests == {}
    assert totals.interrupted
    assert interrupt.exit_code == 128 + signum
    done = [r.record.index for r in results if not r.is_cut]
    cut = [r.record.index for r in results if r.is_cut]
    assert sorted(done + cut) == list(range(len(results)))
    assert (done, totals.num_cut) == ([0, 1], len(cut))


def test_a_signal_ends_the_wait_for_a_pipe():
    reading, writing = os.pipe()

    def records():
        yield record(0, "a b")
        signal.raise_signal(signal.SIGINT)
        os.read(reading, 1)
        yield record(1, "never")

    engine, results = FakeEngine(), []
    batch = Batch(engine, RequestTemplate(), results.append)
    with Interrupt() as interrupt:
        totals = batch.run(records(), interrupt)
    os.close(reading)
    os.close(writing)
    assert totals.interrupted
    assert [r.is_cut for r in results] == [True]


def test_a_result_that_cannot_be_written_is_no_wrong_input():
    def full(result):
        raise OSError(28, "No space left on device")

    for value in ("a", {"nonsense": 1}):
        batch = Batch(FakeEngine(), RequestTemplate(), full)
        with pytest.raises(OSError, match="No space left"):
            batch.run([record(0, value)], Interrupt())


def test_every_step_is_shown_if_asked():
    shown = []
    serve(FakeEngine(), [record(0, "a b c")], shown.append)
    assert [len(outputs[0].outputs[0].token_ids) for outputs in shown] == [1, 2, 3]
