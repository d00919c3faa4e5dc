"""Calls the native CPU kernels: the library, its structs, and its functions on tensors.

`load()` gives the library or None; whoever has another form to fall back on asks it. What the
structs mean is said beside their duplicates in `cpu/*.h`.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from folospec.kernels.build import SOURCES, BuildError
from folospec.kernels.build import load as load_library
from folospec.kernels.checked import pack_ids, pointer
from folospec.kernels.prebuilt import is_prebuilt
from folospec.kernels.torch_ops import Int8Weight

logger = logging.getLogger(__name__)

Weight = Tensor | Int8Weight
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("data", "scale", "bias")),
        *((name, c_int64) for name in ("out_size", "in_size", "format")),
    ]


class AttentionStep(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int64)
            for name in ("rows", "heads", "kv_heads", "head_size", "block_size", "table_width")
        ),
        *(
            (name, c_void_p)
            for name in (
                "row_seq",
                "num_keys",
                "first_key",
                "context_lens",
                "block_table",
                "tail_start",
                "tail_slots",
                "group_start",
            )
        ),
        ("groups", c_int64),
        ("scale", c_double),
        ("softcap", c_double),
        ("kv_format", c_int64),
    ]


class Pages(ctypes.Structure):
    _fields_ = [("key", c_void_p), ("value", c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "query_norm", "key_norm", "post_norm")),
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        ("pages", Pages),
        *((name, c_int64) for name in ("window", "skip_attention", "skip_mlp")),
    ]


class ModelStruct(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("num_layers", "hidden", "inner")),
        ("eps", c_double),
        ("embedding", c_void_p),
        ("embedding_format", c_int64),
        ("final_norm", c_void_p),
        ("layers", POINTER(Layer)),
    ]


class Pass(ctypes.Structure):
    _fields_ = [
        ("attention", AttentionStep),
        *(
            (name, c_void_p)
            for name in (
                "input_ids",
                "positions",
                "slot_mapping",
                "cos",
                "sin",
                "window_first",
                "hidden",
                "aux_hidden_states",
                "scratch",
            )
        ),
        ("threads", c_int64),
    ]


class Chains(ctypes.Structure):
    _fields_ = [
        ("attention", AttentionStep),
        ("lm_head", POINTER(Matrix)),
        *((name, c_void_p) for name in ("cos", "sin", "windows")),
        ("num_windows", c_int64),
        *(
            (name, c_void_p)
            for name in ("starts", "all_params", "wanted", "lengths", "min_probability")
        ),
        ("most", c_int64),
        *((name, c_void_p) for name in ("logits", "tokens", "chances", "found", "scratch")),
        ("threads", c_int64),
    ]


_STRUCTS = (Matrix, AttentionStep, Layer, ModelStruct, Pass, Chains)
_POINTER, _COUNT = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "sizes": (None, (_POINTER,)),
    "instruction_set": (c_char_p, ()),
    "scratch_floats": (c_int64, (_POINTER, _POINTER)),
    "forward": (None, (_POINTER, _POINTER)),
    "chain_floats": (c_int64, (_POINTER, _POINTER)),
    "chains": (c_int64, (_POINTER, _POINTER)),
    "linear": (None, (_POINTER, _POINTER, _POINTER, _COUNT, _POINTER, _COUNT)),
    "attention": (None, (*[_POINTER] * 7, _COUNT)),
    "rms_norm": (None, (_POINTER, _POINTER, _COUNT, _COUNT, c_double, _POINTER)),
    "rotate": (None, (_POINTER, _POINTER, _POINTER, _COUNT, _COUNT, _COUNT)),
    "silu_mul": (None, (_POINTER, _COUNT, _COUNT, _POINTER)),
    "move_rows": (None, (_POINTER, _POINTER, _COUNT, _POINTER, _POINTER, _COUNT, _POINTER)),
    "read": (ctypes.c_float, (_POINTER, _COUNT, _COUNT)),
}


class Native:
    """The library. Its plain functions trust their caller; `apply_linear` and `move` do not.

    Args:
        target: the instruction set to build for; None: this machine's own.
        sources: the folder of kernels.cpp and its headers.

    Raises:
        BuildError: it cannot be built or loaded; the message says why.
    """

    forward: Callable[..., None]
    linear: Callable[..., None]
    attention: Callable[..., None]
    scratch_floats: Callable[..., int]
    chains: Callable[..., int]
    chain_floats: Callable[..., int]
    sizes: Callable[..., None]
    instruction_set: Callable[[], bytes]
    move_rows: Callable[..., None]
    rms_norm: Callable[..., None]
    rotate: Callable[..., None]
    silu_mul: Callable[..., None]
    read: Callable[..., float]

    def __init__(self, target: str | None = None, sources: Path = SOURCES) -> None:
        self.library = load_library(target, sources)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, f"folospec_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        sizes = (c_int64 * len(_STRUCTS))()
        self.sizes(sizes)
        assert list(sizes) == [ctypes.sizeof(s) for s in _STRUCTS], "structs differ from cpu/*.h"

    @property
    def path(self) -> Path:
        """The library's file."""
        return Path(self.library._name)

    @property
    def origin(self) -> str:
        """Where it comes from: "prebuilt" with the package, or "compiled" here."""
        return "prebuilt" if is_prebuilt(self.path) else "compiled"

    @property
    def instructions(self) -> str:
        """What the library was built for, as it says itself: "AVX-512 with bfloat16"."""
        return str(self.instruction_set().decode())

    def apply_linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """`x @ weight.T + bias`: float32 [rows, in] -> float32 [rows, out]. For a bfloat16 weight
        `x` is rounded to bfloat16 first; sums are float32.

        Raises:
            ValueError: `x` has another number of columns than the weight, or is elsewhere.
        """
        x = x.float().contiguous()
        rows = x.shape[0]  # where a step takes a millisecond, len() of a tensor, Python code, shows
        out = floats(rows, weight.out_size)
        room = floats(rows, weight.in_size + 31)
        self.linear(
            ctypes.byref(weight),
            pointer("x", x, torch.float32, (None, weight.in_size)),
            room.data_ptr(),
            rows,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def move(
        self, tensors: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """Copy rows of every tensor to other rows; all are read before any is written.

        Raises:
            ValueError: a tensor is not contiguous on the CPU, or the lists are not of one length
                and of rows that every tensor has.
        """
        rows = [pack_ids("sources", sources), pack_ids("targets", targets)]
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} rows cannot move to {len(targets)} places")
        if not tensors or not sources:
            return
        last = min(len(tensor) for tensor in tensors) - 1
        for ids in rows:
            if min(ids) < 0 or max(ids) > last:
                raise ValueError(f"rows must be in 0 .. {last}, got {min(ids)} .. {max(ids)}")
        row_bytes = [t[0].numel() * t.element_size() for t in tensors]
        held = ctypes.create_string_buffer(len(sources) * max(row_bytes))
        self.move_rows(
            (c_void_p * len(tensors))(*(pointer("tensor", t, t.dtype, t.shape) for t in tensors)),
            (c_int64 * len(tensors))(*row_bytes),
            len(tensors),
            *(ids.buffer_info()[0] for ids in rows),
            len(sources),
            held,
        )


def floats(*shape: int) -> Tensor:
    """Room for what the kernels write: float32 on the CPU, whatever torch's defaults are set to."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def matrix(weight: Weight, bias: Tensor | None = None) -> Matrix:
    """Describe a weight, [out, in], and its float32 bias where they lie; the caller keeps both.

    Raises:
        ValueError: one is not contiguous on the CPU, or not of a type and shape that fit.
    """
    values, scale = weight if isinstance(weight, Int8Weight) else (weight, None)
    allowed = (torch.float32, torch.bfloat16) if scale is None else (torch.int8,)
    if values.dtype not in allowed:
        raise ValueError(f"a weight must be one of {allowed}, got {values.dtype}")
    out_size = len(values)
    return Matrix(
        pointer("a weight", values, values.dtype, (None, None)),
        None if scale is None else pointer("its scale", scale, torch.float32, (out_size,)),
        None if bias is None else pointer("its bias", bias, torch.float32, (out_size,)),
        *values.shape,
        FORMATS[values.dtype],
    )


def why_not() -> str | None:
    """Say why the native kernels do not run here; None if they do."""
    return _loaded()[1]


def load() -> Native | None:
    """The library, prebuilt or built at the first call; None where it cannot run, which is logged
    once.

    FOLOSPEC_KERNELS=torch in the environment leaves it out, and so does FOLOSPEC_KERNELS=triton,
    which lets interpreted Triton kernels stand in (see `gpu.sampling`).
    """
    return _loaded()[0]


@lru_cache(maxsize=1)
def _loaded() -> tuple[Native | None, str | None]:
    wanted = os.environ.get("FOLOSPEC_KERNELS", "auto")
    if wanted not in ("auto", "torch", "triton"):
        raise ValueError(f"FOLOSPEC_KERNELS must be auto, torch or triton, got {wanted!r}")
    if wanted != "auto":
        return None, f"FOLOSPEC_KERNELS={wanted} leaves them out"
    try:
        return Native(), None
    except BuildError as error:
        logger.warning("the native CPU kernels are off, slower forms run instead: %s", error)
        return None, str(error)
