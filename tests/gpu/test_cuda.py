"""What only a GPU can show. Skipped without CUDA; run with `pytest tests/gpu` on a machine that has it.

AUF_TEST_DEVICE=cpu runs the same test bodies on the CPU platform, so that no mistake in them waits for a GPU.
AUF_TEST_ATTENTION names the attention backends to test, separated by commas.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.speculative.dflash_worker_v2 import _DflashDraftSampler

from benchmarks.stats.lossless import first_fork, near_tie_bar
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary, write
from sglang_auf.speculative import sampling
from sglang_auf.speculative.draft_head import DraftHead, ListedDraftSampler
from sglang_auf.speculative.worker import AufWorker
from tests.support.engines import run_engine
from tests.support.syncs import no_syncs
from tests.support.tiny_models import VOCABULARY, write_drafter, write_target

DEVICE = os.environ.get("AUF_TEST_DEVICE", "cuda")
ATTENTION = os.environ.get("AUF_TEST_ATTENTION", "triton,fa3" if DEVICE == "cuda" else "auf_cpu").split(",")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs CUDA"),
]
needs_graphs = pytest.mark.skipif(DEVICE != "cuda", reason="a CPU captures no graphs")

# flashinfer and fa3 have no kernel for smaller heads.
HEAD_DIM, BLOCK = 64, 8
TOKENS = 64 if DEVICE == "cuda" else 16
INPUTS = [[5, 9, 33, 21, 7, number + 10] for number in range(16)]
# Logits of the tiny target are below 16 in size.
BAR = near_tie_bar(15.0)


# --- without an engine ---


@contextmanager
def unwaited() -> Iterator[None]:
    """Within it the host may not wait for the device."""
    if DEVICE != "cuda":
        with no_syncs():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


SETTINGS = {
    "greedy": (1, 1.0, 0.0),
    "plain": (1 << 30, 1.0, 0.0),
    "top_k": (20, 0.95, 0.0),
    "top_p": (1 << 30, 0.9, 0.0),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_draws_are_the_draws_on_a_cpu_and_nobody_waits(
    settings: tuple[int, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocabulary = 32, 5000
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(torch.randn(rows, vocabulary, generator=generator) * 4, dim=-1)
    filters = [torch.full((rows,), setting) for setting in settings]
    seeds, positions = torch.arange(rows) * 7919 - 100, torch.arange(rows)
    on_cpu = sampling.sample(probabilities, *filters, sampling.uniforms(seeds, positions))
    given = [part.to(DEVICE) for part in (probabilities, *filters, seeds, positions)]
    kinds = [sampling.kind_of(*settings, vocabulary)] * rows
    monkeypatch.setattr(sampling, "looking_waits", lambda _: True)
    sampling.sample(*given[:4], sampling.uniforms(*given[4:]), kinds)  # kernels load at their first call
    with unwaited():
        found = sampling.sample(*given[:4], sampling.uniforms(*given[4:]), kinds)
    assert (found.cpu() == on_cpu).float().mean() > 0.95  # a sum may round across a draw's boundary


@pytest.mark.parametrize("mix", ["greedy", "sampled", "mixed"])
def test_a_step_does_not_wait(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the logits of a verify pass to the accepted tokens, SGLang's part included."""
    monkeypatch.setattr(sampling, "looking_waits", lambda _: True)
    worker = AufWorker.__new__(AufWorker)
    worker.block_size, worker._selector_sample, worker._use_triton_accept_bonus = BLOCK, None, False
    worker._tp_sync = SimpleNamespace(sync=lambda *_: None)
    worker._deterministic_sampler = None
    requests = 4
    top_ks = torch.full((requests,), 1 << 30 if mix == "sampled" else 1, dtype=torch.int32)
    if mix == "mixed":
        top_ks[1::2] = 20
    info = SimpleNamespace(
        is_all_greedy=mix == "greedy",
        temperatures=torch.ones(requests, 1, device=DEVICE),
        top_ks=top_ks.to(DEVICE),
        top_ps=torch.ones(requests, device=DEVICE),
        min_ps=torch.zeros(requests, device=DEVICE),
        sampling_seed=torch.arange(requests, device=DEVICE),
        kinds=[sampling.kind_of(top_k, 1.0, 0.0, 3000) for top_k in top_ks.tolist()],
    )
    given: dict[str, Any] = {
        "candidates": torch.zeros(requests, BLOCK, dtype=torch.int64, device=DEVICE),
        "next_token_logits": torch.randn(requests * BLOCK, 3000, device=DEVICE),
        "sampling_info": info,
        "draft_input": None,
        "prefix_lens": torch.full((requests,), 30, device=DEVICE),
        "bs": requests,
    }
    worker._accept_block(**given)  # kernels load at their first call
    with unwaited():
        _, commit_lens, _, out_tokens, _ = worker._accept_block(**given)
    assert int(commit_lens.min()) >= 1
    assert out_tokens.shape == (requests, BLOCK)


