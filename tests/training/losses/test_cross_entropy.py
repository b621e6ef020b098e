"""The head in waves and chunks against all logits at once in plain autograd: losses, right slots, every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sglang_auf.training.losses import cross_entropy as head_module
from sglang_auf.training.losses.cross_entropy import HeadLoss, corrected_head_loss, head_argmax, head_loss, likeliest
from sglang_auf.training.losses.objectives import OBJECTIVES, ObjectiveSettings
from tests.reference.credit_reference import credits

HIDDEN, RANK, VOCABULARY = 6, 3, 13
NAMES = sorted(OBJECTIVES)
NEAR = 3
"""Tokens among which auf-tree looks for a label."""


@dataclass
class Case:
    """Random states whose argmax is the label at about two slots of three. states, correction: Domino's."""

    hidden: torch.Tensor
    head: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor
    correction: torch.Tensor


def make_case(blocks: int = 5, width: int = 4, seed: int = 0, valid: float = 0.8, right: float = 0.65) -> Case:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(blocks, width, HIDDEN, generator=generator)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (blocks, width), generator=generator)
    lucky = torch.rand(blocks, width, generator=generator) < right
    return Case(
        hidden,
        head,
        torch.where(lucky, (hidden @ head.T).argmax(-1), labels),
        torch.rand(blocks, width, generator=generator) < valid,
        torch.randn(blocks, width, RANK, generator=generator) * 0.5,
        torch.randn(VOCABULARY, RANK, generator=generator) * 0.5,
    )


def settings(name: str) -> ObjectiveSettings:
    return ObjectiveSettings(name=name, gamma=3.0, ranks=NEAR)


