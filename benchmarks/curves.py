"""Pictures of training runs, from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("train", "loss", "training loss (nats a slot)"),
    ("held_out", "tau", "tau on held-out answers"),
    ("train", "r_active", "r_active = |support| / B"),
    ("train", "alpha_1", "alpha_1 in training"),
)


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> Path:
    """Write a PNG with a panel for each of PANELS. runs: name -> rows of metrics.jsonl, in order of their steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (kind, name, title) in zip(axes.flat, PANELS, strict=True):
        for run, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=run, marker="." if len(points) < 50 else None)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out
