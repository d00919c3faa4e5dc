"""Tasks of real use, for a chat model; their texts are in models/prompts, written for this.

    chat            questions and wishes that are answered at length
    code            code from where the body of a function begins; no conversation
    file_editing    a file again, with one thing changed
    summary         a text made shorter, with quotations
    extraction      facts of a text as JSON
    translation     French to English

Conversations go through the tokenizer's chat template. A file of prompts has frames and subjects,
and an item is one of each; the first items have all subjects once. `shots` are examples that stand
before, as turns of the same conversation. The reply to an edit is begun: its prompt ends behind the
first line that changes, as where an editor asks for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.lib.prompts import held_out_prompts
from benchmarks.lib.task_item import Item

PROMPTS = Path(__file__).parents[1] / "models" / "prompts"
CODE_TOKENS = 128

Messages = list[dict[str, str]]


def conversations(name: str, tokenizer: Any, count: int) -> list[Item]:
    """The first items of a file of frames and subjects; fewer than `count` if it has fewer."""
    task = read_prompts(name)
    frames, subjects = task["frames"], task["subjects"]
    items = []
    for index in range(min(count, len(frames) * len(subjects))):
        frame = frames[(index + index // len(subjects)) % len(frames)]
        messages: Messages = []
        for question, answer in task.get("shots", ()):
            messages += [_user(frame.format(question)), {"role": "assistant", "content": answer}]
        messages.append(_user(frame.format(subjects[index % len(subjects)])))
        items.append(Item(encode(tokenizer, messages), task["max_tokens"]))
    return items


def code(tokenizer: Any, count: int) -> list[Item]:
    """Code from a function's head on, which ends with its colon."""
    prompts = held_out_prompts(tokenizer, count, newline=False)
    return [Item(ids, CODE_TOKENS) for ids in prompts]


def file_edits(tokenizer: Any, count: int) -> list[Item]:
    """Edits of the files of file_editing.json: the first edit of each file, then the second."""
    task = read_prompts("file_editing")
    items = []
    for name, text, edit in islice(_edits(task["files"]), count):
        question = task["frame"].format(name=name, text=text, instruction=edit["instruction"])
        shown, rest = edited(text, edit["old"], edit["new"])
        prompt = encode(tokenizer, [_user(question)], f"{name}:\n```\n{shown}")
        left = _ids(tokenizer, rest)  # behind the change nothing differs from the original
        items.append(Item(prompt, task["max_tokens"], left, left))
    return items


def edited(text: str, old: str, new: str) -> tuple[str, str]:
    """The text with the first `old` replaced, divided behind the line where the replacement ends.

    Raises:
        ValueError: the text does not have `old`.
    """
    if old not in text:
        raise ValueError(f"old must be in the text, got {old!r}")
    before, _, after = text.partition(old)
    line, newline, rest = after.partition("\n")
    if new.endswith("\n"):
        return before + new, after
    return before + new + line + newline, rest


def encode(tokenizer: Any, messages: Messages, reply: str = "") -> list[int]:
    """Token ids of a conversation up to the reply, and of the beginning of the reply."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return _ids(tokenizer, text + reply)


def read_prompts(name: str) -> dict[str, Any]:
    return json.loads((PROMPTS / f"{name}.json").read_text(encoding="utf-8"))


def _edits(files: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, str]]]:
    for turn in range(max(len(file["edits"]) for file in files)):
        for file in files:
            if turn < len(file["edits"]):
                yield file["name"], "\n".join(file["lines"]) + "\n", file["edits"][turn]


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


CHAT_TASKS: dict[str, Callable[[Any, int], list[Item]]] = {
    "chat": partial(conversations, "chat"),
    "code": code,
    "file_editing": file_edits,
    "summary": partial(conversations, "summary"),
    "extraction": partial(conversations, "extraction"),
    "translation": partial(conversations, "translation"),
}
