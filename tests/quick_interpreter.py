"""Makes Triton's interpreter quick: it spends its time on types, not on numbers.

Each operation of each program makes its types anew. Here a type is made once and remembered, with
what follows from it; and no overflow is computed that nobody looks at.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def make_quick() -> None:
    _remember_block_types()
    _remember_tensor_shapes()
    _remember_facts_of_types()
    _remember_numpy_types()
    _call_builtins_directly()
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
    """Without the two functions around each that look whether it was given its semantics."""

    def replace(target: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        while hasattr(member, "__wrapped__"):
            member = member.__wrapped__

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        scope.set_attr(target, name, call)

    interpreter._patch_attr = replace
