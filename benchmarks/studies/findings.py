"""What a study found, computed from its records alone: a verdict for each claim.

A claim about tau has two intervals of 95 %. Over seeds: Student's t on the differences of matched seeds, for what
another training run would give. Over prompts: bootstrap of the mean over seeds, for what other prompts would give. A
verdict needs both. A claim about accuracy has only the first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from benchmarks.harness.records import Record
from benchmarks.stats.intervals import Interval, paired_difference, t_interval
from benchmarks.studies.config import Claim, Study, load_study
from benchmarks.studies.records import STUDY, read_kept, read_training, served_name
from sglang_auf.errors import ConfigError

Verdict = Literal["yes", "no", "not shown"]
ArmSeed = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Results:
    """All records of a study. served: (arm, seed, temperature) -> records. plain: origin of the plain answers."""

    study: Study
    walked: dict[ArmSeed, list[Record]]
    training: dict[ArmSeed, dict[str, Any]]
    served: dict[tuple[str, int, float], list[Record]]
    plain: dict[str, Any]


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


def read_results(records: Path) -> Results:
    """Raises ConfigError where there is no study, where a part is not done yet, or where its arms do not compare."""
    try:
        results = _read(records, load_study(records / STUDY))
    except FileNotFoundError as missing:
        raise ConfigError(
            f"no {missing.filename}: the study is not done yet", "the records of every arm", "run it to its end"
        ) from missing
    _require_comparable(results)
    return results


def _read(records: Path, study: Study) -> Results:
    runs = [(arm, seed) for arm in study.arms for seed in study.seeds]
    served = {}
    if study.served is not None:
        for arm in study.served.arms or tuple(study.arms):
            for seed in study.served.seeds or study.seeds:
                for temperature in study.served.temperatures:
                    name = f"served-{served_name(arm, seed, temperature)}.jsonl.gz"
                    served[arm, seed, temperature] = read_kept(records / name)
    return Results(
        study=study,
        walked={(arm, seed): read_kept(records / f"walked-{arm}-{seed}.jsonl.gz") for arm, seed in runs},
        training={(arm, seed): read_training(records / f"training-{arm}-{seed}.json.gz") for arm, seed in runs},
        served=served,
        plain=json.loads((records / "plain.json").read_text(encoding="utf-8")),
    )


def _require_comparable(results: Results) -> None:
    """All arms must have the same target, and those with the same answers the same data."""
    study = results.study
    for arm, seed in results.training:
        first = next(other for other in study.arms if study.answers_of(other) == study.answers_of(arm))
        mine, its = results.training[arm, seed]["run"], results.training[first, study.seeds[0]]["run"]
        different = [
            name
            for name, ours, theirs in (
                ("target", mine["target"], its["target"]),
                ("data", mine["data"]["sha256"], its["data"]["sha256"]),
            )
            if ours != theirs
        ]
        if different:
            raise ConfigError(
                f"{arm} with seed {seed} was trained with another {' and '.join(different)} than {first}",
                "arms that differ in nothing but what the study says",
                "remove its folder and records, and run the study again",
            )


def findings(results: Results) -> list[Finding]:
    return [_finding(results, claim) for claim in results.study.claims]


def _finding(results: Results, claim: Claim) -> Finding:
    seeds = results.study.seeds
    if claim.figure == "accuracy":
        differences = [_accuracy(results, claim.arm, s) - _accuracy(results, claim.against, s) for s in seeds]
        over_prompts, by_task = None, {}
    else:
        pairs = [(results.walked[claim.arm, s], results.walked[claim.against, s]) for s in seeds]
        differences = [paired_difference([pair])["macro"][0] for pair in pairs]
        by_task = paired_difference(pairs)
        over_prompts = by_task["macro"][1]
    over_seeds = t_interval(differences)
    intervals = [over_seeds] if claim.figure == "accuracy" else [over_seeds, over_prompts]
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
    held_out = [row for row in training["metrics"] if row["kind"] == "held_out"]
    return max(held_out, key=lambda row: row["tau"])
