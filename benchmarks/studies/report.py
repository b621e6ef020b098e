"""`study`: do a study and report figures by arm and a verdict for each claim, computed from its records alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, ClassVar

from benchmarks.reports import figures
from benchmarks.reports.numbers import interval_text, number, with_interval
from benchmarks.reports.page import PageReport, Section, Table
from benchmarks.reports.report import alpha_over_tasks
from benchmarks.stats.intervals import mean_tau
from benchmarks.stats.summary import TaskSummary, macro, summarize_tasks
from benchmarks.studies.config import ACCURACY, Budget, Claim, Study, StudyConfig
from benchmarks.studies.findings import ArmSeed, Finding, Results, exported_figures, findings, read_results
from benchmarks.studies.records import require_same


class StudyReport(PageReport):
    """study.html, study.md and pictures."""

    STEM: ClassVar[str] = "study"


def measure_study(config: StudyConfig) -> StudyReport:
    """Do what is missing of a study, report it. Raises ConfigError as `require_same` does, and without matplotlib."""
    figures.require_matplotlib()
    if config.report_only:
        require_same(config.study, config.out / "records")
    else:
        from benchmarks.studies.run import run_study  # imports torch

        run_study(config)
    others = [other / "records" for other in config.join]
    return study_report(read_results(config.out / "records", config.walk_only, others, config.arms))


def study_report(by_budget: Mapping[Budget, Results]) -> StudyReport:
    """by_budget: what findings.read_results gave."""
    sections: list[Section] = []
    if None not in by_budget:
        curves = figures.png(figures.tau_by_step(_curves(by_budget)))
        sections = [
            Section("Verdicts by budget", VERDICTS_TEXT, _verdicts_table(by_budget), in_words=True),
            Section("Tau by steps", STEPS_TEXT, None, curves, "steps.png"),
        ]
    for budget, results in by_budget.items():
        sections += _sections(
            results, "" if budget is None else f", {budget:,} steps", "" if budget is None else f"-{budget}"
        )
    sections.append(Section("How it was done", "", _origin_table(by_budget), in_words=True))
    summary = "\n\n".join(
        "\n".join("  ".join(row) for row in _claims_table(findings(results))) for results in by_budget.values()
    )
    study = next(iter(by_budget.values())).study
    return StudyReport(title=study.title, sections=sections, summary=summary)


def _sections(results: Results, after: str, stem: str) -> list[Section]:
    """What is said of one budget. after: added to titles. stem: added to the names of pictures."""
    study, found = results.study, findings(results)
    tasks = {run: summarize_tasks(results.answers(run)) for run in results.training}
    taus = {arm: [macro(tasks[arm, seed].values()).tau or 0.0 for seed in study.seeds] for arm in study.arms}
    alpha = {
        arm: alpha_over_tasks([record for seed in study.seeds for record in results.answers((arm, seed))])
        for arm in study.arms
    }
    curves = {f"{arm}, seed {study.seeds[0]}": results.training[arm, study.seeds[0]]["metrics"] for arm in study.arms}
    sections = [
        Section(f"Claims{after}", CLAIMS_TEXT, _claims_table(found), in_words=True),
        Section(f"Differences by task{after}", DIFFERENCES_TEXT, _differences_table(found)),
        Section(
            f"Tau by arm{after}",
            _tau_text(results),
            _tau_table(study, tasks),
            figures.png(figures.tau_by_seed(taus)),
            f"tau{stem}.png",
        ),
    ]
    if study.measured.trees:
        sections.append(Section(f"Tau of trees{after}", TREES_TEXT, _trees_table(results)))
    if study.sets:
        sections.append(Section(f"Tau on other sets{after}", SETS_TEXT, _sets_table(results)))
    for name in study.sets:
        table = _claims_table(findings(results, name))
        sections.append(Section(f"Claims on {name}{after}", CLAIMS_ON_SETS_TEXT, table, in_words=True))
    sections += [
        Section(
            f"alpha_k by arm{after}", ALPHA_TEXT, None, figures.png(figures.alpha_curves(alpha)), f"alpha{stem}.png"
        ),
        Section(f"What training saw{after}", TRAINING_TEXT, _training_table(results)),
        Section(
            f"Training{after}", CURVES_TEXT, None, figures.png(figures.training_curves(curves)), f"training{stem}.png"
        ),
    ]
    if results.served:
        sections.append(Section(f"Served{after}", SERVED_TEXT, _served_table(results)))
    return sections


VERDICTS_TEXT = (
    "Of each claim over the tasks: verdict, difference, and the 95 % interval over seeds. The tables below have the "
    "intervals over prompts too, which a verdict also needs."
)
STEPS_TEXT = (
    "Held-out tau in training, mean over seeds: a line for each run of an arm. The learning rate falls to 0 at the end "
    "of each run, so that a short run is not the beginning of a longer one."
)
TREES_TEXT = (
    "Over the same answers with a tree of N nodes in place of a chain, mean over tasks and seeds, with the standard "
    "deviation over seeds. The likeliest nodes by the drafter's own probabilities, which a server corrects as it goes."
)
SETS_TEXT = (
    "Prompts of kinds that are neither measured tasks nor trained on, walked in the same way. Mean over seeds, with "
    "the 95 % interval over prompts."
)
CLAIMS_ON_SETS_TEXT = "The claims about tau on this set alone, with intervals and verdicts as above."
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
    origin = next(iter(results.plain.values()))
    tasks = [task for name, task in origin["tasks"].items() if name not in results.study.sets]
    prompts, limit = sum(task["prompts"] for task in tasks), results.study.measured.max_tokens
    return (
        f"Walked over plain decoding's greedy answers to {prompts} prompts of {len(tasks)} tasks, of up to {limit} "
        "tokens. Mean over seeds, with the standard deviation over seeds."
    )


def _claims_table(found: Sequence[Finding]) -> Table:
    rows = [["claim", "compared", "difference", "over seeds", "over prompts", "verdict"]]
    for finding in found:
        claim, digits = finding.claim, _digits(finding.claim)
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


def _digits(claim: Claim) -> int:
    return 4 if claim.figure == ACCURACY else 3


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
            figure = "" if finding.claim.figure == "tau" else f", {finding.claim.figure}"
            rows.append([f"{finding.claim.arm} - {finding.claim.against}{figure}", *shown])
    return rows


def _tau_table(study: Study, tasks: dict[ArmSeed, dict[str, TaskSummary]]) -> Table:
    names = list(dict.fromkeys(name for of_run in tasks.values() for name in of_run))
    rows = [["arm", *names, "mean"]]
    for arm in study.arms:
        by_seed = [tasks[arm, seed] for seed in study.seeds]
        cells = [_spread([of_run[name].tau for of_run in by_seed if name in of_run]) for name in names]
        rows.append([arm, *cells, _spread([macro(of_run.values()).tau for of_run in by_seed], 3)])
    return rows


def _trees_table(results: Results) -> Table:
    study = results.study
    rows = [["arm", *study.walked_figures]]
    for arm in study.arms:
        taus = [
            [macro(summarize_tasks(results.answers((arm, seed), figure)).values()).tau for seed in study.seeds]
            for figure in study.walked_figures
        ]
        rows.append([arm, *(_spread(of_figure, 3) for of_figure in taus)])
    return rows


def _sets_table(results: Results) -> Table:
    study = results.study
    columns = [(name, figure) for name in study.sets for figure in study.walked_figures]
    rows = [["arm", *(f"{name}: {figure}" for name, figure in columns)]]
    for arm in study.arms:
        cells = []
        for name, figure in columns:
            mean = mean_tau([results.answers((arm, seed), figure, name) for seed in study.seeds]).get(name)
            cells.append("-" if mean is None else with_interval(*mean))
        rows.append([arm, *cells])
    return rows


def _verdicts_table(by_budget: Mapping[Budget, Results]) -> Table:
    rows = [["claim", *(f"{budget:,} steps" for budget in by_budget)]]
    by_claim: dict[str, list[str]] = {}
    for column, results in enumerate(by_budget.values()):
        for finding in findings(results):
            claim, digits = finding.claim, _digits(finding.claim)
            cells = by_claim.setdefault(f"({claim.id}) {claim.text}", ["-"] * len(by_budget))
            over_seeds = interval_text(finding.over_seeds, digits, of_difference=True)
            cells[column] = f"{finding.verdict}: {finding.difference:+.{digits}f} {over_seeds}"
    return rows + [[claim, *cells] for claim, cells in by_claim.items()]


def _curves(by_budget: Mapping[Budget, Results]) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """arm -> budget -> (step, held-out tau, mean over seeds)."""
    curves: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for budget, results in by_budget.items():
        assert budget is not None
        for arm in results.study.arms:
            taus: dict[int, list[float]] = defaultdict(list)
            for seed in results.study.seeds:
                for row in results.training[arm, seed]["metrics"]:
                    if row["kind"] == "held_out" and row["tau"] is not None:
                        taus[row["step"]].append(row["tau"])
            curves.setdefault(arm, {})[budget] = [(step, fmean(values)) for step, values in sorted(taus.items())]
    return curves


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
    for (arm, seed, temperature), asked in results.served.items():
        records = [record for record in asked if record.task not in results.study.sets]
        served = macro(summarize_tasks(records).values()).tau
        row = [f"{arm}, seed {seed}", f"{temperature:g}", str(len(records)), number(served, 3)]
        if temperature == 0:
            by_key = {record.key: record for record in results.walked["tau"][arm, seed]}
            shared = [(record, by_key[record.key]) for record in records if record.key in by_key]
            walked = macro(summarize_tasks([mine for _, mine in shared]).values()).tau
            same = sum(theirs.verify_steps == mine.verify_steps for theirs, mine in shared)
            both = served / walked if served and walked else None
            row += [number(walked, 3), number(both, 4), f"{same} of {len(shared)}"]
        else:
            row += ["-", "-", "-"]
        rows.append(row)
    return rows


def _origin_table(by_budget: Mapping[Budget, Results]) -> Table:
    everything = list(by_budget.values())
    study = everything[0].study
    arms = {name: arm for each in everything for name, arm in each.study.arms.items()}
    target = next(iter(everything[0].plain.values()))["server"]
    rows = [
        ["what", "how"],
        ["target", f"{target['model']} ({target['device']}, {target['dtype']})"],
        *(
            ["recipe", f"{each.study.recipe}, with {', '.join(each.study.set) or 'nothing changed'}"]
            for each in everything
        ),
        *([f"arm {name}", ", ".join([*arm.set, f"answers {study.answers_of(name)}"])] for name, arm in arms.items()),
        *(["steps and seeds", _steps_and_seeds(each)] for each in everything),
    ]
    for name, of_run in ORIGINS.items():
        told: dict[str, list[str]] = defaultdict(list)
        for budget, results in by_budget.items():
            for (_, seed), training in results.training.items():
                run = f"seed {seed}" if budget is None else f"{budget:,} steps with seed {seed}"
                told[of_run(training["run"], results.plain[seed])].append(run)
        for text, runs in told.items():
            rows.append([name, text if len(told) == 1 else f"{text}: {', '.join(dict.fromkeys(runs))}"])
    rows.append(["command", "python -m benchmarks study STUDY --out DIR (the report alone: --report-only)"])
    return rows


def _steps_and_seeds(results: Results) -> str:
    steps = next(iter(results.training.values()))["run"]["steps"]
    return f"{steps:,} steps, seeds {', '.join(map(str, results.study.seeds))}"


def _data(run: dict[str, Any], plain: dict[str, Any]) -> str:
    data = run["data"]
    return f"{data['train']} conversations and {data['held_out']} held out, {data['answer_tokens']:,} tokens"


def _machine(run: dict[str, Any], plain: dict[str, Any]) -> str:
    machine = plain["sessions"][-1]["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"


def _revision(run: dict[str, Any], plain: dict[str, Any]) -> str:
    return str(run["starts"][-1].get("git_revision"))


def _versions(run: dict[str, Any], plain: dict[str, Any]) -> str:
    versions = {**plain["sessions"][-1]["versions"], **run["starts"][-1]["versions"]}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


ORIGINS = {"data": _data, "machine": _machine, "revision": _revision, "versions": _versions}
"""What may differ between the parts of a study: name -> how a training and its plain answers tell it."""


def _spread(values: Sequence[float | None], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{spread}"


def _last(training: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(row for row in reversed(training["metrics"]) if row["kind"] == kind)
