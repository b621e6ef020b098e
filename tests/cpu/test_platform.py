"""The CPU platform: SGLang's mappings in torch against plain loops, its defaults, and what it refuses."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.platforms.device_mixin import PlatformEnum

from sglang_auf.cpu import platform
from sglang_auf.cpu.platform import AufCpuPlatform, assign_req_to_token_pool, scale_logits, verify_cache_slots
from sglang_auf.errors import ConfigError

WIDTH = 24

rows = st.lists(st.integers(0, 9), min_size=1, max_size=8, unique=True)
integers = st.sampled_from([torch.int32, torch.int64])


def table(seed: int) -> torch.Tensor:
    return torch.randint(1000, (10, WIDTH), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


# --- mappings ---


@given(st.data(), rows, st.integers(1, 8), integers)
def test_slots_of_a_block_are_read_from_each_requests_row(
    data: st.DataObject, pool_rows: list[int], block: int, dtype: torch.dtype
) -> None:
    starts = [data.draw(st.integers(0, WIDTH - block)) for _ in pool_rows]
    req_to_token = table(block)
    found = verify_cache_slots(
        req_pool_indices=torch.tensor(pool_rows),
        req_to_token=req_to_token,
        start_offset=torch.tensor(starts, dtype=dtype),
        end_offset=torch.tensor(starts, dtype=dtype) + block,
        batch_size=len(pool_rows),
        draft_token_num=block,
        device="cpu",
    )
    expected = [
        int(req_to_token[row, start + i]) for row, start in zip(pool_rows, starts, strict=True) for i in range(block)
    ]
    assert found.tolist() == expected
    assert found.dtype == torch.int64


@given(st.data(), rows, integers, st.integers(0, 99))
def test_new_slots_go_to_their_requests_rows_and_nowhere_else(
    data: st.DataObject, pool_rows: list[int], dtype: torch.dtype, seed: int
) -> None:
    starts = [data.draw(st.integers(0, WIDTH)) for _ in pool_rows]
    ends = [data.draw(st.integers(start, WIDTH)) for start in starts]
    slots = torch.randperm(500, generator=torch.Generator().manual_seed(seed))[: sum(ends) - sum(starts)] + 2000
    found, expected = table(seed), table(seed)
    assign_req_to_token_pool(
        torch.tensor(pool_rows),
        found,
        torch.tensor(starts, dtype=dtype),
        torch.tensor(ends, dtype=dtype),
        slots,
        len(pool_rows),
    )
    unused = iter(slots.tolist())
    for row, start, end in zip(pool_rows, starts, ends, strict=True):
        for column in range(start, end):
            expected[row, column] = next(unused)
    assert torch.equal(found, expected)
    assert found.dtype == torch.int32


# --- what SGLang would otherwise do to CPU tensors ---


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "record_stream", torch.Tensor.record_stream)


@pytest.mark.usefixtures("streams")
def test_a_cpu_tensor_needs_no_stream_and_others_still_get_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[torch.device, object]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((tensor.device, stream)))
    AufCpuPlatform().init_backend()
    once = torch.Tensor.record_stream
    AufCpuPlatform().init_backend()
    assert torch.Tensor.record_stream is once
    torch.zeros(3).record_stream("stream")  # type: ignore[arg-type]
    assert recorded == []
    torch.zeros(3, device="meta").record_stream("stream")  # type: ignore[arg-type]
    assert recorded == [(torch.device("meta"), "stream")]


@pytest.mark.usefixtures("streams")
def test_a_cpu_tensor_and_torchs_own_method() -> None:
    AufCpuPlatform().init_backend()
    torch.zeros(3).record_stream(torch.cpu.current_stream())  # type: ignore[arg-type]


def test_a_domino_head_is_checked_as_on_cuda_and_only_the_device_is_let_through() -> None:
    asked: list[dict[str, Any]] = []

    def original(**facts: Any) -> None:
        asked.append(facts)
        if facts["device"].type != "cuda":
            raise ValueError("device")

    platform.validate_domino_runtime(original, device=torch.device("cpu"), tp_size=1, hidden_size=8)
    assert asked == [{"device": torch.device("cuda"), "tp_size": 1, "hidden_size": 8}]
    with pytest.raises(ValueError, match="device"):
        platform.validate_domino_runtime(original, device=torch.device("xpu"))


def test_repetition_penalties_are_sglangs_without_being_compiled() -> None:
    from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator)
    scaling = torch.where(torch.rand(3, 50, generator=generator) < 0.5, 1.3, 1.0)
    theirs, ours = logits.clone(), logits.clone()
    inspect.unwrap(apply_scaling_penalties)(theirs, scaling)
    scale_logits(ours, scaling)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, logits)
    hooked = {hook.target for hook in platform.HOOKS if hook.function is scale_logits}
    sources = Path(importlib.util.find_spec("sglang.srt").submodule_search_locations[0]).rglob("*.py")  # type: ignore[union-attr, index]
    by_name = re.compile(r"^from .* import .*\bapply_scaling_penalties\b", re.MULTILINE)
    importing = [path.stem for path in sources if by_name.search(path.read_text(encoding="utf-8"))]
    assert {target.partition(":")[0].rpartition(".")[2] for target in hooked} == {"repetition_penalty", *importing}


# --- the platform ---


def test_it_is_an_out_of_tree_cpu_that_promises_nothing_it_lacks() -> None:
    made = AufCpuPlatform()
    assert made._enum is PlatformEnum.OOT
    assert made.is_out_of_tree()
    assert (made.device_type, made.get_device()) == ("cpu", "cpu")
    assert not any(getattr(made.capabilities, name) for name in type(made.capabilities).__struct_fields__)


def test_it_offers_its_own_attention_pool_and_mappings() -> None:
    from sglang_auf.cpu.elementwise import DISPATCH_KEY
    from sglang_auf.cpu.memory import CpuKVPool

    made = AufCpuPlatform()
    assert made.get_default_attention_backend() == "auf_cpu"
    assert made.get_default_speculative_draft_attention_backend("AUF") == "auf_cpu"
    assert made.supports_speculative_draft_attention_backend("AUF", "auf_cpu")
    assert not made.supports_speculative_draft_attention_backend("AUF", "flashinfer")
    assert [made.supports_speculative_algorithm(name) for name in ("AUF", "DFLASH", "EAGLE")] == [True, True, False]
    assert made.get_kv_pool_cls(kind="mha") is CpuKVPool
    assert made.get_kv_pool_cls(kind="mla") is None
    assert made.get_speculative_cache_locs_fn() is verify_cache_slots
    assert made.get_dispatch_key_name() == DISPATCH_KEY


def test_a_loaded_model_loses_the_path_that_is_a_gpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[torch.nn.Module] = []
    monkeypatch.setattr("sglang_auf.cpu.linear.install", installed.append)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].use_table_qk_norm_rope = True
    AufCpuPlatform().post_load_model(model)
    assert model[1].use_table_qk_norm_rope is False
    assert not hasattr(model[0], "use_table_qk_norm_rope")
    assert installed == [model]


# --- server arguments ---


def arguments(**changes: Any) -> SimpleNamespace:
    """SGLang's defaults for what the platform reads."""
    defaults: dict[str, Any] = {
        "model_path": "owner/name",
        "context_length": None,
        "dtype": "auto",
        "kv_cache_dtype": "auto",
        "speculative_draft_kv_cache_dtype": None,
        "tp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "attention_backend": None,
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "page_size": None,
        "disable_cuda_graph": False,
        "chunked_prefill_size": None,
        "max_running_requests": None,
        "max_total_tokens": None,
        "speculative_draft_model_path": None,
    }
    return SimpleNamespace(**defaults | changes)


