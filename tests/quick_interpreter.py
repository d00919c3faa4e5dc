"""Makes Triton's interpreter quick: it spends its time on types, not on numbers.

Each operation of each program makes its types anew. Here a type is made once and remembered, with
what follows from it, and so is what an operation does (`interpreter_tapes`); a function that occurs
in several modules is rewritten once; and no overflow is computed that nobody looks at.
"""

import linecache
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import triton.language as tl
from interpreter_tapes import look_at_a_value, taped
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def make_quick() -> None:
    _remember_block_types()
    _remember_tensor_shapes()
    _remember_facts_of_types()
    _remember_numpy_types()
    _call_builtins_directly()
    _notice_values()
    _remember_sizes()
    _remember_rewritten_code()
    if not interpreter.interpreter_builder.options.debug:  # computed, and then not asserted
        TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None


def _remember_block_types() -> None:
    plain = tl.block_type.__init__
    made: dict[Any, dict[str, Any]] = {}

    def init(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        sizes = (size.value if isinstance(size, tl.constexpr) else size for size in shape)
        key = (element_ty.name, *sizes)
        if key not in made:
            plain(self, element_ty, shape)
            made[key] = dict(self.__dict__)
        self.__dict__.update(made[key])

    tl.block_type.__init__ = init


def _remember_tensor_shapes() -> None:
    plain = tl.tensor.__init__
    shapes: dict[Any, tuple[Any, Any]] = {}

    def init(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            plain(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    tl.tensor.__init__ = init


def _remember_facts_of_types() -> None:
    for name in ("is_int", "is_int_signed", "is_int_unsigned", "is_floating", "kind"):
        plain = getattr(tl.dtype, name)
        setattr(tl.dtype, name, _by_name(plain))
    plain = TritonSemantic.computation_type_impl
    found: dict[Any, tl.dtype] = {}

    def computation_type(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod):
        key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
        if key not in found:
            found[key] = plain(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return found[key]

    TritonSemantic.computation_type_impl = computation_type


def _by_name(plain: Callable[[tl.dtype], Any]) -> Callable[[tl.dtype], Any]:
    found: dict[str, Any] = {}

    def fact(self: tl.dtype) -> Any:
        if self.name not in found:
            found[self.name] = plain(self)
        return found[self.name]

    return fact


def _remember_numpy_types() -> None:
    plain = interpreter._get_np_dtype
    found: dict[str, np.dtype] = {}

    def numpy_type(dtype: tl.dtype) -> np.dtype:
        if dtype.name not in found:
            found[dtype.name] = plain(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = numpy_type


def _call_builtins_directly() -> None:
    """Taped, and without the two functions around each that look whether it has its semantics."""

    def replace(target: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        while hasattr(member, "__wrapped__"):
            member = member.__wrapped__
        operation = partial(member, _semantic=interpreter.interpreter_semantic)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("_semantic", None)
            return taped(operation, member, args, kwargs)

        scope.set_attr(target, name, call)

    interpreter._patch_attr = replace


def _notice_values() -> None:
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        for name in ("__bool__", "__index__", "__repr__", "__str__"):
            scope.set_attr(tensor, name, _noticed(getattr(tensor, name)))

    interpreter._patch_lang_tensor = patch


def _noticed(look: Callable[[tl.tensor], Any]) -> Callable[[tl.tensor], Any]:
    def noticed(self: tl.tensor) -> Any:
        look_at_a_value()
        return look(self)

    return noticed


def _remember_sizes() -> None:
    """Whether an array's elements fit into a type, asked of every array that is made."""
    plain = interpreter._validate_np_data_size
    fits: dict[Any, bool] = {}

    def validate(array: np.ndarray, dtype: tl.dtype) -> bool:
        key = array.itemsize, dtype.name
        if key not in fits:
            fits[key] = plain(array, dtype)
        return fits[key]

    def init(self: Any, data: np.ndarray, dtype: tl.dtype) -> None:
        self.data, self.dtype, self.attr = data, dtype, {}
        if not interpreter._validate_np_data_size(data, dtype):
            self.__post_init__()  # raises

    interpreter._validate_np_data_size = validate
    interpreter.TensorHandle.__init__ = init


def _remember_rewritten_code() -> None:
    """A module with a broken rule has the functions of the right one, but for that rule.

    A traceback names the file in which the text was seen first.
    """
    codes: dict[str, Any] = {}

    def rewrite(self: Any) -> Callable[..., Any]:
        code = self.fn.__code__
        start, text = _definition(linecache.getlines(code.co_filename), code.co_firstlineno)
        if text not in codes:
            self.def_file_lineno = start
            codes[text] = compile(self._transform_ast(text), code.co_filename, "exec")
        seen = self.fn.__globals__
        for name, value in vars(interpreter).items():
            seen.setdefault(name, value)
        made = dict(self.kwargs)
        exec(codes[text], seen, made)
        return made[self.fn.__name__]

    interpreter.FunctionRewriter.rewrite_ast = rewrite


def _definition(lines: list[str], number: int) -> tuple[int, str]:
    """A function whose decorators begin at that line: the line of its `def`, and its text."""
    start = next(at for at in range(number - 1, len(lines)) if lines[at].startswith("def "))
    end = start + 1
    while end < len(lines) and lines[end][:1] in (" ", "\n", "#", ")"):
        end += 1
    return start + 1, "".join(lines[start:end])
