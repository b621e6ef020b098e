"""Every SGLang name and signature this plugin relies on, in one table, checked when the plugin registers.

SGLang's speculative interfaces are private and move between releases. Another release is refused with one message
that names what moved; without this check it would surface as an attribute error in the middle of a request.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from sglang_auf.errors import CompatError

SGLANG_VERSION = "0.5.23"


@dataclass(frozen=True, slots=True)
class Seam:
    """One name we call, override or replace.

    target: "module:qualified.name"; parameters: the names it must take, in order, or None where only existence counts;
    used_by: the module of ours that would break.
    """

    target: str
    used_by: str
    parameters: tuple[str, ...] | None = None


_SRT = "sglang.srt"
_SPEC = f"{_SRT}.speculative"
_ALGORITHM = f"{_SPEC}.spec_info:SpeculativeAlgorithm"
_WORKER = f"{_SPEC}.dflash_worker_v2:DFlashWorkerV2"
_HOOKS = f"{_SRT}.plugins.hook_registry"
_MANAGER = f"{_SRT}.managers.tokenizer_manager:TokenizerManager"
_OPENAI = f"{_SRT}.entrypoints.openai"
_BATCH_INFO = f"{_SRT}.sampling.sampling_batch_info:SamplingBatchInfo"
_FORWARD = f"{_SRT}.model_executor.forward_batch_info"
_ATTENTION = f"{_SRT}.layers.attention.base_attn_backend:AttentionBackend"
_POOL = f"{_SRT}.mem_cache.memory_pool:MHATokenToKVPool"
_PLATFORM = f"{_SRT}.platforms.interface:SRTPlatform"
_UNQUANT = f"{_SRT}.layers.quantization.unquant"
_GROUPS = f"{_SRT}.arg_groups"

_ATTEND = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "kwargs")
_LOCATE = ("req_pool_indices", "req_to_token", "start_offset", "end_offset")
_USAGE = ("n_choices", "enable_cache_report", "image_tokens", "audio_tokens", "video_tokens")
_WIDENED = ("SpecTokensDetails", "CompletionTokensDetails")
_EMBEDDING = ("SglExt", "UsageInfo", *(f"{kind}Response" for kind in ("Completion", "ChatCompletion")))
_STREAMED = ("CompletionStreamResponse", "ChatCompletionStreamResponse")

SEAMS: tuple[Seam, ...] = (
    # Registration, and what "AUF" is.
    Seam(f"{_HOOKS}:HookRegistry.register", "plugin", ("target", "hook", "hook_type", "source")),
    *(Seam(f"{_HOOKS}:HookType.{kind}", "plugin") for kind in ("BEFORE", "AFTER", "AROUND", "REPLACE")),
    Seam(f"{_SRT}.platforms:current_platform.is_out_of_tree", "plugin", ()),
    Seam(f"{_ALGORITHM}.register", "plugin", ("name", "supports_overlap", "validate_server_args", "spec_class")),
    Seam(f"{_SPEC}.spec_registry:CustomSpecAlgo.handle_server_args", "speculative.algorithm", ("self", "server_args")),
    *(
        Seam(f"{_ALGORITHM}.{name}", "speculative.algorithm", ("self",))
        for name in ("need_topk", "carries_draft_hidden_states", "get_platform_worker_cls")
    ),
    Seam(
        f"{_ALGORITHM}.create_future_map",
        "speculative.algorithm",
        ("self", "device", "req_to_token_pool", "needs_cpu_seq_lens", "needs_confidence_relay"),
    ),
    Seam(
        f"{_SRT}.managers.overlap_utils:FutureMap.__init__",
        "speculative.algorithm",
        ("self", "device", "spec_algo", "req_to_token_pool", "needs_cpu_seq_lens", "needs_confidence_relay"),
    ),
    # Requests and sampling.
    Seam(f"{_SPEC}.dflash_utils:validate_dflash_request", "hooks.validation", ("req", "enable_overlap")),
    *(
        Seam(f"{_SRT}.sampling.sampling_params:SamplingParams.{name}", "hooks.validation")
        for name in ("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "max_new_tokens")
    ),
    Seam(
        f"{_OPENAI}.serving_base:OpenAIServingBase.create_error_response",
        "hooks.validation",
        ("self", "message", "err_type", "status_code", "param"),
    ),
    *(
        Seam(f"{_SRT}.sampling.sampling_params:SamplingParams.{name}", "speculative.sampler_backend")
        for name in ("n", "sampling_seed")
    ),
    Seam(f"{_MANAGER}._send_one_request", "speculative.sampler_backend", ("self", "tokenized_obj")),
    Seam(f"{_BATCH_INFO}.from_schedule_batch", "speculative.sampler_backend", ("batch", "vocab_size")),
    *(
        Seam(f"{_BATCH_INFO}.{name}", "speculative.sampler_backend")
        for name in ("temperatures", "top_ks", "top_ps", "min_ps", "sampling_seed", "is_all_greedy")
    ),
    Seam(f"{_SRT}.layers.sampler:register_sampler_backend", "speculative.sampler_backend", ("backend", "factory")),
    Seam(f"{_SRT}.layers.sampler:Sampler.__init__", "speculative.sampler_backend", ("self",)),
    Seam(
        f"{_SRT}.layers.sampler:Sampler._sample_from_probs",
        "speculative.sampler_backend",
        ("self", "probs", "sampling_info", "positions", "simple_sampling_case"),
    ),
    Seam(
        f"{_SRT}.layers.sampler:_SamplingMaskCapture",
        "speculative.sampler_backend",
        ("weights", "token_ids", "selected_weight", "batch_rows"),
    ),
    # Drafting and verification.
    Seam(f"{_SRT}.layers.sampler:sampler_softmax", "speculative.worker", ("logits", "temperatures")),
    Seam(
        f"{_WORKER}._accept_block",
        "speculative.worker",
        (
            "self",
            "candidates",
            "next_token_logits",
            "sampling_info",
            "draft_input",
            "prefix_lens",
            "bs",
            "target_predict",
        ),
    ),
    Seam(f"{_SRT}.managers.utils:GenerationBatchResult.cap_lens", "speculative.worker"),
    Seam(f"{_WORKER}._validate_phase1_sampling_support", "speculative.worker", ("self", "batch")),
    Seam(
        f"{_WORKER}.forward_batch_generation",
        "speculative.worker",
        ("self", "batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
    ),
    Seam(f"{_SPEC}.dflash_worker_v2:build_block_pos_offsets", "speculative.worker", ("length", "device")),
    Seam(f"{_SPEC}.dflash_worker_v2:make_draft_block_spec_info", "speculative.worker", ("draft_token_num", "device")),
    Seam(f"{_WORKER}._maybe_build_draft_sampler", "speculative.worker", ("self",)),
    Seam(
        f"{_SPEC}.dflash_worker_v2:_DflashDraftSampler.__init__",
        "speculative.draft_head",
        ("self", "weight", "block_size", "num_org", "org_vocab_start", "max_bs", "tp_group"),
    ),
    Seam(
        f"{_SPEC}.dflash_worker_v2:_DflashDraftSampler.__call__",
        "speculative.draft_head",
        ("self", "hidden_states", "input_ids"),
    ),
    Seam(f"{_SRT}.models.dflash:DFlashDraftModel.set_block_size", "speculative.worker", ("self", "block_size")),
    Seam(
        f"{_WORKER}._greedy_sample_from_vocab_parallel_head",
        "speculative.worker",
        ("self", "hidden_states", "lm_head", "chunk_size"),
    ),
    # Tau in replies, and its totals.
    Seam(
        f"{_OPENAI}.serving_base:OpenAIServingBase.handle_request", "hooks.replies", ("self", "request", "raw_request")
    ),
    Seam(f"{_OPENAI}.utils:spec_tokens_details_from_meta_info", "hooks.replies", ("meta_info",)),
    Seam(f"{_OPENAI}.usage_processor:UsageProcessor.calculate_response_usage", "hooks.replies", ("responses", *_USAGE)),
    Seam(
        f"{_OPENAI}.usage_processor:UsageProcessor.calculate_streaming_usage",
        "hooks.replies",
        ("prompt_tokens", "reasoning_tokens", "completion_tokens", "cached_tokens", *_USAGE),
    ),
    *(Seam(f"{_OPENAI}.protocol:{name}.model_config", "hooks.replies") for name in _WIDENED),
    *(
        Seam(f"{_OPENAI}.protocol:{name}.model_rebuild", "hooks.replies")
        for name in (*_WIDENED, *_EMBEDDING, *_STREAMED)
    ),
    Seam(f"{_MANAGER}._calculate_spec_decoding_metrics", "hooks.metrics", ("self", "meta_info", "recv_obj", "i")),
    Seam(f"{_MANAGER}.init_metric_collector_watchdog", "hooks.metrics", ("self",)),
    *(
        Seam(f"{_SRT}.managers.io_struct:BatchStrOutput.{name}", "hooks.spans")
        for name in ("rids", "output_ids", "spec_verify_ct", "spec_num_correct_drafts")
    ),
    Seam(f"{_MANAGER}._handle_batch_output", "hooks.spans", ("self", "recv_obj")),
    Seam(
        f"{_OPENAI}.serving_chat:OpenAIServingChat._generate_stream_content",
        "hooks.spans",
        (
            "self",
            "content",
            "index",
            "request",
            "created",
            "stream_offsets",
            "reasoning_parser_dict",
            "parser_dict",
            "has_tool_calls",
            "choice_logprobs",
            "finish_reason_type",
            "continuous_usage_stats",
            *(f"{kind}_tokens" for kind in ("prompt", "reasoning", "completion")),
        ),
    ),
    Seam(f"{_SRT}.runtime_context:get_spec", "hooks.metrics", ()),
    Seam(f"{_SRT}.server_args:ServerArgs.resolved_dict", "hooks.redaction", ("self",)),
    # The CPU platform.
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
        (*_LOCATE, "batch_size", "draft_token_num", "device"),
    ),
    Seam(
        f"{_SRT}.mem_cache.allocation:assign_req_to_token_pool_func",
        "cpu.platform",
        (*_LOCATE, "out_cache_loc", "batch_size"),
    ),
    Seam(
        f"{_SPEC}.domino_utils:validate_domino_runtime",
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
    Seam(f"{_SPEC}.dflash_info:DFlashVerifyInput.draft_token_num", "cpu.attention"),
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
    Seam(f"{_SRT}.layers.activation:SiluAndMul.forward_native", "cpu.elementwise", ("self", "x")),
    Seam(f"{_SRT}.layers.linear:LinearBase", "cpu.linear"),
    Seam(f"{_SRT}.layers.vocab_parallel_embedding:VocabParallelEmbedding", "cpu.linear"),
    Seam(f"{_UNQUANT}:UnquantizedLinearMethod.apply", "cpu.linear", ("self", "layer", "x", "bias")),
    Seam(f"{_UNQUANT}:UnquantizedEmbeddingMethod.apply", "cpu.linear", ("self", "layer", "x", "bias")),
    Seam(f"{_UNQUANT}:UnquantizedEmbeddingMethod.embedding", "cpu.linear", ("self", "layer", "input_")),
    Seam(f"{_POOL}._create_buffers_normal", "cpu.memory", ("self",)),
    Seam(f"{_POOL}._init_kv_copy_and_warmup", "cpu.memory", ("self",)),
    Seam(f"{_POOL}._store_kv_layer", "cpu.memory", ("self", "layer_idx", "loc", "cache_k", "cache_v")),
    Seam(
        f"{_POOL}.set_kv_buffer",
        "cpu.attention",
        ("self", "layer", "loc_info", "cache_k", "cache_v", "k_scale", "v_scale", "layer_id_override", "dcp_kv_mask"),
    ),
)

# Only a scheduler imports the worker's module (500 modules with it), so those seams are checked when it makes the
# worker; the rest belong to modules that SGLang or our hooks import in every process, and cost nothing to check.
OF_THE_WORKER = ("speculative.worker", "speculative.draft_head")
WORKER_SEAMS = tuple(seam for seam in SEAMS if seam.used_by in OF_THE_WORKER)
REGISTRATION_SEAMS = tuple(seam for seam in SEAMS if seam.used_by not in OF_THE_WORKER)


def resolve(target: str) -> object:
    """The object behind "module:qualified.name"; ImportError or AttributeError when it is not there.

    A field of a dataclass, msgspec or pydantic class is no attribute of the class: it resolves to its annotation.
    """
    module_name, _, qualified_name = target.partition(":")
    found: object = importlib.import_module(module_name)
    for part in qualified_name.split("."):
        found = getattr(found, part) if hasattr(found, part) else _annotation(found, part)
    return found


def _annotation(owner: object, name: str) -> object:
    for base in getattr(owner, "__mro__", ()):
        annotations = inspect.get_annotations(base)
        if name in annotations:
            return annotations[name]
    raise AttributeError(f"{getattr(owner, '__name__', owner)!s} has no {name!r}")


def moved(seam: Seam) -> str | None:
    """What is wrong with a seam in the installed SGLang, or None."""
    try:
        found = resolve(seam.target)
    except (ImportError, AttributeError) as error:
        return f"{seam.target} (used by {seam.used_by}): not found: {error}"
    if seam.parameters is None:
        return None
    if not callable(found):
        return f"{seam.target} (used by {seam.used_by}): is a {type(found).__name__}, expected something to call"
    parameters = tuple(inspect.signature(found).parameters)
    if parameters != seam.parameters:
        return f"{seam.target} (used by {seam.used_by}): takes {parameters}, expected {seam.parameters}"
    return None


def check_version() -> None:
    """Raise CompatError unless the pinned SGLang is installed. Cheap: imports nothing of SGLang."""
    try:
        installed = version("sglang")
    except PackageNotFoundError:
        installed = "none"
    if installed != SGLANG_VERSION:
        raise CompatError(
            f"SGLang {installed}",
            f"SGLang {SGLANG_VERSION}",
            f"pip install sglang=={SGLANG_VERSION} (the plugin relies on private interfaces of exactly that release)",
        )


def check_seams(seams: tuple[Seam, ...] = SEAMS) -> None:
    """Raise CompatError that names every seam of the installed SGLang which moved."""
    complaints = [complaint for seam in seams if (complaint := moved(seam)) is not None]
    if complaints:
        raise CompatError(
            "; ".join(complaints),
            f"the interfaces of SGLang {SGLANG_VERSION}",
            f"pip install --force-reinstall sglang=={SGLANG_VERSION}",
        )
