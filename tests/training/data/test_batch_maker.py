"""From conversations to batches: features and labels of the target, anchors, held-out batches kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_auf.errors import DataError
from sglang_auf.models.dflash import Drafter
from sglang_auf.training import held_out as held_out_module
from sglang_auf.training.data.batch_maker import BatchMaker
from sglang_auf.training.data.conversations import Conversation
from sglang_auf.training.data.feature_writer import write_cache
from sglang_auf.training.data.features import OnlineFeatures
from sglang_auf.training.held_out import HeldOutAnswers
from sglang_auf.training.initial_weights import shape_of
from sglang_auf.training.losses.step import TrainingStep, anchor_positions
from sglang_auf.training.recipe import Recipe
from tests.support.training_runs import tiny_recipe, write_models

CPU = torch.device("cpu")
CHATS = [
    Conversation(f"chat-{n}", [7, 8, *range(9, 20 + n)], [False] * 2 + [True] * (11 + n)) for n in range(4)
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def maker(recipe: Recipe) -> BatchMaker:
    return BatchMaker(recipe, Path(recipe.target), CPU)


def test_labels_of_the_target_are_what_it_would_put_at_each_place(models: tuple[str, str]) -> None:
    recipe = tiny_recipe(*models, objective={"name": "auf", "labels": "target"})
    batch = maker(recipe).batch(CHATS)
    target = OnlineFeatures(models[0], (1, 3), dtype="float32", argmax=True)
    following = target.target_argmax(batch.input_ids, batch.lengths)
    assert batch.labels is not None and batch.labels.shape == batch.input_ids.shape
    for row, length in enumerate(batch.lengths.tolist()):
        assert torch.equal(batch.labels[row, 1:length], following[row, : length - 1])
    assert torch.equal(batch.features, target(batch.ids, batch.input_ids, batch.lengths))
    assert maker(tiny_recipe(*models)).batch(CHATS).labels is None


def test_precision_is_that_of_features_and_tables(models: tuple[str, str]) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        made = maker(tiny_recipe(*models, precision=precision))
        assert made.batch(CHATS[:1]).features.dtype == made.target.embedding.dtype == made.target.head.dtype == dtype


def test_anchors_do_not_depend_on_the_batch(models: tuple[str, str]) -> None:
    made = maker(tiny_recipe(*models))

    def anchors(chats: list[Conversation], epoch: int) -> dict[str, list[int]]:
        batch, places, valid = made.with_anchors(chats, epoch)
        assert bool(anchor_positions(batch.loss_mask).gather(1, places)[valid].all())
        return {name: row[ok].tolist() for name, row, ok in zip(batch.ids, places, valid, strict=True)}

    together = anchors(CHATS, 0)
    assert all(len(places) == 3 for places in together.values())
    for chat in CHATS:
        assert anchors([chat], 0) == {chat.id: together[chat.id]}
    assert anchors(CHATS, 1) != together


def test_features_from_a_cache_are_the_online_ones(models: tuple[str, str], tmp_path: Path) -> None:
    recipe = tiny_recipe(*models)
    write_cache(CHATS, OnlineFeatures(models[0], (1, 3), dtype="float32"), tmp_path / "cache")
    cached = maker(recipe.model_copy(update={"features": str(tmp_path / "cache")}))
    online = maker(recipe)
    assert torch.equal(cached.batch(CHATS).features, online.batch(CHATS).features)
    assert torch.equal(cached.target.head, online.target.head)
    with pytest.raises(DataError, match="stranger"):
        cached.require([*CHATS, Conversation("stranger", [5, 6, 7], [True] * 3)])
    cached.require(CHATS)


@pytest.mark.parametrize(("kept_bytes", "computed"), [(2**31, 1), (100, 2)])
def test_held_out_batches_are_kept_while_they_are_small(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, kept_bytes: int, computed: int
) -> None:
    monkeypatch.setattr(held_out_module, "KEPT_BYTES", kept_bytes)
    recipe = tiny_recipe(*models)
    made = maker(recipe)
    seen: list[str] = []
    batch = made.batch

    def counted(chats: Any) -> Any:
        seen.extend(chat.id for chat in chats)
        return batch(chats)

    monkeypatch.setattr(made, "batch", counted)
    torch.manual_seed(0)
    drafter = Drafter(shape_of(recipe.drafter, Path(recipe.target)))
    step = TrainingStep(drafter, made.target.embedding, made.target.head, recipe.objective)
    answers = HeldOutAnswers(CHATS, made, recipe)
    first, second = answers.figures(step), answers.figures(step)
    assert first == second
    assert sorted(seen) == sorted([chat.id for chat in CHATS] * computed)
    assert first.keys() == {"tau", "tau_micro", "alpha_1", "alpha_2", "alpha_3", "accuracy", "loss"}
    assert first["tau"] is not None and 1 <= first["tau"] <= 4
