"""Mends Triton's interpreter where it computes other numbers than a card.

It keeps bfloat16 as the integers of its bits, and multiplies them as such in `tl.dot`.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def mend() -> None:
    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        return plain(self, _widen(a), _widen(b), d, *rest)

    if getattr(InterpreterBuilder, "is_mended", False):
        return
    InterpreterBuilder.is_mended = True
    InterpreterBuilder.create_dot = create_dot


def _widen(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)
