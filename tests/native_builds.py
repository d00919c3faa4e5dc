"""Builds of the native kernels for tests: other instruction sets, and one whose rules break.

All broken rules are in one build, each behind a switch, so that they cost one compilation:

    sources      std::clamp<int64_t>(s.num_keys[end] - tile, first, TILE)
    this build   std::clamp<int64_t>((folospec_broken == 2 ? (s.num_keys[end] - 1 - tile)
                                                           : (s.num_keys[end] - tile)), first, TILE)

Libraries are kept in `build/test_kernels`, and found there by what they were built from.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import emulated_kernels
import pytest
from emulated_kernels import EmulatedInt, EmulatedLibrary

from folospec.kernels import build, native, targets
from folospec.kernels.build import SOURCES

FOLDER = Path(__file__).parents[1] / "build" / "test_kernels"
HURRY = "-O1"
X86 = ("x86-64-v3", "x86-64")
ARM = tuple(target.name for target in targets.TARGETS["aarch64"])
NEON = ARM[-1]
BUILDS = (*X86, *ARM)
"""Targets that are tested on any newer machine of their kind, and those for Arm elsewhere too."""


class Rule(NamedTuple):
    """An expression of the sources, and what stands for it when the rule is broken."""

    file: str
    line: str
    """Where the expression stands; the line may stand in several places."""
    right: str
    wrong: str


NUM_KEYS = "clamp<int64_t>(s.num_keys[row] - tile, first"
FIRST_KEY = "clamp<int64_t>(from - tile, 0"
AT_END, STORED = "point.depth == node.depth", "tree.texts[text].is_stored"
MORE = "tree.nodes[child].count > tree.nodes[most].count"
RULES = {
    # Which keys a row sees.
    "a key too many": Rule(
        *("attention.h", NUM_KEYS, "s.num_keys[row] - tile"),
        "std::min(s.num_keys[row] + 1, s.num_keys[w.end_row - 1]) - tile",
    ),
    "a key too few": Rule(
        *("attention.h", NUM_KEYS, "s.num_keys[row] - tile"), "s.num_keys[row] - 1 - tile"
    ),
    "a window too narrow": Rule(
        "attention.h", FIRST_KEY, "from - tile", "from + (from > 0) - tile"
    ),
    "a window too wide": Rule("attention.h", FIRST_KEY, "from - tile", "from - (from > 0) - tile"),
    "one tail for all rows": Rule(
        *("attention.h", "s.tail_start[a] == s.tail_start[b]", "s.tail_start[a]"),
        "s.tail_start[b]",
    ),
    # Where a key lies.
    "keys of another head": Rule(
        "attention.h", "pages.key + head * s.head_size", "head * s.head_size", "0 * head"
    ),
    "values of another head": Rule(
        "attention.h", "pages.value + head * s.head_size", "head * s.head_size", "0 * head"
    ),
    "pages of another sequence": Rule(
        "attention.h", "s.block_table + seq * s.table_width", "seq * s.table_width", "0 * seq"
    ),
    "pages in order": Rule("attention.h", "(table[page] * s.block_size", "table[page]", "page"),
    # What is summed.
    "no rescaling": Rule("attention.h", *["exp(splat(r.maximum - maximum))[0]"] * 2, "1.0f"),
    "no soft cap": Rule("attention.h", "if (s.softcap > 0)", "s.softcap > 0", "false"),
    "no last columns": Rule("linear.h", "if (k < end)", "k < end", "false"),
    "the first scales for all": Rule("linear.h", *["m.scale + first"] * 2, "m.scale"),
    "the first biases for all": Rule("linear.h", *["m.bias + first"] * 2, "m.bias"),
    "no residual": Rule("linear.h", *["before + total"] * 2, "total"),
    "no epsilon": Rule(
        "rowwise.h", *["sum(squares) / (float)count + eps"] * 2, "sum(squares) / (float)count"
    ),
    "a rotation the other way": Rule("rowwise.h", *["a * c - b * s"] * 2, "a * c + b * s"),
    "no sigmoid": Rule("rowwise.h", *["x / (exp(-x) + 1.0f)"] * 2, "x * 0.5f"),
    "an angle too far": Rule(
        *("decoder.h", "angle = p.positions[row] *", "p.positions[row]"),
        "p.positions[row] + row % 2",
    ),
    "rows read late": Rule(
        *("kernels.cpp", "base + targets[i] * bytes[t], held + i * bytes[t]"),
        *("held + i * bytes[t]", "base + sources[i] * bytes[t]"),
    ),
    # What suffix trees count, and what comes first.
    "a split that counts all for both halves": Rule(
        "suffix_tree.h", "tree.nodes[lower].count -= 1", "1", "0"
    ),
    "two edges where one would do": Rule("suffix_tree.h", *["lower == NONE"] * 2, "true"),
    "paths that are read from the oldest text": Rule(
        "suffix_tree.h", f"if ({AT_END}) tree.read_from", AT_END, "false"
    ),
    "texts that are of no use": Rule("suffix.h", "(tree.texts[text].is_stored)", STORED, "false"),
    "of equal drafts the last": Rule("suffix.h", *["seen > other.seen"] * 2, "seen < other.seen"),
    "of equal children the first": Rule("suffix.h", *[MORE] * 2, MORE.replace(">", ">=")),
    "the shared tree before the own": Rule(
        "suffix.h", *["is_shared < other.is_shared"] * 2, "is_shared > other.is_shared"
    ),
    # What a sum's order depends on. These are as right as before, to the last bits but a few.
    "tiles up to the context": Rule(
        *("attention.h", "first_key / TILE * TILE", "first_key / TILE * TILE"),
        "(int64_t)((s.context_lens[s.row_seq[w.first_row]] + TILE - 1) % TILE) + 1 - TILE",
    ),
    "a sum by the number of rows": Rule(
        *("linear.h", "finish_four<NR>(sums[i]", "sums[i]"),
        "MR > 3 ? add_lane_by_lane(sums[i]) : sums[i]",
    ),
}
"""By what they break. None reads what is not there."""
REORDERED = ("tiles up to the context", "a sum by the number of rows")

SWITCH = """
extern "C" { inline __attribute__((visibility("default"))) int folospec_broken = 0; }
namespace folospec {
template <int N>
INLINE Vec* add_lane_by_lane(Vec (&sums)[N]) {
    for (Vec& v : sums) {
        Vec one = {};
        for (int lane = 0; lane < LANES; lane++) one[0] += v[lane];
        v = one;
    }
    return sums;
}
}
"""
OVERRUN = (
    "std::memcpy(held + i * bytes[t], base + sources[i] * bytes[t], bytes[t]);",
    "std::memcpy(held + i * bytes[t], base + sources[i] * bytes[t], "
    "bytes[t] + (folospec_broken < 0));",
)
"""Reads a byte more than there is: only what watches memory notices."""
GUARD = (
    "    const int32_t* table =",
    "    for (; key < 0; key++) *places++ = 0;\n    const int32_t* table =",
)
"""Where tiles begin before the first key, places are asked for that are not there."""
NO_SPINS = ("SPINS = 8192;", "SPINS = 1;")
"""Who waits for another thread falls asleep at once."""
END = "}  // namespace folospec"


class Breakable:
    """A library whose rules can be broken, one at a time."""

    def __init__(self, library: native.Native) -> None:
        self.library = library
        self._switch = _switch(library.library)

    @contextmanager
    def without(self, rule: str) -> Iterator[native.Native]:
        """The library with a rule broken, while the context lasts."""
        self._switch.value = 1 + list(RULES).index(rule)
        try:
            yield self.library
        finally:
            self._switch.value = 0

    def overrun(self) -> None:
        """From now on, moving the last row of a tensor reads a byte too many."""
        self._switch.value = -1


def require_native() -> native.Native:
    """The library itself; skips where there is none."""
    library = native.load()
    if library is None:
        pytest.skip(str(native.why_not()))
    return library


@lru_cache
def built_for(target: str, effort: str = HURRY) -> native.Native:
    """The kernels for another instruction set, in a hurry or not. Skips where it cannot run."""
    return _build(target, SOURCES, effort)


@lru_cache
def breakable(target: str | None = None) -> Breakable:
    """The kernels with a switch at each of `RULES`, for this machine or another target."""
    texts = {path.name: path.read_text() for path in SOURCES.iterdir()}
    with tempfile.TemporaryDirectory() as folder:
        for file, text in with_switches(texts).items():
            (Path(folder) / file).write_text(text)
        return Breakable(_build(target, Path(folder), HURRY))


def with_switches(texts: dict[str, str]) -> dict[str, str]:
    """The sources, by file name, with a switch at every rule."""
    texts = dict(texts)
    wrongs: dict[tuple[str, str, str], str] = {}
    for number, (file, line, right, wrong) in enumerate(RULES.values(), start=1):
        assert line in texts[file], f"{file} has no {line!r}: say otherwise how to break this rule"
        assert right in line
        place = (file, line, right)
        wrongs[place] = f"folospec_broken == {number} ? ({wrong}) : {wrongs.get(place, right)}"
    for (file, line, right), choice in wrongs.items():
        texts[file] = texts[file].replace(line, line.replace(right, f"({choice})", 1))
    changes = (("attention.h", GUARD), ("kernels.cpp", OVERRUN), ("team.h", NO_SPINS))
    for file, change in changes:
        assert change[0] in texts[file]
        texts[file] = texts[file].replace(*change)
    head, _, tail = texts["vec.h"].rpartition(END)
    texts["vec.h"] = head + END + SWITCH + tail
    return texts


def _build(target: str | None, sources: Path, effort: str) -> native.Native:
    emulated = target in ARM and targets.machine() != "aarch64"
    if reason := emulated_kernels.why_not() if emulated else _why_not(target):
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLOSPEC_CACHE_DIR", str(FOLDER))
        patch.setattr(build, "FLAGS", (effort, *build.FLAGS[1:]))
        # Whoever may write to the checkout may write the tests as well.
        patch.setattr(build, "check_private", lambda path: None)
        if emulated:
            patch.setenv("CXX", emulated_kernels.COMPILER)
            patch.setattr(native, "load_library", _load_emulated)
        return native.Native(target, sources)


def _why_not(target: str | None) -> str | None:
    """Say why this machine does not run a build for a target; None if it does."""
    known = {each.name: each.runs_here for each in targets.local_targets()}
    if target is not None and not known.get(target):
        return f"this machine does not run {target}"
    try:
        build.find_compiler()
    except build.BuildError as error:
        return str(error)
    return None


def _load_emulated(target: str, sources: Path) -> EmulatedLibrary:
    return EmulatedLibrary(build.build(target, sources), emulated_kernels.build_driver(FOLDER))


def _switch(library: ctypes.CDLL | EmulatedLibrary) -> ctypes.c_int | EmulatedInt:
    if isinstance(library, EmulatedLibrary):
        return EmulatedInt(library, "folospec_broken")
    return ctypes.c_int.in_dll(library, "folospec_broken")
