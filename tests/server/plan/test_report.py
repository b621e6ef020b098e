"""`python -m server --check`, each in a process of its own: SGLang decides on its platform once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.harness.servers import free_port
from sglang_auf.cpu import memory
from sglang_auf.cpu.memory import GIB, RESERVED, ModelSize, plan_pool
from sglang_auf.files import INDEX
from sglang_auf.recording.recorder import Recorder
from sglang_auf.recording.settings import RecordSettings
from tests.server.plan.test_memory import TARGET_WEIGHTS
from tests.server.test_cuda_arguments import write
from tests.support.qwen3_8b import DRAFTER, TARGET
from tests.support.tiny_models import write_drafter, write_target

pytestmark = pytest.mark.e2e
KEY = "a-key-of-no-server"
NOTICE = "a-notice-of-no-other-profile"
FREE = RESERVED + 2**25

SCRIPT = """
import contextlib, io, json, sys
import psutil
from server.__main__ import main

free, calls = json.load(sys.stdin)
real = psutil.virtual_memory
psutil.virtual_memory = lambda: real()._replace(available=free)
answers = []
for arguments in calls:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(arguments)
    answers.append((code, said.getvalue()))
print(json.dumps(answers))
"""


class Answer:
    """What one call printed: lines (about what, what) -> how."""

    def __init__(self, code: int, said: str) -> None:
        self.code = code
        self.said = said
        self.lines: dict[tuple[str, str], str] = {}
        for line in said.splitlines():
            about, rest = line.split(maxsplit=1)
            what, how = rest.split("  ", 1)
            self.lines[about, what] = how.strip()

    def __getitem__(self, key: tuple[str, str]) -> str:
        return self.lines[key]


def ask(calls: list[list[str]]) -> tuple[list[Answer], str]:
    """The answers to calls of one process, and what it logged."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG_AUF_", "SGLANG_PL"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([FREE, calls]),
        capture_output=True,
        text=True,
        env=variables | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [Answer(*answer) for answer in json.loads(done.stdout.splitlines()[-1])], done.stderr


class Checks:
    """Calls by name, made in one process."""

    def __init__(self, calls: dict[str, list[str]]) -> None:
        answers, self.log = ask(list(calls.values()))
        self.answers = dict(zip(calls, answers, strict=True))

    def __getitem__(self, name: str) -> Answer:
        return self.answers[name]


