"""The optimisers of a recipe and their learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from sglang_auf.training.recipe import OptimiserSettings

PEAK = "initial_lr"


def make_optimisers(drafter: nn.Module, settings: OptimiserSettings) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon for the matrices of the layers and fc, and AdamW for the rest.

    Muon orthogonalises a weight matrix. That makes no sense for norms, for Domino's GRU (three gates in one tensor) and
    for its projector (one side is the vocabulary): AdamW trains these.
    """
    matrices, rest = _split(drafter, settings)
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
    ]
    if matrices:
        assert settings.muon_lr is not None
        optimisers.append(
            torch.optim.Muon(
                matrices,
                lr=settings.muon_lr,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group[PEAK] = group["lr"]
    return optimisers


def state_numbers(drafter: nn.Module, settings: OptimiserSettings) -> int:
    """How many numbers the optimisers keep: two for each weight of AdamW's, one for each of Muon's."""
    matrices, rest = _split(drafter, settings)
    numbers: int = sum(parameter.numel() for parameter in matrices) + 2 * sum(parameter.numel() for parameter in rest)
    return numbers


def checkpoint_bytes(drafter: nn.Module, settings: OptimiserSettings) -> int:
    """Of the tensors of a checkpoint, weights and the optimisers' state in float32; the rest of its files is small."""
    weights: int = sum(parameter.numel() for parameter in drafter.parameters())
    size: int = torch.float32.itemsize
    return (weights + state_numbers(drafter, settings)) * size


def _split(drafter: nn.Module, settings: OptimiserSettings) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(Muon's, AdamW's)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in drafter.named_parameters():
        is_matrix = parameter.ndim == 2 and (name.startswith("layers.") or name == "fc.weight")
        (matrices if settings.name == "muon" and is_matrix else rest).append(parameter)
    return matrices, rest


def set_learning_rate(optimisers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` of its peak."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group[PEAK] * factor


def schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate in step 0..steps-1: linear warm-up, then half a cosine towards 0.

    It depends on the step alone, so that a resumed run has nothing to restore. No step has rate 0.
    """
    warmup = round(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
