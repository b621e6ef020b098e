"""The KV pool's layout, and its size from free memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_auf import process
from sglang_auf.cpu import memory
from sglang_auf.cpu.memory import (
    GIB,
    MOST_TOKENS,
    RESERVED,
    ROOM,
    CpuKVPool,
    ModelSize,
    plan_pool,
    pool_tokens,
)
from sglang_auf.errors import TargetError

SMOLLM2 = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
}
SMOLLM2_KV = 30 * 2 * 3 * 64 * 2


def model(directory: Path, weights: int = 1000, **changes: Any) -> Path:
    """A checkpoint with `weights` bytes in two files; a change to `...` removes the key."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**SMOLLM2, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model-1.safetensors").write_bytes(bytes(weights // 2))
    (directory / "model-2.safetensors").write_bytes(bytes(weights - weights // 2))
    (directory / "tokenizer.json").write_bytes(bytes(5000))
    return directory


# --- sizes ---


def test_the_size_of_a_model_is_its_weight_files_and_its_key_and_value_heads(tmp_path: Path) -> None:
    assert ModelSize.of(model(tmp_path)) == ModelSize(1000, SMOLLM2_KV)


def test_files_that_sglang_does_not_read_are_not_counted(tmp_path: Path) -> None:
    """Mistral's repositories hold the weights twice."""
    model(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(1000))
    listed = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(listed))
    assert ModelSize.of(tmp_path).weights == 1000


def test_weights_in_float32_take_half_and_pickles_count(tmp_path: Path) -> None:
    assert ModelSize.of(model(tmp_path, dtype="float32")).weights == 500
    for file in tmp_path.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert ModelSize.of(tmp_path).weights == 500
    for file in tmp_path.glob("*.bin"):
        file.unlink()
    assert ModelSize.of(tmp_path).weights == 0


@pytest.mark.parametrize(
    ("changes", "kv_per_token"),
    [
        ({"head_dim": 128}, SMOLLM2_KV * 2),
        ({"head_dim": None}, SMOLLM2_KV),
        ({"num_key_value_heads": ...}, SMOLLM2_KV * 3),
        ({"num_hidden_layers": 15}, SMOLLM2_KV // 2),
    ],
)
def test_heads_that_the_config_leaves_out_are_derived(
    changes: dict[str, Any], kv_per_token: int, tmp_path: Path
) -> None:
    assert ModelSize.of(model(tmp_path, **changes)).kv_per_token == kv_per_token


def test_a_multimodal_model_counts_its_language_part(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": SMOLLM2, "num_hidden_layers": 1}))
    assert ModelSize.of(tmp_path).kv_per_token == SMOLLM2_KV


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_a_config_that_is_no_decoders_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=key):
        ModelSize.of(model(tmp_path, **{key: ...}))


def test_sizes_add_up() -> None:
    assert ModelSize(10, 3) + ModelSize(5, 4) == ModelSize(15, 7)


# --- the pool's tokens ---

SMALL = ModelSize(weights=GIB // 4, kv_per_token=SMOLLM2_KV)


def test_plenty_of_memory_is_capped() -> None:
    assert pool_tokens(SMALL, 8192, 500 * GIB) == MOST_TOKENS


def test_a_context_longer_than_the_cap_fits_where_memory_allows() -> None:
    assert pool_tokens(SMALL, 2 * MOST_TOKENS, 500 * GIB) == 2 * MOST_TOKENS + ROOM


@given(st.integers(0, 20 * GIB), st.integers(1, 1 << 21), st.integers(0, 60 * GIB), st.integers(1, 100_000))
def test_the_pool_fits_beside_the_weights_or_is_refused(
    weights: int, kv_per_token: int, available: int, context: int
) -> None:
    size = ModelSize(weights, kv_per_token)
    need = RESERVED + 2 * weights + context * kv_per_token
    if available < need:
        with pytest.raises(TargetError):
            pool_tokens(size, context, available)
        return
    tokens = pool_tokens(size, context, available)
    assert context <= tokens <= max(MOST_TOKENS, context + ROOM)
    assert RESERVED + 2 * weights + tokens * kv_per_token <= available


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(TargetError) as caught:
        pool_tokens(ModelSize(16 * GIB, 144 << 10), 40_960, 24 * GIB)
    assert "24.0 GiB" in caught.value.found
    for number in ("39.6 GiB", "weights twice (32.0)", "40960 tokens (5.6)", "2 reserved"):
        assert number in caught.value.expected
    assert "--set server_args.context_length=N" in caught.value.remedy


# --- a server's pool ---


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=RESERVED + GIB))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", 900), ("1000", 1000 - 700 + 50), ("5000", 900), (None, 900)],
    ids=["no limit", "a limit", "a limit above the machine's memory", "no container"],
)
def test_what_is_free_is_what_a_container_leaves(
    limit: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    control_group(tmp_path, monkeypatch, "0::/")
    if limit is not None:
        limited(tmp_path, limit)
    assert memory.free_memory() == expected


def control_group(root: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    """A machine whose control groups are directories of `root`. own: what the kernel says of this process."""
    (root / "cgroup").write_text(f"{own}\n")
    monkeypatch.setattr(process, "CGROUPS", root)
    monkeypatch.setattr(process, "OWN_CGROUPS", root / "cgroup")


def limited(group: Path, limit: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text("700\n")
    (group / "memory.stat").write_text("anon 600\ninactive_file 50\nactive_file 40\n")


@pytest.mark.parametrize("limits", [("max", "1000"), ("1000", "max"), ("1000", "1100"), ("1100", "1000")])
def test_the_smallest_limit_of_the_groups_around_a_process_holds(
    limits: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a systemd service with MemoryMax, or of a slice around it; the root has no limit."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    control_group(tmp_path, monkeypatch, "0::/auf.slice/auf.service")
    for group, limit in zip(("auf.slice", "auf.slice/auf.service"), limits, strict=True):
        limited(tmp_path / group, limit)
    limited(tmp_path / "other.slice", "710")
    assert memory.free_memory() == 1000 - 700 + 50


def test_a_limit_of_cgroup_1_holds_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    control_group(tmp_path, monkeypatch, "4:memory:/docker/abc")
    (group := tmp_path / "memory").mkdir()  # a container sees its own group as the root
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory.usage_in_bytes").write_text("700\n")
    (group / "memory.stat").write_text("inactive_file 20\ntotal_inactive_file 50\n")
    assert memory.free_memory() == 1000 - 700 + 50


def planned(target: Path, drafter: Path | str | None = None, context: int | None = None) -> int | None:
    return plan_pool(
        SimpleNamespace(
            model_path=str(target),
            speculative_draft_model_path=None if drafter is None else str(drafter),
            context_length=context,
        )
    )


@pytest.mark.usefixtures("available")
def test_target_and_drafter_share_the_memory(tmp_path: Path) -> None:
    target = model(tmp_path / "target")
    drafter = model(tmp_path / "drafter", num_hidden_layers=2)
    assert planned(target) == (GIB - 2000) // SMOLLM2_KV
    assert planned(target, drafter) == (GIB - 4000) // (SMOLLM2_KV + SMOLLM2_KV // 15)


@pytest.mark.usefixtures("available")
def test_the_context_is_the_targets_unless_one_is_given(tmp_path: Path) -> None:
    target = model(tmp_path, max_position_embeddings=1_000_000)
    with pytest.raises(TargetError, match="1000000 tokens"):
        planned(target)
    assert planned(target, context=4096) == (GIB - 2000) // SMOLLM2_KV
    with pytest.raises(TargetError, match="500000 tokens"):
        planned(target, context=500_000)


@pytest.mark.usefixtures("available")
def test_a_model_that_is_not_here_yet_is_left_to_sglang(tmp_path: Path) -> None:
    target = model(tmp_path / "target")
    assert planned(Path("owner/name")) is None
    assert planned(target, "owner/drafter") is None


def test_a_context_length_that_a_config_leaves_open_is_no_fault(available: None, tmp_path: Path) -> None:
    assert planned(model(tmp_path / "target", max_position_embeddings=None)) > 4096


# --- the pool ---

LAYERS, KEY_HEADS, HEAD = 3, 2, 8


def pool(**changes: Any) -> CpuKVPool:
    options: dict[str, Any] = {
        "size": 20,
        "page_size": 1,
        "dtype": torch.bfloat16,
        "head_num": KEY_HEADS,
        "head_dim": HEAD,
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    return CpuKVPool(**options | changes)


def layer(number: int) -> SimpleNamespace:
    return SimpleNamespace(layer_id=number)


def kv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, tokens, KEY_HEADS, HEAD, generator=generator).bfloat16()
    return k, v


def test_keys_and_values_of_a_slot_lie_side_by_side() -> None:
    made = pool()
    slots, (k, v) = torch.tensor([4, 0, 19]), kv(3)
    made.set_kv_buffer(layer(1), slots, k, v)
    side_by_side = made.interleaved(1)
    assert side_by_side.shape == (21, 2, KEY_HEADS, HEAD)
    assert side_by_side.is_contiguous()
    assert torch.equal(side_by_side[slots], torch.stack([k, v], dim=1))
    untouched = [slot for slot in range(21) if slot not in (4, 0, 19)]
    assert (side_by_side[untouched] == 0).all()
    assert (made.interleaved(0) == 0).all()
    assert (made.interleaved(2) == 0).all()


def test_sglang_reads_the_same_memory_through_its_own_names() -> None:
    made = pool()
    slots, (k, v) = torch.tensor([7, 8]), kv(2)
    made.set_kv_buffer(layer(2), slots, k, v)
    assert torch.equal(made.get_key_buffer(2)[slots], k)
    assert torch.equal(made.get_value_buffer(2)[slots], v)
    assert made.get_key_buffer(2).data_ptr() == made.interleaved(2).data_ptr()
    assert sum(made.get_kv_size_bytes()) == LAYERS * 21 * 2 * KEY_HEADS * HEAD * 2


def test_a_block_commits_its_accepted_prefix_only() -> None:
    """The drafter's context after verification (dflash_worker_v2.py, _append_target_hidden_to_draft_kv_by_loc)."""
    made = pool()
    slots, (k, v) = torch.tensor([[1, 2, 3], [9, 8, 7]]), kv(6)
    made.set_kv_buffer_prefix_valid(layer(0), slots, torch.tensor([2, 1], dtype=torch.int32), k, v)
    committed = made.interleaved(0)
    assert torch.equal(committed[[1, 2, 9], 0], k[[0, 1, 3]])
    assert torch.equal(committed[[1, 2, 9], 1], v[[0, 1, 3]])
    assert (committed[[3, 8, 7]] == 0).all()


def test_layers_are_numbered_from_the_first_one_here() -> None:
    made = pool(start_layer=5, end_layer=7)
    k, v = kv(1)
    made.set_kv_buffer(layer(6), torch.tensor([3]), k, v)
    assert torch.equal(made.interleaved(6)[3, 0], k[0])


def test_it_can_be_asked_to_prepare_copies_without_a_kernel() -> None:
    assert pool(enable_kv_cache_copy=True)._kv_copy_config is None


def test_key_and_value_heads_of_different_sizes_are_refused() -> None:
    with pytest.raises(TargetError, match="8 and value heads of 4"):
        pool(v_head_dim=4)
