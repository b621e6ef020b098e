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
any field beside those that are known to have a meaning, since nothing reads it. A `prompt` beside another form may be a
copy of what that form says, as dumps keep one, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from sglang_auf.training.text.messages import Message, given, is_untrained, message_of, require_unicode, text_in, texts
from sglang_auf.training.text.rows import BadRow
from sglang_auf.training.text.tools import tools_of

TRL = ("prompt", "completion")
FORMS = (("messages",), ("conversations",), ("conversation",), ("turns",), TRL)
CONVERSATION = (*dict.fromkeys(name for form in FORMS for name in form), "instruction")
"""Fields that hold a conversation, or a part of one."""
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
    messages, untrained = _conversation(row, fields)
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
            require_unicode(text)
    except RecursionError:
        raise BadRow("fields that are nested too deeply") from None
    return chat


def question_of(fields: Mapping[str, Any]) -> Chat:
    """The conversation of a row that is only asked: as `chat_of`, and a `prompt` needs no completion.

    A prompt is then a list of messages, or a text that a user says. What completes it is not read. Raises BadRow.
    """
    row = _known_fields(fields)
    prompt = row.get("prompt")
    if prompt is None or "instruction" in row or _forms(row) not in ([], [TRL]):
        return chat_of(fields)
    if isinstance(prompt, list) and "completion" in row:
        return chat_of(fields)
    if not isinstance(prompt, str | list):
        raise BadRow("a prompt that is neither a text nor a list of messages")
    others = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    return chat_of({**others, **({"messages": prompt} if isinstance(prompt, list) else {"turns": [prompt]})})


def text_of(fields: Mapping[str, Any]) -> str:
    """The text that a row gives to be continued as it is, without a chat template: its `prompt`. Raises BadRow.

    A conversation beside it must be what the prompt was rendered from.
    """
    row = given(fields, "a row")
    if "prompt" not in row:
        raise BadRow("no prompt: only a text can be continued without a chat template")
    if "instruction" in row or _forms(row) not in ([], [TRL]):
        chat_of(fields)
    text = text_in(row["prompt"], "a prompt")
    for name in ("tools", "chat_template_kwargs", *SYSTEM):
        if name in row:
            raise BadRow(f"a field {name!r}, which needs a chat template")
    return text


def has_messages(fields: Mapping[str, Any]) -> bool:
    """Whether a row of token ids holds its messages too. Raises BadRow for a field that cannot be honoured."""
    row = _known_fields(fields)
    return any(name in row for name in ("messages", "conversations", "conversation"))


def _known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    row = given(fields, "a row")
    for name, instead in REFUSED.items():
        if name in row and row[name] != NEUTRAL.get(name):
            raise BadRow(f"a field {name!r}: {instead}")
    return row


def _forms(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """`turns` is a number in some dumps, beside the messages that it counts."""
    return [
        form
        for form in FORMS
        if all(name in row for name in form) and (form != ("turns",) or isinstance(row["turns"], list))
    ]


def _conversation(row: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[list[Message], frozenset[int]]:
    """Messages, and the indices of answers with weight 0. fields: of the row, with those that are empty."""
    forms = _forms(row)
    if len(forms) > 1:
        raise BadRow(f"{_name(forms[0])} and {_name(forms[1])}: which one is the conversation?")
    if not forms and "instruction" not in row:
        raise _no_conversation(row, fields)
    if not forms:
        parts = _instruction(row)
    elif forms == [("turns",)]:
        parts = [{"role": "user", "content": text_in(turn, "turns")} for turn in row["turns"]]
    else:
        parts = [part for name in forms[0] for part in _list(row[name], name)]
    if not all(isinstance(part, Mapping) for part in parts):
        raise BadRow(f"{_name(forms[0])} that are no objects")
    parts = [given(part, "a message") for part in parts]
    labels_from = len(row["prompt"]) if forms == [TRL] else 0  # TRL trains on completions alone
    messages = [message_of(part) for part in parts]
    if forms != [TRL] and "prompt" in row and not _is_copy(row["prompt"], messages):
        other = _name(forms[0]) if forms else "instruction"
        raise BadRow(f"prompt and {other}, which say different things: remove one")
    untrained = frozenset(
        index
        for index, part in enumerate(parts)
        if messages[index]["role"] == "assistant" and (index < labels_from or is_untrained(part))
    )
    return messages, untrained


def _is_copy(prompt: Any, messages: Sequence[Message]) -> bool:
    """Whether a `prompt` beside messages is some of them, or what a user says in them, as some template rendered it.

    What is neither text nor a list, such as a number, is no prompt.
    """
    if isinstance(prompt, list):
        said = [part.get("content", part.get("value")) if isinstance(part, Mapping) else part for part in prompt]
        known = [said for message in messages for said in (message["content"], *texts(message))]
        return all(text in known for text in said if text)
    if not isinstance(prompt, str):
        return True
    asked = [_lines(text) for message in messages if message["role"] == "user" for text in texts(message)]
    return any(all(line in prompt for line in text) or set(_lines(prompt)) <= set(text) for text in asked if text)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _no_conversation(row: Mapping[str, Any], fields: Mapping[str, Any]) -> BadRow:
    """Why a row has none: a field is there and holds nothing or something else, or no such field is there."""
    instead = 'write the turns as {"messages": [{"role": ..., "content": ...}]}'
    if "turns" in row:
        return BadRow(f"turns that are {_kind(row['turns'])}, and not a list of texts")
    there = {name.lower() for name in fields}
    if empty := [name for name in (*CONVERSATION, "prompt_ids") if name in there and name not in row]:
        return BadRow(f"nothing in {' and '.join(empty)}: {instead}")
    return BadRow(f"none of {', '.join(map(_name, FORMS))} and instruction: {instead}")


def _instruction(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    question = [text_in(row[name], name) for name in ("instruction", "input") if name in row]
    answer = [{"role": "assistant", "content": row["output"]}] if "output" in row else []
    return [{"role": "user", "content": "\n\n".join(question)}, *answer]


def _name(form: Sequence[str]) -> str:
    return " with ".join(form)


def _list(value: Any, name: str) -> list[Any]:
    if name in ("prompt", "completion") and isinstance(value, str):
        raise BadRow(f"a {name} that is text, which TRL puts into no chat template: write it as a list of messages")
    if not isinstance(value, list):
        raise BadRow(f"{name} that are {_kind(value)}, and not a list of messages")
    return value


def _kind(value: Any) -> str:
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def _system(row: Mapping[str, Any]) -> str | None:
    said = {text_in(row[name], name) for name in SYSTEM if name in row}
    if len(said) > 1:
        raise BadRow(f"two of {', '.join(SYSTEM)}, and they differ")
    return said.pop() if said else None


def _template_kwargs(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow("chat_template_kwargs that are no object")
    if "chat_template" in value:
        raise BadRow("chat_template_kwargs with a chat_template, which servers refuse")
    return {name: setting for name, setting in value.items() if setting is not None}


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
