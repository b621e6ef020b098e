"""The fields of a row as a chat: what a request to a server would hold. One reading for all commands.

A row holds its conversation in one of these forms; docs/training.md says what else it may hold.

    {"messages": [{"role": "user", "content": ...}, ...]}            OpenAI; also as "conversation"
    {"conversations": [{"from": "human", "value": ...}, ...]}        ShareGPT
    {"turns": ["...", ...]}                                          user turns alone: a prompt row
    {"prompt": [messages], "completion": [messages]}                 TRL
    {"instruction": "...", "input": "...", "output": "..."}          Alpaca; without an output a prompt row
    {"prompt": "..."}, {"prompt": [messages]}                        only where rows are asked and not trained on

A chat template sees messages, tools and its own variables. So each of these is taken as the server takes it, or the row
is refused: nothing that changes the text is left out. A message may hold only fields that are known. A row may hold
any field beside those that are known to have a meaning, since nothing reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeAlias

from sglang_auf.training.text.rows import BadRow
from sglang_auf.training.text.tools import calls_of, tools_of

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

FORMS = (("messages",), ("conversations",), ("conversation",), ("turns",), ("prompt", "completion"))
SYSTEM = ("system", "system_prompt", "system_message")
REFUSED = {
    **dict.fromkeys(("functions", "function_call"), "write tools, and tool_calls in the messages"),
    **dict.fromkeys(
        ("enable_thinking", "thinking", "reasoning_effort", "documents"), "write it into chat_template_kwargs"
    ),
    **dict.fromkeys(("reasoning", "reasoning_content"), "write reasoning_content into the answer's message"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text can be trained on"),
    **dict.fromkeys(
        ("weight", "loss_mask", "labels", "completion_mask", "assistant_masks"),
        "write a weight of 0 or 1 into the answers' messages",
    ),
    "input_ids": "write prompt_ids and response_ids",
    "history": "write all turns as messages",
    "tool_choice": 'leave it out, which is "auto"',
    **dict.fromkeys(("chat_template", "add_generation_prompt", "continue_final_message"), "leave it out"),
}
"""Field of a row -> what to do instead. Each would change the text, or what is trained on."""
NEUTRAL = {"weight": 1, "tool_choice": "auto"}
"""Values of these fields that change nothing."""

READ = {"role", "from", "content", "value", "name", "tool_call_id", "reasoning_content", "tool_calls", "weight"}
"""Fields of messages that have a meaning here."""
CONTENT = ("content", "value")
UNREAD = {
    *("id", "message_id", "openai_id", "uuid", "parent_id", "idx", "turn_identifier", "model", "source", "dataset"),
    *("timestamp", "created", "created_at", "create_time", "date", "lang", "language", "country", "state", "header"),
    *("hashed_ip", "toxic", "redacted", "token_counter", "temperature", "top_p", "markdown", "text"),
}
"""Fields of messages in public dumps (ShareGPT, WildChat, LMSYS, OpenAssistant) that no server passes to a template."""


@dataclass(frozen=True, slots=True)
class Chat:
    """tools: as the template gets them. template_kwargs: its variables. untrained: indices of answers of weight 0."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def first(self, count: int) -> Self:
        """With the first messages alone; a negative count leaves out so many at the end."""
        return replace(self, messages=self.messages[:count])

    def from_first_question(self) -> Self:
        """Without the answers before what the user says first; unchanged where more than such answers would go."""
        before = next((index for index, message in enumerate(self.messages) if message["role"] == "user"), 0)
        led = [index for index in self.answers if index < before]
        if any(message["role"] in ("tool", "function") for message in self.messages[:before]):
            return self
        messages = [message for index, message in enumerate(self.messages) if index not in led]
        untrained = frozenset(index - len(led) for index in self.untrained if index >= before)
        return replace(self, messages=messages, untrained=untrained)

    def strings(self) -> Iterator[str]:
        """Every text that may come into the rendered one."""
        return _strings([self.messages, self.tools, self.template_kwargs])

    def require_thinking(self, thinking: bool | None) -> None:
        """Raise BadRow where the row asks for another mode of thinking than the command (None: it leaves it open)."""
        asked = self.template_kwargs.get("enable_thinking")
        if thinking is not None and asked is not None and asked != thinking:
            raise BadRow(f"chat_template_kwargs with enable_thinking {asked}, and the command says {thinking}")