@needs_graphs
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


# --- engines: one start of each kind for each attention backend ---

GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 1.0, "min_p": 0.05}  # SGLang's own sampling verification ignores min_p and seeds


def job(sampling_params: Any, concurrency: int = 1, **asked: Any) -> dict[str, Any]:
    """sampling_params: of all requests, or a list with those of each."""
    rest = {"max_new_tokens": TOKENS, "ignore_eos": True}
    of_each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(INPUTS)
    return {"inputs": INPUTS, "sampling": [rest | one for one in of_each], "concurrency": concurrency} | asked


def seeded(first: int) -> list[dict[str, Any]]:
    return [SAMPLED | {"sampling_seed": first + number} for number in range(len(INPUTS))]


MIXED = [GREEDY if number % 2 else one for number, one in enumerate(seeded(100))]
UNDRAFTED = [GREEDY | {"custom_params": {"speculative": number % 2 == 0}} for number in range(len(INPUTS))]
PENALISED = GREEDY | {"frequency_penalty": 0.3, "presence_penalty": 0.5}
JOBS = {
    "alone": job(GREEDY),
    "penalised": job(PENALISED, 16),
    "together": job(GREEDY, 16),
    "seeds": job(seeded(100)),
    "seeds again": job(seeded(100)),
    "other seeds": job(seeded(200)),
    "mixed": job(MIXED, 16),
    "undrafted": job(UNDRAFTED, 16),
}
Answers = dict[str, list[dict[str, Any]]]


class Engines:
    """Answers of the engines with one attention backend, each started when it is first asked for."""

    def __init__(self, attention: str, scratch: Path) -> None:
        self._scratch = scratch
        self._answers: dict[str, Answers] = {}
        self._arguments: dict[str, Any] = {
            "model_path": str(write_target(scratch / "target", HEAD_DIM)),
            "context_length": 256,
            "attention_backend": attention,
            # With it, the second time a prompt is asked its prefill computes one token in place of six, by other
            # kernels, and the last bits move.
            "disable_radix_cache": True,
            "sampling_backend": "auf",
        }
        if DEVICE == "cuda":
            self._arguments |= {"mem_fraction_static": 0.3, "cuda_graph_max_bs_decode": 16}

    def answers(self, kind: str) -> Answers:
        """kind: plain, in turn (plain without the overlap schedule, under which SGLang counts a token for penalties one
        step late), DFLASH, AUF, or listed (AUF with a draft vocabulary of all tokens).
        """
        if kind not in self._answers:
            scratch = self._scratch / kind
            arguments, jobs = dict(self._arguments), dict(JOBS)
            if kind == "plain":
                jobs = {"alone": job(GREEDY, logprobs=True, top_logprobs=VOCABULARY), "seeds": JOBS["seeds"]}
            elif kind == "in turn":
                jobs = {"penalised": job(PENALISED, logprobs=True, top_logprobs=VOCABULARY)}
                arguments["disable_overlap_schedule"] = True
            else:
                drafter = write_drafter(scratch / "drafter", BLOCK, HEAD_DIM)
                arguments["speculative_draft_model_path"] = str(drafter)
                arguments["speculative_algorithm"] = "DFLASH" if kind == "DFLASH" else "AUF"
            if kind == "DFLASH":
                jobs = {"alone": JOBS["alone"]}
                arguments["disable_overlap_schedule"] = DEVICE != "cuda"
            elif kind == "listed":
                jobs = {"alone": JOBS["alone"]}
                write(DraftVocabulary(tokens=tuple(range(VOCABULARY))), drafter)
            found = run_engine(scratch, arguments, list(jobs.values()))
            self._answers[kind] = dict(zip(jobs, found, strict=True))
        return self._answers[kind]


@pytest.fixture(scope="module", params=ATTENTION)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(request.param, tmp_path_factory.mktemp(request.param))


