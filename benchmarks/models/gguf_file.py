"""Reads a GGUF file: what it says about a model, and its weights in float32.

    magic, version, counts | key, type, value ... | name, sizes, type, offset ... | weights

Numbers are little-endian, a string is its length and its bytes, and a tensor's sizes begin with the
one that is contiguous. Quantised weights are in blocks of 32 along it:

    Q8_0   scale (fp16), 32 integers of 8 bits              weight = scale * integer
    Q4_1   scale, minimum (fp16), 16 bytes                  weight = scale * integer + minimum
           a byte's low half is weight i, its high half weight i + 16
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
BLOCK = 32
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are stored: the bytes of so many of them, and how those are read."""

    name: str
    block: int
    block_bytes: int
    read: Callable[[NDArray[np.uint8]], Floats]


def _halves(raw: NDArray[np.uint8]) -> Floats:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _q4_1(raw: NDArray[np.uint8]) -> Floats:
    blocks = raw.reshape(-1, 4 + BLOCK // 2)
    scale, minimum, packed = _halves(blocks[:, :2]), _halves(blocks[:, 2:4]), blocks[:, 4:]
    integers = np.concatenate([packed & 15, packed >> 4], axis=1)
    return scale * integers.astype(np.float32) + minimum


def _q8_0(raw: NDArray[np.uint8]) -> Floats:
    blocks = raw.reshape(-1, 2 + BLOCK)
    return _halves(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


FORMATS = {
    0: Format("F32", 1, 4, lambda raw: raw.view(np.float32).copy()),
    1: Format("F16", 1, 2, _halves),
    3: Format("Q4_1", BLOCK, 4 + BLOCK // 2, _q4_1),
    8: Format("Q8_0", BLOCK, 2 + BLOCK, _q8_0),
}


class GGUFFile:
    """An opened file. `metadata` is read at once, weights when they are asked for.

    Raises:
        ValueError: it is no GGUF file of version 3, it ends early, or a tensor has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = path.read_bytes()
        self._place = len(MAGIC)
        if not self._bytes.startswith(MAGIC):
            raise ValueError(f"{path} is no GGUF file: it begins with {self._bytes[:4]!r}")
        version, num_tensors, num_keys = self._next("I"), self._next("Q"), self._next("Q")
        if version != VERSION:
            raise ValueError(f"{path} must be of GGUF version {VERSION}, got {version}")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            self.metadata[key] = self._value(self._next("I"))
        self._tensors = dict(self._tensor_info() for _ in range(num_tensors))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        self._data = -(-self._place // alignment) * alignment

    def formats(self) -> dict[str, str]:
        """The format of every tensor, by name."""
        return {name: kind.name for name, (_, kind, _) in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, Floats]]:
        """Yield every tensor by name, the contiguous dimension last."""
        for name, (sizes, kind, offset) in self._tensors.items():
            num_bytes = prod(sizes) // kind.block * kind.block_bytes
            begin = self._data + offset
            if len(self._bytes) < begin + num_bytes:
                raise ValueError(f"{self.path} ends within {name}")
            raw = np.frombuffer(self._bytes, np.uint8, num_bytes, begin)
            yield name, kind.read(raw).reshape(sizes[::-1])

    def _tensor_info(self) -> tuple[str, tuple[tuple[int, ...], Format, int]]:
        name = self._string()
        sizes = tuple(self._next("Q") for _ in range(self._next("I")))
        number = self._next("I")
        if number not in FORMATS:
            known = ", ".join(f"{n} ({kind.name})" for n, kind in FORMATS.items())
            raise ValueError(f"the type of {name} must be of {known}, got {number}")
        return name, (sizes, FORMATS[number], self._next("Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._next("I"), self._next("Q")
            return [self._value(element) for _ in range(count)]
        return self._next(_SCALARS[kind])

    def _string(self) -> str:
        length = self._next("Q")
        begin, self._place = self._place, self._place + length
        return self._bytes[begin : self._place].decode()

    def _next(self, kind: str) -> Any:
        form = f"<{kind}"
        try:
            (value,) = struct.unpack_from(form, self._bytes, self._place)
        except struct.error as error:
            raise ValueError(f"{self.path} ends early") from error
        self._place += struct.calcsize(form)
        return value
