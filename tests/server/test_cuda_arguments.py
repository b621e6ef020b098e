"""The CUDA profile on a machine that looks like one with an H100 (tests/support/simulated_h100.py): no GPU needed."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_auf.checkpoints.weights import expected_weights
from tests.support import simulated_h100
from tests.support.qwen3_8b import DRAFTER, TARGET

pytestmark = pytest.mark.e2e

CASES: dict[str, list[str]] = {
    "as shipped": [],
    "plain": ["plain"],
    "flashinfer": ["server_args.attention_backend=flashinfer"],
    "deterministic": ["server_args.enable_deterministic_inference=true"],
    "block of 8": ["block_size=8"],
    "causal drafts": ["server_args.speculative_draft_attention_backend=trtllm_mha"],
    "adaptive": ["server_args.speculative_adaptive=true"],
    "dp attention": [
        *("server_args.tp_size=2", "server_args.dp_size=2"),
        *("server_args.enable_dp_attention=true", "server_args.enable_dp_lm_head=true"),
    ],
    "lora": ["server_args.enable_lora=true"],
}


def write(directory: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of the right names and shapes whose weights are a hole in the file."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if "block_size" not in config:
        return directory
    header, end = {}, 0
    for name, shape in expected_weights(config).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return directory


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    scratch = tmp_path_factory.mktemp("h100")
    variables = {k: v for k, v in os.environ.items() if k not in ("SGLANG_PLUGINS", "SGLANG_PLATFORM")}
    done = subprocess.run(
        [sys.executable, simulated_h100.__file__, write(scratch / "t", TARGET), write(scratch / "d", DRAFTER)],
        input=json.dumps(list(CASES.values())),
        capture_output=True,
        text=True,
        env=variables | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return dict(json.loads(done.stdout))


def case(found: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(found["cases"][list(CASES).index(name)])


def test_the_plugin_steps_aside_with_its_platform_and_registers_the_rest(found: dict[str, Any]) -> None:
    """Registration, every seam, every hook and the worker's class."""
    assert (found["platform"], found["worker"], found["unapplied"]) == ("CudaSRTPlatform", "AufWorker", [])
    assert not found["kernels of the CPU platform"], "numba's kernels would be compiled for nothing"


def test_the_profile_is_fast_as_it_is_shipped(found: dict[str, Any]) -> None:
    shipped = case(found, "as shipped")
    assert shipped["attention_backend"] == "fa3", "with flashinfer the host waits for the device in each step"
    assert shipped["speculative_draft_attention_backend"] is None, "the drafter takes the target's"
    assert shipped["decode_graphs"] == "full"
    assert shipped["disable_overlap_schedule"] is False
    assert shipped["disable_radix_cache"] is False
    assert (shipped["block"], shipped["speculative_num_draft_tokens"]) == (16, 16)
    assert (shipped["max_running_requests"], shipped["page_size"]) == (48, 1)
    assert 0.7 < shipped["mem_fraction_static"] < 0.9


def test_plain_decoding_differs_in_nothing_but_the_drafter(found: dict[str, Any]) -> None:
    shipped, plain = case(found, "as shipped"), case(found, "plain")
    assert plain["sampling_backend"] == shipped["sampling_backend"] == "auf"
    differing = {key for key in plain if plain[key] != shipped[key]}
    # SGLang limits the number of requests of a server that speculates.
    assert differing == {"block", "speculative_algorithm", "speculative_num_draft_tokens", "max_running_requests"}


def test_what_the_user_sets_is_kept(found: dict[str, Any]) -> None:
    assert case(found, "flashinfer")["attention_backend"] == "flashinfer"
    assert case(found, "block of 8")["speculative_num_draft_tokens"] == 8


def test_deterministic_inference_keeps_sglangs_sampler(found: dict[str, Any]) -> None:
    settings = case(found, "deterministic")
    assert settings["enable_deterministic_inference"] is True
    assert (settings["sampling_backend"], settings["attention_backend"]) == ("pytorch", "fa3")


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("causal drafts", "--speculative-draft-attention-backend trtllm_mha"),
        ("adaptive", "--speculative-adaptive"),
        ("dp attention", "--enable-dp-attention"),
        ("lora", "--enable-lora"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_not_ignored(found: dict[str, Any], name: str, flag: str) -> None:
    """SGLang rewrites some of these arguments before it asks the algorithm; the refusal must come all the same."""
    assert flag in case(found, name)["refused"]