def chat_of(fields: Mapping[str, Any]) -> Chat:
    """The conversation of a row. Raises BadRow, also for a field that would change it and cannot be honoured."""
    row = _known_fields(fields)
    messages, untrained = _conversation(row)
    system = _system(row)
    if system is not None and (messages[0]["role"] != "system" or messages[0]["content"] != system):
        if any(message["role"] == "system" for message in messages):
            raise BadRow("a system text on the row, and another one in its messages")
        messages = [{"role": "system", "content": system}, *messages]
        untrained = frozenset(index + 1 for index in untrained)
    tools = tools_of(row["tools"]) if "tools" in row else None
    chat = Chat(messages, tools or None, _template_kwargs(row.get("chat_template_kwargs", {})), untrained)
    try:
        for text in chat.strings():
            _require_unicode(text)
    except RecursionError:
        raise BadRow("fields that are nested too deeply") from None
    return chat


def question_of(fields: Mapping[str, Any]) -> Chat:
    """The conversation of a row that is only asked: as `chat_of`, and a `prompt` needs no completion.

    A prompt is then a list of messages, or a text that a user says. What completes it is not read. Raises BadRow.
    """
    row = _known_fields(fields)
    prompt = row.get("prompt")
    if prompt is None or "instruction" in row or _forms(row) not in ([], [("prompt", "completion")]):
        return chat_of(fields)
    if isinstance(prompt, list) and "completion" in row:
        return chat_of(fields)
    if not isinstance(prompt, str | list):
        raise BadRow("a prompt that is neither a text nor a list of messages")
    others = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    return chat_of({**others, **({"messages": prompt} if isinstance(prompt, list) else {"turns": [prompt]})})


def text_of(fields: Mapping[str, Any]) -> str:
    """The text that a row gives to be continued as it is, without a chat template: its `prompt`. Raises BadRow."""
    row = _given(fields, "a row")
    if "prompt" not in row:
        raise BadRow("no prompt: only a text can be continued without a chat template")
    text = _text(row["prompt"], "a prompt")
    for name in ("tools", "chat_template_kwargs", *SYSTEM):
        if name in row:
            raise BadRow(f"a field {name!r}, which needs a chat template")
    return text


def has_messages(fields: Mapping[str, Any]) -> bool:
    """Whether a row of token ids holds its messages too. Raises BadRow for a field that cannot be honoured."""
    row = _known_fields(fields)
    return any(name in row for name in ("messages", "conversations", "conversation"))


