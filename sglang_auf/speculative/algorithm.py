"""AUF as a speculative algorithm of SGLang: a DFLASH-family algorithm with our worker, and its server arguments."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_auf import PLATFORM, SAMPLER_NAME
from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.compat import check_seams
from sglang_auf.env import BUNDLED, CPU_OVERLAP, DRAFT_VOCABULARY, TREE, step_log, tree_nodes
from sglang_auf.errors import ConfigError
from sglang_auf.files import find_model, read_json
from sglang_auf.hooks.registry import Hook
from sglang_auf.speculative import seams

logger = logging.getLogger(__name__)

# SGLang's default for its built-in DFLASH (arg_groups/speculative_hook.py, _handle_dflash).
MAX_RUNNING_REQUESTS = 48
# Attention that is always causal. The slots of a drafted block attend to one another in both directions.
CAUSAL_ONLY = "trtllm_mha"


class AufSpecAlgo(CustomSpecAlgo):  # type: ignore[misc]
    """Answers as DFLASH does, so that SGLang's own KV accounting, feature capture, graphs and relay serve AUF.

    The last four methods exist on SGLang's enum only; without them 0.5.23's scheduler cannot start a registered
    algorithm (managers/scheduler.py, carries_draft_hidden_states and create_future_map).
    """

    def is_dflash(self) -> bool:
        return True

    def is_dflash_family(self) -> bool:
        return True

    def supports_target_verify_for_draft(self) -> bool:
        return True

    def supports_prefill_shared_read_done(self) -> bool:
        return True

    def supports_mixed_chunk(self) -> bool:
        return True

    def supports_grammar_overlap(self) -> bool:
        return True

    def need_topk(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def get_platform_worker_cls(self) -> None:
        return None

    def create_future_map(
        self, device: Any, pool: Any, needs_cpu_seq_lens: bool = True, needs_confidence_relay: bool = False
    ) -> Any:
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(device, self, pool, needs_cpu_seq_lens, needs_confidence_relay)

    def handle_server_args(self, server_args: Any) -> None:
        """Refuse what AUF cannot honour, check the drafter against the target, and fill in the rest from its config.

        server_args: a stand-in that SGLang passes; it records what is assigned. Raises ConfigError or CardError.
        """
        from sglang_auf.checkpoints.card import check_drafter

        refuse_unsupported(server_args)
        # `python -m server` has checked the drafter already, but `python -m sglang.launch_server` gets here first.
        checked = check_drafter(
            server_args.speculative_draft_model_path,
            server_args.model_path,
            drafter_revision=server_args.speculative_draft_model_revision,
            target_revision=server_args.revision,
            block_size=_requested_block(server_args),
            context_length=server_args.context_length,
        )
        if server_args.sampling_defaults == "model" and server_args.enable_mixed_chunk:
            refuse_penalty_by_default(
                find_model(server_args.model_path, ("*.json",), ConfigError, server_args.revision)
            )
        if server_args.trust_remote_code:
            refuse_code_of_drafter(checked.path)
        if BUNDLED not in os.environ:  # `python -m server` says them itself
            for warning in checked.warnings:
                logger.warning("drafter: %s", warning)
        report_vocabulary(checked.path, server_args.tp_size)
        server_args.speculative_draft_model_path = str(checked.path)
        server_args.speculative_num_draft_tokens = _requested_block(server_args) or checked.card.block_size
        server_args.speculative_num_steps = 1
        server_args.speculative_eagle_topk = 1
        if not server_args.enable_deterministic_inference:  # SGLang insists on its own sampler then
            server_args.sampling_backend = SAMPLER_NAME
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if server_args.min_free_slots_delay is None and admits_at_once(server_args):
            server_args.min_free_slots_delay = 1
        if server_args.device == "cpu":
            server_args.speculative_draft_attention_backend = PLATFORM
            # SGLang's overlap schedule hides work behind a device queue, which a CPU does not have. Who wants it sets a
            # switch of ours: SGLang cannot tell whether --disable-overlap-schedule is off or was not given.
            if not CPU_OVERLAP.is_on():
                server_args.disable_overlap_schedule = True
        elif (backend := draft_attention_backend(server_args)) is not None:
            server_args.speculative_draft_attention_backend = backend


def verifies_trees(device: str, is_mrope: bool) -> bool:
    """Whether a step verifies a tree of drafts and not one chain: the CPU platform's does, unless told otherwise.

    is_mrope: positions have several numbers, as for pictures. SGLang then wants as many rows of every request.
    """
    return device == "cpu" and not is_mrope and TREE.is_on()


def admits_at_once(server_args: Any) -> bool:
    """Whether a request that waits may take the only free place.

    With DFLASH SGLang waits for several (4 of 48; managers/min_free_slots_delayer.py), because a prefill there costs a
    device a pass of its own. A CPU gains nothing by it: places stay empty, and where idle sessions hold the others,
    nobody is ever admitted. And a server that is full would never look whether a request with a higher priority waits.
    """
    return server_args.device == "cpu" or bool(server_args.enable_priority_scheduling)


def _requested_block(server_args: Any) -> int | None:
    """The block size B of --speculative-num-draft-tokens or --speculative-dflash-block-size, None without either."""
    given = {
        int(value)
        for value in (server_args.speculative_num_draft_tokens, server_args.speculative_dflash_block_size)
        if value is not None
    }
    if len(given) > 1 or any(block < 2 for block in given):
        raise ConfigError(
            f"block sizes {sorted(given)}", "one block size of 2 or more", "give --speculative-num-draft-tokens once"
        )
    return given.pop() if given else None


def draft_attention_backend(server_args: Any) -> str | None:
    """The drafter's attention where SGLang would give it the target's and that is causal only; None to leave it.

    The same choice as for the built-in DFLASH (_resolve_dflash_draft_attention_backend in
    arg_groups/speculative_hook.py). Without it every draft would attend to the past alone: no error, and hardly a draft
    accepted.
    """
    inherited = server_args.prefill_attention_backend or server_args.attention_backend
    if server_args.speculative_draft_attention_backend is not None or inherited != CAUSAL_ONLY:
        return None
    from sglang.srt.runtime_context import get_platform

    backend = "fa4" if get_platform().is_sm100 else "flashinfer"
    logger.warning("the drafter attends with %s, since the target's %s is causal only", backend, CAUSAL_ONLY)
    return backend


def refuse_unsupported(server_args: Any) -> None:
    """Raise ConfigError for flags that AUF would ignore or that would change the output distribution."""
    reasons = [reason for condition, reason in _refusals(server_args) if condition]
    if reasons:
        raise ConfigError("; ".join(reasons), "flags that --speculative-algorithm AUF can honour")
    if TREE.is_asked_for() and server_args.device != "cpu":
        raise ConfigError(
            f"{TREE.name}=1 on {server_args.device}",
            "a chain, because CUDA graphs are captured for one shape; only the CPU platform verifies trees",
            f"unset {TREE.name}",
        )
    for number, expected in (
        (tree_nodes, "a number of drafted tokens, 1 or more"),
        (step_log, "a number of steps, or 0"),
    ):
        try:
            number()
        except ValueError as error:
            raise ConfigError(str(error), expected, "correct or unset it") from None
    if not server_args.speculative_draft_model_path:
        raise ConfigError(
            "no drafter", "a DFlash or Domino drafter", "give --speculative-draft-model-path (a folder or a hub name)"
        )


def report_vocabulary(path: Path, tp_size: int) -> None:
    """Log how many tokens may be drafted. Raises ConfigError for a list where the head is split over devices."""
    vocabulary = draft_vocabulary.in_use(path)
    if vocabulary is None:
        return
    if tp_size > 1:
        raise ConfigError(
            f"--tp-size {tp_size} and a draft vocabulary ({path / draft_vocabulary.FILE})",
            "one device, or a drafter without a draft vocabulary",
            f"set {DRAFT_VOCABULARY.name}=0 (--set draft_vocabulary=false)",
        )
    logger.info("drafter: drafts only the %d tokens of its %s", len(vocabulary.tokens), draft_vocabulary.FILE)


def refuse_penalty_by_default(target: Path) -> None:
    """Raise ConfigError where every chat that sets no repetition_penalty would get the target's own, and be refused."""
    file = target / "generation_config.json"
    penalty = read_json(file, ConfigError).get("repetition_penalty") if file.is_file() else None
    if penalty not in (None, 1):
        raise ConfigError(
            f"repetition_penalty {penalty} in {file}, which SGLang applies to every chat that sets none",
            "defaults without penalties, which AUF cannot apply with --enable-mixed-chunk",
            "leave out that flag; or start with --sampling-defaults openai "
            "(--set server_args.sampling_defaults=openai), which takes temperature, top_p and top_k from clients alone "
            "as well; or serve this target plainly",
        )


