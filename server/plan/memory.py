"""Memory of a server before it loads: weights, the KV pool, and how many requests fit.

On the CPU platform the pool is what the platform itself has planned (sglang_auf/cpu/memory.py). On CUDA SGLang measures
what is free once the weights are loaded; here it is reckoned from its rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_auf.cpu.memory import GIB, RESERVED, WEIGHT_COPIES, ModelSize
from sglang_auf.errors import TargetError
from sglang_auf.files import INDEX, read_json

LENGTHS = (2048, 8192, 32768)
"""Tokens of a request, prompt and answer, for which it is said how many fit."""

LEFT_OUT = (
    "CUDA's context, fragmentation, and without the device what SGLang sets aside for graphs of prefill (0.5 GiB); "
    "activations and graphs of decoding are in what is kept for all else"
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes, on each device.

    target, drafter: as their files are; no drafter where plain. copies: times that a weight is held. head_rows: of the
    target's head, those of a draft vocabulary. static: what weights and pool may take together, None where only
    `tokens` is planned. reserved: for all else. tokens: of the pool, None where the target's files are not here yet.
    """

    target: ModelSize
    drafter: ModelSize | None
    copies: int
    head_rows: int
    static: int | None
    reserved: int
    tokens: int | None

    @property
    def kv_per_token(self) -> int:
        return self.target.kv_per_token + (self.drafter.kv_per_token if self.drafter else 0)

    @property
    def weights(self) -> int:
        """Of both models, all copies."""
        return self.copies * (self.target.weights + (self.drafter.weights if self.drafter else 0))

    def requests(self, length: int, most: int | None) -> int:
        """How many requests of so many tokens the pool holds at once. most: that may run at once."""
        fit = (self.tokens or 0) // length
        return fit if most is None else min(fit, most)


def on_a_cpu(target: Path, drafter: Path | None, head_rows: int, tokens: int | None) -> Plan:
    """tokens: what the platform planned."""
    return Plan(*_sizes(target, drafter), WEIGHT_COPIES, head_rows, None, RESERVED, tokens)


def on_cuda(target: Path, drafter: Path | None, head_rows: int, memory: int, arguments: Any) -> Plan:
    """memory: bytes of the device. arguments: SGLang's, resolved.

    SGLang keeps (1 - mem_fraction_static) of the memory that was free before it loaded, and gives the pool what the
    weights leave of the rest (mem_cache/kv_cache_configurator.py, _profile_available_bytes). Raises TargetError where
    that is not one token.
    """
    of_target, of_drafter = _sizes(target, drafter)
    own = arguments.kv_cache_dtype
    of_target = _share(of_target, own, arguments.tp_size)
    if of_drafter is not None:
        of_drafter = _share(of_drafter, arguments.speculative_draft_kv_cache_dtype or own, arguments.tp_size)
    static = int(arguments.mem_fraction_static * memory)
    plan = Plan(of_target, of_drafter, 1, head_rows, static, memory - static, None)
    if not of_target.weights:
        return plan
    tokens = (static - plan.weights - head_rows) // plan.kv_per_token // arguments.page_size * arguments.page_size
    if tokens <= 0:
        raise TargetError(
            f"{static / GIB:.1f} GiB of the device for weights and KV ({arguments.mem_fraction_static} of "
            f"{memory / GIB:.1f}), and weights of {(plan.weights + head_rows) / GIB:.1f} GiB",
            "room for the KV of a request beside the weights",
            "take a larger device, a smaller target, or more devices (--set server_args.tp_size=2)",
        )
    return replace(plan, tokens=min(tokens, arguments.max_total_tokens or tokens))


def rows_of_head(tokens: int | None, hidden: int, copies: int) -> int:
    """Bytes of a draft vocabulary's rows of the head, in bf16. tokens: None without one."""
    return 0 if tokens is None else copies * tokens * hidden * 2


def _sizes(target: Path, drafter: Path | None) -> tuple[ModelSize, ModelSize | None]:
    size = ModelSize.of(target)
    if not size.weights:  # a hub model of which only the configuration is here
        size = ModelSize(_indexed(target), size.kv_per_token)
    return size, None if drafter is None else ModelSize.of(drafter)


def _indexed(target: Path) -> int:
    """Bytes that the index of a checkpoint names; 0 without one."""
    if not (target / INDEX).is_file():
        return 0
    return int((read_json(target / INDEX, TargetError).get("metadata") or {}).get("total_size") or 0)


def _share(size: ModelSize, kv_cache_dtype: str, devices: int) -> ModelSize:
    """Of one of so many devices, which share weights and heads evenly."""
    kv = size.kv_per_token // 2 if "fp8" in kv_cache_dtype else size.kv_per_token
    return ModelSize(size.weights // devices, kv // devices)
