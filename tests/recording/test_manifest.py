"""Which recordings belong to which target: others are refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from sglang_auf.cli import main
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.recording.manifest import MANIFEST, Manifest, read_manifest, require_target
from tests.support.tiny_models import write_drafter, write_target
from tests.support.toy_tokenizer import toy_tokenizer
from tests.support.training_runs import tiny_recipe


def target(directory: Path, head_dim: int = 16, word: str = "") -> Path:
    made = write_target(directory, head_dim)
    tokenizer = toy_tokenizer()
    if word:
        tokenizer.add_tokens([word])
    tokenizer.save_pretrained(made)
    return made


def recording(directory: Path, of: Path) -> Path:
    directory.mkdir()
    (directory / MANIFEST).write_text(Manifest.of(of).model_dump_json())
    return directory


def test_a_recording_of_this_target_is_taken(tmp_path: Path) -> None:
    model = target(tmp_path / "model")
    rows = recording(tmp_path / "rows", model)
    require_target([str(rows), "owner/data", tmp_path / "no file"], model)
    require_target(rows, model)


def test_a_recording_of_another_target_is_refused_by_name(tmp_path: Path) -> None:
    model, other = target(tmp_path / "model"), target(tmp_path / "other", head_dim=32)
    with pytest.raises(DataError, match=r"rows is a recording of other \(target_config_hash .*a recording of model"):
        require_target(recording(tmp_path / "rows", other), model)


def test_a_recording_with_another_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    model, other = target(tmp_path / "model"), target(tmp_path / "other", word="<tool>")
    with pytest.raises(DataError, match=r"rows is a recording of other \(tokenizer_hash "):
        require_target(recording(tmp_path / "rows", other), model)


def test_a_recording_of_another_repository_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    ours = Manifest.of(target(tmp_path / "models--owner--model" / "snapshots" / "abc"))
    theirs = ours.model_copy(update={"target_hub_id": "owner/tuned"})
    (tmp_path / MANIFEST).write_text(theirs.model_dump_json())
    assert ours.target_hub_id == "owner/model"
    with pytest.raises(ConfigError, match="target owner/tuned, where it is owner/model here"):
        ours.require(tmp_path, ConfigError)


@contextmanager
def not_root() -> Iterator[None]:
    """Root may open every directory; nobody may not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_recording_of_another_user_is_refused_by_name(tmp_path: Path) -> None:
    model = target(tmp_path / "model")
    rows = recording(tmp_path / "rows", model)
    rows.chmod(0)
    says = r"rows cannot be looked into \(Permission denied\).*run the command as that user"
    with not_root(), pytest.raises(DataError, match=says):
        require_target(["owner/data", rows], model)


@pytest.mark.parametrize("content", [None, "{", '{"format": 2}'])
def test_what_is_no_recording_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=MANIFEST):
        read_manifest(tmp_path, DataError)


def test_it_names_no_more_than_the_target(tmp_path: Path) -> None:
    assert set(json.loads(Manifest.of(target(tmp_path / "model")).model_dump_json())) == {
        *("format", "target_name", "target_hub_id", "target_config_hash", "tokenizer_hash")
    }


@pytest.mark.parametrize("command", ["train", "evaluate", "features", "draft-vocabulary", "adapt"])
def test_every_command_refuses_it(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, other = target(tmp_path / "model"), target(tmp_path / "other", word="<tool>")
    rows, drafter = str(recording(tmp_path / "rows", other)), str(write_drafter(tmp_path / "drafter"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(str(model), rows).model_dump(mode="json")))
    out = str(tmp_path / "out")
    arguments = {
        "train": [str(recipe), "--out", out],
        "evaluate": [drafter, str(model), "--data", rows],
        "features": ["--data", rows, "--target", str(model), "--layers", "1", "--out", out, "--max-length", "40"],
        "draft-vocabulary": [drafter, str(model), "--data", rows, "--size", "8"],
        "adapt": [drafter, "--recorded", rows, "--out", out, "--target", str(model)],
    }
    assert main([command, *arguments[command]]) == 2
    assert "rows is a recording of other (tokenizer_hash" in capsys.readouterr().err