def refuse_code_of_drafter(path: Path) -> None:
    """Raise ConfigError where --trust-remote-code, meant for the target, would run code of the drafter."""
    code = read_json(path / "config.json", ConfigError).get("auto_map") or {}
    if "AutoConfig" in code:
        raise ConfigError(
            f"--trust-remote-code, and {path / 'config.json'} names code to run ({code['AutoConfig']})",
            "a drafter of weights and configuration, without code",
            "take AutoConfig out of the drafter's auto_map, or leave out --trust-remote-code",
        )


def _refusals(a: Any) -> list[tuple[bool, str]]:
    """Pairs of (whether the flag is set, why it cannot be honoured).

    For most of them SGLang compares the algorithm's name and would skip for "AUF" what it does for "DFLASH".
    """
    return [
        (a.pp_size > 1, f"--pp-size {a.pp_size}: block drafting needs the whole target in one stage"),
        (
            a.tokenizer_worker_num > 1,
            f"--tokenizer-worker-num {a.tokenizer_worker_num}: those processes load no plugins and would not know AUF",
        ),
        (bool(a.enable_lora or a.lora_paths), "--enable-lora: adapters would not reach the drafter's features"),
        (
            a.speculative_accept_threshold_single != 1.0 or a.speculative_accept_threshold_acc != 1.0,
            "--speculative-accept-threshold-*: below 1 the output is no longer the target's",
        ),
        (
            a.speculative_num_steps not in (None, 1) or a.speculative_eagle_topk not in (None, 1),
            "--speculative-num-steps / --speculative-eagle-topk: a block is one step and one path",
        ),
        (
            bool(a.speculative_adaptive),
            "--speculative-adaptive: this is SGLang's, for EAGLE; on the CPU platform AUF follows the load by itself",
        ),
        (
            a.speculative_draft_window_size is not None,
            "--speculative-draft-window-size: a drafter is trained to attend to the full context",
        ),
        (
            a.speculative_token_map is not None,
            f"--speculative-token-map: this is SGLang's, for EAGLE; for AUF put {draft_vocabulary.FILE} beside the "
            "drafter's weights (sglang-auf draft-vocabulary)",
        ),
        (bool(a.enable_unified_memory), "--enable-unified-memory: SGLang admits it for its built-in DFLASH only"),
        (a.disaggregation_mode != "null", f"--disaggregation-mode {a.disaggregation_mode}: not supported with AUF"),
        (
            bool(a.enable_deterministic_inference) and a.device == "cpu",
            "--enable-deterministic-inference: the CPU platform is deterministic without it",
        ),
        (
            a.rl_on_policy_target is not None,
            "--rl-on-policy-target: verification does not compute the trainer's log-probabilities",
        ),
        (
            a.speculative_draft_attention_backend == CAUSAL_ONLY,
            f"--speculative-draft-attention-backend {CAUSAL_ONLY}: it is causal only, and a block's slots are not",
        ),
        (
            bool(a.enable_custom_logit_processor),
            "--enable-custom-logit-processor: verification does not apply it, and requests would carry pickled code",
        ),
        (
            a.grammar_backend == "outlines",
            "--grammar-backend outlines: verification tries drafts in a grammar and takes them back, which it cannot",
        ),
        (bool(a.is_embedding), "--is-embedding: an embedding has no tokens to draft; serve it without speculation"),
        (bool(a.enable_mis), "--enable-mis: SGLang scores several items at once without speculation only"),
        # SGLang has turned --enable-dp-attention into --attn-dp-size by now (arg_groups/parallel_hook.py).
        (a.attn_dp_size > 1, f"--attn-dp-size {a.attn_dp_size} (--enable-dp-attention): not tried with AUF"),
    ]


