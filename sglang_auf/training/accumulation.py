"""The gradient of one step. Its loss is a ratio of sums over all micro-batches of all ranks.

DDP and FSDP average gradients over ranks, and a rank knows its own sums only. A loss of one branch is therefore
back-propagated as its numerator, and the gradients are divided by the pooled denominator afterwards. A loss of two
branches with a denominator each (Domino) needs the pooled denominators before anything is back-propagated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sglang_auf.errors import noting
from sglang_auf.training.data.batching import Batch
from sglang_auf.training.losses.step import Terms

MicroBatch = tuple[Batch, Tensor, Tensor]
"""A batch, its anchors and which of them count: the arguments of TrainingStep."""


@dataclass(frozen=True, slots=True)
class PooledLoss:
    """Loss over all ranks and micro-batches. metrics: sums of what TrainingStep counts; empty unless asked for."""

    loss: float
    metrics: dict[str, Tensor]


def pooled_gradient(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    count: int,
    *,
    branches: int,
    progress: float,
    diagnostics: bool,
) -> PooledLoss:
    """Add the gradient of the pooled loss to .grad. Every rank must call this.

    model: TrainingStep as accelerate wrapped it. micro_batches: the `count` micro-batches of this rank; every rank has
    the same number. branches: branches of the objective. diagnostics: as in TrainingStep; also fills `metrics`. The
    loss is nan where no slot carries any.
    """
    factors: Tensor | None = None
    if branches > 1 and count > 1:
        # Each branch is divided by its own denominator, which depends on what the drafter gets right in later
        # micro-batches. A first pass without gradient finds the denominators. Separate gradients for each branch
        # would cost a second backward pass, which takes longer, and the memory of the gradients once more.
        micro_batches = list(micro_batches)
        factors = _factors(accelerator, *_without_gradient(model, micro_batches, progress))
    numerators: Tensor | float = 0.0
    denominators: Tensor | float = 0.0
    metrics: dict[str, Tensor] = {}
    for number, micro_batch in enumerate(micro_batches, start=1):
        with _noted(micro_batch), nullcontext() if number == count else accelerator.no_sync(model):
            terms: Terms = model(*micro_batch, progress, diagnostics)
            if branches > 1 and factors is None:
                factors = _factors(accelerator, terms.denominators, terms.weights)
            loss = terms.numerators if factors is None else terms.numerators * factors
            accelerator.backward(loss.sum())
        numerators = numerators + terms.numerators.detach().double()
        denominators = denominators + terms.denominators.double()
        if diagnostics:
            metrics = {name: metrics.get(name, 0.0) + value for name, value in terms.metrics.items()}
    sums = accelerator.reduce(torch.stack([numerators, denominators])).tolist()
    if branches == 1:
        _scale(model, accelerator.num_processes / sums[1][0] if sums[1][0] else math.nan)
    shares = zip(terms.weights.tolist(), *sums, strict=True)
    return PooledLoss(
        sum(weight * over / under if under else math.nan for weight, over, under in shares),
        accelerator.reduce(metrics),
    )


def _without_gradient(model: nn.Module, micro_batches: Iterable[MicroBatch], progress: float) -> tuple[Tensor, Tensor]:
    """(denominators of this rank, branch weights)."""
    terms: list[Terms] = []
    for micro_batch in micro_batches:
        with _noted(micro_batch), torch.no_grad():
            terms.append(model(*micro_batch, progress, False))
    return torch.stack([each.denominators for each in terms]).sum(0), terms[0].weights


def _noted(micro_batch: MicroBatch) -> AbstractContextManager[None]:
    """Say in an error how large the micro-batch is."""
    batch, anchors, _ = micro_batch
    rows, tokens = batch.input_ids.shape
    return noting(
        f"the drafter on a micro-batch of {rows} rows x {tokens} tokens with {anchors.shape[1]} anchors a row"
    )


def _factors(accelerator: Accelerator, denominators: Tensor, weights: Tensor) -> Tensor:
    """[branches]: factors of the numerators that make the average over ranks the gradient of the loss."""
    factors: Tensor = accelerator.num_processes * weights / accelerator.reduce(denominators)
    return factors


def _scale(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
