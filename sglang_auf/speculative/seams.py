"""What the modules of this folder use of SGLang, apart from them: they import torch and SGLang, this file does not."""

from __future__ import annotations

from sglang_auf.compat import Seam

_SRT = "sglang.srt"
_SPEC = f"{_SRT}.speculative"
_ALGORITHM = f"{_SPEC}.spec_info:SpeculativeAlgorithm"
_WORKER = f"{_SPEC}.dflash_worker_v2:DFlashWorkerV2"
_UPDATER = f"{_SRT}.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_SCHEDULER = f"{_SRT}.managers.scheduler:Scheduler"
_BATCH_INFO = f"{_SRT}.sampling.sampling_batch_info:SamplingBatchInfo"
QWEN2 = f"{_SRT}.models.qwen2:Qwen2ForCausalLM"

# Functions that a swap of the drafter hooks (`swap.HOOKS`).
INIT_COMMUNICATORS = Seam(
    f"{_SRT}.managers.tokenizer_control_mixin:TokenizerControlMixin.init_communicators", "speculative.swap", ("self",)
)
UPDATE_FROM_DISK = Seam(
    f"{_UPDATER}.update_weights_from_disk",
    "speculative.swap",
    ("self", "recv_req"),
)

# The function that tells a loaded target which layers are tapped (`algorithm.HOOKS`).
CONFIGURE_CAPTURE = Seam(
    f"{_SRT}.model_executor.model_runner_components.attention_backend_setup:configure_aux_hidden_state_capture",
    "speculative.algorithm",
    (
        *("model", "eagle_use_aux_hidden_state", "eagle_aux_hidden_state_layer_ids"),
        *("dflash_use_aux_hidden_state", "dflash_target_layer_ids", "is_dspark"),
    ),
)

SEAMS = (
    INIT_COMMUNICATORS,
    UPDATE_FROM_DISK,
    CONFIGURE_CAPTURE,
    Seam(f"{_UPDATER}.scheduler", "speculative.swap"),
    Seam(f"{_SRT}.mem_cache.kv_cache_configurator:KVCacheConfigurator.model", "speculative.swap"),
    Seam(f"{_UPDATER}.draft_worker", "speculative.swap"),
    Seam(f"{_SRT}.managers.io_struct:hook_custom_types", "speculative.swap", ("new_types",)),
    Seam(f"{_SRT}.managers.io_struct:UpdateWeightFromDiskReqInput.model_path", "speculative.swap"),
    Seam(f"{_SRT}.managers.io_struct:PauseGenerationReqInput.mode", "speculative.swap"),
    Seam(f"{_SRT}.managers.io_struct:ContinueGenerationReqInput.torch_empty_cache", "speculative.swap"),
    Seam(
        f"{_SRT}.managers.communicator:FanOutCommunicator.__init__",
        "speculative.swap",
        ("self", "send", "fan_out", "mode"),
    ),
    Seam(f"{_SRT}.managers.communicator:FanOutCommunicator.handle_recv", "speculative.swap", ("self", "recv_obj")),
    Seam("sglang.utils:TypeBasedDispatcher.__iadd__", "speculative.swap", ("self", "other")),
    Seam(f"{_SRT}.managers.tokenizer_manager:TokenizerManager._dispatch_to_scheduler", "speculative.swap"),
    Seam(f"{_SRT}.managers.tokenizer_manager:TokenizerManager.auto_create_handle_loop", "speculative.swap", ("self",)),
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
    *(
        Seam(f"{_SRT}.runtime_context:ParallelContext.{name}", "speculative.sampler_backend")
        for name in ("dp_rank", "attn_dp_rank")
    ),
    Seam(f"{_BATCH_INFO}.from_schedule_batch", "speculative.sampler_backend", ("batch", "vocab_size")),
    *(
        Seam(f"{_BATCH_INFO}.{name}", "speculative.sampler_backend")
        for name in (
            *("temperatures", "top_ks", "top_ps", "min_ps", "sampling_seed", "is_all_greedy"),
            *("need_top_k_sampling", "need_top_p_sampling", "need_min_p_sampling", "sampling_mask_batch_indices"),
        )
    ),
    Seam(f"{_BATCH_INFO}.adjusted_from_schedule_batch", "speculative.sampler_backend", ("self", "batch", "vocab_size")),
    Seam(
        f"{_BATCH_INFO}.adjusted_filter_batch",
        "speculative.sampler_backend",
        ("self", "keep_indices", "keep_indices_device"),
    ),
    Seam(f"{_BATCH_INFO}.adjusted_merge_batch", "speculative.sampler_backend", ("self", "other")),
    Seam(f"{_SRT}.runtime_context:get_platform", "speculative.algorithm", ()),
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
)
"""Checked when the plugin registers, in every process."""

