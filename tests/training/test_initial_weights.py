"""Where a drafter starts: the seed, target layers, an earlier drafter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_auf.errors import ConfigError, TargetError
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.loading import load_drafter
from sglang_auf.training.initial_weights import LAST_PRODUCTS, chosen, initial_drafter, shape_of
from sglang_auf.training.recipe import DrafterSettings
from tests.support.tiny_models import target_config, write_drafter, write_target
from tests.support.toy_tokenizer import toy_tokenizer
from tests.support.training_runs import tiny_recipe


def settings(**changes: Any) -> DrafterSettings:
    tiny = {"num_layers": 2, "target_layer_ids": [1, 2], "block_size": 4, "mask_token_id": 3}
    return DrafterSettings.model_validate(tiny | changes)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("models") / "target")


def start(target: Path, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    chosen = settings(**changes)
    return dict(initial_drafter(shape_of(chosen, target), chosen, target, seed).state_dict())


def test_random_weights_are_the_seeds(target: Path) -> None:
    first, again, other = start(target), start(target), start(target, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("layers", [(4, 0), (2, 3)])
def test_layers_of_the_target(target: Path, layers: Sequence[int]) -> None:
    """Each into the drafter's layer of its place, with the last norm; what a Llama lacks starts at 1."""
    found, theirs, random = start(target, init=layers), load_file(target / "model.safetensors"), start(target)
    for place, layer in enumerate(layers):
        for name, weight in ((name, weight) for name, weight in theirs.items() if f"layers.{layer}." in name):
            copied = found[name.replace(f"model.layers.{layer}.", f"layers.{place}.")]
            assert copied.dtype == torch.float32 and torch.equal(copied, weight.float())
        for norm in ("q_norm", "k_norm"):
            assert torch.equal(found[f"layers.{place}.self_attn.{norm}.weight"], torch.ones(16))
    assert torch.equal(found["norm.weight"], theirs["model.norm.weight"].float())
    assert torch.equal(found["fc.weight"], random["fc.weight"])


def rewritten(target: Path, directory: Path, change: Any) -> Path:
    """The target with `change` applied to its weights."""
    weights = load_file(target / "model.safetensors")
    change(weights)
    directory.mkdir()
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text((target / "config.json").read_text())
    return directory


@pytest.mark.parametrize(
    ("layers", "change", "complaint"),
    [
        ([1, 5], lambda weights: None, "no model.layers.5.input_layernorm.weight"),
        ([1, 1], lambda weights: None, "[1, 1]"),
        (
            [1, 2],
            lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(100, 64)}),
            "model.layers.2.mlp.up_proj.weight of shape [100, 64] instead of [128, 64]",
        ),
        (
            [1, 2],
            lambda weights: weights.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}),
            "model.layers.1.self_attn.q_proj.bias, which a drafter lacks",
        ),
    ],
)
def test_layers_that_do_not_fit(target: Path, tmp_path: Path, layers: list[int], change: Any, complaint: str) -> None:
    other = rewritten(target, tmp_path / "other", change)
    with pytest.raises(ConfigError) as caught:
        start(other, init=layers)
    assert complaint in caught.value.found


def test_an_earlier_drafter(target: Path, tmp_path: Path) -> None:
    earlier = write_drafter(tmp_path / "drafter", block_size=8)  # the block size is in no weight
    found = start(target, num_layers=1, init_from=str(earlier))
    stored = load_file(earlier / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name].float()) for name in stored)


def test_another_block_or_mask_than_the_earlier_drafters_is_warned_of(
    target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = write_drafter(tmp_path / "drafter", block_size=8)
    start(target, num_layers=1, init_from=str(earlier), block_size=8)
    assert not caplog.records
    start(target, num_layers=1, init_from=str(earlier), mask_token_id=5)
    assert [record.message for record in caplog.records] == [
        f"drafter.init_from {earlier} goes on with block_size 4 instead of 8 and mask_token_id 5 instead of 3: "
        "it has to learn that"
    ]


@pytest.mark.parametrize("init", ["random", [4, 2]])
def test_layers_on_top_of_an_earlier_drafter(target: Path, tmp_path: Path, init: Any) -> None:
    """They add nothing before the first step, in which what they add can be learnt."""
    stored = write_drafter(tmp_path / "drafter")
    chosen = settings(num_layers=3, init=init, init_from=str(stored))
    earlier = load_drafter(stored)
    shape = shape_of(chosen, target).model_copy(update={"rms_norm_eps": earlier.config.rms_norm_eps})
    grown = initial_drafter(shape, chosen, target, seed=0)
    if init != "random":
        theirs = load_file(target / "model.safetensors")
        for place, layer in ((1, 4), (2, 2)):
            up = theirs[f"model.layers.{layer}.mlp.up_proj.weight"]
            assert torch.equal(grown.state_dict()[f"layers.{place}.mlp.up_proj.weight"], up.float())
    generator = torch.Generator().manual_seed(0)
    features, blocks = torch.randn(1, 9, 2 * 64, generator=generator), torch.randn(1, 2, 4, 64, generator=generator)
    anchors = torch.tensor([[4, 7]])
    before, after = (drafter(features, blocks, anchors) for drafter in (earlier, grown))
    assert torch.equal(before, after)
    after.square().sum().backward()
    for layer in grown.layers[1:]:
        assert all(layer.get_parameter(name).grad.abs().sum() > 0 for name in LAST_PRODUCTS)


def test_target_layers_for_others_than_the_new(target: Path, tmp_path: Path) -> None:
    earlier = write_drafter(tmp_path / "drafter")
    with pytest.raises(ConfigError, match="lacks 2 of the recipe's layers"):
        start(target, num_layers=3, init=[2], init_from=str(earlier))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"target_layer_ids": [1, 3]}, "target_layer_ids (1, 2) instead of (1, 3)"),
        ({"head": "domino", "gru_hidden_dim": 8, "emb_dim": 4}, "head dflash instead of domino"),
    ],
)
def test_an_earlier_drafter_of_another_shape(
    target: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    earlier = write_drafter(tmp_path / "drafter")
    with pytest.raises(ConfigError) as caught:
        start(target, **{"num_layers": 1, "init_from": str(earlier), **changes})
    assert complaint in caught.value.found


def test_an_earlier_drafter_of_more_layers(target: Path, tmp_path: Path) -> None:
    earlier = write_drafter(tmp_path / "drafter")
    config, weights = json.loads((earlier / "config.json").read_text()), load_file(earlier / "model.safetensors")
    weights |= {name.replace("layers.0.", "layers.1."): weight.clone() for name, weight in weights.items()}
    (earlier / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "layer_types": None}))
    save_file(weights, earlier / "model.safetensors")
    with pytest.raises(ConfigError, match="num_hidden_layers 2 instead of 1"):
        start(target, num_layers=1, init_from=str(earlier))


