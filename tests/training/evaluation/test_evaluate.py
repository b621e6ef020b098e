"""`sglang-auf evaluate`: which rows it walks, what it says of one drafter, and of two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from sglang_auf import cli
from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.checkpoints.weights import weights_sha256
from sglang_auf.checkpoints.writing import RECIPE
from sglang_auf.errors import ConfigError
from sglang_auf.training.data.loader import load_data
from sglang_auf.training.evaluation import evaluate as command
from sglang_auf.training.evaluation.comparison import Walkers
from sglang_auf.training.evaluation.evaluate import evaluate
from sglang_auf.training.evaluation.walk import HeldOut
from sglang_auf.training.text.reader import Conversation
from tests.support import tiny_models
from tests.support.tiny_models import write_drafter, write_target
from tests.support.toy_tokenizer import toy_tokenizer
from tests.support.training_runs import tiny_recipe, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny target with a tokenizer, a drafter for it, and rows with exact ids: all token 5 in their answers."""
    directory = tmp_path_factory.mktemp("models")
    target = write_target(directory / "target")
    toy_tokenizer().save_pretrained(target)
    data = directory / "rows.jsonl"
    rows = [{"id": f"row/{n}", "prompt_ids": [7, 8, n], "response_ids": [9, 5, 5, 5, 5, n, 2]} for n in range(10, 16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"target": target, "drafter": write_drafter(directory / "drafter"), "data": data}


def test_command_prints_the_figures(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(models["drafter"]), str(models["target"]), "--data", str(models["data"])]
    assert cli.main([*arguments, "--limit", "4"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table: Any = {line[0]: line[1:] for line in lines}
    assert table["answers"] == ["4"]
    steps = [int(table[str(accepted)][0]) for accepted in range(4)]
    emitted = 4 * 6
    assert sum((a + 1) * count for a, count in enumerate(steps)) >= emitted
    assert table["tau_micro"][0] == f"{emitted / sum(steps):.4f}"
    assert float(table["tau"][0]) >= 1
    assert float(table["tau_tree_16"][0]) >= float(table["tau_tree_8"][0]) >= 1
    assert float(table["0"][1]) == pytest.approx(steps[0] / sum(steps), abs=1e-4)


@pytest.mark.parametrize("overlong", ["reject", "truncate"])
def test_a_limit_walks_what_training_held_out(overlong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows training could use: many are longer than its limit, and some shorter than a block."""
    target, data = write_models(tmp_path)
    recipe = tiny_recipe(target, data)
    settings = recipe.data.model_copy(update={"max_length": 20, "overlong": overlong, "min_answer_tokens": 12})
    recipe = recipe.model_copy(update={"data": settings})
    held_out = load_data(recipe, Path(target), tiny_models.VOCABULARY).held_out
    drafter = write_drafter(tmp_path / "drafter")
    (drafter / RECIPE).write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    walked: list[str] = []

    class Walked(Exception):
        """Nothing is walked here."""

    def walk(self: Walkers, name: str, conversations: Sequence[Conversation], trees: Sequence[int]) -> list[HeldOut]:
        walked.extend(conversation.id for conversation in conversations)
        raise Walked

    monkeypatch.setattr(Walkers, "walk", walk)
    with pytest.raises(Walked):
        evaluate(str(drafter), target, [data], limit=recipe.data.held_out)
    assert sorted(walked) == sorted(conversation.id for conversation in held_out)


def test_answers_that_serving_never_has_so_are_not_walked(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = [False, False, *[True] * 4, False, *[True] * 5]
    chat = Conversation("chat", [7, 8, *range(10, 20)], mask, unserved=((2, 6),))
    loaded = SimpleNamespace(conversations=[chat], sha256="")
    monkeypatch.setattr(command, "load_conversations", lambda *_, **__: loaded)
    (found,) = evaluate(str(models["drafter"]), str(models["target"]), ["rows.jsonl"]).held_out
    assert (found.answers, sum(found.histogram) <= 4) == (1, True)


def test_command_names_a_missing_file(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(models["drafter"]), str(models["target"]), "--data", str(models["data"]) + "x.jsonl"]
    assert cli.main(arguments) == 2
    assert "rows.jsonlx.jsonl" in capsys.readouterr().err


def test_all_sources_are_read(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"id": "more/1", "prompt_ids": [7, 8, 9], "response_ids": [9, 5, 5, 5, 2]}) + "\n")
    arguments = ["evaluate", str(models["drafter"]), str(models["target"]), "--data", str(models["data"])]
    assert cli.main([*arguments, "--data", str(more)]) == 0
    assert capsys.readouterr().out.split()[:2] == ["answers", "7"]


def test_two_drafters_are_compared_answer_by_answer(models: dict[str, Path], tmp_path: Path) -> None:
    """Whatever their taps, blocks and draft vocabularies: each is walked as it is alone."""
    other = write_drafter(tmp_path / "other", block_size=6, seed=9, target_layer_ids=[0, 2])
    draft_vocabulary.write(DraftVocabulary(tokens=tuple(range(0, tiny_models.VOCABULARY, 2))), other)
    first, target, data = str(models["drafter"]), str(models["target"]), [str(models["data"])]
    both = evaluate(first, target, data, against=str(other))
    alone = [evaluate(name, target, data) for name in (first, str(other))]
    assert list(both.held_out) == [each.held_out[0] for each in alone]
    assert [len(each.histogram) for each in both.held_out] == [4, 6]
    assert list(both.differences) == ["tau", "tau_tree_8", "tau_tree_16"]
    for name, difference in both.differences.items():
        taus = [each.named[name] for each in both.held_out]
        assert difference.mean == pytest.approx(sum(b - a for a, b in zip(*taus, strict=True)) / len(taus[0]))
    shutil.copytree(first, tmp_path / "copy")
    for name, difference in evaluate(first, target, data, against=str(tmp_path / "copy")).differences.items():
        assert (difference.mean, difference.low, difference.high) == (0, 0, 0), name


def test_what_was_found_is_written_for_programs(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = write_drafter(tmp_path / "other", seed=9), tmp_path / "evaluation.json"
    arguments = ["evaluate", str(models["drafter"]), str(models["target"]), "--data", str(models["data"])]
    arguments += ["--against", str(other), "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    found: Any = json.loads(out.read_text())
    assert found["data"]["answers"] == 6 and len(found["data"]["sha256"]) == 64
    assert [each["weights_sha256"] for each in found["drafters"]] == [
        weights_sha256(path) for path in (models["drafter"], other)
    ]
    for name in ("tau", "tau_tree_8", "tau_tree_16"):
        first, second = (each[name]["mean"] for each in found["drafters"])
        assert found["differences"][name]["mean"] == pytest.approx(second - first)
        low, high = found["drafters"][0][name]["interval"]
        assert low <= first <= high
        assert printed[name][0] == f"{first:.4f}" and f"{second:.4f}" in printed[name]
    assert cli.main(arguments) == 2, "an earlier file stays"
    assert "a new file" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{"out": Path("no/such/folder/file.json")}, {"against": "itself"}])
def test_what_cannot_be_is_refused_before_anything_is_loaded(models: dict[str, Path], more: dict[str, Any]) -> None:
    drafter = str(models["drafter"])
    more = {name: drafter if value == "itself" else value for name, value in more.items()}
    with pytest.raises(ConfigError):
        evaluate(drafter, "no/target", [str(models["data"])], **more)
