"""Turns conversations into prompts, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from folospec.sampling_params import check_text, is_token_list, shown

Message = Mapping[str, Any]
"""`{"role": "user", "content": text}`; the content may be a list of parts of type "text"."""


def conversations_of(messages: Any) -> list[Sequence[Any]]:
    """Read one conversation or a list of them.

    Raises:
        ValueError: it is neither, or a conversation has no messages.
    """
    if not is_token_list(messages):
        raise ValueError(f"messages must be a list of mappings, got {shown(messages)}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    if all(is_token_list(one) for one in messages):
        return [_checked(one, f"messages[{place}]") for place, one in enumerate(messages)]
    return [conversation_of(messages)]


def conversation_of(messages: Any) -> list[dict[str, Any]]:
    """Read one conversation.

    Raises:
        ValueError: it is no list of messages, or has none.
    """
    if not is_token_list(messages):
        raise ValueError(f"messages must be a list of mappings, got {shown(messages)}")
    return _checked(messages, "messages")


def render(
    tokenizer: Any,
    conversation: Sequence[Message],
    *,
    chat_template: str | None = None,
    **options: Any,
) -> list[int]:
    """The token ids of a conversation.

    Args:
        chat_template: in place of the tokenizer's.
        options: of the tokenizer's `apply_chat_template`, and variables of the template.

    Raises:
        ValueError: there is no chat template, or it refuses the conversation or the options.
    """
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if tokenizer is None or not template:
        raise ValueError("chat needs a tokenizer with a chat template, and the model has none")
    options.setdefault("tokenizer_kwargs", {"verbose": False})  # the engine checks the length
    try:
        encoded = tokenizer.apply_chat_template(
            conversation, chat_template=chat_template, return_dict=True, **options
        )
    except Exception as error:  # templates raise errors of their own
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    return encoded["input_ids"]


def _checked(messages: Sequence[Any], name: str) -> list[dict[str, Any]]:
    if not messages:
        raise ValueError(f"{name} must hold at least one message, got none")
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, name: str) -> dict[str, Any]:
    """A message with its text in one piece; other keys are the template's."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{name} must be a mapping with 'role' and 'content', got {shown(message)}"
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{name} must have a 'role', got {shown(dict(message))}")
    check_text(f"{name}['role']", role)
    if content is None and message.get("tool_calls"):
        return dict(message)
    if content is not None and is_token_list(content):
        parts = [_part(part, f"{name}['content'][{i}]") for i, part in enumerate(content)]
        content = "".join(parts)
    if not isinstance(content, str):
        raise ValueError(
            f"{name} must have 'content', a text or a list of text parts, got "
            f"{shown(dict(message))}"
        )
    check_text(f"{name}['content']", content)
    return {**message, "content": content}


def _part(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ValueError(f'{name} must be {{"type": "text", "text": ...}}, got {shown(part)}')
    return text
