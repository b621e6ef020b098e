"""One prompt, from wherever it comes: a conversation, or what the model continues without a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sglang_auf.training.text.messages import Message, texts
from sglang_auf.training.text.rows import is_unicode

NO_GROUP = ""
"""The group of a row that has none, where others have one."""


class TokenIds(tuple[int, ...]):
    """The tokens of a prompt, which is sent as they are."""

    __slots__ = ()


Turn: TypeAlias = str | TokenIds | tuple[Message, ...]
"""What comes before one answer of the model: what a user says, the messages of a request, or the tokens of a prompt."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation. turns: what comes before each answer; the model's own answers stay between them.

    request: fields of a chat request beside its messages. raw: the only turn is a text, or token ids, that the model
    continues without a chat template. group: under which tau is reported beside that of the task; None: under none.
    place: where a row of a user's own file was read ("mine.jsonl:3").
    """

    task: str
    id: str
    turns: tuple[Turn, ...] = field(hash=False)
    request: Mapping[str, Any] = field(default_factory=dict, hash=False)
    raw: bool = False
    group: str | None = None
    place: str = field(default="", compare=False)

    @property
    def continued(self) -> str | TokenIds | None:
        """What the model continues without a chat template; None for a conversation."""
        (turn,) = self.turns if self.raw else (None,)
        return turn if isinstance(turn, str | TokenIds) else None

    @property
    def text(self) -> str:
        """All that is said in it; "" for token ids."""
        return " ".join(self.turn_texts)

    @property
    def turn_texts(self) -> list[str]:
        """What is said in each turn."""
        return [" ".join(text for message in messages_of(turn) for text in texts(message)) for turn in self.turns]


def messages_of(turn: Turn) -> list[Message]:
    """The messages of a request; none for token ids."""
    if isinstance(turn, TokenIds):
        return []
    return [{"role": "user", "content": turn}] if isinstance(turn, str) else list(turn)


def group_of(row: Mapping[str, Any], field: str) -> str:
    """The group of a row by one of its fields, on one line; NO_GROUP where that is no text, number, true or false."""
    value = row.get(field)
    name = " ".join(value.split()) if isinstance(value, str) else ""
    if isinstance(value, bool | int | float):
        name = json.dumps(value)
    return name if is_unicode(name) else NO_GROUP
