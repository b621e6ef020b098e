"""Figures from the sums that a step counts."""

from __future__ import annotations

import pytest
import torch

from sglang_auf.training.logger import shown_duration, training_figures


def sums(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    counted = {
        "blocks": torch.tensor(10.0),
        "valid": torch.tensor(28.0),
        "support": torch.tensor(16.0),
        "support_correct": torch.tensor(6.0),
        "common_valid": torch.tensor(28.0),
        "common_correct": torch.tensor(7.0),
        "tried": torch.tensor([10.0, 4.0, 2.0]),
        "accepted": torch.tensor([5.0, 2.0, 0.0]),
    }
    return {**counted, **changes}


def test_figures() -> None:
    figures = training_figures(sums(), block_size=4)
    assert figures == pytest.approx(
        {
            "r_active": 16 / (10 * 4),
            "support_accuracy": 6 / 16,
            "common_accuracy": 7 / 28,
            "alpha_1": 5 / 10,
            "alpha_2": 2 / 4,
            "alpha_3": 0.0,
        }
    )


def test_what_was_never_tried_has_no_figure() -> None:
    nothing = {name: torch.zeros_like(value) for name, value in sums().items()}
    assert set(training_figures(nothing, block_size=4).values()) == {None}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (480, "8 min"), (3570, "1 h 00 min"), (7500, "2 h 05 min")],
)
def test_a_time_says_its_units(seconds: float, shown: str) -> None:
    assert shown_duration(seconds) == shown
