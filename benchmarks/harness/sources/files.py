"""A user's own file of prompts, as a task that is named after it.

A row is read as the trainer reads it (sglang_auf/training/text/chats.py), and its conversation is asked as it stands.
The model answers every user and every tool result that the row leaves unanswered. Answers in the row are context, but
for those at its end, which are what the model is asked for. A system text goes with the turn that follows it.

    user, user                      two turns, the model's own answer between them: the same as `turns`
    system, user, assistant, user   one turn, after all four
    user, assistant                 one turn, after the user

A row of token ids (recordings.py) is sent as it is. A row that cannot be asked is named, and the others are asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.sources.prompt import NO_GROUP, Prompt, TokenIds, Turn, group_of
from benchmarks.harness.sources.recordings import ids_of, recording_of
from benchmarks.harness.tasks import TASKS, PromptFile, Selection, Task, head
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.settings import enable_thinking
from sglang_auf.training.text.chats import Chat, question_of, text_of
from sglang_auf.training.text.messages import Message
from sglang_auf.training.text.rows import BadRow, ChatRow, grouped, named, read_rows

logger = logging.getLogger(__name__)

ASKS = ("user", "tool", "function")
"""Roles that the model answers."""
INTRODUCES = ("system", "developer")
"""Roles whose messages belong to the turn that follows."""

CHATS = 'one JSON object a line, with "messages", "conversations", "turns", "prompt" or "prompt_ids"'
TEXTS = 'one JSON object a line, with a text as "prompt"'


def select_from_files(
    paths: Sequence[Path],
    *,
    raw: bool = False,
    thinking: str = "off",
    limit: int | None = None,
    group_by: str | None = None,
) -> list[Selection]:
    """The prompts of each file. Rows that are broken or lack a group are logged and kept in the selection's `file`.

    raw: the rows' texts are continued without a chat template. thinking: what the command asks for; a row that asks for
    the other mode is broken. group_by: the field of a row that is its prompt's group. Raises ConfigError for a name
    that another file or a task has, DataError for a file without a prompt, and where no row has a group.
    """
    taken = set(TASKS)
    for path in paths:
        if _name(path) in taken:
            raise ConfigError(f"--prompts {path}, and another task of that name", "a name for each", "rename the file")
        taken.add(_name(path))
    files = [_read(path, raw, thinking, group_by) for path in paths]
    if group_by is not None and not any(prompt.group for rows in files for prompt in rows.prompts.values()):
        raise DataError(
            f"--group-by {group_by}, and no row of {', '.join(map(str, paths))} has that field",
            "a field of the rows themselves that holds a text, a number, true or false",
            "check its name, or leave --group-by out",
        )
    return [_selection(path, rows, limit, group_by) for path, rows in zip(paths, files, strict=True)]


@dataclass(frozen=True, slots=True)
class _Rows:
    """What was read of one file. prompts: by place. faults: (reason, place) of the rows that cannot be asked."""

    prompts: dict[str, Prompt]
    faults: list[tuple[str, str]]
    sha256: str
    recording: Path | None


def _read(path: Path, raw: bool, thinking: str, group_by: str | None) -> _Rows:
    expected = TEXTS if raw else CHATS
    recording = recording_of(path)
    if recording is not None and raw:
        raise _no_template("--raw-prompts", path)
    if not path.is_file() and recording is None:
        raise DataError(f"no file {path}", f"a file that has {expected}, or the directory of a recording")
    digest = hashlib.sha256()
    prompts: dict[str, Prompt] = {}
    faults: list[tuple[str, str]] = []
    for row in read_rows(path, digest):
        try:
            prompt = _prompt(_name(path), row, raw, thinking)
            group = group_of(row.fields, group_by) if group_by else None
            prompts[row.place] = replace(prompt, group=group, place=row.place)
        except BadRow as fault:
            faults.append((str(fault), row.place))
    groups = [f"{named(places)}: {reason}" for reason, places in grouped(faults).items()]
    if not prompts:
        raise DataError(f"no prompt in {path} ({'; '.join(groups) or 'no rows'})", expected)
    if thinking == "on" and any(isinstance(prompt.continued, TokenIds) for prompt in prompts.values()):
        raise _no_template("--thinking on", path)
    for group in groups:
        logger.warning("%s, not asked: %s; expected: %s", path, group, expected)
    return _Rows(prompts, faults, digest.hexdigest(), recording)


def _name(path: Path) -> str:
    """Of the task: the last part of the path as it was given, where that has one."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def _no_template(option: str, path: Path) -> ConfigError:
    return ConfigError(
        f"{option}, and token ids in {path}",
        "texts or conversations: token ids are sent as they are, and no chat template renders them",
        f"leave {option} out",
    )


def _selection(path: Path, rows: _Rows, limit: int | None, group_by: str | None) -> Selection:
    prompts = list(rows.prompts.values())
    asked = head(prompts, limit)
    missing = {prompt.id for prompt in asked if prompt.group == NO_GROUP}
    without_group = [place for place, prompt in rows.prompts.items() if prompt.id in missing]
    if without_group:
        logger.warning("%s, in no group: no %r in %s", path, group_by, named(without_group))
    file = PromptFile(
        sha256=rows.sha256,
        rows=len(prompts) + len(rows.faults),
        broken=[f"{place}: {reason}" for reason, place in rows.faults],
        without_group=without_group,
    )
    return Selection(Task(_name(path), len(prompts)), asked, _name(path), file, rows.recording)


def _prompt(task: str, row: ChatRow, raw: bool, thinking: str) -> Prompt:
    """Raises BadRow."""
    if row.fault is not None:
        raise BadRow(row.fault)
    if raw:
        return Prompt(task, row.id, (text_of(row.fields),), raw=True)
    if (ids := ids_of(row.fields)) is not None:
        return Prompt(task, row.id, (ids,), raw=True)
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
