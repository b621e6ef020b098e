"""Pictures hold the figures they are given, read back from matplotlib."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.reports import figures
from benchmarks.stats.intervals import Interval
from benchmarks.stats.positions import Bucket
from benchmarks.stats.summary import Latency, MacroSummary, MicroSummary, RunSummary, TaskSummary, Throughput

TRAIN = [
    {"kind": "train", "step": 10 * i, "loss": 3.0 / i, "r_active": 0.1 * i, "alpha_1": None if i == 1 else 0.2}
    for i in (1, 2, 3)
]
HELD_OUT = [{"kind": "held_out", "step": 20, "tau": 1.3}, {"kind": "held_out", "step": 30, "tau": None}]


def task(tau: float | None, interval: Interval | None = None) -> TaskSummary:
    return TaskSummary(
        prompts=2, requests=2, failed=0, without_steps=0, tau=tau, tau_interval=interval, tau_micro=tau, tau_verify=tau,
        alpha=[], verify_steps=4, accepted_histogram=[], completion_tokens=9,
    )  # fmt: skip


def summary(tasks: dict[str, TaskSummary], mean: float, histogram: list[int] | None = None) -> RunSummary:
    return RunSummary(
        target="t", drafter="d", block_size=4, device="cpu", sglang="x", temperature=0, max_tokens=8, sessions=1,
        tasks=tasks,
        macro=MacroSummary(tau=mean, tau_verify=mean),
        micro=MicroSummary(tau=mean, tau_verify=mean, alpha=[], verify_steps=4, accepted_histogram=histogram or []),
        throughput=Throughput(
            tokens_per_s=1, completion_tokens=1, seconds=1, concurrency=1, requests=1, failed=0
        ),
        latency=Latency(ttft=None, itl=None, latency=None),
    )  # fmt: skip


def lines(axis: Any) -> dict[str, list[tuple[float, float]]]:
    drawn = [line for line in axis.lines if not line.get_label().startswith("_")]
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in drawn}


def test_tau_has_a_dot_and_an_interval_for_each_task_and_one_for_the_mean() -> None:
    first = summary({"gsm8k": task(2.0, Interval(low=1.5, high=2.75)), "mbpp": task(3.0)}, 2.5)
    second = summary({"mbpp": task(1.0)}, 1.0)
    (axis,) = figures.tau_by_task({"first": first, "second": second}).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["gsm8k", "mbpp", "mean"]
    bars = {container.get_label(): container for container in axis.containers}
    assert list(bars["first"].lines[0].get_ydata()) == [2.0, 3.0, 2.5]
    assert [round(x) for x in bars["second"].lines[0].get_xdata()] == [1, 2]
    spans = bars["first"].lines[2][0].get_segments()
    assert [tuple(span[:, 1]) for span in spans] == [(1.5, 2.75), (3.0, 3.0), (2.5, 2.5)]


def test_alpha_leaves_out_what_no_step_reached() -> None:
    (axis,) = figures.alpha_curves({"run": [0.5, 0.25, None], "none": [None]}).axes
    assert lines(axis) == {"run": [(1, 0.5), (2, 0.25)]}


def test_each_run_of_an_arm_is_a_line_in_its_colour() -> None:
    curves = {"decay": {300: [(50, 1.1), (300, 1.2)], 2400: [(200, 1.3)]}, "auf": {300: [(300, 1.4)]}}
    (axis,) = figures.tau_by_step(curves).axes
    drawn = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axis.lines]
    assert drawn == [[(50, 1.1), (300, 1.2)], [(200, 1.3)], [(300, 1.4)]]
    colours = [line.get_color() for line in axis.lines]
    assert colours[0] == colours[1] != colours[2]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["decay", "auf"]


def test_buckets_stand_in_order_and_each_run_has_its_own() -> None:
    of = task(2.0, Interval(low=1.5, high=2.75)).model_copy(
        update={"alpha": [0.5, 0.25], "alpha_intervals": [Interval(low=0.25, high=0.75), None]}
    )
    later = task(1.5)
    runs = {"first": [Bucket(1, 64, of), Bucket(129, 256, later)], "second": [Bucket(65, 128, later)]}
    tau, alpha = figures.by_bucket(runs, "position").axes
    assert [label.get_text() for label in tau.get_xticklabels()] == ["1-64", "65-128", "129-256"]
    bars = {container.get_label(): container for container in tau.containers}
    assert list(bars["first"].lines[0].get_ydata()) == [2.0, 1.5]
    assert [round(x) for x in bars["first"].lines[0].get_xdata()] == [0, 2]
    assert [round(x) for x in bars["second"].lines[0].get_xdata()] == [1]
    assert tuple(bars["first"].lines[2][0].get_segments()[0][:, 1]) == (1.5, 2.75)
    (bar,) = alpha.containers
    assert list(bar.lines[0].get_ydata()) == [0.5]
    assert tuple(bar.lines[2][0].get_segments()[0][:, 1]) == (0.25, 0.75)


def test_accepted_lengths_are_shares_of_steps() -> None:
    (axis,) = figures.accepted_lengths({"run": summary({}, 2.0, [6, 2])}).axes
    assert [bar.get_height() for bar in axis.containers[0]] == [0.75, 0.25]


def test_speedups_are_drawn_in_order_of_concurrency() -> None:
    (axis,) = figures.speedups({"auf": [(16, 0.8), (1, 1.4)]}).axes
    assert lines(axis) == {"auf": [(1, 1.4), (16, 0.8)]}


def test_training_panels_hold_the_known_points_of_each_run() -> None:
    axes = figures.training_curves({"run": [*TRAIN, *HELD_OUT]}).axes
    found = {axis.get_title(): lines(axis).get("run") for axis in axes}
    assert found["training loss (nats)"] == [(10, 3.0), (20, 1.5), (30, 1.0)]
    assert found["tau on held-out answers"] == [(20, 1.3)]
    assert found["alpha_1 in training"] == [(20, 0.2), (30, 0.2)]
    assert found["accuracy of all valid slots"] is None


@pytest.mark.parametrize("figure", [lambda: figures.alpha_curves({"run": [0.5]}), lambda: figures.training_curves({})])
def test_a_picture_is_a_png(figure: Any) -> None:
    assert figures.png(figure()).startswith(b"\x89PNG\r\n")
