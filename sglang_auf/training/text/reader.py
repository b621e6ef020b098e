"""One row as a conversation: token ids, and which of them the target generated.

The loss is on the answers of all turns, each with its end-of-turn token, and on nothing else: not on prompts, role
headers, an empty think block, or what the template writes after the end of a turn. An answer that was cut at a token
limit (finish_reason "length") did not end its turn, so the template's end-of-turn token is not part of it.

A row is rendered token for token as a server renders the same conversation, or it is refused. Rows with `prompt_ids`
and `response_ids` are used as these tokens and are not rendered again.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from sglang_auf.training.text.chat_template import ChatTemplate, Span, end_of_text
from sglang_auf.training.text.chats import Chat, chat_of, has_messages
from sglang_auf.training.text.messages import texts
from sglang_auf.training.text.rows import BadRow, ChatRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNTHOUGHT = (
    "thinking is on, and %d of %d rows have an answer without a thought, which is trained on behind an empty think "
    "block (a server without its reasoning parser? answers of thinking off?): %s"
)
LED = "%d of %d rows begin with an answer that nothing asked for, which is left out, as SpecForge and FastChat do: %s"
OTHER_MODE = "%d of %d rows are of the other mode of thinking than is trained for, and are trained on all the same: %s"

Packed: TypeAlias = "tuple[str, array[int], bytes, tuple[tuple[int, int], ...], list[str]]"
"""A conversation and its warnings, in a tenth of the bytes: for another process."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids of one row; loss_mask, of the same length, is True on every token that is a label.

    unserved: (start, end) of the answers before which a server has another text, since the template writes an earlier
    answer otherwise than one that is asked for (Qwen3 leaves out an empty think block).
    """

    id: str
    input_ids: list[int]
    loss_mask: list[bool]
    unserved: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt(self) -> list[int]:
        """What comes before the first label."""
        return self.input_ids[: self.loss_mask.index(True)]

    def first(self, count: int) -> Self:
        """Cut to so many tokens."""
        unserved = tuple((start, min(end, count)) for start, end in self.unserved if start < count)
        return replace(self, input_ids=self.input_ids[:count], loss_mask=self.loss_mask[:count], unserved=unserved)

    def as_served(self) -> Self:
        """With no labels but those that serving drafts: without unserved answers, or with the last where all are."""
        for left_out in (self.unserved, self.unserved[:-1]):
            mask = self.loss_mask.copy()
            for start, end in left_out:
                mask[start:end] = [False] * (end - start)
            if any(mask):
                return replace(self, loss_mask=mask, unserved=())
        return self


class Reader:
    """Turns rows into conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking: bool | None, vocab_size: int) -> None:
        self._template = ChatTemplate(tokenizer, thinking) if tokenizer.chat_template else None
        self._thinking = thinking
        self._ends = self._template.ends if self._template else end_of_text(tokenizer)
        # Rows share one int object for each token: a list then takes 8 bytes a token, not 36.
        self._ids = list(range(vocab_size))

    def read(self, row: ChatRow) -> tuple[Conversation, list[str]]:
        """The row as tokens and labels, and what is to be warned of. Raises BadRow."""
        if row.fault:
            raise BadRow(row.fault)
        exact = [row.fields.get(key) for key in ("prompt_ids", "response_ids")]
        ids, spans, doubts = self._rendered(row.fields) if exact == [None, None] else self._exact(row.fields, *exact)
        mask = [False] * len(ids)
        for span in spans:
            mask[span.start : span.end] = [True] * (span.end - span.start)
        unserved = tuple((span.start, span.end) for span in spans if not span.served)
        unthought = [UNTHOUGHT] * any(span.unthought for span in spans)
        return Conversation(row.id, [self._ids[token] for token in ids], mask, unserved), [*unthought, *doubts]

    def packed(self, conversation: Conversation, doubts: list[str]) -> Packed:
        ids, mask = array("i", conversation.input_ids), bytes(conversation.loss_mask)
        return conversation.id, ids, mask, conversation.unserved, doubts

    def unpacked(self, packed: Packed) -> tuple[Conversation, list[str]]:
        id, ids, mask, unserved, doubts = packed
        return Conversation(id, [self._ids[token] for token in ids], [*map(bool, mask)], unserved), doubts

    def _rendered(self, fields: Mapping[str, Any]) -> tuple[list[int], list[Span], list[str]]:
        whole = chat_of(fields)
        asked = whole.from_first_question()
        chat = _until_last_answer(asked)
        _require_answers(chat)
        ids, spans = self._need_template().encode(chat)
        self._require_known(ids)
        led = len(whole.answers) - len(asked.answers)
        spans = _own_ends(spans, _cut(fields, len(whole.answers))[led : led + len(spans)])
        return ids[: spans[-1].end], _trained(chat, spans), [LED] * (led > 0)

    def _exact(self, fields: Mapping[str, Any], prompt: Any, response: Any) -> tuple[list[int], list[Span], list[str]]:
        """The ids as given. The template finds answers of earlier turns, if any, in the prompt.

        The other mode of thinking refuses a row with messages, and not a recorded one, which is what a server is asked.
        """
        for name, ids in (("prompt_ids", prompt), ("response_ids", response)):
            if not isinstance(ids, list) or not all(type(token) is int for token in ids):
                raise BadRow(f"{name} that are no list of token ids")
        self._require_known(prompt + response)
        if any(token in self._ends for token in response[:-1]):
            raise BadRow("response_ids that go on behind an end-of-turn token")
        other = self._template is not None and self._template.is_of_other_mode(prompt)
        if other and has_messages(fields):
            raise BadRow(f"prompt_ids that were not asked with thinking {'on' if self._thinking else 'off'}")
        answer = Span(len(prompt), len(prompt) + len(response), True)
        return prompt + response, [*self._earlier(fields, prompt), answer], [OTHER_MODE] * other

    def _earlier(self, fields: Mapping[str, Any], prompt: list[int]) -> list[Span]:
        if not has_messages(fields):
            return []
        chat = chat_of(fields)
        chat.require_thinking(self._thinking)
        if chat.answers[-1:] and chat.answers[-1] in chat.untrained:
            raise BadRow("response_ids of an answer with weight 0")
        if len(chat.answers) < 2:
            return []
        history = chat.first(chat.answers[-1])
        _require_answers(history)
        template = self._need_template()
        rendered, spans = template.encode_prompt(template.as_of(history, prompt))
        if rendered != prompt:
            raise BadRow("prompt_ids are not what the tokenizer's chat template gives")
        return _trained(history, _own_ends(spans, _cut(fields, len(spans) + 1)[:-1]))

    def _require_known(self, ids: Sequence[int]) -> None:
        if not all(0 <= token < len(self._ids) for token in ids):
            raise BadRow(f"token ids outside the vocabulary of {len(self._ids)}")

    def _need_template(self) -> ChatTemplate:
        if self._template is None:
            raise BadRow("text, and the tokenizer has no chat template")
        return self._template


