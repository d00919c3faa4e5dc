"""What one step of the engine passes through: how much of the project a reader has to follow.

    python -m benchmarks.engine.step_trace plain          one sequence that decodes
    python -m benchmarks.engine.step_trace tree           a draft model's tree [2, 1, 1]
    python -m benchmarks.engine.step_trace auto           "auto" in a step for which nobody is asked
    python -m benchmarks.engine.step_trace plain --calls  every call too, indented by depth

Counted are calls of functions of the package, those of other libraries left out. Reading a property
is no call: it is counted as what it is, an attribute. A cross-file call is one from a file to
another. Two files are mutual if each calls the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import folospec
from folospec import LLM, SamplingParams

PACKAGE = f"{Path(folospec.__file__).parent}/"
DRAFT = {"method": "draft_model", "model": "folospec-demo-draft"}
MODES: dict[str, Any] = {"plain": None, "tree": {**DRAFT, "tree": [2, 1, 1]}, "auto": "auto"}
PROMPT = "def read_lines(path):"
_NOT_FUNCTIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>")
"""Parts of the function around them, which Python may or may not give a frame of their own."""
MOST_STEPS = 2000


@dataclass
class Trace:
    """The calls of a step, in order: how deep, in which file, of what."""

    calls: list[tuple[int, str, str]] = field(default_factory=list)
    crossings: Counter[tuple[str, str]] = field(default_factory=Counter)

    def summary(self, mode: str) -> dict[str, Any]:
        files = Counter(name for _, name, _ in self.calls)
        pairs = [(a, b) for a, b in self.crossings if a < b and (b, a) in self.crossings]
        return {
            "benchmark": "step_trace",
            "mode": mode,
            "python": platform.python_version(),
            "files": len(files),
            "packages": len({name.split("/")[0] for name in files}),
            "engine_files": sorted(name for name in files if name.startswith("engine/")),
            "functions": len({call[1:] for call in self.calls}),
            "calls": len(self.calls),
            "cross_file_calls": self.crossings.total(),
            "mutual": pairs,
            "calls_by_file": dict(files.most_common()),
        }


def traced(step: Callable[[], Any]) -> Trace:
    """Run a step with every call of the package noted."""
    trace, stack = Trace(), [""]

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        if event == "return":
            stack.pop()
            return
        name, caller = code.co_filename.removeprefix(PACKAGE), stack[-1]
        owner = type(frame.f_locals.get("self"))
        if code.co_name in _NOT_FUNCTIONS or isinstance(
            getattr(owner, code.co_name, None), property
        ):
            stack.append(caller)
            return
        if caller and caller != name:
            trace.crossings[caller, name] += 1
        trace.calls.append((len(stack), name, getattr(code, "co_qualname", code.co_name)))
        stack.append(name)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return trace


def one_step(mode: str) -> Trace:
    """A step of a sequence that decodes; with "auto" one for which nobody is asked."""
    llm = LLM("folospec-demo", MODES[mode], max_model_len=256, num_blocks=32)
    engine = llm.engine
    # Hot text is nothing that can be drafted, on any machine: "auto" gives up soon.
    temperature = 3.0 if mode == "auto" else 0.0
    params = SamplingParams(temperature=temperature, max_tokens=200, ignore_eos=True)
    engine.add_request(PROMPT, params)
    for _ in range(3):
        engine.step(finished_only=True)
    if mode != "auto":
        return traced(lambda: engine.step(finished_only=True))
    planner = engine.proposer.step_planner
    assert planner is not None
    num_resting = 0
    for _ in range(MOST_STEPS):
        if not engine.has_unfinished_requests:
            engine.add_request(PROMPT, params)
        trace = traced(lambda: engine.step(finished_only=True))
        is_resting = planner.is_resting and planner.is_idle and not planner.has_prompts
        num_resting = num_resting + 1 if is_resting else 0
        if num_resting == 5:  # the first of a plan are learned from
            return trace
    raise RuntimeError(f"the planner did not rest in {MOST_STEPS} steps")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the counts of a step as JSON, and return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=tuple(MODES))
    parser.add_argument("--calls", action="store_true", help="show every call on stderr")
    args = parser.parse_args(argv)
    trace = one_step(args.mode)
    if args.calls:
        sys.stderr.write("".join(f"{'  ' * d}{name} {what}\n" for d, name, what in trace.calls))
    found = trace.summary(args.mode)
    sys.stdout.write(json.dumps(found) + "\n")
    return found


if __name__ == "__main__":
    main()
