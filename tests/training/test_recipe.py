"""Recipes: those we ship, what is refused and how it is said, extends, --set, and the comparison on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_auf.errors import ConfigError
from sglang_auf.settings import settings_names
from sglang_auf.training.losses.objectives import DOMINO_OBJECTIVES
from sglang_auf.training.recipe import RECIPES, Recipe, differences, load_recipe, parse_recipe
from tests.support.training_runs import tiny_recipe

TINY = tiny_recipe("some/target", "answers.jsonl")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a recipe file: two layers, blocks of 4, AdamW, one epoch, up to 40 tokens."""
    changes: dict[str, Any] = {"schedule": {"epochs": 1, "max_steps": None}, "drafter": {"num_layers": 2}}
    file = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_recipe("some/target", "answers.jsonl", **changes).model_dump(mode="json")))
    return str(file)


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, overrides)
    assert caught.value.found and caught.value.expected
    return caught.value.found


@pytest.mark.parametrize("name", settings_names(RECIPES))
def test_every_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert name.startswith(recipe.target.split("/")[-1].lower())
    assert (recipe.drafter.head == "domino") == ("domino" in name)


def test_every_arm_of_the_paper_is_a_recipe_with_another_objective() -> None:
    """Set-up of arXiv 2607.01893 (tables 1 and 2), at the published recipe of its baseline."""
    dflash = [load_recipe("qwen3-8b-dflash-auf", [f"objective.name={arm}"]) for arm in ("decay", "auf+decay", "auf")]
    domino = [load_recipe("qwen3-8b-domino-b-auf", [f"objective.name={arm}"]) for arm in DOMINO_OBJECTIVES]
    for arms in (dflash, domino):
        assert len({arm.objective.name for arm in arms}) == len(arms)
        for arm in arms:
            assert [line.split(":")[0] for line in differences(arms[0], arm)] in ([], ["objective.name"])
    for recipe in (dflash[0], domino[0]):
        assert recipe.drafter.num_layers == 5 and recipe.drafter.target_layer_ids == (1, 9, 17, 25, 33)
        assert recipe.drafter.block_size == 16 and recipe.drafter.mask_token_id == 151669
        assert recipe.objective.gamma == 7 and recipe.objective.labels == "text"
        assert recipe.schedule.epochs == 6 and recipe.schedule.warmup_ratio == 0.04
        assert recipe.optimiser.name == "adamw" and recipe.optimiser.lr == 6e-4
        assert recipe.optimiser.clip == 1 and recipe.optimiser.weight_decay == 0
        assert recipe.data.max_length == 3072 and recipe.data.thinking == "off"
    assert dflash[0].batch.anchors_per_row == 512 and domino[0].batch.anchors_per_row == 256
    assert domino[0].drafter.gru_hidden_dim == 1024 and domino[0].drafter.emb_dim == 256
    assert [domino[0].objective.base_weight(progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]


def test_an_extending_recipe_changes_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((RECIPES / "smollm2-135m-auf.yaml").read_text())
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\nobjective: {name: auf+decay}\nseed: 7\n")
    (tmp_path / "top.yaml").write_text(
        "extends: middle.yaml\nobjective: {gamma: 3}\ndrafter: {target_layer_ids: [2]}\n"
    )
    base, top = load_recipe(str(tmp_path / "base.yaml")), load_recipe(str(tmp_path / "top.yaml"))
    assert (top.objective.name, top.objective.gamma, top.seed) == ("auf+decay", 3, 7)
    assert top.drafter == base.drafter.model_copy(update={"target_layer_ids": (2,)})
    assert top.optimiser == base.optimiser
    (tmp_path / "ours.yaml").write_text("extends: smollm2-135m-auf\nseed: 7\n")
    assert load_recipe(str(tmp_path / "ours.yaml")) == base.model_copy(update={"seed": 7})


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"a": "extends: b.yaml", "b": "extends: a.yaml"}, "a.yaml -> b.yaml -> a.yaml"),
        ({"a": "extends: c.yaml"}, "a.yaml extends "),
        ({"a": 'extends: "c\\0"'}, "a.yaml extends "),
        ({"a": "- 1"}, "no mapping"),
        ({"a": "target: [unclosed"}, "not YAML"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert complaint in refusal(str(tmp_path / "a.yaml"))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    assert "did you mean qwen3-8b-dflash-auf?" in refusal("qwen3-8b-dflsh-auf")


def test_taps_and_mask_may_be_left_to_the_target(tiny: str) -> None:
    drafter = load_recipe(tiny, ["drafter.target_layer_ids=auto", "drafter.mask_token_id=auto"]).drafter
    assert (drafter.target_layer_ids, drafter.mask_token_id) == ("auto", "auto")
    for override in ("drafter.target_layer_ids=automatic", "drafter.mask_token_id=automatic"):
        assert "'auto'" in refusal(tiny, override)


def test_overrides_are_read_as_yaml(tiny: str) -> None:
    recipe = load_recipe(
        tiny,
        ["optimiser.lr=6e-4", "drafter.target_layer_ids=[0, 28]", "drafter.init=[1, 2]", "data.thinking=off", "seed=3"],
    )
    assert recipe.optimiser.lr == 6e-4
    assert recipe.drafter.target_layer_ids == (0, 28) and recipe.drafter.init == (1, 2)
    assert recipe.data.thinking == "off" and recipe.seed == 3


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("optimiser.learning_rate=1", "unknown key optimiser.learning_rate"),
        ("optimizer.lr=1", "unknown key optimizer (did you mean optimiser?)"),
        ("batch.batch_token=1", "unknown key batch.batch_token (did you mean batch_tokens?)"),
        ("objective.name=afu", "none of"),
        ("objective.name=b-auf", "none of head dflash"),
        ("objective=auf", "objective: "),
        ("objective.earlier=[{name: b-auf, until: 0.5}]", "objective b-auf is none of head dflash: full, decay, "),
        ("objective.earlier=[{name: vta, until: 0.5}]", "objective.earlier.0.name: none of the objectives full, "),
        ("objective.earlier=[{name: vat, until: 1.0}]", "objective.earlier.0.until: "),
        ("objective.earlier=[{name: vat, untill: 0.5}]", "objective.earlier.0.untill (did you mean until?)"),
        (
            "objective.earlier=[{name: vat, until: 0.5}, {name: full, until: 0.2}]",
            "objective: earlier: each `until` must be larger than the one before, not [0.5, 0.2]",
        ),
        ("objective.gamma=0", "objective.gamma"),
        ("drafter.head=domino", "needs gru_hidden_dim and emb_dim"),
        ("drafter.emb_dim=4", "belong to head domino"),
        ("drafter.target_layer_ids=[]", "drafter.target_layer_ids"),
        ("drafter.target_layer_ids=[3, 3]", "each larger"),
        ("drafter.target_layer_ids=[-1, 3]", "from 0 on"),
        ("drafter.init=[1, 2, 3]", "3 target layers for num_layers 2"),
        ("drafter.block_size=1", "drafter.block_size"),
        ("drafter.mask_token_id=-1", "drafter.mask_token_id"),
        ("optimiser.lr=0", "optimiser.lr"),
        ("optimiser.lr=.nan", "optimiser.lr"),
        ("optimiser.betas=[0.9, 1.0]", "betas"),
        ("optimiser.name=muon", "muon_lr"),
        ("optimiser.muon_lr=0.01", "muon_lr"),
        ("optimiser.clip=0", "optimiser.clip"),
        ("schedule.max_steps=10", "one of epochs and max_steps"),
        ("schedule.epochs=null", "one of epochs and max_steps"),
        ("schedule.warmup_ratio=1", "schedule.warmup_ratio"),
        ("batch.batch_tokens=30", "below data.max_length"),
        ("batch.micro_batches=0", "batch.micro_batches"),
        ("batch.anchors_per_row=0", "batch.anchors_per_row"),
        ("data.min_answer_tokens=41", "below 41 answer tokens"),
        ("data.held_out=0", "data.held_out"),
        ("precision=fp16", "precision"),
        ("seed=-1", "seed"),
        ("log_every=0", "log_every"),
        ("keep_last=0", "keep_last"),
        ("target.name=x", "target is a single value"),
        ("seed", "--set seed"),
        ("seed=[", "not YAML"),
    ],
)
def test_impossible_values_are_refused(tiny: str, override: str, complaint: str) -> None:
    assert complaint in refusal(tiny, override)


