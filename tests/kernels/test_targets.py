"""A target is what a compiler is told and what a processor must have, and the best that runs here
is known."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from folospec.kernels import targets
from folospec.kernels.targets import TARGETS, Target, compiler_flags

CPUINFO = "processor\t: 0\n{key}\t: fpu avx2 fma\nbugs\t: none\n\nprocessor\t: 1\n{key}\t: other\n"
SYSCTL = """hw.optional.arm.FEAT_LSE: 1
hw.optional.arm.FEAT_BF16: 0
hw.optional.arm.FEAT_DotProd: 1
"""


@pytest.fixture
def asked_anew():
    targets.cpu_flags.cache_clear()
    yield
    targets.cpu_flags.cache_clear()


def on(monkeypatch, machine: str, flags: frozenset[str]) -> list[str]:
    """The names of what a machine of a kind runs, if its processor has these flags."""
    monkeypatch.setattr(targets.platform, "machine", lambda: machine)
    monkeypatch.setattr(targets, "cpu_flags", lambda: flags)
    return [target.name for target in targets.local_targets() if target.runs_here]


def needs(name: str) -> frozenset[str]:
    return next(t.needs for known in TARGETS.values() for t in known if t.name == name)


def test_the_best_that_a_processor_runs_comes_first(monkeypatch):
    assert on(monkeypatch, "x86_64", needs("x86-64-v3")) == ["x86-64-v3", "x86-64"]
    avx512 = on(monkeypatch, "x86_64", needs("x86-64-v4"))
    assert avx512 == ["x86-64-v4", "x86-64-v3", "x86-64"]
    everything = needs("x86-64-v4+avx512bf16+avx512vnni")
    assert on(monkeypatch, "x86_64", everything) == [t.name for t in TARGETS["x86_64"]]
    assert on(monkeypatch, "x86_64", everything - {"bmi2"}) == ["x86-64"]
    arm = needs("armv8.2-a+dotprod+bf16")
    for name in ("aarch64", "arm64"):
        assert on(monkeypatch, name, arm) == ["armv8.2-a+dotprod+bf16", "armv8-a"]
        assert on(monkeypatch, name, arm - {"bf16"}) == ["armv8-a"]


def test_a_machine_that_does_not_tell_runs_what_all_of_its_kind_run(monkeypatch):
    assert on(monkeypatch, "x86_64", frozenset()) == ["x86-64"]
    assert on(monkeypatch, "AMD64", frozenset()) == ["x86-64"]
    assert on(monkeypatch, "aarch64", frozenset()) == ["armv8-a"]
    assert on(monkeypatch, "riscv64", frozenset({"avx2"})) == []


def test_what_a_processor_lacks_is_named_where_it_is_known(monkeypatch):
    on(monkeypatch, "x86_64", needs("x86-64-v4") - {"avx512dq"})
    assert targets.lacking("x86-64-v4") == ["avx512dq"]
    assert targets.lacking("x86-64-v3") == targets.lacking("znver3") == []
    on(monkeypatch, "x86_64", frozenset())
    assert targets.lacking("x86-64-v4") == []


def test_a_better_target_of_a_family_needs_all_that_a_lesser_one_needs():
    for family in TARGETS.values():
        for better, lesser in zip(family, family[1:], strict=False):
            assert better.needs > lesser.needs
        assert family[-1].needs == frozenset()


@pytest.mark.parametrize(
    ("machine", "name", "flags"),
    [
        ("x86_64", "x86-64-v3", "-march=x86-64-v3"),
        ("x86_64", "x86-64-v4+avx512bf16", "-march=x86-64-v4 -mavx512bf16"),
        ("x86_64", "native", "-march=native"),
        ("x86_64", "armv8.2-a+bf16", "-march=armv8.2-a+bf16"),
        ("aarch64", "armv8.2-a+bf16", "-march=armv8.2-a+bf16"),
        ("aarch64", "native", "-mcpu=native"),
        ("arm64", "neoverse-n1", "-mcpu=neoverse-n1"),
    ],
)
def test_a_compiler_is_told_in_its_own_words(machine, name, flags, monkeypatch):
    monkeypatch.setattr(targets.platform, "machine", lambda: machine)
    assert compiler_flags(name) == tuple(flags.split())


@pytest.mark.parametrize("key", ["flags", "Features"])
def test_flags_are_those_of_the_first_processor(key, monkeypatch, asked_anew, tmp_path):
    (tmp_path / "cpuinfo").write_text(CPUINFO.format(key=key))
    monkeypatch.setattr(targets.sys, "platform", "linux")
    monkeypatch.setattr(targets, "Path", lambda _: tmp_path / "cpuinfo")
    assert targets.cpu_flags() == {"fpu", "avx2", "fma"}
    targets.cpu_flags.cache_clear()
    (tmp_path / "cpuinfo").unlink()
    assert targets.cpu_flags() == frozenset()


def test_the_flags_of_macos_have_the_names_of_linux(monkeypatch, asked_anew):
    monkeypatch.setattr(targets.sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=SYSCTL))
    assert targets.cpu_flags() == {"atomics", "asimddp"}
    known = {flag for target in TARGETS["aarch64"] for flag in target.needs}
    assert known == set(targets._APPLE_FLAGS.values())


def test_a_target_that_needs_nothing_runs_anywhere():
    assert Target("any", frozenset()).runs_here
    assert not Target("none", frozenset({"a flag that no processor has"})).runs_here
