"""One micro-batch: labels, the sums of each arm, and the counts, against a plain computation block by block."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.models.domino import PrefixGRU
from sglang_auf.training.data.batching import Batch, draw_anchors
from sglang_auf.training.losses import step as step_module
from sglang_auf.training.losses.objectives import DOMINO_OBJECTIVES, OBJECTIVES, ObjectiveSettings
from sglang_auf.training.losses.step import Terms, TrainingStep
from tests.reference.credit_reference import credits, divisor
from tests.support.tiny_models import drafter_config

DOMINO = {
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "shift_label": True,
    "gru_hidden_dim": 12,
    "emb_dim": 6,
}
HIDDEN, MASK_ID = 64, 2
# So few tokens that a random drafter is often right.
VOCABULARY = 3
BLOCK = 5
SCALES = {"embed_proj.2.weight": 1.0}


def answers(*rows: str) -> torch.Tensor:
    """loss_mask from strings: 'a' is a token of an answer, anything else is not."""
    width = max(map(len, rows))
    return torch.tensor([[sign == "a" for sign in row.ljust(width)] for row in rows])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- which token a slot is compared with ---


class Scripted(torch.nn.Module):
    """Says at slot k of a block at anchor t the token says[row, t + k + shift]; tokens are one-hot states."""

    def __init__(self, head: str, says: torch.Tensor, shift: int, vocabulary: int) -> None:
        super().__init__()
        extra = {"gru_hidden_dim": 12, "emb_dim": 6} if head == "domino" else {}
        config = DrafterConfig.from_checkpoint(drafter_config(BLOCK, mask_token_id=MASK_ID))
        self.config = config.model_copy(update={"head": head, **extra})
        self.says, self.shift, self.vocabulary = says, shift, vocabulary
        self.prefix_gru = RecordingGRU(vocabulary, 12)
        self.embed_proj = torch.nn.Sequential(
            torch.nn.Linear(vocabulary + 12, 6, bias=False), torch.nn.SiLU(), torch.nn.Linear(6, vocabulary, bias=False)
        )
        torch.nn.init.zeros_(self.embed_proj[2].weight)
        self.seen: list[torch.Tensor] = []

    def forward(self, features: torch.Tensor, embeddings: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        self.seen.append(embeddings.argmax(-1))
        positions = anchors[..., None] + torch.arange(BLOCK) + self.shift
        padded = F.pad(self.says, (1, BLOCK + 1))
        tokens = padded.gather(1, positions.flatten(1) + 1).view(positions.shape)
        return 30 * F.one_hot(tokens, self.vocabulary).float()


class RecordingGRU(PrefixGRU):
    def forward(self, tokens: torch.Tensor, state: torch.Tensor | None = None) -> Any:
        self.read = tokens.argmax(-1)
        return super().forward(tokens, state)


WORDS = 24
# All tokens differ, so that a slot compared with a wrong place is wrong.
TEXT = torch.stack([torch.arange(4, 16), torch.arange(23, 11, -1)])
TEXT_MASK = answers("uuuaaaaaaaaa", "uuaaaaaauuaa")
LENGTHS = torch.tensor([12, 12])


def text_batch(**changes: Any) -> Batch:
    values = {"input_ids": TEXT, "loss_mask": TEXT_MASK, "lengths": LENGTHS, "features": torch.zeros(2, 12, 1)}
    return Batch(**{**values, "ids": ["a", "b"], **changes})


def scripted_step(head: str, says: torch.Tensor, shift: int, **settings: Any) -> TrainingStep:
    table = torch.eye(WORDS)
    name = "auf" if head == "dflash" else "f-auf"
    return TrainingStep(Scripted(head, says, shift, WORDS), table, table, ObjectiveSettings(name=name, **settings))


SHIFT_OF = {"dflash": 0, "domino": 1}
HEADS = pytest.mark.parametrize("head", ["dflash", "domino"])


def ratio(pair: tuple[str, str], terms: Terms) -> float:
    return float(terms.metrics[pair[0]].sum() / terms.metrics[pair[1]].sum())


@HEADS
def test_slot_k_of_a_block_is_compared_with_the_token_k_after_its_anchor(head: str) -> None:
    """Domino's slot k with the token k + 1 after it: its slots are counted from the anchor's own."""
    anchors, valid = draw_anchors(TEXT_MASK, 20, generators(0, 1))
    for off in (-1, 0, 1):
        step = scripted_step(head, TEXT, SHIFT_OF[head] + off)
        terms = step(text_batch(), anchors, valid, progress=0.5)
        right = ratio(("accepted", "tried"), terms)
        loss = terms.numerators.detach() / terms.denominators
        if off == 0:
            assert right == 1
            assert loss.max() < 1e-6
            assert terms.metrics["support"] == terms.metrics["valid"]
        else:
            assert right == 0
            assert loss.min() > 20
            # A block at each anchor; the first slot is wrong, and it is all that a block's support holds.
            assert terms.metrics["support"] == terms.metrics["blocks"]


@HEADS
def test_a_block_holds_its_anchors_token_and_masks(head: str) -> None:
    step = scripted_step(head, TEXT, 0)
    step(text_batch(), torch.tensor([[3, 6], [2, 10]]), torch.ones(2, 2, dtype=torch.bool))
    (blocks,) = step.drafter.seen
    assert blocks[..., 0].tolist() == [[7, 10], [21, 13]]
    assert (blocks[..., 1:] == MASK_ID).all()


def test_the_gru_reads_the_text_from_the_anchor_on() -> None:
    step = scripted_step("domino", TEXT, 1)
    step(text_batch(), torch.tensor([[3, 6], [2, 0]]), torch.tensor([[True, True], [True, False]]))
    assert step.drafter.prefix_gru.read.tolist() == [[7, 8, 9, 10], [10, 11, 12, 13], [21, 20, 19, 18]]


@HEADS
@pytest.mark.parametrize(
    ("row", "anchor", "slots"),
    [
        (0, 3, 4),  # inside the answer: all of them
        (0, 7, 4),  # the last slot is the last token of the row
        (0, 8, 3),  # past the end of the row
        (0, 10, 1),
        (1, 4, 3),  # past the end of a turn's answer
        (1, 6, 1),  # 7; after two tokens of the user the next answer begins, which is never drafted from here
        (1, 10, 1),
    ],
)
def test_slots_past_the_answer_do_not_count(head: str, row: int, anchor: int, slots: int) -> None:
    step = scripted_step(head, TEXT, SHIFT_OF[head])
    anchors, valid = torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.bool)
    anchors[row], valid[row] = anchor, True
    terms = step(text_batch(), anchors, valid)
    assert terms.metrics["valid"] == slots
    assert terms.denominators.tolist() == [slots] * len(terms.denominators)


def test_what_lies_past_the_length_of_a_row_does_not_count() -> None:
    step = scripted_step("dflash", TEXT, 0)
    batch = text_batch(lengths=torch.tensor([6, 12]), loss_mask=torch.ones_like(TEXT_MASK))
    terms = step(batch, torch.tensor([[3], [0]]), torch.tensor([[True], [False]]))
    assert terms.metrics["valid"] == 2


@HEADS
def test_labels_may_be_the_targets(head: str) -> None:
    """Slots are then compared with batch.labels at their position; the anchor token is still the text's."""
    choices = TEXT.roll(3, dims=1)
    anchors, valid = draw_anchors(TEXT_MASK, 20, generators(0, 1))
    step = scripted_step(head, choices, SHIFT_OF[head], labels="target")
    terms = step(text_batch(labels=choices), anchors, valid)
    assert ratio(("accepted", "tried"), terms) == 1
    assert torch.equal(step.drafter.seen[0][..., 0][valid], TEXT.gather(1, anchors)[valid])
    if head == "domino":
        assert torch.equal(step.drafter.prefix_gru.read[:, 0], TEXT.gather(1, anchors)[valid])
    of_the_text = scripted_step(head, TEXT, SHIFT_OF[head], labels="target")
    assert ratio(("accepted", "tried"), of_the_text(text_batch(labels=choices), anchors, valid)) == 0


