"""What a study found, computed from its records alone: a verdict for each claim, at each budget.

A claim about tau has two intervals of 95 %. Over seeds: Student's t on the differences of matched seeds, for what
another training run would give. Over prompts: bootstrap of the mean over seeds, for what other prompts would give. A
verdict needs both. A claim about accuracy has only the first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from benchmarks.harness.records import Record
from benchmarks.stats.intervals import Interval, paired_difference, t_interval
from benchmarks.studies.config import ACCURACY, Budget, Claim, Study, load_study
from benchmarks.studies.records import (
    PLAIN,
    STUDY,
    of_budget,
    read_kept,
    read_training,
    served_name,
    training_name,
    walked_name,
)
from sglang_auf.errors import ConfigError

logger = logging.getLogger(__name__)

Verdict = Literal["yes", "no", "not shown"]
ArmSeed = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Results:
    """All records of a study with one budget.

    walked: figure (Study.walked_figures) -> arm and seed -> records. served: (arm, seed, temperature) -> records.
    plain: seed -> origin of the plain answers that its drafters walked over, which are others on another machine.
    """

    study: Study
    walked: dict[str, dict[ArmSeed, list[Record]]]
    training: dict[ArmSeed, dict[str, Any]]
    served: dict[tuple[str, int, float], list[Record]]
    plain: dict[int, dict[str, Any]]

    def answers(self, run: ArmSeed, figure: str = "tau", of: str | None = None) -> list[Record]:
        """Walked answers of one of the study's sets of other kinds, or with None, of its tasks."""
        sets = self.study.sets
        return [r for r in self.walked[figure][run] if (r.task not in sets if of is None else r.task == of)]


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim, its difference arm - against with intervals, and the verdict.

    by_task: task, or "macro" for the mean over tasks -> difference and its interval over prompts.
    """

    claim: Claim
    difference: float
    over_seeds: Interval | None
    over_prompts: Interval | None
    by_task: dict[str, tuple[float, Interval | None]]
    verdict: Verdict


def read_results(
    records: Path, walk_only: bool = False, others: Sequence[Path] = (), arms: Sequence[str] = ()
) -> dict[Budget, Results]:
    """The results of each budget, of those seeds that are done for all of its arms. walk_only: without what was served.

    others: records of the same study with other seeds, of other machines. arms: those that count; none: all.
    Raises ConfigError where there is no study, where one is another study, where no seed is done yet, or where the arms
    of a seed do not compare.
    """
    whole = load_study(records / STUDY)
    for other in others:
        if load_study(other / STUDY) != whole:
            raise ConfigError(f"{other} are records of another study", f"records of the same study as {records}")
    whole = whole.only(arms=arms)
    found: dict[Budget, Results] = {}
    missing: list[Path] = []
    for budget, study in whole.parts.items():
        places: dict[int, Path] = {}
        for seed in study.seeds:
            lacking = {place: _missing(place, budget, study, seed) for place in (records, *others)}
            done = [place for place, file in lacking.items() if file is None]
            if done:
                places[seed] = done[0]
                continue
            missing += [file for file in lacking.values() if file is not None][:1]
            of_steps = "" if budget is None else f" with {budget:,} steps"
            logger.warning("no %s: seed %d%s is not done yet, and left out", missing[-1], seed, of_steps)
        if places:
            found[budget] = _read(places, budget, study.only(tuple(places)), walk_only)
            _require_comparable(found[budget], places)
    if not found:
        raise ConfigError(
            f"no {missing[0]}: the study is not done yet", "the records of every arm with one seed", "run it to its end"
        )
    return found


def _missing(records: Path, budget: Budget, study: Study, seed: int) -> Path | None:
    """The first record that a seed of a budget lacks, of trainings and walks."""
    own = of_budget(records, budget)
    files = [records / PLAIN]
    for arm in study.arms:
        files.append(own / training_name(arm, seed))
        files += [own / walked_name(arm, seed, nodes) for nodes in study.walked_figures.values()]
    return next((file for file in files if not file.is_file()), None)


def _read(places: Mapping[int, Path], budget: Budget, study: Study, walk_only: bool) -> Results:
    """places: seed -> directory of its records."""
    own = {seed: of_budget(place, budget) for seed, place in places.items()}
    runs = [(arm, seed) for arm in study.arms for seed in study.seeds]
    served: dict[tuple[str, int, float], list[Record]] = {}
    if study.served is not None and not walk_only:
        for arm, seed, temperature in product(*study.served_runs, study.served.temperatures):
            file = own[seed] / f"served-{served_name(arm, seed, temperature)}.jsonl.gz"
            if file.is_file():
                served[arm, seed, temperature] = read_kept(file)
            else:
                logger.warning("no %s: it was not served yet, and is left out", file)
    return Results(
        study=study,
        walked={
            figure: {run: read_kept(own[run[1]] / walked_name(*run, nodes)) for run in runs}
            for figure, nodes in study.walked_figures.items()
        },
        training={run: read_training(own[run[1]] / training_name(*run)) for run in runs},
        served=served,
        plain={seed: json.loads((place / PLAIN).read_text(encoding="utf-8")) for seed, place in places.items()},
    )


def _require_comparable(results: Results, places: Mapping[int, Path]) -> None:
    """All arms must have the same target and the same prompts, and those with the same answers the same data, but for
    seeds of another machine, whose target answered for itself. places: seed -> directory of its records."""
    study = results.study
    asked = {
        seed: {task: origin["sha256"] for task, origin in plain["tasks"].items()}
        for seed, plain in results.plain.items()
    }
    first_seed = study.seeds[0]
    for seed, prompts in asked.items():
        if prompts != asked[first_seed]:
            others = [task for task in prompts if prompts[task] != asked[first_seed].get(task)]
            raise ConfigError(
                f"{places[seed]} with other prompts of {', '.join(others) or 'fewer tasks'} than {places[first_seed]}",
                "records of the same prompts",
                "run the study with the same --data-dir",
            )
    for arm, seed in results.training:
        first = next(other for other in study.arms if study.answers_of(other) == study.answers_of(arm))
        beside = next(other for other in study.seeds if places[other] == places[seed])
        mine, its = results.training[arm, seed]["run"], results.training[first, beside]["run"]
        any_run = results.training[first, study.seeds[0]]["run"]
        target, of_any = mine["target"], any_run["target"]  # later versions say more of a target than earlier ones
        same_target = all(target[key] == of_any[key] for key in target.keys() & of_any.keys())
        same_data = mine["data"]["sha256"] == its["data"]["sha256"]
        different = [name for name, same in (("target", same_target), ("data", same_data)) if not same]
        if different:
            raise ConfigError(
                f"{arm} with seed {seed} was trained with another {' and '.join(different)} than {first}",
                "arms that differ in nothing but what the study says",
                "remove its folder and records, and run the study again",
            )


def findings(results: Results, of: str | None = None) -> list[Finding]:
    """A finding for each claim over the study's tasks. of: a set of other kinds, for the claims about tau over it."""
    return [_finding(results, claim, of) for claim in results.study.claims if of is None or claim.figure != ACCURACY]


