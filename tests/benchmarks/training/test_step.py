"""The step benchmark on a tiny shape: same work in every variant, what it reports, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from benchmarks.cli import main
from benchmarks.training.peak_memory import peak_bytes
from benchmarks.training.step_memory import MemoryJob, measured_peak
from benchmarks.training.step_shapes import SHAPES
from benchmarks.training.step_variants import AUF, DECAY, DENSE, VARIANTS, Bench, chance_right
from sglang_auf.errors import ConfigError

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TINY, "cpu", "fp32")


def gradients(bench: Bench, variant: str, r_active: float = 0.4) -> tuple[float, list[torch.Tensor]]:
    ran = bench.run(variant, bench.batch(TINY, r_active, seed=3))
    return ran.loss, [weight.grad.clone() for weight in bench._steps[variant].drafter.parameters()]


def test_both_forms_of_decay_have_the_same_loss_and_gradient(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.training.step_variants.DENSE_BLOCKS", 7)  # several chunks, the last one smaller
    loss, ours = gradients(bench, DECAY)
    dense_loss, dense = gradients(bench, DENSE)
    assert loss == pytest.approx(dense_loss, rel=1e-5)
    for mine, its in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in ours) > 1e-4


@pytest.mark.parametrize("asked", [0.2, 0.3, 0.5])
def test_auf_keeps_about_the_share_that_was_asked_for(bench: Bench, asked: float) -> None:
    batch = bench.batch(TINY.sized(anchors=400, length=1600), asked, seed=1)
    assert bench.run(AUF, batch).r_active == pytest.approx(asked, rel=0.15)
    assert bench.run(DECAY, batch).r_active > 0.85


def test_the_chance_of_a_right_slot_gives_the_share() -> None:
    chance = chance_right(0.25, 16)
    assert sum(chance**slot for slot in range(15)) == pytest.approx(4.0)
    assert chance_right(1 / 8, 8) == pytest.approx(0, abs=1e-9)
    assert chance_right(7 / 8, 8) == pytest.approx(1)
    for size in (2, 49, 98, 103):  # where B * (1 / B) or B * ((B - 1) / B) is not exact
        assert chance_right(1 / size, size) == pytest.approx(0, abs=1e-9)
        assert size == 2 or chance_right((size - 1) / size, size) == pytest.approx(1)
    for impossible in (0.1, 0.9):
        with pytest.raises(ConfigError, match="--r-active"):
            chance_right(impossible, 8)


def test_a_batch_depends_on_its_number_alone(bench: Bench) -> None:
    first, again, other = (bench.batch(TINY, 0.3, seed) for seed in (5, 5, 6))
    assert torch.equal(first[0].input_ids, again[0].input_ids) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0].input_ids, other[0].input_ids)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("step")
    flags = ["--rounds", "3", "--r-active", "0.3", "--table-anchors", "32", "--table-lengths", "64", "--out", str(out)]
    assert main(["step", "--shapes", "tiny", *flags]) == 0
    return out


@pytest.mark.e2e
def test_the_report_has_every_variant_and_right_ratios(written: Path) -> None:
    report: dict[str, Any] = json.loads((written / "step.json").read_text())
    (cell,), (row,) = report["cells"], report["table"]
    assert (cell["rows"], cell["length"], cell["anchors"]) == (2, 96, 48)
    assert (row["rows"], row["length"], row["anchors"]) == (1, 64, 32)
    for found, variants in ((cell, VARIANTS), (row, (AUF, DECAY))):
        costs = found["costs"]
        assert tuple(costs) == variants
        for cost in costs.values():
            assert len(cost["rounds"]) == 3 and min(cost["rounds"]) > 0
            assert cost["seconds"] == median(cost["rounds"])
            assert cost["peak_mib"] > 0
        assert set(found["time_ratio"]) == set(found["memory_ratio"]) == set(variants) - {AUF}
        for other in found["time_ratio"]:
            pairs = zip(costs[AUF]["rounds"], costs[other]["rounds"], strict=True)
            assert found["time_ratio"][other] == pytest.approx(median(mine / its for mine, its in pairs))
            expected = costs[AUF]["peak_mib"] / costs[other]["peak_mib"]
            assert found["memory_ratio"][other] == pytest.approx(expected)
        assert 0.15 < costs[AUF]["r_active"] < 0.5 < costs[DECAY]["r_active"]


@pytest.mark.e2e
def test_peak_memory_tells_all_logits_from_few() -> None:
    size = {"rows": 1, "length": 96, "anchors": 24, "r_active": 0.25, "device": "cpu", "precision": "fp32"}
    peaks = {name: measured_peak(MemoryJob(shape="smollm2-135m", variant=name, **size)) for name in (AUF, DENSE)}  # type: ignore[arg-type]
    logits = 24 * 7 * 49152 * 4
    assert peaks[DENSE] - peaks[AUF] > logits


@pytest.mark.e2e
def test_the_table_is_for_a_document(written: Path) -> None:
    text = (written / "step.md").read_text()
    assert "| tiny, 2 x 96, 48 anchors a row | decay-dense |" in text
    assert "| 64 | 32 |" in text
    assert "Command:" in text


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--shapes", "huge"], "--shapes huge"),
        (["--shapes", "tiny", "--table-anchors", "64", "--table-lengths", "64"], "--table-anchors 64"),
        (["--rounds", "0"], "--rounds"),
        (["--precision", "int8"], "--precision"),
    ],
)
def test_a_bad_value_is_refused(
    flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["step", "--out", str(tmp_path), *flags]) == 2
    assert named in capsys.readouterr().err


def test_peak_memory_counts_what_is_freed_again_and_not_what_was_there() -> None:
    kept = torch.ones(8 * 2**20)  # 32 MiB that are there before
    found = peak_bytes(lambda: float((torch.ones(16 * 2**20) * 2).sum()), "cpu")  # two of 64 MiB at a time
    assert 100 * 2**20 < found < 180 * 2**20
    assert len(kept) == 8 * 2**20


@pytest.mark.e2e
def test_without_the_dense_variant(tmp_path: Path) -> None:
    flags = ["--shapes", "tiny", "--rounds", "1", "--no-table", "--no-dense", "--out", str(tmp_path)]
    assert main(["step", *flags]) == 0
    (cell,) = json.loads((tmp_path / "step.json").read_text())["cells"]
    assert list(cell["costs"]) == [AUF, DECAY]