@pytest.mark.parametrize(("labels", "given_labels"), [("target", None), ("text", TEXT)])
def test_labels_that_the_settings_do_not_ask_for_are_a_fault(labels: str, given_labels: torch.Tensor | None) -> None:
    step = scripted_step("dflash", TEXT, 0, labels=labels)
    with pytest.raises(AssertionError):
        step(text_batch(labels=given_labels), torch.tensor([[3], [3]]), torch.ones(2, 1, dtype=torch.bool))


# --- the arms, against their definitions ---


@dataclass
class Setting:
    drafter: Drafter
    embedding: torch.Tensor
    head: torch.Tensor
    batch: Batch
    anchors: torch.Tensor
    valid: torch.Tensor

    def step(self, name: str, **settings: Any) -> TrainingStep:
        chosen = ObjectiveSettings(name=name, gamma=3.0, ranks=2, **settings)
        return TrainingStep(self.drafter, self.embedding, self.head, chosen)

    def run(self, name: str, progress: float = 0.3, diagnostics: bool = False) -> Terms:
        return self.step(name)(self.batch, self.anchors, self.valid, progress, diagnostics)  # type: ignore[no-any-return]


def make_setting(head: str, block_size: int = BLOCK) -> Setting:
    """A random drafter on three conversations: two turns, a short one, and one that fills its row."""
    dflash = DOMINO if head == "domino" else {}
    config = DrafterConfig.from_checkpoint(
        {**drafter_config(block_size, mask_token_id=MASK_ID, **dflash), "vocab_size": VOCABULARY}
    )
    drafter = Drafter(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if weight.ndim == 1 else SCALES.get(name, 0.2) * noise)
            if name.endswith("q_norm.weight"):
                weight.mul_(6)  # attention sharp enough for the slots of a block to differ
    rows = ["uuaaaaaauaaaaauuaaaauuuaaaaaaa", "uuuuuuuaaaaaaaaaaaa", "uaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]
    mask = answers(*rows)
    batch = Batch(
        input_ids=torch.randint(0, VOCABULARY, mask.shape, generator=generator),
        loss_mask=mask,
        lengths=torch.tensor([len(row) for row in rows]),
        features=torch.randn(*mask.shape, 2 * HIDDEN, generator=generator),
        ids=["turns", "short", "full"],
    )
    anchors, valid = draw_anchors(mask, 20, generators(0, 1, 2))
    tables = [torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.3 for _ in range(2)]
    return Setting(drafter, *tables, batch, anchors, valid)


@dataclass
class Plain:
    """All drafted slots of the valid blocks [blocks, K], from which the arms are computed."""

    base: torch.Tensor
    final: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor

    def correct(self, branch: str) -> torch.Tensor:
        logits: torch.Tensor = getattr(self, branch)
        return logits.detach().argmax(-1) == self.labels

    def near(self, branch: str, ranks: int) -> torch.Tensor:
        likeliest = getattr(self, branch).detach().topk(ranks, dim=-1).indices
        return (likeliest == self.labels[..., None]).any(-1)

    def ce(self, branch: str) -> torch.Tensor:
        return -getattr(self, branch).log_softmax(-1).gather(-1, self.labels[..., None])[..., 0]


def plain(setting: Setting) -> Plain:
    """Block by block, with the features cut off at the anchor and the GRU run again for every slot."""
    drafter, batch = setting.drafter, setting.batch
    width, domino = drafter.config.block_size, drafter.config.head == "domino"
    base, final, labels, mask = [], [], [], []
    for row, anchor in [(row, int(setting.anchors[row, n])) for row, n in setting.valid.nonzero().tolist()]:
        text = batch.input_ids[row]
        block = torch.tensor([int(text[anchor])] + [MASK_ID] * (width - 1))
        features = batch.features[row, :anchor][None]
        hidden = drafter(features, setting.embedding[block][None, None], torch.tensor([[anchor]]))[0, 0]
        for drafted in range(1, width):  # of the token at anchor + drafted
            position = anchor + drafted
            real = position < int(batch.lengths[row])
            labels.append(int(text[position]) if real else 0)
            mask.append(real and bool(batch.loss_mask[row, anchor + 1 : position + 1].all()))
            state = hidden[drafted - 1 if domino else drafted]
            logits = setting.head @ state
            base.append(logits)
            if domino and drafted > 1:
                read = text[anchor:position] if real else text[anchor : anchor + 1]  # unused where not real
                _, memory = drafter.prefix_gru(setting.embedding[read][None])
                logits = logits + drafter.embed_proj(torch.cat([state, memory[0, 0]]))
            final.append(logits)
    shape = (-1, width - 1)
    return Plain(
        torch.stack(base).unflatten(0, shape),
        torch.stack(final).unflatten(0, shape),
        torch.tensor(labels).view(shape),
        torch.tensor(mask).view(shape),
    )


@functools.cache
def known(head: str) -> tuple[Setting, Plain]:
    """A setting that no test changes, and its parts."""
    setting = make_setting(head)
    return setting, plain(setting)


def kept(correct: torch.Tensor, mask: torch.Tensor, name: str = "auf") -> torch.Tensor:
    """Slots up to the first wrong valid one; with name "auf-2" the second."""
    return credits(name, correct, torch.ones(mask.shape), mask).bool()


def branches(name: str, slots: Plain) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Numerators and denominators of a Domino arm as arXiv 2607.01893 defines them: support, and decay or none."""
    support = {
        "common": slots.mask,
        "base-auf": kept(slots.correct("base"), slots.mask),
        "final-auf": kept(slots.correct("final"), slots.mask),
    }
    arm, decayed = name.removesuffix("+d"), name == "decay" or name.endswith("+d")
    supports = {
        "decay": ("common", "common"),
        "b-auf": ("base-auf", "common"),
        "s-auf": ("base-auf", "base-auf"),
        "f-auf": ("base-auf", "final-auf"),
    }[arm]
    weights = torch.tensor([math.exp(-k / 3.0) if decayed else 1.0 for k in range(slots.mask.shape[1])])
    credit = [support[which] * weights for which in supports]
    numerators = [(c * slots.ce(branch)).sum() for c, branch in zip(credit, ("base", "final"), strict=True)]
    return numerators, [c.sum() for c in credit]


def gradients(loss: torch.Tensor, drafter: Drafter) -> dict[str, torch.Tensor]:
    names, weights = zip(*drafter.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(w) if g is None else g for name, w, g in zip(names, weights, found, strict=True)}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dflash_objectives_are_their_definitions_with_every_gradient(name: str) -> None:
    setting, slots = known("dflash")
    holds = slots.near("base", 2) if OBJECTIVES[name].by_rank else slots.correct("base")
    credit = credits(name, holds, (-slots.ce("base").detach()).exp(), slots.mask, gamma=3.0).float()
    numerator, denominator = (credit * slots.ce("base")).sum(), divisor(name, credit, slots.mask)

    terms = setting.run(name)
    torch.testing.assert_close(terms.numerators, numerator[None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.denominators, denominator[None], rtol=1e-4, atol=1e-4)
    assert terms.weights.tolist() == [1.0]
    assert not terms.denominators.requires_grad
    assert_close(
        gradients(terms.numerators[0] / terms.denominators[0], setting.drafter),
        gradients(numerator / denominator, setting.drafter),
    )


@pytest.mark.parametrize("name", DOMINO_OBJECTIVES)
def test_domino_arms_are_their_definitions_with_every_gradient(name: str) -> None:
    setting, slots = known("domino")
    numerators, denominators = branches(name, slots)
    terms = setting.run(name, progress=0.3)
    torch.testing.assert_close(terms.numerators, torch.stack(numerators), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.denominators, torch.stack(denominators), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.weights, torch.tensor([0.7, 0.3]))
    expected = 0.7 * numerators[0] / denominators[0] + 0.3 * numerators[1] / denominators[1]
    assert_close(
        gradients((terms.weights * terms.numerators / terms.denominators).sum(), setting.drafter),
        gradients(expected, setting.drafter),
    )


def test_the_arms_of_this_setting_differ() -> None:
    """Otherwise the tests above could not distinguish them."""
    for head, names in (("dflash", OBJECTIVES), ("domino", DOMINO_OBJECTIVES)):
        setting, _ = known(head)
        terms = [torch.cat([some.numerators.detach(), some.denominators]) for some in map(setting.run, names)]
        found = [tuple(round(value, 3) for value in some.tolist()) for some in terms]
        assert len(set(found)) == len(names)


@pytest.mark.parametrize("name", DOMINO_OBJECTIVES)
def test_a_domino_block_of_two_has_a_base_slot_alone(name: str) -> None:
    setting = make_setting("domino", block_size=2)
    numerators, denominators = branches(name, plain(setting))
    terms = setting.run(name)
    torch.testing.assert_close(terms.numerators, torch.stack(numerators), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms.denominators, torch.stack(denominators))


# --- sums over parts of a batch ---


EVERY_ARM = [("dflash", name) for name in OBJECTIVES] + [("domino", name) for name in DOMINO_OBJECTIVES]


@pytest.mark.parametrize(("head", "name"), EVERY_ARM)
def test_terms_of_a_batch_are_the_sums_over_its_rows(head: str, name: str) -> None:
    setting = make_setting(head)
    whole = setting.run(name, diagnostics=True)
    parts = []
    for row in range(3):
        some = slice(row, row + 1)
        batch = setting.batch
        length = int(batch.lengths[row])  # a row alone carries no padding
        alone = Batch(
            batch.input_ids[some, :length],
            batch.loss_mask[some, :length],
            batch.lengths[some],
            batch.features[some, :length],
            batch.ids[some],
        )
        parts.append(setting.step(name)(alone, setting.anchors[some], setting.valid[some], 0.3, True))
    for key in ("numerators", "denominators"):
        summed = torch.stack([getattr(part, key) for part in parts]).sum(0)
        torch.testing.assert_close(getattr(whole, key), summed, rtol=1e-4, atol=1e-4)
    for key, value in whole.metrics.items():
        assert torch.equal(value, torch.stack([part.metrics[key] for part in parts]).sum(0)), key


@HEADS
def test_chunks_change_nothing(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make_setting(head)
    name = "auf" if head == "dflash" else "f-auf"
    whole = setting.run(name)
    monkeypatch.setitem(step_module.CHUNK, "cpu", 3)
    cut = setting.run(name)
    torch.testing.assert_close(cut.numerators, whole.numerators)
    assert torch.equal(cut.denominators, whole.denominators)


def test_padding_holds_nothing_that_counts() -> None:
    setting = make_setting("dflash")
    before = setting.run("decay", diagnostics=True)
    batch = setting.batch
    padded = (torch.arange(batch.input_ids.shape[1]) >= batch.lengths[:, None]).float()
    batch.features = batch.features + 100 * padded[..., None]
    batch.input_ids = torch.where(padded.bool(), MASK_ID, batch.input_ids)
    batch.features = F.pad(batch.features, (0, 0, 0, 4), value=9.0)
    batch.input_ids, batch.loss_mask = F.pad(batch.input_ids, (0, 4)), F.pad(batch.loss_mask, (0, 4))
    after = setting.run("decay", diagnostics=True)
    torch.testing.assert_close(after.numerators, before.numerators, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.denominators, before.denominators)


@pytest.mark.parametrize(("head", "name"), EVERY_ARM)
def test_without_a_block_all_is_zero_and_every_weight_still_gets_its_gradient(head: str, name: str) -> None:
    """Ranks that hold no block in a step must still take part in the exchange of gradients."""
    setting = make_setting(head)
    setting.valid[:] = False
    terms = setting.run(name, diagnostics=True)
    assert not terms.numerators.any()
    assert not terms.denominators.any()
    assert not any(value.any() for value in terms.metrics.values())
    terms.numerators.sum().backward()
    for weight in setting.drafter.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


# --- counts ---


@pytest.mark.parametrize(("head", "name"), EVERY_ARM)
def test_counts_are_those_of_a_walk_over_the_blocks(head: str, name: str) -> None:
    """tried[k]: blocks whose slots before k are all valid and right, and whose slot k is valid."""
    setting, slots = known(head)
    right, mask = slots.correct("base").tolist(), slots.mask.tolist()
    width = BLOCK - 1
    tried, accepted = [0] * width, [0] * width
    for correct, valid in zip(right, mask, strict=True):
        for k in range(width):
            if not valid[k]:
                break
            tried[k] += 1
            if not correct[k]:
                break
            accepted[k] += 1
    holds = slots.near("base", 2) if name == "auf-tree" else slots.correct("base")
    until_failure = kept(holds, slots.mask, "auf-2" if name == "auf-2" else "auf")
    stops = name not in ("full", "decay", "vat", "dpace", "l2r")
    support = until_failure if stops else slots.mask

    metrics = setting.run(name, diagnostics=True).metrics
    assert metrics["tried"].tolist() == tried
    assert metrics["accepted"].tolist() == accepted
    assert metrics["blocks"] == len(mask) == int(setting.valid.sum())
    assert metrics["valid"] == slots.mask.sum()
    assert metrics["support"] == support.sum()
    assert metrics["support_correct"] == (support & slots.correct("base")).sum()
    assert metrics["common_valid"] == slots.mask.sum()
    assert metrics["common_correct"] == (slots.mask & slots.correct("base")).sum()
    assert (metrics["accepted"] <= metrics["tried"]).all()


def test_this_settings_counts_are_worth_counting() -> None:
    """Some blocks reach past their answer, one into the next answer, and some have many right slots."""
    setting, slots = known("dflash")
    ends = [valid[0] and not all(valid) for valid in slots.mask.tolist()]
    assert any(ends) and not all(ends)
    rows, places = setting.valid.nonzero(as_tuple=True)
    windows = [
        setting.batch.loss_mask[row, anchor + 1 : anchor + BLOCK].tolist()
        for row, anchor in zip(rows.tolist(), setting.anchors[rows, places].tolist(), strict=True)
    ]
    assert any(window[0] and False in window and window[window.index(False) :].count(True) for window in windows)
    accepted = setting.run("auf").metrics["accepted"]
    assert accepted.min() > 0


def test_slots_without_credit_are_looked_at_for_diagnostics_alone() -> None:
    metrics = make_setting("dflash").run("auf").metrics
    assert not metrics.keys() & {"common_valid", "common_correct"}
    assert all(not value.requires_grad for value in metrics.values())


# --- what a step holds ---


def test_the_tables_are_frozen_and_not_part_of_a_checkpoint() -> None:
    setting = make_setting("dflash")
    setting.embedding.requires_grad_()
    step = setting.step("auf")
    assert all(name.startswith("drafter.") for name in step.state_dict())
    assert [name for name, _ in step.named_parameters() if not name.startswith("drafter.")] == []
    step(setting.batch, setting.anchors, setting.valid).numerators.sum().backward()
    assert setting.embedding.grad is None


def test_lambda_follows_the_progress_of_training() -> None:
    setting = make_setting("domino")
    step = setting.step("b-auf", lambda_ratio=0.5)
    for progress, weight in [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (1.0, 0.0)]:
        terms = step(setting.batch, setting.anchors, setting.valid, progress)
        torch.testing.assert_close(terms.weights, torch.tensor([weight, 1 - weight]))


@pytest.mark.parametrize(
    ("head", "names"),
    [("dflash", ("decay", "auf", "full")), ("dflash", ("auf", "dpace", "auf-tree")), ("domino", ("decay", "b-auf"))],
)
def test_each_part_of_a_curriculum_is_the_objective_of_its_name(head: str, names: tuple[str, ...]) -> None:
    """Also where an objective stops blocks, and computes few logits, before or after one that needs all of them."""
    setting = make_setting(head)
    shares = [0.25, 0.5][: len(names) - 1]
    earlier = [{"name": name, "until": share} for name, share in zip(names, shares, strict=False)]
    step = setting.step(names[-1], earlier=earlier)
    for start, name in zip([0.0, *shares], names, strict=True):
        for progress in (start, start + 0.2499):
            found = step(setting.batch, setting.anchors, setting.valid, progress, True)
            alone = setting.run(name, progress, diagnostics=True)
            for ours, plain in ((found.numerators, alone.numerators), (found.denominators, alone.denominators)):
                assert torch.equal(ours, plain), (name, progress)
            assert all(torch.equal(value, alone.metrics[key]) for key, value in found.metrics.items())
            assert_close(
                gradients(found.numerators.sum(), setting.drafter), gradients(alone.numerators.sum(), setting.drafter)
            )


@pytest.mark.parametrize(("head", "name"), [("dflash", "auf"), ("domino", "b-auf")])
def test_float32_weights_train_on_bfloat16_features_under_autocast(head: str, name: str) -> None:
    setting = make_setting(head)
    exact = setting.run(name)
    setting.embedding, setting.head = setting.embedding.bfloat16(), setting.head.bfloat16()
    setting.batch.features = setting.batch.features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = setting.run(name)
    terms.numerators.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in setting.drafter.parameters())
    loss, expected = ((t.numerators / t.denominators).detach() for t in (terms, exact))
    torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.1)
