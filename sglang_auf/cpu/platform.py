"""The CPU platform that SGLang loads through the entry point `sglang.srt.platforms: auf_cpu` (sglang_auf.plugin).

It serves device "cpu" through SGLang's out-of-tree platform interface. SGLang's own CPU mode needs a build of
sgl-kernel that is on no package index, refuses DFLASH, and gives a row other results alone than among several.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_auf import ALGORITHM, PLATFORM, SAMPLER_NAME
from sglang_auf.cpu import seams
from sglang_auf.env import REPLAY, ROW_INVARIANT
from sglang_auf.errors import ConfigError
from sglang_auf.hooks.registry import Hook
from sglang_auf.process import fork_children, set_environment

ATTENTION_BACKEND = PLATFORM
CHUNKED_PREFILL_TOKENS = 2048
MAX_RUNNING_REQUESTS = 48


def verify_cache_slots(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: object,
) -> torch.Tensor:
    """Pool slots of the verify block of each request, int64 [batch_size * draft_token_num].

    The torch form of assign_extend_cache_locs (sglang/kernels/ops/speculative/cache_locs.py) for equal lengths.
    """
    columns = start_offset[:, None] + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices[:, None], columns].long().flatten()


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write newly allocated slots into each request's row, [start_offset, end_offset).

    The numpy form of the Triton kernel of this name (sglang/srt/mem_cache/allocation.py), for which SGLang has no
    platform hook.
    """
    table, slots = req_to_token.numpy(), out_cache_loc.numpy()
    done = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        table[row, start:end] = slots[done : done + end - start]
        done += end - start


def validate_domino_runtime(original: Callable[..., None], *, device: torch.device, **facts: Any) -> None:
    """SGLang's check of a Domino head, on any device.

    domino_utils.py refuses devices other than CUDA before it checks shapes and types, but the rollout is plain torch.
    """
    original(device=torch.device("cuda") if device.type == "cpu" else device, **facts)


def scale_logits(logits: torch.Tensor, scaling_penalties: torch.Tensor) -> None:
    """Repetition penalties on logits, in place. Both [requests, vocabulary].

    SGLang's is compiled when the first request asks for one (sampling/penaltylib/repetition_penalty.py). All
    clients would wait for that, and the engine would end on a machine without a C++ compiler.
    """
    logits.copy_(torch.where(logits < 0, logits * scaling_penalties, logits / scaling_penalties))


def refuse_new_weights(*_: Any, **__: Any) -> tuple[bool, str]:
    """In place of the functions of SGLang's WeightUpdater: products keep weights in an order of their own."""
    return False, "the CPU platform reorders weights when it loads them: start a server with the new ones"


def _cpu_tensors_need_no_stream() -> None:
    """Make Tensor.record_stream a no-op for CPU tensors, which raise there.

    dflash_worker_v2.py calls it on batch.seq_lens without the guard that the other workers have. Once it has that
    guard, this can go.
    """
    original = torch.Tensor.record_stream
    if getattr(original, "skips_cpu", False):
        return

    def record_stream(self: torch.Tensor, stream: Any) -> None:
        if self.device.type != "cpu":
            original(self, stream)

    record_stream.skips_cpu = True  # type: ignore[attr-defined]
    torch.Tensor.record_stream = record_stream


class AufCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """SGLang on a CPU in bf16, with our attention, and linear layers whose rows do not depend on each other."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int = 0) -> str:
        # A string: serving_hook.py splits it at ":".
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in (ALGORITHM, "DFLASH")

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == ATTENTION_BACKEND

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        from sglang_auf.cpu.memory import CpuKVPool

        return CpuKVPool if kind == "mha" else None

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        return verify_cache_slots

    def get_dispatch_key_name(self) -> str:
        from sglang_auf.cpu.elementwise import DISPATCH_KEY

        return DISPATCH_KEY

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Sets defaults and refuses what is not supported, before anything loads."""
        from sglang_auf.cpu.memory import local_checkpoints, plan_pool
        from sglang_auf.cpu.refusals import refuse_config

        _refuse_unsupported(server_args)
        for path in local_checkpoints(server_args) or ():
            refuse_config(path)
        server_args.disable_cuda_graph = True
        server_args.attention_backend = ATTENTION_BACKEND
        server_args.page_size = 1
        server_args.dtype = "bfloat16"
        server_args.sleep_on_idle = True  # else an idle scheduler keeps a core busy
        if server_args.chunked_prefill_size is None:
            server_args.chunked_prefill_size = CHUNKED_PREFILL_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = MAX_RUNNING_REQUESTS
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = plan_pool(server_args)

    def init_backend(self) -> None:
        _cpu_tensors_need_no_stream()

    def post_load_model(self, model: torch.nn.Module) -> None:
        from sglang_auf.cpu import kernels, linear, refusals, replay

        refusals.refuse_modules(model)
        kernels.prepare()
        linear.install(model)
        for module in model.modules():
            # In models/dflash.py this path is a Triton kernel, and no check of the device guards it.
            if hasattr(module, "use_table_qk_norm_rope"):
                module.use_table_qk_norm_rope = False
        if REPLAY.is_on() and ROW_INVARIANT.is_on():
            replay.install(model)


