"""One DFlash training step of this trainer against SpecForge's and speculators', on the same shape, in turns.

Same layers, widths, vocabulary, block, context and anchors; forward and backward, anchors drawn and masks made inside
the step, no optimiser; text, features and weights are random. Every package runs in its own environment, through a
small driver (benchmarks/training/rivals/): one process each for the times, which wait for each other and step in
turn, and one each for the peak memory. A package that cannot run is reported with its error. An environment needs
the package and what its DFlash model imports:

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
from typing import Any, Self

from benchmarks.harness.config import RivalStepsConfig
from benchmarks.training.peak_memory import ENVIRONMENT
from benchmarks.training.step_report import RivalReport, RivalStep
from benchmarks.training.step_shapes import SHAPES, Shape
from sglang_auf import provenance
from sglang_auf.errors import ConfigError

log = logging.getLogger(__name__)

DRIVERS = provenance.CHECKOUT / "benchmarks" / "training" / "rivals"
OURS = "sglang_auf"
RIVALS = ("specforge", "speculators")


class Ended(Exception):
    """A driver could not do its part; the message is its error. refused: attention it tried, and why each failed."""

    def __init__(self, error: str, refused: dict[str, str] | None = None) -> None:
        super().__init__(error)
        self.refused = refused or {}


class Driver:
    """A driver's process. trainer: whose; step: the objective; measure: time or memory."""

    def __init__(self, trainer: str, step: str, python: str, measure: str, config: RivalStepsConfig) -> None:
        self.log_file = config.out / f"{trainer}-{step}-{measure}.log"
        self._config, self._step, self._measure = config, step, measure
        name = "own" if trainer == OURS else trainer
        path = os.pathsep.join([str(provenance.CHECKOUT), os.environ.get("PYTHONPATH", "")])
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
        """Send the job; what runs, and what did not. Raises Ended."""
        config, shape = self._config, SHAPES[self._config.shape]
        job = config.model_dump(include={"shape", "length", "anchors", "r_active", "device", "precision"})
        job |= {"drafter": shape.drafter.to_checkpoint(), "gamma": shape.gamma, "step": self._step}
        return self._ask(job | {"measure": self._measure})

    def seconds(self, batch: int) -> float:
        return float(self._ask(batch)["seconds"])

    def peak_mib(self) -> float:
        """Of the one step that a job for memory makes."""
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
            raise Ended(said[-1] if said else f"ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if error := answer.get("error"):
            raise Ended(error, answer.get("refused"))
        return answer


def measure_rival_steps(config: RivalStepsConfig) -> RivalReport:
    """Raises ConfigError for an unknown package, environment, shape or device, or an impossible number of anchors."""
    import torch

    pythons = _pythons(config)
    _check(config, SHAPES)
    config.out.mkdir(parents=True, exist_ok=True)
    trainers = [(OURS, "auf"), (OURS, "decay"), *((name, "decay") for name in pythons)]
    pythons[OURS] = sys.executable
    steps = [RivalStep(trainer=trainer, step=step) for trainer, step in trainers]
    _time(steps, pythons, config)
    for step in steps:
        if step.error is None:
            _peak(step, pythons[step.trainer], config)
    return RivalReport(
        config=config,
        steps=steps,
        threads=torch.get_num_threads(),
    )


def _time(steps: Sequence[RivalStep], pythons: dict[str, str], config: RivalStepsConfig) -> None:
    """Fill in what runs and how long it takes. The first round warms up; who goes first changes with the round."""
    with ExitStack() as stack:
        running: list[tuple[RivalStep, Driver]] = []
        for step in steps:
            driver = stack.enter_context(Driver(step.trainer, step.step, pythons[step.trainer], "time", config))
            try:
                found = driver.prepare()
            except Ended as ended:
                step.error, step.refused = str(ended), ended.refused
                continue
            step.attention, step.version, step.torch = found["attention"], found["version"], found["torch"]
            step.refused, step.note = found["refused"], found["note"]
            running.append((step, driver))
        for number in range(config.rounds + 1):
            first = number % len(running) if running else 0
            for step, driver in running[first:] + running[:first]:
                if step.error is not None:
                    continue
                try:
                    seconds = driver.seconds(number)
                except Ended as ended:
                    step.error = str(ended)
                    continue
                if number:
                    step.rounds.append(seconds)
            log.info("round %d of %d", number, config.rounds)
    for step in steps:
        if step.error is None:
            step.seconds = median(step.rounds)
            step.tokens_per_s = config.length / step.seconds


def _peak(step: RivalStep, python: str, config: RivalStepsConfig) -> None:
    with Driver(step.trainer, step.step, python, "memory", config) as driver:
        try:
            driver.prepare()
            step.peak_mib = driver.peak_mib()
        except Ended as ended:
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


def _check(config: RivalStepsConfig, shapes: dict[str, Shape]) -> None:
    if config.shape not in shapes:
        raise ConfigError(f"--shape {config.shape}", f"one of {', '.join(shapes)}", "choose one of these")
    # speculators draws none of the last B positions.
    places = config.length - shapes[config.shape].drafter.block_size
    if config.anchors > places:
        raise ConfigError(
            f"--anchors {config.anchors} with --length {config.length}",
            f"at most {places}: what every trainer can draw from that row",
            "give fewer anchors or a longer row",
        )
