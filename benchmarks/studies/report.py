"""What a study found, computed from its records alone: figures by arm, and a verdict for each claim.

A claim about tau has two intervals of 95 %. Over seeds: Student's t on the differences of matched seeds, for what
another training run would give. Over prompts: bootstrap of the mean over seeds, for what other prompts would give. It
is held to be shown only where both say so. A claim about accuracy has the first alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from benchmarks.harness.records import Record
from benchmarks.reports import figures
from benchmarks.reports.page import Section, Table, write_page
from benchmarks.reports.report import alpha_over_tasks
from benchmarks.stats.intervals import Interval, paired_difference, t_interval
from benchmarks.stats.summary import TaskSummary, macro, summarize_tasks
from benchmarks.studies.config import Claim, Study, load_study
from benchmarks.studies.run import STUDY, read_kept, read_training, served_name
from sglang_auf.errors import ConfigError

Verdict = Literal["yes", "no", "not shown"]
Run = tuple[str, int]
"""arm, seed"""


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that was kept of a study. walked, training: by arm and seed; served: by arm, seed and temperature."""

    study: Study
    walked: dict[Run, list[Record]]
    training: dict[Run, dict[str, Any]]
    served: dict[tuple[str, int, float], list[Record]]
    plain: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finding:
    """A claim, the difference arm - against by task and as "macro", and what follows from it."""

    claim: Claim
    difference: float
    over_seeds: Interval | None
    over_prompts: Interval | None
    by_task: dict[str, tuple[float, Interval | None]]
    verdict: Verdict


def read_results(records: Path) -> Results:
    """Raises ConfigError where no study lies, where a part of it is not done yet, or where its arms do not compare."""
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
    """All arms with the same target, and with the same data where the study says so."""
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
    """yes or no only where every interval is known and says so."""
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
    """Of all slots of some blocks of the held-out answers (evaluate.py, SAMPLED), by the weights that were exported."""
    return float(_exported(results.training[arm, seed])["accuracy"])


def _exported(training: dict[str, Any]) -> dict[str, Any]:
    """The held-out figures of the checkpoint that `export` takes: the first one of the best tau."""
    held_out = [row for row in training["metrics"] if row["kind"] == "held_out"]
    return max(held_out, key=lambda row: row["tau"])


