from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.harness.server_info import ServerFacts
from benchmarks.harness.servers import Server
from benchmarks.shapes import memory
from benchmarks.shapes.memory import GIB, memory_of, pool_tokens, resident
from benchmarks.shapes.write import WriteShapeConfig, write_shape
from sglang_auf.cpu.memory import RESERVED, WEIGHT_COPIES
from sglang_auf.errors import ServerError

SAID = {"weight": 1.5, "kvcache": 0.25, "graph": {"decode": 0.5, "prefill": 0.0}, "token_capacity": 1000}
INFO = {"internal_states": [{"memory_usage": SAID}], "mem_fraction_static": 0.75}


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """memory_of a server on such a device; this process is the server."""

    def asked(device: str, models: list[Path], used_before: int | None) -> Any:
        facts = ServerFacts(
            target="/t", model="m", drafter=None, algorithm=None, block_size=None, device=device, dtype="x", sglang="y"
        )
        monkeypatch.setattr(memory, "call", lambda *_: INFO)
        monkeypatch.setattr(memory, "server_facts", lambda _: facts)
        process: Any = SimpleNamespace(pid=os.getpid())
        return memory_of(Server("http://x", process), {}, models, used_before)

    return asked


def test_on_a_cpu_the_plan_is_the_platforms(ask: Callable[..., Any], tmp_path: Path) -> None:
    write_shape(WriteShapeConfig(out=tmp_path / "models", widths="toy", layers=6, seed=0))
    models = [tmp_path / "models" / "target", tmp_path / "models" / "drafter"]
    found = ask("cpu", models, None)
    stored = sum(file.stat().st_size for model in models for file in model.glob("*.safetensors"))
    of_a_token = (6 + 5) * 2 * 2 * 64 * 2  # layers of both, K and V, key heads, dimensions, bytes
    assert list(found.planned.values()) == pytest.approx(
        [WEIGHT_COPIES * stored / GIB, 1000 * of_a_token / GIB, RESERVED / GIB]
    )
    assert found.said == {"weights": 1.5, "KV pools": 0.25, "graphs (decode)": 0.5}
    assert (found.pool_tokens, found.asked) == (1000, {})
    assert 0.01 < found.used < 100


def test_on_a_gpu_it_is_what_the_device_has_in_use_more_than_before(
    ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"--query-gpu=memory.used": "10240\n", "--query-gpu=memory.total": "81920\n"}
    run = subprocess.run

    def asked(program: Any, **options: Any) -> Any:
        return SimpleNamespace(stdout=answers[program[1]]) if program[0] == "nvidia-smi" else run(program, **options)

    monkeypatch.setattr(subprocess, "run", asked)
    found = ask("cuda", [], 4 * GIB)
    assert found.used == 6
    assert list(found.planned.values()) == [60]  # 0.75 of 80 GiB


def test_without_nvidia_smi_the_device_is_unknown(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    found = ask("cuda", [], None)
    assert (found.used, found.planned) == (None, {})


def test_resident_memory_is_that_of_the_process() -> None:
    process: Any = SimpleNamespace(pid=os.getpid())
    alone = resident(Server("http://x", process))
    held = bytearray(os.urandom(1 << 20)) * 64
    assert resident(Server("http://x", process)) - alone > 32 << 20
    assert len(held) == 64 << 20


def test_a_server_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ServerError, match="memory_usage"):
        pool_tokens({"internal_states": [{}]})
