"""One message of a row: its role, its content, and the fields that a server passes to a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from sglang_auf.training.text.rows import BadRow
from sglang_auf.training.text.tools import calls_of

Message: TypeAlias = dict[str, Any]
"""role and content (text, or a list of {"type": "text", "text": ...}), and where they are given name, tool_call_id,
reasoning_content and tool_calls."""

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function")},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "observation": "tool",
}
"""Roles of OpenAI, and of the dumps of ShareGPT, as a server knows them. Upper case counts as lower case."""

READ = {"role", "from", "content", "value", "name", "tool_call_id", "reasoning_content", "tool_calls", "weight"}
"""Fields of messages that have a meaning here."""
CONTENT = ("content", "value")
UNREAD = {
    *("id", "message_id", "openai_id", "uuid", "parent_id", "idx", "turn_identifier", "model", "source", "dataset"),
    *("timestamp", "created", "created_at", "create_time", "date", "lang", "language", "country", "state", "header"),
    *("hashed_ip", "toxic", "redacted", "token_counter", "temperature", "top_p", "markdown", "text"),
}
"""Fields of messages in public dumps (ShareGPT, WildChat, LMSYS, OpenAssistant) that no server passes to a template."""


def texts(message: Message) -> list[str]:
    """What the message says: its content, or the parts of it."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def given(fields: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Fields with something in them, under names of lower case. null, "", [] and {} are nothing, as in most dumps.

    An empty content is one: a server renders it.
    """
    found: dict[str, Any] = {}
    for name, value in ((name.lower(), value) for name, value in fields.items()):
        if value is None or (value in ("", [], {}) and not (name in CONTENT and value == "")):
            continue
        if found.setdefault(name, value) is not value:
            raise BadRow(f"{what} with the field {name!r} twice, in upper and lower case")
    return found


def message_of(part: Mapping[str, Any]) -> Message:
    """One message as the server's request models keep it (`ChatCompletionMessageParam` of SGLang)."""
    unknown = sorted(part.keys() - READ - UNREAD)
    if unknown:
        raise BadRow(f"a message with the field {unknown[0]!r}, which has no known meaning: remove or rename it")
    role = _role(part)
    message: Message = {"role": role, "content": _content(part)}
    if role == "user" and not any(text.strip() for text in texts(message)):
        raise BadRow("an empty message of a user")
    if role != "user":  # the server passes on only what a user says
        message |= {name: text_in(part[name], name) for name in ("name", "tool_call_id") if name in part}
    if role == "assistant":
        if "reasoning_content" in part:
            message["reasoning_content"] = text_in(part["reasoning_content"], "reasoning_content")
        if "tool_calls" in part:
            message["tool_calls"] = calls_of(part["tool_calls"])
    elif "reasoning_content" in part or "tool_calls" in part:
        raise BadRow(f"reasoning_content or tool_calls in a message of role {role!r}")
    return message


def _role(part: Mapping[str, Any]) -> str:
    said = {part[name] if isinstance(part[name], str) else "" for name in ("role", "from") if name in part}
    if not said or "" in said:
        raise BadRow("a message without a role")
    roles = {ROLES.get(role.strip().lower()) for role in said}
    if None in roles:
        raise BadRow(f"a message of role {min(said)[:40]!r}, which no server knows: write one of {', '.join(ROLES)}")
    if len(roles) > 1:
        raise BadRow(f"a message with two roles: {', '.join(sorted(said))}")
    return str(roles.pop())


def _content(part: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """A message needs none beside tool_calls."""
    said = [part[name] for name in CONTENT if name in part]
    if not said and "tool_calls" in part:
        return ""
    if not said:
        raise BadRow("a message without content")
    if said[0] != said[-1]:
        raise BadRow("a message with a content and another value")
    if not isinstance(said[0], list):
        return text_in(said[0], "content")
    return [{"type": "text", "text": _text_part(chunk)} for chunk in said[0]]


def _text_part(chunk: Any) -> str:
    chunk = {name: value for name, value in chunk.items() if value is not None} if isinstance(chunk, dict) else {}
    if chunk.get("type") != "text" or chunk.keys() != {"type", "text"}:
        raise BadRow('content with a part that is not {"type": "text", "text": ...}')
    return text_in(chunk["text"], "content")


def is_untrained(part: Mapping[str, Any]) -> bool:
    """Of an answer. Dumps also give a weight to questions, which are never trained on."""
    weight = part.get("weight", 1)
    if weight not in (0, 1):
        raise BadRow("a weight that is neither 0 nor 1")
    return bool(weight == 0)


def text_in(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} that is no text")
    require_unicode(value)
    return value


def require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("content with half a surrogate pair, which no tokenizer takes") from None
