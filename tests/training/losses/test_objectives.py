"""Credits on hand-made blocks whose answer is obvious, and against their definitions; names; lambda."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sglang_auf.training.losses.objectives import (
    DOMINO_OBJECTIVES,
    OBJECTIVES,
    DominoObjective,
    ObjectiveSettings,
    Slots,
    first_failures,
)
from tests.reference.credit_reference import credits

ARMS = ["decay", "b-auf", "b-auf+d", "s-auf", "s-auf+d", "f-auf", "f-auf+d"]


def settings(name: str, **values: float) -> ObjectiveSettings:
    return ObjectiveSettings(name=name, **values)  # type: ignore[arg-type]


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
        ({"name": "auf-decay"}, r"'auf-decay' is none of full, .*auf\+decay.*\(dflash\).*b-auf.*\(domino\)"),
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
