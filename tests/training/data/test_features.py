"""Features against what transformers itself calls hidden states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.errors import ConfigError, TargetError
from sglang_auf.models.products import bf16_products
from sglang_auf.training.data import features as module
from sglang_auf.training.data.features import FrozenTarget, OnlineFeatures, find_target
from tests.support.tiny_models import LAYERS, VOCABULARY, target_config, write_gemma4, write_qwen2, write_target

TAPS = (0, 2, 3)
LENGTHS = (9, 17, 1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("targets") / "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases at queries, keys and values."""
    return write_qwen2(tmp_path_factory.mktemp("targets") / "qwen2")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings, and norms on queries and keys."""
    directory = tmp_path_factory.mktemp("targets") / "qwen3"
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings whose rows are scaled by sqrt(40), which no dtype holds exactly; layers with a sliding window."""
    return write_gemma4(tmp_path_factory.mktemp("targets") / "gemma4")


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma4"])
def target(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


def batch(seed: int = 0) -> tuple[list[str], Tensor, Tensor]:
    """Right padded, with tokens other than 0."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return [f"row{row}" for row in range(len(LENGTHS))], input_ids, torch.tensor(LENGTHS)


def reference(directory: Path, dtype: torch.dtype, input_ids: Tensor) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad(), bf16_products("cpu"):
        return model(input_ids, output_hidden_states=True, use_cache=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_features_are_the_outputs_of_the_tapped_layers(target: Path, dtype: str) -> None:
    ids, input_ids, lengths = batch()
    source = OnlineFeatures(target, TAPS, dtype=dtype)
    found = source(ids, input_ids, lengths)
    assert found.dtype == getattr(torch, dtype)
    assert found.shape == (*input_ids.shape, source.width) == (*input_ids.shape, len(TAPS) * source.hidden_size)
    states = reference(target, found.dtype, input_ids).hidden_states
    expected = torch.cat([states[layer + 1] for layer in TAPS], dim=-1)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(found[row, :length], expected[row, :length])
        assert not found[row, length:].any()


def test_a_padded_row_is_the_row_alone(target: Path) -> None:
    """Right padding under causal attention needs no mask."""
    ids, input_ids, lengths = batch()
    source = OnlineFeatures(target, TAPS, dtype="float32")
    together = source(ids, input_ids, lengths)
    for row, length in enumerate(LENGTHS):
        alone = source(ids[row : row + 1], input_ids[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)

    other_padding = input_ids.clone()
    for row, length in enumerate(LENGTHS):
        other_padding[row, length:] = 1
    assert not torch.equal(other_padding, input_ids)
    assert torch.equal(source(ids, other_padding, lengths), together)


@pytest.mark.parametrize("tokens", [1, 34])
def test_a_batch_may_be_computed_in_parts(llama: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    _, input_ids, lengths = batch()
    source = OnlineFeatures(llama, TAPS, dtype="float32", argmax=True)
    features, argmax = source.with_argmax(input_ids, lengths)
    monkeypatch.setattr(module, "CPU_TOKENS", tokens)
    in_parts, argmax_in_parts = source.with_argmax(input_ids, lengths)
    torch.testing.assert_close(in_parts, features, rtol=1e-4, atol=1e-4)
    assert torch.equal(argmax_in_parts, argmax)


def test_layers_after_the_last_tap_are_not_computed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = LlamaDecoderLayer.forward

    def counted(self: LlamaDecoderLayer, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.self_attn.layer_idx)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    ids, input_ids, lengths = batch()
    OnlineFeatures(llama, (0, 1))(ids[:1], input_ids[:1], lengths[:1])
    assert calls == [0, 1]


def test_argmax_is_the_target_s_own_next_token(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGIT_ROWS", 4)
    ids, input_ids, lengths = batch()
    source = OnlineFeatures(target, TAPS, dtype="float32", argmax=True)
    features, argmax = source.with_argmax(input_ids, lengths)
    expected = reference(target, torch.float32, input_ids).logits.argmax(-1)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(argmax[row, :length], expected[row, :length])
        assert not argmax[row, length:].any()
    assert torch.equal(features, OnlineFeatures(target, TAPS, dtype="float32")(ids, input_ids, lengths))


def test_what_a_trainer_borrows(llama: Path, qwen3: Path) -> None:
    source = OnlineFeatures(llama, TAPS)
    weights = load_file(llama / "model.safetensors")
    assert torch.equal(source.embedding, weights["model.embed_tokens.weight"])
    assert torch.equal(source.head, weights["lm_head.weight"])
    assert not source.embedding.requires_grad and not source.head.requires_grad
    assert source.facts == TargetFacts.of(llama)
    assert (source.hidden_size, source.vocab_size) == (64, VOCABULARY)
    assert source.config["num_hidden_layers"] == LAYERS
    assert json.loads(json.dumps(source.config))["rms_norm_eps"] == 1e-5

    tied = FrozenTarget(qwen3, layers=0)
    assert tied.head is tied.embedding
    assert torch.equal(tied.embedding, load_file(qwen3 / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_trainer_borrows_the_rows_that_the_target_embeds_with(gemma4: Path, dtype: str) -> None:
    """The head is the weight itself, though the target ties the two."""
    source = OnlineFeatures(gemma4, TAPS, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(gemma4, dtype=dtype)
    embedding, ids = model.get_input_embeddings(), torch.arange(VOCABULARY)
    assert torch.equal(source.embedding[ids], embedding(ids))
    assert torch.equal(source.head, embedding.weight)
    assert source.embedding.dtype == source.head.dtype == getattr(torch, dtype)
    torch.testing.assert_close(
        source.embedding.float(), source.head.float() * source.facts.embedding_scale, rtol=2**-7, atol=0
    )
    assert not source.embedding.requires_grad


def test_sglang_s_embedding_of_gemma_4_gives_the_same_rows_but_for_a_rounding(gemma4: Path) -> None:
    from sglang.srt.models.gemma4_causal import Gemma4TextScaledWordEmbedding

    source, ids = FrozenTarget(gemma4, layers=0), torch.arange(VOCABULARY)
    theirs = Gemma4TextScaledWordEmbedding(VOCABULARY, 40, 0, embed_scale=40**0.5).bfloat16()
    theirs.weight.data = source.head
    torch.testing.assert_close(source.embedding[ids], theirs(ids), rtol=2**-7, atol=0)


def test_a_drafter_can_be_trained_on_them(llama: Path) -> None:
    ids, input_ids, lengths = batch()
    features = OnlineFeatures(llama, TAPS)(ids, input_ids, lengths)
    assert not features.requires_grad
    weight = torch.ones(features.shape[-1], dtype=features.dtype, requires_grad=True)
    (features * weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layers", [(), (LAYERS - 1,), (1, LAYERS), (-1,), (2, 1), (1, 1)])
def test_layers_that_cannot_be_tapped(llama: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"0\.\.3") as caught:
        OnlineFeatures(llama, layers)
    assert str(list(layers)) in caught.value.found


@pytest.mark.parametrize(
    ("architecture", "error"), [("Gemma3ForCausalLM", TargetError), ("MuseGlimmerForCausalLM", ConfigError)]
)
def test_targets_that_sglang_does_not_tap_as_the_trainer_does(
    tmp_path: Path, architecture: str, error: type[Exception]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(target_config() | {"architectures": [architecture]}))
    with pytest.raises(error, match=architecture):
        OnlineFeatures(tmp_path, TAPS)


def test_an_unknown_dtype(llama: Path) -> None:
    with pytest.raises(ConfigError, match="int8"):
        OnlineFeatures(llama, TAPS, dtype="int8")


def test_no_target_there(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"config\.json"):
        OnlineFeatures(tmp_path, TAPS)
    with pytest.raises(TargetError, match="no directory"):
        find_target(str(tmp_path / "absent"))


def test_a_target_without_weights(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    with pytest.raises(TargetError, match="cannot load"):
        OnlineFeatures(tmp_path, TAPS)


def test_a_target_that_lacks_one_weight(llama: Path, tmp_path: Path) -> None:
    """transformers would fill it with random numbers."""
    shutil.copy(llama / "config.json", tmp_path)
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        OnlineFeatures(tmp_path, TAPS)


def test_a_damaged_target(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(TargetError, match="cannot load"):
        OnlineFeatures(tmp_path, TAPS)
