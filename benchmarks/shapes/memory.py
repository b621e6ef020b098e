"""Memory of a server: what was planned before it loaded, what it says itself, and what it uses."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.results import Cell
from benchmarks.harness.server_info import ServerFacts, call, server_facts
from benchmarks.harness.servers import Server, family
from sglang_auf.errors import ServerError

GIB = 1 << 30


class ServerCell(Cell):
    """A server after its work. Sizes in GiB.

    planned: what was reckoned before the start, part by part. said: the server's own account (its /server_info).
    used: resident memory of all its processes, shared pages once; on CUDA what the device has in use more than before.
    None where nothing tells it. pool_tokens: tokens that the KV pool holds.
    """

    facts: ServerFacts
    planned: dict[str, float]
    said: dict[str, float]
    used: float | None
    pool_tokens: int


def memory_of(server: Server, asked: dict[str, Any], models: list[Path], used_before: int | None) -> ServerCell:
    """models: directories of what it has loaded. used_before: see Visit."""
    info = call(server.base_url, "/server_info")
    said, tokens = _memory_usage(info), pool_tokens(info)
    account = {"weights": said["weight"], "KV pools": said["kvcache"]}
    account |= {f"graphs ({phase})": size for phase, size in said["graph"].items() if size}
    facts = server_facts(server.base_url)
    if facts.device == "cuda":
        total, now = device_total(), device_used(facts.device)
        share = info["mem_fraction_static"]
        planned = {} if total is None else {f"static, {share:.3f} of the device": share * total / GIB}
        used = None if now is None or used_before is None else (now - used_before) / GIB
    else:
        planned, used = _planned_on_a_cpu(models, tokens), resident(server) / GIB
    return ServerCell(asked=asked, facts=facts, planned=planned, said=account, used=used, pool_tokens=tokens)


def pool_tokens(info: dict[str, Any]) -> int:
    """Tokens that the KV pool holds. info: reply of /server_info."""
    return int(_memory_usage(info)["token_capacity"])


def _memory_usage(info: dict[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = info["internal_states"][0]["memory_usage"]
    except (KeyError, IndexError, TypeError) as error:
        raise ServerError(f"/server_info without {error}", "memory_usage, as SGLang 0.5.23 gives it") from None
    return found


def resident(server: Server) -> int:
    """Bytes of all processes of a server, each shared page counted once."""
    total = 0
    for process in family(server.process):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def device_used(device: str | None) -> int | None:
    """Bytes in use on the devices, by all processes; None on a CPU, or where nvidia-smi does not tell."""
    return _nvidia_smi("memory.used") if device == "cuda" else None


def device_total() -> int | None:
    return _nvidia_smi("memory.total")


def _planned_on_a_cpu(models: list[Path], tokens: int) -> dict[str, float]:
    """As the CPU platform plans (sglang_auf/cpu/memory.py), for a KV pool of so many tokens."""
    from sglang_auf.cpu.memory import RESERVED, WEIGHT_COPIES, ModelSize

    sizes = [ModelSize.of(model) for model in models]
    return {
        f"weights, {WEIGHT_COPIES} times": WEIGHT_COPIES * sum(size.weights for size in sizes) / GIB,
        f"KV pool of {tokens} tokens": tokens * sum(size.kv_per_token for size in sizes) / GIB,
        "reserved": RESERVED / GIB,
    }


def _nvidia_smi(figure: str) -> int | None:
    """Of all devices, in bytes."""
    program = ["nvidia-smi", f"--query-gpu={figure}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=20)
        return sum(int(line) for line in done.stdout.split()) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
