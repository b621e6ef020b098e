"""The step of AUF against the step of `decay`: time, peak memory, and the share of slots that carry loss.

`decay` is measured in two forms, because there are two savings: with the trainer's cross-entropy, which keeps no logits
(decay), and as it is usually written (decay-dense). AUF against `decay` is what AUF saves. `decay` against
`decay-dense` is what the trainer's cross-entropy saves with any objective.

The table of anchors x length leaves decay-dense out: on a CPU one of its steps takes a minute.

Times: all variants run in one process, one after the other on the same batch; batch and order change with each round.
Memory: each variant runs in a separate process (step_memory.py). There is no data loading and no optimiser.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal

from pydantic import Field

from benchmarks.harness.config import CommandConfig, Counts, Names
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.reports.markdown import markdown_document, markdown_table
from benchmarks.reports.numbers import number
from benchmarks.training.peak_memory import counted_by
from benchmarks.training.step_memory import MemoryJob, measured_peak
from benchmarks.training.step_shapes import SHAPES, Shape
from sglang_auf.errors import ConfigError

logger = logging.getLogger(__name__)

GOALS = "goals: 0.8 of the time, 0.5 of the peak memory, or less"


class StepConfig(CommandConfig):
    """One training step of AUF against `decay`, forward and backward, on synthetic batches: time and peak memory."""

    shapes: Names = Field(("smollm2-135m", "qwen3-8b"), description="comma-separated shapes (tiny is another one)")
    r_active: float = Field(0.25, gt=0, lt=1, description="share of a block's slots that AUF is to keep, about")
    rounds: int = Field(5, ge=1, description="steps of each variant, interleaved; medians are reported")
    dense: bool = Field(True, description="also decay as it is usually written: minutes a step on a CPU")
    table: bool = Field(True, description="also anchors x length, on one row of the first shape")
    table_anchors: Counts = Field((64, 128, 256, 512), description="comma-separated anchors of that table")
    table_lengths: Counts = Field((1024, 2048, 3072), description="comma-separated tokens of its row")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu or cuda")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 (autocast, as the trainer has it) or fp32")
    out: Path = Field(Path("runs/step"), description="result directory; earlier results are replaced")


class VariantCost(StrictModel):
    """One variant of the step. seconds: median of `rounds`. peak_mib: beyond weights and batch. r_active: kept / B."""

    seconds: float
    rounds: list[float]
    peak_mib: float
    r_active: float


class BatchCosts(StrictModel):
    """What the step costs with one size of batch. Ratios: AUF to each other variant; of time, median over rounds."""

    shape: str
    rows: int
    length: int
    anchors: int
    costs: dict[str, VariantCost]
    time_ratio: dict[str, float]
    memory_ratio: dict[str, float]


class StepReport(Measured, Report):
    """step.json. cells: one for each shape. table: anchors x length on one row of the first shape, without decay-dense.

    threads: torch's.
    """

    STEM: ClassVar[str] = "step"

    config: StepConfig
    cells: list[BatchCosts]
    table: list[BatchCosts]
    threads: int

    def markdown(self) -> str:
        config = self.config
        rows = [["shape", "step", "ms", "peak MiB", "r_active", "AUF's time", "AUF's peak"]]
        for cell in self.cells:
            size = f"{cell.shape}, {cell.rows} x {cell.length}, {cell.anchors} anchors a row"
            for name, cost in cell.costs.items():
                figures = [f"{1000 * cost.seconds:.0f}", f"{cost.peak_mib:.0f}", number(cost.r_active, 3)]
                ratios = [cell.time_ratio.get(name), cell.memory_ratio.get(name)]
                rows.append([size, name, *figures, *map(number, ratios)])
        asked = (
            f"One training step, forward and backward, {config.device}, {config.precision}, {self.threads} threads; "
            f"medians of {config.rounds} interleaved rounds. {GOALS}"
        )
        notes = (
            "- `auf`: logits of the slots up to each block's first failure and few beyond. `decay`: logits of all "
            "slots, in chunks of rows, none kept. `decay-dense`: as it is usually written, all logits of 128 blocks at "
            "a time under activation checkpointing, the same loss and gradient.\n"
            "- AUF's time and peak: as a share of that row's. Against `decay` it is AUF's own saving, against "
            "`decay-dense` the head's is in it.\n"
            f"- peak: {counted_by(config.device)}, beyond weights and batch, gradients included, each step in a "
            "process of its own."
        )
        table = ["Anchors x length, one row:", _grid(self.table)] if self.table else []
        return markdown_document(self, asked, markdown_table(rows), notes, *table)


def _grid(cells: list[BatchCosts]) -> str:
    names = list(cells[0].costs)
    rows = [["length", "anchors", *(f"{name} ms" for name in names), *(f"{name} MiB" for name in names)]]
    rows[0] += [f"time, of {names[-1]}", f"peak, of {names[-1]}"]
    for cell in cells:
        costs = list(cell.costs.values())
        figures = [f"{1000 * cost.seconds:.0f}" for cost in costs] + [f"{cost.peak_mib:.0f}" for cost in costs]
        ratios = [cell.time_ratio[names[-1]], cell.memory_ratio[names[-1]]]
        rows.append([str(cell.length), str(cell.anchors), *figures, *map(number, ratios)])
    return markdown_table(rows)


def measure_step(config: StepConfig) -> StepReport:
    """Raises ConfigError for an unknown shape, a missing device, or more anchors than a row has tokens."""
    import torch

    from benchmarks.training.step_variants import AUF, DECAY, VARIANTS

    variants = VARIANTS if config.dense else (AUF, DECAY)
    shapes = [_shape(name) for name in config.shapes]
    sizes = _table_sizes(shapes[0], config) if config.table else []
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, and torch sees none", "a CUDA device")
    config.out.mkdir(parents=True, exist_ok=True)
    return StepReport(
        config=config,
        cells=[cell for shape in shapes for cell in _cells(shape, [shape], variants, config)],
        table=_cells(shapes[0], sizes, (AUF, DECAY), config),
        threads=torch.get_num_threads(),
    )


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(f"--shapes {name}", f"some of {', '.join(SHAPES)}")
    return SHAPES[name]


def _table_sizes(shape: Shape, config: StepConfig) -> list[Shape]:
    if max(config.table_anchors) >= min(config.table_lengths):
        raise ConfigError(
            f"--table-anchors {max(config.table_anchors)} with --table-lengths {min(config.table_lengths)}",
            "fewer anchors than tokens: no two anchors share a token",
        )
    return [shape.sized(anchors, length) for length in config.table_lengths for anchors in config.table_anchors]


def _cells(shape: Shape, sizes: Sequence[Shape], variants: tuple[str, ...], config: StepConfig) -> list[BatchCosts]:
    timed = _timed(shape, sizes, variants, config)
    return [_cell(size, costs, config) for size, costs in zip(sizes, timed, strict=True)]


def _timed(
    shape: Shape, sizes: Sequence[Shape], variants: tuple[str, ...], config: StepConfig
) -> list[dict[str, list[tuple[float, float]]]]:
    """For each size: variant -> (seconds, r_active) of each round. The weights are freed when this returns."""
    import torch

    from benchmarks.training.step_variants import Bench

    if not sizes:
        return []
    bench = Bench(shape, config.device, config.precision)
    found = []
    for size in sizes:
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for round_number in range(config.rounds + 1):
            batch = bench.batch(size, config.r_active, seed=round_number)
            first = round_number % len(variants)
            for name in variants[first:] + variants[:first]:
                ran = bench.run(name, batch)
                if round_number:  # the first round warms up
                    rounds[name].append((ran.seconds, ran.r_active))
        logger.info("timed %s: %d rows of %d tokens, %d anchors", size.name, size.rows, size.length, size.anchors)
        found.append(rounds)
    del bench, batch, ran
    if config.device == "cuda":
        torch.cuda.empty_cache()  # torch keeps what is freed, and memory is measured in a process of its own
    return found


def _cell(size: Shape, rounds: dict[str, list[tuple[float, float]]], config: StepConfig) -> BatchCosts:
    from benchmarks.training.step_variants import AUF

    costs = {
        name: VariantCost(
            seconds=median(seconds for seconds, _ in ran),
            rounds=[seconds for seconds, _ in ran],
            peak_mib=_peak_mib(size, name, config),
            r_active=median(share for _, share in ran),
        )
        for name, ran in rounds.items()
    }
    others = [name for name in costs if name != AUF]
    ours = costs[AUF]
    return BatchCosts(
        shape=size.name,
        rows=size.rows,
        length=size.length,
        anchors=size.anchors,
        costs=costs,
        time_ratio={
            name: median(mine / its for mine, its in zip(ours.rounds, costs[name].rounds, strict=True))
            for name in others
        },
        memory_ratio={name: ours.peak_mib / costs[name].peak_mib for name in others},
    )


def _peak_mib(size: Shape, variant: str, config: StepConfig) -> float:
    job = MemoryJob(
        shape=size.name,
        rows=size.rows,
        length=size.length,
        anchors=size.anchors,
        variant=variant,
        r_active=config.r_active,
        device=config.device,
        precision=config.precision,
    )
    return measured_peak(job) / 2**20
