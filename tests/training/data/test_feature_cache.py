"""A cache that is written and read: it gives what the target gives, or says why it cannot."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_auf import cli
from sglang_auf.errors import AufError, ConfigError, DataError
from sglang_auf.files import locked
from sglang_auf.recording.manifest import MANIFEST
from sglang_auf.recording.ring import LOCK
from sglang_auf.training.data.batching import collate
from sglang_auf.training.data.feature_cache import CachedFeatures, check_contents
from sglang_auf.training.data.feature_writer import cache_features, write_cache
from sglang_auf.training.data.features import OnlineFeatures
from sglang_auf.training.text.conversations import load_conversations
from sglang_auf.training.text.reader import Conversation
from tests.support.tiny_models import VOCABULARY, target_config, write_target
from tests.support.toy_tokenizer import toy_tokenizer

TAPS = (1, 3)
TOKEN_BYTES = len(TAPS) * 64 * 2
SHARD_BYTES = 30 * TOKEN_BYTES
LENGTHS = (12, 9, 20, 31, 7, 3)
SHARDS = [[0, 1], [2], [3], [4, 5]]
"""Rows of each shard of 30 tokens; a longer row has a shard of its own."""


class Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_target(tmp_path_factory.mktemp("targets") / "llama")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def source(target: Path) -> OnlineFeatures:
    return OnlineFeatures(target, TAPS)


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    generator = torch.Generator().manual_seed(0)
    return [
        Conversation(f"data/{row}", torch.randint(VOCABULARY, (length,), generator=generator).tolist(), [True] * length)
        for row, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def finished(
    source: OnlineFeatures, conversations: list[Conversation], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("caches") / "whole"
    write_cache(conversations, source, directory, shard_bytes=SHARD_BYTES)
    return directory


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(finished, tmp_path / "cache")


class Counting(OnlineFeatures):
    """Records what it computes; optionally dies before one conversation."""

    def __init__(self, *args: Any, dies_before: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.computed: list[str] = []
        self.batches: list[tuple[Sequence[str], Tensor, Tensor, Tensor]] = []
        self.dies_before = dies_before

    def __call__(self, ids: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
        if self.dies_before in ids:
            raise Killed
        self.computed += ids
        self.batches.append((ids, input_ids, lengths, super().__call__(ids, input_ids, lengths)))
        return self.batches[-1][-1]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def shards_of(directory: Path) -> list[str]:
    """Names of the shards, also of half-written ones."""
    return sorted(path.name for path in directory.iterdir() if "shard-" in path.name)


def batch(conversations: Sequence[Conversation], rows: Sequence[int]) -> tuple[list[str], Tensor, Tensor]:
    padded = collate([conversations[row] for row in rows])
    return [conversations[row].id for row in rows], padded.input_ids, padded.lengths


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal except for rounding to bfloat16, token by token; features of two different tokens would differ far more."""
    assert found.dtype == expected.dtype == torch.bfloat16 and found.shape == expected.shape
    distance, size = (found.float() - expected.float()).norm(dim=-1), expected.float().norm(dim=-1)
    assert (distance <= 0.05 * size).all() and size.sum() > 0


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_exactly_what_the_target_gave(
    target: Path, conversations: list[Conversation], tmp_path: Path, batch_tokens: int
) -> None:
    source = Counting(target, TAPS)
    write_cache(conversations, source, tmp_path, batch_tokens=batch_tokens)
    assert sorted(source.computed) == [conversation.id for conversation in conversations]
    cached = CachedFeatures(tmp_path, target, TAPS)
    for ids, input_ids, lengths, given in source.batches:
        assert torch.equal(cached(ids, input_ids, lengths), given)


def test_near_what_the_target_gives_for_other_batches(
    finished: Path, target: Path, source: OnlineFeatures, conversations: list[Conversation]
) -> None:
    cached = CachedFeatures(finished, target, TAPS)
    cached.require(conversations)
    assert cached.width == source.width
    for rows in ([0], [5, 3, 1], range(len(LENGTHS))):
        found = cached(*batch(conversations, rows))
        assert_near(found, source(*batch(conversations, rows)))
        assert all(not found[place, LENGTHS[row] :].any() for place, row in enumerate(rows))


