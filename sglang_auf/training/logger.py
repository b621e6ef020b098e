"""The figures of a run while it trains: progress bar, log lines, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from sglang_auf.training.run_directory import METRICS, TENSORBOARD, forget_after

logger = logging.getLogger(__name__)


class MetricLogger:
    """Writes the figures of one run from step `start` on. Only the main process writes; other processes' calls do
    nothing."""

    def __init__(self, directory: Path, accelerator: Accelerator, start: int, steps: int) -> None:
        self._accelerator = accelerator
        self._writes = accelerator.is_main_process
        self._start, self._steps = start, steps
        self._began = self._marked = time.monotonic()
        self._tokens = 0
        self._losses: list[float] = []
        self._seconds: list[float] = []
        # Without a terminal tqdm prints a line per update; the log lines below carry the same figures.
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=None if self._writes else True)
        if self._writes:
            forget_after(directory, start)
            self._metrics = (directory / METRICS).open("a", encoding="utf-8")
        accelerator.init_trackers(
            TENSORBOARD, init_kwargs={"tensorboard": {"purge_step": start + 1 if start else None, "flush_secs": 10}}
        )

    def count_step(self, loss: float, tokens: int, seconds: float) -> None:
        """Call this after every optimiser step. tokens: tokens of the step, of all ranks together."""
        self._losses.append(loss)
        self._seconds.append(seconds)
        self._tokens += tokens
        self._bar.update()

    def log_training(self, step: int, objective: str, values: Mapping[str, float | None]) -> None:
        """Write `values`, the mean loss since the last call, and speed. tokens_per_second includes evaluations;
        step_seconds is the median of the steps alone.

        objective: what this step and those since the last call were trained with.
        """
        now = time.monotonic()
        left = (now - self._began) / (step - self._start) * (self._steps - step)
        row = {
            "loss": sum(self._losses) / len(self._losses),
            **values,
            "tokens_per_second": self._tokens / (now - self._marked),
            "step_seconds": median(self._seconds),
            "peak_memory_gib": peak_memory_gib(self._accelerator.device),
            "seconds_left": left,
        }
        self._losses, self._seconds, self._tokens, self._marked = [], [], 0, now
        self._write("train", step, row, {"objective": objective})
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", left=shown_duration(left), refresh=False)
        self._log(
            "step %d/%d  %s  loss %.4f  r_active %.3f  alpha_1 %.3f  lr %.2e  %d tokens/s  %.1f GiB  %s left",
            step, self._steps, objective, row["loss"], row.get("r_active") or 0, row.get("alpha_1") or 0, row["lr"],
            row["tokens_per_second"], row["peak_memory_gib"], shown_duration(left),
        )  # fmt: skip

    def log_evaluation(self, step: int, values: Mapping[str, float | None], best: bool) -> None:
        """Write figures of held-out answers. best: this is the best tau so far."""
        self._write("held_out", step, values)
        shown = "  ".join(
            f"{name} {values[name]:.4f}" for name in ("tau", "alpha_1", "accuracy", "loss") if values.get(name)
        )
        self._log("step %d/%d  held out: %s%s", step, self._steps, shown, "  (best)" if best else "")

    def close(self) -> None:
        self._bar.close()
        if self._writes:
            self._metrics.close()

    def _write(
        self, kind: str, step: int, values: Mapping[str, float | None], names: Mapping[str, str] | None = None
    ) -> None:
        """names: values of metrics.jsonl that are no numbers, which TensorBoard's curves have no place for."""
        if self._writes:
            self._metrics.write(json.dumps({"step": step, "kind": kind, **(names or {}), **values}) + "\n")
            self._metrics.flush()
        known = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        self._accelerator.log(known, step=step)

    def _log(self, message: str, *arguments: Any) -> None:
        if self._writes:
            with self._bar.external_write_mode():
                logger.info(message, *arguments)


def training_figures(sums: Mapping[str, torch.Tensor], block_size: int) -> dict[str, float | None]:
    """Ratios of the sums that a TrainingStep counts, over all ranks and micro-batches of a step.

    r_active: |support| / B of a block (arXiv 2607.01893). support_accuracy, common_accuracy: share of right slots among
    those of the support and among all valid ones. alpha_k: P(the first k drafts are right, given that the first k-1
    are).
    """
    lists = {name: value.tolist() for name, value in sums.items()}

    def ratio(over: str, under: str, scale: float = 1.0) -> float | None:
        return lists[over] / (lists[under] * scale) if lists.get(under) else None

    figures = {
        "r_active": ratio("support", "blocks", block_size),
        "support_accuracy": ratio("support_correct", "support"),
        "common_accuracy": ratio("common_correct", "common_valid"),
    }
    for k, (accepted, tried) in enumerate(zip(lists["accepted"], lists["tried"], strict=True), start=1):
        figures[f"alpha_{k}"] = accepted / tried if tried else None
    return figures


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far: of the tensors on a CUDA device, of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def shown_duration(seconds: float) -> str:
    """As a line that is read by people has it: "40 s", "8 min", "2 h 05 min"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min" if seconds >= 60 else f"{seconds:.0f} s"