def _refuse_unsupported(server_args: Any) -> None:
    if server_args.dtype not in ("auto", "bfloat16", "bf16"):
        raise ConfigError(
            f"--dtype {server_args.dtype}",
            "--dtype bfloat16 (or auto) on the CPU platform",
            "leave --dtype out: only bf16 products give a row the same result in any batch",
        )
    for name, only in (("tp_size", 1), ("dp_size", 1), ("pp_size", 1)):
        if getattr(server_args, name) != only:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(server_args, name)}",
                f"{only} on the CPU platform",
                "start several servers behind a router instead",
            )
    for name in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        if getattr(server_args, name) not in (None, ATTENTION_BACKEND):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {getattr(server_args, name)}", f"{ATTENTION_BACKEND} on the CPU platform", f"leave {flag} out"
            )
    for name in ("kv_cache_dtype", "speculative_draft_kv_cache_dtype"):
        if getattr(server_args, name) not in (None, "auto", "bfloat16", "bf16"):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {getattr(server_args, name)}", f"{flag} bfloat16 on the CPU platform", f"leave {flag} out"
            )
    if server_args.page_size not in (None, 1):
        raise ConfigError(f"--page-size {server_args.page_size}", "1 on the CPU platform", "leave --page-size out")


def register() -> None:
    """Register attention backend, fused operators and argument defaults. The plugin installs HOOKS."""
    set_environment()  # for the scheduler process, which starts after this
    os.environ.setdefault("SGLANG_ROPE_CACHE_FP32", "1")  # bf16 angles are off by entire positions at long range
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, DRAFT_ATTENTION_BACKEND_CHOICES
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_auf.cpu import elementwise

    for choices in (ATTENTION_BACKEND_CHOICES, DRAFT_ATTENTION_BACKEND_CHOICES):
        if ATTENTION_BACKEND not in choices:
            choices.append(ATTENTION_BACKEND)

    @register_attention_backend(ATTENTION_BACKEND)  # type: ignore[untyped-decorator]
    def create(runner: Any) -> Any:
        from sglang_auf.cpu.attention import CpuAttentionBackend

        return CpuAttentionBackend(runner)

    @register_resolution_hook("handle_cpu_backends")  # type: ignore[untyped-decorator]
    def cpu_backends(server_args: Any, previous: Callable[[Any], None]) -> None:
        # SGLang's own step forces the pytorch sampler on device "cpu", which ignores seeds.
        if server_args.sampling_backend not in (None, SAMPLER_NAME):
            raise ConfigError(
                f"--sampling-backend {server_args.sampling_backend}",
                f"{SAMPLER_NAME} on the CPU platform",
                "leave --sampling-backend out",
            )
        declare_resolution(server_args, "handle_cpu_backends", sampling_backend=SAMPLER_NAME)

    elementwise.register()


HOOKS = (
    Hook.on(seams.ASSIGN_TO_POOL, "REPLACE", assign_req_to_token_pool),
    Hook.on(seams.VALIDATE_DOMINO, "AROUND", validate_domino_runtime),
    Hook.on(seams.START_METHOD, "AFTER", fork_children),
    *(Hook.on(seam, "REPLACE", scale_logits) for seam in seams.SCALE_LOGITS),
    *(Hook.on(seam, "REPLACE", refuse_new_weights) for seam in seams.NEW_WEIGHTS),
)