def _until_last_answer(chat: Chat) -> Chat:
    """The chat up to its last answer that is a label. What follows is no label, and changes none."""
    trained = [index for index in chat.answers if index not in chat.untrained]
    if not trained:
        raise BadRow(
            "no answer but those of weight 0"
            if chat.answers
            else "no answer (a prompt row? `sglang-auf regenerate` writes answers)"
        )
    return chat.first(trained[-1] + 1)


def _require_answers(chat: Chat) -> None:
    """Raise BadRow unless every answer says something or calls a tool, and a server would be asked for it."""
    asked = False
    before = ""
    for message in chat.messages:
        asked = asked or message["role"] == "user"
        if message["role"] == "assistant":
            if not asked:
                raise BadRow("an answer before any question")
            if before == "assistant":
                raise BadRow("an answer after an answer, which no server would be asked for")
            if not message.get("tool_calls") and not any(text.strip() for text in texts(message)):
                raise BadRow("an empty answer")
        before = message["role"]


def _trained(chat: Chat, spans: Sequence[Span]) -> list[Span]:
    """The spans of answers without weight 0."""
    return [span for index, span in zip(chat.answers, spans, strict=True) if index not in chat.untrained]


def _cut(fields: Mapping[str, Any], answers: int) -> list[bool]:
    """For each answer, whether a token limit ended it. finish_reasons is of all answers, finish_reason of the last."""
    reasons = fields.get("finish_reasons")
    if reasons is None:
        reasons = [None] * (answers - 1) + [fields.get("finish_reason")]
    if not isinstance(reasons, list) or len(reasons) != answers:
        raise BadRow("finish_reasons that are not one for each answer")
    return [reason == "length" for reason in reasons]


def _own_ends(spans: Sequence[Span], cuts: Sequence[bool]) -> list[Span]:
    """Spans without the end-of-turn token where a limit cut the answer: the template wrote it, not the target."""
    return [
        replace(span, end=span.end - 1) if cut and span.closed else span for span, cut in zip(spans, cuts, strict=True)
    ]
