"""Finding a model by path or hub id. No test reaches a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sglang_auf.files as model_files
from sglang_auf.errors import CardError, TargetError
from sglang_auf.files import find_model, listing


def test_a_directory_is_itself_and_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert find_model(str(tmp_path), ["*.json"], CardError) == tmp_path


def test_a_hub_id_is_fetched_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(model_files, "snapshot_download", download)
    assert find_model("z-lab/Qwen3-8B-DFlash-b16", ("*.json", "*.safetensors"), CardError, "abc") == tmp_path
    assert asked == {
        "name": "z-lab/Qwen3-8B-DFlash-b16",
        "revision": "abc",
        "allow_patterns": ["*.json", "*.safetensors"],
    }


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client as with HF_HUB_OFFLINE=1 and nothing cached; it reads both at import, so they are set there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
def test_a_hub_id_without_a_hub_says_what_was_tried() -> None:
    with pytest.raises(CardError) as caught:
        find_model("nobody/nothing", ["*.json"], CardError, revision="v2")
    assert f"no directory {Path('nobody/nothing').absolute()}" in caught.value.found
    assert "the hub gave no nobody/nothing at revision v2" in caught.value.found
    assert "without a network" in caught.value.remedy


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "just-a-name", "a/b/c"])
def test_a_missing_path_is_not_looked_up_at_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(TargetError, match="no directory /"):
        find_model(name, ["*.json"], TargetError)


def test_an_id_the_hub_client_rejects_is_our_error() -> None:
    with pytest.raises(CardError, match="HFValidationError"):
        find_model("a/b..c", ["*.json"], CardError)


def test_a_file_is_no_model_directory(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(TargetError, match="is a file"):
        find_model(str(tmp_path / "model.gguf"), ["*.json"], TargetError)


def test_a_listing_is_short(tmp_path: Path) -> None:
    assert listing(tmp_path) == "nothing"
    for number in range(12):
        (tmp_path / f"{number:02}").touch()
    assert listing(tmp_path) == "00, 01, 02, 03, 04, 05, 06, 07 and 4 more"
