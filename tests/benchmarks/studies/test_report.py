"""The page of a study with made-up results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.stats.intervals import mean_tau
from benchmarks.stats.summary import macro, summarize_tasks
from benchmarks.studies.findings import findings
from benchmarks.studies.report import study_report
from tests.benchmarks.studies.test_findings import EQUAL, results


def test_the_page_holds_the_findings(tmp_path: Path) -> None:
    made = results(0.15, EQUAL)
    page = study_report({None: made}).write(tmp_path)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    tau, _ = findings(made)
    assert f"{tau.difference:+.3f}" in text
    assert "| yes |" in text and "| not shown |" in text
    assert "| auf, seed 1 | 0 | 120 |" in text
    assert "1.0000 | 120 of 120 |" in text


def test_budgets_have_a_table_of_verdicts_and_a_curve(tmp_path: Path) -> None:
    changes = {"measured": {"trees": [8], "sets": ["letters.jsonl"]}}
    short, long = results(0.0, EQUAL, **changes), results(0.15, EQUAL, **changes)
    report = study_report({300: short, 2400: long})
    report.write(tmp_path)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    tau, accuracy = findings(long)
    assert tau.over_seeds is not None
    of_long = f"yes: {tau.difference:+.3f} [{tau.over_seeds.low:+.3f}, {tau.over_seeds.high:+.3f}]"
    assert f"| (a) higher tau | not shown: +0.000 [+0.000, +0.000] | {of_long} |" in text
    assert f"not shown: {accuracy.difference:+.4f}" in text
    for steps in ("300", "2,400"):
        for title in ("Claims", "Tau of trees", "Tau on other sets", "Claims on letters.jsonl"):
            assert f"## {title}, {steps} steps" in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"steps.png", "tau-300.png", "tau-2400.png"} <= pictures
    assert text.count("## How it was done") == 1
    assert "120 prompts of 2 tasks" in text, "the set is no task"
    assert report.summary.count("(a) higher tau") == 2


def test_a_claim_that_a_budget_cannot_test_has_no_verdict_there(tmp_path: Path) -> None:
    short, long = results(0.0, EQUAL), results(0.15, EQUAL)
    short.study.__dict__["claims"] = short.study.claims[:1]  # as config.Study.parts leaves one out
    study_report({300: short, 2400: long}).write(tmp_path)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    first, second = long.study.claims
    rows = {row.split(" | ")[0][2:]: row for row in text.split("## ")[1].splitlines() if row.startswith("| (")}
    assert list(rows) == [f"({claim.id}) {claim.text}" for claim in (first, second)]
    assert " | - | " in rows[f"({second.id}) {second.text}"] and " | - | " not in rows[f"({first.id}) {first.text}"]


def test_the_page_says_which_seeds_come_from_which_machine(tmp_path: Path) -> None:
    made = results(0.15, EQUAL)
    study_report({None: made}).write(tmp_path)
    of_one = [row for row in (tmp_path / "study.md").read_text().splitlines() if row.startswith("| machine ")]
    assert of_one == ["| machine | c, 2 cores, 1 GiB |"]
    made.plain[2]["sessions"][-1]["machine"]["cpu"] = "another"
    study_report({None: made}).write(tmp_path)
    of_two = [row for row in (tmp_path / "study.md").read_text().splitlines() if row.startswith("| machine ")]
    assert of_two == [
        "| machine | c, 2 cores, 1 GiB: seed 1, seed 3 |",
        "| machine | another, 2 cores, 1 GiB: seed 2 |",
    ]


def test_served_taus_are_over_the_tasks_alone(tmp_path: Path) -> None:
    made = results(0.15, EQUAL, measured={"sets": ["letters.jsonl"]})
    assert any(record.task == "letters.jsonl" for record in made.served["auf", 1, 0.0])
    study_report({None: made}).write(tmp_path)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    tau = macro(summarize_tasks(made.answers(("auf", 1))).values()).tau
    assert f"| auf, seed 1 | 0 | 120 | {tau:.3f} | {tau:.3f} | 1.0000 | 120 of 120 |" in text


def test_the_taus_of_trees_and_sets_are_those_of_their_records(tmp_path: Path) -> None:
    made = results(0.15, EQUAL, measured={"trees": [8], "sets": ["letters.jsonl"]})
    made.walked["tau_tree_8"] = {run: made.walked["tau"]["decay", 1] for run in made.training}
    study_report({None: made}).write(tmp_path)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("## ")[1:])
    of_trees = {row.split(" | ")[-1] for row in sections["Tau of trees"].splitlines() if row.startswith("| auf")}
    expected = macro(summarize_tasks(made.answers(("decay", 1))).values()).tau
    assert of_trees == {f"{expected:.3f} ± 0.000 |"}
    _, interval = mean_tau([made.answers(("auf", seed), of="letters.jsonl") for seed in (1, 2, 3)])["letters.jsonl"]
    assert interval is not None
    assert f"({interval.low:.2f}..{interval.high:.2f})" in sections["Tau on other sets"]
