from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from benchmarks.harness import servers
from tests.support.http_servers import serving

FAKE_FILE = Path(__file__).parents[1] / "support" / "fake_server.py"


def _load_fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_server", FAKE_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fake_server"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAKE = _load_fake()


@dataclass
class Fake:
    url: str
    engine: Any

    def asked(self) -> dict[str, int]:
        """How often each last user message came, without warm-up."""
        return dict(FAKE.asked(self.engine))


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    """Starts fake servers on free ports, with FakeEngine's arguments; ends them after the test."""
    with ExitStack() as running:

        def start(**behaviour: Any) -> Fake:
            engine = FAKE.FakeEngine(**behaviour)
            return Fake(running.enter_context(serving(FAKE.make_app(engine))), engine)

        yield start


@pytest.fixture
def fake_server_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m server` and `python -m sglang.launch_server`, started from this directory, are the fake one.

    It has no engine that works on after its last answer, so nothing waits for one, and it is soon up.
    """
    monkeypatch.setattr(servers, "REST_S", 0.0)
    monkeypatch.setattr(servers, "POLL_S", 0.05)
    for name, module in (("server", "__main__"), ("sglang", "launch_server")):
        package = tmp_path / name
        package.mkdir()
        (package / "__init__.py").touch()
        shutil.copy(FAKE_FILE, package / f"{module}.py")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Two small tasks: gsm8k with six prompts, mt_bench with six of two turns; 18 requests."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder / "gsm8k.jsonl", [{"id": f"g/{i}", "turns": [f"sum {i}"]} for i in range(6)])
    write_rows(folder / "mt_bench.jsonl", [{"id": f"m/{i}", "turns": [f"first {i}", f"second {i}"]} for i in range(6)])
    return folder


@pytest.fixture
def workload(data_dir: Path) -> dict[str, Any]:
    """Settings that ask all of data_dir."""
    return {"tasks": "gsm8k,mt_bench", "limit": 6, "data_dir": data_dir, "warmup": 1, "max_tokens": 32}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def no_child_left() -> Iterator[None]:
    """The test ends every process that it starts; those of tests before it may live on."""
    before = psutil.Process().children(recursive=True)
    yield
    assert set(psutil.Process().children(recursive=True)) <= set(before)
