"""The report of the demonstration: what is printed, and when it has passed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.training.adapt_demo import NOT_BETTER, AdaptDemo, AdaptDemoConfig
from benchmarks.training.before_after import BeforeAfter
from sglang_auf.training.adapt import adapt
from tests.benchmarks.training.test_before_after import records

SWAPPED = {"state": "watching", "watched": 48, "watches": 100}


def report(**changed: Any) -> AdaptDemo:
    after = records(1, 0.5)
    fields: dict[str, Any] = {
        "config": AdaptDemoConfig(),
        "target": "a-model",
        "recorded": 500,
        "traffic_tokens": 50_000,
        "traffic_tokens_per_s": 350.0,
        "verdict": ["100 recorded answers: tau 1.0 before", "better: DIR is generation 1"],
        "swap": SWAPPED,
        "kinds": [BeforeAfter.of(name, records(0, 1.0), after) for name in ("given texts", "old kinds")],
        "failed": 0,
        "identical": 12,
        "compared": 12,
        "seconds": {"adapt": 300.4},
    }
    return AdaptDemo(**{**fields, **changed})


def test_the_table_has_both_kinds_and_the_verdict() -> None:
    demo = report()
    assert demo.passed
    text = demo.text()
    assert "| given texts | 6 | 1.00 (1.00..1.00) | 2.00 (2.00..2.00) | +1.00 [+1.00, +1.00] |" in text
    assert "| old kinds | 6 |" in text
    assert "- better: DIR is generation 1" in text
    assert "Identical answers before and after: 12 of 12." in text
    assert "adapt 300." in text


@pytest.mark.parametrize(
    "changed",
    [
        {"identical": 11},
        {"identical": 0, "compared": 0},
        {"failed": 1},
        {"swap": SWAPPED | {"state": "taken back"}},
        {"swap": None},
        {"kinds": [BeforeAfter.of("given texts", records(1, 1.0), records(0, 1.0))]},
    ],
)
def test_what_a_user_would_not_want_does_not_pass(changed: dict[str, Any]) -> None:
    assert not report(**changed).passed


def test_a_drafter_that_did_not_get_better_is_said_and_not_swapped() -> None:
    kinds = [BeforeAfter.of(name, records(0, 1.0), []) for name in ("given texts", "old kinds")]
    demo = report(kinds=kinds, swap=None, identical=0, compared=0, verdict=["not better: nothing is exported"])
    text = demo.text()
    assert "- not better: nothing is exported" in text
    assert "Not exported: the old drafter goes on, and nothing was swapped." in text
    assert "Identical" not in text


def test_the_exit_code_is_that_of_adapt() -> None:
    assert NOT_BETTER == adapt.NOT_BETTER
