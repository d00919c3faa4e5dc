"""The layers: imports go down only, `core` has no torch, the library never prints."""

import ast
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "folospec"
F0 = (
    *("config", "speculative_config", "sampling_params", "option_names", "option_checks"),
    *("outputs", "errors"),
)
F2 = ("attention", "models", "sampling", "text")
CORE_FOR_SPEC = (  # no scheduler, no pool: who drafts allocates nothing
    *("core.sequence", "core.sequence_step", "core.token_tree", "core.kv_cache_manager"),
    "core.stats",
)
MAY_IMPORT = {  # room -> rooms, or modules of one, that it may import beside itself
    **dict.fromkeys((*F0, "core"), F0),
    **dict.fromkeys(("kernels", "__init__"), ()),  # the door is lazy
    **dict.fromkeys(("attention", "sampling"), (*F0, "kernels")),
    "text": F0,
    "models": (*F0, "kernels", "attention"),
    "spec": (*F0, "kernels", "attention", "models", "sampling", *CORE_FOR_SPEC),
    "worker": (*F0, "core", "kernels", *F2, "spec"),
    "requests": (*F0, "core", "sampling", "text", "spec"),
    "trace": (*F0, "core", "sampling", "spec"),
    "engine": (*F0, "core", "kernels", *F2, "spec", "worker", "requests", "trace"),
    **dict.fromkeys(("cli", "server", "distributed"), (*F0, "engine", "trace", "requests", "text")),
    "__main__": ("cli",),
}


def nodes_outside_type_checking(tree):
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            yield node
            yield from nodes_outside_type_checking(node)


def imported_names(node, package):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = resolve_name("." * node.level + (node.module or ""), package)
        return [f"{module}.{alias.name}" for alias in node.names]
    return []


def is_allowed(name, room):
    top, _, inner = name.partition(".")
    if top != "folospec":
        free = room not in (*F0, "core") or (room, top) == ("core", "numpy")
        return free or top in sys.stdlib_module_names
    if room in ("cli", "server", "distributed") and inner.split(".")[0] not in MAY_IMPORT:
        return "." not in inner  # the public names: `from folospec import LLM`
    return any(f"{inner}.".startswith(f"{allowed}.") for allowed in (*MAY_IMPORT[room], room))


def violations(source, path):
    package = f"folospec/{path}".rpartition("/")[0].replace("/", ".")
    room = path.split("/")[0].removesuffix(".py")
    found = []
    for node in nodes_outside_type_checking(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and room != "cli":
            found.append(f"{path}:{node.lineno} prints")
        bad = [name for name in imported_names(node, package) if not is_allowed(name, room)]
        found += [f"{path}:{node.lineno} imports {name}" for name in bad]
    return found


def test_imports_go_down_only_and_nothing_prints():
    paths = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}
    assert [v for path, p in paths.items() for v in violations(p.read_text(), path)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("core/stats.py", "from torch.nn import Module"),
        ("spec/verify.py", "from ..core.scheduler import Scheduler"),
        ("attention/base.py", "import folospec.models"),
        ("cli/main.py", "from folospec import worker"),
        ("models/loader.py", "print(1)"),
    ],
)
def test_a_module_that_breaks_the_rules_is_caught(path, source):
    assert violations(f"def f():\n    {source}", path)
    assert violations(f"if TYPE_CHECKING:\n    {source}", path) == []
