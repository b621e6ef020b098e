"""A user's own file of prompts, as a task that is named after it.

A row is read as the trainer reads it (sglang_auf/training/data/chats.py), and its conversation is asked as it stands.
The model answers every user and every tool result that the row leaves unanswered. Answers in the row are context, but
for those at its end, which are what the model is asked for. A system text goes with the turn that follows it.

    user, user                      two turns, the model's own answer between them: the same as `turns`
    system, user, assistant, user   one turn, after all four
    user, assistant                 one turn, after the user

A row that cannot be asked is named, and the others are asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.tasks import TASKS, Prompt, PromptFile, Selection, Task, Turn, head
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.settings import enable_thinking
from sglang_auf.training.data.chats import Chat, Message, question_of, text_of
from sglang_auf.training.data.rows import BadRow, ChatRow, grouped, named, read_rows

logger = logging.getLogger(__name__)

ASKS = ("user", "tool", "function")
"""Roles that the model answers."""
INTRODUCES = ("system", "developer")
"""Roles whose messages belong to the turn that follows."""

CHATS = 'one JSON object a line, with "messages", "conversations", "turns" or "prompt"'
TEXTS = 'one JSON object a line, with a text as "prompt"'


def select_from_files(
    paths: Sequence[Path], *, raw: bool = False, thinking: str = "off", limit: int | None = None
) -> list[Selection]:
    """The prompts of each file. Broken rows are logged and kept in the selection's `file`.

    raw: the rows' texts are continued without a chat template. thinking: what the command asks for; a row that asks for
    the other mode is broken. Raises ConfigError for a name that another file or a task has, DataError for a file
    without a prompt.
    """
    taken = set(TASKS)
    for path in paths:
        if path.name in taken:
            raise ConfigError(f"--prompts {path}, and another task of that name", "a name for each", "rename the file")
        taken.add(path.name)
    return [_selection(path, raw, thinking, limit) for path in paths]


def _selection(path: Path, raw: bool, thinking: str, limit: int | None) -> Selection:
    expected = TEXTS if raw else CHATS
    if not path.is_file():
        raise DataError(f"no file {path}", f"a file that has {expected}")
    digest = hashlib.sha256()
    prompts: list[Prompt] = []
    faults: list[tuple[str, str]] = []
    for row in read_rows(path, digest):
        try:
            prompts.append(_prompt(path.name, row, raw, thinking))
        except BadRow as fault:
            faults.append((str(fault), row.place))
    groups = [f"{named(places)}: {reason}" for reason, places in grouped(faults).items()]
    if not prompts:
        raise DataError(f"no prompt in {path} ({'; '.join(groups) or 'no rows'})", expected)
    for group in groups:
        logger.warning("%s, not asked: %s; expected: %s", path, group, expected)
    file = PromptFile(
        sha256=digest.hexdigest(),
        rows=len(prompts) + len(faults),
        broken=[f"{place}: {reason}" for reason, place in faults],
    )
    return Selection(Task(path.name, len(prompts)), head(prompts, limit), path.name, file)


def _prompt(task: str, row: ChatRow, raw: bool, thinking: str) -> Prompt:
    """Raises BadRow."""
    if row.fault is not None:
        raise BadRow(row.fault)
    if raw:
        return Prompt(task, row.id, (text_of(row.fields),), raw=True)
    chat = question_of(row.fields)
    chat.require_thinking(enable_thinking(thinking))
    return Prompt(task, row.id, turns_of([_sent(message) for message in chat.messages]), _request(chat))


def turns_of(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """What comes before each answer that the model is asked for. Raises BadRow where it is asked for none."""
    asked = len(messages)
    while asked and messages[asked - 1]["role"] == "assistant":
        asked -= 1
    turns: list[list[Message]] = []
    said: list[Message] = []
    for index, message in enumerate(messages[:asked]):
        said.append(message)
        if message["role"] in ASKS and _unanswered(messages[index + 1 : asked]):
            turns.append(said)
            said = []
    if not turns:
        raise BadRow("no message of a user")
    turns[-1] += said
    return tuple(_turn(turn) for turn in turns)


def _unanswered(following: Sequence[Message]) -> bool:
    """Whether a user speaks next, or nobody."""
    roles = [message["role"] for message in following if message["role"] not in INTRODUCES]
    return not roles or roles[0] == "user"


def _turn(messages: Sequence[Message]) -> Turn:
    """A text where a user says one and nothing is beside it, so that all forms of a question are the same question."""
    if len(messages) == 1 and messages[0].keys() == {"role", "content"} and messages[0]["role"] == "user":
        content = messages[0]["content"]
        if isinstance(content, str):
            return content
    return tuple(messages)


def _sent(message: Message) -> Message:
    """OpenAI's API has the arguments of a call as text; a template has them as an object."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _request(chat: Chat) -> Mapping[str, Any]:
    given = {"tools": chat.tools, "chat_template_kwargs": chat.template_kwargs}
    return {name: value for name, value in given.items() if value}
