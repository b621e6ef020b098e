"""The training loop, on Hugging Face accelerate: one process, DDP or FSDP, by how it is launched.

The loss of a step is one ratio, sum(numerators) / sum(denominators) over all micro-batches of all ranks
(accumulation.py), so that the number of ranks and micro-batches changes no step.
"""

from __future__ import annotations

import errno
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor

from sglang_auf import provenance
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.errors import TargetError, TrainingError, noting
from sglang_auf.files import weight_files
from sglang_auf.models.dflash import Drafter
from sglang_auf.models.products import bf16_products
from sglang_auf.training import run_directory
from sglang_auf.training.accumulation import pooled_gradient
from sglang_auf.training.checkpointer import (
    Checkpoints,
    Outcome,
    RunState,
    Tensors,
    gather,
    gather_weights,
    no_better_than_start,
    read_state,
    read_tensors,
    restore,
)
from sglang_auf.training.data.feature_cache import fingerprint
from sglang_auf.training.data.features import find_target
from sglang_auf.training.data.loader import BatchMaker, Plan, load_data
from sglang_auf.training.evaluation.held_out import HeldOutAnswers
from sglang_auf.training.initial_weights import chosen, initial_drafter, shape_of
from sglang_auf.training.logger import MetricLogger, training_figures
from sglang_auf.training.losses.step import TrainingStep
from sglang_auf.training.optimiser import checkpoint_bytes, make_optimisers, schedule, set_learning_rate
from sglang_auf.training.recipe import Recipe
from sglang_auf.training.runtime import (
    accelerated,
    check_launch,
    give_back_free_memory,
    limit_compiled_products,
    memory_error,
    out_of_memory,
    require_same_inputs,
    stop_signals,
)
from sglang_auf.training.text.conversations import Ranks
from sglang_auf.training.text.reader import Conversation

logger = logging.getLogger(__name__)


def train(recipe: Recipe, out: Path, *, fresh: bool = False) -> Outcome:
    """Train in directory `out`, and go on from its last checkpoint if it has one. fresh: start over.

    Raises the errors of errors.py. Complete checkpoints stay, whatever happens. After an error one rank of several must
    end its process (runtime.accelerated).
    """
    limit_compiled_products()
    try:
        with accelerated(recipe, out) as accelerator:
            check_launch(recipe, accelerator)
            target = find_target(recipe.target, recipe.target_revision)
            run_directory.check_sources(out, recipe.data.sources, target, fresh)
            with run_directory.opened(out, fresh) if accelerator.is_main_process else nullcontext():
                if accelerator.is_main_process:
                    run_directory.copy_recordings(out, recipe.data.sources)
                accelerator.wait_for_everyone()
                return Trainer(recipe, out, accelerator).run()
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingError(
            f"no space left for {out} ({problem})",
            "free space for logs and checkpoints",
            "free space and run the same command again: it goes on from the last checkpoint",
        ) from problem
    except (MemoryError, RuntimeError) as problem:
        if not out_of_memory(problem):
            raise
        raise memory_error(problem, recipe, Checkpoints(out, recipe.keep_last).latest()) from problem


