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

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_auf.acceptance import Acceptance, macro_tau, total_acceptance
from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.card import CheckedDrafter, check_drafter
from sglang_auf.checkpoints.writing import RECIPE
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.domino import correction_inputs
from sglang_auf.models.loading import load_drafter
from sglang_auf.models.products import bf16_products
from sglang_auf.recording.manifest import require_target
from sglang_auf.settings import enable_thinking, read_yaml
from sglang_auf.speculative.tree import RANKS, accepted_along
from sglang_auf.training.data.batching import Batch, anchor_positions, draw_anchors, plan_batches, with_features
from sglang_auf.training.data.conversations import Conversation, load_conversations, split_held_out
from sglang_auf.training.losses.cross_entropy import corrected_leading_matches, leading_matches, likeliest
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import Terms, TrainingStep
from sglang_auf.training.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from sglang_auf.training.data.loader import BatchMaker

logger = logging.getLogger(__name__)

# Blocks in one call of the drafter, by device.
BLOCKS = {"cpu": 512}
DEFAULT_BLOCKS = 2048

BATCH_TOKENS = 4096
"""Padded tokens of a batch where there is no recipe."""

SAMPLED = 16
"""Blocks of each row that accuracy and loss are computed on."""

TREES = (8, 16)
"""Nodes of the trees that a checkpoint is evaluated with, beside the chain."""

POOL = 2048
"""Tokens that serving scores with Domino's correction: the default of --speculative-domino-candidate-pool-size."""

KEPT_BYTES = 2**31
"""Features are kept between evaluations up to this size, and computed again above it."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What a drafter does on held-out answers.

    tau_macro: mean over answers. tau_micro, alpha (alpha_1..), histogram: over all their steps (acceptance.py).
    answers: number of those with a verify step, which have two tokens or more. accuracy: over all slots of sampled
    blocks, given the text before the block (Domino: of the base branch). loss: of the objective on these blocks, at the
    end of its schedule. tau_trees: number of nodes -> tau_macro with trees of so many.
    """

    tau_macro: float | None
    tau_micro: float | None
    alpha: tuple[float | None, ...]
    histogram: tuple[int, ...]
    answers: int
    accuracy: float | None
    loss: float | None
    tau_trees: Mapping[int, float | None] = field(default_factory=dict)


@bf16_products()
def heldout_tau(
    step: TrainingStep,
    batches: Iterable[Batch],
    *,
    precision: Literal["bf16", "fp32"] = "bf16",
    vocabulary: Tensor | None = None,
    trees: Sequence[int] = (),
) -> HeldOut:
    """Walk all answers of `batches`, which are on the step's device. precision: the recipe's.

    vocabulary [n]: ascending ids of the tokens that may be drafted, None for all; accuracy and loss are over all.
    trees: numbers of nodes of trees to walk with as well. Equal weights give equal figures, since no shared random
    generator is used. Gradients and train/eval modes do not change (no module of a drafter depends on the mode).
    """
    answers: list[list[Acceptance]] = [[] for _ in (None, *trees)]
    terms: list[Terms] = []
    with torch.no_grad(), torch.autocast(step.head.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for batch in batches:
            for walked, more in zip(answers, walks(step, batch, vocabulary, trees), strict=True):
                walked += more
            generators = [torch.Generator().manual_seed(0) for _ in batch.ids]
            anchors, valid = draw_anchors(batch.loss_mask, SAMPLED, generators)
            terms.append(step(batch, anchors, valid, progress=1.0, diagnostics=True))
    chain, *of_trees = answers
    everything = total_acceptance(chain)
    accuracy, loss = _accuracy_and_loss(terms) if everything.requests else (None, None)
    return HeldOut(
        tau_macro=macro_tau(chain),
        tau_micro=everything.tau,
        alpha=everything.alpha,
        histogram=everything.histogram,
        answers=everything.requests,
        accuracy=accuracy,
        loss=loss,
        tau_trees={nodes: macro_tau(walked) for nodes, walked in zip(trees, of_trees, strict=True)},
    )


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
        thinking=enable_thinking(checked.card.thinking),
        vocab_size=model.config.vocab_size,
        **_read_as(checked, model.config, limit),
    ).conversations
    if limit is not None and limit < len(conversations):
        conversations = split_held_out(conversations, count=limit, apart="tokens")[1]  # nothing is trained
    conversations = [conversation.as_served() for conversation in conversations]

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
    return heldout_tau(step, batches(), vocabulary=vocabulary, trees=TREES)


def _read_as(checked: CheckedDrafter, config: DrafterConfig, limit: int | None) -> dict[str, Any]:
    """How rows are read: whole, or where a limit asks for what training held out, as training read them, since which
    rows those are depends on which it could use."""
    read: dict[str, Any] = {
        "max_length": checked.card.max_length or config.max_position_embeddings,
        "min_answer_tokens": 2,
    }
    if limit is not None and (checked.path / RECIPE).is_file():
        recipe = parse_recipe(read_yaml(checked.path / RECIPE), f"of {checked.path}")
        read = {
            "max_length": recipe.data.max_length,
            "min_answer_tokens": recipe.min_answer_tokens,
            "overlong": recipe.data.overlong,
            "split": recipe.data.split,
        }
    return read


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
