"""Every part of the check runs without a GPU at its smallest, and what breaks is seen."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib import limits
from folospec import SamplingParams
from folospec.spec.verifier import Verifier
from folospec.spec.verify import Verdict
from gpu_check import (
    bits,
    check,
    checkpoints,
    drafters,
    goals,
    jobs,
    lossless,
    report,
    rules,
    steps,
    throughput,
)
from gpu_check.jobs import Budget, Context, Job, rows_of, run_in_process
from gpu_check.plan import SECTIONS, planned
from gpu_check.ties import Parting, Referee

CASES = """
import torch
from gpu_case import Canvas, Case

def cases(device, seed=0):
    right = torch.arange(5.0, device=device)
    canvas = Canvas((3,), torch.float32, device)

    def breaks():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    yield Case(name="right", run=lambda: {"x": right + 1e-6}, expected=lambda: {"x": right},
               tolerance=1e-3)
    yield Case(name="wrong", run=lambda: {"x": right + 1}, expected=lambda: {"x": right})
    yield Case(name="unwritten", run=lambda: {"x": canvas.tensor},
               expected=lambda: {"x": right[:3]}, tolerance=1.0)
    if seed:
        yield Case(name="breaking", run=breaks, expected=dict)
    yield Case(name="last", run=lambda: {"x": right}, expected=lambda: {"x": right})
"""

CHILD = """
import json, sys, time
told = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if told["--job"] == "kernels:breaking":
    done = int(told["--resume"])
    if done == 0:
        print(json.dumps({"kind": "kernel", "passed": False, "resume": 3}), flush=True)
    else:
        print(json.dumps({"kind": "kernel", "passed": True, "done": done}), flush=True)
elif told["--job"] == "kernels:dying":
    sys.exit("no such luck")
else:
    print(json.dumps({"kind": "kernel", "passed": True}), flush=True)
    sys.stdout.write('{"cut"')
    sys.stdout.flush()
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sets it on a CPU, for good; here it is as it was for whatever comes after."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def referee() -> Referee:
    return Referee("folospec-demo", "bfloat16", "cpu")


@pytest.fixture
def fake_cases(tmp_path: Path) -> Path:
    (tmp_path / "gpu_cases_fake.py").write_text(CASES)
    return tmp_path


def context_of(folder: Path, seconds: float = 6000.0, resume: int = 0) -> Context:
    return Context("cpu", True, folder, Budget(seconds), resume)


def run_job(name: str, folder: Path) -> list[dict[str, Any]]:
    """A job at its smallest; it must end complete, with nothing failed."""
    job = next(job for job in planned(SECTIONS, quick=True) if job.name == name)
    rows = list(rows_of(job, context_of(folder)))
    assert rows[-1]["end"] == "complete", rows
    assert report.failed(rows) == []
    json.dumps(rows)
    return rows[:-1]


def kernel_job(folder: Path, seeds: int) -> Job:
    told = {"folder": str(folder), "module": "gpu_cases_fake", "seeds": seeds}
    return Job("kernels", "fake", 60.0, "gpu_check.kernels.check", arguments=told)


