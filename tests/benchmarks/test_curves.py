"""Training curves: a picture with the runs' figures in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.curves import draw_curves

TRAIN = [
    {"step": step, "kind": "train", "loss": 9 - step, "r_active": 0.1 * step, "alpha_1": None} for step in (1, 2, 3)
]
HELD_OUT = [{"step": 3, "kind": "held_out", "tau": 1.5}]


def test_picture_holds_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[list[float], ...]] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *xy, **style: (drawn.append(xy), plot(self, *xy, **style))[1])
    out = draw_curves({"run": [*TRAIN, *HELD_OUT]}, tmp_path / "curves.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert ((1, 2, 3), (8, 7, 6)) in drawn
    assert ((3,), (1.5,)) in drawn
    assert len(drawn) == 3  # alpha_1 was never known
