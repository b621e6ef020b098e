from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.cli import main
from benchmarks.serving.compare import CompareConfig, mode_of

ROOT = Path(__file__).resolve().parents[3]


pytestmark = pytest.mark.usefixtures("fake_server_program")


def compare(*flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["compare", "--profile", "toy", "--tasks", "sample", "--max-tokens", "32", "--out", "out", *flags])
    summary: dict[str, Any] = json.loads(Path("out/summary.json").read_text())
    return code, summary


@pytest.mark.parametrize(
    ("profile", "settings", "asked", "mode"),
    [
        ("smollm2-135m", [], None, "interleaved"),
        ("qwen3-8b", [], None, "sequential"),
        ("qwen3-8b", ["device=cpu"], None, "interleaved"),
        ("smollm2-135m", ["device=cuda", "env.A=1"], None, "sequential"),
        ("qwen3-8b", [], "interleaved", "interleaved"),
        ("unknown", [], None, "interleaved"),
    ],
)
def test_on_a_gpu_one_server_is_up_at_a_time(profile: str, settings: list[str], asked: str | None, mode: str) -> None:
    assert mode_of(CompareConfig.model_validate({"profile": profile, "set": settings, "mode": asked})) == mode


def test_the_mode_is_that_of_the_profile_that_a_file_extends(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: qwen3-8b\nport: 4000\n")
    assert mode_of(CompareConfig(profile=str(tmp_path / "mine.yaml"))) == "sequential"


@pytest.mark.usefixtures("no_child_left")
@pytest.mark.parametrize("mode", ["interleaved", "sequential"])
def test_both_servers_answer_the_same_prompts_and_the_summary_has_it_all(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, summary = compare("--mode", mode, "--concurrency", "2", "--rounds", "3")
    assert code == 0
    assert (summary["target"], summary["drafter"], summary["block_size"]) == ("toy", "/drafters/toy", 4)
    assert len(summary["tasks"]) == 6
    for task in summary["tasks"].values():
        assert task["prompts"] == 4
        assert 1 <= task["tau"] <= task["tau_verify"] <= 4
        assert len(task["alpha"]) == 3
    assert summary["tasks"]["sample_mt_bench"]["requests"] == 8
    assert summary["plain"]["completion_tokens"] == summary["auf"]["completion_tokens"] > 28
    assert summary["speedup"] == pytest.approx(summary["auf"]["tokens_per_s"] / summary["plain"]["tokens_per_s"])
    assert len(summary["rounds"]) == (3 if mode == "interleaved" else 1)
    lossless = summary["lossless"]
    assert (lossless["identical"], lossless["near_tie"], lossless["fault"]) == (28, 0, 0)
    assert summary["macro"]["tau"] > 1
    assert summary["micro"]["tau"] > 1
    assert {"versions", "machine", "command"} <= set(summary)
    table = capsys.readouterr().out
    assert f"{summary['speedup']:.2f}" in table
    assert "28 identical, 0 near-tie, 0 fault" in table


def test_a_changed_answer_is_a_fault_and_an_exit_code() -> None:
    code, summary = compare("--set", "fork=lighthouse")
    assert code == 1
    assert summary["lossless"]["fault"] == 1
    assert summary["lossless"]["differences"][0]["prompt_id"] == "alpaca/lighthouse"


def test_the_near_tie_bar_follows_the_size_of_logits(capsys: pytest.CaptureFixture[str]) -> None:
    """The fake server's fork is 9 logits wide."""
    _, summary = compare("--set", "fork=lighthouse", "--limit", "4", "--logit-scale", "600")
    assert (summary["lossless"]["near_tie"], summary["lossless"]["near_tie_bar"]) == (0, 8.0)
    _, summary = compare("--set", "fork=lighthouse", "--limit", "4", "--logit-scale", "1100")
    assert (summary["lossless"]["near_tie"], summary["lossless"]["near_tie_bar"]) == (1, 16.0)
    lossless = summary["lossless"]
    assert f"{lossless['compared_tokens']} of {lossless['tokens']} tokens compared" in capsys.readouterr().out
    assert lossless["compared_tokens"] < lossless["tokens"] == summary["plain"]["completion_tokens"]


def test_a_users_own_prompts_are_asked_of_both_and_a_broken_row_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.jsonl").write_text('{"prompt": "a"}\n{"turns": ["b", "c"]}\n?\n')
    flags = ["--prompts", "mine.jsonl", "--max-tokens", "32", "--out", "out"]
    assert main(["compare", "--profile", "toy", *flags]) == 1
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["tasks"]["mine.jsonl"]["requests"] == summary["lossless"]["identical"] == 3
    assert summary["broken_rows"] == ["mine.jsonl:3: broken JSON"]
    assert "- mine.jsonl:3: broken JSON" in capsys.readouterr().out


def test_sampled_answers_have_no_losslessness() -> None:
    code, summary = compare("--temperature", "1", "--limit", "1")
    assert code == 0
    assert summary["lossless"] is None


def test_a_second_comparison_replaces_the_first() -> None:
    compare("--limit", "2")
    code, summary = compare("--limit", "1")
    assert code == 0
    assert summary["auf"]["requests"] == 7


def test_a_server_that_does_not_start_ends_the_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--profile", "broken", "--tasks", "sample", "--out", "out"]) == 2
    assert "the drafter does not fit the target" in capsys.readouterr().err
    assert not Path("out/summary.json").exists()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture
def comparison(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A comparison under way as a program of its own, and its servers with their children."""
    arguments = ["compare", "--profile", "toy", "--tasks", "sample", "--out", "out", "--rounds", "400"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], env=environment, cwd=tmp_path)
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 300
        while len(started) < 4:  # two servers, each with a child
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            started = family(process)
        yield process, started
    finally:
        for one in [process, *started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def test_sigterm_leaves_no_process_behind(
    comparison: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    process, started = comparison
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(started, timeout=60)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_servers_do_not_outlive_a_benchmark_that_was_killed_outright(
    comparison: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    process, started = comparison
    servers = [one for one in started if one.ppid() == process.pid]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(servers, timeout=60)
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []
