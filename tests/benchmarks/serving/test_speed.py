from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.harness.records import read_records
from benchmarks.harness.server_info import ServerFacts, flush_cache
from benchmarks.harness.servers import profile_content
from benchmarks.serving.speed import SpeedReport, dflash_program
from sglang_auf.errors import ServerError

pytestmark = pytest.mark.usefixtures("fake_server_program")


def speed(*flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["speed", "--profile", "smollm2-135m", "--max-tokens", "32", "--out", "out", *flags])
    report: dict[str, Any] = json.loads(Path("out/speed.json").read_text())
    return code, report


@pytest.mark.usefixtures("no_child_left")
def test_three_servers_are_asked_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = speed("--rounds", "3", "--concurrency", "1,4,10")
    assert code == 0
    assert [level["concurrency"] for level in report["levels"]] == [1, 4, 10]
    assert [level["prompts"] for level in report["levels"]] == [8, 8, 10]
    assert report["servers"]["dflash"]["algorithm"] == "DFLASH"
    assert report["servers"]["plain"]["algorithm"] is None
    for level in report["levels"]:
        rounds, prompts = level["rounds"], level["prompts"]
        assert {name: len(values) for name, values in rounds.items()} == {"auf": 3, "plain": 3, "dflash": 3}
        assert level["tokens_per_s"] == {name: sorted(values)[1] for name, values in rounds.items()}
        ratios = sorted(ours / theirs for ours, theirs in zip(rounds["auf"], rounds["plain"], strict=True))
        assert level["auf_over_plain"] == pytest.approx(ratios[1])
        same = {"compared": 3 * prompts, "same_tokens": 3 * prompts, "same_histogram": 3 * prompts}
        assert level["auf_and_dflash"] == same
        assert level["auf_and_plain"] == same | {"same_histogram": 0}
        assert level["tau"]["auf"] == level["tau"]["dflash"] > 1
        assert level["tau"]["plain"] is None
    assert report["step_cost"] is not None
    table = Path("out/speed.md").read_text()
    assert table in capsys.readouterr().out
    assert "the tokens of DFLASH in 24 of 24 answers" in table


def test_who_goes_first_changes_with_the_round() -> None:
    speed("--rounds", "2", "--concurrency", "4")
    began = {
        (number, name): read_records(Path(f"out/{name}/c4-round{number}-answers/records.jsonl"))[0].started_at
        for number in (1, 2)
        for name in ("auf", "plain", "dflash")
    }
    first, second = ([name for n, name in sorted(began, key=began.__getitem__) if n == number] for number in (1, 2))
    assert first == ["auf", "plain", "dflash"]
    assert second == ["plain", "dflash", "auf"]


def test_another_answer_than_the_built_in_algorithms_shows() -> None:
    """And an answer that is not plain decoding's is none on a CPU, which promises them equal."""
    code, report = speed("--rounds", "1", "--concurrency", "24", "--limit", "24", "--set", "fork=lighthouse")
    assert code == 1
    (level,) = report["levels"]
    assert level["auf_and_dflash"]["same_tokens"] == level["auf_and_plain"]["same_tokens"] == 23
    assert report["step_cost"] is None
    on_gpu = SpeedReport.model_validate_json(Path("out/speed.json").read_bytes())
    on_gpu.servers["auf"] = on_gpu.servers["auf"].model_copy(update={"device": "cuda"})
    assert on_gpu.passed, "rounding may change an answer there"


def test_an_answer_that_ends_for_another_reason_is_another_answer() -> None:
    code, report = speed("--rounds", "1", "--concurrency", "24", "--limit", "24", "--set", "cut=lighthouse")
    assert code == 1
    assert report["levels"][0]["auf_and_plain"]["same_tokens"] == 23


def test_all_servers_get_the_small_pool_and_the_settings() -> None:
    flags = ["--set", "server_args.log_level=debug", "--set", "env.TOLD_ALL=of-it"]
    speed("--rounds", "1", "--concurrency", "2", "--pool-tokens", "999", *flags)
    logs = {name: Path(f"out/{name}-server.log").read_text() for name in ("auf", "plain", "dflash")}
    for name in ("auf", "plain"):
        assert "server_args.max_total_tokens=999 server_args.log_level=debug" in logs[name]
    assert "--max-total-tokens 999 --log-level debug" in logs["dflash"]
    assert all("TOLD_ALL=of-it" in log for log in logs.values())


def test_more_in_flight_than_there_are_prompts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--profile", "toy", "--concurrency", "1,25", "--out", "out"]) == 2
    assert "24 prompts and concurrency 25" in capsys.readouterr().err


FACTS = ServerFacts(
    target="/t", model="m", drafter="/d", algorithm="AUF", block_size=8, device="cpu", dtype="bfloat16", sglang="x",
    overlap=False,
)  # fmt: skip


def test_the_built_in_server_has_the_models_of_the_other() -> None:
    settings = ["block_size=8", "server_args.disable_radix_cache=true", "server_args.enable_metrics=false"]
    program = " ".join(dflash_program(FACTS, profile_content("smollm2-135m", settings)))
    assert program.startswith("-m sglang.launch_server --model-path /t --device cpu --dtype bfloat16")
    assert "--speculative-algorithm DFLASH --speculative-draft-model-path /d" in program
    assert "--speculative-num-draft-tokens 8 --disable-radix-cache --disable-overlap-schedule" in program
    assert "metrics" not in program
    assert "chat-template" not in program


def test_the_built_in_server_has_the_profiles_arguments_thinking_and_overlap() -> None:
    settings = ["server_args.tp_size=2", "server_args.disable_overlap_schedule=true"]
    profile = profile_content("qwen3-8b", settings)
    program = dflash_program(FACTS.model_copy(update={"device": "cuda", "overlap": True, "revision": "abc"}), profile)
    assert "--sampling-backend auf --enable-metrics --tp-size 2" in " ".join(program)
    assert "--revision abc" in " ".join(program)
    assert program[program.index("--default-chat-template-kwargs") + 1] == '{"enable_thinking": false}'
    assert "--disable-overlap-schedule" not in program, "it is what the running server has"
    asked = profile_content("qwen3-8b", ["thinking=on"])
    assert '{"enable_thinking": true}' in dflash_program(FACTS, asked)


def test_a_cache_that_cannot_be_flushed_is_an_error(fake: Callable[..., Any]) -> None:
    server = fake()
    flush_cache(server.url)
    assert server.engine.flushed == 1
    server.engine.in_flight = 1
    with pytest.raises(ServerError, match="flush_cache"):
        flush_cache(server.url)