def test_a_curriculum_is_part_of_the_recipe_and_of_the_run(tiny: str) -> None:
    plain = load_recipe(tiny)
    curriculum = load_recipe(tiny, ["objective.earlier=[{name: full, until: 0.1}, {name: vat, until: 0.25}]"])
    assert plain.objective.names == ("auf",) and curriculum.objective.names == ("full", "vat", "auf")
    assert parse_recipe(curriculum.model_dump(mode="json"), "saved") == curriculum
    (difference,) = differences(plain, curriculum)
    assert difference.startswith("objective.earlier: [] here, [{")
    unbegun = plain.model_dump(mode="json")
    del unbegun["objective"]["earlier"]  # as a run of an earlier version saved it
    assert parse_recipe(unbegun, "saved") == plain


def test_a_curriculum_of_domino_is_of_its_own_objectives() -> None:
    name = "smollm2-135m-domino-b-auf"
    recipe = load_recipe(name, ["objective.earlier=[{name: decay, until: 0.25}]"])
    assert recipe.objective.names == ("decay", "b-auf")
    assert "vat is none of head domino" in refusal(name, "objective.earlier=[{name: vat, until: 0.25}]")


def test_init_beside_init_from_is_for_layers_on_top(tiny: str) -> None:
    grown = load_recipe(tiny, ["drafter.init=[1]", "drafter.init_from=drafters/x"]).drafter
    assert (grown.init, grown.init_from) == ((1,), "drafters/x")
    for init in ("[]", "[1, 2]", "[1, 2, 3]"):
        assert "beside init_from" in refusal(tiny, f"drafter.init={init}", "drafter.init_from=drafters/x")
    assert "init names 3 target layers" in refusal(tiny, "drafter.num_layers=2", "drafter.init=[1, 2, 3]")
    assert "init names 1 target layers" in refusal(tiny, "drafter.num_layers=2", "drafter.init=[1]")


def test_what_is_saved_is_read_back_as_the_same_recipe() -> None:
    saved = yaml.safe_load(yaml.safe_dump(TINY.model_dump(mode="json")))
    assert parse_recipe(saved, "saved") == TINY


def test_differences_name_the_fields_that_decide_the_weights() -> None:
    other = tiny_recipe(
        "some/target",
        "moved/answers.jsonl",
        optimiser={"lr": 0.02},
        drafter={"target_layer_ids": [1, 2]},
        log_every=5,
        keep_last=7,
        save_every=9,
        save_minutes=2.5,
        evaluate_every=11,
    )
    assert differences(TINY, other) == [
        "drafter.target_layer_ids: [1, 3] here, [1, 2] there",
        "optimiser.lr: 0.01 here, 0.02 there",
    ]


def test_with_sources_changes_nothing_else() -> None:
    changed = TINY.with_sources(["a", "b"])
    assert changed.data.sources == ("a", "b")
    assert without_sources(changed) == without_sources(TINY)


def without_sources(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump()
    del content["data"]["sources"]
    return content
