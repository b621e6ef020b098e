"""Cross-entropy through the target's frozen head, on the slots that carry loss and few others.

Most of the cost of training a drafter is the head: anchors x slots x vocabulary logits. Two things reduce it.

Chunks: only the logits of `chunk` rows are in memory at a time. The head is not trained, so the gradient that a row
sends to its hidden state, (softmax - onehot) @ head, is computed with the loss, and only it is kept. For the dense case
on GPUs, Liger-Kernel's FusedLinearCrossEntropy and Apple's cut-cross-entropy (arXiv 2411.09009) do the same.

Waves, which are our own: where an objective stops a block at its first failure, slot 1 of all blocks is computed, then
slot 2 of those whose slot 1 was right, and so on. A product of few rows takes as long as reading the head, so where few
blocks are left a wave holds several of their slots, and rows beyond a failure are dropped afterwards. How many rows a
wave has depends on the wave before it, so on a GPU each wave waits twice for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sglang_auf.training.losses.objectives import Slots

FURTHER_SLOTS = 0.25
"""A wave takes several slots of each block as long as they fill no more than this share of a chunk."""


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """rows [n]: flat index (block * K + slot) of each row that carries loss; ce [n]: its cross-entropy, differentiable.

    slots: what the credit of the objective is computed from (objectives.py).
    """

    slots: Slots
    rows: Tensor
    ce: Tensor


def head_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    failures: int | None,
    chunk: int,
    ranks: int | None = None,
) -> HeadLoss:
    """Cross-entropy of the valid slots of each block up to its `failures`-th wrong one (None: of all valid slots).

    hidden [blocks, K, H], head [V, H], labels [blocks, K], mask [blocks, K] bool. Only `hidden` gets a gradient. ranks:
    a slot is wrong where its label is not among so many of the likeliest tokens; None: where it is not the likeliest.
    """
    flat, flat_labels = hidden.detach().flatten(0, 1), labels.flatten()
    correct = torch.zeros_like(mask)
    within = correct if ranks is None else torch.zeros_like(mask)
    log_q = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in _waves(mask, within, failures, chunk):
        for some in rows.split(chunk):
            ce, right, near, gradient = _rows(flat[some], head, flat_labels[some], ranks)
            correct.view(-1)[some] = right
            within.view(-1)[some] = near
            log_q.view(-1)[some] = -ce
            parts.append((some, ce, gradient))
    kept = _kept(mask, within, failures)
    rows, ce, gradients = _inside(kept, *(torch.cat(part) for part in zip(*parts, strict=True)))
    attached: Tensor = _Attach.apply(hidden.flatten(0, 1), rows, ce, gradients)
    near_slots = None if ranks is None else within & kept
    return HeadLoss(Slots(correct & kept, log_q.masked_fill(~kept, 0.0), mask, near_slots), rows, attached)


def corrected_head_loss(
    hidden: Tensor,
    states: Tensor,
    head: Tensor,
    correction: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    failures: int | None,
    chunk: int,
) -> HeadLoss:
    """The same for Domino's final branch, whose logits are hidden @ head.T + states @ correction.T.

    states [blocks, K, rank] and correction [V, rank] are trained, so the rows run inside autograd, in chunks whose
    logits are computed again in the backward pass.
    """
    correct = torch.zeros_like(mask)
    log_q = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    flat, flat_states, flat_labels = hidden.flatten(0, 1), states.flatten(0, 1), labels.flatten()

    def of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = (flat[rows].to(head.dtype) @ head.T + flat_states[rows] @ correction.T).float()
        ce = torch.nn.functional.cross_entropy(logits, flat_labels[rows], reduction="none")
        return ce, logits.detach().argmax(-1) == flat_labels[rows]

    parts: list[tuple[Tensor, Tensor]] = []
    for rows in _waves(mask, correct, failures, chunk):
        for some in rows.split(chunk):
            ce, right = checkpoint(of_rows, some, use_reentrant=False, preserve_rng_state=False)
            correct.view(-1)[some] = right
            log_q.view(-1)[some] = -ce.detach()
            parts.append((some, ce))
    kept = _kept(mask, correct, failures)
    rows, ce = _inside(kept, *(torch.cat(part) for part in zip(*parts, strict=True)))
    return HeadLoss(Slots(correct & kept, log_q.masked_fill(~kept, 0.0), mask), rows, ce)


@torch.no_grad()  # type: ignore[untyped-decorator]
def head_argmax(hidden: Tensor, head: Tensor, *, chunk: int) -> Tensor:
    """The drafter's own token of each row: hidden [n, H] -> [n]."""
    if not len(hidden):
        return torch.zeros(0, dtype=torch.long, device=hidden.device)
    return torch.cat([(some @ head.T).argmax(-1) for some in hidden.to(head.dtype).split(chunk)])


