"""`folospec generate -o`, killed at random moments and run again, loses and repeats nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

NUM_PROMPTS = 40
FINISHED = (0, 1)


def run_command(arguments, stderr):
    """In a process of its own; SIGINT may be ignored in the one that it was forked from."""
    from folospec.cli.main import app

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = sys.stderr = open(stderr, "a")  # noqa: SIM115 - as long as the process
    try:
        app(arguments)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command has ended


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs a fork server")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm_process"])
    with pytest.MonkeyPatch.context() as patch:  # it takes no other path over
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        forkserver.ensure_running()
    return context


@pytest.fixture
def pile(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"id": f"p{i}", "prompt": f"w{i} w{i + 1}", "max_tokens": 4 + 7 * i % 30}
        for i in range(NUM_PROMPTS)
    ]
    lines[5]["nonsense"] = True
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def whole_lines(out: Path) -> dict[str, object]:
    """The results of all whole lines, each there once."""
    found: dict[str, object] = {}
    content = out.read_bytes() if out.exists() else b""
    for line in content.split(b"\n")[:-1]:
        one = json.loads(line)
        assert one["id"] not in found
        found[one["id"]] = one.get("outputs") or one["error"]
    return found


def wait_for(process, out, size, rng):
    """Return when the file has so many bytes, and a moment later, or when the process has ended."""
    while process.is_alive() and (not out.exists() or out.stat().st_size < size):
        time.sleep(0.001)
    process.join(rng.uniform(0, 0.02))


def kill_until(num_kills, processes, pile, target, folder, seed):
    """Kill runs at random moments of their writing until there were so many kills."""
    arguments = ["generate", "--file", str(pile), "--model", target, "--temperature", "0.8"]
    arguments += ["--max-num-seqs", "4"]
    stderr = str(folder / "stderr")
    reference = folder / "reference.jsonl"
    process = processes.Process(
        target=run_command, args=([*arguments, "-o", str(reference)], stderr)
    )
    process.start()
    process.join(300)
    expected = whole_lines(reference)
    assert len(expected) == NUM_PROMPTS
    rng, killed, num_files = random.Random(seed), 0, 0
    while killed < num_kills:
        out = folder / f"out-{num_files}.jsonl"
        num_files += 1
        ended = None
        while ended not in FINISHED:
            before = whole_lines(out)
            process = processes.Process(
                target=run_command, args=([*arguments, "-o", str(out)], stderr)
            )
            process.start()
            if killed < num_kills:
                signum = rng.choice([signal.SIGKILL, signal.SIGINT])
                size = rng.randrange(reference.stat().st_size // 2)
                # A process that is only being forked does not know what to do with SIGINT.
                size += (out.stat().st_size if out.exists() else 0) + (signum == signal.SIGINT)
                wait_for(process, out, size, rng)
                if process.is_alive():
                    os.kill(process.pid, signum)
            process.join(300)
            ended = process.exitcode
            assert ended in (*FINISHED, -signal.SIGKILL, 130, -signal.SIGINT)
            killed += ended not in FINISHED
            after = whole_lines(out)
            assert before.items() <= after.items() <= expected.items()
        assert whole_lines(out) == expected
        assert out.read_bytes().endswith(b"\n")
    assert "Traceback" not in Path(stderr).read_text()


def test_three_kills_lose_and_repeat_nothing(processes, pile, target, tmp_path):
    kill_until(3, processes, pile, target, tmp_path, seed=0)


@pytest.mark.soak
def test_two_hundred_kills_lose_and_repeat_nothing(processes, pile, target, tmp_path):
    kill_until(200, processes, pile, target, tmp_path, seed=1)
