"""Training text: chat rows as token ids, with a mask on the tokens that the target generated.

The loss is on the answers of all turns, each with its end-of-turn token, and on nothing else: not on prompts, role
headers, an empty think block, or what the template writes after the end of a turn. An answer that was cut at a token
limit (finish_reason "length") did not end its turn, so the template's end-of-turn token is not part of it.

A row is rendered token for token as a server renders the same conversation, or it is refused. Rows with `prompt_ids`
and `response_ids` are used as these tokens and are not rendered again. Every row that cannot be used is counted and
named with the reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from tqdm import tqdm

from sglang_auf.errors import ConfigError, DataError
from sglang_auf.training.data.chat_template import ChatTemplate, Span, end_of_text
from sglang_auf.training.data.chats import Chat, chat_of, has_messages, texts
from sglang_auf.training.data.rows import BadRow, ChatRow, Source, grouped, named, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

UNTHOUGHT = (
    "thinking is on, and %d of %d rows have an answer without a thought, which is trained on behind an empty think "
    "block (a server without its reasoning parser? answers of thinking off?): %s"
)
LED = "%d of %d rows begin with an answer that nothing asked for, which is left out, as SpecForge and FastChat do: %s"
OTHER_MODE = "%d of %d rows are of the other mode of thinking than is trained for, and are trained on all the same: %s"

Apart: TypeAlias = Literal["prompt", "tokens"]
"""What no row that is trained on shares with a held-out one: the prompt of an answer, or all of its tokens. The latter
is for runs that an earlier version began, whose rows must stay the same."""


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


@dataclass(frozen=True, slots=True)
class LoadedConversations:
    """rejected: reason -> rows ("id (file:line)"). truncated: rows cut to the limit.

    unthought: rows with an answer behind an empty think block, although thinking is on for them.
    sha256: of all that was read, and of the ids, tokens and labels it became: a version that names, renders or labels
    otherwise gives another one, and does not continue a run.
    """

    conversations: list[Conversation]
    rejected: dict[str, list[str]]
    truncated: list[str]
    unthought: list[str]
    sha256: str

    @property
    def answer_tokens(self) -> int:
        return sum(sum(conversation.loss_mask) for conversation in self.conversations)


def load_conversations(
    source: Source | Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    min_answer_tokens: int,
    thinking: bool | None = None,
    overlong: Literal["reject", "truncate"] = "reject",
    vocab_size: int | None = None,
    split: str = "train",
) -> LoadedConversations:
    """Read chat rows (rows.py has the sources, chats.py the forms) into conversations, in the order of the source.

    max_length: tokens of a row; longer ones are rejected, or cut to it. min_answer_tokens: a block's size, since fewer
    fill no block. thinking: enable_thinking for templates that know it, None for the template's default.
    vocab_size: the target's, which bounds all ids (default: the tokenizer's). Raises DataError if no row remains.
    """
    digest = hashlib.sha256()
    reader = _Reader(tokenizer, thinking, vocab_size or len(tokenizer))
    kept: list[Conversation] = []
    faults: list[tuple[str, str]] = []
    truncated: list[str] = []
    doubtful: dict[str, list[str]] = {UNTHOUGHT: [], OTHER_MODE: [], LED: []}
    rows = read_rows(source, digest, split=split)
    for row in tqdm(rows, "reading", unit=" rows", delay=5, leave=False, disable=None):
        try:
            conversation, doubts = reader.read(row)
            if len(conversation) > max_length and overlong == "truncate":
                truncated.append(row.name)
                conversation = conversation.first(max_length)
            _require_size(conversation, max_length, min_answer_tokens)
        except BadRow as fault:
            faults.append((str(fault), row.name))
        else:
            kept.append(conversation)
            for doubt in doubts:
                doubtful[doubt].append(row.name)
            # The id decides whether a row is held out, and where its anchors are.
            digest.update(json.dumps(conversation.id).encode() + array("q", conversation.input_ids).tobytes())
            digest.update(bytes(conversation.loss_mask))
    rejected = grouped(faults)
    _report(source, len(kept), rejected, truncated, max_length, doubtful)
    return LoadedConversations(kept, rejected, truncated, doubtful[UNTHOUGHT], digest.hexdigest())


def split_held_out(
    conversations: Sequence[Conversation], *, count: int, seed: int = 0, apart: Apart = "prompt"
) -> tuple[list[Conversation], list[Conversation]]:
    """(to train on, held out). The `count` rows whose ids have the smallest hashes are held out, in any order of rows.

    A row that asks what a held-out row asks is neither, whatever the answers. A prompt with which every row begins asks
    nothing: then a row is left out only for the same tokens. Raises ConfigError for a count below 1, DataError where no
    row is left on one side.
    """
    if count < 1:
        raise ConfigError(f"{count} conversations held out", "1 or more")

    def place(conversation: Conversation) -> int:
        return int.from_bytes(hashlib.sha256(f"{seed}/{conversation.id}".encode()).digest())

    border = sorted(map(place, conversations))[count] if count < len(conversations) else 2**256
    held_out = [conversation for conversation in conversations if place(conversation) < border]
    first, last = (end((row.input_ids for row in conversations), default=[]) for end in (min, max))
    both = enumerate(zip(first, last, strict=False))
    common = next((place for place, (one, other) in both if one != other), len(first))

    def told(conversation: Conversation) -> set[tuple[int, ...]]:
        ids, mask = conversation.input_ids, conversation.loss_mask
        starts = [start for start in range(common + 1, len(ids)) if mask[start] and not mask[start - 1]]
        return {tuple(ids), *(tuple(ids[:start]) for start in starts if apart == "prompt")}

    known = set().union(*map(told, held_out))
    others = [conversation for conversation in conversations if place(conversation) >= border]
    train = [conversation for conversation in others if known.isdisjoint(told(conversation))]
    if repeated := len(others) - len(train):
        logger.warning("%d rows ask the same as one that is held out, and are not trained on", repeated)
    if not train or not held_out:
        raise DataError(
            f"{len(train)} rows to train on and {len(held_out)} held out",
            "some of each",
            "give rows with other prompts, or hold out fewer" if repeated else "give more rows, or hold out fewer",
        )
    return train, held_out


class _Reader:
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


def _require_size(conversation: Conversation, max_length: int, min_answer_tokens: int) -> None:
    labels = sum(conversation.loss_mask)
    if len(conversation) > max_length:
        raise BadRow(f"longer than {max_length} tokens")
    if labels == 0:
        raise BadRow("no answer tokens")
    if labels < min_answer_tokens:
        raise BadRow(f"fewer than {min_answer_tokens} answer tokens")


def _report(
    source: object,
    kept: int,
    rejected: Mapping[str, Sequence[str]],
    truncated: Sequence[str],
    max_length: int,
    doubtful: Mapping[str, Sequence[str]],
) -> None:
    """Log what was left out, what was cut, and for each warning its rows. Raises DataError if nothing is left."""
    if not kept:
        reasons = "; ".join(f"{reason}: {named(rows)}" for reason, rows in rejected.items())
        raise DataError(
            f"no row of {source} can be trained on ({reasons or 'it has no rows'})",
            "rows with answers of the target",
            "make some with `sglang-auf regenerate`, or raise the length limit",
        )
    for reason, rows in rejected.items():
        logger.warning(
            "%d of %d rows rejected, %s: %s", len(rows), kept + sum(map(len, rejected.values())), reason, named(rows)
        )
    if truncated:
        logger.warning("%d rows cut to %d tokens: %s", len(truncated), max_length, named(truncated))
    for warning, rows in doubtful.items():
        if rows:
            logger.warning(warning, len(rows), kept, named(rows))
