"""What the modules of this folder use of SGLang. It stands apart from them, because importing them compiles kernels."""

from __future__ import annotations

from sglang_auf.compat import Seam

_SRT = "sglang.srt"
_FORWARD = f"{_SRT}.model_executor.forward_batch_info"
_ATTENTION = f"{_SRT}.layers.attention.base_attn_backend:AttentionBackend"
_POOL = f"{_SRT}.mem_cache.memory_pool:MHATokenToKVPool"
_PLATFORM = f"{_SRT}.platforms.interface:SRTPlatform"
_UNQUANT = f"{_SRT}.layers.quantization.unquant"
_GROUPS = f"{_SRT}.arg_groups"

_ATTEND = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs")

# Functions that the platform hooks (`platform.HOOKS`).
ASSIGN_TO_POOL = Seam(
    f"{_SRT}.mem_cache.allocation:assign_req_to_token_pool_func",
    "cpu.platform",
    ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "out_cache_loc", "batch_size"),
)
VALIDATE_DOMINO = Seam(
    f"{_SRT}.speculative.domino_utils:validate_domino_runtime",
    "cpu.platform",
    (
        "device",
        "tp_size",
        "tp_rank",
        "target_vocab_size",
        "draft_vocab_size",
        "hidden_size",
        "target_embedding",
        "lm_head",
        "prefix_gru",
        "embed_proj",
    ),
)
START_METHOD = Seam(f"{_SRT}.entrypoints.engine:_set_envs_and_config", "process", ("server_args",))

# The function where it is defined, and where it is imported by name.
SCALE_LOGITS = tuple(
    Seam(f"{_SRT}.sampling.{module}:apply_scaling_penalties", "cpu.platform", ("logits", "scaling_penalties"))
    for module in ("penaltylib.repetition_penalty", "sampling_batch_info")
)

NEW_WEIGHTS = tuple(
    Seam(
        f"{_SRT}.model_executor.model_runner_components.weight_updater:WeightUpdater.{name}",
        "cpu.platform",
        ("self", *parameters),
    )
    for name, *parameters in (
        ("update_weights_from_disk", "model_path", "load_format", "weight_name_filter", "recapture_cuda_graph"),
        ("load_weights_from_distributed", "named_tensors"),
        ("update_weights_from_tensor", "named_tensors", "load_format"),
        ("update_weights_from_ipc", "recv_req"),
    )
)

