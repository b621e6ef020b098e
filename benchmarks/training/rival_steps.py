"""One DFlash training step of this trainer against SpecForge's and speculators', on the same shape, in turns.

Layers, widths, vocabulary, block, context and anchors are the same. A step is forward and backward, and draws anchors
and makes masks; there is no optimiser. Text, features and weights are random. Every package runs in its own
environment, through a small driver (benchmarks/training/rivals/): one process for the times, in which the packages step
in turn, and one for the peak memory. A package that cannot run is reported with its error. An environment needs the
package and what its DFlash model imports:

    python -m venv rivals/specforge && rivals/specforge/bin/pip install specforge==0.2.0
    python -m venv rivals/speculators && rivals/speculators/bin/pip install speculators==0.9.0
    python -m benchmarks rival-steps --venv specforge=rivals/specforge --venv speculators=rivals/speculators
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from benchmarks.harness.config import CommandConfig
from benchmarks.harness.results import ROOT, Measured, Report, StrictModel
from benchmarks.reports.markdown import markdown_document, markdown_table
from benchmarks.reports.numbers import number
from benchmarks.training.peak_memory import ENVIRONMENT, counted_by
from benchmarks.training.step_shapes import SHAPES
from sglang_auf.errors import ConfigError

logger = logging.getLogger(__name__)

DRIVERS = ROOT / "benchmarks" / "training" / "rivals"
OURS = "sglang_auf"
RIVALS = ("specforge", "speculators")


class RivalStepsConfig(CommandConfig):
    """One DFlash training step of this trainer against other packages', each in a virtual environment of its own."""

    venvs: tuple[str, ...] = Field(
        (), alias="venv", description="specforge=PATH or speculators=PATH, its environment; may be repeated"
    )
    shape: str = Field("smollm2-135m", description="shape of the drafter: smollm2-135m, qwen3-8b or tiny")
    length: int = Field(1024, ge=16, description="tokens of the one row")
    anchors: int = Field(128, ge=1, description="blocks in it")
    r_active: float = Field(0.25, gt=0, lt=1, description="share of a block's slots that AUF is to keep, about")
    rounds: int = Field(5, ge=1, description="steps of each trainer, interleaved; medians are reported")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu or cuda")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16, as each package trains in it, or fp32")
    out: Path = Field(Path("runs/rival-steps"), description="result directory; earlier results are replaced")


class TrainerStep(StrictModel):
    """One trainer's step: medians over rounds, or the error it ended with.

    attention: the implementation that ran. refused: those tried before it, with their errors. tokens_per_s: of the row.
    peak_mib: beyond weights and batch, gradients included.
    """

    trainer: str
    step: str
    version: str | None = None
    torch: str | None = None
    attention: str | None = None
    refused: dict[str, str] = Field(default_factory=dict)
    seconds: float | None = None
    rounds: list[float] = Field(default_factory=list)
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    note: str = ""
    error: str | None = None


class RivalReport(Measured, Report):
    """rival-steps.json. threads: torch's."""

    STEM: ClassVar[str] = "rival-steps"

    config: RivalStepsConfig
    steps: list[TrainerStep]
    threads: int

    @property
    def passed(self) -> bool:
        return all(step.error is None for step in self.steps)

    def markdown(self) -> str:
        config = self.config
        rows = [["trainer", "version", "torch", "step", "attention", "ms", "tokens/s", "peak MiB"]]
        lines = []
        for step in self.steps:
            milliseconds = None if step.seconds is None else 1000 * step.seconds
            figures = [number(value, 0) for value in (milliseconds, step.tokens_per_s, step.peak_mib)]
            names = [step.trainer, step.version or "-", step.torch or "-", step.step, step.attention or "-"]
            rows.append([*names, *figures])
            if step.error is not None:
                lines.append(f"- {step.trainer} FAILED: `{step.error}`")
            if step.note:
                lines.append(f"- {step.trainer}: {step.note}")
            lines += [f"- {step.trainer}, {name} attention did not run: `{why}`" for name, why in step.refused.items()]
        asked = (
            f"One DFlash training step, forward and backward: drafter of {config.shape}, one row of {config.length} "
            f"tokens, {config.anchors} anchors, {config.device}, {config.precision}, {self.threads} threads; medians "
            f"of {config.rounds} interleaved rounds"
        )
        lines.append(
            f"- peak: {counted_by(config.device)}, beyond weights and batch, gradients included. sglang_auf: about "
            f"{config.r_active:g} of a block's slots kept by AUF, all by decay"
        )
        return markdown_document(self, asked, markdown_table(rows), "\n".join(lines))


class DriverError(Exception):
    """A driver failed; the message is its error. refused: attention implementations it tried, and why each failed."""

    def __init__(self, error: str, refused: dict[str, str] | None = None) -> None:
        super().__init__(error)
        self.refused = refused or {}


