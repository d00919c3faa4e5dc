"""Kernels with one rule broken, as controls of the tests that look at them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module with `new` in place of `old`, which occurs exactly once in its text; a file of it
    is left in `folder`, since Triton reads the text of a kernel."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {module.__name__}"
    name = f"{module.__name__.rpartition('.')[2]}_mutant"
    path = folder / f"{name}.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed
