"""Which conversations are trained on when; their batches with features, labels and anchors."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import masking_utils

from sglang_auf.errors import DataError
from sglang_auf.training.data import loader
from sglang_auf.training.data.batching import anchor_positions
from sglang_auf.training.data.feature_writer import write_cache
from sglang_auf.training.data.features import OnlineFeatures
from sglang_auf.training.data.loader import BatchMaker, Plan, one_ahead
from sglang_auf.training.recipe import Recipe
from sglang_auf.training.text.conversations import LoadedConversations
from sglang_auf.training.text.reader import Conversation
from sglang_auf.training.text.split import Apart
from tests.support.training_runs import tiny_recipe, write_models

CPU = torch.device("cpu")
CHATS = [
    Conversation(f"chat-{n}", [7, 8, *range(9, 20 + n)], [False] * 2 + [True] * (11 + n)) for n in range(4)
]  # fmt: skip


def conversations(count: int) -> list[Conversation]:
    return [Conversation(f"row-{n}", [5] * (10 + n % 7), [True] * (10 + n % 7)) for n in range(count)]


def plan(count: int = 40, **sections: Any) -> Plan:
    return Plan(conversations(count), tiny_recipe("t", "d", **sections))


def rows(planned: Plan, step: int) -> list[int]:
    return [row for some in planned.at(step)[1] for row in some]


def test_every_conversation_comes_once_an_epoch() -> None:
    planned = plan(schedule={"epochs": 3, "max_steps": None})
    seen: dict[int, Counter[int]] = {0: Counter(), 1: Counter(), 2: Counter()}
    for step in range(planned.steps):
        epoch, batches = planned.at(step)
        assert len(batches) == 4
        seen[epoch].update(rows(planned, step))
    assert all(counts == Counter(range(40)) for counts in seen.values())
    assert [planned.at(step)[0] for step in range(planned.steps)] == sorted(
        planned.at(step)[0] for step in range(planned.steps)
    )


def test_max_steps_takes_as_many_epochs_as_it_needs() -> None:
    long, short = plan(schedule={"max_steps": 50}), plan(schedule={"max_steps": 1})
    assert (long.steps, short.steps) == (50, 1)
    assert long.at(49)[0] > 0 and rows(long, 0) == rows(short, 0)


def test_the_plan_is_the_seeds() -> None:
    first, again, other = plan(), plan(), plan(seed=7)
    assert [first.at(step) for step in range(6)] == [again.at(step) for step in range(6)]
    assert [first.at(step) for step in range(6)] != [other.at(step) for step in range(6)]


def test_too_few_conversations_for_a_step() -> None:
    with pytest.raises(DataError, match="3 rows"):
        plan(3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


def maker(recipe: Recipe) -> BatchMaker:
    return BatchMaker(recipe, Path(recipe.target), CPU)


def test_labels_of_the_target_are_what_it_would_put_at_each_place(models: tuple[str, str]) -> None:
    recipe = tiny_recipe(*models, objective={"name": "auf", "labels": "target"})
    batch = maker(recipe).batch(CHATS)
    target = OnlineFeatures(models[0], (1, 3), dtype="float32", argmax=True)
    _, following = target.with_argmax(batch.input_ids, batch.lengths)
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
    wanted = [(CHATS[:2], 0), (CHATS[2:], 0), (CHATS, 1)]
    for streamed, (chats, epoch) in zip(cached.stream(wanted), wanted, strict=True):
        made = cached.with_anchors(chats, epoch)
        assert streamed[0].ids == made[0].ids
        assert all(map(torch.equal, (streamed[0].features, *streamed[1:]), (made[0].features, *made[1:])))
    with pytest.raises(DataError, match="stranger"):
        cached.require([*CHATS, Conversation("stranger", [5, 6, 7], [True] * 3)])
    cached.require(CHATS)


def test_a_micro_batch_is_made_without_waiting_for_the_device(
    models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device has no values, so that reading one is an error. transformers reads one in each forward."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    meta = torch.device("meta")
    for labels in ("text", "target"):
        recipe = tiny_recipe(*models, objective={"name": "auf", "labels": labels})
        batch, anchors, valid = BatchMaker(recipe, Path(recipe.target), meta).with_anchors(CHATS, 0)
        assert {batch.features.device, batch.input_ids.device, anchors.device, valid.device} == {meta}


def test_one_item_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    ready = threading.Event()

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            if number == 1:
                ready.set()
            yield number
        raise DataError("a damaged shard", "an intact one")

    found = one_ahead(items(), CPU)
    assert next(found) == 0
    assert ready.wait(10) and made == [0, 1]
    assert [next(found) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DataError, match="damaged shard"):
        next(found)

    abandoned = one_ahead(iter(range(9)), CPU)
    next(abandoned)
    abandoned.close()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


@pytest.mark.parametrize(("apart", "labels"), [("prompt", 5), ("tokens", 8)])
def test_held_out_rows_have_labels_where_serving_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, apart: Apart, labels: int
) -> None:
    """In the runs of earlier versions they had all."""
    caplog.set_level(logging.INFO)
    recipe = tiny_recipe(*write_models(tmp_path))
    mask = [False, *[True] * 3, False, *[True] * 5]
    chats = [Conversation(f"row-{n}", [n, *range(10, 19)], mask, unserved=((1, 4),)) for n in range(30)]
    loaded = LoadedConversations(chats, {}, [], [], "")
    monkeypatch.setattr(loader, "load_conversations", lambda *_, **__: loaded)
    data = loader.load_data(recipe, Path(recipe.target), 64, apart)
    assert {sum(chat.loss_mask) for chat in data.held_out} == {labels}
    assert {sum(chat.loss_mask) for chat in data.train} == {8}
    assert "26 conversations to train on, 4 held out; 240 answer tokens in all" in caplog.text
