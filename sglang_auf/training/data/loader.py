"""The data of a run: its conversations, which of them are trained on in which step, and their batches."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sglang_auf.errors import ConfigError, noting
from sglang_auf.recording.manifest import require_target
from sglang_auf.settings import enable_thinking
from sglang_auf.training.data.batching import (
    Batch,
    anchor_generators,
    collate,
    draw_anchors,
    make_batch,
    plan_batches,
    to_device,
    with_features,
)
from sglang_auf.training.data.feature_cache import CachedFeatures
from sglang_auf.training.data.features import FeatureSource, FrozenTarget, OnlineFeatures
from sglang_auf.training.recipe import Recipe
from sglang_auf.training.text.conversations import ALONE, Ranks, load_conversations
from sglang_auf.training.text.reader import Conversation
from sglang_auf.training.text.split import Apart, split_held_out

logger = logging.getLogger(__name__)

T = TypeVar("T")

ONLINE = "online"
DTYPE_OF_PRECISION = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class TrainingData:
    """sha256: of all that was read. facts: counts, and reasons for rejected rows, as JSON values."""

    train: list[Conversation]
    held_out: list[Conversation]
    sha256: str
    facts: dict[str, Any]

    def count(self, token: int) -> int:
        """How often the data has this token, prompts and held-out conversations included."""
        return sum(conversation.input_ids.count(token) for conversation in (*self.train, *self.held_out))


def load_data(
    recipe: Recipe, target: Path, vocab_size: int, apart: Apart = "prompt", ranks: Ranks = ALONE
) -> TrainingData:
    """Read, check and split the sources of a recipe; held-out rows have labels where serving drafts (as_served).

    apart: as for split_held_out. With "tokens" held-out rows have all labels, as in the runs of earlier versions.
    ranks: of a run, which read together. Raises DataError, or ConfigError where it has none.
    """
    from transformers import AutoTokenizer

    settings = recipe.data
    if not settings.sources:
        raise ConfigError(
            "a recipe without data.sources",
            "files or data sets with answers of the target",
            "give --data FILE (`sglang-auf regenerate` makes one)",
        )
    require_target(settings.sources, target)
    loaded = load_conversations(
        list(settings.sources),
        AutoTokenizer.from_pretrained(target),
        max_length=settings.max_length,
        min_answer_tokens=recipe.min_answer_tokens,
        thinking=enable_thinking(settings.thinking),
        overlong=settings.overlong,
        vocab_size=vocab_size,
        split=settings.split,
        ranks=ranks,
    )
    train, held_out = split_held_out(loaded.conversations, count=settings.held_out, apart=apart)
    if apart == "prompt":
        held_out = [conversation.as_served() for conversation in held_out]
    facts = {
        "sources": list(settings.sources),
        "sha256": loaded.sha256,
        "train": len(train),
        "held_out": len(held_out),
        "answer_tokens": loaded.answer_tokens,
        "rejected": {reason: len(rows) for reason, rows in loaded.rejected.items()},
        "truncated": len(loaded.truncated),
        "unthought": len(loaded.unthought),
    }
    logger.info(
        "%d conversations to train on, %d held out; %d answer tokens in all",
        *(len(train), len(held_out), loaded.answer_tokens),
    )
    return TrainingData(train, held_out, loaded.sha256, facts)


class Plan:
    """The micro-batches of every step of a run, which depend on lengths, seed and sizes alone."""

    def __init__(self, conversations: Sequence[Conversation], recipe: Recipe) -> None:
        """Raises ConfigError where an earlier objective would end before its first step."""
        self._lengths = [len(conversation) for conversation in conversations]
        self._recipe = recipe
        self._epochs: list[list[list[int]]] = []
        self._ends: list[int] = []
        """Number of steps up to the end of each epoch."""
        schedule = recipe.schedule
        while len(self._epochs) < (schedule.epochs or 1) or (schedule.max_steps or 0) > self._ends[-1]:
            self._plan_epoch()
        self.steps: int = schedule.max_steps or self._ends[-1]
        self._require_a_step_of_each_objective()

    def at(self, step: int) -> tuple[int, list[list[int]]]:
        """(epoch, row numbers of each micro-batch) of a step, 0..steps-1."""
        epoch = next(number for number, end in enumerate(self._ends) if step < end)
        first = step - (self._ends[epoch - 1] if epoch else 0)
        size = self._recipe.batch.micro_batches
        return epoch, self._epochs[epoch][first * size : (first + 1) * size]

    def _require_a_step_of_each_objective(self) -> None:
        objective, steps = self._recipe.objective, self.steps
        reached = {objective.phase(index / steps) for index in range(steps)}
        missed = [name for phase, name in enumerate(objective.names) if phase not in reached]
        if missed:
            raise ConfigError(
                f"objective {objective.description}: none of the {steps} steps of this run would train "
                f"{', '.join(missed)}",
                "a step of each objective",
                "move objective.earlier's shares apart, or train for more steps",
            )

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
        self._epochs.append(planned)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(planned) // batch.micro_batches)


class BatchMaker:
    """Makes the batches of one run, on one device. target: frozen, for its embedding and head."""

    def __init__(self, recipe: Recipe, target: Path, device: torch.device) -> None:
        """Raises ConfigError, TargetError or DataError where the target or the cache does not fit the recipe."""
        self._recipe = recipe
        labels, layers = recipe.objective.labels, recipe.drafter.taps
        dtype = DTYPE_OF_PRECISION[recipe.precision]
        self.target: FrozenTarget
        self._features: FeatureSource
        if recipe.features == ONLINE:
            online = OnlineFeatures(target, layers, dtype=dtype, device=str(device), argmax=labels == "target")
            self.target = self._features = online
            return
        if labels == "target":
            raise ConfigError(
                "objective.labels target with features from a cache",
                "features online, which come with the target's own tokens",
                "--set features=online, or --set objective.labels=text",
            )
        self._features = CachedFeatures(recipe.features, target, layers, dtype=dtype, device=str(device))
        self.target = FrozenTarget(target, layers=0, dtype=dtype, device=str(device))

    def require(self, conversations: Sequence[Conversation]) -> None:
        """Raises DataError where the cache lacks the features of one of them."""
        if isinstance(self._features, CachedFeatures):
            self._features.require(conversations)

    def batch(self, conversations: Sequence[Conversation]) -> Batch:
        return with_features(conversations, self._features, labels=self._recipe.objective.labels)

    def with_anchors(self, conversations: Sequence[Conversation], epoch: int) -> tuple[Batch, Tensor, Tensor]:
        """A batch, its anchors [R, N] of this epoch, and which of them count."""
        padded, ids = collate(conversations), [conversation.id for conversation in conversations]
        generators = anchor_generators(ids, self._recipe.seed, epoch)
        drawn = draw_anchors(padded.loss_mask, self._recipe.batch.anchors_per_row, generators)
        with noting("the features of a micro-batch of {} rows x {} tokens".format(*padded.input_ids.shape)):
            batch = make_batch(padded, ids, self._features, self._recipe.objective.labels)
        anchors, valid = (to_device(tensor, self._features.device) for tensor in drawn)
        return batch, anchors, valid

    def stream(
        self, wanted: Iterable[tuple[Sequence[Conversation], int]]
    ) -> Generator[tuple[Batch, Tensor, Tensor], None, None]:
        """with_anchors of each, when it is asked for.

        What comes from a cache is read one micro-batch ahead: for Qwen3-8B that is 500 MB.
        """
        made = starmap(self.with_anchors, wanted)
        yield from one_ahead(made, self._features.device) if isinstance(self._features, CachedFeatures) else made


def one_ahead(items: Iterator[T], device: torch.device) -> Generator[T, None, None]:
    """The same items. A thread, with `device` as its own, makes the next one while the caller works with this one."""
    end = object()
    on = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
    with ThreadPoolExecutor(1, **on) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]