@torch.no_grad()  # type: ignore[untyped-decorator]
def leading_matches(hidden: Tensor, head: Tensor, labels: Tensor, mask: Tensor, *, chunk: int) -> Tensor:
    """Number of leading slots of each block whose argmax is the label: [blocks], what verification accepts.

    hidden, head, labels, mask as in head_loss; a slot that is not valid ends the block.
    """
    flat, flat_labels = hidden.flatten(0, 1), labels.flatten()
    correct = torch.zeros_like(mask)
    for rows in _waves(mask, correct, 1, chunk):
        for some in rows.split(chunk):
            logits = flat[some].to(head.dtype) @ head.T
            correct.view(-1)[some] = logits.argmax(-1) == flat_labels[some]
    return correct.cumprod(-1).sum(-1)


@torch.no_grad()  # type: ignore[untyped-decorator]
def corrected_leading_matches(
    hidden: Tensor,
    states: Tensor,
    head: Tensor,
    correction: Tensor,
    labels: Tensor,
    mask: Tensor,
    *,
    pool: int,
    chunk: int,
) -> Tensor:
    """The same for Domino's drafts, as SGLang makes them: the slots behind the first choose among a pool of tokens.

    states, correction as in corrected_head_loss. pool: so many tokens of each block, those whose logits without the
    correction are the largest at any of these slots.
    """
    accepted = leading_matches(hidden[:, :1], head, labels[:, :1], mask[:, :1], chunk=chunk)
    going = (accepted.bool() & mask[:, 1:].any(-1)).nonzero()[:, 0]
    for some in going.split(max(1, chunk // hidden.shape[1])) if len(going) else ():
        logits = hidden[some, 1:].to(head.dtype) @ head.T
        tokens = logits.amax(1).topk(min(pool, len(head)), sorted=False).indices.sort().values
        logits = logits.gather(2, tokens[:, None].expand(-1, logits.shape[1], -1))
        logits = logits + states[some, 1:] @ correction[tokens].mT
        right = (tokens.gather(1, logits.argmax(-1)) == labels[some, 1:]) & mask[some, 1:]
        accepted[some] += right.cumprod(-1).sum(-1)
    return accepted


@torch.no_grad()  # type: ignore[untyped-decorator]
def likeliest(hidden: Tensor, head: Tensor, ranks: int, *, chunk: int) -> tuple[Tensor, Tensor]:
    """The `ranks` likeliest tokens of each row, descending: probabilities, float32, and ids, both [n, ranks].

    hidden [n, H], head [V, H]. Of equal logits the first comes first, as argmax has it.
    """
    chances = torch.zeros(len(hidden), ranks, device=hidden.device)
    tokens = torch.zeros(len(hidden), ranks, dtype=torch.long, device=hidden.device)
    for rows in torch.arange(len(hidden), device=hidden.device).split(chunk):
        logits = hidden[rows].to(head.dtype) @ head.T
        places = logits.topk(ranks, sorted=False).indices.sort().values
        largest, order = logits.gather(1, places).float().sort(descending=True, stable=True)
        chances[rows] = (largest - logits.float().logsumexp(-1, keepdim=True)).exp()
        tokens[rows] = places.gather(1, order)
    return chances, tokens


def _waves(mask: Tensor, correct: Tensor, failures: int | None, chunk: int) -> Iterator[Tensor]:
    """Yield flat row indices wave by wave, at least one wave: every row that `_kept` keeps, and few others.

    The caller updates `correct` with the results of a wave before it takes the next one.
    """
    if failures is None:
        yield mask.flatten().nonzero()[:, 0]
        return
    blocks, slots = mask.shape
    alive, first = torch.arange(blocks, device=mask.device), 0
    while first < slots and (len(alive) or not first):
        last = min(slots, first + max(1, int(chunk * FURTHER_SLOTS) // max(1, len(alive))))
        block, slot = mask[alive, first:last].nonzero(as_tuple=True)
        yield alive[block] * slots + first + slot
        wrong = (mask & ~correct)[alive, :last].sum(-1)
        alive, first = alive[(wrong < failures) & mask[alive, last:].any(-1)], last


def _kept(mask: Tensor, correct: Tensor, failures: int | None) -> Tensor:
    """[blocks, K] bool: the valid slots of each block up to its `failures`-th wrong one."""
    if failures is None:
        return mask
    wrong = mask & ~correct
    return mask & (wrong.cumsum(-1) - wrong.int() < failures)


def _inside(kept: Tensor, rows: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """`rows` and their values without the rows that are not kept; the same tensors where all are kept."""
    inside = kept.flatten()[rows].nonzero()[:, 0]
    return (rows, *values) if len(inside) == len(rows) else tuple(each[inside] for each in (rows, *values))


@torch.no_grad()  # type: ignore[untyped-decorator]
def _rows(hidden: Tensor, head: Tensor, labels: Tensor, ranks: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some rows: loss [n], argmax == label [n], label among the `ranks` likeliest [n], d loss / d hidden [n, H]."""
    logits = hidden.to(head.dtype) @ head.T
    label = labels[:, None]
    right = _RIGHT.get(logits.device.type, _right)(logits, labels)
    near = right if ranks is None else (logits > logits.gather(1, label)).sum(-1) < ranks
    # float32 where that costs little. On a CPU it is too slow, so the softmax stays in bf16: the loss is then exact to
    # 0.4 % of the label's probability, and the gradient loses no more than in the bf16 product below.
    logits = logits.float() if logits.device.type != "cpu" else logits
    q = logits.softmax(-1)
    ce = -q.gather(1, label).float().clamp_min(torch.finfo(torch.float32).tiny).log()[:, 0]
    q[torch.arange(len(label), device=q.device), labels] -= 1.0  # scatter_add_ would copy all of q
    return ce, right, near, q.to(head.dtype) @ head


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each label is the argmax; of equal logits the first counts."""
    return logits.argmax(-1) == labels


def _right_on_a_cpu(logits: Tensor, labels: Tensor) -> Tensor:
    """The same. On a CPU argmax over a vocabulary in bf16 is slow, but amax is not, and few labels reach it."""
    right = logits.gather(1, labels[:, None])[:, 0] == logits.amax(-1)
    reached = right.nonzero()[:, 0]
    right[reached] = _right(logits[reached], labels[reached])
    return right


_RIGHT = {"cpu": _right_on_a_cpu}


class _Attach(torch.autograd.Function):  # type: ignore[misc]
    """Losses computed outside autograd, with the gradients they send to some rows of `hidden`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, ce: Tensor, gradients: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gradients)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return ce.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        rows, gradients = ctx.saved_tensors
        hidden = gradients.new_zeros(ctx.shape, dtype=ctx.dtype)
        hidden[rows] = (gradients * outputs[0][:, None]).to(ctx.dtype)
        return hidden, None, None, None
