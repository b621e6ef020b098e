"""Verdicts from made-up results whose answer is known."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.stats.intervals import Interval
from benchmarks.studies.config import Claim, Study
from benchmarks.studies.findings import Results, findings, judge, read_results
from benchmarks.studies.records import PLAIN, STUDY, keep, training_name, walked_name, write_gz
from sglang_auf.errors import ConfigError
from tests.benchmarks.stats.test_intervals import answers


def interval(low: float, high: float) -> Interval:
    return Interval(low=low, high=high)


def claim(**changes: Any) -> Claim:
    return Claim.model_validate({"id": "a", "text": "t", "arm": "auf", "against": "decay", **changes})


@pytest.mark.parametrize(
    ("expected", "intervals", "verdict"),
    [
        ("higher", [interval(0.1, 0.3), interval(0.05, 0.2)], "yes"),
        ("higher", [interval(0.1, 0.3), interval(-0.05, 0.2)], "not shown"),
        ("higher", [interval(-0.3, -0.1), interval(-0.2, -0.05)], "no"),
        ("higher", [interval(-0.3, -0.1), interval(-0.2, 0.05)], "not shown"),
        ("higher", [None, interval(0.1, 0.2)], "not shown"),
        ("higher", [None], "not shown"),
        ("lower", [interval(-0.3, -0.1)], "yes"),
        ("lower", [interval(0.1, 0.3)], "no"),
        ("lower", [interval(-0.1, 0.3)], "not shown"),
        ("equal", [interval(-0.01, 0.01), interval(-0.015, 0.005)], "yes"),
        ("equal", [interval(-0.01, 0.01), interval(-0.03, 0.005)], "not shown"),
        ("equal", [interval(0.03, 0.05)], "no"),
    ],
)
def test_a_verdict_needs_every_interval(expected: str, intervals: list[Interval | None], verdict: str) -> None:
    assert judge(claim(expected=expected, margin=0.02), intervals) == verdict


def results(lift: float, accuracies: dict[str, list[float]], **changes: Any) -> Results:
    """auf is `lift` more likely to have a draft accepted than decay, on two tasks and three seeds.

    changes: of the study. On its sets of other kinds, auf is as much less likely.
    """
    study = Study.model_validate(
        {
            "title": "A study",
            "profile": "p",
            "target": "t",
            "recipe": "r",
            "seeds": [1, 2, 3],
            "answers": {"own": {"demo": 8}},
            "arms": {"decay": {}, "auf": {}},
            "claims": [
                {"id": "a", "text": "higher tau", "arm": "auf", "against": "decay"},
                {"id": "b", "text": "accuracy", "arm": "decay", "against": "auf", "figure": "accuracy"},
            ],
            **changes,
        }
    )

    def lifted(arm: str, other_kind: bool) -> float:
        return 0.0 if arm == "decay" else -lift if other_kind else lift

    walked = {
        (arm, seed): [
            record
            for task in ("gsm8k", "mbpp", *study.sets)
            for record in answers(60, seed=seed, task=task, lift=lifted(arm, task in study.sets))
        ]
        for arm in study.arms
        for seed in study.seeds
    }
    training = {
        (arm, seed): {
            "set": [],
            "metrics": [
                {"kind": "train", "step": 1, "loss": 2.0, "r_active": 0.3},
                {"kind": "held_out", "step": 1, "tau": 1.5, "accuracy": accuracies[arm][seed - 1]},
            ],
            "seconds": 60.0,
            "run": {
                "target": {"name": "t"},
                "starts": [{"versions": {"torch": "x"}}],
                "data": {"sha256": "d", "train": 5, "held_out": 2, "answer_tokens": 100},
                "steps": 1,
            },
        }
        for arm in study.arms
        for seed in study.seeds
    }
    machine = {"cpu": "c", "cores": 2, "memory_gib": 1}
    plain = {
        "server": {"model": "m", "device": "cpu", "dtype": "bfloat16"},
        "tasks": {name: {"prompts": 60, "sha256": "p"} for name in ("gsm8k", "mbpp", *study.sets)},
        "sessions": [{"versions": {"sglang": "y"}, "machine": machine}],
    }
    served = {("auf", 1, 0.0): walked["auf", 1]}
    origins = {seed: copy.deepcopy(plain) for seed in study.seeds}
    return Results(study, dict.fromkeys(study.walked_figures, walked), training, served, origins)


EQUAL = {"decay": [0.3, 0.3, 0.3], "auf": [0.3, 0.3, 0.3]}


def test_a_clear_difference_is_found_in_every_task() -> None:
    tau, accuracy = findings(results(0.15, {"decay": [0.30, 0.31, 0.32], "auf": [0.25, 0.26, 0.27]}))
    assert tau.verdict == "yes"
    assert set(tau.by_task) == {"gsm8k", "mbpp", "macro"}
    assert tau.difference == pytest.approx(tau.by_task["macro"][0])
    assert tau.difference > 0.2
    assert accuracy.verdict == "yes"
    assert accuracy.difference == pytest.approx(0.05)
    assert accuracy.over_prompts is None


def test_no_difference_is_not_shown() -> None:
    tau, accuracy = findings(results(0.0, EQUAL))
    assert tau.difference == 0
    assert (tau.verdict, accuracy.verdict) == ("not shown", "not shown")


def test_a_set_of_another_kind_has_findings_of_its_own_and_no_part_in_the_others() -> None:
    made = results(0.15, EQUAL, measured={"sets": ["kinds/letters.jsonl"]})
    tau, _ = findings(made)
    assert tau.verdict == "yes"
    assert set(tau.by_task) == {"gsm8k", "mbpp", "macro"}
    (on_set,) = findings(made, "letters.jsonl")  # accuracy is not of prompts
    assert on_set.verdict == "no"
    assert on_set.difference < -0.1
    assert set(on_set.by_task) == {"letters.jsonl", "macro"}


def test_a_claim_may_be_about_trees() -> None:
    trees = {"id": "t", "text": "t", "arm": "auf", "against": "decay", "figure": "tau_tree_8"}
    made = results(0.15, EQUAL, measured={"trees": [8]}, claims=[trees])
    for run, records in made.walked["tau"].items():
        better = made.walked["tau"]["decay", run[1]] if run[0] == "auf" else records
        made.walked["tau_tree_8"] = {**made.walked["tau_tree_8"], run: better}
    (finding,) = findings(made)
    assert finding.difference == 0, "which the chain's is not"


def write(
    records: Path,
    study: dict[str, Any],
    budgets: Sequence[int],
    seeds: Sequence[int] = (1,),
    data: str = "d",
    prompts: str = "p",
) -> None:
    """Records of a study of two arms, done for these budgets and seeds, with plain answers that are named as `data`.

    prompts: digest of what was asked.
    """
    records.mkdir()
    (records / STUDY).write_text(yaml.safe_dump(study))
    (records / PLAIN).write_text(json.dumps({"of": data, "tasks": {"gsm8k": {"sha256": prompts}}}))
    for budget in budgets:
        (records / str(budget)).mkdir()
        for arm, seed in product(("decay", "auf"), seeds):
            run = {"target": {"name": "t"}, "data": {"sha256": data}}
            write_gz(records / str(budget) / training_name(arm, seed), json.dumps({"run": run, "budget": budget}))
            for nodes in (None, 8):
                keep(records / str(budget) / walked_name(arm, seed, nodes), answers(nodes or 3, seed=budget))


def test_budgets_that_are_done_are_read_and_the_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = {
        **{"title": "t", "profile": "p", "target": "t", "recipe": "r", "seeds": [1]},
        **{"answers": {"own": {"demo": 8}}, "arms": {"decay": {}, "auf": {}}},
        **{"budgets": {30: [], 60: []}, "measured": {"trees": [8]}, "served": {"arms": ["auf"]}},
    }
    write(tmp_path / "begun", study, [])
    with pytest.raises(ConfigError, match="not done yet"):
        read_results(tmp_path / "begun", walk_only=True)

    write(tmp_path / "half", study, [30])
    (budget,) = read_results(tmp_path / "half", walk_only=True)
    assert budget == 30
    assert "seed 1 with 60 steps is not done yet" in caplog.text
    assert not read_results(tmp_path / "half")[30].served
    assert "served-auf-1-T0.jsonl.gz: it was not served yet" in caplog.text

    write(tmp_path / "done", study, [30, 60])
    short, long = read_results(tmp_path / "done", walk_only=True).values()
    assert (short.training["auf", 1]["budget"], long.training["auf", 1]["budget"]) == (30, 60)
    assert [len(long.answers(("auf", 1), figure)) for figure in ("tau", "tau_tree_8")] == [3, 8]
    assert long.answers(("auf", 1)) != short.answers(("auf", 1))


def test_a_seed_that_an_arm_lacks_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = {
        **{"title": "t", "profile": "p", "target": "t", "recipe": "r", "seeds": [1, 2, 3]},
        **{"answers": {"own": {"demo": 8}}, "arms": {"decay": {}, "auf": {}}},
        **{"budgets": {30: []}, "measured": {"trees": [8]}, "served": {"arms": ["auf"], "seeds": [2, 3]}},
    }
    records = tmp_path / "records"
    write(records, study, [30], seeds=[1, 2, 3])
    (records / "30" / walked_name("auf", 2, 8)).unlink()
    (results,) = read_results(records, walk_only=True).values()
    assert set(results.training) == {(arm, seed) for arm in ("decay", "auf") for seed in (1, 3)}
    assert set(results.walked["tau_tree_8"]) == set(results.training)
    assert "walked-auf-2-tree-8.jsonl.gz: seed 2 with 30 steps is not done yet" in caplog.text

    keep(records / "30" / "served-auf-3-T0.jsonl.gz", answers(3, seed=30))
    (results,) = read_results(records).values()
    assert {seed for _, seed in results.training} == {1, 3}
    assert set(results.served) == {("auf", 3, 0.0)}, "seed 2 is left out, and seed 1 was not to be served"


def test_a_seed_that_one_arm_lacks_counts_for_the_others(tmp_path: Path) -> None:
    study = {
        **{"title": "t", "profile": "p", "target": "t", "recipe": "r", "seeds": [1, 2]},
        **{"answers": {"own": {"demo": 8}}, "arms": {"decay": {}, "auf": {}, "vat": {}}},
        **{"budgets": {30: []}, "measured": {"trees": [8]}},
    }
    write(tmp_path / "one", study, [30], seeds=[1, 2])  # and no vat
    with pytest.raises(ConfigError, match="not done yet"):
        read_results(tmp_path / "one")
    results = read_results(tmp_path / "one", arms=["auf", "decay"])[30]
    assert (results.study.seeds, set(results.study.arms)) == ((1, 2), {"decay", "auf"})


def test_parts_of_a_study_are_joined_by_seed_and_budget(tmp_path: Path) -> None:
    study = {
        **{"title": "t", "profile": "p", "target": "t", "recipe": "r", "seeds": [1, 2, 3]},
        **{"answers": {"own": {"demo": 8}}, "arms": {"decay": {}, "auf": {}}},
        **{"budgets": {30: [], 60: []}, "measured": {"trees": [8]}},
    }
    write(tmp_path / "one", study, [30], seeds=[1, 2, 3], data="one")
    write(tmp_path / "two", study, [60], seeds=[2], data="two")
    write(tmp_path / "three", study, [60], seeds=[1, 3], data="three")
    joined = read_results(tmp_path / "one", others=[tmp_path / "two", tmp_path / "three"])
    assert {budget: each.study.seeds for budget, each in joined.items()} == {30: (1, 2, 3), 60: (1, 2, 3)}
    origins = {seed: plain["of"] for seed, plain in joined[60].plain.items()}
    assert origins == {1: "three", 2: "two", 3: "three"}
    data = {seed: joined[60].training["auf", seed]["run"]["data"]["sha256"] for seed in (1, 2, 3)}
    assert data == origins
    assert set(joined[30].plain) == {1, 2, 3}

    write(tmp_path / "asked", study, [60], seeds=[2], prompts="q")
    with pytest.raises(ConfigError, match="other prompts of gsm8k"):
        read_results(tmp_path / "asked", others=[tmp_path / "three"])

    write(tmp_path / "other", {**study, "title": "another"}, [60])
    with pytest.raises(ConfigError, match="another study"):
        read_results(tmp_path / "one", others=[tmp_path / "other"])
    with pytest.raises(ConfigError, match="nowhere"):
        read_results(tmp_path / "one", others=[tmp_path / "nowhere"])


def test_what_a_later_version_says_of_the_target_makes_it_no_other(tmp_path: Path) -> None:
    study = {
        **{"title": "t", "profile": "p", "target": "t", "recipe": "r", "seeds": [1]},
        **{"answers": {"own": {"demo": 8}}, "arms": {"decay": {}, "auf": {}}},
        **{"budgets": {30: []}, "measured": {"trees": [8]}},
    }
    write(tmp_path / "records", study, [30])
    file = tmp_path / "records" / "30" / training_name("auf", 1)
    write_gz(file, json.dumps({"run": {"target": {"name": "t", "architecture": "A"}, "data": {"sha256": "d"}}}))
    assert set(read_results(tmp_path / "records")) == {30}
    write_gz(file, json.dumps({"run": {"target": {"name": "u"}, "data": {"sha256": "d"}}}))
    with pytest.raises(ConfigError, match="another target"):
        read_results(tmp_path / "records")


def test_arms_of_one_machine_with_different_data_are_refused(tmp_path: Path) -> None:
    study = {
        **{"title": "t", "profile": "p", "target": "t", "recipe": "r", "seeds": [1]},
        **{"answers": {"own": {"demo": 8}}, "arms": {"decay": {}, "auf": {}}},
        **{"budgets": {30: []}, "measured": {"trees": [8]}},
    }
    write(tmp_path / "records", study, [30])
    run = {"target": {"name": "t"}, "data": {"sha256": "else"}}
    write_gz(tmp_path / "records" / "30" / training_name("auf", 1), json.dumps({"run": run}))
    with pytest.raises(ConfigError, match="decay with seed 1 was trained with another data than auf"):
        read_results(tmp_path / "records")

    write(tmp_path / "seeds", {**study, "seeds": [1, 2]}, [30], seeds=[1, 2])
    for arm in ("auf", "decay"):
        write_gz(tmp_path / "seeds" / "30" / training_name(arm, 2), json.dumps({"run": run}))
    with pytest.raises(ConfigError, match="auf with seed 2 was trained with another data than auf"):
        read_results(tmp_path / "seeds")
