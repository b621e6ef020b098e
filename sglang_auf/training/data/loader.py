"""The conversations of a run, and which of them are trained on in which step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_auf.errors import ConfigError, TrainingError
from sglang_auf.training.data.batching import plan_batches
from sglang_auf.training.data.conversations import Conversation, load_conversations, split_held_out
from sglang_auf.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class TrainingData:
    """sha256: of all that was read. facts: counts and reasons, as plain JSON."""

    train: list[Conversation]
    held_out: list[Conversation]
    sha256: str
    facts: dict[str, Any]


def load_data(recipe: Recipe, target: Path, vocab_size: int) -> TrainingData:
    """Read, check and split the sources of a recipe. Raises DataError, or ConfigError where it names none."""
    from transformers import AutoTokenizer

    settings = recipe.data
    if not settings.sources:
        raise ConfigError(
            "a recipe without data.sources",
            "files or data sets with answers of the target",
            "give --data FILE (`sglang-auf regenerate` makes one)",
        )
    loaded = load_conversations(
        list(settings.sources),
        AutoTokenizer.from_pretrained(target),
        max_length=settings.max_length,
        min_answer_tokens=recipe.min_answer_tokens,
        thinking=None if settings.thinking is None else settings.thinking == "on",
        overlong=settings.overlong,
        vocab_size=vocab_size,
        split=settings.split,
    )
    train, held_out = split_held_out(loaded.conversations, count=settings.held_out)
    facts = {
        "sources": list(settings.sources),
        "sha256": loaded.sha256,
        "train": len(train),
        "held_out": len(held_out),
        "answer_tokens": loaded.answer_tokens,
        "rejected": {reason: len(rows) for reason, rows in loaded.rejected.items()},
        "truncated": len(loaded.truncated),
    }
    return TrainingData(train, held_out, loaded.sha256, facts)


class Plan:
    """The micro-batches of every step of a run, from lengths, seed and sizes alone."""

    def __init__(self, conversations: Sequence[Conversation], recipe: Recipe) -> None:
        self._lengths = [len(conversation) for conversation in conversations]
        self._recipe = recipe
        self._epochs: list[list[list[int]]] = []
        self._ends: list[int] = []
        """Steps up to the end of each epoch."""
        schedule = recipe.schedule
        while len(self._epochs) < (schedule.epochs or 1) or (schedule.max_steps or 0) > self._ends[-1]:
            self._plan_epoch()
        self.steps: int = schedule.max_steps or self._ends[-1]

    def at(self, step: int) -> tuple[int, list[list[int]]]:
        """(epoch, row numbers of each micro-batch) of step 0..steps-1."""
        epoch = next(number for number, end in enumerate(self._ends) if step < end)
        first = step - (self._ends[epoch - 1] if epoch else 0)
        size = self._recipe.batch.micro_batches
        return epoch, self._epochs[epoch][first * size : (first + 1) * size]

    def _plan_epoch(self) -> None:
        batch = self._recipe.batch
        planned = plan_batches(
            self._lengths,
            batch_tokens=batch.batch_tokens,
            batch_rows=batch.batch_rows,
            seed=self._recipe.seed,
            epoch=len(self._epochs),
            multiple_of=batch.micro_batches,
        )
        if not planned:
            raise TrainingError(
                f"{len(self._lengths)} conversations, which fill no step of {batch.micro_batches} micro-batches",
                "more conversations than that",
                "give more data, or lower batch.micro_batches",
            )
        self._epochs.append(planned)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(planned) // batch.micro_batches)


def anchor_generators(ids: Sequence[str], seed: int, epoch: int) -> list[torch.Generator]:
    """One generator a conversation, so that its anchors depend on nothing but seed, epoch and id.

    Arms of an ablation see the same anchors, on any number of ranks, resumed or not.
    """
    generators = []
    for id in ids:
        digest = hashlib.sha256(f"{seed}/{epoch}/{id}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1))
    return generators