class Trainer:
    """One run, from its data to its last checkpoint."""

    def __init__(self, recipe: Recipe, out: Path, accelerator: Accelerator) -> None:
        target = find_target(recipe.target, recipe.target_revision)
        recipe = chosen(recipe, target)
        self.recipe, self.out, self.accelerator = recipe, out, accelerator
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.facts = TargetFacts.of(target)
        self.config = shape_of(recipe.drafter, target)
        self.checkpoints = Checkpoints(out, recipe.keep_last)
        self.saved = self._saved()
        if self.saved:  # before the data is read, which takes minutes
            run_directory.require_same_recipe(out, recipe, self.saved)
        apart = self.saved.apart if self.saved else "prompt"
        read = recipe.with_sources(run_directory.sources_of(out, recipe.data.sources))
        self.data = load_data(read, target, self.facts.vocab_size, apart, Ranks(self.rank, self.ranks, gather_object))
        weights = fingerprint(weight_files(target, TargetError))
        require_same_inputs(self.data.sha256, weights)
        if accelerator.is_main_process and (count := self.data.count(self.config.mask_token_id)):
            logger.warning(
                "drafter.mask_token_id %d is also %d tokens of the data: choose an id that no text uses, or auto",
                *(self.config.mask_token_id, count),
            )
        self.plan = Plan(self.data.train, recipe)
        drafter = initial_drafter(self.config, recipe.drafter, target, recipe.seed)
        if accelerator.is_main_process:
            done = self.saved.step if self.saved else 0
            self.checkpoints.require_space(checkpoint_bytes(drafter, recipe.optimiser), self.plan.steps - done)
        self.batches = BatchMaker(recipe, target, accelerator.device)
        self.batches.require([*self.data.train, *self.data.held_out])
        self.held_out = HeldOutAnswers(self.data.held_out, self.batches, recipe)

        drafter.recompute = recipe.batch.recompute
        frozen = self.batches.target
        step = TrainingStep(drafter, frozen.embedding, frozen.head, recipe.objective)
        optimisers = make_optimisers(drafter, recipe.optimiser)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self.model, *wrapped = accelerator.prepare(step, *optimisers)
        # Without loss scaling accelerate's wrapper adds nothing to an optimiser.
        self.optimisers = [optimiser.optimizer for optimiser in wrapped]
        self.parameters = list(self.model.parameters())

        self.state = RunState(
            step=0,
            recipe=recipe.model_dump(mode="json"),
            data_sha256=self.data.sha256,
            target_config_hash=self.facts.config_hash,
            target_weights=weights,
            target_revision=self.facts.revision,
            chat_template_hash=self.facts.chat_template_hash,
            apart=apart,
            ranks=self.ranks,
            tokens=0,
            seconds=0.0,
        )

    def run(self) -> Outcome:
        """Train from the last checkpoint, or from the start, to the end or to a signal."""
        self._resume()
        start, steps = self.state.step, self.plan.steps
        if self.accelerator.is_main_process:
            facts = {"target": asdict(self.facts), "data": self.data.facts, "steps": steps}
            this_start = {"step": start, "ranks": self.ranks, **provenance.of_this_run()}
            run_directory.describe(self.out, self.recipe, facts, this_start)
        if start >= steps:
            logger.info("%s is finished: all %d steps are done", self.out, steps)
            return self._outcome(None)
        self.metrics = MetricLogger(self.out, self.accelerator, start, steps)
        self.stream = self.batches.stream(self._wanted(start))
        self.saved_at = time.monotonic()
        try:
            with stop_signals() as caught, closing(self.stream), bf16_products(self.accelerator.device):
                if start == 0 and self.recipe.drafter.init_from and self.recipe.evaluate_every:
                    figures = self._figures()
                    self.state = self.state.model_copy(update={"start_tau": figures["tau"]})
                    self.metrics.log_evaluation(0, figures, False)
                for index in range(start, steps):
                    with noting(f"step {index + 1}"):
                        stopped = self._advance(index, caught)
                    if stopped:
                        logger.info("signal %d: stopped after step %d, which is saved", stopped, index + 1)
                        return self._outcome(stopped)
        finally:
            self.metrics.close()
        return self._outcome(None)

    def _wanted(self, start: int) -> Iterator[tuple[list[Conversation], int]]:
        """(conversations, epoch) of each micro-batch of this rank from step `start` on."""
        for index in range(start, self.plan.steps):
            epoch, rows = self.plan.at(index)
            for some in rows[self.rank :: self.ranks]:
                yield [self.data.train[row] for row in some], epoch

    def _advance(self, index: int, caught: list[int]) -> int:
        """Make one optimiser step; log, evaluate and save where due. Returns the signal that stops the run, or 0."""
        began = time.monotonic()
        recipe, train, steps, step = self.recipe, self.data.train, self.plan.steps, index + 1
        epoch, rows = self.plan.at(index)
        objective, progress = recipe.objective, index / steps
        # The last step of each objective is logged, so that no mean loss mixes two of them.
        last_of_objective = step == steps or objective.phase(progress) < objective.phase(step / steps)
        logs = step % recipe.log_every == 0 or last_of_objective
        pooled = pooled_gradient(
            self.accelerator,
            self.model,
            islice(self.stream, len(rows) // self.ranks),
            len(rows) // self.ranks,
            branches=2 if recipe.drafter.head == "domino" else 1,
            progress=progress,
            diagnostics=logs,
        )
        rate = schedule(index, steps, recipe.schedule.warmup_ratio)
        norm = self._optimise(step, rate, pooled.loss, rows)
        tokens, seconds = sum(len(train[row]) for some in rows for row in some), time.monotonic() - began
        self.state = self.state.model_copy(
            update={
                "step": step,
                "loss": pooled.loss,
                "tokens": self.state.tokens + tokens,
                "seconds": self.state.seconds + seconds,
                "evaluation": None,
            }
        )
        self.metrics.count_step(pooled.loss, tokens, seconds)
        if logs:
            figures = training_figures(pooled.metrics, self.config.block_size)
            lr = recipe.optimiser.lr * rate
            values = {"epoch": epoch, "lr": lr, "grad_norm": norm, **figures}
            self.metrics.log_training(step, objective.name_at(progress), values)
            give_back_free_memory()
        due = step == steps or (recipe.evaluate_every is not None and step % recipe.evaluate_every == 0)
        better = due and self._evaluate()
        stopped, late = (0, False) if step == steps else self._agreed(caught)
        if better or stopped or late or step % recipe.save_every == 0 or step == steps:
            self._save()
        return stopped

    def _optimise(self, step: int, rate: float, loss: float, rows: Sequence[Sequence[int]]) -> float:
        """Clip the gradient and step. Returns the norm before clipping. Raises TrainingError unless it is finite."""
        clipped = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.optimiser.clip)
        norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)  # sharded under FSDP
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ids = [self.data.train[row].id for some in rows for row in some]
            kept = self.checkpoints.latest()
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}, on the conversations {', '.join(ids)}",
                "finite numbers; the weights were not changed by this step",
                "look at these conversations, or lower optimiser.lr; "
                + (f"the last checkpoint is {kept}" if kept else "there is no checkpoint yet"),
            )
        set_learning_rate(self.optimisers, rate)
        with noting("the optimiser"):
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
        return norm

    def _figures(self) -> dict[str, float | None]:
        """What the present weights do on held-out answers, found by the main process."""
        step = self._unsharded_step()
        with noting("the evaluation"):
            found: list[Any] = [self.held_out.figures(step) if step is not None else None]
        broadcast_object_list(found)
        figures: dict[str, float | None] = found[0]
        return figures

    def _evaluate(self) -> bool:
        """Evaluate the present weights. Returns whether tau is the best so far."""
        figures = self._figures()
        tau, best = figures["tau"], self.state.best_tau
        better = tau is not None and (best is None or tau > best)
        update: dict[str, Any] = {"evaluation": figures}
        if better:
            update |= {"best_step": self.state.step, "best_tau": tau}
        self.state = self.state.model_copy(update=update)
        self.metrics.log_evaluation(self.state.step, figures, better)
        return better

    def _unsharded_step(self) -> TrainingStep | None:
        """A TrainingStep with all weights on this device, for use outside the wrapped forward; None on other ranks."""
        sharded = self.accelerator.distributed_type == DistributedType.FSDP
        weights = gather_weights(self.model) if sharded else {}
        if not self.accelerator.is_main_process:
            return None
        if not sharded:
            unwrapped: TrainingStep = self.accelerator.unwrap_model(self.model)
            return unwrapped
        with torch.device("meta"):  # random weights would take seconds, and be replaced
            drafter = Drafter(self.config)
        drafter.load_state_dict(weights, assign=True)
        target = self.batches.target
        step = TrainingStep(drafter, target.embedding, target.head, self.recipe.objective)
        return step.to(self.accelerator.device)  # type: ignore[no-any-return]

    def _agreed(self, caught: list[int]) -> tuple[int, bool]:
        """The signal that any rank has caught, or 0, and whether the last checkpoint is too old by the clock of any.

        So all ranks stop and save after the same step.
        """
        signal = max(caught, default=0)
        late = time.monotonic() - self.saved_at >= 60 * self.recipe.save_minutes
        if self.ranks > 1:
            mine = torch.tensor([[signal, late]], device=self.accelerator.device)
            signal, late = self.accelerator.gather(mine).amax(0).tolist()
        return signal, bool(late)

    def _save(self) -> None:
        with noting("the checkpoint"):
            weights, optimiser = gather(self.model, self.optimisers)
        if self.accelerator.is_main_process:
            self.checkpoints.write(self.config.to_checkpoint(), weights, optimiser, self.state)
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _saved(self) -> RunState | None:
        """The state of the last checkpoint, if there is one."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            self.checkpoints.clean()
            latest = self.checkpoints.latest()
            found = [latest and read_state(latest)]
        broadcast_object_list(found)
        state: RunState | None = found[0]
        return state

    def _resume(self) -> None:
        """Load the last checkpoint, if there is one. Raises TrainingError where it belongs to another run."""
        state = self.saved
        if state is None:
            return
        run_directory.require_same_run(self.out, self.state, state)
        if state.ranks != self.ranks:
            logger.warning("saved by %d ranks, resumed by %d: rounding will differ", state.ranks, self.ranks)
        saved: tuple[Tensors, Tensors] = {}, {}
        if self.accelerator.is_main_process:
            saved = read_tensors(self.checkpoints.path(state.step))
            if state.best_step is not None:  # the process may have been killed between saving and linking
                self.checkpoints.link_best(state.best_step)
        restore(self.model, self.optimisers, *saved, self.ranks)
        self.state = state.model_copy(update={"recipe": self.state.recipe, "ranks": self.ranks})
        logger.info("resumed %s after step %d", self.out, state.step)

    def _outcome(self, stopped: int | None) -> Outcome:
        state, steps = self.state, self.plan.steps
        if stopped is None and (fault := no_better_than_start(state.best_tau, state.start_tau)):
            logger.warning("%s: %s", self.out, fault)
        return Outcome(self.out, state.step, steps, state.best_step, state.best_tau, state.start_tau, stopped)