class Driver:
    """A driver's process. trainer: the package. step: the objective. measure: "time" or "memory"."""

    def __init__(self, trainer: str, step: str, python: str, measure: str, config: RivalStepsConfig) -> None:
        self.log_file = config.out / f"{trainer}-{step}-{measure}.log"
        self._config, self._step, self._measure = config, step, measure
        name = "own" if trainer == OURS else trainer
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._program = [python, str(DRIVERS / f"{name}_step.py")]
        self._environment = os.environ | {"PYTHONPATH": path} | (ENVIRONMENT if measure == "memory" else {})

    def __enter__(self) -> Self:
        with self.log_file.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                self._program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self._environment,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def prepare(self) -> dict[str, Any]:
        """Send the job. Returns what runs, and what was refused. Raises DriverError."""
        config, shape = self._config, SHAPES[self._config.shape]
        job = config.model_dump(include={"shape", "length", "anchors", "r_active", "device", "precision"})
        job |= {"drafter": shape.drafter.to_checkpoint(), "gamma": shape.gamma, "step": self._step}
        return self._ask(job | {"measure": self._measure})

    def seconds(self, batch: int) -> float:
        return float(self._ask(batch)["seconds"])

    def peak_mib(self) -> float:
        """Peak of the one step of a job for memory. Raises DriverError."""
        return float(self._answer()["peak"]) / 2**20

    def _ask(self, question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the driver is gone; its log says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise DriverError(said[-1] if said else f"ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if error := answer.get("error"):
            raise DriverError(error, answer.get("refused"))
        return answer


def measure_rival_steps(config: RivalStepsConfig) -> RivalReport:
    """Raises ConfigError for an unknown package, environment or shape, and for too many anchors."""
    import torch

    pythons = _pythons(config)
    _check(config)
    config.out.mkdir(parents=True, exist_ok=True)
    trainers = [(OURS, "auf"), (OURS, "decay"), *((name, "decay") for name in pythons)]
    pythons[OURS] = sys.executable
    steps = [TrainerStep(trainer=trainer, step=step) for trainer, step in trainers]
    _time(steps, pythons, config)
    for step in steps:
        if step.error is None:
            _peak(step, pythons[step.trainer], config)
    return RivalReport(config=config, steps=steps, threads=torch.get_num_threads())


def _time(steps: Sequence[TrainerStep], pythons: dict[str, str], config: RivalStepsConfig) -> None:
    """Fill in what runs and how long it takes. The first round warms up; another trainer begins in each round."""
    with ExitStack() as stack:
        running: list[tuple[TrainerStep, Driver]] = []
        for step in steps:
            driver = stack.enter_context(Driver(step.trainer, step.step, pythons[step.trainer], "time", config))
            try:
                found = driver.prepare()
            except DriverError as ended:
                step.error, step.refused = str(ended), ended.refused
                continue
            step.attention, step.version, step.torch = found["attention"], found["version"], found["torch"]
            step.refused, step.note = found["refused"], found["note"]
            running.append((step, driver))
        for round_number in range(config.rounds + 1):
            first = round_number % len(running) if running else 0
            for step, driver in running[first:] + running[:first]:
                if step.error is not None:
                    continue
                try:
                    seconds = driver.seconds(round_number)
                except DriverError as ended:
                    step.error = str(ended)
                    continue
                if round_number:
                    step.rounds.append(seconds)
            logger.info("round %d of %d", round_number, config.rounds)
    for step in steps:
        if step.error is None:
            step.seconds = median(step.rounds)
            step.tokens_per_s = config.length / step.seconds


def _peak(step: TrainerStep, python: str, config: RivalStepsConfig) -> None:
    with Driver(step.trainer, step.step, python, "memory", config) as driver:
        try:
            driver.prepare()
            step.peak_mib = driver.peak_mib()
        except DriverError as ended:
            step.error = str(ended)


def _pythons(config: RivalStepsConfig) -> dict[str, str]:
    """The interpreter of each package's environment."""
    found: dict[str, str] = {}
    for setting in config.venvs:
        name, _, directory = setting.partition("=")
        python = Path(directory) / "bin" / "python"
        if name not in RIVALS or not python.is_file():
            raise ConfigError(
                f"--venv {setting}",
                f"{' or '.join(f'{rival}=PATH' for rival in RIVALS)}, PATH a virtual environment",
                "make one and install the package in it (see benchmarks/training/rival_steps.py)",
            )
        found[name] = str(python)
    return found


def _check(config: RivalStepsConfig) -> None:
    if config.shape not in SHAPES:
        raise ConfigError(f"--shape {config.shape}", f"one of {', '.join(SHAPES)}")
    # speculators draws no anchor from the last B positions.
    places = config.length - SHAPES[config.shape].drafter.block_size
    if config.anchors > places:
        raise ConfigError(
            f"--anchors {config.anchors} with --length {config.length}",
            f"at most {places}: what every trainer can draw from that row",
        )
