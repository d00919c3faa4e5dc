"""Puts the native CPU kernels into the wheel, compiled for every instruction set of its platform:
whoever installs it needs no compiler. Everything else is in pyproject.toml.

    FOLOSPEC_BUILD_KERNELS    "auto": compile them if that works, else make a wheel without them,
                              for any platform; "always": fail if it does not work; "never"
    FOLOSPEC_KERNELS_TARGET   the only target to compile for; else all of `targets.py`
    FOLOSPEC_KERNELS_FLAGS    more flags for the compiler; CXX is the compiler

An editable install has none: its kernels are compiled when they are first used.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from folospec.kernels import build, prebuilt, targets  # noqa: E402

logger = logging.getLogger(__name__)


def compile_kernels(folder: Path) -> None:
    """Compile the kernels for the targets of this machine into a folder.

    Raises:
        build.BuildError: there is no compiler, or it fails, or there is nothing to compile for.
    """
    if sys.platform not in ("linux", "darwin"):
        raise build.BuildError(f"they do not run on {sys.platform}")
    known = [target.name for target in targets.local_targets()]
    asked = os.environ.get("FOLOSPEC_KERNELS_TARGET")
    chosen = [name for name in known if asked in (None, "", name)]
    if not chosen:
        raise build.BuildError(f"the target must be one of {known}, got {asked!r}")
    compiler, digest = build.find_compiler(), prebuilt.digest_of(build.SOURCES)
    folder.mkdir(parents=True)
    for name in chosen:
        logger.warning("compiling the CPU kernels for %s", name)
        library = folder / prebuilt.library_name(name, digest)
        build.compile_library(compiler, build.compile_flags(name), build.SOURCES, library)
        library.chmod(0o644)


class Wheel(bdist_wheel):
    """A wheel with kernels is of one platform, and of any Python: they are loaded with ctypes."""

    def run(self) -> None:
        wanted = os.environ.get("FOLOSPEC_BUILD_KERNELS") or "auto"
        if wanted not in ("auto", "always", "never"):
            raise ValueError(
                f"FOLOSPEC_BUILD_KERNELS must be auto, always or never, got {wanted!r}"
            )
        self.run_command("build")
        package = Path(self.get_finalized_command("build").build_lib)
        folder = package / prebuilt.FOLDER.relative_to(ROOT)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
        if wanted != "never":
            self._compile(folder, is_must=wanted == "always")
        self.root_is_pure = not folder.exists()
        # Where a package is installed to depends on it: all of a wheel is in one place.
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def _compile(self, folder: Path, *, is_must: bool) -> None:
        try:
            compile_kernels(folder)
        except build.BuildError as error:
            if is_must:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("the wheel is for any platform, without CPU kernels: %s", error)

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(cmdclass={"bdist_wheel": Wheel})
