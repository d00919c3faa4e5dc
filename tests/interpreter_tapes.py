"""Remembers what Triton's interpreter does for an operation, and does it again without finding out.

Every operation of every program asks anew for the types of its operands, for what they have in
common and for the shape of the result, and then makes a few calls of the builder, which compute.
Which calls these are follows from the types of the operands and from the constants alone. So they
are recorded the first time, under the operation, the types and the constants, and replayed after.
What looks at a value, or uses one whose origin the recorder has not seen, is not replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_semantic

_PLAIN = (bool, int, str, type(None))
_PURE = ("create_splat", "create_broadcast", "create_make_range", "create_int_cast")
_LISTS = (list, tuple, tl.tuple)


class Recorder:
    """Stands in for the builder, and takes down its calls."""

    def __init__(self, builder: Any, handles: list[TensorHandle]) -> None:
        self.builder, self.handles, self.is_complete = builder, handles, True
        self.constants: list[Any] = []
        self.calls: list[tuple[str, list[Any], TensorHandle | None]] = []
        self._known = {id(handle) for handle in handles}
        self._fixed: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.builder, name)
        if not callable(member):
            return member

        def call(*args: Any, **kwargs: Any) -> Any:
            result = member(*args, **kwargs)
            self._take_down(name, args, kwargs, result)
            return result

        return call

    def _take_down(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        for arg in args:
            if isinstance(arg, TensorHandle):
                self.is_complete &= id(arg) in self._known
            elif isinstance(arg, _LISTS) and any(isinstance(each, TensorHandle) for each in arg):
                self.is_complete = False
        self.is_complete &= not kwargs
        if isinstance(result, TensorHandle):
            self._known.add(id(result))
        elif result is not None and not name.startswith("get_"):
            self.is_complete = False
        is_fixed = all(not isinstance(arg, TensorHandle) or id(arg) in self._fixed for arg in args)
        if name.startswith("get_") or (name in _PURE and is_fixed):
            self._fixed.add(id(result))
            self.constants.append(result)
        else:
            self.calls.append((name, list(args), result))

    def adopt(self, constants: list[Any]) -> None:
        """Know the constants of a tape that is replayed to this recorder."""
        for constant in constants:
            if isinstance(constant, TensorHandle) and id(constant) not in self._known:
                self._known.add(id(constant))
                self._fixed.add(id(constant))
                self.constants.append(constant)

    def tape(self, outcome: Any) -> Tape | None:
        """What was recorded; None if it cannot be replayed."""
        outcomes = outcome if type(outcome) is tuple else (outcome,)
        for one in outcomes:
            self.is_complete &= isinstance(one, tl.tensor) and id(one.handle) in self._known
        return Tape(self, outcomes, type(outcome) is tuple) if self.is_complete else None


class Tape:
    """Calls of the builder. They refer to values by place: constants, operands, then results."""

    def __init__(self, recorder: Recorder, outcomes: tuple[tl.tensor, ...], is_tuple: bool) -> None:
        self.constants = list(recorder.constants)
        for _, args, _ in recorder.calls:
            self.constants += (arg for arg in args if not isinstance(arg, TensorHandle))
        results = [result for _, _, result in recorder.calls]
        known = [*self.constants, *recorder.handles, *results]
        places = {id(value): place for place, value in reversed(list(enumerate(known)))}
        self.calls = [(name, [places[id(arg)] for arg in args]) for name, args, _ in recorder.calls]
        self.outcomes = [(places[id(one.handle)], one.type) for one in outcomes]
        self.is_tuple = is_tuple

    def replay(self, handles: list[TensorHandle]) -> Any:
        builder = interpreter_semantic.builder
        if type(builder) is Recorder:
            builder.adopt(self.constants)
        values = self.constants + handles
        for name, places in self.calls:
            values.append(getattr(builder, name)(*[values[place] for place in places]))
        if self.is_tuple:
            return tuple([tl.tensor(values[place], kind) for place, kind in self.outcomes])
        place, kind = self.outcomes[0]
        return tl.tensor(values[place], kind)


_TAPES: dict[Any, Tape | None] = {}


def taped(operation: Callable[..., Any], key: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call the operation, or do what it did before.

    Args:
        key: names the operation.
        kwargs: without semantics.
    """
    handles: list[TensorHandle] = []
    try:
        key = (key, *[_key_of(arg, handles) for arg in args])
        if kwargs:
            key += tuple([(name, _key_of(arg, handles)) for name, arg in kwargs.items()])
    except TypeError:
        return operation(*args, **kwargs)
    tape = _TAPES.get(key)
    if tape is not None:
        return tape.replay(handles)
    plain = interpreter_semantic.builder
    # x * x is no example of x * y.
    has_duplicates = len({id(handle) for handle in handles}) < len(handles)
    if key in _TAPES or has_duplicates or type(plain) is Recorder:
        return operation(*args, **kwargs)
    recorder = interpreter_semantic.builder = Recorder(plain, handles)
    try:
        outcome = operation(*args, **kwargs)
    finally:
        interpreter_semantic.builder = plain
    _TAPES[key] = recorder.tape(outcome)
    return outcome


def _key_of(arg: Any, handles: list[TensorHandle]) -> Any:
    """The type of a tensor, whose handle is added to `handles`; the type and value of a constant.

    Raises:
        TypeError: nothing is known of such an argument.
    """
    kind = type(arg)
    if kind is tl.tensor:
        handles.append(arg.handle)
        return arg.type.name
    if kind in _PLAIN:
        return kind, arg
    if kind is float:
        return kind, arg.hex()  # 0.0 == -0.0
    if kind is tl.constexpr:
        return kind, _key_of(arg.value, handles)
    if kind in _LISTS:
        return kind, tuple([_key_of(each, handles) for each in arg])
    if isinstance(arg, tl.dtype):
        return kind, arg.name
    raise TypeError(kind)


def look_at_a_value() -> None:
    """What follows depends on more than types: it cannot be replayed."""
    builder = interpreter_semantic.builder
    if type(builder) is Recorder:
        builder.is_complete = False