def test_what_lies_on_disk(finished: Path, source: OnlineFeatures, conversations: list[Conversation]) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["origin"]["layer_ids"] == list(TAPS)
    assert manifest["origin"]["dtype"] == "bfloat16"
    assert manifest["origin"]["target_config_hash"] == source.facts.config_hash
    assert manifest["origin"]["chat_template_hash"] == source.facts.chat_template_hash is not None
    assert manifest["origin"]["target_name"] == "llama"
    assert manifest["ids"] == [conversation.id for conversation in conversations]
    assert manifest["lengths"] == list(LENGTHS)
    assert manifest["shards"] == [len(rows) for rows in SHARDS]
    assert "git_revision" in manifest["provenance"]
    assert shards_of(finished) == [f"shard-{shard:05}.safetensors" for shard in range(len(SHARDS))]
    for name, rows in zip(shards_of(finished), SHARDS, strict=True):
        stored = load_file(finished / name)["features"]
        assert stored.shape == (sum(LENGTHS[row] for row in rows), len(TAPS) * 64)
        assert (finished / name).stat().st_size > stored.shape[0] * TOKEN_BYTES


def test_goes_on_after_a_kill(target: Path, finished: Path, conversations: list[Conversation], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        dying = Counting(target, TAPS, dies_before="data/3")
        write_cache(conversations, dying, tmp_path, shard_bytes=SHARD_BYTES)
    (tmp_path / ".shard-00002.safetensors.writing-0a1b2c3d").write_bytes(b"half a sh")
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in shards_of(tmp_path)[1:]}
    with pytest.raises(DataError, match="lacks 2 of 4 shards") as caught:
        CachedFeatures(tmp_path, target, TAPS)
    assert "run `sglang-auf features` again" in caught.value.remedy

    resumed = Counting(target, TAPS)
    # Another shard size changes nothing: the cache keeps the plan that it was begun with.
    write_cache(conversations, resumed, tmp_path, shard_bytes=10 * SHARD_BYTES)
    assert sorted(resumed.computed) == ["data/3", "data/4", "data/5"]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert shards_of(tmp_path) == shards_of(finished)
    for name in shards_of(finished):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()

    again = Counting(target, TAPS)
    write_cache(conversations, again, tmp_path)
    assert again.computed == []


def test_a_kill_in_the_middle_of_a_write_leaves_no_shard(
    target: Path, source: OnlineFeatures, conversations: list[Conversation], tmp_path: Path, monkeypatch: Any
) -> None:
    sync = os.fsync

    def dies(descriptor: int) -> None:
        if "shard-00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise Killed
        sync(descriptor)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, "fsync", dies)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process removes nothing
        write_cache(conversations, source, tmp_path, shard_bytes=SHARD_BYTES)
    half, done = shards_of(tmp_path)
    assert half.startswith(".shard-00001.safetensors.writing-") and done == "shard-00000.safetensors"
    write_cache(conversations, source, tmp_path, shard_bytes=SHARD_BYTES)
    assert len(shards_of(tmp_path)) == len(SHARDS)
    CachedFeatures(tmp_path, target, TAPS)(*batch(conversations, range(len(LENGTHS))))


def test_a_full_disk_leaves_finished_shards(
    target: Path, source: OnlineFeatures, conversations: list[Conversation], tmp_path: Path, monkeypatch: Any
) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        if "shard-00002" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patched, pytest.raises(ConfigError, match="No space left") as caught:
        patched.setattr(os, "fsync", full)
        write_cache(conversations, source, tmp_path, shard_bytes=SHARD_BYTES)
    assert "finished shards stay" in caught.value.remedy
    assert shards_of(tmp_path) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    for shard in shards_of(tmp_path):
        check_contents(tmp_path / shard)
    write_cache(conversations, source, tmp_path, shard_bytes=SHARD_BYTES)
    cached = CachedFeatures(tmp_path, target, TAPS)
    everything = batch(conversations, range(len(LENGTHS)))
    assert_near(cached(*everything), source(*everything))


def test_too_small_a_disk_is_refused_before_anything_is_written(
    source: OnlineFeatures, conversations: list[Conversation], tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    needed = sum(LENGTHS) * TOKEN_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - needed, needed))
    caplog.set_level("INFO")
    with pytest.raises(ConfigError, match=f"{needed / 1e6:.3f} MB free") as caught:
        write_cache(conversations, source, tmp_path, shard_bytes=SHARD_BYTES)
    assert f"{sum(LENGTHS)} tokens" in caught.value.expected
    assert f"{sum(LENGTHS)} tokens of {TOKEN_BYTES} bytes" in caplog.text
    assert not list(tmp_path.glob("*.json")) and not shards_of(tmp_path)

    roomy = needed + 4000  # the manifest needs some too
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - roomy, roomy))
    write_cache(conversations, source, tmp_path, shard_bytes=SHARD_BYTES)
    # A finished cache needs no space for shards any more.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 4000, 4000))
    write_cache(conversations, source, tmp_path, shard_bytes=SHARD_BYTES)


@pytest.fixture
def changed_target(target: Path, tmp_path: Path) -> Path:
    return shutil.copytree(target, tmp_path / "changed")


