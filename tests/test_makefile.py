"""`make env`: what it clears, what it refuses to clear, and when it makes an environment anew. pip is a stand-in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("Makefile", "pyproject.toml", "constraints.txt")
PYTHON = """#!/bin/sh
# Python that makes an environment with a pip that notes what it is called with.
[ "$1" = -c ] && exec {python} -c 'import sys; sys.version_info = ({version}); sys._base_executable = "{base}"
exec(sys.argv[1])' "$2"
shift 2
for word; do
    [ "$word" = --clear ] && clear=yes && continue
    [ "$clear" ] && rm -rf "$word"
    mkdir -p "$word/bin"
    printf '#!/bin/sh\\n[ "$1" = install ] && touch "%s/installed"\\necho "$*" >> {log}\\n' "$word" > "$word/bin/pip"
    chmod +x "$word/bin/pip"
done
"""

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (place := tmp_path / "checkout").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, place)
    return place


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def run(
        checkout: Path, venv: str | None = None, version: str = "3, 11, 2", python: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """python: None for one that no environment holds, which is the base of any other."""
        base = tmp_path / "python"
        python = python or base
        for program in (base, python):
            program.write_text(PYTHON.format(python=sys.executable, version=version, base=base, log=tmp_path / "log"))
            program.chmod(0o755)
        clean = {name: value for name, value in os.environ.items() if name not in ("VENV", "MAKEFLAGS")}
        (home := tmp_path / "user").mkdir(exist_ok=True)  # never the home of whoever runs the test
        environment = clean | {"HOME": str(home)} | ({} if venv is None else {"VENV": venv})
        command = ["make", "env", f"PYTHON={python}"]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)

    return run


def installs(tmp_path: Path) -> int:
    """How often all packages were installed, not only the link to a checkout."""
    return (tmp_path / "log").read_text().count(".[dev]")


def test_an_environment_is_made_once(checkout: Path, make: Make, tmp_path: Path) -> None:
    for _ in range(2):
        assert make(checkout).returncode == 0
    assert installs(tmp_path) == 1
    assert (checkout / ".venv/installed").exists()


@pytest.mark.parametrize("clash", ["directory", "file"])
def test_what_is_not_its_own_is_not_cleared(clash: str, checkout: Path, make: Make, tmp_path: Path) -> None:
    home = tmp_path / "home"
    mine = home / "thesis.txt" if clash == "directory" else home
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("years of work")
    done = make(checkout, venv=str(home))
    assert done.returncode != 0
    assert str(home) in done.stderr and "to fix it: give another, VENV=" in done.stderr
    assert mine.read_text() == "years of work"
    assert [path.name for path in home.glob("*")] == ["thesis.txt"] * (clash == "directory")


@pytest.mark.parametrize("given", ["{0}/a {0}/b", "{0}/*", "~"])
def test_what_may_be_more_than_one_path_is_refused(given: str, checkout: Path, make: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    done = make(checkout, venv=given.format(tmp_path))
    assert done.returncode != 0
    assert "expected: one path without spaces" in done.stderr
    assert all((tmp_path / name / "mine").exists() for name in ("a", "b"))
    assert sorted(path.name for path in checkout.iterdir()) == sorted(FILES)


def test_new_pins_clear_what_was_installed(checkout: Path, make: Make, tmp_path: Path) -> None:
    make(checkout)
    (checkout / ".venv/stale").touch()
    with (checkout / "constraints.txt").open("a") as pins:
        pins.write("# changed\n")
    assert make(checkout).returncode == 0
    assert installs(tmp_path) == 2
    assert not (checkout / ".venv/stale").exists()


def test_what_an_interrupted_call_left_is_cleared(checkout: Path, make: Make, tmp_path: Path) -> None:
    make(checkout)
    for stamp in (checkout / ".venv").glob(".[il]n*"):
        stamp.unlink()
    assert make(checkout).returncode == 0
    assert installs(tmp_path) == 2


def test_an_environment_of_an_earlier_version_is_its_own(checkout: Path, make: Make) -> None:
    (environment := checkout / ".venv").mkdir()
    for name in (".installed-0123456789abcdef", ".linked-0123456789abcdef", "stale"):
        (environment / name).touch()
    assert make(checkout).returncode == 0
    assert not (environment / "stale").exists()


def test_a_checkout_that_was_moved_gets_another_environment(checkout: Path, make: Make, tmp_path: Path) -> None:
    make(checkout)
    moved = checkout.rename(tmp_path / "moved")
    assert make(moved).returncode == 0
    assert installs(tmp_path) == 2


def test_checkouts_share_an_environment_by_linking_in_turn(checkout: Path, make: Make, tmp_path: Path) -> None:
    shared = str(tmp_path / "shared")
    other = Path(shutil.copytree(checkout, tmp_path / "other"))
    for place in (checkout, other, checkout):
        assert make(place, venv=shared).returncode == 0
        assert len(list(Path(shared).glob(".linked-*"))) == 1
    assert installs(tmp_path) == 1
    assert len((tmp_path / "log").read_text().splitlines()) == 4


def test_the_environments_own_python_makes_it_anew(checkout: Path, make: Make, tmp_path: Path) -> None:
    make(checkout)
    for stamp in (checkout / ".venv").glob(".[il]n*"):
        stamp.unlink()
    own = checkout / ".venv/bin/python"
    assert make(checkout, python=own).returncode == 0
    assert installs(tmp_path) == 2 and not own.exists(), "cleared, and the stand-in makes no Python"


def test_no_python_is_refused_before_anything_is_cleared(checkout: Path, tmp_path: Path) -> None:
    done = subprocess.run(["make", "env", "PYTHON="], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "leave PYTHON out" in done.stderr
    assert sorted(path.name for path in checkout.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("version", "works"),
    [("3, 10, 14", False), ("3, 11, 0", True), ("3, 12, 9", True), ("3, 13, 0", False), ("3, 14, 0", False)],
)
def test_the_python_is_one_that_the_package_admits(version: str, works: bool, checkout: Path, make: Make) -> None:
    """SGLang 0.5.23 needs outlines_core 0.1.26, which has no wheel for Python 3.13."""
    done = make(checkout, version=version)
    assert (done.returncode == 0) is works
    assert works or "3.11 or 3.12 needed" in done.stderr
    (bounds,) = re.findall(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert (int(bounds[0]) <= int(version.split(",")[1]) < int(bounds[1])) is works
