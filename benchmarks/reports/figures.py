"""Pictures of benchmark and training runs, as matplotlib figures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from benchmarks.stats.intervals import Interval
from benchmarks.stats.positions import Bucket
from benchmarks.stats.summary import RunSummary
from sglang_auf.errors import ConfigError

Rows = Sequence[Mapping[str, Any]]
Point = tuple[float, float, Interval | None]
"""place, value, its interval"""


def require_matplotlib() -> None:
    """Raises ConfigError without it. Commands ask before they begin, since pictures come last."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "no package matplotlib", "the package that draws pictures", "pip install -c constraints.txt matplotlib"
        )


def tau_by_task(runs: Mapping[str, RunSummary]) -> Any:
    """A dot with its 95 % interval for each run and task. The last place is the mean over tasks."""
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run.tasks))
    figure, axis = _figure(1.5 + 1.1 * (len(tasks) + 1), 3.6)
    for place, (name, run) in enumerate(runs.items()):
        shift = (place - (len(runs) - 1) / 2) * 0.6 / max(len(runs), 1)
        points: list[Point] = []
        for at, task in enumerate(tasks):
            found = run.tasks.get(task)
            if found is not None and found.tau is not None:
                points.append((at + shift, found.tau, found.tau_interval))
        if run.macro.tau is not None:
            points.append((len(tasks) + shift, run.macro.tau, run.macro.tau_interval))
        _dots(axis, points, name)
    axis.axvline(len(tasks) - 0.5, color="0.7", linewidth=1)
    axis.set_xticks(range(len(tasks) + 1), [*tasks, "mean"])
    axis.set_ylabel("tau")
    axis.legend(fontsize=8)
    return figure


def tau_by_seed(taus: Mapping[str, Sequence[float]]) -> Any:
    """A dot for each seed of each arm, and the arm's mean as a bar."""
    figure, axis = _figure(1.5 + 0.8 * len(taus), 3.6)
    for place, values in enumerate(taus.values()):
        axis.plot([place] * len(values), values, "o", markersize=4, color="C0")
        axis.plot([place - 0.25, place + 0.25], [sum(values) / len(values)] * 2, color="C1")
    axis.set_xticks(range(len(taus)), list(taus), rotation=30, ha="right")
    axis.set_ylabel("tau, mean over tasks")
    return figure


def tau_by_step(curves: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]) -> Any:
    """Tau against the step. curves: arm -> steps of the whole run -> (step, tau), a line for each run."""
    figure, axis = _figure(8, 4.5)
    for place, (arm, runs) in enumerate(curves.items()):
        for number, points in enumerate(runs.values()):
            label = arm if number == 0 else None
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{place}", label=label)
    axis.set_xscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("tau on held-out answers")
    axis.legend(fontsize=8)
    return figure


def alpha_curves(alpha: Mapping[str, Sequence[float | None]]) -> Any:
    """alpha_k by k, as figure 5 of arXiv 2607.01893 shows it."""
    figure, axis = _figure(5, 3.6)
    for name, values in alpha.items():
        known = [(k, value) for k, value in enumerate(values, start=1) if value is not None]
        if known:
            axis.plot(*zip(*known, strict=True), marker="o", markersize=4, label=name)
    axis.set_xlabel("k")
    axis.set_ylabel("alpha_k = P(A >= k | A >= k-1)")
    axis.legend(fontsize=8)
    return figure


def accepted_lengths(runs: Mapping[str, RunSummary]) -> Any:
    """Share of verify steps by the number of drafts they accepted."""
    figure, axis = _figure(6, 3.6)
    width = 0.8 / max(len(runs), 1)
    for place, (name, run) in enumerate(runs.items()):
        counts = run.micro.accepted_histogram
        shares = [count / max(sum(counts), 1) for count in counts]
        places = [a + (place - (len(runs) - 1) / 2) * width for a in range(len(counts))]
        axis.bar(places, shares, width=width, label=name)
    axis.set_xlabel("accepted drafts of a step")
    axis.set_ylabel("share of steps")
    axis.legend(fontsize=8)
    return figure


def by_bucket(runs: Mapping[str, Sequence[Bucket]], what: str) -> Any:
    """tau and alpha_1 with their 95 % intervals by bucket. what: the buckets are of."""
    figure, axes = _figure(10, 3.6, columns=2)
    names = dict(sorted({bucket.high: bucket.name for buckets in runs.values() for bucket in buckets}.items()))
    place = {high: at for at, high in enumerate(names)}
    for number, (run, buckets) in enumerate(runs.items()):
        shift = (number - (len(runs) - 1) / 2) * 0.5 / max(len(runs), 1)
        first = [(bucket.summary.alpha or [None])[0] for bucket in buckets]
        spans = [(bucket.summary.alpha_intervals or [None])[0] for bucket in buckets]
        taus = [(bucket.summary.tau, bucket.summary.tau_interval) for bucket in buckets]
        for axis, values in zip(axes.flat, (taus, list(zip(first, spans, strict=True))), strict=True):
            points = [
                (place[bucket.high] + shift, value, interval)
                for bucket, (value, interval) in zip(buckets, values, strict=True)
                if value is not None
            ]
            _dots(axis, points, run, "-")
    for axis, title in zip(axes.flat, ("tau", "alpha_1"), strict=True):
        axis.set_xticks(range(len(names)), list(names.values()), rotation=30, ha="right")
        axis.set_xlabel(what)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    return figure


def speedups(points: Mapping[str, Sequence[tuple[int, float]]]) -> Any:
    """Speed-up over plain decoding by concurrency. points: run -> (concurrency, speed-up)."""
    figure, axis = _figure(5, 3.6)
    for name, pairs in points.items():
        axis.plot(*zip(*sorted(pairs), strict=True), marker="o", markersize=4, label=name)
    axis.axhline(1.0, color="0.6", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({at for pairs in points.values() for at, _ in pairs}))
    axis.get_xaxis().set_major_formatter("{x:.0f}")
    axis.set_xlabel("concurrency")
    axis.set_ylabel("speed-up over plain decoding")
    axis.legend(fontsize=8)
    return figure


TRAINING = (
    ("train", "loss", "training loss (nats)"),
    ("held_out", "tau", "tau on held-out answers"),
    ("train", "r_active", "r_active = |support| / B"),
    ("train", "support_accuracy", "accuracy inside the support"),
    ("train", "common_accuracy", "accuracy of all valid slots"),
    ("train", "alpha_1", "alpha_1 in training"),
)


def training_curves(runs: Mapping[str, Rows]) -> Any:
    """A panel for each entry of TRAINING. runs: name -> rows of metrics.jsonl, in the order of their steps."""
    figure, axes = _figure(11, 6, rows=2, columns=3)
    for axis, (kind, name, title) in zip(axes.flat, TRAINING, strict=True):
        for run, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=run, marker="." if len(points) < 50 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    return figure


def png(figure: Any) -> bytes:
    """The figure as PNG. The figure cannot be used afterwards."""
    from matplotlib import pyplot

    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    pyplot.close(figure)
    return out.getvalue()


def _dots(axis: Any, points: Sequence[Point], label: str, line: str = "none") -> None:
    """A dot with its interval for each point."""
    if points:
        below = [value - interval.low if interval else 0.0 for _, value, interval in points]
        above = [interval.high - value if interval else 0.0 for _, value, interval in points]
        places, values = [at for at, _, _ in points], [value for _, value, _ in points]
        axis.errorbar(places, values, [below, above], marker="o", linestyle=line, markersize=4, capsize=2, label=label)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")
    if rows * columns == 1:
        axes.grid(alpha=0.3)
    return figure, axes
