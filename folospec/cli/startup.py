"""What a terminal shows while a model loads: nothing is printed where nobody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from folospec.cli.render import console

if TYPE_CHECKING:
    from folospec.engine.llm_engine import LLMEngine


@contextmanager
def shows_loading(model: str) -> Iterator[None]:
    """Show on a terminal's stderr that the model loads, until it has. Warnings, such as that the
    kernels compile, are printed above."""
    with console(stderr=True).status(f"loading {model}"):
        yield


def show_loaded(model: str, engine: LLMEngine) -> None:
    """Say on a terminal's stderr what was loaded, in one line."""
    to = console(stderr=True)
    if to.is_terminal:
        to.print(describe(model, engine), style="dim")


def describe(model: str, engine: LLMEngine) -> str:
    """The model, its type, its device, and the attention that reads its KV."""
    facts = engine.stats()
    where = f"{facts['dtype']} on {facts['device']}"
    return f"{model}: {where}, {facts['attention_backend']} attention"
