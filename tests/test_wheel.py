"""The wheel and the source distribution: built, installed elsewhere, and loaded by SGLang's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def package_files() -> list[str]:
    found = (path for kind in ("*.py", "*.yaml", "py.typed") for path in (ROOT / "sglang_auf").rglob(kind))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the source distribution, of a copy: a build leaves files beside its sources."""
    copy, dist = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for path in (*package_files(), "pyproject.toml", "README.md", "LICENSE"):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes((ROOT / path).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, copy, cwd=copy)
    return dist


def test_the_source_distribution_holds_the_package(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "sglang_auf/plugin.py", "sglang_auf/py.typed"} <= names


def test_the_wheel_holds_every_module_and_recipe(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    assert set(package_files()) <= names
    assert not [name for name in names if name.startswith(("server/", "benchmarks/", "tests/"))]


@pytest.mark.e2e
def test_sglangs_launcher_loads_the_plugin_of_an_installed_wheel(built: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    wheel = next(built.glob("*.whl"))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel, cwd=tmp_path)
    show = "import sglang_auf; print('plugin from', sglang_auf.__file__)"
    assert f"plugin from {site}" in run(sys.executable, "-c", show, cwd=tmp_path, PYTHONPATH=str(site))
    said = run(sys.executable, "-m", "sglang.launch_server", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "cannot be used" not in said
    load = (
        "from sglang.srt.plugins import load_plugins; load_plugins();"
        "from sglang.srt.speculative.spec_info import SpeculativeAlgorithm;"
        "print(type(SpeculativeAlgorithm.from_string('AUF')).__module__)"
    )
    said = run(sys.executable, "-c", load, cwd=tmp_path, PYTHONPATH=str(site))
    assert "sglang_auf.speculative.algorithm" in said.splitlines(), said
