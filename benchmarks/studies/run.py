"""Do a study: train every arm with every seed, export it, walk it over the same answers, and serve some of them.

Seeds are matched: with one seed all arms start from the same weights and see the same batches and anchors in the same
order, as far as their settings are alike. Everything is in one directory and nothing finished is done again, so that
the same command continues after a kill:

    target/          answers of the plain server to train on, its answers to the measured prompts, features
    arms/ARM-SEED/   the training run and the drafter
    served/          runs of served drafters, each with the drafter's name and temperature
    records/         what the report is made of (records.py)

With budgets, arms/STEPS/, served/STEPS/ and records/STEPS/ hold what belongs to one of them. Budgets are done one after
the other, and --report-only reports those that are done.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.commands import sglang_auf
from benchmarks.harness.config import RunConfig
from benchmarks.harness.records import latest, read_records
from benchmarks.harness.run import MANIFEST, RECORDS, ask, chosen_prompts
from benchmarks.harness.servers import serve
from benchmarks.harness.template_prompts import demo_prompts
from benchmarks.studies.config import Budget, Study, StudyConfig, load_study
from benchmarks.studies.records import (
    PLAIN,
    keep,
    keep_origin,
    of_budget,
    require_same,
    require_same_profile,
    served_name,
    training_name,
    walked_name,
    write_gz,
)
from benchmarks.studies.walk import Walker
from sglang_auf.errors import ConfigError, TrainingError
from sglang_auf.training.checkpointer import Checkpoints, read_state
from sglang_auf.training.data.features import find_target
from sglang_auf.training.initial_weights import chosen
from sglang_auf.training.recipe import load_recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a study are. data_dir: of its tasks and files; None: the hub and the working directory.

    budget: that arms, served drafters and their records are of. settings: of servers, over the study's.
    """

    out: Path
    data_dir: Path | None = None
    budget: Budget = None
    settings: tuple[str, ...] = ()

    @property
    def records(self) -> Path:
        """What all budgets have in common; their own records are in `kept`."""
        return self.out / "records"

    @property
    def kept(self) -> Path:
        return of_budget(self.records, self.budget)

    @property
    def plain(self) -> Path:
        return self.out / "target" / "plain"

    def answers(self, study: Study, name: str) -> Path:
        """The file of answers: a given one, or the one that the target's are written to."""
        given = study.answers[name].file
        return self.out / "target" / f"answers-{name}.jsonl" if given is None else self.given(given)

    def features(self, name: str) -> Path:
        """The cache of features of these answers, for a study that caches them."""
        return self.out / "target" / f"features-{name}"

    def given(self, file: Path) -> Path:
        """A file that the study names: of data_dir, or where that has none, of the working directory."""
        own = (self.data_dir or Path()) / file
        return file if file.exists() and not own.exists() else own

    def training(self, arm: str, seed: int) -> Path:
        return of_budget(self.out / "arms", self.budget) / f"{arm}-{seed}" / "run"

    def drafter(self, arm: str, seed: int) -> Path:
        return of_budget(self.out / "arms", self.budget) / f"{arm}-{seed}" / "drafter"

    def served(self, arm: str, seed: int, temperature: float) -> Path:
        return of_budget(self.out / "served", self.budget) / served_name(arm, seed, temperature)