def ids(replies: list[dict[str, Any]]) -> list[list[int]]:
    return [reply["ids"] for reply in replies]


def gaps(answers: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[float]:
    """Of each answer that forks from plain decoding's: how far its token is below the best one there, in logits."""
    found = []
    for ours, theirs in zip(answers, plain, strict=True):
        fork = first_fork(ours["ids"], theirs["ids"])
        if fork is not None:
            at_fork = theirs["meta"]["output_top_logprobs"][fork.position]
            logprobs = {token: logprob for logprob, token, *_ in at_fork}
            found.append(max(logprobs.values()) - logprobs[fork.speculating])
    return found


def test_auf_drafts_and_accepts_as_the_built_in_dflash(engines: Engines) -> None:
    for ours, theirs in zip(engines.answers("AUF")["alone"], engines.answers("DFLASH")["alone"], strict=True):
        assert ours["ids"] == theirs["ids"]
        assert ours["meta"]["spec_correct_drafts_histogram"] == theirs["meta"]["spec_correct_drafts_histogram"]


@pytest.mark.parametrize("name", ["alone", "together"])
def test_greedy_answers_are_those_of_plain_decoding_up_to_near_ties(engines: Engines, name: str) -> None:
    """In a batch of 16 the graphs are padded, and requests of different lengths come and go."""
    forks = gaps(engines.answers("AUF")[name], engines.answers("plain")["alone"])
    print(f"{len(forks)} of {len(INPUTS)} fork: {forks}")
    assert all(gap <= (BAR if DEVICE == "cuda" else -1) for gap in forks)
    assert len(forks) < len(INPUTS), "an answer that always forks was not compared"


def test_penalties_are_those_of_plain_decoding_up_to_near_ties(engines: Engines) -> None:
    found, plain = engines.answers("AUF")["penalised"], engines.answers("in turn")["penalised"]
    assert all(gap <= (BAR if DEVICE == "cuda" else -1) for gap in gaps(found, plain))
    assert ids(found) != ids(engines.answers("AUF")["alone"]), "penalties that change nothing were not compared"


def test_greedy_requests_stay_greedy_among_sampled_ones(engines: Engines) -> None:
    greedy = slice(1, None, 2)
    mixed, plain = engines.answers("AUF")["mixed"], engines.answers("plain")["alone"]
    assert all(gap <= (BAR if DEVICE == "cuda" else -1) for gap in gaps(mixed[greedy], plain[greedy]))
    assert all(0 <= token < VOCABULARY for reply in mixed for token in reply["ids"])


def test_requests_without_drafts_beside_others(engines: Engines) -> None:
    found = engines.answers("AUF")["undrafted"]
    assert all(gap <= (BAR if DEVICE == "cuda" else -1) for gap in gaps(found, engines.answers("plain")["alone"]))
    accepted = [sum(reply["meta"]["spec_correct_drafts_histogram"][1:]) for reply in found]
    assert sum(accepted[1::2]) == 0 < sum(accepted[::2])


def test_a_seed_repeats_and_another_differs(engines: Engines) -> None:
    """The same kernels on the same batch sizes: the same bits, so the same draws."""
    auf = engines.answers("AUF")
    assert ids(auf["seeds"]) == ids(auf["seeds again"])
    assert all(one != other for one, other in zip(ids(auf["seeds"]), ids(auf["other seeds"]), strict=True))


def test_a_seed_gives_the_answer_of_plain_decoding_up_to_rounding(engines: Engines) -> None:
    ours, theirs = ids(engines.answers("AUF")["seeds"]), ids(engines.answers("plain")["seeds"])
    together = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(ours, theirs, strict=True)]
    agreed = sum(([*same, False]).index(False) for same in together)
    print(f"{agreed} of {len(INPUTS) * TOKENS} tokens before a fork")
    # A draw in some hundreds falls on the other side of a boundary. Unrelated draws would agree for a token or two.
    assert agreed > (0.2 if DEVICE == "cuda" else 0.999) * len(INPUTS) * TOKENS


def test_a_draft_vocabulary_of_all_tokens_changes_no_step(engines: Engines) -> None:
    """On CUDA the list is in the captured draft graph."""
    for ours, whole in zip(engines.answers("listed")["alone"], engines.answers("AUF")["alone"], strict=True):
        assert ours["ids"] == whole["ids"]
        assert ours["meta"]["spec_verify_ct"] == whole["meta"]["spec_verify_ct"]
