"""Launches that a recipe cannot be trained with, and memory that goes back to the system."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from sglang_auf.cpu import linear
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.training import runtime
from sglang_auf.training.runtime import check_launch, give_back_free_memory, require_same_inputs, stop_signals
from tests.support.training_runs import tiny_recipe


def launched(ranks: int, kind: DistributedType = DistributedType.MULTI_GPU, version: int = 2) -> Any:
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    return SimpleNamespace(num_processes=ranks, distributed_type=kind, state=state, gradient_accumulation_steps=1)


def test_ranks_with_different_rows_or_targets_all_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other rank has is put in place of a gather."""
    others = {"a": "a", "T": "T", "b": "a", "U": "T"}
    monkeypatch.setattr(runtime, "gather_object", lambda own: [*own, others[own[0]]])
    require_same_inputs("a", "T")
    with pytest.raises(DataError, match="2 kinds of rows"):
        require_same_inputs("b", "T")
    with pytest.raises(DataError, match="2 kinds of targets"):
        require_same_inputs("a", "U")


def test_ranks_share_micro_batches_evenly() -> None:
    recipe = tiny_recipe("t", "d", batch={"micro_batches": 6})
    for ranks in (1, 2, 3, 6):
        check_launch(recipe, launched(ranks))
    with pytest.raises(ConfigError) as caught:
        check_launch(recipe, launched(4))
    assert "micro_batches 6 on 4 ranks" in caught.value.found
    assert "batch.micro_batches=8" in caught.value.remedy


def test_muon_needs_whole_matrices() -> None:
    muon = tiny_recipe("t", "d", optimiser={"name": "muon", "muon_lr": 0.01})
    check_launch(muon, launched(2))
    check_launch(tiny_recipe("t", "d"), launched(2, DistributedType.FSDP))
    with pytest.raises(ConfigError, match="muon under FSDP"):
        check_launch(muon, launched(2, DistributedType.FSDP))


def test_the_first_fsdp_is_refused() -> None:
    with pytest.raises(ConfigError, match="FSDP version 1"):
        check_launch(tiny_recipe("t", "d"), launched(2, DistributedType.FSDP, version=1))


def test_micro_batches_are_counted_by_the_recipe_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_the_cpu: None
) -> None:
    """`accelerate launch` sets the variable. Each gradient would be divided by it, and clipped less."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    recipe = tiny_recipe("t", "d")
    with pytest.raises(ConfigError, match="gradient_accumulation_steps 4 in accelerate"):
        check_launch(recipe, runtime.make_accelerator(recipe, tmp_path))


def test_a_launcher_may_send_sigterm_again_and_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as caught:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert set(caught) == {signal.SIGTERM}
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert set(caught) == {signal.SIGTERM, signal.SIGINT}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_human_who_asks_twice_need_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)


def test_holes_in_the_heap_go_back_to_the_system() -> None:
    def resident() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    held = [bytearray(b"x" * 100_000) for _ in range(4_000)]
    kept, full = held[::400] + held[-1:], resident()  # they keep the heap from shrinking by itself
    held.clear()
    give_back_free_memory()
    assert resident() < full - 300_000_000
    assert len(kept) == 11


MANY_SHAPES = """
import sys
from pathlib import Path
import torch
from sglang_auf.training.runtime import give_back_free_memory, limit_compiled_products

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])

if sys.argv[1] == "limit":
    limit_compiled_products()
weight = torch.randn(576, 576).bfloat16()
before = resident()
for rows in range(1, 501):
    torch.randn(rows, 576).bfloat16() @ weight
give_back_free_memory()
print(resident() - before)
"""


@pytest.mark.e2e
@pytest.mark.skipif(not linear.can_prepack(), reason="no bf16 products of oneDNN on this machine")
def test_memory_of_products_of_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    grown = {}
    for choice in ("limit", "keep"):
        command = [sys.executable, "-c", MANY_SHAPES, choice]
        grown[choice] = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert grown["limit"] < 0.75 * grown["keep"]
