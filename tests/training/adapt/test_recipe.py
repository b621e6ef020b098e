"""The recipe of an adaptation, from a drafter's own recipe or from its card alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sglang_auf.checkpoints.card import load_card
from sglang_auf.errors import ConfigError
from sglang_auf.training.adapt.recipe import recipe_for
from sglang_auf.training.recipe import Recipe
from tests.support.tiny_models import write_drafter
from tests.support.training_runs import tiny_recipe

SHIPPED = Path(__file__).parents[3] / "drafters" / "smollm2-135m"


def made(drafter: Path, target: str | None = None, overrides: tuple[str, ...] = ()) -> Recipe:
    return recipe_for(drafter, load_card(drafter), target, [Path("rows.jsonl")], overrides)


def test_the_shipped_drafter_goes_on_as_it_was_trained() -> None:
    recipe = made(SHIPPED)
    own = yaml.safe_load((SHIPPED / "recipe.yaml").read_text())
    assert (recipe.target, recipe.data.thinking, recipe.data.max_length) == ("smollm2-135m", "off", 1024)
    assert recipe.drafter.init_from == str(SHIPPED)
    assert (recipe.drafter.init, recipe.drafter.num_layers) == ("random", 2)
    assert recipe.optimiser.model_dump() == {**own["optimiser"], "betas": tuple(own["optimiser"]["betas"])}
    assert recipe.batch.batch_tokens == own["batch"]["batch_tokens"]
    assert recipe.data.sources == ("rows.jsonl",)
    assert (recipe.schedule.epochs, recipe.schedule.max_steps) == (1, None)


def test_a_curriculum_is_not_begun_again(tmp_path: Path) -> None:
    drafter = write_drafter(tmp_path / "drafter")
    curriculum = {"name": "vat", "earlier": [{"name": "decay", "until": 0.5}], "gamma": 3.0}
    recipe = tiny_recipe("target", "data", objective=curriculum)
    (drafter / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    objective = made(drafter).objective
    assert (objective.name, objective.earlier, objective.gamma) == ("auf", (), 3.0)
    assert made(drafter, overrides=("objective.name=vat",)).objective.name == "vat"
    assert made(drafter, target="other").target == "other"


def test_a_drafter_without_a_recipe_has_its_shape_and_a_target(tmp_path: Path) -> None:
    domino = write_drafter(
        tmp_path / "drafter", projector_type="domino", pure_draft_prefix_len=1, shift_label=True, **DOMINO
    )
    with pytest.raises(ConfigError, match="give --target"):
        made(domino)
    recipe = made(domino, target="target")
    assert recipe.objective.name == "b-auf"
    shape = recipe.drafter.model_dump(include={"num_layers", "block_size", "mask_token_id", "head", "target_layer_ids"})
    assert shape == {
        "num_layers": 1,
        "block_size": 4,
        "mask_token_id": 3,
        "head": "domino",
        "target_layer_ids": (1, 2),
    }
    assert (recipe.drafter.gru_hidden_dim, recipe.drafter.emb_dim) == (8, 4)


DOMINO = {"gru_hidden_dim": 8, "emb_dim": 4}
