"""A sweep over concurrencies of two fake servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main

Start = Callable[..., Any]


def flags(url: str, out: Path, data_dir: Path, *more: str) -> list[str]:
    common = ["--tasks", "gsm8k", "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
    return ["sweep", "--base-url", url, "--out", str(out), *common, *more]


def test_every_level_is_asked_of_both_servers(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auf, plain, out = fake(delay_s=0.02), fake(speculative=False, delay_s=0.02), tmp_path / "sweep"
    assert main(flags(auf.url, out, data_dir, "--plain-url", plain.url, "--concurrency", "1,3")) == 0
    for server in (auf, plain):
        assert set(server.asked().values()) == {2}
        assert server.engine.most_in_flight == 3
        assert server.engine.flushed == 2
    levels = json.loads((out / "sweep.json").read_text())["levels"]
    assert [level["concurrency"] for level in levels] == [1, 3]
    for level in levels:
        speeds = [level[name]["throughput"]["tokens_per_s"] for name in ("auf", "plain")]
        assert level["speedup"] == pytest.approx(speeds[0] / speeds[1])
        assert level["plain"]["macro"]["tau"] is None
        assert level["auf"]["macro"]["tau"] > 1
        for name in ("ttft", "itl", "latency"):
            seconds = level["auf"]["latency"][name]
            assert 0 < seconds["p50"] <= seconds["p90"] <= seconds["p99"]
    table = capsys.readouterr().out
    assert "| 3 | 6 |" in table


def test_a_sweep_of_vllm_is_named_so(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server, plain = (fake(sglang=False, vllm=True, speculative=speculative) for speculative in (True, False))
    out = tmp_path / "sweep"
    assert main(flags(server.url, out, data_dir, "--plain-url", plain.url, "--concurrency", "1,2")) == 0
    assert server.engine.flushed == plain.engine.flushed == 2
    text = (out / "sweep.md").read_text()
    assert "toy (vLLM 0.32.0, block 4)" in text and "| vLLM tokens/s |" in text and "AUF" not in text


def test_a_finished_level_is_not_asked_again(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server, out = fake(), tmp_path / "sweep"
    main(flags(server.url, out, data_dir, "--concurrency", "1"))
    assert main(flags(server.url, out, data_dir, "--concurrency", "1,2")) == 0
    assert set(server.asked().values()) == {2}
    levels = json.loads((out / "sweep.json").read_text())["levels"]
    assert [level["plain"] for level in levels] == [None, None]


def test_a_level_that_was_finished_later_says_so(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server, out = fake(), tmp_path / "sweep"
    main(flags(server.url, out, data_dir, "--concurrency", "1,2"))
    assert "sessions" not in (out / "sweep.md").read_text()
    records = out / "auf-c2" / "records.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:4]))
    assert main(flags(server.url, out, data_dir, "--concurrency", "1,2")) == 0
    said = "Finished in several sessions, at whose ends fewer requests were in flight"
    assert f"{said}: AUF at 2 (2).\n" in (out / "sweep.md").read_text()
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert f"{said}: sweep/auf-c2 (2)." in (tmp_path / "report" / "report.md").read_text()


def test_levels_of_other_versions_are_not_mixed(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(), tmp_path / "sweep"
    main(flags(server.url, out, data_dir, "--concurrency", "1"))
    manifest = out / "auf-c1" / "run.json"
    content = json.loads(manifest.read_text())
    content["sessions"][0]["versions"]["sglang"] = "0.0.1"
    manifest.write_text(json.dumps(content))
    assert main(flags(server.url, out, data_dir, "--concurrency", "1,2")) == 2
    assert "other versions" in capsys.readouterr().err


def test_levels_with_other_blocks_are_not_mixed(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server of vLLM tells its number of drafts only in its replies."""
    out = tmp_path / "sweep"
    assert main(flags(fake(sglang=False, vllm=True).url, out, data_dir, "--concurrency", "1")) == 0
    other = fake(sglang=False, vllm=True, block=5)
    assert main(flags(other.url, out, data_dir, "--concurrency", "1,2")) == 2
    assert "with blocks of [4, 5]" in capsys.readouterr().err


@pytest.mark.parametrize("vllm_plain", [True, False])
def test_no_speed_up_is_told_of_two_engines(
    vllm_plain: bool, fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speculating = fake(sglang=vllm_plain, vllm=not vllm_plain)
    plain = fake(sglang=not vllm_plain, vllm=vllm_plain, speculative=False)
    more = ("--plain-url", plain.url, "--concurrency", "1")
    assert main(flags(speculating.url, tmp_path / "sweep", data_dir, *more)) == 2
    assert "and vLLM 0.32.0" in capsys.readouterr().err


def test_more_in_flight_than_there_are_prompts_is_refused(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake()
    assert main(flags(server.url, tmp_path / "sweep", data_dir, "--concurrency", "1,8")) == 2
    assert "6 prompts and concurrency 8" in capsys.readouterr().err
    assert not server.asked()
