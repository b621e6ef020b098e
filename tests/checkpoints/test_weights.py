"""The check of weights against the shipped drafter, tampered copies, and SGLang's own model class."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sglang_auf.checkpoints.weights import (
    check_finite,
    check_weights,
    default_target_layer_ids,
    expected_weights,
    tapped_layers,
)
from sglang_auf.errors import CardError

SHIPPED = Path(__file__).parents[2] / "drafters" / "smollm2-135m"

TINY: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "block_size": 4,
    "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2, 5]},
    "num_target_layers": 6,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "vocab_size": 32,
    "attention_bias": False,
}
DOMINO = {
    "projector_type": "domino",
    "gru_hidden_dim": 5,
    "emb_dim": 6,
    "shift_label": True,
    "pure_draft_prefix_len": 1,
}


def tiny(dflash: Mapping[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    """TINY with some keys replaced, in dflash_config and at the top level."""
    return {**TINY, **top, "dflash_config": {**TINY["dflash_config"], **(dflash or {})}}


def tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in expected_weights(config).items()}


def saved(path: Path, weights: dict[str, np.ndarray], name: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    save_file(weights, path / name)
    return path


def refusal(path: Path, config: Mapping[str, Any]) -> CardError:
    with pytest.raises(CardError) as caught:
        check_weights(path, config)
    assert caught.value.expected
    return caught.value


def test_the_shipped_drafter_is_covered() -> None:
    config = json.loads((SHIPPED / "config.json").read_text())
    assert check_weights(SHIPPED, config) == []


def test_weights_of_the_public_qwen3_8b_drafters() -> None:
    """Shapes of the checkpoints on the hub (z-lab DFlash, Domino)."""
    qwen3_8b = tiny(
        {
            "target_layer_ids": [1, 9, 17, 25, 33],
            **DOMINO,
            "gru_hidden_dim": 1024,
            "emb_dim": 256,
        },
        num_target_layers=36,
        num_hidden_layers=5,
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    weights = expected_weights(qwen3_8b)
    assert len(weights) == 5 * 11 + 3 + 4
    assert weights["fc.weight"] == (4096, 20480)
    assert weights["layers.4.self_attn.k_proj.weight"] == (1024, 4096)
    assert weights["layers.0.mlp.down_proj.weight"] == (4096, 12288)
    assert weights["layers.0.self_attn.q_norm.weight"] == (128,)
    assert weights["prefix_gru.weight_ih_l0"] == (3072, 4096)
    assert weights["prefix_gru.weight_hh_l0"] == (3072, 1024)
    assert weights["embed_proj.0.weight"] == (256, 5120)
    assert weights["embed_proj.2.weight"] == (151936, 256)


@pytest.mark.parametrize("config", [tiny(), tiny(DOMINO), tiny(attention_bias=True)], ids=["dflash", "domino", "bias"])
def test_what_is_expected_is_accepted(tmp_path: Path, config: dict[str, Any]) -> None:
    assert check_weights(saved(tmp_path, tensors(config)), config) == []


def test_prefix_aliases_and_rotary_tables_are_read_as_sglang_reads_them(tmp_path: Path) -> None:
    weights = {f"model.{name}": value for name, value in tensors(TINY).items()}
    weights["encoder.fc.weight"] = weights.pop("model.fc.weight")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    assert check_weights(saved(tmp_path, weights), TINY) == []


def test_missing_weights_are_named_and_counted(tmp_path: Path) -> None:
    weights = tensors(TINY)
    gone = [name for name in weights if name.startswith("layers.1.")]
    for name in gone:
        del weights[name]
    found = refusal(saved(tmp_path, weights), TINY).found
    assert f"{len(gone)} missing" in found and gone[0] in found and "unknown" not in found


@pytest.mark.parametrize("name", ["layers.2.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias", "d2t", "mask"])
def test_unknown_weights_are_refused(tmp_path: Path, name: str) -> None:
    found = refusal(saved(tmp_path, {**tensors(TINY), name: np.zeros(3, np.float32)}), TINY).found
    assert "1 unknown" in found and name in found


def test_domino_weights_without_a_domino_config_are_refused(tmp_path: Path) -> None:
    assert "4 unknown" in refusal(saved(tmp_path, tensors(tiny(DOMINO))), TINY).found


def test_a_wrong_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    weights = {**tensors(TINY), "fc.weight": np.zeros((16, 32), np.float32)}
    found = refusal(saved(tmp_path, weights), TINY).found
    assert "1 misshapen: fc.weight [16, 32] instead of [16, 48]" in found


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    weights = {**tensors(TINY), "norm.weight": np.zeros(16, np.int8)}
    assert "not float: norm.weight I8" in refusal(saved(tmp_path, weights), TINY).found


def test_copies_of_the_targets_tables_are_a_warning_only_in_the_targets_shape(tmp_path: Path) -> None:
    copies = {
        "model.embed_tokens.weight": np.zeros((32, 16), np.float32),
        "lm_head.weight": np.zeros((32, 16), np.float32),
    }
    warnings = check_weights(saved(tmp_path, {**tensors(TINY), **copies}), TINY)
    assert len(warnings) == 2 and all("not read" in warning for warning in warnings)
    pruned = {**tensors(TINY), "lm_head.weight": np.zeros((8, 16), np.float32)}
    assert "unknown: lm_head.weight" in refusal(saved(tmp_path, pruned), TINY).found


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    weights = tensors(TINY)
    names = sorted(weights)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for shard, held in shards.items():
        saved(tmp_path, {name: weights[name] for name in held}, shard)
    saved(tmp_path, {"unlisted": np.zeros(1, np.float32)}, "other.safetensors")
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_weights(tmp_path, TINY) == []

    (tmp_path / "b.safetensors").unlink()
    error = refusal(tmp_path, TINY)
    assert "lacks b.safetensors" in error.found and "a.safetensors" in error.found


def test_a_weight_in_two_files_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, tensors(TINY))
    saved(tmp_path, {"model.norm.weight": np.zeros(16, np.float32)}, "again.safetensors")
    found = refusal(tmp_path, TINY).found
    assert "1 doubled" in found and "again.safetensors" in found and "model.safetensors" in found


@pytest.mark.parametrize("cut", [1, 1000, 16_000_000], ids=["last byte", "tail", "almost all"])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    whole = (SHIPPED / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-cut])
    config = json.loads((SHIPPED / "config.json").read_text())
    assert "truncated" in refusal(tmp_path, config).found


def test_a_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(tmp_path, TINY).remedy


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    error = refusal(tmp_path, TINY)
    assert "pytorch_model.bin" in error.found and "pickle" in error.expected
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "config, mentioned",
    [
        (tiny(architectures=["DominoDraftModel"]), "sglang-auf convert"),
        (tiny(architectures=["DFlash2DraftModel"]), "--speculative-algorithm DFLASH"),
        (tiny(architectures=["DFlashLagunaForCausalLM"]), "--speculative-algorithm DFLASH"),
        (tiny(architectures=None), "--speculative-algorithm DFLASH"),
        (tiny({"projector_type": "markov"}), "markov"),
        (tiny({"conv_kernel_size": 2, "conv_group_size": 4}), "conv_kernel_size"),
        (tiny({"selector_rank": 8, "selector_top_k": 4}), "selector_rank"),
        (tiny({"attention_sink_bias": True}), "attention_sink_bias"),
        (tiny(quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (tiny({**DOMINO, "pure_draft_prefix_len": 0}), "pure_draft_prefix_len 0"),
        (tiny({**DOMINO, "shift_label": None}), "shift_label None"),
        (tiny({**DOMINO, "emb_dim": None}), "emb_dim None"),
        (tiny(DOMINO, emb_dim=7), "emb_dim 6"),
        (tiny(head_dim=None), "head_dim None"),
        (tiny(hidden_size="16"), "hidden_size '16'"),
        (tiny({"target_layer_ids": [5, 2, 1]}), "[5, 2, 1]"),
        (tiny({"target_layer_ids": [1, 1, 2]}), "[1, 1, 2]"),
        (tiny({"target_layer_ids": []}), "[]"),
        (tiny({"target_layer_ids": "1,2"}), "'1,2'"),
        ({**TINY, "dflash_config": [1]}, "dflash_config [1]"),
    ],
)
def test_configs_that_are_not_served_are_refused(config: dict[str, Any], mentioned: str) -> None:
    with pytest.raises(CardError) as caught:
        expected_weights(config)
    assert mentioned in str(caught.value)


def test_default_taps() -> None:
    assert default_target_layer_ids(36, 5) == [1, 9, 17, 25, 33]
    assert default_target_layer_ids(30, 1) == [15]
    assert tapped_layers(tiny({"target_layer_ids": None})) == [1, 3]
    assert tapped_layers(tiny({"target_layer_ids": None}, num_target_layers=None)) is None
    with pytest.raises(CardError):  # five taps of six layers would name one twice
        tapped_layers(tiny({"target_layer_ids": None}, num_hidden_layers=5))


@pytest.fixture
def sglang_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """Builds SGLang's own drafter class on the CPU, without an engine. RoPE has no weights and is left out."""
    import sglang.srt.models.dflash as upstream
    from sglang.srt.runtime_context import get_context
    from torch import nn
    from transformers import AutoConfig

    monkeypatch.setattr(upstream, "get_rope", lambda *args, **kwargs: nn.Identity())

    def build(config: dict[str, Any]) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return upstream.DFlashDraftModel(AutoConfig.from_pretrained(tmp_path))

    context = get_context()
    with (
        context.override_server_args(),
        context.parallel.override(tp_size=1, tp_rank=0, attn_tp_size=1, attn_tp_rank=0),
    ):
        yield build


