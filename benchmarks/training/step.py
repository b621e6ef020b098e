"""The step of AUF against the step of `decay`: time, peak memory, and the share of slots that carry loss.

`decay` is measured in two forms, so that two savings are not taken for one: through the trainer's own head, which keeps
no logits (decay), and as it is usually written (decay-dense). AUF against `decay` is what its walk saves; `decay`
against `decay-dense` is what the head saves whatever the objective.

The table of anchors x length leaves decay-dense out: on a CPU one of its steps takes a minute.

Times: all variants in one process, on the same batch in turn, another batch and another order each round. Memory: each
variant in a process of its own (step_memory.py). No data loading, no optimiser.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import median

from benchmarks.harness.config import StepConfig
from benchmarks.training.step_memory import Job, measured_peak
from benchmarks.training.step_report import Cell, Cost, StepReport
from benchmarks.training.step_shapes import SHAPES, Shape
from sglang_auf.errors import ConfigError

log = logging.getLogger(__name__)


def measure_step(config: StepConfig) -> StepReport:
    """Raises ConfigError for an unknown shape, a device that is not there, or more anchors than a row has places."""
    import torch

    from benchmarks.training.step_variants import AUF, DECAY, VARIANTS

    variants = VARIANTS if config.dense else (AUF, DECAY)
    shapes = [_shape(name) for name in config.shapes]
    sizes = _table_sizes(shapes[0], config) if config.table else []
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, and torch sees none", "a CUDA device", "give --device cpu")
    config.out.mkdir(parents=True, exist_ok=True)
    return StepReport(
        config=config,
        cells=[cell for shape in shapes for cell in _cells(shape, [shape], variants, config)],
        table=_cells(shapes[0], sizes, (AUF, DECAY), config),
        threads=torch.get_num_threads(),
    )


def _shape(name: str) -> Shape:
    if name not in SHAPES:
        raise ConfigError(f"--shapes {name}", f"some of {', '.join(SHAPES)}", "choose from these")
    return SHAPES[name]


def _table_sizes(shape: Shape, config: StepConfig) -> list[Shape]:
    if max(config.table_anchors) >= min(config.table_lengths):
        raise ConfigError(
            f"--table-anchors {max(config.table_anchors)} with --table-lengths {min(config.table_lengths)}",
            "fewer anchors than tokens: each has a place of its own",
            "give fewer anchors or longer rows",
        )
    return [shape.sized(anchors, length) for length in config.table_lengths for anchors in config.table_anchors]


def _cells(shape: Shape, sizes: Sequence[Shape], variants: tuple[str, ...], config: StepConfig) -> list[Cell]:
    timed = _timed(shape, sizes, variants, config)
    return [_cell(size, costs, config) for size, costs in zip(sizes, timed, strict=True)]


def _timed(
    shape: Shape, sizes: Sequence[Shape], variants: tuple[str, ...], config: StepConfig
) -> list[dict[str, list[tuple[float, float]]]]:
    """(seconds, r_active) of each round, by variant, of each size. The weights are gone when this returns."""
    from benchmarks.training.step_variants import Bench

    if not sizes:
        return []
    bench = Bench(shape, config.device, config.precision)
    found = []
    for size in sizes:
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for number in range(config.rounds + 1):
            batch = bench.batch(size, config.r_active, seed=number)
            first = number % len(variants)
            for name in variants[first:] + variants[:first]:
                ran = bench.run(name, batch)
                if number:  # the first round warms up
                    rounds[name].append((ran.seconds, ran.r_active))
        log.info("timed %s: %d rows of %d tokens, %d anchors", size.name, size.rows, size.length, size.anchors)
        found.append(rounds)
    return found


def _cell(size: Shape, rounds: dict[str, list[tuple[float, float]]], config: StepConfig) -> Cell:
    from benchmarks.training.step_variants import AUF

    costs = {
        name: Cost(
            seconds=median(seconds for seconds, _ in ran),
            rounds=[seconds for seconds, _ in ran],
            peak_mib=_peak_mib(size, name, config),
            r_active=median(share for _, share in ran),
        )
        for name, ran in rounds.items()
    }
    others = [name for name in costs if name != AUF]
    ours = costs[AUF]
    return Cell(
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
    job = Job(
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
