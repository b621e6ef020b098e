"""`study`: do a study and report figures by arm and a verdict for each claim, computed from its records alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, ClassVar

from benchmarks.reports import figures
from benchmarks.reports.numbers import interval_text, number
from benchmarks.reports.page import PageReport, Section, Table
from benchmarks.reports.report import alpha_over_tasks
from benchmarks.stats.summary import TaskSummary, macro, summarize_tasks
from benchmarks.studies.config import Study, StudyConfig
from benchmarks.studies.findings import ArmSeed, Finding, Results, exported_figures, findings, read_results
from benchmarks.studies.records import require_same


class StudyReport(PageReport):
    """study.html, study.md and pictures."""

    STEM: ClassVar[str] = "study"


def measure_study(config: StudyConfig) -> StudyReport:
    """Do what is missing of a study, and report it. Raises ConfigError where config.out belongs to another study."""
    if config.report_only:
        require_same(config.study, config.out / "records")
    else:
        from benchmarks.studies.run import run_study  # imports torch

        run_study(config)
    return study_report(read_results(config.out / "records"))


def study_report(results: Results) -> StudyReport:
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
        Section("Claims", CLAIMS_TEXT, _claims_table(found), in_words=True),
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
    summary = "\n".join("  ".join(row) for row in _claims_table(found))
    return StudyReport(title=study.title, sections=sections, summary=summary)


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


def _claims_table(found: Sequence[Finding]) -> Table:
    rows = [["claim", "compared", "difference", "over seeds", "over prompts", "verdict"]]
    for finding in found:
        claim, digits = finding.claim, 4 if finding.claim.figure == "accuracy" else 3
        expected = f"{claim.expected} (within {claim.margin:g})" if claim.expected == "equal" else claim.expected
        rows.append(
            [
                f"({claim.id}) {claim.text}",
                f"{claim.figure}: {claim.arm} against {claim.against}, expected {expected}",
                f"{finding.difference:+.{digits}f}",
                interval_text(finding.over_seeds, digits, of_difference=True),
                interval_text(finding.over_prompts, digits, of_difference=True),
                finding.verdict,
            ]
        )
    return rows


def _differences_table(found: Sequence[Finding]) -> Table:
    tasks = list(dict.fromkeys(task for finding in found for task in finding.by_task if task != "macro"))
    rows = [["compared", *tasks, "mean"]]
    for finding in found:
        if finding.by_task:
            cells = [finding.by_task.get(task) for task in [*tasks, "macro"]]
            shown = [
                "-" if cell is None else f"{cell[0]:+.3f} {interval_text(cell[1], of_difference=True)}"
                for cell in cells
            ]
            rows.append([f"{finding.claim.arm} - {finding.claim.against}", *shown])
    return rows


def _tau_table(study: Study, tasks: dict[ArmSeed, dict[str, TaskSummary]]) -> Table:
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
        ends, exported = [_last(run, "train") for run in runs], [exported_figures(run) for run in runs]
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
        row = [f"{arm}, seed {seed}", f"{temperature:g}", str(len(records)), number(served, 3)]
        if temperature == 0:
            by_key = {record.key: record for record in results.walked[arm, seed]}
            shared = [(record, by_key[record.key]) for record in records if record.key in by_key]
            walked = macro(summarize_tasks([mine for _, mine in shared]).values()).tau
            same = sum(theirs.verify_steps == mine.verify_steps for theirs, mine in shared)
            both = served / walked if served and walked else None
            row += [number(walked, 3), number(both, 4), f"{same} of {len(shared)}"]
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


def _last(training: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(row for row in reversed(training["metrics"]) if row["kind"] == kind)