def test_the_arguments_read_and_written_are_sglangs() -> None:
    from sglang.srt.server_args import ServerArgs

    given = arguments()
    AufCpuPlatform().apply_server_args_defaults(given)
    assert set(vars(given)) <= set(ServerArgs.__struct_fields__)
    theirs = ServerArgs(model_path="m")
    platform._refuse_unsupported(SimpleNamespace(**{name: getattr(theirs, name) for name in vars(arguments())}))


def test_defaults_are_filled_in() -> None:
    given = arguments()
    AufCpuPlatform().apply_server_args_defaults(given)
    assert given.disable_cuda_graph is True
    assert (given.attention_backend, given.page_size, given.dtype) == ("auf_cpu", 1, "bfloat16")
    assert given.chunked_prefill_size == platform.CHUNKED_PREFILL_TOKENS
    assert given.sleep_on_idle is True
    assert given.max_running_requests == platform.MAX_RUNNING_REQUESTS


def test_the_pool_is_planned_unless_its_size_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_auf.cpu.memory.plan_pool", lambda server_args: 4321)
    for size, expected in ((None, 4321), (100, 100)):
        given = arguments(max_total_tokens=size)
        AufCpuPlatform().apply_server_args_defaults(given)
        assert given.max_total_tokens == expected


def test_what_the_user_gave_stays() -> None:
    given = arguments(chunked_prefill_size=64, max_running_requests=3, attention_backend="auf_cpu", page_size=1)
    AufCpuPlatform().apply_server_args_defaults(given)
    assert (given.chunked_prefill_size, given.max_running_requests) == (64, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float32"),
        ("dtype", "half"),
        ("kv_cache_dtype", "fp8_e4m3"),
        ("speculative_draft_kv_cache_dtype", "fp8_e5m2"),
        ("tp_size", 2),
        ("dp_size", 2),
        ("pp_size", 2),
        ("attention_backend", "torch_native"),
        ("prefill_attention_backend", "triton"),
        ("decode_attention_backend", "triton"),
        ("page_size", 64),
    ],
)
def test_what_it_cannot_do_is_refused_by_flag_and_value(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        AufCpuPlatform().apply_server_args_defaults(arguments(**{name: value}))
    assert f"--{name.replace('_', '-')} {value}" in caught.value.found
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "bf16"])
def test_bf16_may_be_asked_for(dtype: str) -> None:
    AufCpuPlatform().apply_server_args_defaults(arguments(dtype=dtype, kv_cache_dtype=dtype))


def test_a_model_or_drafter_that_it_does_not_compute_is_refused_before_loading(tmp_path: Path) -> None:
    from sglang_auf.errors import TargetError

    for name, more in (("full", {}), ("other", {"sliding_window_pattern": 6})):
        (tmp_path / name).mkdir()
        config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64, **more}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    full, other = str(tmp_path / "full"), str(tmp_path / "other")
    AufCpuPlatform().apply_server_args_defaults(arguments(model_path=full, speculative_draft_model_path=full))
    for target, drafter in ((other, None), (full, other)):
        with pytest.raises(TargetError, match="sliding windows"):
            AufCpuPlatform().apply_server_args_defaults(
                arguments(model_path=target, speculative_draft_model_path=drafter)
            )


def test_a_model_too_large_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_auf.errors import TargetError

    (tmp_path / "config.json").write_text(
        '{"num_hidden_layers": 30, "num_attention_heads": 9, "hidden_size": 576, "max_position_embeddings": 8192}'
    )
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    with pytest.raises(TargetError, match="GiB of free memory"):
        AufCpuPlatform().apply_server_args_defaults(arguments(model_path=str(tmp_path)))
