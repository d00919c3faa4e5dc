"""What the acceptance benchmark has written: completions of code, edits of code, and prose.

These are for the bundled models, which know no conversations; `chat_tasks` has those for a chat
model. All texts come from the modules of the standard library that the demo models were not trained
on; see `training/corpus.py`. Whether a drafter can guess a text depends on what the text is:

    completion        code from where the body of a function begins
    editing           a function again, with one of its names changed
    editing_steered   the same, by a target that is held to the edit
    prose             docstrings, from their beginning
"""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from benchmarks.lib.chat_tasks import CHAT_TASKS
from benchmarks.lib.prompts import held_out_prompts, held_out_texts
from benchmarks.lib.task_item import Item
from folospec import SamplingParams

ORIGINALS_SHOWN = 2
"""How often the prompt of an edit has the original: a small model copies better what it has seen
repeated."""
EDITED_TOKENS = range(80, 161)
"""Sizes of the functions: with the originals in front, they fit where the model reads best."""
STEERING_BONUS = 6.0
NEW_NAMES = ("item", "value", "result", "entry", "current", "other")
COMPLETION_TOKENS = 64
PROSE_PROMPT_TOKENS = 48
PROSE_TOKENS = 48
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DOCUMENTED = (*_FUNCTIONS, ast.ClassDef, ast.Module)

Encode = Callable[[str], list[int]]


class Steering:
    """A logits processor that adds `bonus` to the token which the expected text has at this place.

    It stands in for a target that was trained to follow instructions, as the demo model was not. It
    is a function of its arguments, so plain and speculative runs are steered alike.
    """

    def __init__(self, expected_token_ids: Sequence[int], bonus: float = STEERING_BONUS) -> None:
        self.expected_token_ids, self.bonus = expected_token_ids, bonus

    def __call__(self, output_token_ids: list[int], logits: Tensor) -> Tensor:
        place = len(output_token_ids)
        if place >= len(self.expected_token_ids):
            return logits
        steered = logits.clone()
        steered[self.expected_token_ids[place]] += self.bonus
        return steered


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    items: list[Item]
    steered: bool = False
    """Whether the target is held to the expected text. Drafters that run a model through the
    request's own options would be held to it too, so they have no part in it."""

    def params(
        self, index: int, temperature: float, *, repetition: int = 0, with_prediction: bool = False
    ) -> SamplingParams:
        """How item `index` is sampled. The seed is a function of the item and the repetition; a
        prediction may only be sent to engines with a drafter that reads it."""
        item = self.items[index]
        return SamplingParams(
            temperature=temperature,
            max_tokens=item.max_tokens,
            ignore_eos=True,
            seed=1000 * repetition + index,
            prediction=(list(item.prediction_token_ids) or None) if with_prediction else None,
            logits_processors=[Steering(item.expected_token_ids)] if self.steered else (),
        )


def make_task(name: str, tokenizer: Any, count: int, max_tokens: int | None = None) -> Task:
    """Build a task of `count` items, of at most `max_tokens` each. The choice is fixed for a given
    Python version, and the first items do not depend on `count`.

    Raises:
        ValueError: there is no such task, or the held-out modules do not give as many items.
    """
    if name not in ALL_TASKS:
        raise ValueError(f"task must be one of {', '.join(ALL_TASKS)}, got {name!r}")
    items = ALL_TASKS[name](tokenizer, count)
    if len(items) < count:
        raise ValueError(f"there are {len(items)} items of {name}, got {count=}")
    if max_tokens is not None:
        items = [replace(item, max_tokens=min(max_tokens, item.max_tokens)) for item in items]
    return Task(name, items, steered=name == "editing_steered")


def completions(tokenizer: Any, count: int) -> list[Item]:
    return [Item(ids, COMPLETION_TOKENS) for ids in held_out_prompts(tokenizer, count)]


def edits(tokenizer: Any, count: int) -> list[Item]:
    """Functions with one name changed. The prompt is the original, several times, then the edit up
    to the end of the first line that shows the new name."""
    encode = _encoder(tokenizer)
    items: list[Item] = []
    for source in _shuffled(held_out_functions()):
        original = encode(source)
        if len(items) == count:
            break
        if len(original) in EDITED_TOKENS and (edit := _edit(source, encode)) is not None:
            items.append(edit)
    return items


