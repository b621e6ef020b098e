"""The held-out answers of a run, which its drafter walks every so often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sglang_auf.training.data.batching import Batch, plan_batches
from sglang_auf.training.evaluation.walk import heldout_tau
from sglang_auf.training.losses.step import TrainingStep
from sglang_auf.training.recipe import Recipe
from sglang_auf.training.text.reader import Conversation

if TYPE_CHECKING:
    from sglang_auf.training.data.loader import BatchMaker

KEPT_BYTES = 2**31
"""Features are kept between evaluations up to this size, and computed again above it."""


class HeldOutAnswers:
    """The held-out answers of a run, walked every so often: the same answers in the same batches each time."""

    def __init__(self, conversations: Sequence[Conversation], maker: BatchMaker, recipe: Recipe) -> None:
        self._conversations, self._maker, self._recipe = conversations, maker, recipe
        self._kept: list[Batch] = []

    def figures(self, step: TrainingStep) -> dict[str, float | None]:
        """The drafter's figures on them now. tau is the macro mean, by which the best checkpoint is chosen."""
        found = heldout_tau(step, self._batches(), precision=self._recipe.precision)
        figures = {"tau": found.tau_macro, "tau_micro": found.tau_micro}
        figures |= {f"alpha_{k}": alpha for k, alpha in enumerate(found.alpha, start=1)}
        return {**figures, "accuracy": found.accuracy, "loss": found.loss}

    def _batches(self) -> Iterator[Batch]:
        if self._kept:
            yield from self._kept
            return
        lengths = [len(conversation) for conversation in self._conversations]
        sizes = self._recipe.batch
        made: list[Batch] = []
        size = 0
        for rows in plan_batches(
            lengths, batch_tokens=sizes.batch_tokens, batch_rows=sizes.batch_rows, seed=0, epoch=0
        ):
            batch = self._maker.batch([self._conversations[row] for row in rows])
            yield batch
            size += batch.features.nbytes
            made = [*made, batch] if size <= KEPT_BYTES else []
        self._kept = made
