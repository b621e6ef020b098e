"""Sampled tokens of a speculating engine follow the target's exact distribution; a broken verifier is noticed."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sglang_auf.env import TREE_NODES
from tests.support.engines import run_engine

pytestmark = pytest.mark.e2e

PROMPT = [5, 9, 33, 21, 7]
VOCABULARY = 64
REQUESTS = 10_500
# The first token is prefill's; the second and third come from verify steps.
TOKENS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 20": {"top_k": 20},
    "min_p 0.05": {"min_p": 0.05},
}

BROKEN = """
import sglang_auf.speculative.sampling as sampling
# Greedy whatever the temperature: what SGLang's own DFLASH does without its CUDA kernel.
sampling.sample = lambda probabilities, *_: probabilities.argmax(dim=-1)
"""


def filtered(probabilities: np.ndarray, top_k: int = VOCABULARY, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The distribution that the request asks for, written down from the meaning of its settings."""
    order = np.argsort(-probabilities, kind="stable")
    kept = np.zeros_like(probabilities)
    before = 0.0
    for rank, token in enumerate(order):
        p = probabilities[token]
        if rank < top_k and (top_p >= 1 or before <= top_p) and p >= min_p * probabilities[order[0]]:
            kept[token] = p
        before += p
    return kept / kept.sum()


def p_value(contexts: dict[tuple[int, ...], Counter[int]], exact: Callable[[tuple[int, ...]], np.ndarray]) -> float:
    """Chi-square over all contexts together; cells that expect fewer than 5 are pooled within their context."""
    statistic, freedom = 0.0, 0
    for context, seen in contexts.items():
        total = sum(seen.values())
        expected = exact(context) * total
        observed = np.array([seen[token] for token in range(VOCABULARY)], dtype=float)
        assert observed[expected == 0].sum() == 0, "a token that the filters exclude was drawn"
        large = expected >= 5
        cells = [(observed[large], expected[large])]
        if expected[~large].sum() > 0:
            cells.append((observed[~large].sum(keepdims=True), expected[~large].sum(keepdims=True)))
        o, e = (np.concatenate(part) for part in zip(*cells, strict=True))
        if len(e) < 2 or e.min() < 1:
            continue
        statistic += float(((o - e) ** 2 / e).sum())
        freedom += len(e) - 1
    assert freedom > 20, "too few cells to say anything"
    return float(stats.chi2.sf(statistic, freedom))


@pytest.fixture(scope="module")
def exact(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...]], np.ndarray]:
    """The target's distribution after a context, from a plain engine's own logits of a prefill."""
    engine = {"model_path": str(tiny_target), "context_length": 64}
    contexts = [(a,) for a in range(VOCABULARY)] + [(a, b) for a in range(VOCABULARY) for b in range(VOCABULARY)]
    job = {
        "inputs": [[*PROMPT, *context] for context in contexts],
        "sampling": {"temperature": 1.0, "max_new_tokens": 1},
        "concurrency": 48,
        "logprobs": True,
        "top_logprobs": VOCABULARY,
    }
    (replies,) = run_engine(tmp_path_factory.mktemp("exact"), engine, [job])
    table: dict[tuple[int, ...], np.ndarray] = {}
    for context, reply in zip(contexts, replies, strict=True):
        probabilities = np.zeros(VOCABULARY)
        for logprob, token, _ in reply["meta"]["output_top_logprobs"][0]:
            probabilities[token] = math.exp(logprob)
        assert abs(probabilities.sum() - 1) < 1e-3
        table[context] = probabilities / probabilities.sum()
    return table.__getitem__


TREES = {TREE_NODES: "6"}
"""At this load a drafter of random weights would not be asked for drafts."""


def sampled_jobs() -> list[dict[str, Any]]:
    return [
        {
            "inputs": [PROMPT] * REQUESTS,
            "sampling": {"temperature": 1.0, "max_new_tokens": TOKENS, "ignore_eos": True} | setting,
            "concurrency": 48,
        }
        for setting in SETTINGS.values()
    ]


def engine_of(tiny_target: Path, drafter: Path) -> dict[str, Any]:
    return {
        "model_path": str(tiny_target),
        "context_length": 64,
        "speculative_algorithm": "AUF",
        "speculative_draft_model_path": str(drafter),
        "random_seed": 1234,
    }


def by_context(replies: list[dict[str, Any]]) -> dict[tuple[int, ...], Counter[int]]:
    """What followed each context, for tokens that verify steps gave."""
    seen: dict[tuple[int, ...], Counter[int]] = {}
    for reply in replies:
        ids = reply["ids"]
        for place in range(1, len(ids)):
            seen.setdefault(tuple(ids[:place]), Counter())[ids[place]] += 1
    return seen


def test_sampled_tokens_follow_the_targets_distribution(
    tiny_target: Path, tiny_drafter: Callable[..., Path], exact: Any, tmp_path: Path
) -> None:
    results = run_engine(tmp_path, engine_of(tiny_target, tiny_drafter(4)), sampled_jobs(), **TREES)
    for (name, setting), replies in zip(SETTINGS.items(), results, strict=True):
        seen = by_context(replies)
        count = sum(sum(counter.values()) for counter in seen.values())
        # Some drafted tokens must have been accepted, or nothing was tested.
        assert sum(reply["meta"].get("spec_num_correct_drafts", 0) for reply in replies) > 0
        assert count >= (TOKENS - 1) * REQUESTS * 0.99
        assert p_value(seen, lambda context, s=setting: filtered(exact(context), **s)) > 0.01, name


def test_a_broken_verifier_fails_the_same_test(
    tiny_target: Path, tiny_drafter: Callable[..., Path], exact: Any, tmp_path: Path
) -> None:
    """A sitecustomize module breaks the draw in the engine's processes."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    (replies,) = run_engine(
        tmp_path,
        engine_of(tiny_target, tiny_drafter(4)),
        [sampled_jobs()[0] | {"inputs": [PROMPT] * 1000}],
        PYTHONPATH=path,
        **TREES,
    )
    assert p_value_or_zero(by_context(replies), exact) < 0.01


def p_value_or_zero(seen: dict[tuple[int, ...], Counter[int]], exact: Any) -> float:
    """A verifier so broken that it leaves no cells to compare fails as well."""
    try:
        return p_value(seen, exact)
    except AssertionError:
        return 0.0
