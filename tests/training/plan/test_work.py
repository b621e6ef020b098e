"""The counted work against PyTorch's own count of a real step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sglang_auf.training.data.loader import BatchMaker
from sglang_auf.training.initial_weights import initial_drafter, shape_of
from sglang_auf.training.losses.step import TrainingStep
from sglang_auf.training.plan.work import work
from sglang_auf.training.recipe import load_recipe
from sglang_auf.training.text.reader import Conversation
from tests.support import qwen3_8b
from tests.support.training_runs import tiny_recipe, write_models


@pytest.mark.parametrize("recompute", [False, True])
def test_products_are_those_of_a_real_step(tmp_path: Path, recompute: bool) -> None:
    """Attention is counted as if a block saw half of the text, so it is left out of the comparison."""
    sizes = {"batch_rows": 2, "anchors_per_row": 12, "recompute": recompute}
    recipe = tiny_recipe(*write_models(tmp_path), batch=sizes, objective={"name": "full"})
    target = Path(recipe.target)
    config = shape_of(recipe.drafter, target)
    made = BatchMaker(recipe, target, torch.device("cpu"))
    drafter = initial_drafter(config, recipe.drafter, target, 0)
    drafter.recompute = recompute
    step = TrainingStep(drafter, made.target.embedding, made.target.head, recipe.objective)
    chats = [Conversation(str(row), [5] * 40, [True] * 40) for row in range(2)]
    with FlopCounterMode(display=False) as counter:
        terms = step(*made.with_anchors(chats, 0))
        terms.numerators.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    attention = {torch.ops.aten.bmm, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}
    products = sum(count for name, count in counted.items() if name not in attention)
    planned = work(recipe, config, target)
    planned["target"] -= 2.0 * 4 * 2 * 40**2 * 64  # 4 layers, 2 rows of 40 tokens, 64 wide: its attention
    del planned["drafter: attention"]
    assert products == pytest.approx(sum(planned.values()), rel=0.1)


def test_what_is_left_out(tmp_path: Path) -> None:
    recipe = load_recipe("qwen3-8b-dflash-auf")
    target = qwen3_8b.write_target(tmp_path)
    config = shape_of(recipe.drafter, target)
    stops = work(recipe, config, target)
    everything = work(load_recipe("qwen3-8b-dflash-auf", ["objective.name=decay"]), config, target)
    assert everything["head"] == 4 * stops["head"]
    assert "target" not in work(recipe.model_copy(update={"features": "a-cache"}), config, target)
    kept = work(load_recipe("qwen3-8b-dflash-auf", ["batch.recompute=false"]), config, target)
    assert kept["drafter: products"] == pytest.approx(0.75 * stops["drafter: products"])
    assert sum(stops.values()) / 1e12 == pytest.approx(474.1, abs=0.1)


def test_the_head_of_a_curriculum_is_the_mean_over_its_steps(tmp_path: Path) -> None:
    target = qwen3_8b.write_target(tmp_path)
    name = "qwen3-8b-dflash-auf"
    config = shape_of(load_recipe(name).drafter, target)
    curriculum = load_recipe(name, ["objective.earlier=[{name: decay, until: 0.2}]"])
    auf, decay = (work(load_recipe(name, [f"objective.name={each}"]), config, target) for each in ("auf", "decay"))
    expected = 0.2 * decay["head"] + 0.8 * auf["head"]
    assert work(curriculum, config, target)["head"] == pytest.approx(expected)
