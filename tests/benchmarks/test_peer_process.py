"""A worker process answers, rests between its turns, and takes nobody down with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.process import WorkerError, WorkerProcess

SCRIPT = Path(__file__).parent / "counting_worker.py"
LOAD = {
    "checkpoint": "",
    "draft": "",
    "dtype": "float32",
    "threads": 1,
    "max_batch": 2,
    "max_len": 8,
    "kv_gib": 1,
    "mode": "plain",
    "options": {},
}


def command(mode="plain", **changes):
    standard = {
        "command": "run",
        "prompts": [[1], [5], [7]],
        "batch": 2,
        "max_tokens": 2,
        "temperature": 0.0,
        "seed": 0,
        "mode": mode,
        "options": {},
    }
    return {**standard, **changes}


@pytest.fixture
def worker(tmp_path):
    made = WorkerProcess([sys.executable, str(SCRIPT)], {}, tmp_path / "log", timeout=120)
    yield made
    made.close()


def state(worker):
    """One letter: R and S run or wait to be woken, T is stopped."""
    return Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_answers_come_through_whatever_the_engine_prints(worker):
    assert worker.start(LOAD)["versions"].keys() == {"pip"}
    answer = worker.ask(command())
    assert answer["token_ids"] == [[2, 3], [6, 7], [8, 9]]
    assert answer["seconds"] == 4.0  # two batches, 2 seconds each
    assert "very noisy" in worker.log.read_text()


def test_reset_reaches_the_engine(worker):
    worker.start(LOAD)
    assert [worker.ask(command(batch=3))["details"]["texts"] for _ in range(2)] == [3, 6]
    worker.ask({"command": "reset"})
    assert worker.ask(command(batch=3))["details"]["texts"] == 3


def test_between_its_turns_a_worker_is_stopped(worker):
    worker.start(LOAD)
    for _ in range(2):
        deadline = time.monotonic() + 60
        while state(worker) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state(worker) == "T"
        worker.ask(command())


@pytest.mark.parametrize(
    ("mode", "message"),
    [("raising", "OverflowError: too much"), ("lazy", "3 prompts x 2 tokens became")],
)
def test_an_error_is_told_and_the_worker_lives_on(worker, mode, message):
    worker.start(LOAD)
    with pytest.raises(WorkerError, match=message):
        worker.ask(command(mode))
    assert worker.ask(command())["token_ids"]


def test_a_worker_that_ends_is_told_with_its_status_and_can_be_started_again(worker):
    worker.start(LOAD)
    with pytest.raises(WorkerError, match="ended with 3"):
        worker.ask(command("ending"))
    assert not worker.is_running
    with pytest.raises(WorkerError, match="not running"):
        worker.ask(command())
    worker.start(LOAD)
    assert worker.ask(command())["token_ids"]


def test_a_worker_that_takes_too_long_is_ended(worker):
    worker.start(LOAD)
    pid, worker.timeout = worker.process.pid, 0.3
    with pytest.raises(WorkerError, match="no answer in 0.3 seconds"):
        worker.ask(command("sleeping"))
    assert not is_alive(pid)


def test_an_interrupt_leaves_no_worker_behind(worker, monkeypatch):
    worker.start(LOAD)
    pid = worker.process.pid

    def interrupt(deadline):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_read_line", interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.ask(command("sleeping"))
    assert not is_alive(pid)


def test_what_does_not_load_says_why_and_is_gone(worker):
    with pytest.raises(WorkerError, match="MemoryError: too large"):
        worker.start({**LOAD, "mode": "unloadable"})
    assert not worker.is_running


def test_workers_end_with_a_benchmark_that_is_killed(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(SCRIPT.parents[2])!r})
from pathlib import Path
from benchmarks.peers.process import WorkerProcess
worker = WorkerProcess([sys.executable, {str(SCRIPT)!r}], {{}}, Path({str(tmp_path / "log")!r}), 20)
worker.start({LOAD!r})
print(worker.process.pid, flush=True)
time.sleep(60)
"""
    benchmark = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    pid = int(benchmark.stdout.readline())
    assert is_alive(pid)
    benchmark.kill()
    benchmark.communicate()
    deadline = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)