def _edit(source: str, encode: Encode) -> Item | None:
    names = renameable(source)
    new = next((name for name in NEW_NAMES if not _has(source, name)), None)
    if not names or new is None:
        return None
    lines = rename(source, names[0], new).splitlines(keepends=True)
    shown = 1 + next(i for i, line in enumerate(lines) if _has(line, new))
    rest = "".join(lines[shown:])
    expected = encode(rest)
    if len(expected) < EDITED_TOKENS.start // 2 or not _has(rest, new):
        return None
    return Item(
        encode(source + "\n\n") * ORIGINALS_SHOWN + encode("".join(lines[:shown])),
        len(expected),
        expected,
        encode("".join(source.splitlines(keepends=True)[shown:])),
    )


def _has(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


def renameable(source: str) -> list[str]:
    """The arguments and variables of a function that occur three times or more, the rarest
    first."""
    uses: Counter[str] = Counter()
    own: set[str] = set()
    for node in ast.walk(ast.parse(_standalone(source))):
        if isinstance(node, ast.arg):
            uses[node.arg] += 1
            own.add(node.arg)
        elif isinstance(node, ast.Name):
            uses[node.id] += 1
            if isinstance(node.ctx, ast.Store):
                own.add(node.id)
    frequent = [name for name in own - {"self", "cls"} if uses[name] >= 3]
    return sorted(frequent, key=lambda name: (uses[name], name))


def rename(source: str, old: str, new: str) -> str:
    """Replace a name wherever it stands as a whole word."""
    return re.sub(rf"\b{old}\b", new, source)


def prose(tokenizer: Any, count: int) -> list[Item]:
    encode = _encoder(tokenizer)
    texts = (encode(f'"""{text}') for text in _shuffled(held_out_prose()))
    return [
        Item(ids[:PROSE_PROMPT_TOKENS], PROSE_TOKENS)
        for ids in texts
        if len(ids) >= PROSE_PROMPT_TOKENS + PROSE_TOKENS
    ][:count]


@cache
def held_out_functions() -> list[str]:
    """The sources of all functions and methods of the held-out modules, as they are indented."""
    found = []
    for text in held_out_texts():
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, _FUNCTIONS):
                found.append("".join(lines[node.lineno - 1 : node.end_lineno]).rstrip() + "\n")
    return list(dict.fromkeys(found))


@cache
def held_out_prose() -> list[str]:
    """The docstrings of the held-out modules, without paragraphs that are code, tables or lists."""
    found = []
    for text in held_out_texts():
        for node in ast.walk(ast.parse(text)):
            docstring = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
            paragraphs = list(filter(_is_prose, (docstring or "").split("\n\n")))
            found.append("\n\n".join(paragraphs))
    return [text for text in dict.fromkeys(found) if text]


def _is_prose(paragraph: str) -> bool:
    """Sentences: flush left, ended by a stop, nearly all of it letters."""
    lines = paragraph.splitlines()
    return (
        all(line[:1].strip() for line in lines)
        and paragraph.rstrip().endswith((".", "!", "?", ":"))
        and ">>>" not in paragraph
        and sum(c.isalpha() or c in " \n,.'" for c in paragraph) > 0.95 * len(paragraph)
    )


def _standalone(source: str) -> str:
    """Source that parses on its own: a method's is put under a block, its lines as they are."""
    return f"if True:\n{source}" if source[0].isspace() else source


def _shuffled(texts: Sequence[str]) -> Iterator[str]:
    order = list(texts)
    random.Random(0).shuffle(order)
    return iter(order)


def _encoder(tokenizer: Any) -> Encode:
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


TASKS: dict[str, Callable[[Any, int], list[Item]]] = {
    "completion": completions,
    "editing": edits,
    "editing_steered": edits,
    "prose": prose,
}
"""For the bundled models."""
ALL_TASKS = {**TASKS, **CHAT_TASKS}
