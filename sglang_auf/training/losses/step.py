"""One micro-batch: conversations and anchors in, loss terms out.

The drafter drafts the blocks, cross_entropy.py computes the loss of their slots, and objectives.py decides the credit
of each slot. The terms are sums, not means: the trainer adds them over ranks and accumulation steps and divides once,
so that the loss is the ratio of two sums over the global batch however it is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_auf.models.dflash import Drafter
from sglang_auf.models.domino import correction_inputs
from sglang_auf.training.losses.cross_entropy import HeadLoss, corrected_head_loss, head_argmax, head_loss
from sglang_auf.training.losses.objectives import DOMINO_OBJECTIVES, OBJECTIVES, Objective, ObjectiveSettings, Slots

if TYPE_CHECKING:  # a loss asks for tensors only; how they came together is the data's business
    from sglang_auf.training.data.batching import Batch

# Rows of logits in memory at one time. On a CPU about as many as stay in the caches.
CHUNK = {"cpu": 256}
DEFAULT_CHUNK = 1024


@dataclass(slots=True)
class Terms:
    """numerators, denominators [branches]: the loss is their ratio; only numerators have a gradient.

    weights [branches]: share of each branch in the loss. metrics: sums over this micro-batch; those by slot are [K].
    """

    numerators: Tensor
    denominators: Tensor
    weights: Tensor
    metrics: dict[str, Tensor]


class TrainingStep(nn.Module):  # type: ignore[misc]
    """The drafter with the target's frozen tables. embedding, head [V, H]. settings: an objective for this drafter."""

    embedding: Tensor
    head: Tensor

    def __init__(self, drafter: Drafter, embedding: Tensor, head: Tensor, settings: ObjectiveSettings) -> None:
        super().__init__()
        self.drafter = drafter
        self.settings = settings
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("head", head.detach(), persistent=False)

    def forward(
        self, batch: Batch, anchors: Tensor, valid: Tensor, progress: float = 0.0, diagnostics: bool = False
    ) -> Terms:
        """Terms of the blocks at `anchors` [R, N] where `valid`. progress: share of training done, which decides the
        objective and the weights of Domino's branches.

        diagnostics: also count the right slots among those without credit, which needs their logits.
        """
        assert (batch.labels is None) == (self.settings.labels == "text")
        hidden, tokens, mask = self.blocks(batch, anchors, valid)
        slots = self.drafter.config.block_size - 1
        labels = tokens if batch.labels is None else _chosen(valid, _window(batch.labels, anchors, slots + 1))[0]
        labels, mask = labels[:, 1:], mask[:, 1:]
        if self.drafter.config.head == "domino":
            return self._domino(hidden[:, :slots], tokens[:, :slots], labels, mask, progress, diagnostics)
        objective = OBJECTIVES[self.settings.name_at(progress)]
        loss = head_loss(
            hidden[:, 1:],
            self.head,
            labels,
            mask,
            failures=objective.failures,
            chunk=self.chunk,
            ranks=self.settings.ranks if objective.by_rank else None,
        )
        numerator, denominator, credit = _reduce(loss, objective, self.settings)
        metrics = self._metrics(loss.slots, credit, hidden[:, 1:], labels, diagnostics)
        one = torch.ones(1, device=mask.device)
        return Terms(numerator[None], denominator[None], one, metrics)

    @property
    def chunk(self) -> int:
        return CHUNK.get(self.head.device.type, DEFAULT_CHUNK)

    def blocks(self, batch: Batch, anchors: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States [blocks, B, H], tokens [blocks, B] and label mask [blocks, B] of the valid blocks."""
        width = self.drafter.config.block_size
        tokens = _window(batch.input_ids, anchors, width)
        inside = _window(batch.loss_mask, anchors, width)
        inside &= anchors[..., None] + torch.arange(width, device=anchors.device) < batch.lengths[:, None, None]
        inside = inside.cumprod(-1).bool()  # a block ends with its answer, whatever the next turn holds
        drafted = torch.full_like(tokens, self.drafter.config.mask_token_id)
        drafted[..., 0] = tokens[..., 0]
        hidden = self.drafter(batch.features, self.embedding[drafted], anchors)
        hidden, tokens, inside = _chosen(valid, hidden, tokens, inside)
        return hidden, tokens, inside

    def _domino(
        self, hidden: Tensor, tokens: Tensor, labels: Tensor, mask: Tensor, progress: float, diagnostics: bool
    ) -> Terms:
        """Two branches. hidden, tokens, labels, mask [blocks, K]; slot k predicts anchor + k + 1, teacher forced."""
        arm = DOMINO_OBJECTIVES[self.settings.name_at(progress)]
        base_objective, final_objective = OBJECTIVES[arm.base], OBJECTIVES[arm.final]
        base = head_loss(hidden, self.head, labels, mask, failures=base_objective.failures, chunk=self.chunk)
        base_terms = _reduce(base, base_objective, self.settings)

        states = correction_inputs(
            self.drafter.prefix_gru, self.drafter.embed_proj, hidden[:, 1:], self.embedding[tokens]
        )
        states = F.pad(states, (0, 0, 1, 0))  # slot 0 has no correction: a state of zeros
        seen_by_base = arm.final_sees == "base"
        final = corrected_head_loss(
            hidden,
            states,
            self.head,
            self.drafter.embed_proj[2].weight,
            labels,
            mask & (base_terms[2] > 0) if seen_by_base else mask,
            failures=None if seen_by_base else final_objective.failures,
            chunk=self.chunk,
        )
        final_terms = _reduce(final, final_objective, self.settings, base.slots if seen_by_base else None)
        weight = self.settings.base_weight(progress)
        metrics = self._metrics(base.slots, base_terms[2], hidden, labels, diagnostics)
        return Terms(
            torch.stack([base_terms[0], final_terms[0]]),
            torch.stack([base_terms[1], final_terms[1]]),
            torch.stack([torch.full((), share, device=mask.device) for share in (weight, 1 - weight)]),
            metrics,
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _metrics(
        self, slots: Slots, credit: Tensor, hidden: Tensor, labels: Tensor, diagnostics: bool
    ) -> dict[str, Tensor]:
        """Sums for r_active, support accuracy and alpha_k and, with diagnostics, for common-mask accuracy."""
        support = (credit > 0) & slots.mask
        right = slots.correct & slots.mask
        prefix = right.cumprod(-1).bool()
        tried = torch.cat([slots.mask[:, :1], prefix[:, :-1] & slots.mask[:, 1:]], dim=1)
        metrics = {
            "blocks": torch.full((), float(len(labels)), device=labels.device),
            "valid": slots.mask.sum().float(),
            "support": support.sum().float(),
            "support_correct": (right & support).sum().float(),
            "tried": tried.sum(0).float(),
            "accepted": prefix.sum(0).float(),
        }
        if diagnostics:
            correct = right.clone()
            rest = (slots.mask & ~support).flatten().nonzero()[:, 0]
            drafted = head_argmax(hidden.detach().flatten(0, 1)[rest], self.head, chunk=self.chunk)
            correct.view(-1)[rest] = drafted == labels.flatten()[rest]
            metrics["common_valid"] = slots.mask.sum().float()
            metrics["common_correct"] = correct.sum().float()
        return metrics


def _chosen(valid: Tensor, *tensors: Tensor) -> list[Tensor]:
    """tensors [R, N, ...] -> [blocks, ...] of the valid blocks. A GPU is waited for once, not once for each tensor."""
    places = valid.flatten().nonzero()[:, 0]
    return [tensor.flatten(0, 1)[places] for tensor in tensors]


def _window(rows: Tensor, anchors: Tensor, width: int) -> Tensor:
    """rows [R, S] at anchors [R, N] and the next width - 1 positions: [R, N, width]; past the end the last column."""
    index = anchors[..., None] + torch.arange(width, device=anchors.device)
    index = index.clamp(max=rows.shape[1] - 1)
    return rows.gather(1, index.flatten(1)).view(index.shape)


def _reduce(
    loss: HeadLoss, objective: Objective, settings: ObjectiveSettings, credit_slots: Slots | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """sum(m c CE), what it is divided by (sum(m c), or with by_block the number of blocks), the masked credit m c.

    credit_slots: the slots that the credit is computed from (objectives.py); None: the loss's own.
    """
    credit = objective.credit(credit_slots or loss.slots, settings) * loss.slots.mask
    under = loss.slots.mask.any(-1).sum().float() if objective.by_block else credit.sum()
    return (credit.view(-1)[loss.rows] * loss.ce).sum(), under, credit
