"""The held-out walk against one written one block at a time, and against drafters whose tau is obvious."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean

import pytest
import torch
from torch import Tensor

from sglang_auf.acceptance import macro_tau, total_acceptance
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.training.data.batching import Batch
from sglang_auf.training.evaluation import walk
from sglang_auf.training.evaluation.walk import HeldOut, heldout_tau, walks
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import TrainingStep

VOCABULARY = 5
MASK = 4
"""Texts hold the four tokens below it. One draft in four is right by chance, so that all acceptance lengths occur."""


def config(block_size: int, head: str = "dflash", hidden: int = 32) -> DrafterConfig:
    domino = {"gru_hidden_dim": 12, "emb_dim": 6} if head == "domino" else {}
    return DrafterConfig(
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=128,
        block_size=block_size,
        mask_token_id=MASK,
        target_layer_ids=(0, 2),
        num_target_layers=4,
        head=head,
        **domino,
    )


def random_step(block_size: int, head: str) -> TrainingStep:
    torch.manual_seed(7)
    drafter = Drafter(config(block_size, head))
    for parameter in drafter.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    if head == "domino":  # what the GRU has read decides most corrected slots
        torch.nn.init.normal_(drafter.embed_proj[0].weight[:, 32:], std=3.0)
        torch.nn.init.normal_(drafter.embed_proj[2].weight, std=6.0)
    tables = torch.randn(2, VOCABULARY, 32)
    tables[1, MASK] = -10 * tables[1, :MASK].mean(0)  # a mask token that is seldom drafted
    objective = "decay" if head == "domino" else "full"
    return TrainingStep(drafter, tables[0], tables[1], ObjectiveSettings(name=objective))


def make_batch(masks: list[str], features: int) -> Batch:
    """One string for each row: "A" is a token of an answer, anything else is other text."""
    generator = torch.Generator().manual_seed(3)
    longest = max(map(len, masks))
    loss_mask = torch.tensor([[letter == "A" for letter in mask.ljust(longest, ".")] for mask in masks])
    return Batch(
        input_ids=torch.randint(MASK, loss_mask.shape, generator=generator),
        loss_mask=loss_mask,
        lengths=torch.tensor([len(mask) for mask in masks]),
        features=torch.randn(*loss_mask.shape, features, generator=generator),
        ids=[f"row{number}" for number in range(len(masks))],
    )


ROWS = ["uuuAAAAAAAAAAAAAAAAAAAAAAAAAA", "uuAAAAAAAuuuuAAAAAAAAAAAAAuuAu", "uAAuuuAAAAAAAA", "u" + "A" * 60]


Accepts = Callable[[TrainingStep, Tensor, list[int]], int]
"""step, features before an anchor [anchor, taps * H], text from the anchor to its answer's end -> accepted drafts"""


def in_chain(step: TrainingStep, features: Tensor, text: list[int]) -> int:
    right = 0
    for draft, token in zip(drafts_of(step, features, text[0]), text[1:], strict=False):
        if draft != token:
            break
        right += 1
    return right


def in_tree(nodes: int, ranks: int = VOCABULARY, listed: list[int] | None = None) -> Accepts:
    """Every path of every token with its probability, and the `nodes` likeliest of them."""

    def accepted(step: TrainingStep, features: Tensor, text: list[int]) -> int:
        tokens = listed or list(range(VOCABULARY))
        by_slot = []
        for state in hidden_of(step, features, text[0])[1:]:
            chances = (step.head[tokens] @ state).softmax(0).tolist()
            by_slot.append(sorted(zip(chances, tokens, strict=True), reverse=True)[:ranks])
        paths = {
            tuple(token for _, token in path): math.prod(chance for chance, _ in path)
            for length in range(1, len(by_slot) + 1)
            for path in itertools.product(*by_slot[:length])
        }
        held = set(sorted(paths, key=lambda path: -paths[path])[:nodes])
        return max((n for n in range(1, len(text)) if tuple(text[1 : n + 1]) in held), default=0)

    return accepted