def _last(training: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(row for row in reversed(training["metrics"]) if row["kind"] == kind)


# --- the page ---


def write_study_report(results: Results, out: Path) -> Path:
    """study.html, study.md and pictures in `out`; the HTML's path."""
    study = results.study
    found = findings(results)
    tasks = {run: summarize_tasks(records) for run, records in results.walked.items()}
    taus = {arm: [macro(tasks[arm, seed].values()).tau or 0.0 for seed in study.seeds] for arm in study.arms}
    alpha = {
        arm: alpha_over_tasks([record for seed in study.seeds for record in results.walked[arm, seed]])
        for arm in study.arms
    }
    curves = {f"{arm}, seed {study.seeds[0]}": results.training[arm, study.seeds[0]]["metrics"] for arm in study.arms}
    sections = [
        Section("Claims", CLAIMS_TEXT, claims_table(found), in_words=True),
        Section("Differences by task", DIFFERENCES_TEXT, _differences_table(found)),
        Section(
            "Tau by arm",
            _tau_text(results),
            _tau_table(study, tasks),
            figures.png(figures.tau_by_seed(taus)),
            "tau.png",
        ),
        Section("alpha_k by arm", ALPHA_TEXT, None, figures.png(figures.alpha_curves(alpha)), "alpha.png"),
        Section("What training saw", TRAINING_TEXT, _training_table(results)),
        Section("Training", CURVES_TEXT, None, figures.png(figures.training_curves(curves)), "training.png"),
    ]
    if results.served:
        sections.append(Section("Served", SERVED_TEXT, _served_table(results)))
    sections.append(Section("How it was done", "", _origin_table(results), in_words=True))
    return write_page(out, "study", study.title, sections)


CLAIMS_TEXT = (
    "Difference of the first arm to the second, mean over matched seeds. Over seeds: Student's t on the seeds' "
    "differences. Over prompts: bootstrap of their mean, for tau. Both 95 %; yes and no only where every interval "
    "lies wholly on the claim's side, or, for equality, inside the margin."
)
DIFFERENCES_TEXT = "Difference in tau by task, mean over seeds, with the 95 % interval over prompts."
ALPHA_TEXT = (
    "Seeds and requests weighted equally inside a task, tasks equally. A walk ends with the text, so that the "
    "last step of an answer counts as one that accepted no further; a server would have looked past it."
)
TRAINING_TEXT = (
    "Mean over seeds. At the last logging step: r_active = |support| / B; support and common accuracy: of the "
    "slots with credit, and of all valid slots. Of the exported weights: held-out accuracy, of all slots of 16 "
    "blocks an answer, and held-out tau, by the trainer's walk."
)
CURVES_TEXT = "Of the first seed."
SERVED_TEXT = (
    "Drafters behind the real server, on the same prompts. At temperature 0 the walk is over the same answers, so "
    "the two taus are of the same thing; at other temperatures the server samples its own answers."
)


def _tau_text(results: Results) -> str:
    tasks = results.plain["tasks"].values()
    prompts, limit = sum(task["prompts"] for task in tasks), results.study.measured.max_tokens
    return (
        f"Walked over plain decoding's greedy answers to {prompts} prompts of {len(tasks)} tasks, of up to {limit} "
        "tokens. Mean over seeds, with the standard deviation over seeds."
    )


def claims_table(found: Sequence[Finding]) -> Table:
    rows = [["claim", "compared", "difference", "over seeds", "over prompts", "verdict"]]
    for finding in found:
        claim, digits = finding.claim, 4 if finding.claim.figure == "accuracy" else 3
        expected = f"{claim.expected} (within {claim.margin:g})" if claim.expected == "equal" else claim.expected
        rows.append(
            [
                f"({claim.id}) {claim.text}",
                f"{claim.figure}: {claim.arm} against {claim.against}, expected {expected}",
                f"{finding.difference:+.{digits}f}",
                _interval(finding.over_seeds, digits),
                _interval(finding.over_prompts, digits),
                finding.verdict,
            ]
        )
    return rows


def claims_text(results: Results) -> str:
    """For the terminal."""
    return "\n".join("  ".join(row) for row in claims_table(findings(results)))


def _differences_table(found: Sequence[Finding]) -> Table:
    tasks = list(dict.fromkeys(task for finding in found for task in finding.by_task if task != "macro"))
    rows = [["compared", *tasks, "mean"]]
    for finding in found:
        if finding.by_task:
            cells = [finding.by_task.get(task) for task in [*tasks, "macro"]]
            shown = ["-" if cell is None else f"{cell[0]:+.3f} {_interval(cell[1], 2)}" for cell in cells]
            rows.append([f"{finding.claim.arm} - {finding.claim.against}", *shown])
    return rows


def _tau_table(study: Study, tasks: dict[Run, dict[str, TaskSummary]]) -> Table:
    names = list(dict.fromkeys(name for of_run in tasks.values() for name in of_run))
    rows = [["arm", *names, "mean"]]
    for arm in study.arms:
        by_seed = [tasks[arm, seed] for seed in study.seeds]
        cells = [_spread([of_run[name].tau for of_run in by_seed if name in of_run]) for name in names]
        rows.append([arm, *cells, _spread([macro(of_run.values()).tau for of_run in by_seed], 3)])
    return rows


def _training_table(results: Results) -> Table:
    heads = ["r_active", "support accuracy", "common accuracy", "held-out accuracy", "held-out tau"]
    rows = [["arm", *heads, "minutes"]]
    for arm in results.study.arms:
        runs = [results.training[arm, seed] for seed in results.study.seeds]
        ends, exported = [_last(run, "train") for run in runs], [_exported(run) for run in runs]
        cells = [
            _spread([end.get(name) for end in ends], 3) for name in ("r_active", "support_accuracy", "common_accuracy")
        ]
        cells += [_spread([row[name] for row in exported], 3) for name in ("accuracy", "tau")]
        rows.append([arm, *cells, _spread([run["seconds"] / 60 for run in runs], 1)])
    return rows


def _served_table(results: Results) -> Table:
    rows = [["drafter", "temperature", "requests", "served tau", "walked tau", "served / walked", "same steps"]]
    for (arm, seed, temperature), records in results.served.items():
        served = macro(summarize_tasks(records).values()).tau
        row = [f"{arm}, seed {seed}", f"{temperature:g}", str(len(records)), _number(served, 3)]
        if temperature == 0:
            by_key = {record.key: record for record in results.walked[arm, seed]}
            shared = [(record, by_key[record.key]) for record in records if record.key in by_key]
            walked = macro(summarize_tasks([mine for _, mine in shared]).values()).tau
            same = sum(theirs.verify_steps == mine.verify_steps for theirs, mine in shared)
            both = served / walked if served and walked else None
            row += [_number(walked, 3), _number(both, 4), f"{same} of {len(shared)}"]
        else:
            row += ["-", "-", "-"]
        rows.append(row)
    return rows


def _origin_table(results: Results) -> Table:
    study = results.study
    (first, *_), server, session = results.training.values(), results.plain["server"], results.plain["sessions"][-1]
    start, machine = first["run"]["starts"][-1], session["machine"]
    versions = {**session["versions"], **start["versions"]}
    revisions = {str(run["run"]["starts"][-1].get("git_revision")) for run in results.training.values()}
    data = first["run"]["data"]
    return [
        ["what", "how"],
        ["target", f"{server['model']} ({server['device']}, {server['dtype']})"],
        ["recipe", f"{study.recipe}, with {', '.join(study.set) or 'nothing changed'}"],
        *(
            [f"arm {name}", ", ".join([*arm.set, f"answers {study.answers_of(name)}"])]
            for name, arm in study.arms.items()
        ),
        ["seeds", ", ".join(map(str, study.seeds))],
        ["data", f"{data['train']} conversations and {data['held_out']} held out, {data['answer_tokens']:,} tokens"],
        ["steps", str(first["run"]["steps"])],
        ["machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"],
        ["revisions", ", ".join(sorted(revisions))],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)],
        ["command", "python -m benchmarks study STUDY --out DIR (the report alone: --report-only)"],
    ]


def _spread(values: Sequence[float | None], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{spread}"


def _interval(interval: Interval | None, digits: int) -> str:
    return "-" if interval is None else f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
