"""What the CPU platform does not compute is refused by name; what it does passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_auf.cpu.refusals import refuse_config, refuse_modules
from sglang_auf.env import ROW_INVARIANT
from sglang_auf.errors import TargetError

LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64}
FULL = {"layer_types": ["full_attention", "full_attention"]}


def write(directory: Path, **fields: Any) -> Path:
    (directory / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    return directory


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"sliding_window_pattern": 6}, "sliding windows"),
        ({"full_attention_interval": 4}, "linear attention"),
        ({"hybrid_override_pattern": "M-M*"}, "without attention"),
        ({"attention_chunk_size": 8192}, "chunks"),
        ({"kv_lora_rank": 512}, "latent"),
        ({"num_experts": 128}, "num_experts 128"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"n_routed_experts": 256}, "n_routed_experts 256"),
        ({"rope_scaling": {"type": "su"}}, "type su"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "type longrope"),
        ({"text_config": {**LLAMA, "num_experts": 4}}, "num_experts 4"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_is_refused(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        refuse_config(write(tmp_path, **fields))
    assert said in caught.value.found
    assert str(tmp_path) in caught.value.found
    of_rows = "experts" in said or "type" in said
    assert (ROW_INVARIANT.name in caught.value.remedy) is of_rows, "the switch serves it, and nothing else"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        FULL,
        {"attn_logit_softcapping": None, "attention_chunk_size": None, "num_experts": 0, "num_local_experts": 1},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"num_experts": [8], "rope_scaling": "x"},
        {"sliding_window_pattern": 4, "sliding_window": None},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    ],
    ids=str,
)
def test_other_configs_pass(fields: dict[str, Any], tmp_path: Path) -> None:
    refuse_config(write(tmp_path, **fields))


def test_rows_may_depend_on_others_where_nothing_else_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROW_INVARIANT.name, "0")
    refuse_config(write(tmp_path, num_experts=8, rope_scaling={"rope_type": "longrope"}))
    with pytest.raises(TargetError, match="latent"):
        refuse_config(write(tmp_path, num_experts=8, kv_lora_rank=512))
    refuse_modules(torch.nn.Sequential(FusedMoE()))


class FusedMoE(torch.nn.Module):
    """By its name SGLang's; what it computes is not asked."""


class OtherExperts(FusedMoE):
    pass


def attention(**options: Any) -> RadixAttention:
    return RadixAttention(2, 32, 1.0, 2, layer_id=0, **options)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (attention(sliding_window_size=128), "a window"),
        (attention(logit_cap=50.0), "a soft cap"),
        (attention(is_cross_attention=True), "another text's keys"),
        (attention(use_irope=True), "chunks"),
        (FusedMoE(), "experts"),
        (OtherExperts(), "experts"),
    ],
)
def test_a_loaded_layer_that_asks_for_more_is_refused(layer: torch.nn.Module, said: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(attention(), layer))
    with pytest.raises(TargetError) as caught:
        refuse_modules(model)
    assert said in caught.value.found
    assert caught.value.found.startswith("1.1, ")


def test_full_attention_passes() -> None:
    refuse_modules(torch.nn.Sequential(torch.nn.Linear(2, 2), attention(), attention(sliding_window_size=-1)))
