"""One training step, forward and backward, in the three variants that are compared, on synthetic batches.

Each token of the text is, with a set probability, the drafter's argmax at that position. So the drafter is right as
often as a trained one, and blocks fail where they would in training. Weights and features are random, and there is no
optimiser: the same batch costs the same each time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.training.step_shapes import Shape
from sglang_auf.errors import ConfigError
from sglang_auf.models.dflash import Drafter
from sglang_auf.models.products import bf16_products
from sglang_auf.training.data.batching import Batch, draw_anchors
from sglang_auf.training.losses.cross_entropy import head_argmax
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import Terms, TrainingStep

AUF, DECAY, DENSE = "auf", "decay", "decay-dense"
VARIANTS = (AUF, DECAY, DENSE)

DENSE_BLOCKS = 128
"""Blocks whose logits exist at the same time in the usual implementation (SpecForge's objective_chunk_blocks)."""

MASK_LOGIT = 12.0
"""Approximate logit of the mask token, which this random drafter predicts in every slot."""

MicroBatch = tuple[Batch, Tensor, Tensor]
"""A batch, its anchors and which of them count: the arguments of TrainingStep."""


class DenseDecay(TrainingStep):
    """`decay` as it is usually computed: all logits of DENSE_BLOCKS blocks at a time, under activation checkpointing.

    Loss and gradient are those of TrainingStep. The logits are computed in the forward and again in the backward pass.
    """

    def forward(
        self, batch: Batch, anchors: Tensor, valid: Tensor, progress: float = 0.0, diagnostics: bool = False
    ) -> Terms:
        hidden, tokens, mask = self.blocks(batch, anchors, valid)
        hidden, labels, mask = hidden[:, 1:], tokens[:, 1:], mask[:, 1:]
        weights = torch.exp(-torch.arange(mask.shape[1], device=mask.device) / self.settings.gamma) * mask
        parts = zip(*(each.split(DENSE_BLOCKS) for each in (hidden, labels, weights)), strict=True)
        numerators, right = zip(*(checkpoint(self._part, *part, use_reentrant=False) for part in parts), strict=True)
        right_in_all = (torch.cat(right) & mask).sum()
        metrics = {
            "blocks": mask.new_tensor(len(mask), dtype=torch.float32),
            "support": mask.sum(),
            "right": right_in_all,
        }
        one = torch.ones(1, device=mask.device)
        return Terms(torch.stack(numerators).sum()[None], weights.sum()[None], one, metrics)

    def _part(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden.to(self.head.dtype), self.head)
        ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        return (ce * weights).sum(), logits.detach().argmax(-1) == labels


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One step that was run. r_active: share of a block's B slots that this variant's objective credits."""

    seconds: float
    loss: float
    r_active: float


class Bench:
    """A drafter of random weights, the target's two tables, and the steps that train it.

    As in the trainer, weights are float32. Where precision is bf16, tables and features are bf16 and autocast is on.
    """

    def __init__(self, shape: Shape, device: str, precision: Literal["bf16", "fp32"], seed: int = 0) -> None:
        torch.manual_seed(seed)
        config = shape.drafter
        self.shape, self.device, self.bf16 = shape, device, precision == "bf16"
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        drafter = Drafter(config).to(device)
        # The state of a mask slot is close to the mask's embedding, so that token gets the largest logit.
        embedding = torch.randn(config.vocab_size, config.hidden_size, dtype=self.dtype, device=device)
        head = embedding * (MASK_LOGIT / config.hidden_size)
        self._steps: dict[str, TrainingStep] = {
            AUF: TrainingStep(drafter, embedding, head, ObjectiveSettings(name="auf")),
            DECAY: TrainingStep(drafter, embedding, head, ObjectiveSettings(name="decay", gamma=shape.gamma)),
            DENSE: DenseDecay(drafter, embedding, head, ObjectiveSettings(name="decay", gamma=shape.gamma)),
        }

    def batch(self, shape: Shape, r_active: float, seed: int) -> MicroBatch:
        """A batch of the shape's size in which AUF credits about `r_active` of a block's B slots."""
        config = shape.drafter
        chance = chance_right(r_active, config.block_size)
        generator = torch.Generator().manual_seed(seed)
        size = (shape.rows, shape.length)
        text = torch.randint(0, config.vocab_size, size, generator=generator)
        features = torch.randn(*size, len(config.target_layer_ids) * config.hidden_size, generator=generator)
        batch = Batch(
            input_ids=text.to(self.device),
            loss_mask=torch.ones(size, dtype=torch.bool, device=self.device),
            lengths=torch.full(size[:1], shape.length, device=self.device),
            features=features.to(self.device, self.dtype),
            ids=[f"synthetic/{row}" for row in range(shape.rows)],
        )
        anchors, valid = draw_anchors(batch.loss_mask, shape.anchors, [generator] * shape.rows)
        right = (torch.rand(size, generator=generator) < chance).to(self.device)
        batch.input_ids = torch.where(right, self._own_tokens(batch, anchors), batch.input_ids)
        return batch, anchors, valid

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _own_tokens(self, batch: Batch, anchors: Tensor) -> Tensor:
        """[R, S]: the drafter's prediction at each position that a block covers, elsewhere the text."""
        step = self._steps[AUF]
        config = step.drafter.config
        positions = anchors[..., None] + torch.arange(1, config.block_size, device=anchors.device)
        masks = torch.full((*anchors.shape, config.block_size), config.mask_token_id, device=anchors.device)
        masks[..., 0] = batch.input_ids.gather(1, anchors)
        with bf16_products(self.device), torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            hidden = step.drafter(batch.features, step.embedding[masks], anchors)
            drafted = head_argmax(hidden[:, :, 1:].flatten(0, 2), step.head, chunk=step.chunk)
        inside = positions.clamp(max=batch.input_ids.shape[1] - 1).flatten(1)
        return batch.input_ids.scatter(1, inside, drafted.view_as(inside))

    def run(self, variant: str, micro_batch: MicroBatch) -> TimedStep:
        """Run forward and backward, without gradients from before."""
        step = self._steps[variant]
        self.drop_gradients()
        self._wait()
        began = time.perf_counter()
        with bf16_products(self.device):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                terms = step(*micro_batch)
            loss = (terms.numerators / terms.denominators).sum()
            loss.backward()
        self._wait()
        seconds = time.perf_counter() - began
        slots = terms.metrics["blocks"] * self.shape.drafter.block_size
        return TimedStep(seconds, float(loss.detach()), float(terms.metrics["support"] / slots))

    def drop_gradients(self) -> None:
        self._steps[AUF].drafter.zero_grad(set_to_none=True)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def chance_right(r_active: float, block_size: int) -> float:
    """Probability of a right slot with which AUF credits `r_active` of a block's slots.

    It solves sum over k < B - 1 of chance**k = r_active * B. Raises ConfigError where none does: the first drafted slot
    always has credit, the anchor never.
    """
    slots = block_size - 1
    if not 1 / block_size <= r_active <= slots / block_size:
        raise ConfigError(
            f"--r-active {r_active} for blocks of {block_size}",
            f"{1 / block_size:.3f} to {slots / block_size:.3f}: one slot always has credit, and the anchor has none",
        )
    kept = min(max(r_active * block_size, 1.0), float(slots))  # rounding must not move it out of reach
    root = brentq(lambda chance: sum(chance**slot for slot in range(slots)) - kept, 0.0, 1.0, xtol=2.0**-50)
    return float(root)
