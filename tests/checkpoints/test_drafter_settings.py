"""Which settings of a drafter are served as it was trained, and which are refused or named."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_auf.checkpoints.drafter_settings import ARCHITECTURE, check_kind, draft_setting, unknown_settings
from sglang_auf.errors import CardError

DOMINO = {"projector_type": "domino", "shift_label": True}


def drafter(dflash: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return {"architectures": [ARCHITECTURE], "dflash_config": {"mask_token_id": 3, **(dflash or {})}, **top}


def test_settings_are_looked_up_as_sglang_does() -> None:
    assert draft_setting({"dflash_config": {"block_size": 4}, "block_size": 8}, "block_size") == 4
    assert draft_setting({"dflash_config": {}, "block_size": 8}, "block_size") == 8
    assert draft_setting({"block_size": 8}, "block_size", 16) == 8
    assert draft_setting({"dflash_config": {"block_size": None}, "block_size": 8}, "block_size", 16) == 16


@pytest.mark.parametrize(
    ("config", "mentioned"),
    [
        (drafter({"causal": True}), "causal"),
        (drafter({"causal": True}, layer_types=["sliding_attention", "full_attention"]), "causal"),
        (drafter(sample_from_anchor=True), "sample_from_anchor"),
        (drafter({"shift_label": True}), "shift_label without a domino head"),
        (drafter({"use_swa": True}), "use_swa without sliding layer_types"),
        (drafter({"use_swa": True}, layer_types=[["sliding_attention"]]), "use_swa without sliding layer_types"),
        (drafter({"use_swa": True}, layer_types=7), "use_swa without sliding layer_types"),
        (drafter({"swa_window_size": 128}, layer_types=["full_attention"]), "swa_window_size without sliding"),
        (drafter({"is_causal": True}), "dflash_config.is_causal"),
        (drafter({"use_gemma_norm": True}), "dflash_config.use_gemma_norm"),
        (drafter(attention_value_scale=0.7), "attention_value_scale outside of dflash_config"),
        (drafter(compression_config={"format": "int4"}), "compression_config"),
    ],
)
def test_what_sglang_does_not_read_is_refused(config: dict[str, Any], mentioned: str) -> None:
    with pytest.raises(CardError) as caught:
        check_kind(config)
    assert mentioned in caught.value.found


@pytest.mark.parametrize(
    "config",
    [
        drafter({"causal": False, "sample_from_anchor": False, "shift_label": False, "use_swa": False}),
        drafter(DOMINO),
        drafter({"use_swa": True, "swa_window_size": 128}, layer_types=["sliding_attention"], sliding_window=128),
        drafter({"attention_value_scale": 0.7, "output_multiplier": 2.0, "final_logit_softcapping": 30.0}),
        drafter(is_causal=True, use_gemma_norm=True, attention_value_scale=1.0),
        drafter({"is_causal": True}, is_causal=True),
        drafter({"use_swa": False, "swa_window_size": 2048}),
        drafter({"causal": True}, layer_types=["sliding_attention"] * 2),
    ],
)
def test_what_sglang_reads_is_served(config: dict[str, Any]) -> None:
    check_kind(config)
    assert unknown_settings(config) == []


def test_sglang_reads_what_is_served() -> None:
    """Where it stands: the scale of values in dflash_config, causality at the top level."""
    from sglang.srt.models.dflash import AttentionType, _get_dflash_attention_type
    from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
    from transformers import Qwen3Config

    scaled = parse_dflash_draft_config(draft_hf_config=drafter({"attention_value_scale": 0.7}))
    passed_over = parse_dflash_draft_config(draft_hf_config=drafter(attention_value_scale=0.7))
    assert (scaled.attention_value_scale, passed_over.attention_value_scale) == (0.7, None)

    default = AttentionType.ENCODER_ONLY
    read = _get_dflash_attention_type(Qwen3Config(is_causal=True), default=default)
    nested = _get_dflash_attention_type(Qwen3Config(dflash_config={"is_causal": True}), default=default)
    assert (read, nested) == (AttentionType.DECODER, default)


def test_settings_that_nobody_knows_are_named() -> None:
    config = drafter({"something_new": 1, "other": 0, "attention_mode": "gqa"})
    assert unknown_settings(config) == ["something_new"]
    assert unknown_settings(drafter({"attention_mode": "mla"})) == ["attention_mode"]