def _finding(results: Results, claim: Claim, of: str | None) -> Finding:
    seeds = results.study.seeds
    if claim.figure == ACCURACY:
        differences = [_accuracy(results, claim.arm, s) - _accuracy(results, claim.against, s) for s in seeds]
        over_prompts, by_task = None, {}
    else:
        arms = (claim.arm, claim.against)
        ours, theirs = ([results.answers((arm, seed), claim.figure, of) for seed in seeds] for arm in arms)
        pairs = list(zip(ours, theirs, strict=True))
        differences = [paired_difference([pair])["macro"][0] for pair in pairs]
        by_task = paired_difference(pairs)
        over_prompts = by_task["macro"][1]
    over_seeds = t_interval(differences)
    intervals = [over_seeds] if claim.figure == ACCURACY else [over_seeds, over_prompts]
    verdict = judge(claim, intervals)
    return Finding(claim, fmean(differences), over_seeds, over_prompts, by_task, verdict)


def judge(claim: Claim, intervals: Sequence[Interval | None]) -> Verdict:
    """The verdict is "yes" or "no" only where every interval is known and says so."""
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals) or not known:
        return "not shown"
    low, high = min(interval.low for interval in known), max(interval.high for interval in known)
    if claim.expected == "equal":
        if -claim.margin < low and high < claim.margin:
            return "yes"
        return "no" if low >= claim.margin or high <= -claim.margin else "not shown"
    if claim.expected == "lower":
        low, high = -high, -low
    if low > 0:
        return "yes"
    return "no" if high < 0 else "not shown"


def _accuracy(results: Results, arm: str, seed: int) -> float:
    """Accuracy of the exported weights, over all slots of some blocks of the held-out answers (evaluate.SAMPLED)."""
    return float(exported_figures(results.training[arm, seed])["accuracy"])


def exported_figures(training: dict[str, Any]) -> dict[str, Any]:
    """The held-out figures of the checkpoint that `export` takes: the first one with the best tau."""
    held_out = [row for row in training["metrics"] if row["kind"] == "held_out" and row["step"]]  # 0: not trained yet
    return max(held_out, key=lambda row: row["tau"] or 0.0)
