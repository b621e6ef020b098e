"""The held-out answers of a run, walked every so many steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_auf.training.data.batch_maker import BatchMaker
from sglang_auf.training.data.batching import plan_batches
from sglang_auf.training.data.conversations import Conversation
from sglang_auf.training.evaluate import heldout_tau
from sglang_auf.training.losses.step import Batch, TrainingStep
from sglang_auf.training.recipe import Recipe

KEPT_BYTES = 2**31
"""Features are kept between evaluations up to this size, and computed anew above it."""


class HeldOutAnswers:
    """The same answers, in the same batches, at every evaluation."""

    def __init__(self, conversations: Sequence[Conversation], maker: BatchMaker, recipe: Recipe) -> None:
        self._conversations, self._maker, self._recipe = conversations, maker, recipe
        self._kept: list[Batch] = []

    def figures(self, step: TrainingStep) -> dict[str, float | None]:
        """What the drafter does on them now; tau is the macro mean, by which the best checkpoint is chosen."""
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
