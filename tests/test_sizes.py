"""Modules and functions of the package stay small enough to read at once."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "folospec"
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 60
GPU_KERNELS = {  # their bodies are unrolled by hand
    *("attend", "_launch", "attend_kernel", "rotate_and_write"),
}


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_module_is_long():
    sizes = {path: path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert len(sizes) > 150
    assert {path.name: size for path, size in sizes.items() if size > MOST_LINES} == {}


def test_no_function_is_long_but_the_gpu_kernels_that_are_named():
    long = {
        (path.relative_to(PACKAGE).parts[:2], name)
        for path in PACKAGE.rglob("*.py")
        for name, size in functions(path)
        if size > MOST_LINES_OF_A_FUNCTION
    }
    assert long == {(("kernels", "gpu"), name) for name in GPU_KERNELS}
