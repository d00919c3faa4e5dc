"""A wheel for a platform has the kernels in it, and runs them where there is no compiler; the wheel
for any platform says that it has none, and runs on torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folospec.kernels import build, targets

ROOT = Path(__file__).parents[1]
PARTS = ("folospec", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
OPTIONS = ("FOLOSPEC_KERNELS_TARGET", "FOLOSPEC_KERNELS_FLAGS", "FOLOSPEC_BUILD_KERNELS", "CXX")
TAG = "Root-Is-Purelib: {is_pure}\nTag: {tag}\n"

PRODUCT = """
import json
import torch
import folospec
from folospec.kernels import native

library = native.load()
x, weight = torch.randn(5, 70), torch.randn(33, 70)
error = library.apply_linear(x, native.matrix(weight)) - x @ weight.T
print(json.dumps({
    "package": folospec.__file__,
    "origin": library.origin,
    "library": library.path.name,
    "instructions": library.instructions,
    "error": float(error.abs().max()),
}))
"""
GENERATE = """
import json
from folospec import LLM, SamplingParams
from folospec.kernels import native

llm = LLM("folospec-demo", num_blocks=64)
params = SamplingParams(temperature=0, max_tokens=6)
[output] = llm.generate(["def f(x):"], params, use_tqdm=False)
print(json.dumps({
    "tokens": len(output.outputs[0].token_ids),
    "native": llm.stats()["native_kernels"],
    "why_not": native.why_not(),
}))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of what a wheel is built from: a build leaves things behind."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("project")
    for name in PARTS:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(project: Path, to: Path, **options: str) -> tuple[Path, str]:
    """The wheel, and what was said while it was built."""
    to.mkdir()
    clean = {name: value for name, value in os.environ.items() if name not in OPTIONS}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(to)],
        cwd=project, env={**clean, **options}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [wheel] = to.glob("*.whl")
    return wheel, done.stdout + done.stderr


def install(wheel: Path, to: Path) -> Path:
    """The folder of the packages, without what they depend on."""
    pytest.importorskip("pip")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index"]
    told = [*pip, "--quiet", "--no-deps", "--no-compile", "--target", str(to), str(wheel)]
    subprocess.run(told, check=True, capture_output=True, timeout=120)
    return to


def run(program: str, packages: Path, **options: str) -> tuple[dict[str, Any], str]:
    """What a program prints, and says, with the packages of a folder and no other program."""
    cache = packages.parent / f"{packages.name}-cache"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=packages.parent,
        env={
            "PATH": str(cache),  # there is nothing in it
            "PYTHONPATH": str(packages),
            "FOLOSPEC_CACHE_DIR": str(cache),
            "OMP_NUM_THREADS": "1",
            **options,
        },
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(cache.glob("kernels/*"))
    return json.loads(done.stdout), done.stderr


def metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        return archive.read(name).decode()


def libraries(packages: Path) -> list[Path]:
    return sorted(packages.glob("folospec/kernels/libraries/*.so"))


def require_compiler() -> None:
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    if not targets.local_targets():
        pytest.skip(f"no wheel has kernels for {targets.machine()}")


def read_elf(*arguments: str) -> str:
    program = shutil.which("readelf")
    if program is None:
        pytest.skip("there is no readelf, which tells what a library needs")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def installed(project, tmp_path_factory) -> Iterator[Path]:
    """A wheel with one library, built in a hurry, in a folder of its own."""
    require_compiler()
    name = next(target.name for target in targets.local_targets() if target.runs_here)
    options = {"FOLOSPEC_KERNELS_TARGET": name, "FOLOSPEC_KERNELS_FLAGS": "-O0"}
    folder = tmp_path_factory.mktemp("platform")
    wheel, _ = build_wheel(project, folder / "dist", FOLOSPEC_BUILD_KERNELS="always", **options)
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert "any" not in wheel.name
    tag = wheel.stem.partition("-")[2].partition("-")[2]
    assert TAG.format(is_pure="false", tag=tag) in metadata(wheel)
    return install(wheel, folder / "packages")


@pytest.mark.slow
def test_a_wheel_of_a_platform_runs_its_kernels_without_a_compiler(installed):
    found, said = run(PRODUCT, installed)
    [library] = libraries(installed)
    assert Path(found["package"]).is_relative_to(installed)
    assert (found["origin"], found["library"]) == ("prebuilt", library.name)
    assert found["error"] < 1e-4
    assert "compil" not in said


@pytest.mark.slow
def test_a_library_of_a_wheel_brings_no_openmp_and_leaves_its_symbols_open(installed):
    """So that there is nothing to graft into the wheel, and threads are torch's own."""
    [library] = libraries(installed)
    needed = [line for line in read_elf("--dynamic", str(library)).splitlines() if "NEEDED" in line]
    names = {line.rpartition("[")[2].rstrip("]").split(".so")[0] for line in needed}
    assert "libc" in names
    loader = {name for name in names if name.startswith("ld-linux")}
    assert names - loader <= {"libc", "libm", "libstdc++", "libgcc_s"}
    symbols = read_elf("--dyn-syms", "--wide", str(library)).splitlines()
    is_open = {line.split()[-1] for line in symbols if " UND " in line}
    assert {"omp_get_thread_num", "GOMP_parallel"} <= is_open


@pytest.mark.slow
def test_without_the_libraries_it_says_so_and_runs_on_torch(project, tmp_path):
    """Control: what the wheel for any platform does. It is made where there is no compiler."""
    wheel, told = build_wheel(project, tmp_path / "dist", CXX="/nonexistent/c++")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert TAG.format(is_pure="true", tag="py3-none-any") in metadata(wheel)
    reason = "there is no C++ compiler (/nonexistent/c++ is not on the path)"
    assert f"the wheel is for any platform, without CPU kernels: {reason}" in told
    packages = install(wheel, tmp_path / "packages")
    assert libraries(packages) == []
    found, said = run(GENERATE, packages)
    reason = "there is no C++ compiler (g++ or c++ is not on the path)"
    assert found == {"tokens": 6, "native": None, "why_not": reason}
    assert f"the native CPU kernels are off, slower forms run instead: {reason}" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"CXX": "/nonexistent/c++"}, "there is no C"),
        ({"FOLOSPEC_KERNELS_TARGET": "native"}, "the target must be one of"),
    ],
)
def test_a_wheel_that_must_have_kernels_fails_without_them(project, tmp_path, options, words):
    with pytest.raises(AssertionError, match=words):
        build_wheel(project, tmp_path / "dist", FOLOSPEC_BUILD_KERNELS="always", **options)


@pytest.mark.soak
def test_a_wheel_has_every_target_and_each_runs_that_this_machine_can_run(project, tmp_path):
    require_compiler()
    wheel, _ = build_wheel(project, tmp_path / "dist", FOLOSPEC_BUILD_KERNELS="always")
    packages = install(wheel, tmp_path / "packages")
    known = targets.local_targets()
    assert len(libraries(packages)) == len(known)
    best = next(target.name for target in known if target.runs_here)
    found, _ = run(PRODUCT, packages)
    assert found["library"].startswith(f"{best}-")
    for target in known:
        if target.runs_here:
            found, _ = run(PRODUCT, packages, FOLOSPEC_KERNELS_TARGET=target.name)
            assert found["library"].startswith(f"{target.name}-")
            assert found["error"] < 1e-4
    found, _ = run(GENERATE, packages)
    assert found["native"].startswith("prebuilt, ")
