"""Conversations as tensors: padded, with the target's features, with anchors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sglang_auf.errors import ConfigError
from sglang_auf.training.data.batching import collate
from sglang_auf.training.data.conversations import Conversation
from sglang_auf.training.data.feature_cache import CachedFeatures
from sglang_auf.training.data.features import FeatureSource, FrozenTarget, OnlineFeatures
from sglang_auf.training.data.loader import anchor_generators
from sglang_auf.training.losses.step import Batch, draw_anchors
from sglang_auf.training.recipe import Recipe

ONLINE = "online"
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class BatchMaker:
    """Batches of one run, on one device. target: the frozen one, for its embedding and head."""

    def __init__(self, recipe: Recipe, target: Path, device: torch.device) -> None:
        """Raises ConfigError, TargetError or DataError where target or cache are not what the recipe needs."""
        self._recipe, self._device = recipe, device
        self._wants_argmax = recipe.objective.labels == "target"
        dtype, layers = DTYPES[recipe.precision], recipe.drafter.target_layer_ids
        self.target: FrozenTarget
        self._features: FeatureSource
        if recipe.features == ONLINE:
            online = OnlineFeatures(target, layers, dtype=dtype, device=str(device), argmax=self._wants_argmax)
            self.target = self._features = online
            return
        if self._wants_argmax:
            raise ConfigError(
                "objective.labels target with features from a cache",
                "features online, which come with the target's own tokens",
                "--set features=online, or --set objective.labels=text",
            )
        self._features = CachedFeatures(recipe.features, target, layers, dtype=dtype, device=str(device))
        self.target = FrozenTarget(target, layers=0, dtype=dtype, device=str(device))

    def require(self, conversations: Sequence[Conversation]) -> None:
        """Raises DataError unless the features of all of them can be had."""
        if isinstance(self._features, CachedFeatures):
            self._features.require(conversations)

    def batch(self, conversations: Sequence[Conversation]) -> Batch:
        padded = collate(conversations)
        ids = [conversation.id for conversation in conversations]
        input_ids, lengths = padded.input_ids.to(self._device), padded.lengths.to(self._device)
        labels: Tensor | None = None
        if self._wants_argmax:
            assert isinstance(self._features, OnlineFeatures)
            features, following = self._features.with_argmax(input_ids, lengths)
            labels = torch.cat([input_ids[:, :1], following[:, :-1]], dim=1)
        else:
            features = self._features(ids, input_ids, lengths)
        return Batch(input_ids, padded.loss_mask.to(self._device), lengths, features, ids, labels)

    def with_anchors(self, conversations: Sequence[Conversation], epoch: int) -> tuple[Batch, Tensor, Tensor]:
        """A batch, its anchors [R, N] of this epoch, and which of them count."""
        batch = self.batch(conversations)
        generators = anchor_generators(batch.ids, self._recipe.seed, epoch)
        return batch, *draw_anchors(batch.loss_mask, self._recipe.batch.anchors_per_row, generators)
