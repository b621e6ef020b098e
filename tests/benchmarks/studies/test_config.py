from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.studies.config import load_study
from sglang_auf.errors import ConfigError
from sglang_auf.training.recipe import load_recipe

STUDIES = Path(__file__).resolve().parents[3] / "benchmarks" / "studies"

BASE: dict[str, Any] = {
    "title": "t",
    "profile": "p",
    "target": "x",
    "recipe": "r",
    "seeds": [1, 2],
    "answers": {"own": {"demo": 8}, "original": {"file": "original.jsonl"}},
    "arms": {"decay": {}, "auf": {"set": ["objective.name=auf"], "answers": "original"}},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))
    return file


def test_an_arm_without_answers_of_its_own_has_the_first_ones(tmp_path: Path) -> None:
    study = load_study(written(tmp_path))
    assert (study.answers_of("decay"), study.answers_of("auf")) == ("own", "original")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"arms": {"a": {}}}, "arms"),
        ({"arms": {"a": {"answers": "none"}, "b": {}}}, "'none' is none of own, original"),
        ({"claims": [{"id": "a", "text": "", "arm": "auf", "against": "dpace"}]}, "'dpace' is none of the arms"),
        ({"claims": [{"id": "a", "text": "", "arm": "auf", "against": "decay"}] * 2}, "'a' occurs twice"),
        ({"seeds": [1, 1]}, "seed occurs twice"),
        ({"served": {"arms": ["x"]}}, "no arm 'x'"),
        ({"served": {"seeds": [3]}}, "no seed 3"),
        ({"served": {"budgets": [300]}}, "no budget 300"),
        ({"budgets": {0: []}}, "budgets"),
        ({"arms": {"decay": {}, "auf": {"budgets": [30]}}}, "arm auf: no budget 30"),
        ({"budgets": {30: [], 60: []}, "arms": {"decay": {}, "auf": {"budgets": [60]}}}, "budget 30: fewer than two"),
        ({"measured": {"trees": [0]}}, "trees"),
        (
            {"claims": [{"id": "a", "text": "", "arm": "auf", "against": "decay", "figure": "tau_tree_8"}]},
            "'tau_tree_8' is none of tau, accuracy",
        ),
        ({"answers": {"own": {}}}, "one of file, prompts and demo"),
        ({"answers": {"own": {"demo": 8, "file": "x"}}}, "one of file, prompts and demo"),
        ({"sedes": [1]}, "sedes"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_study(written(tmp_path, **changes))


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not YAML"):
        load_study(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_arm_of_a_shipped_study_is_a_recipe(path: Path) -> None:
    for budget, study in load_study(path).parts.items():
        for arm in study.arms.values():
            for seed in study.seeds:
                recipe = load_recipe(study.recipe, [*study.set, *arm.set, f"seed={seed}"])
                assert budget is None or (recipe.schedule.max_steps, recipe.schedule.epochs) == (budget, None)


def test_a_budget_is_a_study_with_changes_of_its_own(tmp_path: Path) -> None:
    budgets = {300: ["evaluate_every=50"], 20: []}
    served = {"seeds": [2], "budgets": [300]}
    study = load_study(written(tmp_path, set=["save_every=5"], budgets=budgets, served=served))
    assert list(study.parts) == [300, 20]
    long, short = study.parts.values()
    assert long.set == ("save_every=5", "schedule.epochs=null", "schedule.max_steps=300", "evaluate_every=50")
    assert short.set == ("save_every=5", "schedule.epochs=null", "schedule.max_steps=20")
    assert long.served is not None and long.served.seeds == (2,)
    assert short.served is None
    assert long.parts == {None: long}
    without = load_study(written(tmp_path))
    assert without.parts == {None: without}


def test_an_arm_of_some_budgets_is_left_out_of_the_others(tmp_path: Path) -> None:
    arms = {"decay": {}, "auf": {}, "vat": {"budgets": [60]}}
    claims = [
        {"id": "a", "text": "a", "arm": "auf", "against": "decay"},
        {"id": "v", "text": "v", "arm": "vat", "against": "auf"},
    ]
    changes = {"budgets": {30: [], 60: []}, "served": {"arms": ["auf", "vat"]}}
    study = load_study(written(tmp_path, arms=arms, claims=claims, **changes))
    short, long = study.parts.values()
    assert (list(short.arms), list(long.arms)) == (["decay", "auf"], ["decay", "auf", "vat"])
    assert ([claim.id for claim in short.claims], [claim.id for claim in long.claims]) == (["a"], ["a", "v"])
    assert (short.served_runs, long.served_runs) == ((("auf",), (1, 2)), (("auf", "vat"), (1, 2)))


def test_a_budget_that_none_of_the_served_arms_is_of_serves_none(tmp_path: Path) -> None:
    arms = {"decay": {}, "auf": {}, "vat": {"budgets": [60]}}
    study = load_study(written(tmp_path, arms=arms, budgets={30: [], 60: []}, served={"arms": ["vat"], "seeds": [2]}))
    assert [part.served_runs for part in study.parts.values()] == [((), (2,)), (("vat",), (2,))]
    assert load_study(written(tmp_path, served={})).served_runs == (("decay", "auf"), (1, 2))
    assert load_study(written(tmp_path)).served_runs == ((), ())


def test_a_part_of_a_study_has_some_of_its_seeds_and_budgets(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, budgets={30: [], 60: []}, served={}))
    part = study.only(seeds=[2], budgets=[60])
    assert (part.seeds, list(part.parts)) == ((2,), [60])
    assert part.parts[60].served_runs == (("decay", "auf"), (2,))
    assert study.only() == study
    with pytest.raises(ConfigError, match="seed 7; expected: one of the study's: 1, 2"):
        study.only(seeds=[2, 7])
    with pytest.raises(ConfigError, match="budget 90"):
        study.only(budgets=[90])
    with pytest.raises(ConfigError, match="budget 30; expected: one of the study's: none"):
        load_study(written(tmp_path)).only(budgets=[30])


def test_a_part_of_a_study_has_some_of_its_arms_and_the_claims_between_them(tmp_path: Path) -> None:
    claims = [
        {"id": "a", "text": "t", "arm": "auf", "against": "decay"},
        {"id": "v", "text": "t", "arm": "vat", "against": "auf"},
    ]
    study = load_study(written(tmp_path, arms={"decay": {}, "auf": {}, "vat": {}}, claims=claims, served={}))
    part = study.only(arms=["auf", "decay"])
    assert (list(part.arms), [claim.id for claim in part.claims]) == (["decay", "auf"], ["a"])
    assert part.served_runs[0] == ("decay", "auf")
    with pytest.raises(ConfigError, match="arm l2r; expected: one of the study's: decay, auf, vat"):
        study.only(arms=["l2r"])


def test_a_budget_without_any_of_the_chosen_arms_is_left_out(tmp_path: Path) -> None:
    arms = {"decay": {}, "auf": {}, "vat": {"budgets": [30]}}
    study = load_study(written(tmp_path, arms=arms, budgets={30: [], 60: []}))
    assert list(study.only(arms=["vat"]).parts) == [30]
    assert list(study.only(arms=["vat", "auf"]).parts) == [30, 60]
    with pytest.raises(ConfigError, match="arms vat with budgets 60"):
        study.only(arms=["vat"], budgets=[60])


def test_an_arm_may_be_any_objective_or_a_curriculum(tmp_path: Path) -> None:
    earlier = "objective.earlier=[{name: decay, until: 0.25}]"
    arms = {
        "auf": {},
        "vat": {"set": ["objective.name=vat"]},
        "decay-then-auf": {"set": ["objective.name=auf", earlier]},
    }
    study = load_study(written(tmp_path, arms=arms, recipe="smollm2-135m-auf"))
    recipes = {name: load_recipe(study.recipe, [*study.set, *arm.set]) for name, arm in study.arms.items()}
    objectives = {name: recipe.objective for name, recipe in recipes.items()}
    assert {name: each.description for name, each in objectives.items()} == {
        "auf": "auf",
        "vat": "vat",
        "decay-then-auf": "decay until 0.25, then auf",
    }
    for name, recipe in recipes.items():  # matched: nothing else differs, gamma of the decay included
        assert recipe.model_copy(update={"objective": objectives["auf"]}) == recipes["auf"], name
        assert objectives[name].gamma == 4
