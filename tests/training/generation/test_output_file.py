"""The output file has one writer and complete rows, and a damaged file is not continued."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from sglang_auf.errors import DataError
from sglang_auf.training.generation.output_file import OutputFile, OutputManifest

MANIFEST = OutputManifest(
    model="toy", temperature=0.0, max_tokens=8, seed=1, thinking="server", input_sha256="0" * 64, version="0"
)


def test_row_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    """The system's own refusal in the middle of a write, by a limit on the size of files."""
    out = tmp_path / "answers.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with OutputFile(out, MANIFEST) as file:
        file.append({"id": "a", "text": "x" * 100})
        before = out.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
        try:
            with pytest.raises(DataError, match="File too large; its 1 rows are kept"):
                file.append({"id": "b", "text": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert out.read_bytes() == before
        assert file.done == {"a"}


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    with OutputFile(out, MANIFEST), pytest.raises(DataError, match="written by another"), OutputFile(out, MANIFEST):
        pass
    with OutputFile(out, MANIFEST) as file:
        assert file.done == set()


def test_damaged_file_is_not_continued(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with OutputFile(out, MANIFEST) as file:
        file.append({"id": "a"})
    out.write_bytes(out.read_bytes() + b"\0\0\0\n")
    with pytest.raises(DataError, match=r"line 2 of .*answers.jsonl is no row"), OutputFile(out, MANIFEST):
        pass


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"), OutputFile(tmp_path / "file" / "answers.jsonl", MANIFEST):
        pass
