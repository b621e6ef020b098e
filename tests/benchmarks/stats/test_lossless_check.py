from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main

Start = Callable[..., Any]


@pytest.fixture
def record_run(data_dir: Path, tmp_path: Path) -> Callable[..., str]:
    def record(server: Any, name: str, *more: str) -> str:
        out = tmp_path / name
        flags = ["--tasks", "gsm8k,mt_bench", "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
        assert main(["run", "--base-url", server.url, "--out", str(out), *flags, *more]) == 0
        return str(out)

    return record


def counts(run: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path(run) / "lossless.json").read_text())
    return {name: result[name] for name in ("identical", "near_tie", "fault", "follow_up", "missing")}


def test_equal_runs_pass_without_a_server(fake: Start, record_run: Callable[..., str]) -> None:
    auf = record_run(fake(), "auf", "--concurrency", "3")
    plain = record_run(fake(speculative=False), "plain", "--plain")
    assert main(["lossless", auf, plain]) == 0
    assert counts(auf) == {"identical": 18, "near_tie": 0, "fault": 0, "follow_up": 0, "missing": 0}


def cut_short(run: str) -> None:
    """As a kill leaves it: every conversation has its first turn, and the second ones are missing."""
    path = Path(run) / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["turn"] == 0))


def test_runs_that_were_killed_do_not_pass(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    auf = record_run(fake(), "auf")
    plain = record_run(fake(speculative=False), "plain", "--plain")
    cut_short(auf)
    assert main(["lossless", auf, plain]) == 2
    assert f"{auf} with 12 of 18 requests" in capsys.readouterr().err
    cut_short(plain)
    assert main(["lossless", auf, plain]) == 2
    assert main(["report", auf]) == 2
    assert capsys.readouterr().err.count("12 of 18 requests") == 2


@pytest.mark.parametrize(
    ("device", "gap", "code", "near_tie", "fault"),
    [("cuda", 0.125, 0, 1, 0), ("cuda", 0.5, 1, 0, 1), ("cpu", 0.125, 1, 1, 0)],
)
def test_a_fork_is_judged_by_the_plain_servers_logits(
    fake: Start,
    record_run: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    device: str,
    gap: float,
    code: int,
    near_tie: int,
    fault: int,
) -> None:
    auf = record_run(fake(forked="first 4", device=device), "auf")
    baseline = fake(speculative=False, gap=gap, device=device)
    plain = record_run(baseline, "plain", "--plain")
    assert main(["lossless", auf, plain, "--base-url", baseline.url]) == code
    assert counts(auf) == {"identical": 16, "near_tie": near_tie, "fault": fault, "follow_up": 1, "missing": 0}
    (asked,) = baseline.engine.generated
    messages = [{"role": "user", "content": "first 4"}]
    answer = baseline.engine.tokens(messages, 32)
    assert asked["input_ids"] == list(json.dumps(messages).encode()) + answer[:3]
    assert asked["token_ids_logprob"] == [answer[3] + 1000, answer[3]]
    assert "m/4" in capsys.readouterr().out


def test_a_fork_without_a_server_to_ask(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    auf = record_run(fake(forked="sum 1"), "auf")
    plain = record_run(fake(speculative=False), "plain", "--plain")
    assert main(["lossless", auf, plain]) == 2
    assert "--base-url" in capsys.readouterr().err


def test_the_speculating_server_cannot_be_the_judge(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(forked="sum 1")
    auf = record_run(server, "auf")
    plain = record_run(fake(speculative=False), "plain", "--plain")
    assert main(["lossless", auf, plain, "--base-url", server.url]) == 2
    assert "plain decoding of" in capsys.readouterr().err


def test_runs_in_the_wrong_order(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    auf = record_run(fake(), "auf")
    plain = record_run(fake(speculative=False), "plain", "--plain")
    assert main(["lossless", plain, auf]) == 2
    assert "speculating run first" in capsys.readouterr().err


def test_runs_of_different_settings(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    auf = record_run(fake(), "auf")
    plain = record_run(fake(speculative=False), "plain", "--plain", "--max-tokens", "16")
    assert main(["lossless", auf, plain]) == 2
    assert "max_tokens: 32 and 16" in capsys.readouterr().err


def test_sampled_runs_are_not_compared(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    auf = record_run(fake(), "auf", "--temperature", "1")
    plain = record_run(fake(speculative=False), "plain", "--plain", "--temperature", "1")
    assert main(["lossless", auf, plain]) == 2
    assert "greedy" in capsys.readouterr().err


def test_a_server_without_token_ids(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    auf = record_run(fake(answers_ids=False), "auf")
    plain = record_run(fake(speculative=False), "plain", "--plain")
    assert main(["lossless", auf, plain]) == 2
    assert "without token ids" in capsys.readouterr().err


def test_another_server_is_no_baseline_of_losslessness(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    auf = record_run(fake(), "auf")
    plain = record_run(fake(sglang=False), "plain", "--plain")
    assert main(["lossless", auf, plain]) == 2
    assert "a plain run of a server that is neither SGLang nor vLLM" in capsys.readouterr().err


def test_two_runs_of_vllm_are_compared_by_their_tokens(
    fake: Start, record_run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    speculating = record_run(fake(sglang=False, vllm=True), "speculating")
    plain = record_run(fake(sglang=False, vllm=True, speculative=False), "plain", "--plain")
    assert main(["lossless", speculating, plain]) == 0
    other = record_run(fake(sglang=False, vllm=True, speculative=False, forked="sum 3"), "other", "--plain")
    assert main(["lossless", speculating, other]) == 2
    assert "that differ at token 3, and no server to ask" in capsys.readouterr().err


def test_a_directory_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lossless", str(tmp_path), str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err