def texts(message: Message) -> list[str]:
    """What the message says: its content, or the parts of it."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    row = _given(fields, "a row")
    for name, instead in REFUSED.items():
        if name in row and row[name] != NEUTRAL.get(name):
            raise BadRow(f"a field {name!r}: {instead}")
    return row


def _given(fields: Mapping[str, Any], what: str) -> dict[str, Any]:
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


def _forms(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """`turns` is a number in some dumps, beside the messages that it counts."""
    return [
        form
        for form in FORMS
        if all(name in row for name in form) and (form != ("turns",) or isinstance(row["turns"], list))
    ]


def _conversation(row: Mapping[str, Any]) -> tuple[list[Message], frozenset[int]]:
    """Messages, and the indices of answers with weight 0."""
    forms = _forms(row)
    if len(forms) > 1:
        raise BadRow(f"{_name(forms[0])} and {_name(forms[1])}: which one is the conversation?")
    if not forms:
        parts = _instruction(row)
    elif forms == [("turns",)]:
        parts = [{"role": "user", "content": _text(turn, "turns")} for turn in row["turns"]]
    else:
        parts = [part for name in forms[0] for part in _list(row[name], name)]
    if not all(isinstance(part, Mapping) for part in parts):
        raise BadRow(f"{_name(forms[0])} that are no objects")
    given = [_given(part, "a message") for part in parts]
    labels_from = len(row["prompt"]) if forms == [("prompt", "completion")] else 0  # TRL trains on completions alone
    messages = [_message(part) for part in given]
    untrained = frozenset(
        index
        for index, part in enumerate(given)
        if messages[index]["role"] == "assistant" and (index < labels_from or _untrained(part))
    )
    return messages, untrained


def _instruction(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "instruction" not in row:
        raise BadRow(
            f"none of {', '.join(map(_name, FORMS))} and instruction: write the turns as "
            '{"messages": [{"role": ..., "content": ...}]}'
        )
    question = [_text(row[name], name) for name in ("instruction", "input") if name in row]
    answer = [{"role": "assistant", "content": row["output"]}] if "output" in row else []
    return [{"role": "user", "content": "\n\n".join(question)}, *answer]


def _name(form: Sequence[str]) -> str:
    return " with ".join(form)


def _list(value: Any, name: str) -> list[Any]:
    if name in ("prompt", "completion") and isinstance(value, str):
        raise BadRow(f"a {name} that is text, which TRL puts into no chat template: write it as a list of messages")
    if not isinstance(value, list):
        raise BadRow(f"{name} that are no list with entries")
    return value


def _message(part: Mapping[str, Any]) -> Message:
    """One message as the server's request models keep it (`ChatCompletionMessageParam` of SGLang)."""
    unknown = sorted(part.keys() - READ - UNREAD)
    if unknown:
        raise BadRow(f"a message with the field {unknown[0]!r}, which has no known meaning: remove or rename it")
    role = _role(part)
    message: Message = {"role": role, "content": _content(part)}
    if role == "user" and not any(text.strip() for text in texts(message)):
        raise BadRow("an empty message of a user")
    if role != "user":  # the server passes on only what a user says
        message |= {name: _text(part[name], name) for name in ("name", "tool_call_id") if name in part}
    if role == "assistant":
        if "reasoning_content" in part:
            message["reasoning_content"] = _text(part["reasoning_content"], "reasoning_content")
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
        return _text(said[0], "content")
    return [{"type": "text", "text": _text_part(chunk)} for chunk in said[0]]


def _text_part(chunk: Any) -> str:
    chunk = {name: value for name, value in chunk.items() if value is not None} if isinstance(chunk, dict) else {}
    if chunk.get("type") != "text" or chunk.keys() != {"type", "text"}:
        raise BadRow('content with a part that is not {"type": "text", "text": ...}')
    return _text(chunk["text"], "content")


def _untrained(part: Mapping[str, Any]) -> bool:
    """Of an answer. Dumps also give a weight to questions, which are never trained on."""
    weight = part.get("weight", 1)
    if weight not in (0, 1):
        raise BadRow("a weight that is neither 0 nor 1")
    return bool(weight == 0)


def _system(row: Mapping[str, Any]) -> str | None:
    said = {_text(row[name], name) for name in SYSTEM if name in row}
    if len(said) > 1:
        raise BadRow(f"two of {', '.join(SYSTEM)}, and they differ")
    return said.pop() if said else None


def _template_kwargs(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow("chat_template_kwargs that are no object")
    if "chat_template" in value:
        raise BadRow("chat_template_kwargs with a chat_template, which servers refuse")
    return {name: setting for name, setting in value.items() if setting is not None}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} that is no text")
    _require_unicode(value)
    return value


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("content with half a surrogate pair, which no tokenizer takes") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(name)
            yield from _strings(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _strings(inner)
