"""Training text: every row of the sources as a conversation, or counted and named with the reason why it is none."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tqdm import tqdm

from sglang_auf.errors import DataError
from sglang_auf.training.text.reader import LED, OTHER_MODE, UNTHOUGHT, Conversation, Packed, Reader
from sglang_auf.training.text.rows import BadRow, ChatRow, Source, grouped, named, read_rows

if TYPE_CHECKING:
    from hashlib import _Hash

    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Read: TypeAlias = Callable[[ChatRow], tuple[Conversation, list[str]]]
"""A row as a conversation, and what is to be warned of. Raises BadRow."""


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


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that read the same rows together, and this one's number among them, from 0.

    gather: from the objects that each of them gives, those of all, rank by rank (accelerate's `gather_object`).
    """

    rank: int
    count: int
    gather: Callable[[list[Any]], list[Any]]


ALONE = Ranks(0, 1, list)


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
    ranks: Ranks = ALONE,
) -> LoadedConversations:
    """Read chat rows (rows.py has the sources, chats.py the forms) into conversations, in the order of the source.

    max_length: tokens of a row; longer ones are rejected, or cut to it. min_answer_tokens: a block's size, since fewer
    fill no block. thinking: enable_thinking for templates that know it, None for the template's default.
    vocab_size: the target's, which bounds all ids (default: the tokenizer's). ranks: processes that all call this, and
    of which each tokenizes a part of the rows; all get all of them. Raises DataError if no row remains.
    """
    digest = hashlib.sha256()
    reader = Reader(tokenizer, thinking, vocab_size or len(tokenizer))
    kept: list[Conversation] = []
    faults: list[tuple[str, str]] = []
    truncated: list[str] = []
    doubtful: dict[str, list[str]] = {UNTHOUGHT: [], OTHER_MODE: [], LED: []}

    def rows(digest: _Hash) -> Iterable[ChatRow]:
        read = read_rows(source, digest, split=split)
        return tqdm(read, "reading", unit=" rows", delay=5, leave=False, disable=None)

    read: Read = reader.read if ranks.count == 1 else _read_by_all(rows(hashlib.sha256()), reader, ranks)
    for row in rows(digest):
        try:
            conversation, doubts = read(row)
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


def _read_by_all(rows: Iterable[ChatRow], reader: Reader, ranks: Ranks) -> Read:
    """As `reader.read`, for the same rows in the same order; here each rank reads its part of them."""
    own: list[tuple[str, str | Packed]] = []
    for row in islice(rows, ranks.rank, None, ranks.count):
        try:
            own.append((row.id, reader.packed(*reader.read(row))))
        except BadRow as fault:
            own.append((row.id, str(fault)))
    # With `own` in a list each rank is one object; zip_longest, since the first ranks may have one row more.
    everyones = chain.from_iterable(zip_longest(*ranks.gather([own])))

    def read(row: ChatRow) -> tuple[Conversation, list[str]]:
        id, found = next(everyones, None) or (None, "")
        if id != row.id:
            raise DataError(
                f"row {row.name} is another one where another rank reads it",
                "the same rows for all ranks, and files that do not change while they are read",
            )
        if isinstance(found, str):
            raise BadRow(found)
        return reader.unpacked(found)

    return read


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
