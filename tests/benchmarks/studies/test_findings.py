"""Verdicts from made-up results whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.stats.intervals import Interval
from benchmarks.studies.config import Claim, Study
from benchmarks.studies.findings import Results, findings, judge
from tests.benchmarks.stats.test_intervals import answers


def interval(low: float, high: float) -> Interval:
    return Interval(low=low, high=high)


def claim(**changes: Any) -> Claim:
    return Claim.model_validate({"id": "a", "text": "t", "arm": "auf", "against": "decay", **changes})


@pytest.mark.parametrize(
    ("expected", "intervals", "verdict"),
    [
        ("higher", [interval(0.1, 0.3), interval(0.05, 0.2)], "yes"),
        ("higher", [interval(0.1, 0.3), interval(-0.05, 0.2)], "not shown"),
        ("higher", [interval(-0.3, -0.1), interval(-0.2, -0.05)], "no"),
        ("higher", [interval(-0.3, -0.1), interval(-0.2, 0.05)], "not shown"),
        ("higher", [None, interval(0.1, 0.2)], "not shown"),
        ("higher", [None], "not shown"),
        ("lower", [interval(-0.3, -0.1)], "yes"),
        ("lower", [interval(0.1, 0.3)], "no"),
        ("lower", [interval(-0.1, 0.3)], "not shown"),
        ("equal", [interval(-0.01, 0.01), interval(-0.015, 0.005)], "yes"),
        ("equal", [interval(-0.01, 0.01), interval(-0.03, 0.005)], "not shown"),
        ("equal", [interval(0.03, 0.05)], "no"),
    ],
)
def test_a_verdict_needs_every_interval(expected: str, intervals: list[Interval | None], verdict: str) -> None:
    assert judge(claim(expected=expected, margin=0.02), intervals) == verdict


def results(lift: float, accuracies: dict[str, list[float]]) -> Results:
    """auf is `lift` more likely to have a draft accepted than decay, on two tasks and three seeds."""
    study = Study.model_validate(
        {
            "title": "A study",
            "profile": "p",
            "target": "t",
            "recipe": "r",
            "seeds": [1, 2, 3],
            "answers": {"own": {"demo": 8}},
            "arms": {"decay": {}, "auf": {}},
            "claims": [
                {"id": "a", "text": "higher tau", "arm": "auf", "against": "decay"},
                {"id": "b", "text": "accuracy", "arm": "decay", "against": "auf", "figure": "accuracy"},
            ],
        }
    )
    walked = {
        (arm, seed): [
            record
            for task in ("gsm8k", "mbpp")
            for record in answers(60, seed=seed, task=task, lift=lift if arm == "auf" else 0.0)
        ]
        for arm in study.arms
        for seed in study.seeds
    }
    training = {
        (arm, seed): {
            "set": [],
            "metrics": [
                {"kind": "train", "step": 1, "loss": 2.0, "r_active": 0.3},
                {"kind": "held_out", "step": 1, "tau": 1.5, "accuracy": accuracies[arm][seed - 1]},
            ],
            "seconds": 60.0,
            "run": {
                "target": {"name": "t"},
                "starts": [{"versions": {"torch": "x"}}],
                "data": {"sha256": "d", "train": 5, "held_out": 2, "answer_tokens": 100},
                "steps": 1,
            },
        }
        for arm in study.arms
        for seed in study.seeds
    }
    machine = {"cpu": "c", "cores": 2, "memory_gib": 1}
    plain = {
        "server": {"model": "m", "device": "cpu", "dtype": "bfloat16"},
        "tasks": {"gsm8k": {"prompts": 60}, "mbpp": {"prompts": 60}},
        "sessions": [{"versions": {"sglang": "y"}, "machine": machine}],
    }
    served = {("auf", 1, 0.0): walked["auf", 1]}
    return Results(study, walked, training, served, plain)


EQUAL = {"decay": [0.3, 0.3, 0.3], "auf": [0.3, 0.3, 0.3]}


def test_a_clear_difference_is_found_in_every_task() -> None:
    tau, accuracy = findings(results(0.15, {"decay": [0.30, 0.31, 0.32], "auf": [0.25, 0.26, 0.27]}))
    assert tau.verdict == "yes"
    assert set(tau.by_task) == {"gsm8k", "mbpp", "macro"}
    assert tau.difference == pytest.approx(tau.by_task["macro"][0])
    assert tau.difference > 0.2
    assert accuracy.verdict == "yes"
    assert accuracy.difference == pytest.approx(0.05)
    assert accuracy.over_prompts is None


def test_no_difference_is_not_shown() -> None:
    tau, accuracy = findings(results(0.0, EQUAL))
    assert tau.difference == 0
    assert (tau.verdict, accuracy.verdict) == ("not shown", "not shown")