def one_by_one(step: TrainingStep, batch: Batch, accepts: Accepts = in_chain) -> list[tuple[list[int], int]]:
    """(accepted of each step, tokens) of every answer: a block at a time, with a context cut off before its anchor."""
    answers = []
    for row, length in enumerate(batch.lengths.tolist()):
        text, mask = batch.input_ids[row, :length].tolist(), [*batch.loss_mask[row, :length].tolist(), False]
        at = 0
        while True in mask[at:]:
            start = mask.index(True, at)
            end = mask.index(False, start)
            accepted, anchor = [], start
            while anchor + 1 < end:
                accepted.append(accepts(step, batch.features[row, :anchor], text[anchor:end]))
                anchor += accepted[-1] + 1
            answers.append((accepted, end - start))
            at = end
    return answers


@torch.no_grad()
def hidden_of(step: TrainingStep, features: Tensor, token: int) -> Tensor:
    """States of one block [B, H] on features [anchor, taps * H] and the anchor's token."""
    slots = torch.tensor([token] + [MASK] * (step.drafter.config.block_size - 1))
    found: Tensor = step.drafter(features[None], step.embedding[slots][None, None], torch.tensor([[len(features)]]))[
        0, 0
    ]
    return found


def drafts_of(step: TrainingStep, features: Tensor, token: int) -> list[int]:
    hidden = hidden_of(step, features, token)
    if step.drafter.config.head == "domino":
        return domino_drafts(step, hidden, token)
    return [int((step.head @ state).argmax()) for state in hidden[1:]]


def domino_drafts(step: TrainingStep, hidden: Tensor, anchor: int) -> list[int]:
    """The rollout on its own tokens, with the gates of a GRU written out."""
    gru, (first, _, second) = step.drafter.prefix_gru, step.drafter.embed_proj
    state = torch.zeros(gru.hidden_size)

    def read(token: int) -> None:
        nonlocal state
        of_input, of_state = gru.weight_ih_l0 @ step.embedding[token], gru.weight_hh_l0 @ state
        (ir, iz, inew), (hr, hz, hnew) = of_input.chunk(3), of_state.chunk(3)
        update = torch.sigmoid(iz + hz)
        state = (1 - update) * torch.tanh(inew + torch.sigmoid(ir + hr) * hnew) + update * state

    read(anchor)
    drafts = [int((step.head @ hidden[0]).argmax())]
    largest = (step.head @ hidden[1:-1].T).amax(-1).tolist() if len(hidden) > 2 else [0.0] * VOCABULARY
    pool = sorted(range(VOCABULARY), key=lambda token: -largest[token])[: walk.POOL]
    for slot in hidden[1:-1]:
        read(drafts[-1])
        corrected = torch.nn.functional.silu(first.weight @ torch.cat([slot, state]))
        logits = step.head @ slot + second.weight @ corrected
        drafts.append(max(pool, key=lambda token: float(logits[token])))
    return drafts


