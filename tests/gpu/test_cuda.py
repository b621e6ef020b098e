"""What only a GPU can show. Skipped without CUDA; run with `pytest tests/gpu` on a machine that has it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.speculative.dflash_worker_v2 import _DflashDraftSampler

from sglang_auf.speculative import sampling
from sglang_auf.speculative.draft_head import DraftHead, ListedDraftSampler
from tests.support.engines import run_engine
from tests.support.tiny_models import VOCABULARY, write_drafter, write_target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

# flashinfer has no kernel for smaller heads.
HEAD_DIM = 64
INPUTS = [[5, 9, 33, 21, 7, number + 10] for number in range(8)]


def test_draws_on_a_gpu_are_the_draws_on_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(torch.randn(64, 5000, generator=generator) * 4, dim=-1)
    settings = [torch.full((64,), 50), torch.full((64,), 0.9), torch.full((64,), 0.02)]
    seeds, positions = torch.arange(64) * 7919 - 100, torch.arange(64)
    on_cpu = sampling.sample(probabilities, *settings, sampling.uniforms(seeds, positions))
    on_gpu = sampling.sample(
        probabilities.cuda(), *(s.cuda() for s in settings), sampling.uniforms(seeds.cuda(), positions.cuda())
    )
    assert (on_gpu.cpu() == on_cpu).float().mean() > 0.95  # a sum may round across a draw's boundary


def test_the_listed_choice_in_a_captured_graph_is_the_one_on_a_cpu() -> None:
    """As SGLang replays it: captured once, then run on other states in the same place."""
    listed, block, requests = [2, 5, 11, 40, 63], 4, 3
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    head = DraftHead(SimpleNamespace(weight=weight.cuda()), listed)
    whole = _DflashDraftSampler(weight=weight.cuda(), block_size=block, num_org=64, org_vocab_start=0, max_bs=requests)
    sampler = ListedDraftSampler(head, whole)
    hidden = torch.zeros(requests * block, 32, device="cuda")
    sampler(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler(hidden)
    for seed in range(3):
        states = torch.randn(requests * block, 32, generator=torch.Generator().manual_seed(seed))
        hidden.copy_(states)
        graph.replay()
        drafted = states.view(requests, block, 32)[:, 1:].reshape(-1, 32)
        expected = DraftHead(SimpleNamespace(weight=weight), listed)(drafted)
        assert torch.equal(sampler.out.cpu(), expected)
        assert torch.equal(head(drafted.cuda()).cpu(), expected)


def engine(tmp_path: Path, algorithm: str) -> dict[str, Any]:
    return {
        "model_path": str(write_target(tmp_path / "target", HEAD_DIM)),
        "context_length": 256,
        "attention_backend": "flashinfer",
        "mem_fraction_static": 0.3,
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": str(write_drafter(tmp_path / "drafter", 8, HEAD_DIM)),
    }


def job(**sampling_params: Any) -> dict[str, Any]:
    return {
        "inputs": INPUTS,
        "sampling": {"max_new_tokens": 64, "ignore_eos": True} | sampling_params,
        "concurrency": 1,
    }


def test_auf_drafts_and_accepts_as_the_built_in_dflash(tmp_path: Path) -> None:
    found = {
        name: run_engine(tmp_path / name, engine(tmp_path / name, name), [job(temperature=0)])[0]
        for name in ("AUF", "DFLASH")
    }
    for ours, theirs in zip(found["AUF"], found["DFLASH"], strict=True):
        assert ours["ids"] == theirs["ids"]
        assert ours["meta"]["spec_correct_drafts_histogram"] == theirs["meta"]["spec_correct_drafts_histogram"]


def test_a_seed_repeats_with_min_p(tmp_path: Path) -> None:
    """Both are what SGLang's own sampling verification ignores on CUDA."""
    seeded = job(temperature=1.0, min_p=0.05, sampling_seed=3)
    first, again, other = run_engine(
        tmp_path, engine(tmp_path, "AUF"), [seeded, seeded, job(temperature=1.0, min_p=0.05, sampling_seed=4)]
    )
    assert [reply["ids"] for reply in first] == [reply["ids"] for reply in again]
    assert [reply["ids"] for reply in first] != [reply["ids"] for reply in other]
    assert all(0 <= token < VOCABULARY for reply in first for token in reply["ids"])
