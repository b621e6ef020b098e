"""Batches: which conversations form one, in which order they come, what one holds, and where its blocks start.

The plan of an epoch depends on lengths, seed and epoch alone, and the anchors of a conversation on seed, epoch and id.
So the arms of an ablation see the same batches in the same order with the same anchors, on any number of ranks, and a
run that is resumed at batch k continues with plan[k:]. Of the batches of one step, rank r of R trains on batches r,
r + R, r + 2R and so on. Rows of similar length go together, so that little is padding.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor

from sglang_auf.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sglang_auf.training.data.features import FeatureSource, OnlineFeatures
    from sglang_auf.training.text.reader import Conversation

logger = logging.getLogger(__name__)

WINDOW = 1024
"""Rows sorted by length together: enough for tight batches, and few enough that an epoch is well mixed."""

PADDING_ID = 0
"""Any token of the vocabulary: what lies past a row's length is masked."""


@dataclass(slots=True)
class Batch:
    """R conversations, right padded to S tokens.

    input_ids [R, S]; loss_mask [R, S] bool, True where a token is the answer's; lengths [R]; features [R, S, taps * H];
    ids: of the conversations, for messages; labels [R, S]: the token to draft at each position, None for the text's.
    """

    input_ids: Tensor
    loss_mask: Tensor
    lengths: Tensor
    features: Tensor
    ids: list[str]
    labels: Tensor | None = None


class Padded(NamedTuple):
    """input_ids [R, S] int64 and loss_mask [R, S] bool, right padded; lengths [R] int64."""

    input_ids: Tensor
    loss_mask: Tensor
    lengths: Tensor


def plan_batches(
    lengths: Sequence[int],
    *,
    batch_tokens: int,
    seed: int,
    epoch: int,
    batch_rows: int | None = None,
    multiple_of: int = 1,
) -> list[list[int]]:
    """The batches of one epoch as row indices. Every row is in one batch, and in one only.

    lengths: tokens of each row. batch_tokens: the most that longest row times rows may be. batch_rows: the most rows of
    a batch. multiple_of: ranks times accumulation steps. The number of batches is made a multiple of it by halving the
    batches of most rows, so that every optimiser step is a full one and no rank waits. Where all batches have one row,
    the last few of the epoch's order are left out, which is logged. Raises DataError, naming the rows, if one is longer
    than batch_tokens or they are fewer than multiple_of.
    """
    if multiple_of < 1 or (batch_rows is not None and batch_rows < 1):
        raise ConfigError(f"multiple_of {multiple_of}, batch_rows {batch_rows}", "1 or more")
    too_long = [row for row, length in enumerate(lengths) if length > batch_tokens]
    if too_long:
        raise DataError(
            f"rows {too_long[:10]} of {len(lengths)}, up to {max(lengths)} tokens long",
            f"rows of at most batch_tokens = {batch_tokens}",
            "raise batch_tokens, or lower the length limit of the data",
        )
    if len(lengths) < multiple_of:
        raise DataError(f"{len(lengths)} rows", f"at least {multiple_of}, one for each rank and accumulation step")
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
    planned = len(batches) - len(batches) % multiple_of
    if planned < len(batches):
        logger.warning("epoch %d leaves out rows %s, which fill no step of %d", epoch, batches[planned:], multiple_of)
    return batches[:planned]


def with_features(
    conversations: Sequence[Conversation], source: FeatureSource, *, labels: Literal["text", "target"] = "text"
) -> Batch:
    """Conversations as a batch on the source's device.

    labels: what the slots of a block are compared with (objective.labels). The target's own tokens come from an
    OnlineFeatures with argmax=True only.
    """
    return make_batch(collate(conversations), [conversation.id for conversation in conversations], source, labels)


def make_batch(
    padded: Padded, ids: list[str], source: FeatureSource, labels: Literal["text", "target"] = "text"
) -> Batch:
    """As with_features, of conversations that `collate` has padded. No step of it waits for a GPU."""
    input_ids, loss_mask, lengths = (to_device(tensor, source.device) for tensor in padded)
    if labels == "text":
        return Batch(input_ids, loss_mask, lengths, source(ids, padded.input_ids, padded.lengths), ids)
    features, following = cast("OnlineFeatures", source).with_argmax(padded.input_ids, padded.lengths)
    return Batch(
        input_ids, loss_mask, lengths, features, ids, labels=torch.cat([input_ids[:, :1], following[:, :-1]], dim=1)
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, which is on the CPU, on `device`; through pinned memory, so that nobody waits for a GPU's work."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def collate(conversations: Sequence[Conversation]) -> Padded:
    """Right-padded tensors of some rows; S is the length of the longest."""
    lengths = [len(conversation.input_ids) for conversation in conversations]
    input_ids = torch.full((len(lengths), max(lengths)), PADDING_ID, dtype=torch.long)
    loss_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, conversation in enumerate(conversations):
        input_ids[row, : lengths[row]] = torch.tensor(conversation.input_ids, dtype=torch.long)
        loss_mask[row, : lengths[row]] = torch.tensor(conversation.loss_mask, dtype=torch.bool)
    return Padded(input_ids, loss_mask, torch.tensor(lengths))


def anchor_positions(loss_mask: Tensor) -> Tensor:
    """[R, S] bool: where a block may start, that is where a token and the next one are both the answer's."""
    follows = torch.zeros_like(loss_mask)
    follows[:, :-1] = loss_mask[:, 1:]
    return loss_mask & follows


def anchor_generators(ids: Sequence[str], seed: int, epoch: int) -> list[torch.Generator]:
    """One generator for each conversation, so that its anchors depend on seed, epoch and id alone."""
    generators = []
    for id in ids:
        digest = hashlib.sha256(f"{seed}/{epoch}/{id}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1))
    return generators


def draw_anchors(loss_mask: Tensor, per_row: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Up to per_row anchors a row, uniform without replacement, sorted: positions [R, N], and which of them count.

    generators: one for each row, on the CPU. What is drawn for a row depends on nothing else in its batch.
    """
    eligible = [row.nonzero()[:, 0] for row in anchor_positions(loss_mask.cpu())]
    width = max(1, min(per_row, max(len(some) for some in eligible)))
    anchors = torch.zeros(len(eligible), width, dtype=torch.long)
    valid = torch.zeros(len(eligible), width, dtype=torch.bool)
    for row, (some, generator) in enumerate(zip(eligible, generators, strict=True)):
        chosen = some[torch.randperm(len(some), generator=generator)[:width]].sort().values
        anchors[row, : len(chosen)] = chosen
        valid[row, : len(chosen)] = True
    return anchors.to(loss_mask.device), valid.to(loss_mask.device)


def _packed(rows: Sequence[int], lengths: Sequence[int], batch_tokens: int, batch_rows: int) -> list[list[int]]:
    """Rows of ascending length cut into batches; the last row of a batch is its longest."""
    batches: list[list[int]] = []
    for row in rows:
        if batches and len(batches[-1]) < batch_rows and (len(batches[-1]) + 1) * lengths[row] <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