def values_after_loading(model: Any, weights: Mapping[str, np.ndarray]) -> set[float]:
    """Every value in the model after SGLang loaded `weights` into it; -1 stands for "never written"."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1.0)
    model.load_weights((name, torch.from_numpy(value)) for name, value in weights.items())
    return {value for parameter in model.parameters() for value in parameter.unique().tolist()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny(DOMINO),
        tiny(attention_bias=True),
        tiny({"target_layer_ids": None}, num_target_layers=None, num_hidden_layers=4),
        json.loads((SHIPPED / "config.json").read_text()),
    ],
    ids=["dflash", "domino", "bias", "default taps", "shipped"],
)
def test_the_expected_weights_are_what_sglangs_model_reads(
    sglang_model: Callable[[dict[str, Any]], Any], config: dict[str, Any]
) -> None:
    """Each weight is filled with another number: all numbers arrive, and no place stays unwritten."""
    numbered = {
        name: np.full(shape, number, np.float32)
        for number, (name, shape) in enumerate(expected_weights(config).items())
    }
    assert values_after_loading(sglang_model(config), numbered) == set(map(float, range(len(numbered))))


@pytest.mark.filterwarnings("ignore")
def test_what_we_refuse_sglang_would_take_in_silence(sglang_model: Callable[[dict[str, Any]], Any]) -> None:
    """The reason for this module. When this fails, SGLang complains itself and the check may be simplified."""
    weights = tensors(TINY)
    del weights["layers.1.self_attn.q_norm.weight"]
    weights["layers.0.self_attn.q_proj.bias"] = np.full(32, 7, np.float32)
    weights["lm_head.weight"] = np.full((32, 16), 8, np.float32)
    assert values_after_loading(sglang_model(TINY), weights) == {-1.0, 0.0}


def test_the_shipped_drafter_is_small() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 25_000_000


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_finite_number_is_found(value: float, tmp_path: Path) -> None:
    weights = tensors(TINY)
    check_finite(saved(tmp_path / "drafter", weights))
    weights["norm.weight"][3] = value
    with pytest.raises(CardError, match=r"1 with infinite values or NaN: norm\.weight"):
        check_finite(saved(tmp_path / "drafter", weights))


def test_a_file_that_ends_early_cannot_be_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "drafter", tensors(TINY))
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(CardError, match="cannot be read"):
        check_finite(path)
