"""The jobs of the check and their shares of the time, in the order in which they are begun.

Nothing heavy is imported here: a part that cannot even be imported fails alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from gpu_check.jobs import Job

SECTIONS = ("models", "kernels", "lossless", "bits", "rules", "steps", "throughput", "memory")
CASES = ROOT / "tests" / "kernels"
PATTERN = "gpu_cases_*.py"
SHARED_SECONDS = 130.0
"""For all jobs together that run side by side."""
SECONDS = {"models": 120.0, "kernels": 100.0, "lossless": 110.0, "bits": 60.0, "rules": 70.0}
ALONE_SECONDS = {
    ("steps", "grown"): 50.0,
    ("steps", "parts"): 25.0,
    ("throughput", "demo"): 25.0,
    ("throughput", "grown"): 50.0,
    ("throughput", "8b"): 85.0,
    ("memory", "grown"): 25.0,
}
SEEDS = 4


def planned(sections: Sequence[str], quick: bool, cases: Path = CASES) -> list[Job]:
    """The jobs of these sections."""
    return [job for job in _all(quick, cases) if job.section in sections]


def _all(quick: bool, cases: Path) -> Iterator[Job]:
    yield _shared("models", "grown", "gpu_check.checkpoints.make_grown")
    seeds = 1 if quick else SEEDS
    for path in sorted(cases.glob(PATTERN)):
        told = {"folder": str(cases), "module": path.stem, "seeds": seeds}
        yield _shared(
            "kernels", path.stem.removeprefix("gpu_cases_"), "gpu_check.kernels.check", **told
        )
    for model in ("demo", "tiny"):
        for name, deterministic in (("deterministic", True), ("fast", None)):
            told = {"model": model, "deterministic": deterministic}
            yield _shared("lossless", f"{model}-{name}", "gpu_check.lossless.check", **told)
    for dtype in ("bfloat16",) if quick else ("bfloat16", "float32"):
        yield _shared("bits", dtype, "gpu_check.bits.check", dtype=dtype)
    for rule in ("coupled", "rejection", "block"):
        yield _shared("rules", rule, "gpu_check.rules.check", rule=rule)
    yield _shared("rules", "cpu-tokens", "gpu_check.rules.check_cpu")
    yield _alone("steps", "grown", "gpu_check.steps.check_rows")
    yield _alone("steps", "parts", "gpu_check.steps.check_parts")
    for model in ("demo", "grown", "8b"):
        yield _alone("throughput", model, "gpu_check.throughput.check", model=model)
    yield _alone("memory", "grown", "gpu_check.memory.check")


def _shared(section: str, part: str, entry: str, **arguments: Any) -> Job:
    return Job(section, part, SECONDS[section], entry, arguments=arguments)


def _alone(section: str, part: str, entry: str, **arguments: Any) -> Job:
    seconds = ALONE_SECONDS[section, part]
    return Job(section, part, seconds, entry, alone=True, arguments=arguments)
