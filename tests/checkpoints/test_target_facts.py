"""The facts read from a target's files, whoever wrote them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_auf.checkpoints.target_facts import TargetFacts, chat_template_hash, tokenizer_hash
from sglang_auf.errors import TargetError

# SmolLM2-135M-Instruct as the hub has it, in the fields that count.
HUB: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "rope_theta": 100000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
}
# The same model, de-quantised from a GGUF file and saved by transformers 5.
FROM_GGUF: dict[str, Any] = {
    **{key: value for key, value in HUB.items() if key not in ("rope_theta", "torch_dtype", "architectures")},
    "head_dim": 64,
    "rms_norm_eps": 9.999999747378752e-06,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "dtype": "bfloat16",
}
SHIPPED_CARD = Path(__file__).parents[2] / "drafters" / "smollm2-135m" / "auf_card.json"


def facts(directory: Path, config: object, **files: str) -> TargetFacts:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return TargetFacts.of(directory)


def test_facts_of_a_plain_target(tmp_path: Path) -> None:
    found = facts(tmp_path / "smol", HUB)
    assert (found.name, found.hub_id, found.revision) == ("smol", None, None)
    assert (found.model_type, found.hidden_size, found.num_layers, found.vocab_size) == ("llama", 576, 30, 49152)
    assert (found.max_position_embeddings, found.dtype, found.chat_template_hash) == (8192, "bfloat16", None)


@pytest.mark.parametrize(("architectures", "tappable"), [(["LlamaForCausalLM"], 29), (["GptOssForCausalLM"], 30)])
def test_the_architecture_says_what_can_be_tapped(tmp_path: Path, architectures: list[str], tappable: int) -> None:
    found = facts(tmp_path, {"architectures": architectures, "text_config": {**HUB, "architectures": ["Other"]}})
    assert (found.architecture, found.tappable_layers) == (architectures[0], tappable)


def test_a_target_that_names_no_architecture(tmp_path: Path) -> None:
    found = facts(tmp_path, FROM_GGUF)
    assert (found.architecture, found.tappable_layers) == (None, 29)


def test_a_target_that_sglang_cannot_tap(tmp_path: Path) -> None:
    found = facts(tmp_path, {**HUB, "architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(TargetError, match="GPT2LMHeadModel"):
        _ = found.tappable_layers


def test_the_embedding_of_gemma_4_is_scaled(tmp_path: Path) -> None:
    assert facts(tmp_path / "llama", HUB).embedding_scale == 1
    assert facts(tmp_path / "gemma", {**HUB, "architectures": ["Gemma4ForCausalLM"]}).embedding_scale == 24


def test_the_config_hash_does_not_depend_on_who_wrote_the_file(tmp_path: Path) -> None:
    hub, gguf = facts(tmp_path / "hub", HUB), facts(tmp_path / "gguf", FROM_GGUF)
    nested = facts(tmp_path / "nested", {"model_type": "vision", "text_config": HUB})
    longer = facts(tmp_path / "longer", {**HUB, "max_position_embeddings": 131072})
    assert hub.config_hash == gguf.config_hash == nested.config_hash == longer.config_hash
    assert hub.config_hash == json.loads(SHIPPED_CARD.read_text())["target_config_hash"]


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"hidden_size": 640},
        {"num_hidden_layers": 32},
        {"num_attention_heads": 18},
        {"num_key_value_heads": 9},
        {"head_dim": 32},
        {"intermediate_size": 2048},
        {"vocab_size": 49153},
        {"rope_theta": 10000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_config_hash_sees_another_shape(tmp_path: Path, change: dict[str, Any]) -> None:
    assert facts(tmp_path / "a", HUB).config_hash != facts(tmp_path / "b", {**HUB, **change}).config_hash


def test_rope_theta_split_by_layer_type(tmp_path: Path) -> None:
    split = {"full_attention": {"rope_theta": 100000.0}, "sliding_attention": {"rope_theta": 10000.0}}
    config = {key: value for key, value in HUB.items() if key != "rope_theta"}
    assert (
        facts(tmp_path / "a", {**config, "rope_parameters": split}).config_hash
        == facts(tmp_path / "b", HUB).config_hash
    )


def test_the_chat_template_is_found_wherever_it_is_kept(tmp_path: Path) -> None:
    template = "{{ 'hello\\n' }}"
    named = [{"name": "rag", "template": "other"}, {"name": "default", "template": template}]
    found = [
        facts(tmp_path / "jinja", HUB, chat_template__jinja=template + "\n"),
        facts(tmp_path / "json", HUB, chat_template__json=json.dumps({"chat_template": template})),
        facts(tmp_path / "tokenizer", HUB, tokenizer_config__json=json.dumps({"chat_template": template})),
        facts(tmp_path / "named", HUB, tokenizer_config__json=json.dumps({"chat_template": named})),
        facts(
            tmp_path / "both", HUB, chat_template__jinja=template, tokenizer_config__json='{"chat_template": "older"}'
        ),
    ]
    assert {each.chat_template_hash for each in found} == {chat_template_hash(template)}


def test_a_chat_template_hash_sees_words_but_not_how_a_newline_is_written() -> None:
    assert (
        chat_template_hash("{{ 'a\\n' }}") == chat_template_hash("{{ 'a\n' }}") == chat_template_hash("{{ 'a\r\n' }}\n")
    )
    assert chat_template_hash("{{ 'a' }}") != chat_template_hash("{{ 'b' }}")


def test_a_hub_cache_gives_its_id_and_revision(tmp_path: Path) -> None:
    found = facts(tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "b968826d", HUB)
    assert (found.name, found.hub_id, found.revision) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "b968826d")


@pytest.mark.parametrize(
    "missing", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"]
)
def test_a_config_without_a_needed_field_is_refused(tmp_path: Path, missing: str) -> None:
    with pytest.raises(TargetError, match=missing):
        facts(tmp_path, {key: value for key, value in HUB.items() if key != missing})


@pytest.mark.parametrize("content", [b'{"a": ', b"[1]", b"\xff"])
def test_a_broken_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(TargetError, match=r"config\.json"):
        TargetFacts.of(tmp_path)


def test_a_missing_config_is_refused_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(TargetError, match=r"no config\.json .*model\.gguf"):
        TargetFacts.of(tmp_path)


def test_a_tokenizer_is_known_by_its_ids_however_its_file_is_written(tmp_path: Path) -> None:
    added = [{"id": 2, "content": "<s>", "special": True}]

    def hashed(**content: Any) -> str | None:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content, indent=len(content)))
        return tokenizer_hash(tmp_path)

    assert tokenizer_hash(tmp_path) is None
    bpe = hashed(model={"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, added_tokens=added)
    assert bpe == hashed(added_tokens=added, model={"merges": [["a", "b"]], "vocab": {"b": 1, "a": 0, "<s>": 2}}, x=1)
    assert bpe == hashed(model={"type": "Unigram", "vocab": [["a", -1.5], ["b", -2.0]]}, added_tokens=added)
    assert bpe != hashed(model={"vocab": {"a": 1, "b": 0}}, added_tokens=added)
    assert bpe != hashed(model={"vocab": {"a": 0, "b": 1}}, added_tokens=[])
