"""A run's held-out answers: the same figures for the same weights, and features that are kept while they are small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_auf.models.dflash import Drafter
from sglang_auf.training.data.loader import BatchMaker
from sglang_auf.training.evaluation import held_out
from sglang_auf.training.evaluation.held_out import HeldOutAnswers
from sglang_auf.training.initial_weights import shape_of
from sglang_auf.training.losses.step import TrainingStep
from sglang_auf.training.text.reader import Conversation
from tests.support.training_runs import tiny_recipe, write_models


@pytest.mark.parametrize(("kept_bytes", "computed"), [(2**31, 1), (100, 2)])
def test_held_out_batches_are_kept_while_they_are_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_bytes: int, computed: int
) -> None:
    monkeypatch.setattr(held_out, "KEPT_BYTES", kept_bytes)
    chats = [Conversation(f"chat-{n}", [7, 8, *range(9, 20 + n)], [False] * 2 + [True] * (11 + n)) for n in range(4)]
    recipe = tiny_recipe(*write_models(tmp_path))
    made = BatchMaker(recipe, Path(recipe.target), torch.device("cpu"))
    seen: list[str] = []
    batch = made.batch

    def counted(some: Any) -> Any:
        seen.extend(chat.id for chat in some)
        return batch(some)

    monkeypatch.setattr(made, "batch", counted)
    torch.manual_seed(0)
    drafter = Drafter(shape_of(recipe.drafter, Path(recipe.target)))
    step = TrainingStep(drafter, made.target.embedding, made.target.head, recipe.objective)
    answers = HeldOutAnswers(chats, made, recipe)
    first, second = answers.figures(step), answers.figures(step)
    assert first == second
    assert sorted(seen) == sorted([chat.id for chat in chats] * computed)
    assert first.keys() == {"tau", "tau_micro", "alpha_1", "alpha_2", "alpha_3", "accuracy", "loss"}
    assert first["tau"] is not None and 1 <= first["tau"] <= 4