SEAMS = (
    ASSIGN_TO_POOL,
    VALIDATE_DOMINO,
    START_METHOD,
    *SCALE_LOGITS,
    *NEW_WEIGHTS,
    Seam(f"{_SRT}.platforms.cpu:CpuDeviceMixin.get_device", "cpu.platform", ("self", "device_id")),
    Seam(f"{_SRT}.platforms.device_mixin:PlatformEnum.OOT", "cpu.platform"),
    Seam(f"{_SRT}.platforms.interface:PlatformCapabilities", "cpu.platform"),
    *(
        Seam(f"{_PLATFORM}.{name}", "cpu.platform", ("self", *parameters))
        for name, *parameters in (
            ("apply_server_args_defaults", "server_args"),
            ("get_default_attention_backend",),
            ("get_default_speculative_draft_attention_backend", "algorithm"),
            ("supports_speculative_algorithm", "algorithm"),
            ("supports_speculative_draft_attention_backend", "algorithm", "backend"),
            ("get_kv_pool_cls", "kind"),
            ("get_speculative_cache_locs_fn",),
            ("get_dispatch_key_name",),
            ("init_backend",),
            ("post_load_model", "model"),
        )
    ),
    Seam(
        "sglang.kernels.ops.speculative.cache_locs:assign_extend_cache_locs_func",
        "cpu.platform",
        ("req_pool_indices", "req_to_token", "start_offset", "end_offset", "batch_size", "draft_token_num", "device"),
    ),
    Seam(f"{_GROUPS}.choices:ATTENTION_BACKEND_CHOICES.append", "cpu.platform"),
    Seam(f"{_GROUPS}.choices:DRAFT_ATTENTION_BACKEND_CHOICES.append", "cpu.platform"),
    Seam(f"{_GROUPS}.overrides:declare_resolution", "cpu.platform", ("server_args", "source", "fields")),
    Seam(f"{_GROUPS}.platform_hook:handle_cpu_backends", "cpu.platform", ("server_args",)),
    Seam(f"{_GROUPS}.resolution_hooks:register_resolution_hook", "cpu.platform", ("name",)),
    Seam(f"{_SRT}.layers.attention.attention_registry:register_attention_backend", "cpu.platform", ("name",)),
    Seam(f"{_ATTENTION}.init_forward_metadata", "cpu.attention", ("self", "forward_batch")),
    Seam(f"{_ATTENTION}.forward_decode", "cpu.attention", _ATTEND),
    Seam(f"{_ATTENTION}.forward_extend", "cpu.attention", _ATTEND),
    Seam(f"{_ATTENTION}.get_cuda_graph_seq_len_fill_value", "cpu.attention", ("self",)),
    Seam(f"{_SRT}.layers.radix_attention:AttentionType.ENCODER_ONLY", "cpu.attention"),
    *(
        Seam(f"{_FORWARD}:ForwardMode.{name}", "cpu.attention")
        for name in ("is_idle", "is_target_verify", "is_decode", "is_extend")
    ),
    *(
        Seam(f"{_FORWARD}:ForwardBatch.{name}", "cpu.attention")
        for name in (
            "forward_mode",
            "req_pool_indices",
            "seq_lens",
            "extend_seq_lens_cpu",
            "out_cache_loc",
            "spec_info",
        )
    ),
    Seam(f"{_SRT}.speculative.dflash_info:DFlashVerifyInput.draft_token_num", "cpu.attention"),
    Seam(
        "sglang.kernels.fused_op:BaseFusedOp.register_oot_forward", "cpu.elementwise", ("op_cls", "fn", "platform_key")
    ),
    Seam(
        f"{_SRT}.layers.layernorm:RMSNorm.forward_native",
        "cpu.elementwise",
        ("self", "x", "residual", "post_residual_addition", "quant_linear"),
    ),
    Seam(
        f"{_SRT}.layers.rotary_embedding.base:RotaryEmbedding.forward_native",
        "cpu.elementwise",
        ("self", "positions", "query", "key", "offsets", "fused_set_kv_buffer_arg"),
    ),
    *(
        Seam(f"{_SRT}.layers.rotary_embedding.{name}", "cpu.elementwise")
        for name in (
            "base:LinearScalingRotaryEmbedding",
            "rope_variant:DynamicNTKScalingRotaryEmbedding",
            "rope_variant:Llama3RotaryEmbedding",
            "yarn:YaRNScalingRotaryEmbedding",
        )
    ),
    Seam(f"{_SRT}.layers.radix_attention:RadixAttention", "cpu.refusals"),
    Seam(f"{_SRT}.layers.activation:SiluAndMul.forward_native", "cpu.elementwise", ("self", "x")),
    Seam(f"{_SRT}.layers.linear:LinearBase", "cpu.linear"),
    Seam(f"{_SRT}.layers.vocab_parallel_embedding:VocabParallelEmbedding", "cpu.linear"),
    Seam(f"{_UNQUANT}:UnquantizedLinearMethod.apply", "cpu.linear", ("self", "layer", "x", "bias")),
    Seam(f"{_UNQUANT}:UnquantizedEmbeddingMethod.apply", "cpu.linear", ("self", "layer", "x", "bias")),
    Seam(f"{_UNQUANT}:UnquantizedEmbeddingMethod.embedding", "cpu.linear", ("self", "layer", "input_")),
    Seam(f"{_SRT}.model_executor.forward_context:get_attn_backend", "cpu.replay", ()),
    Seam(f"{_POOL}._create_buffers_normal", "cpu.memory", ("self",)),
    Seam(f"{_POOL}._init_kv_copy_and_warmup", "cpu.memory", ("self",)),
    Seam(f"{_POOL}._store_kv_layer", "cpu.memory", ("self", "layer_idx", "loc", "cache_k", "cache_v")),
    Seam(
        f"{_POOL}.set_kv_buffer",
        "cpu.attention",
        ("self", "layer", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale", "layer_id_override", "dcp_kv_mask"),
    ),
)
"""Checked when the plugin registers, on a machine with an accelerator too."""
