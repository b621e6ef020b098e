from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from benchmarks.harness.sources.hub import HubFile, read_hub_rows
from sglang_auf.errors import DataError

ROWS = [{"question": "one\u2028line"}, {"question": "two"}]


def as_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def as_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "write"), [("test.parquet", as_parquet), ("test.json", as_json), ("test.jsonl", as_jsonl)]
)
def test_rows_and_the_commit_they_came_from(
    name: str, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "snapshots" / "datasets--a--b" / "snapshots" / "c0ffee" / "main"
    folder.mkdir(parents=True)
    write(folder / name)

    def download(repo: str, filename: str, **options: Any) -> str:
        assert (repo, filename, options) == ("a/b", f"main/{name}", {"repo_type": "dataset", "revision": "main"})
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_hub_rows(HubFile("a/b", f"main/{name}", "main")) == (ROWS, "c0ffee")


def test_an_unreachable_hub_says_what_works_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, filename: str, **options: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(DataError, match=r"a/b/x\.json.*no route to host.*--data-dir.*--tasks sample"):
        read_hub_rows(HubFile("a/b", "x.json", "main"))
