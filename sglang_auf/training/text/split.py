"""Which conversations are held out, and which of the others are left out for them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias

from sglang_auf.errors import ConfigError, DataError
from sglang_auf.training.text.reader import Conversation

logger = logging.getLogger(__name__)

Apart: TypeAlias = Literal["prompt", "tokens"]
"""What no row that is trained on shares with a held-out one: the prompt of an answer, or all of its tokens. The latter
is for runs that an earlier version began, whose rows must stay the same."""


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
