from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.harness.records import Record, latest, read_records

ROOT = Path(__file__).resolve().parents[3]
Start = Callable[..., Any]


def flags(url: str, out: Path, data_dir: Path, *more: str) -> list[str]:
    common = ["--tasks", "gsm8k,mt_bench", "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
    return ["run", "--base-url", url, "--out", str(out), *common, *more]


def records_of(out: Path) -> dict[tuple[str, str, int], Record]:
    return {record.key: record for record in latest(read_records(out / "records.jsonl"))}


def test_a_run_asks_everything_once_and_reports_it(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(), tmp_path / "run"
    assert main(flags(server.url, out, data_dir)) == 0
    assert len(server.asked()) == 18
    assert set(server.asked().values()) == {1}
    records = records_of(out)
    assert len(records) == 18
    for record in records.values():
        assert record.output_ids is not None
        assert record.completion_tokens == len(record.output_ids)
        assert sum(record.accepted_histogram) == record.verify_steps > 0
        assert record.ttft_s is not None
        assert 0 < record.ttft_s <= record.latency_s
        assert record.block_size == 4
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tasks"]["mt_bench"]["prompts"] == 6
    assert summary["tasks"]["mt_bench"]["requests"] == 12
    emitted = sum(record.completion_tokens - 1 for record in records.values())
    assert summary["micro"]["tau"] == pytest.approx(emitted / sum(r.verify_steps for r in records.values()))
    table = capsys.readouterr().out
    assert f"macro {summary['macro']['tau']:.2f}" in table
    assert "tokens/s" in table


def test_run_json_says_what_was_asked_of_whom(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server, out = fake(), tmp_path / "run"
    main(flags(server.url, out, data_dir, "--concurrency", "2"))
    run = json.loads((out / "run.json").read_text())
    assert run["config"]["concurrency"] == 2
    assert run["server"]["drafter"] == "/drafters/toy"
    assert run["tasks"]["gsm8k"]["prompts"] == 6
    assert len(run["tasks"]["gsm8k"]["sha256"]) == 64
    assert run["sessions"][0]["versions"]["openai"]
    assert run["sessions"][0]["machine"]["cores"] >= 1
    assert run["sessions"][0]["command"]


def test_the_second_turn_follows_the_models_own_first_answer(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server, out = fake(), tmp_path / "run"
    main(flags(server.url, out, data_dir, "--concurrency", "3"))
    records = records_of(out)
    second = [body["messages"] for body in server.engine.requests if len(body["messages"]) == 3]
    assert len(second) == 6
    for messages in second:
        number = messages[0]["content"].removeprefix("first ")
        first_answer = records["mt_bench", f"m/{number}", 0].output_text
        assert messages[1] == {"role": "assistant", "content": first_answer}
        assert messages[2] == {"role": "user", "content": f"second {number}"}


def test_concurrency_is_reached_and_not_exceeded(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server = fake(delay_s=0.05)
    main(flags(server.url, tmp_path / "run", data_dir, "--concurrency", "4", "--no-stream"))
    assert server.engine.most_in_flight == 4


def test_answers_do_not_depend_on_concurrency(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server = fake()
    for name, concurrency in (("one", "1"), ("five", "5")):
        main(flags(server.url, tmp_path / name, data_dir, "--concurrency", concurrency, "--temperature", "1"))
    one, five = records_of(tmp_path / "one"), records_of(tmp_path / "five")
    assert {key: (r.seed, r.output_ids) for key, r in one.items()} == {
        key: (r.seed, r.output_ids) for key, r in five.items()
    }
    assert len({record.seed for record in one.values()}) == 18


def test_seeds_follow_the_seed_and_stay_when_filters_change(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server = fake()
    for name, more in (("a", ["--seed", "1"]), ("b", ["--seed", "2"]), ("c", ["--seed", "1", "--tasks", "mt_bench"])):
        main(flags(server.url, tmp_path / name, data_dir, "--temperature", "1", *more))
    a, b, c = (records_of(tmp_path / name) for name in "abc")
    assert all(a[key].seed != b[key].seed for key in a)
    assert {key: a[key].seed for key in c} == {key: record.seed for key, record in c.items()}


def test_greedy_requests_carry_no_seed(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server = fake()
    main(flags(server.url, tmp_path / "run", data_dir))
    assert all("seed" not in body for body in server.engine.requests)


def test_a_killed_run_is_continued_where_it_stopped(
    fake: Start, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, out = fake(delay_s=0.1), tmp_path / "run"
    arguments = flags(server.url, out, data_dir, "--concurrency", "2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], env=environment, cwd=tmp_path)
    records = out / "records.jsonl"
    deadline = time.monotonic() + 300
    while not (records.exists() and records.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = records_of(out)
    assert 5 <= len(kept) < 18
    with records.open("ab") as file:
        file.write(b'{"task": "gsm8k", "prom')
    server.engine.delay_s = 0.0
    asked_before = server.asked()
    assert main([*arguments, "--resume"]) == 0
    assert "torn" in caplog.text
    after = records_of(out)
    assert len(after) == 18
    assert all(after[key] == record for key, record in kept.items())
    for record in kept.values():
        text = f"sum {record.prompt_id[2:]}" if record.task == "gsm8k" else None
        if text is not None:
            assert server.asked()[text] == asked_before[text]
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 2


def test_a_finished_run_resumed_asks_nothing(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server, out = fake(), tmp_path / "run"
    main(flags(server.url, out, data_dir))
    asked = len(server.engine.requests)
    assert main(flags(server.url, out, data_dir, "--resume")) == 0
    assert len(server.engine.requests) == asked
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 1


def test_resuming_with_other_settings_is_refused(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(), tmp_path / "run"
    main(flags(server.url, out, data_dir))
    before = (out / "records.jsonl").read_bytes()
    assert main(flags(server.url, out, data_dir, "--resume", "--max-tokens", "16")) == 2
    assert "max_tokens = 16" in capsys.readouterr().err
    (data_dir / "gsm8k.jsonl").write_text('{"id": "other", "turns": ["x"]}\n' * 1 + "".join(
        f'{{"id": "o/{i}", "turns": ["x"]}}\n' for i in range(5)
    ))  # fmt: skip
    assert main(flags(server.url, out, data_dir, "--resume")) == 2
    assert "gsm8k.prompts" in capsys.readouterr().err
    assert (out / "records.jsonl").read_bytes() == before


def test_a_run_of_an_earlier_version_is_resumed_by_what_it_said(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server, out = fake(), tmp_path / "out"
    assert main(flags(server.url, out, data_dir)) == 0
    file = out / "run.json"
    begun = json.loads(file.read_text())
    del begun["config"]["empty_cache"]
    for name in ("overlap", "tree", "tree_nodes", "draft_vocabulary", "weights", "swaps"):
        del begun["server"][name]
    file.write_text(json.dumps(begun))
    assert main(flags(server.url, out, data_dir, "--resume", "--empty-cache")) == 0
    assert main(flags(server.url, out, data_dir, "--resume", "--max-tokens", "16")) == 2


def test_a_resumed_run_may_find_the_server_elsewhere(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(flags(fake().url, out, data_dir))
    assert main(flags(fake().url, out, data_dir, "--resume")) == 0


def test_an_existing_run_is_not_overwritten(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(), tmp_path / "run"
    main(flags(server.url, out, data_dir))
    assert main(flags(server.url, out, data_dir)) == 2
    assert "--resume" in capsys.readouterr().err


def test_failed_requests_are_recorded_counted_and_asked_again(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "gsm8k.jsonl").write_text(
        "".join(f'{{"id": "g/{i}", "turns": ["{"FAIL" if i == 2 else "sum"} {i}"]}}\n' for i in range(6))
    )
    server, out = fake(), tmp_path / "run"
    assert main(flags(server.url, out, data_dir)) == 1
    failed = [record for record in records_of(out).values() if record.failed]
    assert [record.prompt_id for record in failed] == ["g/2"]
    assert failed[0].error is not None
    assert "on fire" in failed[0].error
    assert server.asked()["FAIL 2"] == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tasks"]["gsm8k"]["failed"] == 1
    assert main(flags(server.url, out, data_dir, "--resume")) == 1
    assert server.asked()["FAIL 2"] == 2
    assert server.asked()["sum 1"] == 1


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("broken", ["PAGE", "BROKEN"])
def test_a_reply_that_is_no_json_is_a_failed_request(
    stream: str, broken: str, fake: Start, data_dir: Path, tmp_path: Path
) -> None:
    """The others are asked all the same."""
    (data_dir / "gsm8k.jsonl").write_text(
        "".join(f'{{"id": "g/{i}", "turns": ["{broken if i == 2 else "sum"} {i}"]}}\n' for i in range(6))
    )
    assert main(flags(fake().url, tmp_path / "run", data_dir, stream)) == 1
    records = records_of(tmp_path / "run")
    assert len(records) == 18
    assert [record.prompt_id for record in records.values() if record.failed] == ["g/2"]


def test_a_request_that_is_no_json_is_a_failed_request(fake: Start, tmp_path: Path) -> None:
    rows = ['{"prompt": "a", "chat_template_kwargs": {"budget": 1e999}}', '{"prompt": "b"}']
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    out = tmp_path / "run"
    assert main(["run", "--base-url", fake().url, "--prompts", str(tmp_path / "mine.jsonl"), "--out", str(out)]) == 1
    failed = [record.error for record in records_of(out).values() if record.failed]
    assert len(failed) == 1 and failed[0] is not None and "ValueError" in failed[0]


def test_after_a_failed_first_turn_the_second_is_not_asked(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "mt_bench.jsonl").write_text(
        "".join(
            f'{{"id": "m/{i}", "turns": ["{"FAIL" if i == 2 else "first"} {i}", "second {i}"]}}\n' for i in range(6)
        )
    )
    server, out = fake(), tmp_path / "run"
    assert main(flags(server.url, out, data_dir)) == 1
    assert "second 2" not in server.asked()
    error = records_of(out)["mt_bench", "m/2", 1].error
    assert error is not None
    assert "turn 0" in error


def test_a_server_that_is_down(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags("http://127.0.0.1:9", tmp_path / "run", data_dir)) == 2
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tau_of_a_plain_server_is_refused(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(speculative=False)
    assert main(flags(server.url, tmp_path / "run", data_dir)) == 2
    assert "--plain" in capsys.readouterr().err
    assert not server.asked()


def test_a_server_that_only_claims_to_speculate_is_refused_before_the_first_prompt(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake()
    monkeypatch.setattr(server.engine, "sglext", lambda body, tokens: None)
    assert main(flags(server.url, tmp_path / "run", data_dir)) == 2
    assert "no verify step" in capsys.readouterr().err
    assert not server.asked()
    assert not (tmp_path / "run").exists()


def test_without_warm_up_the_claim_is_checked_at_the_end(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake()
    monkeypatch.setattr(server.engine, "sglext", lambda body, tokens: None)
    assert main(flags(server.url, tmp_path / "run", data_dir, "--warmup", "0")) == 2
    assert "no verify step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_plain_baseline_has_speed_and_no_tau(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    assert main(flags(fake(speculative=False).url, tmp_path / "run", data_dir, "--plain")) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["macro"]["tau"] is None
    assert summary["throughput"]["tokens_per_s"] > 0


UNKNOWN = ("target", "drafter", "algorithm", "block_size", "device", "dtype", "sglang", "revision", "overlap")


@pytest.mark.parametrize("own_info", [None, {"vllm_config": {"model": "m"}}])
@pytest.mark.parametrize("more", [[], ["--no-stream"], ["--concurrency", "3"]])
def test_of_a_server_that_is_not_sglang_speed_is_measured_and_nothing_invented(
    more: list[str],
    own_info: dict[str, Any] | None,
    fake: Start,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, out = fake(sglang=False, own_info=own_info), tmp_path / "run"
    assert main(flags(server.url, out, data_dir, "--plain", *more)) == 0
    assert len(server.asked()) == 18
    records = records_of(out)
    for record in records.values():
        assert (record.output_ids, record.prompt_ids, record.verify_steps, record.block_size) == (None, None, 0, None)
        assert (record.prompt_tokens > 20, record.ttft_s is None) == (True, "--no-stream" in more)
    for number in range(6):
        usage = len(server.engine.tokens([{"role": "user", "content": f"sum {number}"}], 32))
        assert records["gsm8k", f"g/{number}", 0].completion_tokens == usage
    run = json.loads((out / "run.json").read_text())
    assert run["server"]["model"] == "toy"
    assert {name: run["server"][name] for name in UNKNOWN} == dict.fromkeys(UNKNOWN)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["target"] == "toy"
    assert (summary["device"], summary["sglang"], summary["macro"]["tau"]) == (None, None, None)
    assert summary["throughput"]["tokens_per_s"] > 0
    printed = capsys.readouterr().out
    assert "toy, a server that is not SGLang, decoding not known" in printed
    assert "plain decoding" not in printed and "warning: no SGLang server" in printed


@pytest.mark.parametrize("more", [[], ["--no-stream"], ["--empty-cache"]])
def test_tau_of_a_vllm_server_is_that_of_sglang_with_the_same_steps(
    more: list[str], fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mean_acceptance_length is another figure: it counts drafts behind the end of an answer, too."""
    vllm, sglang = fake(sglang=False, vllm=True), fake()
    assert main(flags(vllm.url, tmp_path / "vllm", data_dir, *more)) == 0
    printed = capsys.readouterr().out
    assert "toy, vLLM 0.32.0, block 4" in printed and "its drafter, device and dtype are not known" in printed
    assert main(flags(sglang.url, tmp_path / "sglang", data_dir, *more)) == 0
    ours, theirs = records_of(tmp_path / "sglang"), records_of(tmp_path / "vllm")
    said = ("prompt_ids", "output_ids", "accepted_histogram", "completion_tokens", "block_size", "finish_reason")
    for key, record in ours.items():
        assert {name: getattr(theirs[key], name) for name in said} == {name: getattr(record, name) for name in said}
        assert theirs[key].proposed == record.verify_steps * 3
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("vllm", "sglang")]
    assert summaries[0]["macro"] == summaries[1]["macro"] and summaries[0]["macro"]["tau"] > 1
    assert (summaries[0]["vllm"], summaries[0]["block_size"], summaries[1]["vllm"]) == ("0.32.0", 4, None)
    run = json.loads((tmp_path / "vllm" / "run.json").read_text())
    assert (run["server"]["target"], run["server"]["drafter"], run["server"]["vllm"]) == ("/models/toy", None, "0.32.0")
    assert vllm.engine.flushed == ("--empty-cache" in more)


@pytest.mark.parametrize(
    ("server", "more", "said"),
    [
        ({"spec_metrics": False}, [], ["no verify step", "--per-request-spec-decode-metrics summary"]),
        ({"spec_metrics": False}, ["--plain"], ["speculative", "leave --plain out"]),
        ({"speculative": False}, [], ["speculative_algorithm None", "--plain"]),
        ({"log_stats": False}, ["--plain"], ["no counter of vLLM", "--disable-log-stats"]),
        ({"vllm": "router"}, [], ["/version and /metrics can be read", "add --plain"]),
        ({"vllm": "proxy"}, [], ["/version and /metrics can be read", "add --plain"]),
        ({"vllm": "proxy"}, ["--plain"], ["replies with verify steps", "the server's own URL"]),
        ({"busy": True}, ["--empty-cache"], ['"success":false', "send it no other requests"]),
    ],
)
def test_a_vllm_server_of_the_other_kind_is_refused(
    server: dict[str, Any],
    more: list[str],
    said: list[str],
    fake: Start,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = fake(**{"sglang": False, "vllm": True, **server})
    assert main(flags(started.url, tmp_path / "run", data_dir, *more)) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in said), message
    assert "busy" in server or not (tmp_path / "run").exists()


def test_a_run_of_vllm_is_not_resumed_with_another_number_of_drafts(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(flags(fake(sglang=False, vllm=True).url, out, data_dir)) == 0
    lines = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (out / "records.jsonl").write_text("".join(lines[:4]))
    assert main(flags(fake(sglang=False, vllm=True, block=5).url, out, data_dir, "--resume")) == 2
    assert "blocks of [4], as the run" in capsys.readouterr().err
    assert main(flags(fake(sglang=False, vllm=True).url, out, data_dir, "--resume")) == 0


@pytest.mark.parametrize(("extra", "said"), [(0, False), (9, True)])
def test_tokens_of_vllms_steps_without_a_draft_are_told(
    extra: int, said: bool, fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(sglang=False, vllm=True, extra_tokens=extra)
    assert main(flags(server.url, tmp_path / "run", data_dir)) == 0
    assert ("of the tokens come from steps that drafted nothing" in capsys.readouterr().out) is said


@pytest.mark.parametrize("server", [{}, {"sglang": False, "vllm": True}])
def test_a_thought_that_the_server_takes_out_of_the_text_starts_the_clock(
    server: dict[str, Any], fake: Start, data_dir: Path, tmp_path: Path
) -> None:
    assert main(flags(fake(thoughts=True, **server).url, tmp_path / "run", data_dir)) == 0
    assert all(record.ttft_s is not None and not record.output_text for record in records_of(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("server", "known"), [({"vllm": True}, True), ({"vllm": "router"}, False), ({"vllm": "proxy"}, False)]
)
def test_a_plain_vllm_server_is_a_baseline_whose_tokens_are_known_unless_a_router_hides_it(
    server: dict[str, Any], known: bool, fake: Start, data_dir: Path, tmp_path: Path
) -> None:
    started, out = fake(sglang=False, speculative=False, **server), tmp_path / "run"
    assert main(flags(started.url, out, data_dir, "--plain")) == 0
    assert all((record.output_ids is not None) == known for record in records_of(out).values())


def test_a_run_of_another_server_is_resumed_and_not_by_sglang(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(sglang=False), tmp_path / "run"
    assert main(flags(server.url, out, data_dir, "--plain")) == 0
    asked = len(server.engine.requests)
    assert main(flags(server.url, out, data_dir, "--plain", "--resume")) == 0
    assert len(server.engine.requests) == asked
    assert main(flags(fake(speculative=False).url, out, data_dir, "--plain", "--resume")) == 2
    assert "server.device = 'cpu'" in capsys.readouterr().err


def test_texts_are_continued_by_another_server_too(fake: Start, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "def f("}\n')
    server, out = fake(sglang=False), tmp_path / "run"
    asked = ["--prompts", str(tmp_path / "mine.jsonl"), "--raw-prompts", "--plain"]
    assert main(["run", "--base-url", server.url, "--out", str(out), *asked]) == 0
    (record,) = records_of(out).values()
    assert record.completion_tokens == len(server.engine.tokens([{"role": "raw", "content": "def f("}], 512))
    assert record.output_ids is None


@pytest.mark.parametrize("more", [[], ["--no-stream"]])
def test_tokens_that_nobody_counts_are_not_guessed(
    more: list[str], fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(sglang=False, counts=False)
    assert main(flags(server.url, tmp_path / "run", data_dir, "--plain", *more)) == 2
    assert "completion tokens (usage)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], ["tau needs its counts", "--plain"]),
        (["--plain", "--empty-cache"], ["--empty-cache, and", "leave --empty-cache out"]),
    ],
)
def test_what_another_server_cannot_give_is_refused_before_it_is_asked(
    more: list[str], said: list[str], fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(sglang=False)
    assert main(flags(server.url, tmp_path / "run", data_dir, *more)) == 2
    message = capsys.readouterr().err
    assert "status 404" in message and all(part in message for part in said)
    assert not server.engine.requests
    assert not (tmp_path / "run").exists()


def test_a_url_with_no_model_behind_it_is_no_plain_server(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fake: Start
) -> None:
    assert main(flags(f"{fake().url}/elsewhere", tmp_path / "run", data_dir, "--plain", "--model", "toy")) == 2
    assert "/elsewhere/v1/models" in capsys.readouterr().err


def test_a_speculating_server_is_no_plain_baseline(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(fake().url, tmp_path / "run", data_dir, "--plain")) == 2
    assert "decodes plainly" in capsys.readouterr().err


def test_warm_up_is_as_wide_as_the_run_and_not_recorded(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server = fake()
    main(flags(server.url, tmp_path / "run", data_dir, "--concurrency", "3"))
    warm = [b for b in server.engine.requests if b["messages"][0]["content"].startswith("Count upwards")]
    assert len(warm) == 3
    assert len(records_of(tmp_path / "run")) == 18


SWAP = {"path": "/drafters/toy", "generation": 0}
CARD = {
    "card": {"thinking": "off", "max_length": 64},
    "warnings": ["the target's chat template is another"],
    "swap": SWAP,
}
DRAFTS = CARD | {"tree": True, "tree_nodes": 7, "draft_vocabulary": 8192, "weights": "0123456789abcdef"}
SWAPPED = {"path": "/drafters/new", "generation": 1}


def test_a_run_says_how_its_server_drafts(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    """A server without a card, as SGLang's own, says nothing of it."""
    main(flags(fake().url, tmp_path / "other", data_dir))
    main(flags(fake(card=DRAFTS | {"swap": SWAPPED}).url, tmp_path / "auf", data_dir))
    other, auf = (json.loads((tmp_path / name / "run.json").read_text())["server"] for name in ("other", "auf"))
    said = ("drafter", "overlap", "tree", "tree_nodes", "draft_vocabulary", "weights", "swaps")
    assert [other[name] for name in said] == ["/drafters/toy", False, None, None, None, None, None]
    assert [auf[name] for name in said] == ["/drafters/new", False, True, 7, 8192, "0123456789abcdef", 1]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"tree": False, "tree_nodes": None}, "server.tree = False"),
        ({"tree_nodes": None}, "server.tree_nodes = None"),
        ({"draft_vocabulary": None}, "server.draft_vocabulary = None"),
        ({"weights": "fedcba"}, "server.weights = 'fedcba'"),
        ({"swap": SWAPPED}, "server.drafter = '/drafters/new'"),
        ({"swap": SWAP | {"generation": 2}}, "server.swaps = 2"),
    ],
)
def test_a_server_that_drafts_otherwise_does_not_go_on_with_a_run(
    other: dict[str, Any], named: str, fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(card=DRAFTS), tmp_path / "run"
    main(flags(server.url, out, data_dir))
    server.engine.card = DRAFTS | other
    assert main(flags(server.url, out, data_dir, "--resume")) == 2
    assert named in capsys.readouterr().err


def test_a_swap_during_a_run_is_no_result(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, out = fake(card=DRAFTS), tmp_path / "run"
    tokens = server.engine.tokens

    def swap_and_answer(messages: list[dict[str, str]], limit: int) -> list[int]:
        server.engine.card = DRAFTS | {"swap": SWAPPED, "weights": "fedcba"}
        return list(tokens(messages, limit))

    monkeypatch.setattr(server.engine, "tokens", swap_and_answer)
    assert main(flags(server.url, out, data_dir)) == 2
    assert "/drafters/new after 1 swaps" in capsys.readouterr().err
    assert not (out / "summary.json").exists()
    monkeypatch.undo()
    server.engine.card = DRAFTS
    assert main(flags(server.url, out, data_dir, "--resume")) == 2, "nor once the former drafter is back"
    assert "'/drafters/toy, then /drafters/new'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], []),
        (["--thinking", "on"], ["thinking off, and is asked with --thinking on"]),
        (["--thinking", "server"], []),
        (["--max-tokens", "64"], ["up to 64 in all"]),
    ],
)
def test_conditions_that_are_not_the_drafters_are_warned_of(
    more: list[str],
    expected: list[str],
    fake: Start,
    data_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert main(flags(fake(card=CARD).url, out, data_dir, *more)) == 0
    warnings = json.loads((out / "summary.json").read_text())["warnings"]
    assert warnings[0] == "the server warns: the target's chat template is another"
    assert len(warnings) == 1 + len(expected)
    for warning, part in zip(warnings[1:], expected, strict=True):
        assert part in warning
        assert warning in caplog.messages
        assert f"warning: {warning}" in capsys.readouterr().out


def test_steps_are_recorded_on_demand(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    server = fake()
    assert main(flags(server.url, tmp_path / "without", data_dir)) == 0
    assert main(flags(server.url, tmp_path / "with", data_dir, "--record-steps")) == 0
    without, recorded = records_of(tmp_path / "without"), records_of(tmp_path / "with")
    for key, record in recorded.items():
        assert without[key].accepted_by_step is None
        assert record.accepted_by_step is not None
        assert [record.accepted_by_step.count(a) for a in range(4)] == record.accepted_histogram
        assert without[key].output_ids == record.output_ids


@pytest.mark.parametrize("more", [["--no-stream"], ["--plain"]])
def test_steps_come_in_streams_of_a_speculating_server_alone(more: list[str], capsys: Any) -> None:
    assert main(["run", "--base-url", "http://127.0.0.1:9", "--record-steps", *more]) == 2
    assert f"--record-steps with {more[0]}" in capsys.readouterr().err


def test_a_built_in_algorithm_does_not_tell_its_steps(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(algorithm="DFLASH", fields="sglang")
    assert main(flags(server.url, tmp_path / "run", data_dir, "--record-steps")) == 2
    assert "speculative_algorithm DFLASH" in capsys.readouterr().err
    assert not server.engine.requests


@pytest.mark.parametrize(("more", "flushed"), [([], 0), (["--empty-cache"], 1)])
def test_cached_prompts_are_forgotten_on_demand(
    more: list[str], flushed: int, fake: Start, data_dir: Path, tmp_path: Path
) -> None:
    server, out = fake(), tmp_path / "run"
    assert main(flags(server.url, out, data_dir, *more)) == 0
    assert server.engine.flushed == flushed
    assert json.loads((out / "run.json").read_text())["config"]["empty_cache"] == bool(flushed)


def test_a_server_without_a_card_is_warned_of_nothing(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(flags(fake().url, out, data_dir, "--thinking", "on")) == 0
    assert json.loads((out / "summary.json").read_text())["warnings"] == []


def test_a_card_that_cannot_be_read_stops_the_run(
    fake: Start, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conditions that nobody could compare must not pass as compared."""
    server = fake(card=CARD)
    server.engine.card = "broken"
    assert main(flags(server.url, tmp_path / "run", data_dir)) == 2
    assert "/v1/auf/card" in capsys.readouterr().err
