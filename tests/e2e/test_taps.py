"""A served drafter is given the states that the trainer computes: the outputs of the tapped layers."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.env import TREE
from tests.support.engines import run_engine
from tests.support.tiny_models import LAYERS, write_drafter, write_qwen2

pytestmark = pytest.mark.e2e

BLOCK = 4
PROMPT = [5, 9, 33, 21, 7, 40, 12]
GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
TAPS = (0, LAYERS - 2)
"""The first layer, and the last one that can be tapped."""


def committed(features: Path, taps: int) -> Iterator[tuple[int, Tensor]]:
    """(position, states [taps, hidden]) of every token of the prompt, and of the one that each block begins with."""
    with features.open("rb") as file:
        while file.peek(1):
            positions, states = pickle.load(file)
            for position, state in list(zip(positions, states, strict=True))[: None if positions[0] == 0 else 1]:
                yield position, torch.tensor(state).view(taps, -1)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_qwen2_decodes_as_plainly_and_is_tapped_at_its_layers(tied: bool, tmp_path: Path) -> None:
    target = write_qwen2(tmp_path / "target", tied)
    assert TargetFacts.of(target).tappable_layers == LAYERS - 1
    drafter = write_drafter(tmp_path / "drafter", BLOCK, target_layer_ids=list(TAPS))
    engine: dict[str, Any] = {"model_path": str(target), "context_length": 128}
    speculation = {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(drafter)}
    job = {"inputs": [PROMPT], "sampling": GREEDY}
    ((alone,),) = run_engine(tmp_path / "plain", engine, [job])
    # A chain, so that all rows of a step are one block.
    ((drafted,),) = run_engine(
        tmp_path / "auf", engine | speculation, [job], features=tmp_path / "features", **{TREE.name: "0"}
    )
    assert drafted["ids"] == alone["ids"]
    assert drafted["meta"]["spec_verify_ct"] > 0
    for name in ("plain", "auf"):
        assert "is not replayed" not in (tmp_path / name / "log").read_text()

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.no_grad():
        text = torch.tensor([PROMPT + drafted["ids"]])
        found = model(text, output_hidden_states=True).hidden_states
    outputs = torch.stack(found[1:-1])[:, 0]  # [layers - 1, tokens, hidden]: the last one is behind the norm
    given = dict(committed(tmp_path / "features", len(TAPS)))
    assert set(given) >= {*range(len(PROMPT)), len(PROMPT), len(PROMPT) + 1}
    assert max(given) > len(PROMPT) + 5
    for position, states in given.items():
        for tap, state in zip(TAPS, states, strict=True):
            # Of each layer, if it were the tapped one.
            errors = (outputs[:, position] - state).norm(dim=-1) / state.norm()
            assert errors[tap] < 0.06, "more than bf16 rounds"
            assert errors.argmin() == tap and errors.sort().values[1] > 0.2