def settings(**changes: Any) -> list[str]:
    return [part for key, value in changes.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("check")


@pytest.fixture(scope="module")
def on_a_cpu(scratch: Path) -> Checks:
    target, drafter = write_target(scratch / "target"), write_drafter(scratch / "drafter", 4)
    (scratch / "full").mkdir()
    (scratch / "full" / "something").touch()
    tiny = [
        "--profile",
        "smollm2-135m",
        "--check",
        "--port",
        str(free_port()),
        *settings(target=target, drafter=drafter),
    ]
    recording, at_rest, held = (scratch / name for name in ("recording", "at-rest", "held"))
    Recorder.opened(RecordSettings(directory=str(at_rest)), target).stop()
    server = Recorder.opened(RecordSettings(directory=str(held)), target)
    checks = Checks(
        {
            "as it is": [*tiny, "--api-key", KEY],
            "fixed tree": [*tiny, *settings(tree_nodes=3)],
            "plain": [*tiny, "--plain"],
            "warned": [*tiny, *settings(drafter_notice=NOTICE, block_size=2)],
            "records": [*tiny, *settings(record__directory=recording)],
            "goes on": [*tiny, *settings(record__directory=at_rest)],
            "beside a server": [*tiny, *settings(record__directory=held)],
            "records nowhere": [*tiny, *settings(record__directory="/proc/nothing/here")],
            "records elsewhere": [*tiny, *settings(record__directory=scratch / "full")],
            "long": [*tiny, *settings(target=write_target(scratch / "long", max_position_embeddings=10**6))],
            "refused": [*tiny, *settings(server_args__enable_lora="true")],
            "another device": [*tiny, "--device-memory", "24GB"],
            "no check": [*(flag for flag in tiny if flag != "--check"), "--device-memory", "24GB"],
            "no drafter": [*tiny, *settings(drafter=scratch / "nothing")],
        }
    )
    server.stop()
    return checks


@pytest.fixture(scope="module")
def without_a_device(scratch: Path) -> Checks:
    target = write(scratch / "t", TARGET)
    (target / INDEX).write_text(json.dumps({"metadata": {"total_size": TARGET_WEIGHTS}, "weight_map": {}}))
    models = settings(target=target, drafter=write(scratch / "d", DRAFTER))
    large = ["--profile", "qwen3-8b", "--check", *models]
    return Checks(
        {
            "80": [*large, "--device-memory", "80GiB"],
            "plain": [*large, "--device-memory", "80GiB", "--plain"],
            "48, as in the documentation": [*large, "--device-memory", "48GiB"],
            "24": [*large, "--device-memory", "24GiB"],
            "too small": [*large, "--device-memory", "16GiB"],
            "refused": [*large, "--device-memory", "80GiB", *settings(server_args__speculative_adaptive="true")],
            "no size": [*large, "--device-memory", "large"],
        }
    )


def test_the_pool_is_what_the_platform_itself_plans(
    on_a_cpu: Checks, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    paths = SimpleNamespace(
        model_path=str(scratch / "target"), speculative_draft_model_path=str(scratch / "drafter"), context_length=None
    )
    found = on_a_cpu["as it is"]
    assert found.code == 0
    tokens = int(found["memory", "KV pool, tokens"])
    assert tokens == plan_pool(paths)
    assert found["argument", "max_total_tokens"] == str(tokens)
    sizes = [ModelSize.of(scratch / name) for name in ("target", "drafter")]
    kv = [f"{size.kv_per_token / 1024:.1f} KiB" for size in sizes]
    assert [found["memory", f"KV of a token, {name}"] for name in ("target", "drafter")] == kv
    assert tokens == (FREE - RESERVED - 2 * sum(size.weights for size in sizes)) // sum(s.kv_per_token for s in sizes)
    assert found["requests", "of 2048 tokens"] == "none: a context has 512"


def test_what_is_drafted_is_said(on_a_cpu: Checks) -> None:
    assert on_a_cpu["as it is"]["drafts", "verifies"].startswith("a tree of up to 7 drafted tokens")
    assert on_a_cpu["as it is"]["drafts", "draft vocabulary"] == "all 64 tokens"
    assert on_a_cpu["fixed tree"]["drafts", "verifies"] == "a tree of 3 drafted tokens"
    assert on_a_cpu["plain"]["drafts", "drafter"] == "none (plain decoding)"
    assert ("memory", "KV of a token, drafter") not in on_a_cpu["plain"].lines


def test_what_auf_and_the_platform_decide_is_shown(on_a_cpu: Checks) -> None:
    found = on_a_cpu["as it is"]
    assert found["argument", "min_free_slots_delay"] == "1", "AUF: a request may take the only free place"
    assert found["argument", "sleep_on_idle"] == "True", "the platform"


def test_a_warning_is_said_once_and_the_plan_ends_with_the_result(on_a_cpu: Checks) -> None:
    warned = on_a_cpu["warned"]
    assert (warned.said.count(NOTICE), warned.said.count("trained with blocks of 4")) == (1, 1)
    assert (on_a_cpu.log.count(NOTICE), on_a_cpu.log.count("trained with blocks of 4")) == (0, 0)
    assert "Applied" not in on_a_cpu.log, "SGLang's line for each hook"
    assert warned.said.splitlines()[-1].split() == ["result", "server", "would", "start"]


def test_a_key_is_not_shown(on_a_cpu: Checks) -> None:
    assert on_a_cpu["as it is"]["argument", "api_key"] == "(given)"
    assert KEY not in on_a_cpu.log
    assert not [how for how in on_a_cpu["as it is"].lines.values() if KEY in how]


def test_a_recording_is_looked_at_and_not_begun(on_a_cpu: Checks, scratch: Path) -> None:
    assert on_a_cpu["records"]["records", "directory"] == f"{scratch / 'recording'} (made at the start)"
    assert not (scratch / "recording").exists()
    assert on_a_cpu["goes on"]["records", "directory"] == f"{scratch / 'at-rest'} (goes on)"


def test_a_recording_of_a_running_server_is_no_error(on_a_cpu: Checks, scratch: Path) -> None:
    assert on_a_cpu["beside a server"].code == 0
    assert "held by a running server" in on_a_cpu["beside a server"]["records", "directory"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("long", "KV of one context of 1000000 tokens"),
        ("refused", "--enable-lora"),
        ("another device", "leave out --device-memory"),
        ("no check", "--device-memory without --check"),
        ("no drafter", "no directory"),
        ("records elsewhere", "is no recording"),
        ("records nowhere", "/proc/nothing/here cannot be written"),
    ],
)
def test_what_would_not_start_is_said_as_the_start_says_it(on_a_cpu: Checks, name: str, said: str) -> None:
    assert (on_a_cpu[name].code, on_a_cpu[name].lines) == (2, {})
    assert said in on_a_cpu.log


def test_a_cuda_profile_is_planned_without_a_device(without_a_device: Checks, scratch: Path) -> None:
    found = without_a_device["80"]
    assert found.code == 0
    assert found["memory", "KV of a token, target"] == "144.0 KiB"
    assert found["memory", "KV of a token, drafter"] == "20.0 KiB"
    share = float(found["argument", "mem_fraction_static"])
    assert 0.7 < share < 0.9, "SGLang's own rule, as on a simulated H100 (test_cuda_arguments.py)"
    drafter = (scratch / "d" / "model.safetensors").stat().st_size
    left = int(share * 80 * GIB) - TARGET_WEIGHTS - drafter
    tokens = left // (164 * 1024)
    assert found["memory", "KV pool, tokens"] == str(tokens)
    assert found["requests", "of 8192 tokens"] == f"{tokens // 8192} (at most 48 run at once)"
    assert found["drafts", "verifies"] == "a chain of 16 tokens, 15 of them drafted"
    assert "estimate" in found["note", "memory"]
    assert "planned for a device of that size" in found["note", "device"]
    assert "no CUDA device" not in found["note", "device"], "there may be one, of another size"
    assert found["result", "server"].startswith("would start on such a device")
    assert ("argument", "attention_backend") not in found.lines, "the kind of the device decides"


def test_without_a_bound_of_requests_none_is_said(without_a_device: Checks) -> None:
    """SGLang sets one for servers that speculate, and for others where it has seen the device."""
    found = without_a_device["plain"]
    assert ("argument", "max_running_requests") not in found.lines
    assert found["requests", "of 8192 tokens"] == str(int(found["memory", "KV pool, tokens"]) // 8192)


def test_a_pool_without_room_for_a_request_is_warned_of(without_a_device: Checks) -> None:
    small = without_a_device["24"]
    assert small.code == 0, "SGLang would start"
    assert 0 < int(small["memory", "KV pool, tokens"]) < 2048
    assert small["warning", "memory"].startswith("no request of 2048 tokens fits")
    for name in ("80", "48, as in the documentation"):
        assert int(without_a_device[name]["memory", "KV pool, tokens"]) > 32768
        assert ("warning", "memory") not in without_a_device[name].lines


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too small", "GiB of the device for weights and KV"),
        ("refused", "--speculative-adaptive"),
        ("no size", "--device-memory 'large'"),
    ],
)
def test_a_plan_that_does_not_work_out_is_an_error(without_a_device: Checks, name: str, said: str) -> None:
    assert (without_a_device[name].code, without_a_device[name].lines) == (2, {})
    assert said in without_a_device.log
