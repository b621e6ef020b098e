"""Where a result comes from: of this process when it is made, and of nothing else when it is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks.harness import results
from benchmarks.harness.results import ROOT, Measured, versions


class Result(Measured):
    value: int


def test_a_result_says_where_it_was_made() -> None:
    made = Result(value=1)
    assert made.versions["sglang"] and made.machine["cores"] and made.command
    assert Result.model_validate_json(made.model_dump_json()) == made


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("before")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    commit = versions()["commit"]
    assert commit and len(commit) == 40
    (tmp_path / "file").write_text("after")
    assert versions()["commit"] == f"{commit}+changes"


@pytest.mark.parametrize("name", ["versions", "machine", "command"])
def test_a_file_that_does_not_say_so_does_not_come_from_here(name: str) -> None:
    content = json.loads(Result(value=1).model_dump_json())
    del content[name]
    with pytest.raises(ValidationError, match=f"{name} is missing"):
        Result.model_validate_json(json.dumps(content))


def test_paths_are_those_of_the_benchmarks_wherever_the_package_lies(tmp_path: Path) -> None:
    (tmp_path / "sglang_auf").symlink_to(ROOT / "sglang_auf")  # as if installed elsewhere
    code = (
        "from benchmarks.serving.identity import SHIPPED_DRAFTER; from benchmarks.training.rival_steps import DRIVERS;"
        "assert SHIPPED_DRAFTER.is_dir() and DRIVERS.is_dir()"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=True)
