"""Checks the values of options.

Each check raises ValueError with the value and what is allowed.
"""

from __future__ import annotations


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def require_count(name: str, value: object) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(ok, name, value, "an integer of at least 1")


def require_bool(name: str, value: object) -> None:
    require(isinstance(value, bool), name, value, "True or False")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    require(value in choices, name, value, f"one of {', '.join(choices)}")