def run_study(config: StudyConfig) -> None:
    """Do what is missing of a study.

    Raises ConfigError for an arm whose recipe is refused, and where config.out belongs to another study.
    """
    study = load_study(config.study).only(config.seeds, config.budgets, config.arms)
    places = Places(config.out, config.data_dir, settings=config.settings)
    for part in study.parts.values():  # before hours are spent on the arms in front of a wrong one
        for arm in part.arms.values():
            load_recipe(part.recipe, [*part.set, *arm.set])
    require_same(config.study, places.records)
    require_same_profile(study.profile, places.records)
    _target_part(study, places)
    walks = Walks(study, places)
    for budget, part in study.parts.items():
        of_part = replace(places, budget=budget)
        of_part.kept.mkdir(exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // config.jobs) if config.jobs > 1 else None
        _train_all(part, of_part, config.jobs, threads, partial(walks.walk, of_part, threads))
        if not config.walk_only:
            _served_part(part, of_part)


class Walks:
    """Walks over the measured answers, one drafter at a time. Features are computed once, when first needed."""

    def __init__(self, study: Study, places: Places) -> None:
        self._study, self._plain = study, places.plain
        self._lock = threading.Lock()
        self._walker: Walker | None = None

    def walk(self, places: Places, threads: int | None, arm: str, seed: int) -> None:
        """Walk a drafter and keep the records, unless they are there already. threads: to compute with; None: all."""
        files = [places.kept / walked_name(arm, seed, nodes) for nodes in self._study.walked_figures.values()]
        if all(file.is_file() for file in files):
            return
        if threads is not None:
            torch.set_num_threads(threads)
        with self._lock:
            if self._walker is None:
                answers = latest(read_records(self._plain / RECORDS))
                self._walker = Walker(self._study.target, answers, self._study.measured.trees)
            for file, walked in zip(files, self._walker.walk(places.drafter(arm, seed)), strict=True):
                keep(file, walked)
        logger.info("walked %s, seed %d", arm, seed)


# --- the target's part ---


def _target_part(study: Study, places: Places) -> None:
    places.plain.parent.mkdir(parents=True, exist_ok=True)
    due = [name for name in study.answers if not _answers_ready(study, places, name)]
    if not due and (places.records / PLAIN).is_file():
        return
    log_file = places.out / "target" / "server.log"
    settings = [*study.server_set, *places.settings]
    with serve(study.profile, plain=True, settings=settings, log_file=log_file) as server:
        for name in due:
            _regenerate(study, places, name, server.base_url)
        _ask(study, places, {"base_url": server.base_url, "plain": True, "out": places.plain})
    keep(places.records / "plain.jsonl.gz", latest(read_records(places.plain / RECORDS)))
    keep_origin(places.records / PLAIN, places.plain / MANIFEST)


def _answers_ready(study: Study, places: Places, name: str) -> bool:
    file = places.answers(study, name)
    if study.answers[name].file is None:
        return file.with_suffix(".done").is_file()
    if not file.is_file():
        raise ConfigError(f"answers {name}: no file {file}", "rows with answers", "give --data-dir, or fix the study")
    return True


def _regenerate(study: Study, places: Places, name: str, base_url: str) -> None:
    source, out = study.answers[name], places.answers(study, name)
    files = [places.given(Path(prompts)) for prompts in source.prompts]
    inputs = [str(file) if file.exists() else name for file, name in zip(files, source.prompts, strict=True)]
    if source.demo is not None:
        made = out.with_name(f"prompts-{name}.jsonl")
        made.write_text("".join(json.dumps(row) + "\n" for row in demo_prompts(source.demo)), encoding="utf-8")
        inputs = [str(made)]
    limit = [] if source.limit is None else ["--limit", str(source.limit)]
    sglang_auf(
        [
            *("regenerate", *inputs, "--base-url", f"{base_url}/v1", "--out", str(out), *limit),
            *("--max-tokens", str(source.max_tokens), "--concurrency", str(source.concurrency)),
        ]
    )
    out.with_suffix(".done").touch()


# --- drafters ---


def _train_all(study: Study, places: Places, jobs: int, threads: int | None, walk: Callable[[str, int], None]) -> None:
    """Train `jobs` arms at a time, each with its share of the cores. On a CPU that is faster than one at a time.

    threads: of each; None: all. walk: called with arm and seed of each drafter when it is trained, so that a study that
    is stopped has figures of what it has done.
    """
    for name in sorted({study.answers_of(arm) for arm in study.arms}) if study.cache_features else ():
        _cached_features(study, places, name)
    stopped = threading.Event()

    def train(arm: str, seed: int) -> None:
        try:
            if not stopped.is_set():
                _train(study, places, arm, seed, threads)
                walk(arm, seed)
        except BaseException:
            stopped.set()  # trainings that run are waited for; no other training begins
            raise

    with ThreadPoolExecutor(jobs) as pool:
        due = [pool.submit(train, arm, seed) for seed in study.seeds for arm in study.arms]
        try:
            for one in due:
                one.result()
        except BaseException:
            stopped.set()
            raise


def _train(study: Study, places: Places, arm: str, seed: int, threads: int | None) -> None:
    drafter, run = places.drafter(arm, seed), places.training(arm, seed)
    kept = places.kept / training_name(arm, seed)
    if kept.is_file() and drafter.is_dir():
        return
    changes = [*study.set, *study.arms[arm].set, f"seed={seed}"]
    settings = [part for change in changes for part in ("--set", change)]
    answers = places.answers(study, study.answers_of(arm))
    if study.cache_features:
        settings += ["--set", f"features={_cached_features(study, places, study.answers_of(arm))}"]
    sglang_auf(["train", study.recipe, "--data", str(answers), "--out", str(run), *settings], threads)
    sglang_auf(["export", str(run), str(drafter), "--force"], threads)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    latest_checkpoint = Checkpoints(run, keep_last=1).latest()
    assert latest_checkpoint is not None
    seconds = read_state(latest_checkpoint).seconds
    facts["data"].pop("sources", None)
    for start in facts["starts"]:
        start.pop("command", None)  # holds paths; `set` and the study's file say the same
    write_gz(kept, json.dumps({"set": changes, "metrics": metrics, "run": facts, "seconds": seconds}))


def _cached_features(study: Study, places: Places, name: str) -> Path:
    """The cache of features for the study's recipe; it is made if missing. It refuses arms that tap other layers."""
    cache, recipe = places.features(name), load_recipe(study.recipe, study.set)
    done = cache.with_suffix(".done")
    if not done.is_file():
        data, target = recipe.data, find_target(recipe.target, recipe.target_revision)
        layers = ",".join(map(str, chosen(recipe, target).drafter.taps))
        thinking = ["--thinking", data.thinking] if data.thinking else []
        sglang_auf(
            [
                *("features", "--data", str(places.answers(study, name)), "--target", study.target),
                *("--layers", layers, "--max-length", str(data.max_length), "--overlong", data.overlong),
                *("--out", str(cache), *thinking),
            ]
        )
        done.touch()
    return cache


# --- serving ---


def _served_part(study: Study, places: Places) -> None:
    if study.served is None:
        return
    for arm, seed in product(*study.served_runs):
        due = [t for t in study.served.temperatures if not _kept_served(places, arm, seed, t).is_file()]
        if not due:
            continue
        with serve(
            study.profile,
            plain=False,
            # A chain, as it is walked, unless the study says otherwise.
            settings=[
                "tree=false",
                *study.server_set,
                *places.settings,
                f"drafter={places.drafter(arm, seed).resolve()}",
            ],
            log_file=of_budget(places.out / "served", places.budget) / f"{arm}-{seed}.log",
        ) as server:
            for temperature in due:
                _serve_one(study, places, arm, seed, temperature, server.base_url)


def _serve_one(study: Study, places: Places, arm: str, seed: int, temperature: float, base_url: str) -> None:
    assert study.served is not None
    out = places.served(arm, seed, temperature)
    concurrency = study.served.concurrency
    _ask(study, places, {"base_url": base_url, "temperature": temperature, "concurrency": concurrency, "out": out})
    name = served_name(arm, seed, temperature)
    keep_origin(places.kept / f"served-{name}.json", out / MANIFEST)
    keep(_kept_served(places, arm, seed, temperature), latest(read_records(out / RECORDS)))


def _kept_served(places: Places, arm: str, seed: int, temperature: float) -> Path:
    return places.kept / f"served-{served_name(arm, seed, temperature)}.jsonl.gz"


def _ask(study: Study, places: Places, settings: dict[str, Any]) -> None:
    """Ask the measured prompts, or what is missing of them. settings: fields of RunConfig, over those of `measured`.

    Raises TrainingError where requests failed, because a study needs every answer.
    """
    measured = study.measured.model_dump(exclude={"sets", "trees"})
    prompts = [places.given(file) for file in study.measured.sets]
    config = RunConfig.model_validate(
        {**measured, "prompts": prompts, "data_dir": places.data_dir, "stream": False, **settings}
    )
    run = ask(config, chosen_prompts(config), config.out.name, resume=True)
    failed = [record for record in run.records.values() if record.failed]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(run.records)} requests failed, the first with {failed[0].error}",
            "an answer to every prompt",
            f"look at the server's log beside {config.out}; the same command asks the failed ones again",
        )