def refusals(cache: Path, target: Path, conversations: list[Conversation], layers: tuple[int, ...], dtype: str) -> str:
    """The message, which is the same for reading and for continuing to write."""
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    with pytest.raises(DataError) as reading:
        CachedFeatures(cache, target, layers, dtype=dtype)
    with pytest.raises(DataError) as writing:
        write_cache(conversations, OnlineFeatures(target, layers, dtype=dtype), cache)
    assert reading.value.found.split(":", 1)[1] == writing.value.found.split(":", 1)[1]
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir() if path.name != ".lock"} == {
        name: time for name, time in before.items() if name != ".lock"
    }
    return reading.value.found


def test_other_layers_are_refused(cache: Path, target: Path, conversations: list[Conversation]) -> None:
    found = refusals(cache, target, conversations, (1, 2), "bfloat16")
    assert "layer_ids: (1, 3) in the cache, (1, 2) asked for" in found
    assert "dtype" not in found and "target" not in found.split("something else")[1]


def test_another_dtype_is_refused(cache: Path, target: Path, conversations: list[Conversation]) -> None:
    assert "dtype: bfloat16 in the cache, float32 asked for" in refusals(cache, target, conversations, TAPS, "float32")


def test_another_target_is_refused(cache: Path, conversations: list[Conversation], tmp_path: Path) -> None:
    other = write_target(tmp_path / "wider", head_dim=32)
    found = refusals(cache, other, conversations, TAPS, "bfloat16")
    assert "target: llama in the cache, wider asked for" in found
    assert "target_config_hash" in found


def test_a_fine_tuned_target_is_refused(cache: Path, changed_target: Path, conversations: list[Conversation]) -> None:
    """Same shapes, same config, other weights."""
    weights = load_file(changed_target / "model.safetensors")
    tuned = {name: weight + 0.01 for name, weight in weights.items()}
    save_file(tuned, changed_target / "model.safetensors", metadata={"format": "pt"})
    found = refusals(cache, changed_target, conversations, TAPS, "bfloat16")
    assert "target_weights" in found and "target_config_hash" not in found


def test_another_chat_template_is_refused(cache: Path, changed_target: Path, conversations: list[Conversation]) -> None:
    (changed_target / "chat_template.jinja").write_text("{{ messages | length }}")
    assert "chat_template_hash" in refusals(cache, changed_target, conversations, TAPS, "bfloat16")


def test_a_moved_target_is_the_same(cache: Path, changed_target: Path) -> None:
    CachedFeatures(cache, changed_target, TAPS)


@pytest.mark.parametrize("change", ["tokens", "fewer", "more", "order"])
def test_going_on_with_other_data_is_refused(
    cache: Path, source: OnlineFeatures, conversations: list[Conversation], change: str
) -> None:
    moved = Conversation("data/2", [5, *conversations[2].input_ids[:-1]], [True] * LENGTHS[2])
    other, culprit = {
        "tokens": ([*conversations[:2], moved, *conversations[3:]], "data/2"),
        "fewer": (conversations[:-1], "data/5"),
        "more": ([*conversations, Conversation("data/new", [1, 2, 3], [True] * 3)], "data/new"),
        "order": (conversations[::-1], "another order"),
    }[change]
    with pytest.raises(DataError, match="is of other data") as caught:
        write_cache(other, source, cache)
    assert culprit in caught.value.found
    assert "data/0" not in caught.value.found


def test_reading_other_data_is_refused(cache: Path, target: Path, conversations: list[Conversation]) -> None:
    cached = CachedFeatures(cache, target, TAPS)
    unknown = [Conversation("data/new", [1, 2, 3], [True] * 3)]
    retokenised = [Conversation("data/4", conversations[4].input_ids[::-1], [True] * LENGTHS[4])]
    for wrong, words in ((unknown, "data/new is not in"), (retokenised, "data/4 has other tokens than in")):
        with pytest.raises(DataError, match=words):
            cached.require([conversations[0], *wrong])
        with pytest.raises(DataError, match=words):
            cached(*batch([conversations[0], *wrong], [0, 1]))


def test_a_shard_that_was_cut_short(
    cache: Path, target: Path, source: OnlineFeatures, conversations: list[Conversation]
) -> None:
    shard = cache / "shard-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    for use in (lambda: CachedFeatures(cache, target, TAPS), lambda: write_cache(conversations, source, cache)):
        with pytest.raises(DataError, match=r"shard-00002\.safetensors is damaged") as caught:
            use()
        assert "delete shard-00002.safetensors" in caught.value.remedy
    shard.unlink()
    write_cache(conversations, source, cache)  # what the remedy says
    everything = batch(conversations, range(len(LENGTHS)))
    assert_near(CachedFeatures(cache, target, TAPS)(*everything), source(*everything))