@pytest.mark.parametrize(("head", "pool"), [("dflash", VOCABULARY), ("domino", 2048), ("domino", 2)])
@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_equals_a_walk_one_block_at_a_time(
    head: str, pool: int, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(walk.BLOCKS, "cpu", 12)  # several calls of the drafter a batch
    monkeypatch.setattr(walk, "POOL", pool)
    step = random_step(block_size, head)
    batches = [make_batch(ROWS, 64), make_batch(ROWS[1:], 64)]
    answers = [answer for batch in batches for answer in one_by_one(step, batch)]
    walked = [(accepted, tokens) for accepted, tokens in answers if accepted]
    assert len(answers) > len(walked)  # the answer of one token
    everything = [right for accepted, _ in walked for right in accepted]
    histogram = [everything.count(right) for right in range(block_size)]
    assert all(histogram[:2])

    found = heldout_tau(step, batches, precision="fp32")
    assert found.histogram == tuple(histogram)
    assert found.answers == len(walked)
    assert found.tau_macro == pytest.approx(sum((n - 1) / len(steps) for steps, n in walked) / len(walked))
    assert found.tau_micro == pytest.approx(sum(n - 1 for _, n in walked) / len(everything))
    for k, alpha in enumerate(found.alpha, start=1):
        reached = sum(histogram[k - 1 :])
        assert alpha == (sum(histogram[k:]) / reached if reached else None)


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("block_size", [2, 4, 6])
def test_trees_equal_a_walk_over_every_path(block_size: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(walk.BLOCKS, "cpu", 12)
    monkeypatch.setattr(walk, "RANKS", ranks)
    step, batch, trees = random_step(block_size, "dflash"), make_batch(ROWS, 64), (1, 5, 12)
    found = heldout_tau(step, [batch], precision="fp32", trees=trees)
    chain, *of_trees = walks(step, batch, trees=trees)
    assert found.tau_macro == macro_tau(chain)
    for nodes, walked in zip(trees, of_trees, strict=True):
        expected = one_by_one(step, batch, in_tree(nodes, min(ranks, VOCABULARY)))
        assert [answer.histogram for answer in walked] == [
            tuple(accepted.count(a) for a in range(block_size)) if accepted else () for accepted, _ in expected
        ]
        taus = [(tokens - 1) / len(accepted) for accepted, tokens in expected if accepted]
        assert found.taus_of_trees[nodes] == pytest.approx(taus)
        paths = sum(min(ranks, VOCABULARY) ** slot for slot in range(1, block_size))
        assert total_acceptance(walked).nodes_per_step == min(nodes, paths)
    if block_size > 2:
        few, more, most = (fmean(found.taus_of_trees[nodes]) for nodes in (1, 5, 12))
        assert most > more > few > 1


def test_trees_hold_listed_tokens_alone() -> None:
    step, batch, listed = random_step(4, "dflash"), make_batch(ROWS, 64), [0, 1, 3]
    _, walked = walks(step, batch, torch.tensor(listed), trees=(7,))
    expected = one_by_one(step, batch, in_tree(7, listed=listed))
    assert [answer.verify_steps for answer in walked] == [len(accepted) for accepted, _ in expected]


def test_a_tree_of_a_domino_drafter_is_its_path() -> None:
    step, batch = random_step(4, "domino"), make_batch(ROWS, 64)
    chain, short, whole = walks(step, batch, trees=(1, 8))
    assert whole == chain
    expected = one_by_one(step, batch, lambda *block: min(in_chain(*block), 1))
    assert [answer.verify_steps for answer in short] == [len(accepted) for accepted, _ in expected]
    assert total_acceptance(short).nodes_per_step == 1


def test_domino_correction_and_pool_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the walk above would pass without them."""
    step, batch = random_step(4, "domino"), make_batch(ROWS, 64)
    corrected = heldout_tau(step, [batch], precision="fp32").histogram
    with monkeypatch.context() as patch:
        patch.setattr(walk, "POOL", 2)
        assert heldout_tau(step, [batch], precision="fp32").histogram != corrected
    torch.nn.init.zeros_(step.drafter.embed_proj[2].weight)
    assert heldout_tau(step, [batch], precision="fp32").histogram != corrected


class Oracle(Drafter):
    """Drafts the text itself, which is one-hot in the features past the anchor; or, if not `right`, never the text."""

    def __init__(self, block_size: int, right: bool) -> None:
        super().__init__(config(block_size, hidden=VOCABULARY))
        self.right = right

    def forward(self, features: Tensor, embeddings: Tensor, anchors: Tensor) -> Tensor:
        index = (anchors[..., None] + torch.arange(embeddings.shape[2])).clamp(max=features.shape[1] - 1)
        text = features[torch.arange(len(features))[:, None, None], index]
        return text if self.right else text.roll(1, dims=-1)


def oracle(block_size: int, *masks: str, right: bool = True) -> HeldOut:
    batch = make_batch(list(masks), VOCABULARY)
    batch.features = torch.nn.functional.one_hot(batch.input_ids, VOCABULARY).float()
    identity = torch.eye(VOCABULARY)
    step = TrainingStep(Oracle(block_size, right), identity, identity, ObjectiveSettings(name="full"))
    return heldout_tau(step, [batch], precision="fp32")


def test_perfect_drafter_has_tau_of_a_block() -> None:
    found = oracle(4, "uu" + "A" * 13)
    assert (found.tau_macro, found.tau_micro, found.histogram) == (4.0, 4.0, (0, 0, 0, 3))
    assert found.alpha == (1.0, 1.0, 1.0)
    assert found.accuracy == 1.0
    assert found.loss == pytest.approx(math.log(math.e + VOCABULARY - 1) - 1)


def test_useless_drafter_has_tau_one() -> None:
    found = oracle(4, "uu" + "A" * 13, right=False)
    assert (found.tau_macro, found.tau_micro, found.histogram) == (1.0, 1.0, (12, 0, 0, 0))
    assert found.alpha == (0.0, None, None)
    assert found.accuracy == 0.0
    assert found.loss == pytest.approx(math.log(math.e + VOCABULARY - 1))


@pytest.mark.parametrize(
    ("tokens", "histogram"),
    [(2, (0, 1, 0, 0)), (3, (0, 0, 1, 0)), (4, (0, 0, 0, 1)), (5, (0, 0, 0, 1)), (6, (0, 1, 0, 1))],
)
@pytest.mark.parametrize("rest", ["", "uuuuuu", "uAAAAAA"], ids=["row ends", "text follows", "answer follows"])
def test_nothing_is_accepted_past_the_end_of_an_answer(tokens: int, histogram: tuple[int, ...], rest: str) -> None:
    """The oracle also knows what follows. A last step of fewer than B tokens is cut, as serving cuts one at a stop."""
    found = oracle(4, "u" + "A" * tokens + rest)
    following = (0, 1, 0, 1) if "A" in rest else (0, 0, 0, 0)
    assert found.histogram == tuple(a + b for a, b in zip(histogram, following, strict=True))
    assert found.answers == 1 + ("A" in rest)


def test_answers_of_all_turns_count_alike_in_the_macro_mean() -> None:
    found = oracle(4, "uAAAAAAAAAuuAA", "uuAAA")  # 8 tokens in 2 steps, 1 in 1, 2 in 1
    assert found.answers == 3
    assert found.tau_macro == pytest.approx((4 + 1 + 2) / 3)
    assert found.tau_micro == pytest.approx((8 + 1 + 2) / 4)


def test_answer_of_one_token_has_no_tau() -> None:
    assert oracle(4, "uuA", "uA") == HeldOut((), None, (), (), None, None)
    assert oracle(4, "uuAuuAAAAA").answers == 1


def test_labels_past_the_padding_are_not_counted() -> None:
    alone = oracle(4, "uAAAAAAA")
    assert oracle(4, "uAAAAAAA", "u" * 20 + "A").histogram == alone.histogram


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("head", ["dflash", "domino"])
def test_is_repeatable_and_leaves_no_trace(head: str, training: bool) -> None:
    step, batch = random_step(4, head).train(training), make_batch(ROWS, 64)
    graphs: list[bool] = []
    step.drafter.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    generator = torch.get_rng_state()
    first, second = (heldout_tau(step, [batch], precision="fp32") for _ in range(2))
    assert first == second
    assert first.loss is not None and math.isfinite(first.loss)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training is training for module in step.modules())
    assert all(parameter.grad is None for parameter in step.parameters())
    assert graphs and not any(graphs)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_bf16_is_near_fp32() -> None:
    """As trained: float32 weights under autocast, features and tables in bf16."""
    step, batch = random_step(4, "dflash"), make_batch(ROWS, 64)
    exact = heldout_tau(step, [batch], precision="fp32")
    step.embedding, step.head = step.embedding.bfloat16(), step.head.bfloat16()
    batch.features = batch.features.bfloat16()
    rounded = heldout_tau(step, [batch])
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert sum(abs(a - b) for a, b in zip(rounded.histogram, exact.histogram, strict=True)) <= 4


def test_a_block_of_a_perfect_drafter_ends_at_the_first_unlisted_token() -> None:
    batch = make_batch(["uu" + "A" * 41], VOCABULARY)
    batch.features = torch.nn.functional.one_hot(batch.input_ids, VOCABULARY).float()
    identity = torch.eye(VOCABULARY)
    step = TrainingStep(Oracle(4, right=True), identity, identity, ObjectiveSettings(name="full"))
    listed = torch.arange(0, VOCABULARY, 2)
    text = batch.input_ids[0].tolist()
    expected, anchor = [0] * 4, 2
    while anchor < len(text) - 1:
        block = text[anchor + 1 : anchor + 4]
        accepted = next((place for place, token in enumerate(block) if token % 2), len(block))
        expected[accepted] += 1
        anchor += accepted + 1
    found = heldout_tau(step, [batch], precision="fp32", vocabulary=listed)
    assert list(found.histogram) == expected
    assert min(expected[:2]) > 0
    assert heldout_tau(step, [batch], precision="fp32", vocabulary=torch.arange(VOCABULARY)).tau_macro == 4.0
