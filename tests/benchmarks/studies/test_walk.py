"""The walk over a plain server's answers, against the trainer's own walk over the same ones."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest
import torch

from benchmarks.harness.records import Record
from benchmarks.studies.walk import Walker
from sglang_auf.acceptance import macro_tau, total_acceptance
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary, write
from sglang_auf.env import DRAFT_VOCABULARY
from sglang_auf.errors import DataError
from sglang_auf.models.loading import load_drafter
from sglang_auf.training.data.features import OnlineFeatures
from sglang_auf.training.evaluation.evaluate import TREES, evaluate
from tests.support.tiny_models import VOCABULARY, write_drafter
from tests.support.training_runs import write_models


def drafted(drafter: Path, target: str, text: list[int]) -> list[int]:
    """What the drafter puts after the last token of a text: a block of it."""
    model = load_drafter(drafter)
    source = OnlineFeatures(target, model.config.target_layer_ids)
    ids, anchor = torch.tensor([text]), len(text) - 1
    block = torch.full((1, 1, model.config.block_size), model.config.mask_token_id)
    block[..., 0] = text[-1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = source([], ids, torch.tensor([len(text)]))
        hidden = model(features, source.embedding[block], torch.tensor([[anchor]]))
        return [int(token) for token in (hidden[0, 0, 1:].to(source.head.dtype) @ source.head.T).argmax(-1)]


def answer(number: int, dice: random.Random, **changes: object) -> Record:
    tokens = [dice.randrange(5, VOCABULARY - 5) for _ in range(dice.randrange(4, 30))]
    fields = {
        "task": "gsm8k" if number % 2 else "mbpp",
        "prompt_id": f"p{number}",
        "turn": 0,
        "temperature": 0.0,
        "prompt_ids": [dice.randrange(5, VOCABULARY - 5) for _ in range(dice.randrange(3, 12))],
        "output_ids": tokens,
        "completion_tokens": len(tokens),
        "started_at": 0.0,
        "latency_s": 1.0,
    }
    return Record.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_models(tmp_path_factory.mktemp("walked"))[0]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drafter(tmp_path_factory.mktemp("drafter") / "drafter", block_size=4)


@pytest.fixture(scope="module")
def records(drafter: Path, target: str) -> list[Record]:
    """Answers that the drafter drafts in part: some of its own tokens after some that are not."""
    dice = random.Random(5)
    made = []
    for number in range(9):
        begun = answer(number, dice)
        prompt, tokens = begun.prompt_ids or [], (begun.output_ids or [])[:4]
        for _ in range(4):
            ours = drafted(drafter, target, prompt + tokens)[: dice.randrange(4)]
            tokens = [*tokens, *ours, dice.randrange(5, VOCABULARY - 5)]
        made.append(begun.model_copy(update={"output_ids": tokens, "completion_tokens": len(tokens)}))
    return made


def test_counts_are_the_trainers_walk(target: str, drafter: Path, records: list[Record], tmp_path: Path) -> None:
    walked, *of_trees = Walker(target, records, trees=TREES).walk(drafter)
    assert [record.key for record in walked] == [record.key for record in records]
    rows = [
        {"id": record.prompt_id, "prompt_ids": record.prompt_ids, "response_ids": record.output_ids}
        for record in records
    ]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = evaluate(str(drafter), target, [str(data)]).held_out[0]
    assert total_acceptance(record.acceptance for record in walked).histogram == expected.histogram
    for nodes, of_tree in zip(TREES, of_trees, strict=True):
        assert [record.key for record in of_tree] == [record.key for record in records]
        assert macro_tau(record.acceptance for record in of_tree) == pytest.approx(fmean(expected.taus_of_trees[nodes]))
        assert {record.acceptance.nodes_per_step for record in of_tree} == {nodes}
    assert sum(expected.histogram[1:]) > 15, "else little would show"
    for record, given, row in zip(walked, records, rows, strict=True):
        (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
        alone = evaluate(str(drafter), target, [str(tmp_path / "one.jsonl")]).held_out[0]
        assert tuple(record.accepted_histogram) == alone.histogram
        assert record.completion_tokens == given.completion_tokens
        assert record.output_ids is None


def test_a_draft_vocabulary_is_kept_to(
    target: str, drafter: Path, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trainer's walk does, unless the walk or the process says otherwise."""
    listing = Path(shutil.copytree(drafter, tmp_path / "listing"))
    (everything,) = Walker(target, records).walk(drafter)
    drafts = Counter(token for record in records for token in record.output_ids or ())
    write(DraftVocabulary(tokens=tuple(sorted(drafts)[::2])), listing)
    walker = Walker(target, records)
    (walked,) = walker.walk(listing)
    rows = [{"prompt_ids": record.prompt_ids, "response_ids": record.output_ids} for record in records]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = evaluate(str(listing), target, [str(data)]).held_out[0].histogram
    assert total_acceptance(record.acceptance for record in walked).histogram == expected
    assert expected != total_acceptance(record.acceptance for record in everything).histogram
    assert walker.walk(listing, listed=False) == [everything]
    monkeypatch.setenv(DRAFT_VOCABULARY.name, "0")
    assert walker.walk(listing) == [everything]


def test_another_block_is_walked_as_a_drafter_of_that_block(
    target: str, drafter: Path, records: list[Record], tmp_path: Path
) -> None:
    walker = Walker(target, records)
    small = write_drafter(tmp_path / "small", block_size=3)  # the same weights: they do not depend on the block
    (walked,) = walker.walk(drafter, block_size=3)
    assert [walked] == walker.walk(small)
    assert {record.block_size for record in walked} == {3}
    assert [walked] != walker.walk(drafter)


def test_features_are_shared_by_drafters_with_the_same_taps(
    target: str, drafter: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    walker = Walker(target, records)
    first = walker.walk(drafter)
    assert len(first) == 1
    monkeypatch.setattr(Walker, "_batches", None)
    assert walker.walk(drafter) == first


def test_answers_that_failed_or_have_one_token_are_left_out(target: str, drafter: Path, records: list[Record]) -> None:
    dice = random.Random(6)
    more = [answer(20, dice, error="500"), answer(21, dice, completion_tokens=1, output_ids=[7])]
    (walked,) = Walker(target, [*records, *more]).walk(drafter)
    assert [r.key for r in walked] == [r.key for r in records]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"output_ids": None}, r"p3 .*with \['prompt_ids'\]"),
        ({"prompt_ids": None}, r"p3 .*with \['output_ids'\]"),
        ({"temperature": 1.0}, "p3 at temperature 1,"),
    ],
)
def test_answers_that_cannot_be_walked_are_refused(target: str, changes: dict[str, object], found: str) -> None:
    with pytest.raises(DataError, match=found):
        Walker(target, [answer(3, random.Random(1), **changes)])


def test_no_answers_are_refused(target: str) -> None:
    with pytest.raises(DataError, match="no answer"):
        Walker(target, [])
