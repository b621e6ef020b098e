"""Credits on hand-made blocks whose answer is obvious, and against their definitions; names; lambda."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sglang_auf.models.config import DrafterConfig
from sglang_auf.training.data.batching import Batch
from sglang_auf.training.losses.objectives import (
    DOMINO_OBJECTIVES,
    OBJECTIVES,
    DominoObjective,
    ObjectiveSettings,
    Slots,
    first_failures,
)
from sglang_auf.training.losses.step import TrainingStep
from tests.reference.credit_reference import credits
from tests.support.tiny_models import drafter_config

ARMS = ["decay", "b-auf", "b-auf+d", "s-auf", "s-auf+d", "f-auf", "f-auf+d"]


def settings(name: str, **values: Any) -> ObjectiveSettings:
    return ObjectiveSettings(name=name, **values)


def slots(correct: str, mask: str | None = None, q: float = 0.5) -> Slots:
    """One block: '+' right, '-' wrong; in the mask '1' valid, '0' not."""
    right = torch.tensor([[sign == "+" for sign in correct]])
    valid = torch.tensor([[bit == "1" for bit in mask or "1" * len(correct)]])
    return Slots(right, torch.full(right.shape, math.log(q)), valid)


def credit(name: str, block: Slots, **values: float) -> list[float]:
    """c * m of one block."""
    chosen = settings(name, **values)
    return (OBJECTIVES[name].credit(block, chosen) * block.mask)[0].tolist()


# --- accept until fail ---


@pytest.mark.parametrize(
    ("correct", "mask", "support"),
    [
        ("-+++", "1111", [1, 0, 0, 0]),  # the first slot is wrong: only this one
        ("--++", "1111", [1, 0, 0, 0]),  # later errors do not count
        ("+-++", "1111", [1, 1, 0, 0]),  # the failing slot is kept
        ("+++-", "1111", [1, 1, 1, 1]),  # the last one is wrong: all
        ("++++", "1111", [1, 1, 1, 1]),  # none is wrong: all
        ("-+-+", "0111", [0, 1, 1, 0]),  # a masked slot is no error, and is skipped
        ("+--+", "1011", [1, 0, 1, 0]),  # also in the middle
        ("-+++", "0111", [0, 1, 1, 1]),
        ("+++-", "1110", [1, 1, 1, 0]),
        ("----", "0000", [0, 0, 0, 0]),
    ],
)
def test_support_ends_with_the_first_wrong_valid_slot(correct: str, mask: str, support: list[float]) -> None:
    assert credit("auf", slots(correct, mask)) == support


def test_support_of_one_when_the_first_slot_is_wrong() -> None:
    assert sum(credit("auf", slots("-" + "+" * 14))) == 1


def test_without_an_error_auf_is_full_cross_entropy() -> None:
    block = slots("+++++", "11011")
    assert credit("auf", block) == credit("full", block) == [1, 1, 0, 1, 1]
    assert credit("auf+decay", block) == credit("decay", block)


def test_each_block_has_its_own_first_failure() -> None:
    correct = torch.tensor([[True, False, True], [False, True, True], [True, True, True]])
    block = Slots(correct, torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool))
    assert first_failures(block).tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert first_failures(block, 2).tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]


def test_the_gradient_after_the_failure_is_exactly_zero() -> None:
    logits = torch.zeros(1, 4, 5, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        logits[0, 0, 1] = 2.0  # right
        logits[0, 1, 0] = 2.0  # wrong: the label is 2
        logits[0, 2, 3] = 2.0  # right, but too late
    correct = logits.detach().argmax(-1) == labels
    log_q = logits.detach().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    block = Slots(correct, log_q, torch.ones(1, 4, dtype=torch.bool))
    c = OBJECTIVES["auf"].credit(block, settings("auf"))
    loss = (c * F.cross_entropy(logits[0], labels[0], reduction="none")).sum() / c.sum()
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, :2].ne(0).all()
    assert not logits.grad[0, 2:].any()
    # 1 / |S| times (softmax - onehot), and no part from the mask.
    expected = (logits.detach().softmax(-1) - F.one_hot(labels, 5)) / 2
    torch.testing.assert_close(logits.grad[0, :2], expected[0, :2])


# --- the others ---


def test_decay_starts_at_one_and_falls_by_e_every_gamma_slots() -> None:
    found = credit("decay", slots("-" * 15), gamma=7.0)
    assert found[0] == 1
    assert found[7] == pytest.approx(math.exp(-1))
    assert found[14] == pytest.approx(math.exp(-2))


def test_auf_with_decay_is_the_decay_inside_the_support() -> None:
    assert credit("auf+decay", slots("+-++"), gamma=2.0) == pytest.approx([1, math.exp(-0.5), 0, 0])


@pytest.mark.parametrize(
    ("correct", "mask", "behind"),
    [
        ("++++", "1111", [0, 0, 0, 0]),  # no failure: 1 for all
        ("-+++", "1111", [0, 1, 2, 3]),  # the first slot fails: the usual decay
        ("+-++", "1111", [0, 0, 1, 2]),  # begun anew at the failing slot, which still has 1
        ("+--+", "1111", [0, 0, 1, 2]),  # later failures do not count
        ("+++-", "1111", [0, 0, 0, 0]),
        ("-+-+", "0111", [None, 0, 0, 1]),  # a masked slot is no failure
        ("+-++", "1101", [0, 0, None, 2]),  # but it is a slot of the decay, as in `decay`
    ],
)
def test_vat_begins_the_decay_anew_at_the_first_failure(correct: str, mask: str, behind: list[int | None]) -> None:
    expected = [0.0 if slots is None else math.exp(-slots / 3) for slots in behind]
    assert credit("vat", slots(correct, mask), gamma=3.0) == pytest.approx(expected)


def test_dpace_on_two_slots() -> None:
    # q~ = 0.5 * 0.5 + 0.5 = 0.75 for both: c_1 = 0.75 + 0.75 ** 2, c_2 = 0.75 ** 2.
    assert credit("dpace", slots("++"), alpha=0.5) == pytest.approx([0.75 + 0.5625, 0.5625])
    # A slot that is not valid neither lowers the product nor adds to the sum.
    assert credit("dpace", slots("+-+", "101"), alpha=0.5) == pytest.approx([0.75 + 0.5625, 0, 0.5625])


def test_dpace_with_full_smoothing_counts_the_slots_from_here_on() -> None:
    assert credit("dpace", slots("+-+-", q=0.01), alpha=1.0) == pytest.approx([4, 3, 2, 1])


def test_l2r_adds_to_the_first_error_alone() -> None:
    plain = credit("decay", slots("+--+"))
    found = credit("l2r", slots("+--+"), first_error=0.3)
    assert [b - a for a, b in zip(plain, found, strict=True)] == pytest.approx([0, 0.3, 0, 0])
    assert credit("l2r", slots("++++")) == pytest.approx(credit("decay", slots("++++")))
    skipped = credit("l2r", slots("--+", "011"), first_error=0.3)
    assert skipped == pytest.approx([0, math.exp(-1 / 7) + 0.3, math.exp(-2 / 7)])


@given(data=st.data())
def test_credits_follow_their_definitions(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(OBJECTIVES)))
    blocks, width = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 8))
    seed = data.draw(st.integers(0, 2**20))
    constants = {
        "gamma": data.draw(st.sampled_from([0.5, 4.0, 7.0])),
        "alpha": data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        "first_error": data.draw(st.sampled_from([0.0, 0.3, 2.0])),
    }
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(blocks, width, generator=generator) < 0.7
    mask = torch.rand(blocks, width, generator=generator) < 0.8
    q = torch.rand(blocks, width, generator=generator)
    objective = OBJECTIVES[name]
    within = correct | (torch.rand(blocks, width, generator=generator) < 0.5)
    holds = within if objective.by_rank else correct
    found = objective.credit(Slots(correct, q.log(), mask, within), settings(name, **constants))
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        (found * mask).double(), credits(name, holds, q, mask, **constants), rtol=1e-5, atol=1e-6
    )

    if objective.failures is not None:  # then its credit of later slots must not depend on them
        wrong = (~holds & mask).int()
        computed = (wrong.cumsum(-1) - wrong) < objective.failures
        unseen = Slots(correct & computed, torch.where(computed, q.log(), 0.0), mask, within & computed)
        assert torch.equal(objective.credit(unseen, settings(name, **constants)) * mask, found * mask)


def test_only_the_accept_until_fail_objectives_stop_early() -> None:
    stops = {name: objective.failures for name, objective in OBJECTIVES.items() if objective.failures is not None}
    assert stops == {"auf": 1, "auf-tree": 1, "auf+decay": 1, "auf+focus": 1, "auf-2": 2}


def test_a_tree_fails_where_no_branch_holds_the_label() -> None:
    block = slots("+-+--+")
    near = torch.tensor([[True, True, True, True, False, True]])
    held = Slots(block.correct, block.log_q, block.mask, near)
    assert credit("auf-tree", held) == [1, 1, 1, 1, 1, 0]


# --- hand-made logits ---

HALF = math.exp(-1 / 2)  # the decay of one slot at gamma 2
# Probabilities of the tokens of each slot, the label's first; gamma 2, alpha 0.5, first_error 0.3, ranks 2.
BLOCKS = [
    # right, the label second, right, the label last
    [[0.6, 0.2, 0.15, 0.05], [0.3, 0.5, 0.15, 0.05], [0.7, 0.1, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]],
    # the label third, right, the label second, right
    [[0.2, 0.3, 0.45, 0.05], [0.8, 0.05, 0.1, 0.05], [0.4, 0.45, 0.1, 0.05], [0.9, 0.05, 0.03, 0.02]],
    # three right slots, of which the answer holds the first two
    [[0.5, 0.2, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.9, 0.05, 0.03, 0.02], [0.1, 0.2, 0.3, 0.4]],
]
BY_HAND = {
    "full": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]],
    "decay": [[1, HALF, HALF**2, HALF**3], [1, HALF, HALF**2, HALF**3], [1, HALF, 0, 0]],
    "auf": [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]],
    "auf-tree": [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]],
    "auf+decay": [[1, HALF, 0, 0], [1, 0, 0, 0], [1, HALF, 0, 0]],
    "auf+focus": [[1, 1.3, 0, 0], [1.3, 0, 0, 0], [1, 1, 0, 0]],
    "auf-2": [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]],
    "vat": [[1, 1, HALF, HALF**2], [1, HALF, HALF**2, HALF**3], [1, 1, 0, 0]],
    # Confidences (1 + q) / 2: .8 .65 .85 .55, then .6 .9 .7 .95, then .75 .7; their products, added from a slot on.
    "dpace": [
        [0.8 + 0.52 + 0.442 + 0.2431, 0.52 + 0.442 + 0.2431, 0.442 + 0.2431, 0.2431],
        [0.6 + 0.54 + 0.378 + 0.3591, 0.54 + 0.378 + 0.3591, 0.378 + 0.3591, 0.3591],
        [0.75 + 0.525, 0.525, 0, 0],
    ],
    "l2r": [[1, HALF + 0.3, HALF**2, HALF**3], [1.3, HALF, HALF**2, HALF**3], [1, HALF, 0, 0]],
}


class Drafted(torch.nn.Module):
    """A drafter whose states are given; with a head of ones on the diagonal they are the logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.config = DrafterConfig.from_checkpoint(drafter_config(5, mask_token_id=0))
        self.logits = torch.nn.Parameter(logits)

    def forward(self, features: torch.Tensor, embeddings: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        return self.logits[:, None]


def test_every_objective_has_credits_by_hand() -> None:
    assert BY_HAND.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_and_gradient_of_hand_made_logits(name: str) -> None:
    """From the logits to the loss of a step: support, credit, divisor, and d loss / d logits of every slot."""
    labels = [[2, 1, 3, 0], [1, 1, 0, 2], [3, 0, 2, 1]]
    logits = torch.zeros(3, 5, 4)
    for block, (rows, tokens) in enumerate(zip(BLOCKS, labels, strict=True)):
        for slot, (row, label) in enumerate(zip(rows, tokens, strict=True)):
            logits[block, slot + 1] = torch.tensor(row).log().roll(label)  # the label's probability to its place
    answers = torch.ones(3, 5, dtype=torch.bool)
    answers[2, 3:] = False
    tokens = torch.tensor([[0, *row] for row in labels])
    batch = Batch(tokens, answers, torch.tensor([5, 5, 5]), torch.zeros(3, 5, 1), ["a", "b", "c"])
    drafter = Drafted(logits)
    chosen = settings(name, gamma=2.0, alpha=0.5, first_error=0.3, ranks=2)
    step = TrainingStep(drafter, torch.eye(4), torch.eye(4), chosen)  # type: ignore[arg-type]
    terms = step(batch, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1, dtype=torch.bool))
    (terms.numerators / terms.denominators).sum().backward()

    credit = BY_HAND[name]
    over = sum(
        c * -math.log(row[0])
        for credits, rows in zip(credit, BLOCKS, strict=True)
        for c, row in zip(credits, rows, strict=True)
    )
    under = 3 if name == "dpace" else sum(map(sum, credit))
    assert terms.numerators.item() == pytest.approx(over, rel=1e-5)
    assert terms.denominators.item() == pytest.approx(under, rel=1e-5)
    assert drafter.logits.grad is not None
    for block in range(3):
        for slot in range(4):
            label = labels[block][slot]
            gradient = drafter.logits.grad[block, slot + 1].roll(-label).tolist()
            row, c = BLOCKS[block][slot], credit[block][slot] / under
            assert gradient == pytest.approx([c * (row[0] - 1), c * row[1], c * row[2], c * row[3]], rel=1e-4, abs=1e-7)


