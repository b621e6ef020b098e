"""Credits of every objective by definition, slot by slot in plain Python, for comparison with the tensor code."""

from __future__ import annotations

import math

import torch


def first_failure(correct: list[bool], valid: list[bool]) -> int | None:
    """j*: the first valid slot whose token is wrong (0-based); None where none is."""
    for slot, (right, counts) in enumerate(zip(correct, valid, strict=True)):
        if counts and not right:
            return slot
    return None


def credits_of_block(
    name: str, correct: list[bool], q: list[float], valid: list[bool], gamma: float, alpha: float, first_error: float
) -> list[float]:
    """c_i of the slots of one block, 0 where not valid. q: probability of the label.

    correct: for auf-tree, whether the label is among the likeliest tokens.
    """
    slots = range(len(valid))
    decay = [math.exp(-slot / gamma) for slot in slots]
    failure = first_failure(correct, valid)
    kept = [failure is None or slot <= failure for slot in slots]
    failures = [slot for slot in slots if valid[slot] and not correct[slot]]
    until_second = failures[1] if len(failures) > 1 else len(valid)
    smooth = [(1 - alpha) * value + alpha for value in q]
    credit = {
        "full": lambda slot: 1.0,
        "decay": lambda slot: decay[slot],
        "auf": lambda slot: float(kept[slot]),
        "auf-tree": lambda slot: float(kept[slot]),
        "auf+decay": lambda slot: kept[slot] * decay[slot],
        "auf+focus": lambda slot: kept[slot] * (1 + first_error * (slot == failure)),
        "auf-2": lambda slot: float(slot <= until_second),
        "vat": lambda slot: 1.0 if failure is None or slot < failure else decay[slot - failure],
        "dpace": lambda slot: sum(
            math.prod(smooth[i] for i in range(m + 1) if valid[i]) for m in range(slot, len(valid)) if valid[m]
        ),
        "l2r": lambda slot: decay[slot] + first_error * (slot == failure),
    }[name]
    return [credit(slot) if valid[slot] else 0.0 for slot in slots]


def credits(
    name: str,
    correct: torch.Tensor,
    q: torch.Tensor,
    valid: torch.Tensor,
    *,
    gamma: float = 7.0,
    alpha: float = 0.5,
    first_error: float = 0.3,
) -> torch.Tensor:
    """The same for blocks, all [blocks, slots] -> float64."""
    rows = zip(correct.tolist(), q.double().tolist(), valid.tolist(), strict=True)
    found = [credits_of_block(name, *row, gamma, alpha, first_error) for row in rows]
    return torch.tensor(found, dtype=torch.float64).reshape(valid.shape)


def divisor(name: str, credit: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """What the sum of an objective's credited losses is divided by: the credit, or blocks for dpace. [blocks, slots]"""
    return torch.tensor(float(sum(map(any, valid.tolist())))) if name == "dpace" else credit.sum()
