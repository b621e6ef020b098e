"""Real SGLang engines and servers for the end-to-end tests: a tiny random model, and the shipped profile."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_auf.coverage import expected_weights

ROOT = Path(__file__).parents[2]
START_SECONDS = 300

TINY_VOCABULARY = 64
TINY_TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": TINY_VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_drafter_config(block_size: int, **dflash: Any) -> dict[str, Any]:
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": block_size,
        "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 2], **dflash},
        "num_target_layers": 5,
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 512,
        "layer_types": ["full_attention"],
        "vocab_size": TINY_VOCABULARY,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "dtype": "bfloat16",
    }


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * scale).bfloat16()
        for name, shape in shapes.items()
    }


def write_checkpoint(directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights: 5 layers, 64 tokens. Its distributions are neither flat nor certain."""
    c = TINY_TARGET
    hidden, inner, kv = c["hidden_size"], c["intermediate_size"], c["num_key_value_heads"] * c["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (TINY_VOCABULARY, hidden),
        "lm_head.weight": (TINY_VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    directory = tmp_path_factory.mktemp("tiny") / "target"
    return write_checkpoint(directory, TINY_TARGET, random_weights(shapes, seed=1, scale=0.2))


@pytest.fixture(scope="session")
def tiny_drafter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a drafter of random weights for the tiny target: tiny_drafter(block_size, **dflash_config)."""

    def make(block_size: int = 4, **dflash: Any) -> Path:
        config = tiny_drafter_config(block_size, **dflash)
        directory = tmp_path_factory.mktemp("drafter") / "drafter"
        return write_checkpoint(directory, config, random_weights(expected_weights(config), seed=2, scale=0.2))

    return make


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(module_and_arguments: list[str], log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`python -m ... --port P` in a process group of its own, until GET /health answers 200; killed at the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments, "--port", str(port)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start (exit code {process.poll()}):\n{log.read_text()[-6000:]}")
            time.sleep(0.5)
        yield url, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="session")
def start_server() -> Any:
    return running