WORKER_SEAMS = (
    Seam(f"{QWEN2}.set_eagle3_layers_to_capture", "speculative.algorithm", ("self", "layer_ids")),
    Seam(f"{QWEN2}.set_dflash_layers_to_capture", "speculative.algorithm", added=True),
    Seam(f"{_SCHEDULER}.pause_generation", "speculative.swap", ("self", "recv_req")),
    Seam(f"{_SCHEDULER}.continue_generation", "speculative.swap", ("self", "recv_req")),
    Seam(f"{_SRT}.mem_cache.base_prefix_cache:BasePrefixCache.evict", "speculative.swap", ("self", "params")),
    Seam(f"{_SRT}.mem_cache.base_prefix_cache:BasePrefixCache.evictable_size", "speculative.swap", ("self",)),
    Seam(f"{_SRT}.mem_cache.base_prefix_cache:EvictParams.num_tokens", "speculative.swap"),
    Seam(f"{_SRT}.model_executor.model_runner:ModelRunner.load_model", "speculative.swap", ("self",)),
    Seam(f"{_SRT}.layers.moe.utils:draft_model_build_scope", "speculative.swap", ()),
    Seam(f"{_SPEC}.spec_utils:draft_pp_context", "speculative.swap", ()),
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
    Seam(f"{_WORKER}._can_skip_verify_logits", "speculative.worker", ("self", "batch", "sampling_info")),
    *(
        Seam(f"{_BATCH_INFO}.{name}", "speculative.penalties")
        for name in ("logit_bias", "acc_additive_penalties", "acc_scaling_penalties", "vocab_size")
    ),
    Seam(
        f"{_SRT}.managers.scheduler:Scheduler._forward_isolation", "speculative.penalties", ("self", "batch", "overlap")
    ),
    Seam(
        f"{_WORKER}._measure_sampling_peak",
        "speculative.worker",
        ("self", "candidates", "target_logits", "sampling_info"),
    ),
    Seam(f"{_WORKER}.prewarm_sampling", "speculative.worker", ("self",)),
    Seam(f"{_SRT}.model_executor.runner_utils.pool:borrow_graph_pool", "speculative.worker", ("user",)),
    Seam(f"{_SPEC}.spec_tp_sync:SpecTpSyncSite.DFLASH_ACCEPT_SAMPLE", "speculative.worker"),
    Seam(f"{_SPEC}.spec_tp_sync:SpecTpSync.sync", "speculative.worker", ("self", "site", "values")),
    Seam(f"{_WORKER}._validate_phase1_sampling_support", "speculative.worker", ("self", "batch")),
    Seam(
        f"{_WORKER}.forward_batch_generation",
        "speculative.worker",
        ("self", "batch", "on_publish", "grammar_barrier", "pp_proxy_tensors"),
    ),
    Seam(f"{_SPEC}.dflash_worker_v2:SIMULATE_ACC_LEN", "speculative.worker"),
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
    Seam(
        f"{_WORKER}._greedy_sample_from_vocab_parallel_head",
        "speculative.worker",
        ("self", "hidden_states", "lm_head", "chunk_size"),
    ),
)
"""Checked when a scheduler makes the worker: nobody else imports the worker's module, which brings 500 others along."""

TREE_SEAMS = (
    Seam(
        f"{_SPEC}.dflash_worker_v2:make_draft_block_spec_info", "speculative.tree_step", ("draft_token_num", "device")
    ),
    Seam(f"{_SRT}.models.dflash:DFlashDraftModel.set_block_size", "speculative.tree_step", ("self", "block_size")),
    Seam(f"{_SRT}.models.dflash:DFlashAttention.kv_proj_only", "cpu.linear", ("self", "hidden_states")),
    Seam(
        f"{_SPEC}.dflash_info:DFlashVerifyInput.prepare_for_verify",
        "speculative.tree_step",
        ("self", "batch", "target_worker", "defer_metadata_init"),
    ),
    Seam(f"{_SPEC}.spec_utils:draft_tp_context", "speculative.tree_step", ("layout",)),
    Seam(f"{_SPEC}.spec_utils:GrammarTree.from_host", "speculative.tree_step"),
    Seam(
        f"{_SPEC}.spec_utils:build_grammar_vocab_mask",
        "speculative.tree_step",
        ("reqs", "tree", "sampling_info", "device", "barrier"),
    ),
    Seam(f"{_SPEC}.domino_utils:domino_greedy_rollout", "speculative.tree_step"),
    Seam(f"{_SPEC}.spec_sampling_mask:SpeculativeSamplingMaskCapture.from_logits", "speculative.tree_step"),
    Seam(
        f"{_SRT}.layers.logprob_processor:compute_spec_logprobs",
        "speculative.tree_step",
        ("batch", "logits_output", "predict", "accept_index", "chain_stride"),
    ),
    Seam(f"{_SRT}.constrained.base_grammar_backend:GrammarMask", "speculative.tree_step"),
    *(
        Seam(f"{_SRT}.managers.utils:GenerationBatchResult.{name}", "speculative.tree_step")
        for name in ("cap_lens", "accept_lens", "new_seq_lens", "next_draft_input", "speculative_num_draft_tokens")
    ),
    *(
        Seam(f"{_WORKER}.{name}", "speculative.tree_step", ("self", *parameters))
        for name, *parameters in (
            ("_draft_write_ids", "plan"),
            ("_make_next_draft_input_decode", "bonus_tokens", "new_seq_lens"),
            (
                "_append_target_hidden_to_draft_kv_by_loc",
                *("target_hidden", "cache_loc", "positions", "cache_loc_2d", "commit_lens", "extend_lens"),
            ),
        )
    ),
    Seam(f"{_SRT}.mem_cache.kv_index_translator:KVIndexTranslator.plan", "speculative.tree_step"),
)
"""Checked when a worker on the CPU platform makes its step."""
