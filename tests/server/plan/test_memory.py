"""The plan against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.plan.memory import Plan, on_a_cpu, on_cuda, rows_of_head
from sglang_auf.cpu.memory import GIB, RESERVED, ModelSize
from sglang_auf.errors import TargetError
from sglang_auf.files import INDEX
from tests.support.qwen3_8b import DRAFTER, write_target

KIB = 1024
TARGET_WEIGHTS = 16_381_470_720
"""Bytes of 8,190,735,360 numbers in bf16: two tables of 151936 x 4096, 36 layers, the last norm."""
LAYER = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 12288) + 2 * 4096 + 2 * 128
DRAFTER_WEIGHTS = 2 * 10**9


def test_the_weights_above_are_those_of_qwen3_8b() -> None:
    assert 2 * (2 * 151936 * 4096 + 36 * LAYER + 4096) == TARGET_WEIGHTS


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """As the hub's cache holds it before the weights are fetched."""
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / INDEX).write_text(json.dumps({"metadata": {"total_size": TARGET_WEIGHTS}, "weight_map": {}}))
    return write_target(tmp_path / "target")


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    (made := tmp_path / "drafter").mkdir()
    (made / "config.json").write_text(json.dumps(DRAFTER))
    with (made / "model.safetensors").open("wb") as file:
        file.truncate(DRAFTER_WEIGHTS)
    return made


def arguments(**changes: Any) -> SimpleNamespace:
    given = {"kv_cache_dtype": "auto", "speculative_draft_kv_cache_dtype": None, "tp_size": 1, "page_size": 1}
    return SimpleNamespace(**given | {"mem_fraction_static": 0.8, "max_total_tokens": None} | changes)


def test_qwen3_8b_on_a_device_of_80_gib(target: Path, drafter: Path) -> None:
    rows = rows_of_head(8192, 4096, 1)
    assert rows == 8192 * 4096 * 2
    plan = on_cuda(target, drafter, rows, 80 * GIB, arguments())
    assert plan.target == ModelSize(TARGET_WEIGHTS, 144 * KIB), "36 layers, keys and values, 8 heads of 128 in bf16"
    assert plan.drafter == ModelSize(DRAFTER_WEIGHTS, 20 * KIB), "5 layers"
    assert plan.static == 64 * GIB
    assert plan.reserved == 16 * GIB
    left = 64 * GIB - TARGET_WEIGHTS - DRAFTER_WEIGHTS - rows
    assert plan.tokens == left // (164 * KIB) == 299_345
    assert [plan.requests(length, None) for length in (2048, 8192, 32768)] == [146, 36, 9]
    assert [plan.requests(length, 48) for length in (2048, 8192, 32768)] == [48, 36, 9]


def test_plain_decoding_leaves_the_drafters_share_to_the_target(target: Path) -> None:
    plan = on_cuda(target, None, 0, 80 * GIB, arguments())
    assert plan.tokens == (64 * GIB - TARGET_WEIGHTS) // (144 * KIB)


@pytest.mark.parametrize(
    ("changes", "weights", "kv"),
    [
        ({"kv_cache_dtype": "fp8_e4m3"}, (1, 1), (72, 10)),
        ({"kv_cache_dtype": "fp8_e4m3", "speculative_draft_kv_cache_dtype": "bf16"}, (1, 1), (72, 20)),
        ({"tp_size": 2}, (2, 2), (72, 10)),
    ],
    ids=["8 bits", "8 bits, the drafter's 16", "two devices"],
)
def test_what_makes_a_token_smaller(
    changes: dict[str, Any], weights: tuple[int, int], kv: tuple[int, int], target: Path, drafter: Path
) -> None:
    plan = on_cuda(target, drafter, 0, 80 * GIB, arguments(**changes))
    assert plan.drafter is not None
    assert (plan.target.kv_per_token, plan.drafter.kv_per_token) == (kv[0] * KIB, kv[1] * KIB)
    assert plan.weights == TARGET_WEIGHTS // weights[0] + DRAFTER_WEIGHTS // weights[1]


def test_a_pool_is_whole_pages_and_no_larger_than_asked(target: Path, drafter: Path) -> None:
    left = 64 * GIB - TARGET_WEIGHTS - DRAFTER_WEIGHTS
    assert left // (164 * KIB) % 64, "or this test would not see it"
    assert on_cuda(target, drafter, 0, 80 * GIB, arguments(page_size=64)).tokens == left // (164 * KIB) // 64 * 64
    assert on_cuda(target, drafter, 0, 80 * GIB, arguments(max_total_tokens=5000)).tokens == 5000


def test_a_device_without_room_for_a_token_is_refused(target: Path, drafter: Path) -> None:
    with pytest.raises(TargetError, match="GiB of the device") as caught:
        on_cuda(target, drafter, 0, 20 * GIB, arguments())
    assert "16.0 GiB of the device" in caught.value.found
    assert "weights of 17.1 GiB" in caught.value.found


def test_what_is_not_known_before_the_files_are_here(target: Path, drafter: Path) -> None:
    (target / INDEX).unlink()
    assert on_cuda(target, drafter, 0, 80 * GIB, arguments()).tokens is None


def test_a_cpu_holds_weights_twice_and_the_pool_is_the_platforms(target: Path, drafter: Path) -> None:
    plan = on_a_cpu(target, drafter, 0, 70_000)
    assert (plan.weights, plan.reserved, plan.tokens) == (2 * (TARGET_WEIGHTS + DRAFTER_WEIGHTS), RESERVED, 70_000)


def test_no_pool_holds_no_request() -> None:
    assert Plan(ModelSize(1, 1), None, 1, 0, None, 0, None).requests(2048, 48) == 0