def terms(loss: HeadLoss, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """sum(m c CE) and sum(m c), as the step reduces them."""
    credit = OBJECTIVES[name].credit(loss.slots, settings(name)) * loss.slots.mask
    return (credit.flatten()[loss.rows] * loss.ce).sum(), credit.sum()


def dense_terms(logits: torch.Tensor, case: Case, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from logits [blocks, K, V] of all slots, with credits from their definitions."""
    log_q = logits.log_softmax(-1).gather(-1, case.labels[..., None])[..., 0]
    near = NEAR if OBJECTIVES[name].by_rank else 1
    correct = (logits.detach().topk(near, dim=-1).indices == case.labels[..., None]).any(-1)
    credit = credits(name, correct, log_q.detach().exp(), case.mask, gamma=3.0).float()
    return (credit * -log_q).sum(), credit.sum()


def assert_same_plain(case: Case, name: str, chunk: int) -> None:
    ours, dense = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    objective = OBJECTIVES[name]
    loss = head_loss(
        ours,
        case.head,
        case.labels,
        case.mask,
        failures=objective.failures,
        chunk=chunk,
        ranks=NEAR if objective.by_rank else None,
    )
    numerator, denominator = terms(loss, name)
    expected, expected_denominator = dense_terms(dense @ case.head.T, case, name)
    torch.testing.assert_close(numerator, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denominator, expected_denominator)
    numerator.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-5, atol=1e-5)
    assert not denominator.requires_grad


def assert_same_corrected(case: Case, name: str, chunk: int) -> None:
    if OBJECTIVES[name].by_rank:
        return  # no Domino arm has it: a Domino drafter has one path
    leaves = [(case.hidden, case.states, case.correction) for _ in range(2)]
    ours, dense = ([leaf.clone().requires_grad_() for leaf in some] for some in leaves)
    loss = corrected_head_loss(
        ours[0],
        ours[1],
        case.head,
        ours[2],
        case.labels,
        case.mask,
        failures=OBJECTIVES[name].failures,
        chunk=chunk,
    )
    numerator, denominator = terms(loss, name)
    expected, expected_denominator = dense_terms(dense[0] @ case.head.T + dense[1] @ dense[2].T, case, name)
    torch.testing.assert_close(numerator, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denominator, expected_denominator)
    numerator.backward()
    expected.backward()
    for found, wanted in zip(ours, dense, strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-5)


BOTH = pytest.mark.parametrize("check", [assert_same_plain, assert_same_corrected], ids=["plain", "corrected"])


@BOTH
@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_equals_all_logits_at_once(check: Any, name: str, chunk: int) -> None:
    check(make_case(), name, chunk)


@BOTH
@given(data=st.data())
@examples(max_examples=60)
def test_equals_all_logits_at_once_for_any_blocks(check: Any, data: st.DataObject) -> None:
    case = make_case(
        blocks=data.draw(st.integers(1, 7)),
        width=data.draw(st.integers(1, 6)),
        seed=data.draw(st.integers(0, 2**20)),
        valid=data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        right=data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
    )
    check(case, data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from([1, 2, 5, 100])))


@BOTH
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [{"valid": 0.0}, {"blocks": 0}, {"blocks": 0, "width": 1}])
def test_without_a_valid_slot_all_is_zero_and_still_differentiable(
    check: Any, name: str, shape: dict[str, Any]
) -> None:
    check(make_case(**shape), name, 4)


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_a_block_without_a_valid_slot_among_others(check: Any, name: str) -> None:
    case = make_case(valid=1.0)
    case.mask[2] = False
    case.mask[0, 0] = False
    check(case, name, 3)


# --- what is computed and what is not ---


def signs(case: Case) -> list[str]:
    """One string for each block: '+' right, '-' wrong, '.' not valid."""
    correct = (case.hidden @ case.head.T).argmax(-1) == case.labels
    marks = [["+" if right else "-" for right in row] for row in correct.tolist()]
    valid = case.mask.tolist()
    return ["".join(m if v else "." for m, v in zip(*row, strict=True)) for row in zip(marks, valid, strict=True)]


def walked(case: Case) -> list[int]:
    """Flat rows up to each block's first failure, by reading its signs."""
    rows = []
    for block, marks in enumerate(signs(case)):
        until = marks.index("-") if "-" in marks else len(marks) - 1
        rows += [block * len(marks) + slot for slot in range(until + 1) if marks[slot] != "."]
    return rows


def sizes_of_products(case: Case, monkeypatch: pytest.MonkeyPatch, chunk: int) -> list[int]:
    """Rows of each product with the head; the rows that carry loss are checked too."""
    computed: list[int] = []
    original = head_module._rows

    def counted(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, ranks: int | None) -> Any:
        computed.append(len(hidden))
        return original(hidden, head, labels, ranks)

    monkeypatch.setattr(head_module, "_rows", counted)
    loss = head_loss(case.hidden, case.head, case.labels, case.mask, failures=1, chunk=chunk)
    assert sorted(loss.rows.tolist()) == walked(case)
    return computed


@pytest.mark.parametrize("seed", range(4))
def test_the_walk_computes_the_support_and_no_other_row(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a chunk is too small for a wave to hold two slots of a block."""
    case = make_case(blocks=8, width=5, seed=seed)
    computed = sizes_of_products(case, monkeypatch, chunk=3)
    assert sum(computed) == len(walked(case)) < int(case.mask.sum())
    assert max(computed) <= 3, "no more logits at a time than a chunk's"


def test_few_blocks_are_walked_several_slots_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot 1 of eight blocks, then ever more slots of those that are left, in waves of up to ten rows."""
    case = make_case(blocks=8, width=12, valid=1.0, right=0.9)
    computed = sizes_of_products(case, monkeypatch, chunk=40)
    assert computed[0] == 8 and len(computed) < max(len(marks.split("-")[0]) for marks in signs(case))
    assert sum(computed) > len(walked(case)) and max(computed) <= 10
    monkeypatch.undo()
    assert_same_plain(case, "auf", chunk=40)


ONE_SLOT_AND_SEVERAL = pytest.mark.parametrize("chunk", [4, 1000])


@ONE_SLOT_AND_SEVERAL
def test_rows_and_losses_belong_together(chunk: int) -> None:
    case = make_case(blocks=8, width=5)
    expected = torch.nn.functional.cross_entropy(
        (case.hidden @ case.head.T).flatten(0, 1), case.labels.flatten(), reduction="none"
    )
    for failures in (None, 1, 2):
        loss = head_loss(case.hidden, case.head, case.labels, case.mask, failures=failures, chunk=chunk)
        assert len(set(loss.rows.tolist())) == len(loss.rows)
        torch.testing.assert_close(loss.ce, expected[loss.rows])
        torch.testing.assert_close(loss.slots.log_q.flatten()[loss.rows], -expected[loss.rows])


@ONE_SLOT_AND_SEVERAL
def test_a_second_failure_may_be_waited_for(chunk: int) -> None:
    case = make_case(blocks=12, width=6, valid=1.0, right=0.5)
    rows = []
    for block, marks in enumerate(signs(case)):
        wrong = [slot for slot, mark in enumerate(marks) if mark == "-"]
        rows += [block * 6 + slot for slot in range((wrong[1] if len(wrong) > 1 else 5) + 1)]
    loss = head_loss(case.hidden, case.head, case.labels, case.mask, failures=2, chunk=chunk)
    assert sorted(loss.rows.tolist()) == rows


@ONE_SLOT_AND_SEVERAL
def test_slots_say_who_was_right_up_to_the_failure_and_nothing_beyond(chunk: int) -> None:
    case = make_case(blocks=8, width=5)
    correct = (case.hidden @ case.head.T).argmax(-1) == case.labels
    everything = head_loss(case.hidden, case.head, case.labels, case.mask, failures=None, chunk=chunk).slots
    assert torch.equal(everything.correct, correct & case.mask)
    assert torch.equal(everything.mask, case.mask)

    seen = torch.zeros(case.mask.numel(), dtype=torch.bool)
    seen[walked(case)] = True
    seen = seen.view_as(case.mask)
    nothing = (case.states, case.head, torch.zeros_like(case.correction))
    for loss in (
        head_loss(case.hidden, case.head, case.labels, case.mask, failures=1, chunk=chunk),
        corrected_head_loss(case.hidden, *nothing, case.labels, case.mask, failures=1, chunk=chunk),
    ):
        assert sorted(loss.rows.tolist()) == walked(case)
        assert torch.equal(loss.slots.correct, correct & seen)
        assert not loss.slots.log_q[~seen].any()


@ONE_SLOT_AND_SEVERAL
def test_slots_say_whose_label_was_near(chunk: int) -> None:
    case = make_case(blocks=8, width=5, right=0.3)
    nearest = (case.hidden @ case.head.T).topk(NEAR, dim=-1).indices
    near = (nearest == case.labels[..., None]).any(-1)
    slots = head_loss(case.hidden, case.head, case.labels, case.mask, failures=None, chunk=chunk, ranks=NEAR).slots
    assert slots.within is not None
    assert torch.equal(slots.within, near & case.mask)
    assert (slots.within & ~slots.correct).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_what_is_drafted(dtype: torch.dtype) -> None:
    """Ties are common in bf16: a label after an equal logit is wrong, since serving takes the first argmax."""
    head = torch.zeros(VOCABULARY, HIDDEN, dtype=dtype)
    head[4] = head[9] = 1.0
    hidden = torch.ones(1, 3, HIDDEN)
    labels = torch.tensor([[4, 9, 5]])
    loss = head_loss(hidden, head, labels, torch.ones(1, 3, dtype=torch.bool), failures=None, chunk=2)
    assert loss.slots.correct.tolist() == [[True, False, False]]


def test_hidden_alone_gets_a_gradient() -> None:
    case = make_case()
    head = case.head.clone().requires_grad_()
    hidden = case.hidden.clone().requires_grad_()
    head_loss(hidden, head, case.labels, case.mask, failures=None, chunk=3).ce.sum().backward()
    assert hidden.grad is not None
    assert head.grad is None


@ONE_SLOT_AND_SEVERAL
def test_rows_that_carry_no_loss_get_a_gradient_of_exactly_zero(chunk: int) -> None:
    case = make_case(blocks=8, width=5)
    for corrected in (False, True):
        hidden = case.hidden.clone().requires_grad_()
        if corrected:
            zero = torch.zeros_like(case.correction)
            extra = (case.states, case.head, zero)
            loss = corrected_head_loss(hidden, *extra, case.labels, case.mask, failures=1, chunk=chunk)
        else:
            loss = head_loss(hidden, case.head, case.labels, case.mask, failures=1, chunk=chunk)
        loss.ce.sum().backward()
        assert hidden.grad is not None
        touched = hidden.grad.flatten(0, 1).any(1).nonzero()[:, 0].tolist()
        assert touched == walked(case)


# --- types ---


@pytest.mark.parametrize("name", ["full", "auf"])
def test_bfloat16_on_a_cpu_stays_within_its_rounding(name: str) -> None:
    """bf16 logits: losses to 2 %, the gradient to 3 % of its norm, of float32 on the same rounded numbers."""
    case = make_case(blocks=40, width=4, valid=1.0)
    hidden, head = case.hidden.bfloat16(), case.head.bfloat16()
    rounded = (hidden @ head.T).float()
    # Where two logits are equal after rounding either may be the argmax; labels are the same on both sides.
    case.labels = torch.where(case.labels == (case.hidden @ case.head.T).argmax(-1), rounded.argmax(-1), case.labels)
    ours, dense = hidden.clone().requires_grad_(), hidden.float().requires_grad_()
    loss = head_loss(ours, head, case.labels, case.mask, failures=OBJECTIVES[name].failures, chunk=64)
    assert loss.ce.dtype == torch.float32
    numerator, denominator = terms(loss, name)
    expected, expected_denominator = dense_terms(dense @ head.float().T, case, name)
    torch.testing.assert_close(denominator, expected_denominator)
    torch.testing.assert_close(numerator, expected, rtol=0.02, atol=0.02)
    numerator.backward()
    expected.backward()
    assert ours.grad is not None
    assert dense.grad is not None
    assert ours.grad.dtype == torch.bfloat16
    assert (ours.grad.float() - dense.grad).norm() < 0.03 * dense.grad.norm()


def test_a_float32_drafter_meets_a_bfloat16_head() -> None:
    case = make_case()
    head = case.head.bfloat16()
    hidden, states, correction = (leaf.clone().requires_grad_() for leaf in (case.hidden, case.states, case.correction))
    plain = head_loss(hidden, head, case.labels, case.mask, failures=None, chunk=3)
    corrected = corrected_head_loss(hidden, states, head, correction, case.labels, case.mask, failures=None, chunk=3)
    (plain.ce.sum() + corrected.ce.sum()).backward()
    for leaf in (hidden, states, correction):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
    exact = head_loss(case.hidden, case.head, case.labels, case.mask, failures=None, chunk=3)
    torch.testing.assert_close(plain.ce, exact.ce, rtol=0.05, atol=0.05)


def test_a_hopeless_slot_costs_much_and_its_gradient_is_exact() -> None:
    """A label whose probability is below the smallest float: the loss stops growing, its gradient does not vanish."""
    head = torch.eye(3)
    hidden = torch.tensor([[[400.0, 0.0, 0.0]]], requires_grad=True)
    labels, mask = torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool)
    loss = head_loss(hidden, head, labels, mask, failures=None, chunk=1)
    loss.ce.sum().backward()
    assert 80 < loss.ce.item() < 100
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[[1.0, -1.0, 0.0]]]


# --- the drafter's own tokens ---


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_argmax_in_chunks(chunk: int) -> None:
    case = make_case(blocks=3, width=5)
    flat = case.hidden.flatten(0, 1)
    assert torch.equal(head_argmax(flat, case.head, chunk=chunk), (flat @ case.head.T).argmax(-1))
    assert head_argmax(flat[:0], case.head, chunk=chunk).tolist() == []
    assert head_argmax(flat, case.head.bfloat16(), chunk=chunk).shape == (15,)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_likeliest_tokens_are_those_of_the_softmax(chunk: int) -> None:
    case = make_case(blocks=3, width=5)
    flat = case.hidden.flatten(0, 1)
    chances, tokens = likeliest(flat, case.head, 3, chunk=chunk)
    for row, softmax in enumerate((flat @ case.head.T).softmax(-1).tolist()):
        expected = sorted(range(VOCABULARY), key=lambda token: -softmax[token])[:3]
        assert tokens[row].tolist() == expected
        assert chances[row].tolist() == pytest.approx([softmax[token] for token in expected], rel=1e-5)
    assert likeliest(flat[:0], case.head, 3, chunk=chunk)[0].shape == (0, 3)


def test_of_equal_logits_the_first_is_likelier() -> None:
    head = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    head[4] = head[9] = head[7] = 1.0
    _, tokens = likeliest(torch.ones(5, HIDDEN), head, 3, chunk=2)
    assert tokens.tolist() == [[4, 7, 9]] * 5
