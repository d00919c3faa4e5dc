"""Defines a list that drafters may read and not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt


class ReadOnlyList(Sequence[int]):
    """A view of a list of integers: it shows what the list holds, also after the list has grown,
    and has no way to change it. It costs no copy; a slice is a new list of the caller's own.
    """

    __slots__ = ("_values",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, values: list[int]) -> None:
        self._values = values

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._values[index]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[int]:
        return iter(self._values)

    def __contains__(self, value: object) -> bool:
        return value in self._values

    def __eq__(self, other: object) -> bool:
        return self._values == (other._values if isinstance(other, ReadOnlyList) else other)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self._values, dtype=dtype)

    def __repr__(self) -> str:
        return f"ReadOnlyList({self._values!r})"
