"""Held-out tau: the drafter walks answers that it was not trained on, as serving would.

The text is the target's own, so its next tokens stand in for verification. The first token of an answer comes from
prefill and is the first anchor. Of a block drafted at anchor a the A tokens before the first that differs from the text
are accepted, and the next anchor is a + A + 1. Tau, alpha_k and the histogram are those of acceptance.py, with one
request for each answer. Accuracy and loss, by which others choose checkpoints, are computed too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_auf.acceptance import Acceptance, macro_tau, total_acceptance
from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.card import check_drafter
from sglang_auf.models.domino import correction_inputs
from sglang_auf.models.loading import load_drafter
from sglang_auf.recording.manifest import require_target
from sglang_auf.settings import enable_thinking
from sglang_auf.training.data.batching import Batch, anchor_positions, draw_anchors, plan_batches, with_features
from sglang_auf.training.data.conversations import Conversation, load_conversations, split_held_out
from sglang_auf.training.losses.cross_entropy import leading_matches
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import Terms, TrainingStep

if TYPE_CHECKING:
    from sglang_auf.training.data.loader import BatchMaker
    from sglang_auf.training.recipe import Recipe

logger = logging.getLogger(__name__)

# Blocks in one call of the drafter, by device.
BLOCKS = {"cpu": 512}
DEFAULT_BLOCKS = 2048

BATCH_TOKENS = 4096
"""Padded tokens of a batch where there is no recipe."""

SAMPLED = 16
"""Blocks of each row that accuracy and loss are computed on."""

KEPT_BYTES = 2**31
"""Features are kept between evaluations up to this size, and computed again above it."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a drafter does on held-out answers.

    tau_macro: mean over answers. tau_micro, alpha (alpha_1..), histogram: over all their steps (acceptance.py).
    answers: number of those with a verify step, which have two tokens or more. accuracy: over all slots of sampled
    blocks, given the text before the block (Domino: of the base branch). loss: of the objective on these blocks, at the
    end of its schedule.
    """

    tau_macro: float | None
    tau_micro: float | None
    alpha: tuple[float | None, ...]
    histogram: tuple[int, ...]
    answers: int
    accuracy: float | None
    loss: float | None


def heldout_tau(
    step: TrainingStep,
    batches: Iterable[Batch],
    *,
    precision: Literal["bf16", "fp32"] = "bf16",
    vocabulary: Tensor | None = None,
) -> HeldOut:
    """Walk all answers of `batches`, which are on the step's device. precision: the recipe's.

    vocabulary [n]: ascending ids of the tokens that may be drafted, None for all; accuracy and loss are over all.
    Equal weights give equal figures, since no shared random generator is used. Gradients and train/eval modes do not
    change (no module of a drafter depends on the mode).
    """
    answers: list[Acceptance] = []
    terms: list[Terms] = []
    with torch.no_grad(), torch.autocast(step.head.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in batches:
            accepted = accepted_by_anchor(step, batch, vocabulary)
            answers += walk(batch.loss_mask, accepted, step.drafter.config.block_size)
            generators = [torch.Generator().manual_seed(0) for _ in batch.ids]
            anchors, valid = draw_anchors(batch.loss_mask, SAMPLED, generators)
            terms.append(step(batch, anchors, valid, progress=1.0, diagnostics=True))
    everything = total_acceptance(answers)
    accuracy, loss = _accuracy_and_loss(terms) if everything.requests else (None, None)
    return HeldOut(
        tau_macro=macro_tau(answers),
        tau_micro=everything.tau,
        alpha=everything.alpha,
        histogram=everything.histogram,
        answers=everything.requests,
        accuracy=accuracy,
        loss=loss,
    )


def accepted_by_anchor(step: TrainingStep, batch: Batch, vocabulary: Tensor | None = None) -> Tensor:
    """[R, S] int64: the number of accepted drafts of a block that starts at each position; 0 where none may start.

    Drafts from every anchor at once, although the walk visits one in tau: the text is known, so blocks are independent,
    and few large matmuls beat many small ones (half the time on a CPU at tau 2, compared with a walk that keeps the
    keys and values of the context).
    """
    positions = anchor_positions(batch.loss_mask)
    widest = max(1, int(positions.sum(1).max()))
    anchors = positions.int().argsort(dim=1, descending=True, stable=True)[:, :widest]
    valid = positions.gather(1, anchors)
    accepted = torch.zeros_like(batch.input_ids)
    per_call = max(1, BLOCKS.get(anchors.device.type, DEFAULT_BLOCKS) // len(anchors))
    for some, real in zip(anchors.split(per_call, dim=1), valid.split(per_call, dim=1), strict=True):
        rows = real.nonzero()[:, 0]
        accepted[rows, some[real]] = _accepted(step, batch, some, real, vocabulary)
    return accepted


def walk(loss_mask: Tensor, accepted: Tensor, block_size: int) -> Iterator[Acceptance]:
    """The acceptance of every answer, which is a run of True in loss_mask [R, S]. accepted: of accepted_by_anchor."""
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
            yield Acceptance.of_request(histogram, end - start)


def _accepted(step: TrainingStep, batch: Batch, anchors: Tensor, valid: Tensor, vocabulary: Tensor | None) -> Tensor:
    """Number of accepted drafts of each valid block [blocks], none past the end of the answer."""
    hidden, tokens, inside = step.blocks(batch, anchors, valid)
    labels, mask = tokens[:, 1:], inside[:, 1:]
    if step.drafter.config.head == "dflash":
        if vocabulary is None:
            return leading_matches(hidden[:, 1:], step.head, labels, mask, chunk=step.chunk)
        place = torch.full((len(step.head),), -1, device=labels.device)  # no draft is -1
        place[vocabulary] = torch.arange(len(vocabulary), device=labels.device)
        return leading_matches(hidden[:, 1:], step.head[vocabulary], place[labels], mask, chunk=step.chunk)
    # Serving feeds the GRU with its drafts. As long as drafts are accepted they equal the text, and later slots do not
    # count, so a GRU over the text accepts the same.
    given = step.embedding[tokens[:, :-1]]
    projector = step.drafter.embed_proj
    states = F.pad(correction_inputs(step.drafter.prefix_gru, projector, hidden[:, 1:-1], given), (0, 0, 1, 0))
    correction = (states, projector[2].weight)
    return leading_matches(hidden[:, :-1], step.head, labels, mask, chunk=step.chunk, correction=correction)


def _accuracy_and_loss(terms: list[Terms]) -> tuple[float, float]:
    numerators = torch.stack([each.numerators for each in terms]).sum(0)
    denominators = torch.stack([each.denominators for each in terms]).sum(0)
    right, of = (sum(float(each.metrics[name]) for each in terms) for name in ("common_correct", "common_valid"))
    return right / of, float((terms[0].weights * numerators / denominators).sum())


def evaluate_drafter(drafter: str, target: str, data: str, *, limit: int | None = None) -> HeldOut:
    """Walk a drafter's checkpoint through the answers in `data`, on the GPU if there is one.

    drafter: directory or hub id. target: directory, hub id or prepared target. data: file, folder or hub data set of
    rows with answers. limit: number of conversations, those that a recipe with this data and data.held_out `limit` does
    not train on; None: all. As in serving, only tokens of a draft vocabulary beside the weights are drafted. The loss
    has the same credit for all slots (Domino: decay, since it has no such objective). Raises CardError, TargetError,
    DataError or, for a limit below 1, ConfigError.
    """
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from sglang_auf.training.data.features import OnlineFeatures, find_target

    directory = find_target(target)
    require_target(data, directory)
    checked = check_drafter(drafter, str(directory))
    for warning in checked.warnings:
        logger.warning("%s", warning)
    model = load_drafter(checked.path)
    conversations = load_conversations(
        data,
        AutoTokenizer.from_pretrained(directory),
        max_length=checked.card.max_length or model.config.max_position_embeddings,
        min_answer_tokens=2,
        thinking=enable_thinking(checked.card.thinking),
        vocab_size=model.config.vocab_size,
    ).conversations
    if limit is not None and limit < len(conversations):
        conversations = split_held_out(conversations, count=limit)[1]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = OnlineFeatures(directory, model.config.target_layer_ids, device=device)
    settings = ObjectiveSettings(name="decay" if model.config.head == "domino" else "full")
    step = TrainingStep(model, features.embedding, features.head, settings).to(device)
    lengths = [len(conversation) for conversation in conversations]
    plan = plan_batches(lengths, batch_tokens=max(BATCH_TOKENS, *lengths), seed=0, epoch=0)

    def batches() -> Iterator[Batch]:
        for rows in tqdm(plan, unit="batch", disable=None):
            yield with_features([conversations[row] for row in rows], features)

    listed = draft_vocabulary.in_use(checked.path)
    vocabulary = None if listed is None else torch.tensor(listed.tokens, device=device)
    return heldout_tau(step, batches(), vocabulary=vocabulary)


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
