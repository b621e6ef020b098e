"""Two drafters over the same answers, against the walk that `sglang-auf evaluate` makes of each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.models.loading import load_drafter
from sglang_auf.stats.bootstrap import Difference
from sglang_auf.training.data.batching import with_features
from sglang_auf.training.data.features import OnlineFeatures
from sglang_auf.training.evaluation.comparison import Comparison, Walkers
from sglang_auf.training.evaluation.walk import heldout_tau
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import TrainingStep
from sglang_auf.training.text.conversations import load_conversations
from tests.support.tiny_models import VOCABULARY, write_drafter
from tests.support.toy_tokenizer import toy_tokenizer
from tests.support.training_runs import write_models


@pytest.mark.parametrize("listed", [None, tuple(range(0, VOCABULARY, 2))])
def test_each_tau_is_that_of_the_walk(tmp_path: Path, listed: tuple[int, ...] | None) -> None:
    target, data = write_models(tmp_path)
    old, new = write_drafter(tmp_path / "old"), write_drafter(tmp_path / "new")
    weights = load_drafter(new)
    assert weights.config.block_size == 4
    conversations = load_conversations(
        data, toy_tokenizer(), max_length=40, min_answer_tokens=4, vocab_size=VOCABULARY
    ).conversations
    vocabulary = None if listed is None else DraftVocabulary(tokens=listed)
    # Of two answers one that no server is asked for so: it is not walked.
    ids, mask = conversations[0].input_ids, conversations[0].loss_mask
    earlier = replace(conversations[0], input_ids=[7, 8, 9, *ids], loss_mask=[False, True, True, *mask])
    with_earlier = [replace(earlier, unserved=((1, 3),)), *conversations[1:]]
    conversations = [replace(earlier, loss_mask=[False] * 3 + mask), *conversations[1:]]
    walked = Walkers(Path(target), [(old, vocabulary), (new, vocabulary)]).walk("answers", with_earlier)
    compared = Comparison.of("answers", *(each.taus for each in walked))

    source = OnlineFeatures(target, (1, 2))
    step = TrainingStep(load_drafter(old), source.embedding, source.head, ObjectiveSettings(name="full"))
    only = None if listed is None else torch.tensor(listed)
    alone = heldout_tau(step, [with_features(conversations, source)], vocabulary=only)
    assert compared.answers == alone.answers == len(conversations)
    assert compared.old == pytest.approx(alone.tau_macro, abs=0.02)  # another batch rounds differently
    assert compared.new == compared.old
    assert compared.difference == Difference(0.0, 0.0, 0.0)
    assert not compared.better, "equal is not better"


@pytest.mark.parametrize(("low", "better"), [(0.01, True), (0.0, False), (-0.01, False), (None, False)])
def test_better_is_by_more_than_chance(low: float | None, better: bool) -> None:
    compared = Comparison(40, 2.0, 2.1, Difference(0.1, low, 0.2))
    assert compared.better is better
    assert str(compared).startswith("tau 2.0000 before, 2.1000 after; +0.1000")
