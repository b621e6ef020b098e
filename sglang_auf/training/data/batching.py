"""Which rows form a batch, and in which order batches are trained on: a function of lengths, seed and epoch alone.

Arms of an ablation that share data and seed therefore see the same batches in the same order, and a run that is resumed
at batch k goes on with plan[k:]. Of the batches of one step, rank r of R trains on every R-th from the r-th on. Rows of
similar length go together, so that little is padding.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sglang_auf.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from sglang_auf.training.data.conversations import Conversation

log = logging.getLogger(__name__)

WINDOW = 1024
"""Rows sorted by length together: enough for tight batches, and few enough that an epoch is well mixed."""

PADDING_ID = 0
"""Any token of the vocabulary: what lies past a row's length is masked."""


class Padded(NamedTuple):
    """input_ids [R, S] int64 and loss_mask [R, S] bool, right padded; lengths [R] int64."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    lengths: torch.Tensor


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_tokens: int,
    seed: int,
    epoch: int,
    batch_rows: int | None = None,
    multiple_of: int = 1,
) -> list[list[int]]:
    """The batches of one epoch as row indices. Every row is in one, and in no second one.

    lengths: tokens of each row. batch_tokens: longest row times rows, at most. batch_rows: rows of a batch, at most.
    multiple_of: their count is made a multiple of this (ranks times accumulation steps) by halving the batches of most
    rows, so that every optimiser step is a full one and no rank waits. Where all batches have one row only, the last
    few of the epoch's order are left out, which is logged. Raises DataError, naming the rows, if one is longer than
    batch_tokens or they are fewer than multiple_of.
    """
    if multiple_of < 1 or (batch_rows is not None and batch_rows < 1):
        raise ConfigError(f"multiple_of {multiple_of}, batch_rows {batch_rows}", "1 or more", "correct the setting")
    too_long = [row for row, length in enumerate(lengths) if length > batch_tokens]
    if too_long:
        raise DataError(
            f"rows {too_long[:10]} of {len(lengths)}, up to {max(lengths)} tokens long",
            f"rows of at most batch_tokens = {batch_tokens}",
            "raise batch_tokens, or lower the length limit of the data",
        )
    if len(lengths) < multiple_of:
        raise DataError(
            f"{len(lengths)} rows", f"at least {multiple_of}, one a rank and accumulation step", "give more rows"
        )
    order = list(range(len(lengths)))
    generator = random.Random(f"{seed}/{epoch}")
    generator.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = sorted(order[start : start + WINDOW], key=lambda row: lengths[row])
        batches += _packed(window, lengths, batch_tokens, batch_rows or len(window))
    for _ in range(-len(batches) % multiple_of):
        widest = max(range(len(batches)), key=lambda batch: len(batches[batch]))
        rows = batches[widest]
        if len(rows) == 1:
            break
        batches[widest : widest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    generator.shuffle(batches)
    whole = len(batches) - len(batches) % multiple_of
    if whole < len(batches):
        log.warning("epoch %d leaves out rows %s, which fill no step of %d", epoch, batches[whole:], multiple_of)
    return batches[:whole]


def collate(conversations: Sequence[Conversation]) -> Padded:
    """Right-padded tensors of some rows; S is the length of the longest."""
    import torch

    lengths = [len(conversation.input_ids) for conversation in conversations]
    input_ids = torch.full((len(lengths), max(lengths)), PADDING_ID, dtype=torch.long)
    loss_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, conversation in enumerate(conversations):
        input_ids[row, : lengths[row]] = torch.tensor(conversation.input_ids, dtype=torch.long)
        loss_mask[row, : lengths[row]] = torch.tensor(conversation.loss_mask, dtype=torch.bool)
    return Padded(input_ids, loss_mask, torch.tensor(lengths))


def _packed(rows: Sequence[int], lengths: Sequence[int], batch_tokens: int, batch_rows: int) -> list[list[int]]:
    """Rows of ascending length cut into batches; the last row of a batch is its longest."""
    batches: list[list[int]] = []
    for row in rows:
        if batches and len(batches[-1]) < batch_rows and (len(batches[-1]) + 1) * lengths[row] <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