def create_worker(server_args: Any) -> type:
    """The worker's class, which SGLang asks for in the scheduler process. Raises CompatError."""
    cpu = server_args.device == "cpu"
    check_seams(seams.WORKER_SEAMS + seams.TREE_SEAMS if cpu else seams.WORKER_SEAMS)
    from sglang_auf.speculative.worker import AufWorker

    return AufWorker


def make_tappable(*, model: Any, **_: Any) -> None:
    """Before `configure_aux_hidden_state_capture`: give SGLang's Qwen2 the method that it lacks (ADDED in tappable.py).

    Here and not at registration, when the model's module would be imported in every process.
    """
    kind = type(model)
    if f"{kind.__module__}:{kind.__qualname__}" == seams.QWEN2 and not hasattr(kind, "set_dflash_layers_to_capture"):
        kind.set_dflash_layers_to_capture = _set_dflash_layers_to_capture


def _set_dflash_layers_to_capture(model: Any, layer_ids: list[int]) -> None:
    """Qwen2's setter for EAGLE-3 does what Qwen3's for DFLASH does: layer k is captured where layer k + 1 begins."""
    model.set_eagle3_layers_to_capture(layer_ids)


HOOKS = (Hook.on(seams.CONFIGURE_CAPTURE, "BEFORE", make_tappable),)
