"""Is the new drafter better? Both walk the same answers, and each answer is a pair."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.models.loading import load_drafter
from sglang_auf.models.products import bf16_products
from sglang_auf.stats.bootstrap import Difference, paired_difference
from sglang_auf.training.data.batching import plan_batches, with_features
from sglang_auf.training.data.conversations import Conversation
from sglang_auf.training.data.features import OnlineFeatures
from sglang_auf.training.evaluate import BATCH_TOKENS, walks
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import TrainingStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Comparison:
    """tau of both drafters: means over the same `answers`. difference: of the new to the old one."""

    answers: int
    old: float
    new: float
    difference: Difference

    @property
    def better(self) -> bool:
        """Whether the new drafter's tau is larger by more than chance: the interval lies above 0."""
        return self.difference.low is not None and self.difference.low > 0

    def __str__(self) -> str:
        low, high = self.difference.low, self.difference.high
        interval = "" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]"
        return f"tau {self.old:.4f} before, {self.new:.4f} after; {self.difference.mean:+.4f}{interval}"


class Walkers:
    """Two drafters of one shape over one target."""

    def __init__(self, target: Path, old: Path, new: Path, vocabulary: DraftVocabulary | None) -> None:
        """old, new: their directories. vocabulary: the tokens that both may draft, None for all."""
        models = [load_drafter(path) for path in (old, new)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._features = OnlineFeatures(target, models[0].config.target_layer_ids, device=device)
        settings = ObjectiveSettings(name="decay" if models[0].config.head == "domino" else "full")  # of no loss here
        self._steps = [
            TrainingStep(model, self._features.embedding, self._features.head, settings).to(device) for model in models
        ]
        self._vocabulary = None if vocabulary is None else torch.tensor(vocabulary.tokens, device=device)

    def compare(self, name: str, conversations: Sequence[Conversation]) -> Comparison:
        """name: of the answers, on which the interval's random draws depend."""
        lengths = [len(conversation) for conversation in conversations]
        taus: tuple[list[float], list[float]] = ([], [])
        plan = plan_batches(lengths, batch_tokens=max(BATCH_TOKENS, *lengths), seed=0, epoch=0)
        for rows in tqdm(plan, f"walking {name}", unit="batch", disable=None):
            batch = with_features([conversations[row].as_served() for row in rows], self._features)
            with torch.no_grad(), bf16_products(), torch.autocast(batch.input_ids.device.type, torch.bfloat16):
                walked = [next(walks(step, batch, self._vocabulary)) for step in self._steps]
            for of_drafter, answers in zip(taus, walked, strict=True):
                of_drafter.extend(answer.tau for answer in answers if answer.tau is not None)
        old, new = taus
        return Comparison(len(old), sum(old) / len(old), sum(new) / len(new), paired_difference(name, old, new))