def test_a_shard_with_a_flipped_bit(cache: Path, target: Path, conversations: list[Conversation]) -> None:
    shard = cache / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    cached = CachedFeatures(cache, target, TAPS)
    cached(*batch(conversations, [0, 1, 2]))  # the others are intact
    with pytest.raises(DataError, match=r"shard-00002\.safetensors is damaged .*checksum"):
        cached(*batch(conversations, [3]))


def test_a_shard_of_another_cache(cache: Path, target: Path) -> None:
    shutil.copy(cache / "shard-00000.safetensors", cache / "shard-00001.safetensors")
    with pytest.raises(DataError, match=r"shard-00001\.safetensors is damaged .*\[21, 128\].*\[20, 128\]"):
        CachedFeatures(cache, target, TAPS)


@pytest.mark.parametrize("change", [{"format": 2}, {"lengths": [1]}, {"surprise": 1}])
def test_a_manifest_that_is_not_ours(cache: Path, target: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=r"manifest\.json"):
        CachedFeatures(cache, target, TAPS)


def test_no_cache_there(target: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest\.json"):
        CachedFeatures(tmp_path, target, TAPS)


def test_a_directory_with_other_files_is_left_alone(
    source: OnlineFeatures, conversations: list[Conversation], tmp_path: Path
) -> None:
    for name in ("thesis.tex", "thesis.writing"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        write_cache(conversations, source, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "thesis.tex", "thesis.writing"]


def test_a_second_writer_is_refused(
    target: Path, source: OnlineFeatures, conversations: list[Conversation], tmp_path: Path
) -> None:
    class Nested(OnlineFeatures):
        def __call__(self, ids: Sequence[str], input_ids: Tensor, lengths: Tensor) -> Tensor:
            write_cache(conversations, source, tmp_path)
            raise AssertionError("the second writer was let in")

    with pytest.raises(ConfigError, match="another process"):
        write_cache(conversations, Nested(target, TAPS), tmp_path)


@pytest.mark.parametrize("rows", [[], [0, 1, 0]])
def test_no_rows_or_one_id_twice(
    source: OnlineFeatures, conversations: list[Conversation], tmp_path: Path, rows: list[int]
) -> None:
    with pytest.raises(DataError, match="no conversations" if not rows else "data/0"):
        write_cache([conversations[row] for row in rows], source, tmp_path)


def test_a_place_that_cannot_be_written(
    source: OnlineFeatures, conversations: list[Conversation], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AufError, match="file"):
        write_cache(conversations, source, tmp_path / "file" / "cache")


@pytest.fixture
def chat(tmp_path: Path) -> tuple[Path, Path]:
    """A target with a tokenizer, and a file of two usable rows and one without an answer."""
    tokenizer = toy_tokenizer()
    target = tmp_path / "target"
    sizes = {key: value for key, value in target_config().items() if key not in ("architectures", "vocab_size")}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).bfloat16().save_pretrained(target)
    tokenizer.save_pretrained(target)
    data = tmp_path / "rows.jsonl"
    rows = [
        [{"role": "user", "content": f"{row}?"}, {"role": "assistant", "content": "Yes. " * row}] for row in range(3)
    ]
    data.write_text("\n".join(json.dumps({"id": f"r/{row}", "messages": each}) for row, each in enumerate(rows)))
    return target, data


def test_the_command(chat: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    target, data = chat
    arguments = ["features", "--data", str(data), "--target", str(target), "--layers", "1,3", "--max-length", "200"]
    assert cli.main([*arguments, "--out", str(tmp_path / "cache"), "--device", "cpu"]) == 0
    assert "features of 2 conversations" in capsys.readouterr().out

    loaded = load_conversations(str(data), toy_tokenizer(), max_length=200, min_answer_tokens=1).conversations
    cached = CachedFeatures(tmp_path / "cache", target, TAPS)
    cached.require(loaded)
    everything = batch(loaded, range(len(loaded)))
    assert_near(cached(*everything), OnlineFeatures(target, TAPS)(*everything))


@pytest.mark.parametrize("layers", ["1;3", "", "4", "3,1"])
def test_the_command_refuses_layers(chat: tuple[Path, Path], tmp_path: Path, capsys: Any, layers: str) -> None:
    target, data = chat
    arguments = ["features", "--data", str(data), "--target", str(target), "--max-length", "200"]
    assert cli.main([*arguments, "--layers", layers, "--out", str(tmp_path / "cache")]) == 2
    assert "layers" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_features_of_a_recording_that_grows_are_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    with locked(tmp_path / LOCK), pytest.raises(DataError, match="into which a server records now"):
        cache_features([tmp_path], "target", TAPS, tmp_path / "features", max_length=8)
