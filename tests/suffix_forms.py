"""The two forms of the suffix drafter's trees, for tests that hold for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from native_builds import require_native

from folospec.kernels import native_suffix

FORMS = ["python", "native"]


@contextmanager
def using(form: str) -> Iterator[None]:
    """Drafters that are made in this context have trees of the form; skips where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        if form == "python":
            patch.setattr(native_suffix, "make", lambda rules: None)
        else:
            require_native()
        yield
