"""Held-out tau: the drafter walks answers that it was not trained on, as serving would.

The text is the target's own, so its next tokens stand in for verification. The first token of an answer comes from
prefill and is the first anchor. Of a block drafted at anchor a the A tokens before the first that differs from the text
are accepted, and the next anchor is a + A + 1. Tau, alpha_k and the histogram are those of acceptance.py, with one
request for each answer. Accuracy and loss, by which others choose checkpoints, are computed too.

Instead of a chain of B - 1 drafts serving may verify a tree (speculative/tree.py). Trees of a given number of nodes are
grown and followed here by the same code, from the drafter's probabilities as they are; serving corrects these by what
was accepted lately.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_auf.acceptance import Acceptance, total_acceptance
from sglang_auf.models.domino import correction_inputs
from sglang_auf.models.products import bf16_products
from sglang_auf.speculative.tree import RANKS, accepted_along
from sglang_auf.training.data.batching import Batch, anchor_positions, draw_anchors
from sglang_auf.training.losses.cross_entropy import corrected_leading_matches, leading_matches, likeliest
from sglang_auf.training.losses.step import Terms, TrainingStep

Precision = Literal["bf16", "fp32"]

# Blocks in one call of the drafter, by device.
BLOCKS = {"cpu": 512}
DEFAULT_BLOCKS = 2048

SAMPLED = 16
"""Blocks of each row that accuracy and loss are computed on."""

POOL = 2048
"""Tokens that serving scores with Domino's correction: the default of --speculative-domino-candidate-pool-size."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a drafter does on held-out answers.

    taus: tau of each answer with a verify step, which has two tokens or more. tau_micro, alpha (alpha_1..), histogram:
    over all their steps (acceptance.py). accuracy: over all slots of sampled blocks, given the text before the block
    (Domino: of the base branch). loss: of the objective on these blocks, at the end of its schedule. taus_of_trees:
    number of nodes -> taus with trees of so many.
    """

    taus: tuple[float, ...]
    tau_micro: float | None
    alpha: tuple[float | None, ...]
    histogram: tuple[int, ...]
    accuracy: float | None
    loss: float | None
    taus_of_trees: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        return len(self.taus)

    @property
    def tau_macro(self) -> float | None:
        """The mean over answers; None without one."""
        return sum(self.taus) / len(self.taus) if self.taus else None

    @property
    def named(self) -> dict[str, tuple[float, ...]]:
        """Figure (tau, tau_tree_N) -> its value of each answer."""
        return {"tau": self.taus} | {f"tau_tree_{nodes}": taus for nodes, taus in self.taus_of_trees.items()}


@contextmanager
def walking(device: str, precision: Precision = "bf16") -> Iterator[None]:
    """How a walk computes on this type of device. precision: the recipe's."""
    with torch.no_grad(), bf16_products(device), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        yield


class HeldOutWalk:
    """Walks batch after batch, and then says what the drafter did on all of them.

    Equal weights give equal figures, since no shared random generator is used. Gradients and train/eval modes do not
    change (no module of a drafter depends on the mode).
    """

    def __init__(
        self,
        step: TrainingStep,
        *,
        precision: Precision = "bf16",
        vocabulary: Tensor | None = None,
        trees: Sequence[int] = (),
    ) -> None:
        """precision: the recipe's. vocabulary [n]: ascending ids of the tokens that may be drafted, None for all;
        accuracy and loss are over all. trees: numbers of nodes of trees to walk with as well."""
        self._step, self._precision, self._vocabulary, self._trees = step, precision, vocabulary, trees
        self._answers: list[list[Acceptance]] = [[] for _ in (None, *trees)]
        self._terms: list[Terms] = []

    def add(self, batch: Batch) -> None:
        """Walk all answers of a batch, which is on the step's device."""
        with walking(self._step.head.device.type, self._precision):
            of_batch = walks(self._step, batch, self._vocabulary, self._trees)
            for walked, more in zip(self._answers, of_batch, strict=True):
                walked += more
            generators = [torch.Generator().manual_seed(0) for _ in batch.ids]
            anchors, valid = draw_anchors(batch.loss_mask, SAMPLED, generators)
            self._terms.append(self._step(batch, anchors, valid, progress=1.0, diagnostics=True))

    def result(self) -> HeldOut:
        chain, *of_trees = self._answers
        everything = total_acceptance(chain)
        accuracy, loss = _accuracy_and_loss(self._terms) if everything.requests else (None, None)
        return HeldOut(
            taus=_taus(chain),
            tau_micro=everything.tau,
            alpha=everything.alpha,
            histogram=everything.histogram,
            accuracy=accuracy,
            loss=loss,
            taus_of_trees={nodes: _taus(walked) for nodes, walked in zip(self._trees, of_trees, strict=True)},
        )


def heldout_tau(step: TrainingStep, batches: Iterable[Batch], **options: Any) -> HeldOut:
    """Walk all answers of `batches`. options: those of HeldOutWalk."""
    walk = HeldOutWalk(step, **options)
    for batch in batches:
        walk.add(batch)
    return walk.result()


def _taus(answers: Iterable[Acceptance]) -> tuple[float, ...]:
    return tuple(answer.tau for answer in answers if answer.tau is not None)


def walks(
    step: TrainingStep, batch: Batch, vocabulary: Tensor | None = None, trees: Sequence[int] = ()
) -> Iterator[list[Acceptance]]:
    """The acceptance of every answer of a batch: with a chain, and then with a tree of each number of nodes in `trees`.

    vocabulary: as for heldout_tau. An answer is a run of True in the batch's loss_mask.
    """
    block, ranks = step.drafter.config.block_size, _ranks(step, vocabulary)
    proposed = [block - 1, *(min(nodes, sum(ranks**slot for slot in range(1, block))) for nodes in trees)]
    for accepted, drafts in zip(_accepted_by_anchor(step, batch, vocabulary, trees), proposed, strict=True):
        yield list(_walk(batch.loss_mask, accepted, block, drafts))