def test_the_shape_is_the_targets(target: Path) -> None:
    config = shape_of(settings(), target)
    content = json.loads((target / "config.json").read_text())
    assert isinstance(config, DrafterConfig)
    assert (config.hidden_size, config.vocab_size) == (content["hidden_size"], content["vocab_size"])
    assert (config.num_hidden_layers, config.target_layer_ids, config.block_size) == (2, (1, 2), 4)


@pytest.mark.parametrize(
    ("changes", "taps", "error", "complaint"),
    [
        ({"architectures": ["Gemma3ForCausalLM"]}, [1, 2], TargetError, "Gemma3ForCausalLM"),
        ({}, [1, 4], ConfigError, r"0\.\.3"),
    ],
)
def test_taps_are_checked_before_any_weight_is_read(
    tmp_path: Path, changes: dict[str, Any], taps: list[int], error: type[Exception], complaint: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target_config() | changes))
    with pytest.raises(error, match=complaint):
        shape_of(settings(target_layer_ids=taps), tmp_path)


def test_a_refusal_of_taps_or_mask_says_what_chooses_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target_config()))
    for name, value in (("target_layer_ids", [1, 9]), ("mask_token_id", 151669)):
        with pytest.raises(ConfigError) as caught:
            shape_of(settings(**{name: value}), tmp_path)
        assert f"--set drafter.{name}=auto" in caught.value.remedy


@pytest.mark.parametrize(
    ("depth", "architecture", "layers", "taps"),
    [
        (36, "Qwen3ForCausalLM", 5, (1, 9, 17, 25, 33)),
        (30, "LlamaForCausalLM", 1, (15,)),
        (5, "LlamaForCausalLM", 5, (1, 2)),
        (2, "LlamaForCausalLM", 3, (0,)),
        (2, "GptOssForCausalLM", 3, (0, 1)),
    ],
)
def test_taps_are_chosen_among_those_of_the_target(
    tmp_path: Path, depth: int, architecture: str, layers: int, taps: tuple[int, ...]
) -> None:
    config = target_config() | {"architectures": [architecture], "num_hidden_layers": depth}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = tiny_recipe(str(tmp_path), "no data", drafter={"num_layers": layers, "target_layer_ids": "auto"})
    found = chosen(recipe, tmp_path)
    assert found == recipe.with_drafter(target_layer_ids=taps)
    assert shape_of(found.drafter, tmp_path).target_layer_ids == taps


def test_the_mask_is_chosen_from_the_targets_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target_config(vocabulary=300)))
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    recipe = tiny_recipe(str(tmp_path), "no data", drafter={"mask_token_id": "auto"})
    found = chosen(recipe, tmp_path)
    assert found == recipe.with_drafter(mask_token_id=len(tokenizer))
    assert shape_of(found.drafter, tmp_path).mask_token_id == len(tokenizer)


def test_what_a_recipe_says_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target_config()))
    recipe = tiny_recipe(str(tmp_path), "no data")
    assert chosen(recipe, tmp_path) == recipe


def test_a_drafter_that_starts_at_random_has_its_own_rotary_embedding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target_config() | {"partial_rotary_factor": 0.25}))
    config = shape_of(settings(), tmp_path)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        shape_of(settings(init=[1, 2]), tmp_path)


def test_the_language_model_of_a_multimodal_target(tmp_path: Path) -> None:
    text = target_config()
    nested = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "llm_config": text}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert shape_of(settings(), tmp_path).hidden_size == text["hidden_size"]