class TestKernels:
    def test_each_case_is_verified(self, fake_cases: Path) -> None:
        *rows, end = rows_of(kernel_job(fake_cases, 1), context_of(fake_cases))
        passed = {row["case"]: row["passed"] for row in rows}
        assert passed == {"right": True, "wrong": False, "unwritten": False, "last": True}
        assert 0 < rows[0]["error_norm"] < 1e-3
        assert "AssertionError" in rows[1]["traceback"]
        assert end["end"] == "complete"

    def test_the_first_case_that_there_is_no_time_for_is_named(
        self, fake_cases: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        allowed = iter([True, True, False])
        monkeypatch.setattr(Budget, "allows", lambda self, _=0.0: next(allowed))
        rows = list(rows_of(kernel_job(fake_cases, 1), context_of(fake_cases)))
        assert [row["case"] for row in rows if row["kind"] == "kernel"] == ["right", "wrong"]
        assert [row["case"] for row in rows if row["kind"] == "not begun"] == ["unwritten"]

    def test_a_lost_device_says_where_to_go_on(self, fake_cases: Path) -> None:
        job = kernel_job(fake_cases, 2)
        *_, broken, end = rows_of(job, context_of(fake_cases))
        assert (broken["case"], broken["seed"], broken["resume"]) == ("breaking", 1, 8)
        assert end["end"] == "device lost"
        rest = list(rows_of(job, context_of(fake_cases, resume=8)))
        assert [row.get("case") for row in rest] == ["last", None]

    def test_a_failed_case_makes_the_exit_code_1(
        self, fake_cases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        jobs = [kernel_job(fake_cases, 1)]
        monkeypatch.setattr(check, "planned", lambda *_: jobs)
        out = fake_cases / "rows.jsonl"
        options = ["--device", "cpu", "--in-process", "--commit", "abc", "--out", str(out)]
        assert check.main(options) == 1
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(rows) == 5
        assert all(row["provenance"]["git_commit"] == "abc" for row in rows)
        assert "kernels: failed checks" in capsys.readouterr().err
        good = Job("models", "none", 1.0, "builtins.iter", arguments={})
        jobs[:] = [good]
        assert check.main(options) == 1  # a context is not iterable: the job broke


class TestJobs:
    @pytest.fixture
    def command(self, tmp_path: Path) -> list[str]:
        script = tmp_path / "child.py"
        script.write_text(CHILD)
        return [sys.executable, str(script)]

    def run(
        self, part: str, folder: Path, command: list[str], seconds: float, last: float = 6000.0
    ) -> list[Any]:
        rows: list[Any] = []
        job = Job("kernels", part, seconds, "none.at_all")
        end = time.monotonic() + last
        run_in_process(job, context_of(folder, seconds), command, rows.append, end)
        return rows

    def test_a_job_goes_on_behind_what_broke_it(self, tmp_path: Path, command: Any) -> None:
        rows = self.run("breaking", tmp_path, command, 6000.0)
        assert [row.get("done") for row in rows] == [None, 3]

    def test_a_process_that_dies_is_a_failure(self, tmp_path: Path, command: Any) -> None:
        [row] = self.run("dying", tmp_path, command, 6000.0)
        assert row["passed"] is False
        assert row["error"] == "the process ended with 1"
        assert "no such luck" in row["log"]

    def test_a_process_that_hangs_is_ended(
        self, tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        timers = self.stopped_timers(monkeypatch)
        rows: list[Any] = []

        def emit(row: Any) -> None:
            rows.append(row)
            timers[-1].function()  # its time is over once it has said something

        job = Job("kernels", "hanging", 30.0, "none.at_all")
        run_in_process(job, context_of(tmp_path, 30.0), command, emit, time.monotonic() + 600)
        assert [row["passed"] for row in rows] == [True, False]
        assert rows[1]["error"] == "the process was ended, over its time"

    @pytest.mark.parametrize(("last", "allowed"), [(1.5, 1.5), (6000.0, 30.0)])
    def test_a_process_has_its_own_time_and_no_more_than_the_whole_check(
        self,
        tmp_path: Path,
        command: Any,
        monkeypatch: pytest.MonkeyPatch,
        last: float,
        allowed: float,
    ) -> None:
        timers = self.stopped_timers(monkeypatch)
        monkeypatch.setattr(jobs, "START_SECONDS", 0.0)
        monkeypatch.setattr(jobs.time, "monotonic", lambda: 100.0)
        self.run("dying", tmp_path, command, 30.0, last)
        assert timers[0].seconds == pytest.approx(allowed)

    def stopped_timers(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Timers that are made and never end by themselves."""
        timers: list[Any] = []

        class Timer:
            def __init__(self, seconds: float, function: Any) -> None:
                self.seconds, self.function = seconds, function
                timers.append(self)

            def start(self) -> None: ...

            def cancel(self) -> None: ...

        monkeypatch.setattr(jobs.threading, "Timer", Timer)
        return timers

    def test_a_job_without_time_says_so(self, scratch: Path) -> None:
        job = next(job for job in planned(SECTIONS, quick=True) if job.section == "memory")
        [end] = rows_of(job, context_of(scratch, seconds=0.0))
        assert end["end"] == "short of time"

    def test_what_there_is_no_time_for_is_not_begun(self, tmp_path: Path) -> None:
        out = tmp_path / "rows.jsonl"
        options = ["--device", "cpu", "--quick", "--minutes", "0.01", "--out", str(out)]
        for section, code in (("bits", 1), ("memory", 0)):
            assert check.main([*options, "--only", section]) == code
            [row] = [json.loads(line) for line in out.read_text().splitlines()]
            assert row["end"] == "not begun, out of time"

    def test_a_section_runs_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        out = tmp_path / "rows.jsonl"
        options = ["--device", "cpu", "--quick", "--only", "memory", "--out", str(out)]
        assert check.main(options) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["kind"] for row in rows] == [*["memory"] * 2, *["weights"] * 2, "end"]
        assert "skipped" in rows[3] or rows[3]["weight_bytes"] < 0.6 * rows[2]["weight_bytes"]
        assert rows[0]["kv_bytes"] <= rows[0]["asked_bytes"]
        assert rows[0]["provenance"]["device"] == "cpu"


class TestLossless:
    def test_every_drafter_is_compared_and_broken_engines_are_caught(self, scratch: Path) -> None:
        rows = run_job("lossless:tiny-deterministic", scratch)
        kinds = [row["kind"] for row in rows]
        assert kinds.count("plain") == 2
        assert kinds.count("tokens") == 4
        assert kinds.count("proof") == kinds.count("control") == 2
        assert all(row["num_preemptions"] for row in rows if row["kind"] == "proof")

    def test_a_drafter_that_breaks_leaves_the_others(
        self, scratch: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = {"broken": {"method": "nobody"}, "ngram": {"method": "ngram"}}
        monkeypatch.setattr(lossless, "drafters", lambda *_: asked)
        rows = list(lossless.check(context_of(scratch), "tiny", None))
        [broken] = report.failed(row for row in rows if row["kind"] == "failure")
        assert broken["drafter"] == "broken"
        assert "nobody" in broken["error"]
        assert [row["drafter"] for row in rows if row["kind"] == "proof"] == ["ngram"]

    def test_differences_are_counted_and_not_excused(self, scratch: Path) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=4)
        work = lossless.Work(lossless.demo_pair(), [[5, 6], [7]], 4, {})
        assert work.params("greedy")[0].temperature == params.temperature
        found = lossless.compare(
            work, "greedy", [[[1, 2, 3, 4]], [[5, 6, 7, 8]]], [[[1, 2, 9, 4]], [[5, 6, 7, 8]]], None
        )
        assert found["differing_tokens"] == 2
        assert found["first_differences"] == [{"position": 2}]
        assert not found["passed"]

    def test_a_run_without_accepted_drafts_proves_nothing(self) -> None:
        counts = dict.fromkeys((*lossless.COUNTS, *lossless.EVENTS), 3)
        known = {"drafter": "ngram", "deterministic": True, "promise": "bitwise", "mode": "graphs"}
        known |= {"num_accepted_tokens": 0, "num_cuda_graphs": 0}
        lacking = lossless.proof([{**counts, **known}], "demo")
        assert lacking["lacking"] == ["num_accepted_tokens", "CUDA graphs"]
        assert not lacking["passed"]


class TestReferee:
    PROMPT = list(range(40, 60))

    def parting(self, referee: Referee, rank: int, **options: Any) -> dict[str, Any]:
        from gpu_check.ties import logits_after

        order = logits_after(referee._fine, self.PROMPT).argsort(descending=True)
        pair = [[int(order[0])], [int(order[rank])]]
        return referee.verify(Parting(self.PROMPT, *pair, SamplingParams(**options)))

    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.8, "seed": 1}])
    def test_a_token_that_is_far_behind_is_no_near_tie(
        self, referee: Referee, options: Any
    ) -> None:
        found = self.parting(referee, 4000, **options)
        assert found["gap"] is None or found["gap"] > 2 * found["rounding"] > 0
        assert not found["near_tie"]

    def test_a_token_within_rounding_is_a_near_tie(
        self, referee: Referee, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from gpu_check import ties

        rows = {"fine": torch.tensor([1.0, 1.01, 0.0]), "coarse": torch.tensor([1.01, 1.0, 0.0])}
        monkeypatch.setattr(
            ties,
            "logits_after",
            lambda runner, _: rows["fine" if runner is referee._fine else "coarse"],
        )
        params = SamplingParams(temperature=0.0)
        tied = referee.verify(Parting([1], [1, 5], [0, 6], params))
        assert tied["near_tie"]
        assert tied["gap"] == pytest.approx(0.01, rel=1e-3)
        assert not referee.verify(Parting([1], [1], [2], params))["near_tie"]

    def test_an_output_that_ends_early_is_not_excused(self, referee: Referee) -> None:
        params = SamplingParams(temperature=0.0)
        assert not referee.verify(Parting(self.PROMPT, [1, 2], [1], params))["near_tie"]


class TestBitsAndRules:
    def test_no_bit_differs_and_the_control_is_seen(self, scratch: Path) -> None:
        rows = run_job("bits:bfloat16", scratch)
        ways = {(row["way"], row["crowded"]) for row in rows if row["kind"] == "bits"}
        assert len(ways) == 16
        assert [row["differing_bits"] > 0 for row in rows if row["kind"] == "control"] == [True]

    def test_bits_are_counted(self) -> None:
        one = torch.tensor([1.0, 2.0])
        other = torch.tensor([1.0, 2.0 + 2**-22 + 2**-21])
        assert bits.differing_bits(one, one) == 0
        assert bits.differing_bits(one, other) == 2

    def test_verdicts_are_verified_twice(self, scratch: Path) -> None:
        rows = run_job("rules:rejection", scratch)
        assert {row["shape"] for row in rows} == {"chain", "tree"}
        assert all(row["num_accepted"] and row["num_rejected"] for row in rows)
        [row] = run_job("rules:cpu-tokens", scratch)
        assert row["num_tokens"] == 64

    def test_a_wrong_verdict_is_noticed(
        self, scratch: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = Verifier.verify

        def wrong(self: Any, steps: Any, result: Any) -> Any:
            shown = original(self, steps, result)
            for step in steps:
                if step.verdicts:
                    verdict = step.verdicts[0]
                    step.verdicts = [Verdict(verdict.path, verdict.next_token_id ^ 1)]
            return shown

        monkeypatch.setattr(Verifier, "verify", wrong)
        [row] = rules.check(context_of(scratch), "block")
        assert row["differing_verdicts"] == row["num_verdicts"] > 0
        assert not row["passed"]


class TestTimings:
    def test_steps_have_their_limit_and_their_ratio(self, scratch: Path) -> None:
        found = run_job("steps:grown", scratch)
        rows = [row for row in found if row["kind"] == "step"]
        profiles = [row for row in found if row["kind"] == "profile"]
        assert [row["shape"] for row in profiles] == ["plain", "chain"]
        assert all(row["wall_ms"] > 0 and row["kernels"] for row in profiles)
        fast = [(row["shape"], row["rows"]) for row in rows if not row.get("deterministic")]
        assert fast[0] == ("plain", 1)
        assert {("chain", 1), ("chain", 4), ("batch", 1), ("batch", 2)} <= set(fast)
        assert any(row["deterministic"] for row in rows if "deterministic" in row)
        assert all(row["ms"] > 0 and row["limit_ms"] > 0 for row in rows)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted here")
    def test_backends_that_are_not_there_say_why(self, scratch: Path) -> None:
        rows = run_job("steps:parts", scratch)
        backends = [row for row in rows if row["kind"] == "backend"]
        skipped = [row["skipped"] for row in backends if "skipped" in row]
        assert any("flash_attn" in reason for reason in skipped)
        assert {row["attention"] for row in backends if "ms" in row} >= {"torch"}
        assert all(row["own_ms"] > 0 for row in rows if row["kind"] == "linear")
        assert "linear" in {row["kind"] for row in rows}

    def test_drafts_that_should_be_wrong_and_are_accepted_spoil_a_time(
        self, scratch: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the 8b model a token is followed by the next one."""
        path = checkpoints.write_8b_config(scratch / "counting", quick=True)
        machine = limits.Machine(1e9, {"bfloat16": 1e9})
        with checkpoints.without_files(path, "cpu"):
            bench = steps.Bench.of(context_of(scratch), "8b, small", path, machine)
            engine = bench.engine(8, 20, drafters.chains(8))
        assert bench.measure(engine, "chain", 8, 10)["steps"] == 3
        monkeypatch.setattr(drafters, "FAR", 1)
        with pytest.raises(RuntimeError, match="drafts were accepted"):
            bench.measure(engine, "chain", 8, 10)

    def test_contestants_take_turns_and_errors_stay_with_who_made_them(
        self, scratch: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any) -> None:
            raise MemoryError("too large")

        monkeypatch.setattr(throughput.TransformersGenerateBatch, "generate", fails)
        rows = run_job("throughput:8b", scratch)
        own, first = ([r for r in rows if r.get("prompts") == n] for n in (2, 1))
        by_name = {row["contestant"]: row for row in first}
        assert by_name["transformers generate_batch"]["error"] == "MemoryError: too large"
        assert by_name["transformers generate"]["tokens_equal_to_plain"]
        told = next(row for row in own if row["contestant"] == throughput.TOLD)
        assert told["tokens_equal_to_plain"]
        assert told["acceptance_length"] > 1
        assert told["expected_acceptance_length"] == pytest.approx(3.68928)
        assert [row["shape"] for row in rows if row["kind"] == "step"] == ["chain", "chain"]

    def test_what_is_told_is_right_with_its_probability(self) -> None:
        told = drafters.ToldDrafter.__new__(drafters.ToldDrafter)
        future = list(range(4000))
        chain = told._with_lies(future)
        share = sum(a == b for a, b in zip(future, chain, strict=True)) / len(future)
        assert share == pytest.approx(0.8, abs=0.03)
        assert chain == told._with_lies(future)


class TestReport:
    def rows(self, share: float) -> list[dict[str, Any]]:
        known = {"section": "steps", "part": "grown", "model": goals.MODEL}
        step = {**known, "kind": "step", "shape": "plain", "rows": 1, "context": 512}
        kernel = {"section": "kernels", "part": "x", "kind": "kernel", "case": "c", "seed": 0}
        end = {"section": "kernels", "part": "x", "kind": "end", "end": "complete", "seconds": 1.0}
        times = {"ms": 1.0, "share_of_read": share, "share_of_limit": share}
        return [
            {**step, **times, "deterministic": True, "share_of_read": 0.01},
            {**step, **times, "shape": "batch", "share_of_read": 0.02, "multi_step": 1},
            {**step, **times, "deterministic": None, "multi_step": 8},
            {**kernel, "passed": True, "error_norm": 1e-3},
            end,
        ]

    def verdict(self, rows: list[dict[str, Any]], name: str) -> Any:
        [goal] = [goal for goal in goals.GOALS if name in goal.name]
        return goal.verdict(rows)

    def test_verdicts_are_those_of_the_rows(self) -> None:
        name = "share of the bandwidth limit"
        assert self.verdict(self.rows(0.85), name) == (0.85, "met")
        assert self.verdict(self.rows(0.75), name) == (0.75, "missed")
        assert self.verdict([], name) == (None, "not measured")

    def test_a_section_that_was_cut_short_is_not_met(self) -> None:
        rows = self.rows(0.9)
        assert self.verdict(rows, "kernels") == (0, "met")
        rows[-1]["end"] = "short of time"
        assert self.verdict(rows, "kernels") == (0, "incomplete")
        rows[-2]["passed"] = False
        assert self.verdict(rows, "kernels") == (1, "missed")

    def test_what_did_not_come_to_its_end_is_not_proven(self) -> None:
        job = Job("kernels", "x", 1.0, "none.at_all")

        def unproven(rows: list[dict[str, Any]], *jobs: Job) -> list[str]:
            return report.unproven(rows, ["kernels", "steps"], jobs)

        rows = self.rows(0.9)
        *_, check, end = rows
        assert unproven(rows, job) == []
        assert unproven(rows) == ["kernels"]
        for lacking in ([], [end], [check], [check, {**end, "end": "short of time"}]):
            assert unproven(lacking, job) == ["kernels:x"]
        assert report.unproven([], ["steps"], [job]) == []

    def test_the_fastest_way_of_transformers_counts(self) -> None:
        cell = {"kind": "throughput", "model": "8b", "batch": 8, "prompts": 8}
        rows = [
            {**cell, "contestant": "transformers generate", "ratio_to_folospec_plain": 0.25},
            {**cell, "contestant": "transformers generate_batch", "ratio_to_folospec_plain": 0.4},
        ]
        assert self.verdict(rows, "8b, batch 8:") == (2.5, "met")
        assert self.verdict(rows[1:], "8b, batch 8:") == (None, "not measured")

    def test_every_kind_of_row_has_a_line(self) -> None:
        titles = [sheet.title for sheet in report.sheets(self.rows(0.9))]
        assert titles == ["Kernels against their oracles", "Steps", "How the parts ended", "Goals"]
        bad = {"section": "bits", "part": "x", "kind": "failure", "passed": False, "error": "[no]"}
        [sheet] = [s for s in report.sheets([bad]) if s.title == "Failures"]
        assert sheet.lines == [("bits", "x", "failure", "-", "[no]")]