def _ranks(step: TrainingStep, vocabulary: Tensor | None) -> int:
    """Tokens considered at each slot. A Domino drafter chooses one path, so its tree is a chain."""
    listed = len(step.head) if vocabulary is None else len(vocabulary)
    return 1 if step.drafter.config.head == "domino" else min(RANKS, listed)


def _accepted_by_anchor(step: TrainingStep, batch: Batch, vocabulary: Tensor | None, trees: Sequence[int]) -> Tensor:
    """[1 + trees, R, S] int64: the accepted drafts of a block that starts at each position; 0 where none may start.

    Drafts from every anchor at once, although the walk visits one in tau: the text is known, so blocks are independent,
    and few large matmuls beat many small ones (half the time on a CPU at tau 2, compared with a walk that keeps the
    keys and values of the context).
    """
    positions = anchor_positions(batch.loss_mask)
    widest = max(1, int(positions.sum(1).max()))
    anchors = positions.int().argsort(dim=1, descending=True, stable=True)[:, :widest]
    valid = positions.gather(1, anchors)
    accepted = torch.zeros_like(batch.input_ids).repeat(1 + len(trees), 1, 1)
    per_call = max(1, BLOCKS.get(anchors.device.type, DEFAULT_BLOCKS) // len(anchors))
    for some, real in zip(anchors.split(per_call, dim=1), valid.split(per_call, dim=1), strict=True):
        rows = real.nonzero()[:, 0]
        accepted[:, rows, some[real]] = _accepted(step, batch, some, real, vocabulary, trees)
    return accepted


def _walk(loss_mask: Tensor, accepted: Tensor, block_size: int, drafts: int) -> Iterator[Acceptance]:
    """loss_mask, accepted [R, S]. drafts: how many a step verifies."""
    for mask, row in zip(loss_mask.tolist(), accepted.tolist(), strict=True):
        end = 0
        for is_answer, run in groupby(mask):
            start, end = end, end + len(list(run))
            if not is_answer:
                continue
            histogram = [0] * block_size
            anchor = start
            while anchor < end - 1:
                histogram[row[anchor]] += 1
                anchor += row[anchor] + 1
            yield Acceptance.of_request(histogram, end - start, sum(histogram) * drafts)


def _accepted(
    step: TrainingStep,
    batch: Batch,
    anchors: Tensor,
    valid: Tensor,
    vocabulary: Tensor | None,
    trees: Sequence[int],
) -> Tensor:
    """Number of accepted drafts of each valid block [1 + trees, blocks], none past the end of the answer."""
    hidden, tokens, inside = step.blocks(batch, anchors, valid)
    labels, mask = tokens[:, 1:], inside[:, 1:]
    if step.drafter.config.head == "dflash":
        head = step.head
        if vocabulary is not None:
            place = torch.full((len(head),), -1, device=labels.device)  # no draft is -1
            place[vocabulary] = torch.arange(len(vocabulary), device=labels.device)
            head, labels = head[vocabulary], place[labels]
        chain = leading_matches(hidden[:, 1:], head, labels, mask, chunk=step.chunk)
        labels = labels.masked_fill(~mask, -1)
        ranks = _ranks(step, vocabulary)
        return torch.stack([chain, *_accepted_in_trees(hidden[:, 1:], head, labels, ranks, trees, step.chunk)])
    # Serving feeds the GRU with its drafts. As long as drafts are accepted they equal the text, and later slots do not
    # count, so a GRU over the text accepts the same.
    given = step.embedding[tokens[:, :-1]]
    projector = step.drafter.embed_proj
    states = F.pad(correction_inputs(step.drafter.prefix_gru, projector, hidden[:, 1:-1], given), (0, 0, 1, 0))
    weight = projector[2].weight
    chain = corrected_leading_matches(
        hidden[:, :-1], states, step.head, weight, labels, mask, pool=POOL, chunk=step.chunk
    )
    return torch.stack([chain, *(chain.clamp(max=nodes) for nodes in trees)])


def _accepted_in_trees(
    hidden: Tensor, head: Tensor, labels: Tensor, ranks: int, trees: Sequence[int], chunk: int
) -> Iterator[Tensor]:
    """The accepted drafts of each block [blocks], for each number of nodes in `trees`.

    labels [blocks, K]: -1 behind the end of the answer, and for a token that is not drafted.
    """
    if not trees:
        return
    # Where the first label is not among the likeliest, no tree accepts anything: the other slots need no logits.
    begins = (likeliest(hidden[:, 0], head, ranks, chunk=chunk)[1] == labels[:, :1]).any(-1).nonzero()[:, 0]
    shape = (len(begins), labels.shape[1], ranks)
    chances, drafts = (
        each.view(shape).cpu() for each in likeliest(hidden[begins].flatten(0, 1), head, ranks, chunk=chunk)
    )
    for nodes in trees:
        accepted = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
        if len(begins):
            along = accepted_along(labels[begins].tolist(), chances.numpy(), drafts.tolist(), nodes)
            accepted[begins] = torch.tensor(along, device=labels.device)
        yield accepted


def _accuracy_and_loss(terms: list[Terms]) -> tuple[float, float]:
    numerators = torch.stack([each.numerators for each in terms]).sum(0)
    denominators = torch.stack([each.denominators for each in terms]).sum(0)
    right, of = (sum(float(each.metrics[name]) for each in terms) for name in ("common_correct", "common_valid"))
    return right / of, float((terms[0].weights * numerators / denominators).sum())
