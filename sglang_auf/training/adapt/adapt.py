"""`sglang-auf adapt`: train the served drafter further on what its server recorded; export it only if it got better.

    RUN/adapt.json    what the run is: settings, drafter, number of rows, steps
    RUN/*.jsonl       its rows (rows.py)
    RUN/timing/       a short run that measures a step, for --minutes
    RUN/training/     the run of the trainer
    RUN/candidate/    the trained drafter as it would be served

After a kill the same command goes on: rows and number of steps are those it began with, and the trainer resumes to the
same bits.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AutoTokenizer

from sglang_auf.checkpoints.card import Adaptation, CheckedDrafter, MeasuredTau, check_drafter, load_card
from sglang_auf.checkpoints.weights import weights_sha256
from sglang_auf.errors import CardError, ConfigError, DataError, TrainingError
from sglang_auf.files import find_model, locked, remove_unfinished, write_whole
from sglang_auf.recording.manifest import Manifest, require_target
from sglang_auf.settings import Settings, checked
from sglang_auf.training.adapt.recipe import recipe_for
from sglang_auf.training.adapt.rows import HELD_OUT, OLD, OLD_HELD_OUT, TRAINED, load, write_rows
from sglang_auf.training.adapt.settings import AdaptSettings
from sglang_auf.training.data.features import find_target
from sglang_auf.training.evaluation.comparison import Comparison, Walkers
from sglang_auf.training.export import export_checkpoint
from sglang_auf.training.recipe import Recipe
from sglang_auf.training.run_directory import METRICS
from sglang_auf.training.trainer import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PLAN = "adapt.json"
LOCK = ".lock"
TIMED_STEPS = 6
NOT_BETTER = 3
"""Exit code where the new drafter is not better."""
DECIDING = {"recorded", "data", "old_share", "held_out", "min_rows", "steps", "minutes", "target", "overrides"}
"""Settings that must not change between two starts of one run."""


class Plan(Settings):
    """What a run is. settings: those in DECIDING. drafter: SHA-256 of its weights. rows: of each file. steps: None for
    one pass over the rows."""

    format: Literal[1] = 1
    settings: dict[str, Any]
    drafter: str
    rows: dict[str, int]
    steps: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an adaptation ended.

    out: the new drafter, of this generation, if there is one. comparison: on recorded answers; old_data: on those of
    --data, which decide nothing. signal: what stopped it before the comparison.
    """

    rows: dict[str, int]
    comparison: Comparison | None = None
    old_data: Comparison | None = None
    out: Path | None = None
    generation: int | None = None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0: exported. 3: not better. 128 + N: stopped by signal N."""
        if self.signal is not None:
            return 128 + self.signal
        return NOT_BETTER if self.out is None else 0

    def lines(self) -> list[str]:
        """What the user reads."""
        old = self.rows.get(OLD, 0)
        trained = self.rows[TRAINED] + old
        said = [
            f"{self.rows[TRAINED]} recorded rows and {old} of --data ({old / trained:.0%}) to train on, "
            f"the last {self.rows[HELD_OUT]} recorded rows held out"
        ]
        if self.comparison is None:
            return [*said, f"stopped by signal {self.signal}; the same command goes on from there"]
        said.append(f"{self.comparison.answers} recorded answers: {self.comparison}")
        if self.old_data is not None:
            said.append(f"{self.old_data.answers} answers of --data: {self.old_data} (decides nothing)")
        if self.out is None:
            return [*said, "not better: the interval of the difference is not above 0; nothing is exported"]
        return [*said, f"better: {self.out} is generation {self.generation}"]


def adapt(settings: AdaptSettings) -> Outcome:
    """Adapt a drafter, or go on where a killed run stopped. settings.out is made where the drafter got better.

    Raises the errors of errors.py; then nothing is exported.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    run = settings.directory
    if settings.out.exists() and not (run / PLAN).is_file():
        raise ConfigError(f"{settings.out} exists", "a directory that does not exist")
    place = find_model(settings.drafter, ("*.json", "*.safetensors", "*.yaml"), CardError).resolve()
    sources = [run / TRAINED, *([run / OLD] if settings.data else [])]
    recipe = recipe_for(place, load_card(place), settings.target, sources, settings.overrides)
    target = find_target(recipe.target, recipe.target_revision)
    drafter = check_drafter(str(place), str(target))
    Manifest.of(target).require(settings.recorded, DataError)
    require_target(settings.data, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    try:
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        run.chmod(0o700)  # its rows are what users wrote
        with locked(run / LOCK):
            return _Adaptation(settings, drafter, recipe, target, tokenizer).run()
    except BlockingIOError as error:
        raise TrainingError(
            f"another process adapts in {run}", "one a directory", "wait, or give another --run"
        ) from error
    except OSError as error:
        raise TrainingError(
            f"{run} cannot be used ({error})",
            "a directory with room, which this user may write",
            "make room and run the same command again: it goes on where it stopped",
        ) from error


class _Adaptation:
    """One run, in its locked directory."""

    def __init__(
        self,
        settings: AdaptSettings,
        drafter: CheckedDrafter,
        recipe: Recipe,
        target: Path,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.settings, self.drafter, self.recipe = settings, drafter, recipe
        self.target, self.tokenizer = target, tokenizer
        self.directory = settings.directory
        self.parent = weights_sha256(drafter.path)

    def run(self) -> Outcome:
        plan = self._plan()
        if self.settings.minutes is not None and plan.steps is None:
            timed, signal = self._timed_steps(self.settings.minutes)
            if signal:
                return Outcome(plan.rows, signal=signal)
            plan = plan.model_copy(update={"steps": timed})
            self._write(plan)
        training = self.directory / "training"
        if signal := train(self._recipe(plan.steps), training).signal:
            return Outcome(plan.rows, signal=signal)
        candidate = export_checkpoint(training, self.directory / "candidate", target=str(self.target), force=True)
        listed = self.drafter.vocabulary
        walkers = Walkers(self.target, [(self.drafter.path, listed), (candidate, listed)])
        comparison = self._compared(walkers, HELD_OUT)
        old_data = self._compared(walkers, OLD_HELD_OUT) if self.settings.data else None
        if not comparison.better:
            return Outcome(plan.rows, comparison, old_data)
        generation = self._export(training, plan, comparison)
        return Outcome(plan.rows, comparison, old_data, self.settings.out, generation)

    def _compared(self, walkers: Walkers, rows: str) -> Comparison:
        old, new = walkers.walk(rows, load(self.directory / rows, self.recipe, self.tokenizer))
        return Comparison.of(rows, old.taus, new.taus)

    def _plan(self) -> Plan:
        """What was begun here, or a new plan with its rows. Raises TrainingError where another run was begun."""
        settings = self.settings.model_dump(mode="json", include=DECIDING)
        settings["recorded"] = str(self.settings.recorded.resolve())
        file = self.directory / PLAN
        if file.is_file():
            plan = checked(Plan, file.read_bytes(), str(file), "the plan of an adaptation", "", TrainingError)
            different = [name for name in settings if plan.settings.get(name) != settings[name]]
            if plan.drafter != self.parent:
                different.append("drafter")
            if different:
                raise TrainingError(
                    f"{self.directory} was begun with another {', '.join(different)}",
                    "the settings that it was begun with",
                    "give those, or another --run",
                )
            logger.info("%s goes on with the rows that it began with: later ones are not read", self.directory)
            return plan
        for name in (PLAN, TRAINED, OLD, HELD_OUT, OLD_HELD_OUT):
            remove_unfinished(self.directory / name)
        rows = write_rows(self.settings, self.recipe, self.tokenizer, self.directory)
        plan = Plan(settings=settings, drafter=self.parent, rows=rows, steps=self.settings.steps)
        self._write(plan)
        return plan

    def _write(self, plan: Plan) -> None:
        write_whole(self.directory / PLAN, plan.model_dump_json(indent=2) + "\n")

    def _recipe(self, steps: int | None) -> Recipe:
        if steps is None:
            return self.recipe
        schedule = self.recipe.schedule.model_copy(update={"epochs": None, "max_steps": steps})
        return self.recipe.model_copy(update={"schedule": schedule})

    def _timed_steps(self, minutes: float) -> tuple[int, int | None]:
        """(steps that fit into the time, None), or (0, the signal that stopped the measurement)."""
        timing = self.directory / "timing"
        recipe = self._recipe(TIMED_STEPS).model_copy(update={"save_every": TIMED_STEPS, "log_every": TIMED_STEPS})
        if signal := train(recipe, timing, fresh=True).signal:
            return 0, signal
        logged = map(json.loads, (timing / METRICS).read_text(encoding="utf-8").splitlines())
        # A median, since the first steps take longer on a GPU: kernels are compiled in them.
        *_, seconds = (row["step_seconds"] for row in logged if row["kind"] == "train")
        steps = max(1, int(minutes * 60 / seconds))
        logger.info("a step takes %.2f s: %d steps in %g minutes", seconds, steps, minutes)
        return steps, None

    def _export(self, training: Path, plan: Plan, comparison: Comparison) -> int:
        """Write the better drafter, unless a run that was killed just behind this has; returns its generation."""
        before = self.drafter.card.adapted
        low, high = comparison.difference.low, comparison.difference.high
        assert low is not None and high is not None
        adapted = Adaptation(
            generation=1 if before is None else before.generation + 1,
            parent=self.parent,
            recorded_rows=plan.rows[TRAINED],
            answers=comparison.answers,
            old_tau=comparison.old,
            new_tau=comparison.new,
            low=low,
            high=high,
        )
        out = self.settings.out
        if not out.exists() or load_card(out).adapted != adapted:
            on = f"greedy walk over the last {comparison.answers} recorded answers, kept from training"
            export_checkpoint(
                training,
                out,
                target=str(self.target),
                tau=MeasuredTau(value=comparison.new, kind="held-out", on=on),
                adapted=adapted,
                vocabulary=self.drafter.vocabulary,
            )
        return adapted.generation
