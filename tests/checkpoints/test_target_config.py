"""The language model in config.json, by the names that SGLang knows."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_auf.checkpoints.target_config import is_mrope, language_config, rope_of, rope_theta

TEXT = {"model_type": "qwen3", "num_hidden_layers": 4}


@pytest.mark.parametrize(
    "config",
    [
        TEXT,
        {"text_config": TEXT},
        {"language_config": TEXT},
        {"llm_config": TEXT, "text_config": {"num_hidden_layers": 9}},
        {"thinker_config": TEXT},
        {"thinker_config": {"text_config": TEXT, "audio_config": {}}},
        {**TEXT, "text_config": None},
    ],
)
def test_the_language_model_is_found_wherever_it_is_nested(config: dict[str, Any]) -> None:
    assert language_config(config)["num_hidden_layers"] == 4


def test_sglang_finds_the_same_part() -> None:
    from sglang.srt.utils.hf_transformers.common import get_hf_text_config
    from transformers import PretrainedConfig

    part = {**TEXT, "num_attention_heads": 2, "hidden_size": 8}
    for nested in ({"text_config": part}, {"language_config": part}, {"llm_config": part}, {"thinker_config": part}):
        config = PretrainedConfig(architectures=["Any"], **nested)
        assert get_hf_text_config(config).num_hidden_layers == language_config(nested)["num_hidden_layers"]


def test_rotary_positions_are_those_of_full_attention() -> None:
    full, sliding = {"rope_theta": 1e6, "rope_type": "default"}, {"rope_theta": 1e4, "rope_type": "default"}
    split = {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    assert rope_of(split) == rope_of({"rope_parameters": full}) == full
    assert (rope_theta(split), rope_theta({"rope_theta": 5e5}), rope_theta({})) == (1e6, 5e5, 1e4)
    assert rope_of({"rope_parameters": None}) == {}


@pytest.mark.parametrize(
    ("config", "several"),
    [
        ({"rope_scaling": {"mrope_section": [24, 20, 20]}}, True),
        ({"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [11, 11, 10]}}}, True),
        ({"language_model_only": True, "rope_scaling": {"mrope_section": [24, 20, 20]}}, False),
        ({"rope_scaling": {"rope_type": "llama3"}}, False),
        ({"rope_theta": 10000.0}, False),
    ],
)
def test_positions_have_one_number_or_several(config: dict[str, Any], several: bool) -> None:
    assert is_mrope(config) is several
