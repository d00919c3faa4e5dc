"""Kernels with a broken rule: tests must see the difference."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import ModuleType

_NUMBERS = count()


def mutant(
    module: ModuleType, old: str, new: str, tmp_path: Path, users: Sequence[ModuleType] = ()
) -> ModuleType:
    """The module with a fragment of its source replaced, under another name.

    Args:
        old: must occur exactly once.
        users: modules that import it, each behind those it imports itself: they are made anew on
            top of the changed one.

    Returns:
        The last of the users, or the changed module if there are none.
    """
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {module.__name__}"
    names: dict[str, str] = {}
    changed = _make(module.__name__, text.replace(old, new), tmp_path, names)
    for user in users:
        assert user.__file__ is not None
        changed = _make(user.__name__, Path(user.__file__).read_text(), tmp_path, names)
    return changed


def _make(name: str, text: str, tmp_path: Path, names: dict[str, str]) -> ModuleType:
    for original, other in names.items():
        text = text.replace(f"from {original} import", f"from {other} import")
    names[name] = f"mutant_{next(_NUMBERS)}_{name.rpartition('.')[2]}"
    path = tmp_path / f"{names[name]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(names[name], path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[names[name]] = made
    spec.loader.exec_module(made)
    return made
