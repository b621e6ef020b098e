"""Where rows are read from: Parquet files, and what the `datasets` library loads."""

from __future__ import annotations

import functools
import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sglang_auf.errors import DataError
from sglang_auf.training.text import rows as reader
from sglang_auf.training.text.chats import chat_of

ANSWER = {"role": "assistant", "content": "Hi."}


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library writes into the test's own folder."""
    import datasets

    cached = functools.partial(datasets.load_dataset, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", cached)


def asking(question: str) -> dict[str, Any]:
    return {"id": question, "messages": [{"role": "user", "content": question}, ANSWER]}


def read(source: str | Path, **settings: Any) -> list[str]:
    """The ids of its rows, and where they were found."""
    return [row.name for row in reader.read_rows(source, hashlib.sha256(), **settings)]


@pytest.mark.usefixtures("datasets_cache")
def test_a_parquet_file_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([asking("a"), asking("b")]), tmp_path / "folder" / "train.parquet")
    assert read(tmp_path / "folder") == [f"a ({tmp_path}/folder[0])", f"b ({tmp_path}/folder[1])"]


CONFIGS = """---
configs:
- config_name: main
  data_files: [{split: train, path: main-train.jsonl}, {split: test, path: main-test.jsonl}]
- config_name: other
  data_files: [{split: train, path: other-train.jsonl}]
---
"""


@pytest.fixture
def configurations(tmp_path: Path) -> Path:
    """A folder with two configurations, as a repository of the hub has them."""
    folder = tmp_path / "several"
    folder.mkdir()
    (folder / "README.md").write_text(CONFIGS)
    for name in ("main-train", "main-test", "other-train"):
        (folder / f"{name}.jsonl").write_text(json.dumps(asking(name)) + "\n" + json.dumps(asking(f"{name}-2")) + "\n")
    return folder


@pytest.mark.usefixtures("datasets_cache")
def test_a_source_may_name_its_configuration_and_its_split(configurations: Path) -> None:
    def ids(written: str, **settings: Any) -> list[str]:
        names = read(written, **settings)
        assert [name.partition(" ")[2] for name in names] == [f"({written}[{i}])" for i in range(len(names))]
        return [name.partition(" ")[0] for name in names]

    assert ids(f"{configurations}:other") == ["other-train", "other-train-2"]
    assert ids(f"{configurations}:main") == ["main-train", "main-train-2"]
    assert ids(f"{configurations}:main", split="test") == ["main-test", "main-test-2"]
    assert ids(f"{configurations}:main:test") == ["main-test", "main-test-2"]
    assert ids(f"{configurations}:main:train[1:]+test[:1]", split="no such") == ["main-train-2", "main-test"]


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize(
    ("written", "choices"),
    [
        ("", "configurations: main, other;"),
        ("::test", "configurations: main, other;"),
        (":maim", "configurations: main, other;"),
        (":main:validation", "configurations: main, other; splits of main: train, test;"),
    ],
)
def test_configurations_and_splits_that_there_are_are_named(configurations: Path, written: str, choices: str) -> None:
    with pytest.raises(DataError) as refused:
        read(f"{configurations}{written}")
    assert choices in str(refused.value)
    assert "load_dataset" not in str(refused.value)
    assert "owner/name:config:split" in refused.value.remedy


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("owner/name", ("owner/name", None, "train", None)),
        ("owner/name@refs/convert/parquet", ("owner/name", None, "train", "refs/convert/parquet")),
        ("owner/name:main", ("owner/name", "main", "train", None)),
        ("owner/name:all-2.0 a:test", ("owner/name", "all-2.0 a", "test", None)),
        ("owner/name::test", ("owner/name", None, "test", None)),
        ("owner/name:main:train[:10%]@v1", ("owner/name", "main", "train[:10%]", "v1")),
        ("owner/name:main@v1", ("owner/name", "main", "train", "v1")),
    ],
)
def test_what_the_hub_is_asked_for(
    written: str, asked: tuple[str | None, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        assert (name, config, split, revision) == asked
        return datasets.Dataset.from_list([asking("q")])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert read(written) == [f"q ({written}[0])"]


@pytest.mark.parametrize(
    "written",
    ["owner/name:", "owner/name::", "owner/name@v1:main", "name:main", "owner/rows.parquet", "folder/sub:main@v1"],
)
def test_what_names_no_source(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no file .*owner/name:config:split@revision"):
        read(written)


def test_a_parquet_file_is_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.parquet"
    wrong = {"chat_template_kwargs": {"x": float("nan")}, "at": datetime(2026, 1, 1)}
    rows = [*(asking(f"q{i}") for i in range(4)), asking("q4") | wrong, {"id": "q0"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.Table.from_pylist([rows[4]]).schema), file)
    monkeypatch.setattr(reader, "BATCH_ROWS", 3)
    found = list(reader.read_rows(file, hashlib.sha256()))
    assert [row.name for row in found[:4]] == [f"q{i} (rows.parquet[{i}])" for i in range(4)]
    assert [chat_of(row.fields).messages for row in found[:4]] == [row["messages"] for row in rows[:4]]
    assert [(row.name, row.fault) for row in found[4:]] == [
        ("rows.parquet[4]", "NaN or Infinity, which JSON does not have"),
        ("q0 (rows.parquet[5])", "an id for the second time"),
    ]


def test_a_null_that_a_struct_of_parquet_may_have_added_is_refused(tmp_path: Path) -> None:
    def calling(id: str, **arguments: str) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
        return {"id": id, "messages": [{"role": "assistant", "content": "", "tool_calls": calls}]}

    file = tmp_path / "rows.parquet"
    rows = [calling("a", city="Ulm"), calling("b", city="Ulm", zone="CET")]
    schema = pyarrow.Table.from_pylist(rows[1:]).schema
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    first, second = reader.read_rows(file, hashlib.sha256())
    assert "a null in a call's arguments" in str(first.fault) and second.fault is None


def test_another_parquet_file_has_another_digest(tmp_path: Path) -> None:
    def digest(name: str, *questions: str) -> str:
        parquet.write_table(pyarrow.Table.from_pylist([asking(question) for question in questions]), tmp_path / name)
        found = hashlib.sha256()
        list(reader.read_rows(tmp_path / name, found))
        return found.hexdigest()

    assert digest("a.parquet", "x", "y") == digest("b.parquet", "x", "y") != digest("c.parquet", "x", "z")


def test_parquet_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    rows = [asking(hashlib.sha256(bytes([i])).hexdigest()) for i in range(200)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), whole, row_group_size=50, compression="zstd")
    content = whole.read_bytes()
    broken = bytearray(content)
    broken[len(content) // 2 : len(content) // 2 + 400] = bytes(400)  # in the pages of a later row group
    text = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pyarrow.py_buffer(b"\xff")
    )
    parquet.write_table(pyarrow.table({"id": text}), tmp_path / "latin.parquet")
    for name, damaged in (
        ("cut.parquet", content[: len(content) // 2]),
        ("empty.parquet", b""),
        ("lines.parquet", json.dumps(rows[0]).encode()),
        ("broken.parquet", bytes(broken)),
        ("latin.parquet", (tmp_path / "latin.parquet").read_bytes()),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name} cannot be read: \w+: .*a complete Parquet file"):
            read(tmp_path / name)


@pytest.mark.usefixtures("datasets_cache")
def test_a_broken_parquet_file_in_a_folder_is_named_with_its_fault(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"folder: ArrowInvalid: Parquet magic bytes not found in footer"):
        read(tmp_path / "folder")
