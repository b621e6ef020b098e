"""Which targets SGLang 0.5.23 can tap, by the architecture that their config.json names.

A model class hands out the outputs of its layers where it has `set_dflash_layers_to_capture`. Most classes collect them
where the next layer begins, so they never have the last layer's. tests/checkpoints/test_tappable.py compares these
names with the installed SGLang.
"""

from __future__ import annotations

import os

from sglang_auf.compat import SGLANG_VERSION
from sglang_auf.errors import TargetError

EXTERNAL_MODELS = "SGLANG_EXTERNAL_MODEL_PACKAGE"
"""SGLang's variable for a package with model classes of the user's own."""

ALL_LAYERS = frozenset(
    {
        "BeamForCausalLM",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "GptOssForCausalLM",
        "InklingForConditionalGeneration",
        "KimiK3ForConditionalGeneration",
        "KimiK3LinearForCausalLM",
        "LagunaForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "Lfm2VlForConditionalGeneration",
        "MiMoV2FlashForCausalLM",
        "MiMoV2ForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
        "MuseGlimmerForCausalLM",
        "MuseGlimmerForConditionalGeneration",
        "MuseSparkForConditionalGeneration",
        "NemotronHForCausalLM",
        "NemotronHPuzzleForCausalLM",
        "NemotronH_Nano_Omni_Reasoning_V3",
        "NemotronH_Nano_VL_V2",
        "NemotronH_Omni_Reasoning_V3",
    }
)

ALL_BUT_THE_LAST = frozenset(
    {
        "Cosmos3ForConditionalGeneration",
        "DeepseekV2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "Glm5NextForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "IQuestCoderForCausalLM",
        "InternLM3ForCausalLM",
        "InternS1ProForConditionalGeneration",
        "InternS2MobiusForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "KimiK25ForConditionalGeneration",
        "Llama4ForCausalLM",
        "LlamaForCausalLM",
        "MellumForCausalLM",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "MistralLarge3ForCausalLM",
        "NanbeigeForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForConditionalGeneration",
        "TeleFLMForCausalLM",
    }
)

ADDED = frozenset({"Qwen2ForCausalLM"})
"""SGLang's class captures its layers, but lacks the method; the plugin adds it (speculative/algorithm.py)."""

NOT_AT_OUTPUTS = frozenset(
    {
        "InklingForConditionalGeneration",
        "MuseGlimmerForCausalLM",
        "MuseGlimmerForConditionalGeneration",
    }
)
"""SGLang taps Muse Glimmer's layers where they begin, and Inkling's before their last convolution. Drafters for them
are trained on these states, which the trainer here does not compute."""

SCALED_EMBEDDINGS = frozenset(
    {"Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"}
)
"""Their embedding modules multiply each row by sqrt(hidden_size)."""


def tappable_layers(architecture: str | None, layers: int) -> int:
    """N, where a drafter may read the outputs of layers 0..N-1 of `layers`.

    architecture: None where config.json names none; then the last layer is left out, as most classes do. Raises
    TargetError for a class that SGLang cannot tap. Classes of the user's own (EXTERNAL_MODELS) may tap any layer.
    """
    if architecture in ALL_LAYERS:
        return layers
    if architecture in ALL_BUT_THE_LAST or architecture is None:
        return layers - 1
    if os.environ.get(EXTERNAL_MODELS):
        return layers
    raise TargetError(
        f"a target of the architecture {architecture}",
        f"one whose layers SGLang {SGLANG_VERSION} can tap, such as LlamaForCausalLM, Qwen3ForCausalLM or "
        "GptOssForCausalLM (sglang_auf/checkpoints/tappable.py names all)",
        f"serve it without a DFlash drafter, or set {EXTERNAL_MODELS} to a package with a class of yours that has "
        "set_dflash_layers_to_capture",
    )
