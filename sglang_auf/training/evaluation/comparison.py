"""Drafters over the same answers: each walks them, and each answer is a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.models.dflash import Drafter
from sglang_auf.models.loading import load_drafter
from sglang_auf.stats.bootstrap import Difference, paired_difference
from sglang_auf.training.data.batching import plan_batches, with_features
from sglang_auf.training.data.features import FrozenTarget, OnlineFeatures
from sglang_auf.training.evaluation.walk import HeldOut, HeldOutWalk
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import TrainingStep
from sglang_auf.training.text.reader import Conversation

BATCH_TOKENS = 4096
"""Padded tokens of a batch where there is no recipe."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """tau of two drafters: means over the same `answers`. difference: of the new to the old one."""

    answers: int
    old: float
    new: float
    difference: Difference

    @classmethod
    def of(cls, name: str, old: Sequence[float], new: Sequence[float]) -> Comparison:
        """old, new: tau of each answer. name: of the answers, on which the interval's random draws depend."""
        return cls(len(old), sum(old) / len(old), sum(new) / len(new), paired_difference(name, old, new))

    @property
    def better(self) -> bool:
        """Whether the new drafter's tau is larger by more than chance: the interval lies above 0."""
        return self.difference.low is not None and self.difference.low > 0

    def __str__(self) -> str:
        return f"tau {self.old:.4f} before, {self.new:.4f} after; {self.difference}"


class Walkers:
    """Drafters over one target, which is asked once for the layers that any of them reads."""

    def __init__(self, target: Path, drafters: Sequence[tuple[Path, DraftVocabulary | None]]) -> None:
        """drafters: directory, and the tokens that may be drafted (None: all)."""
        models = [load_drafter(path) for path, _ in drafters]
        taps = [model.config.target_layer_ids for model in models]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._features = OnlineFeatures(target, sorted({layer for layers in taps for layer in layers}), device=device)
        self._columns = [self._of(layers) for layers in taps]
        self._vocabularies = [
            None if listed is None else torch.tensor(listed.tokens, device=device) for _, listed in drafters
        ]
        self._steps = [step_of(model, self._features) for model in models]

    def _of(self, layers: Sequence[int]) -> Tensor | None:
        """The columns of the features that are those of `layers`; None for all."""
        if tuple(layers) == self._features.layer_ids:
            return None
        size = self._features.hidden_size
        starts = torch.tensor([self._features.layer_ids.index(layer) * size for layer in layers])
        return (starts[:, None] + torch.arange(size)).flatten().to(self._features.device)

    def walk(self, name: str, conversations: Sequence[Conversation], trees: Sequence[int] = ()) -> list[HeldOut]:
        """What each drafter does on the answers as serving drafts them. name: of the answers, for the progress bar.

        trees: numbers of nodes of trees to walk with, beside the chain.
        """
        walks = [
            HeldOutWalk(step, vocabulary=vocabulary, trees=trees)
            for step, vocabulary in zip(self._steps, self._vocabularies, strict=True)
        ]
        plan = batches([len(conversation) for conversation in conversations])
        for rows in tqdm(plan, f"walking {name}", unit="batch", disable=None):
            batch = with_features([conversations[row].as_served() for row in rows], self._features)
            for walk, columns in zip(walks, self._columns, strict=True):
                walk.add(batch if columns is None else replace(batch, features=batch.features[..., columns]))
        return [walk.result() for walk in walks]


def step_of(drafter: Drafter, target: FrozenTarget) -> TrainingStep:
    """What walks a drafter, on the target's device. Its loss has the same credit for all slots where that is possible:
    Domino has no such objective.
    """
    objective = ObjectiveSettings(name="decay" if drafter.config.head == "domino" else "full")
    step: TrainingStep = TrainingStep(drafter, target.embedding, target.head, objective).to(target.device)
    return step


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of each batch where there is no recipe, which would say how large they are. lengths: in tokens."""
    return plan_batches(lengths, batch_tokens=max(BATCH_TOKENS, *lengths), seed=0, epoch=0)
