"""A step of 8 micro-batches, and its gradient by any number of ranks. training_forks.py calls its functions too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.training.accumulation import MicroBatch, pooled_gradient
from sglang_auf.training.data.batching import Batch, draw_anchors
from sglang_auf.training.losses import cross_entropy
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import TrainingStep
from sglang_auf.training.runtime import make_accelerator
from tests.support.tiny_models import VOCABULARY, target_config
from tests.support.training_runs import allow_fsdp_on_a_cpu, tiny_recipe

MICRO_BATCHES = 8
PROGRESS = 0.4


def make_step(head: str, objective: str) -> TrainingStep:
    sizes = {"gru_hidden_dim": 8, "emb_dim": 4} if head == "domino" else {}
    config = DrafterConfig.for_target(
        target_config(), num_layers=1, target_layer_ids=[1, 2], block_size=5, mask_token_id=3, head=head, **sizes
    )  # type: ignore[arg-type]
    torch.manual_seed(0)
    drafter = Drafter(config)
    if head == "domino":  # it starts at zero, where the two branches are alike
        torch.nn.init.normal_(drafter.embed_proj[2].weight)
    # A head of few distinct rows: a random drafter is then right often enough for supports to differ.
    tables = torch.randn(2, VOCABULARY, 64)
    tables[1, 8:] = -10
    return TrainingStep(drafter, tables[0], tables[1], ObjectiveSettings(name=objective))


def micro_batches() -> list[MicroBatch]:
    """Of very different sizes, so that a mean of means is far from the ratio of sums."""
    made: list[MicroBatch] = []
    for number in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(number)
        rows, length = 1 + number % 3, 10 + 3 * number
        input_ids = torch.randint(0, 8, (rows, length), generator=generator)
        loss_mask = torch.rand(rows, length, generator=generator) < 0.9
        features = torch.randn(rows, length, 128, generator=generator)
        batch = Batch(input_ids, loss_mask, torch.full((rows,), length), features, [str(row) for row in range(rows)])
        seeds = [torch.Generator().manual_seed(100 * number + row) for row in range(rows)]
        made.append((batch, *draw_anchors(loss_mask, 1 + 2 * number, seeds)))
    return made


def step_gradient(
    cases: list[tuple[str, str]],
    out: str,
    environment: dict[str, str] | None = None,
    precision: str = "fp32",
) -> None:
    """Write the gradient of the pooled loss of every (head, objective), the loss, a metric and the waves of each rank.

    environment: FSDP's, if that is to be used. precision: the recipe's. Rank 0 writes.
    """
    if environment:
        os.environ |= environment
        allow_fsdp_on_a_cpu()
    waves, of_head = 0, cross_entropy._waves

    def counted(*arguments: Any) -> Iterator[torch.Tensor]:
        nonlocal waves
        for wave in of_head(*arguments):
            waves += 1
            yield wave

    cross_entropy._waves = counted
    accelerator = make_accelerator(tiny_recipe("target", "data", precision=precision), Path(out).parent)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32  # of what comes from the target
    found: dict[str, torch.Tensor] = {}
    for head, objective in cases:
        step = make_step(head, objective)
        step.embedding, step.head = tables = [table.to(dtype) for table in (step.embedding, step.head)]
        model, _ = accelerator.prepare(step, torch.optim.SGD(step.parameters()))
        if environment:
            assert all(isinstance(layer, FSDPModule) for layer in model.drafter.layers)
            assert model.embedding is tables[0] and model.head is tables[1], "a copy would take memory"
        waves = 0
        mine = [
            (replace(batch, features=batch.features.to(dtype)), *drawn)
            for batch, *drawn in micro_batches()[accelerator.process_index :: accelerator.num_processes]
        ]
        pooled = pooled_gradient(
            accelerator, model, iter(mine), len(mine),
            branches=2 if head == "domino" else 1, progress=PROGRESS, diagnostics=True,
        )  # fmt: skip
        step = accelerator.unwrap_model(model)
        for name, parameter in step.drafter.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            gradient = parameter.grad
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
            found[f"{head} {objective} {name}"] = whole
        found[f"{head} {objective} loss"] = torch.tensor(pooled.loss)
        found[f"{head} {objective} blocks"] = pooled.metrics["blocks"]
        found[f"{head} {objective} waves"] = accelerator.gather(torch.tensor([waves]))
    if accelerator.is_main_process:
        save_file(found, out)
    accelerator.end_training()
    AcceleratorState._reset_state(True)


def reference(head: str, objective: str) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and loss with all micro-batches in one graph, straight from the definition."""
    step = make_step(head, objective)
    terms = [step(*micro_batch, PROGRESS, False) for micro_batch in micro_batches()]
    over = torch.stack([each.numerators for each in terms]).sum(0)
    under = torch.stack([each.denominators for each in terms]).sum(0)
    loss = (terms[0].weights * over / under).sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in step.drafter.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}, loss.item()


def gradients_in(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