# --- names and settings ---


def test_the_arms_of_the_paper() -> None:
    assert list(DOMINO_OBJECTIVES) == ARMS
    assert {name: (arm.base, arm.final, arm.final_sees) for name, arm in DOMINO_OBJECTIVES.items()} == {
        "decay": ("decay", "decay", "final"),
        "b-auf": ("auf", "full", "final"),
        "b-auf+d": ("auf+decay", "decay", "final"),
        "s-auf": ("auf", "auf", "base"),
        "s-auf+d": ("auf+decay", "auf+decay", "base"),
        "f-auf": ("auf", "auf", "final"),
        "f-auf+d": ("auf+decay", "auf+decay", "final"),
    }
    assert all(isinstance(arm, DominoObjective) for arm in DOMINO_OBJECTIVES.values())
    assert all({arm.base, arm.final} <= OBJECTIVES.keys() for arm in DOMINO_OBJECTIVES.values())


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() | DOMINO_OBJECTIVES.keys()))
def test_every_registered_name_is_a_setting(name: str) -> None:
    assert settings(name).name == name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "auf-decay"}, r"(?s)name.*none of .* full, .*auf\+decay.*\(dflash\).*b-auf.*\(domino\).*'auf-decay'"),
        ({"name": "auf", "earlier": [{"name": "vta", "until": 0.5}]}, r"(?s)earlier.0.name.*none of .*'vta'"),
        ({"name": "auf", "earlier": [{"name": "vat", "until": 0}]}, r"(?s)earlier.0.until.*greater than 0"),
        ({"name": "auf", "earlier": [{"name": "vat", "until": 1}]}, r"(?s)earlier.0.until.*less than 1"),
        ({"name": "auf", "earlier": [{"name": "vat", "until": math.nan}]}, "earlier.0.until"),
        ({"name": "auf", "earlier": [{"name": "vat"}]}, r"(?s)earlier.0.until.*required"),
        (
            {"name": "auf", "earlier": [{"name": "full", "until": 0.5}, {"name": "vat", "until": 0.25}]},
            r"larger than the one before, not \[0.5, 0.25\]",
        ),
        (
            {"name": "auf", "earlier": [{"name": "full", "until": 0.5}, {"name": "vat", "until": 0.5}]},
            r"larger than the one before, not \[0.5, 0.5\]",
        ),
        ({"name": "auf", "gamma": 0}, "gamma"),
        ({"name": "auf", "alpha": 1.5}, "alpha"),
        ({"name": "auf", "first_error": -1}, "first_error"),
        ({"name": "auf-tree", "ranks": 0}, "ranks"),
        ({"name": "auf", "labels": "gold"}, "labels"),
        ({"name": "auf", "lambda_ratio": 0}, "lambda_ratio"),
        ({"name": "auf", "lambda_start": 2}, "lambda_start"),
        ({"name": "auf", "gama": 7}, "gama"),
        ({}, "name"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ObjectiveSettings.model_validate(values)


def test_a_curriculum_goes_from_one_objective_to_the_next_at_its_shares() -> None:
    chosen = settings("auf", earlier=[{"name": "full", "until": 0.1}, {"name": "vat", "until": 0.3}])
    assert chosen.names == ("full", "vat", "auf")
    assert chosen.shares == pytest.approx((0.1, 0.2, 0.7))
    assert chosen.description == "full until 0.1, then vat until 0.3, then auf"
    assert [chosen.name_at(step / 10) for step in range(10)] == ["full", "vat", "vat", *["auf"] * 7]
    assert (chosen.name_at(0.0999), chosen.name_at(0.2999), chosen.name_at(1.0)) == ("full", "vat", "auf")


def test_without_a_curriculum_the_objective_is_its_name() -> None:
    chosen = settings("auf")
    assert (chosen.names, chosen.shares, chosen.description) == (("auf",), (1.0,), "auf")
    assert {chosen.name_at(progress) for progress in (0.0, 0.5, 1.0)} == {"auf"}


def test_the_defaults_are_the_papers() -> None:
    chosen = settings("auf")
    assert (chosen.gamma, chosen.alpha, chosen.labels) == (7.0, 0.5, "text")
    assert (chosen.lambda_start, chosen.lambda_end, chosen.lambda_ratio) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [1.0, 0.75, 0.5, 0.0]),
        ({"lambda_ratio": 0.5}, [1.0, 0.5, 0.0, 0.0]),
        ({"lambda_start": 0.8, "lambda_end": 0.2}, [0.8, 0.65, 0.5, 0.2]),
        ({"lambda_start": 0.3, "lambda_end": 0.3}, [0.3, 0.3, 0.3, 0.3]),
    ],
)
def test_lambda_goes_in_a_line_from_base_to_final(values: dict[str, float], expected: list[float]) -> None:
    chosen = settings("b-auf", **values)
    assert [chosen.base_weight(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(expected)
