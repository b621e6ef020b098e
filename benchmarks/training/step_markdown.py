"""Tables for documents: what `step` and `rival-steps` print and write beside their JSON."""

from __future__ import annotations

from benchmarks.reports.markdown import markdown_number, markdown_origin, markdown_table
from benchmarks.training.step_report import Cell, RivalReport, StepReport

GOALS = "goals: 0.8 of the time, 0.5 of the peak memory, or less"


def step_markdown(report: StepReport) -> str:
    config = report.config
    rows = [["shape", "step", "ms", "peak MiB", "r_active", "AUF's time", "AUF's peak"]]
    for cell in report.cells:
        for name, cost in cell.costs.items():
            ratios = [cell.time_ratio.get(name), cell.memory_ratio.get(name)]
            figures = [f"{1000 * cost.seconds:.0f}", f"{cost.peak_mib:.0f}", markdown_number(cost.r_active, 3)]
            rows.append([_size(cell), name, *figures, *(markdown_number(ratio) for ratio in ratios)])
    asked = (
        f"One training step, forward and backward, {config.device}, {config.precision}, {report.threads} threads; "
        f"medians of {config.rounds} interleaved rounds. {GOALS}"
    )
    notes = (
        "- `auf`: logits of the slots up to each block's first failure and few beyond. `decay`: logits of all slots, "
        "in chunks of rows, none kept. `decay-dense`: as it is usually written, all logits of 128 blocks at a time "
        "under activation checkpointing, the same loss and gradient.\n"
        "- AUF's time and peak: as a share of that row's. Against `decay` it is AUF's own saving, against "
        "`decay-dense` the head's is in it.\n"
        f"- peak: {_how(config.device)}, beyond weights and batch, gradients included, each step in a process of its "
        "own."
    )
    parts = [asked, markdown_table(rows), notes]
    if report.table:
        parts += ["Anchors x length, one row:", _grid(report.table)]
    return "\n\n".join([*parts, markdown_origin(report)]) + "\n"


def _grid(cells: list[Cell]) -> str:
    names = list(cells[0].costs)
    rows = [["length", "anchors", *(f"{name} ms" for name in names), *(f"{name} MiB" for name in names)]]
    rows[0] += [f"time, of {names[-1]}", f"peak, of {names[-1]}"]
    for cell in cells:
        costs = list(cell.costs.values())
        figures = [f"{1000 * cost.seconds:.0f}" for cost in costs] + [f"{cost.peak_mib:.0f}" for cost in costs]
        ratios = [cell.time_ratio[names[-1]], cell.memory_ratio[names[-1]]]
        rows.append([str(cell.length), str(cell.anchors), *figures, *map(markdown_number, ratios)])
    return markdown_table(rows)


def rival_steps_markdown(report: RivalReport) -> str:
    config = report.config
    rows = [["trainer", "version", "torch", "step", "attention", "ms", "tokens/s", "peak MiB"]]
    lines = []
    for step in report.steps:
        milliseconds = None if step.seconds is None else 1000 * step.seconds
        figures = [markdown_number(value, 0) for value in (milliseconds, step.tokens_per_s, step.peak_mib)]
        names = [step.trainer, step.version or "-", step.torch or "-", step.step, step.attention or "-"]
        rows.append([*names, *figures])
        if step.error is not None:
            lines.append(f"- {step.trainer} FAILED: `{step.error}`")
        if step.note:
            lines.append(f"- {step.trainer}: {step.note}")
        lines += [f"- {step.trainer}, {name} attention did not run: `{why}`" for name, why in step.refused.items()]
    asked = (
        f"One DFlash training step, forward and backward: drafter of {config.shape}, one row of {config.length} "
        f"tokens, {config.anchors} anchors, {config.device}, {config.precision}, {report.threads} threads; medians of "
        f"{config.rounds} interleaved rounds"
    )
    lines.append(
        f"- peak: {_how(config.device)}, beyond weights and batch, gradients included. sglang_auf: about "
        f"{config.r_active:g} of a block's slots kept by AUF, all by decay"
    )
    return "\n\n".join([asked, markdown_table(rows), "\n".join(lines), markdown_origin(report)]) + "\n"


def _size(cell: Cell) -> str:
    return f"{cell.shape}, {cell.rows} x {cell.length}, {cell.anchors} anchors a row"


def _how(device: str) -> str:
    return "the CUDA allocator's" if device == "cuda" else "resident high-water mark of the process"
