"""Finding a model, writing completely or not at all, locking. No test reaches a network."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_auf import files
from sglang_auf.errors import CardError, TargetError
from sglang_auf.files import find_model, listing


def test_a_directory_is_itself_and_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert find_model(str(tmp_path), ["*.json"], CardError) == tmp_path


def test_a_hub_id_is_fetched_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", download)
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
    monkeypatch.setattr(files, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
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


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    files.write_whole(file, "old")
    files.write_whole(file, b"new")
    assert file.read_bytes() == b"new"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(file, "newer")
    assert file.read_bytes() == b"new" and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_directory_appears_whole_and_replaces_the_earlier_one(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "model"
    for content in ("first", "second"):
        with files.whole_directory(place) as draft:
            (draft / "sub").mkdir()
            (draft / "sub" / "a").write_text(content)
            assert not place.exists() or (place / "sub" / "a").read_text() == "first"
        assert (place / "sub" / "a").read_text() == content
    assert [entry.name for entry in place.parent.iterdir()] == ["model"]
    assert place.stat().st_mode & 0o777 == place.parent.stat().st_mode & 0o777, "readable as any new directory is"


def test_a_directory_that_could_not_be_filled_leaves_the_earlier_one(tmp_path: Path) -> None:
    with files.whole_directory(tmp_path / "model") as draft:
        (draft / "a").write_text("kept")
    with pytest.raises(RuntimeError), files.whole_directory(tmp_path / "model") as draft:
        (draft / "a").write_text("half")
        raise RuntimeError
    assert (tmp_path / "model" / "a").read_text() == "kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_directory_that_cannot_take_its_place_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    place = tmp_path / "model"
    with files.whole_directory(place) as draft:
        (draft / "a").write_text("kept")
    rename = Path.rename
    done: list[Path] = []

    def stopped(self: Path, target: Path) -> Path:
        if done and (killed or len(done) == 1):
            done.append(self)
            raise OSError(errno.EIO, "Input/output error")
        done.append(self)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(OSError, match="Input/output"), files.whole_directory(place) as draft:
            (draft / "a").write_text("new")
    assert place.exists() is not killed
    files.remove_unfinished(place)
    assert (place / "a").read_text() == "kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_link_to_a_directory_is_replaced_and_what_it_led_to_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "a").write_text("kept")
    link.symlink_to(real)
    with files.whole_directory(link) as draft:
        (draft / "a").write_text("new")
    assert (link / "a").read_text() == "new" and not link.is_symlink() and (real / "a").read_text() == "kept"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "real"]


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / f".model{files.UNFINISHED}0123"
    left.mkdir()
    (left / "a").write_text("")
    (tmp_path / f".model{files.UNFINISHED}4567").write_text("")
    (tmp_path / f".model{files.UNFINISHED}{files.REPLACED}89ab").mkdir()  # the new one had taken its place
    others = ["model", f".other{files.UNFINISHED}0123"]
    for name in others:
        (tmp_path / name).mkdir()
    files.remove_unfinished(tmp_path / "model")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(others)


def test_a_lock_is_held_by_one_and_free_after_a_kill(tmp_path: Path) -> None:
    place = tmp_path / "made" / ".lock"
    hold = (
        "import sys, time; from pathlib import Path; from sglang_auf.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(place)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another process"), files.locked(place):
            pass
        assert files.is_held(place) and not files.is_held(tmp_path / "other")
        holder.kill()
    assert not files.is_held(place)
    with files.locked(place), pytest.raises(BlockingIOError), files.locked(place):
        pass  # not twice in one process either
    with files.locked(place, wait=True):
        pass


def test_weight_files_are_those_of_the_index_or_all(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
    found = files.weight_files(tmp_path, CardError)
    assert [file.name for file in found] == ["a.safetensors", "b.safetensors"]
    index = tmp_path / files.INDEX
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "b.safetensors"}}))
    assert [file.name for file in files.weight_files(tmp_path, CardError)] == ["b.safetensors"]
    index.write_text(json.dumps({"weight_map": {"x": "c.safetensors"}}))
    with pytest.raises(CardError, match=r"lacks c\.safetensors"):
        files.weight_files(tmp_path, CardError)
    index.write_text(json.dumps({"weight_map": ["c.safetensors"]}))
    with pytest.raises(CardError, match="no weight_map"):
        files.weight_files(tmp_path, CardError)


def test_pickles_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="nothing"):
        files.weight_files(tmp_path, CardError)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CardError, match=r"pytorch_model\.bin.*save it as safetensors"):
        files.weight_files(tmp_path, CardError)
