"""One greedy run, judged token by token by a server that prefills its answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from tests.benchmarks.conftest import write_rows

Start = Callable[..., Any]
Record = Callable[..., str]


@pytest.fixture
def record_run(data_dir: Path, tmp_path: Path) -> Record:
    def record(server: Any, *more: str) -> str:
        out = tmp_path / "run"
        flags = ["--tasks", "gsm8k,mt_bench", "--limit", "6", "--data-dir", str(data_dir), "--max-tokens", "32"]
        assert main(["run", "--base-url", server.url, "--out", str(out), *flags, *more]) == 0
        return str(out)

    return record


def judge(run: str, url: str, *more: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the report; {} where none was written."""
    code = main(["lossless", run, "--base-url", url, *more])
    report = Path(run) / "teacher_forced.json"
    return code, json.loads(report.read_text()) if report.exists() else {}


def change(run: str, task: str, prompt_id: str, turn: int = 0, **fields: Any) -> dict[str, Any]:
    """Rewrite fields of one record; a function gets what is there. Returns the record as it is now."""
    path = Path(run) / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (row,) = (row for row in rows if (row["task"], row["prompt_id"], row["turn"]) == (task, prompt_id, turn))
    row |= {name: value(row[name]) if callable(value) else value for name, value in fields.items()}
    write_rows(path, rows)
    return row


def with_token(position: int, token: int) -> Callable[[list[int]], list[int]]:
    return lambda ids: [*ids[:position], token, *ids[position:][1:]]


def counts(report: dict[str, Any]) -> dict[str, int]:
    names = ("answers", "exact", "near_tie", "fault", "near_tie_answers", "fault_answers", "failed")
    return {name: report[name] for name in names}


@pytest.mark.parametrize("kind", [{}, {"speculative": False}])
def test_every_token_of_every_answer_is_judged(
    kind: dict[str, Any], fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a speculating run and of a plain one, both turns, and what ended an answer."""
    server = fake(**kind)
    run = record_run(server, *(["--plain"] if kind else []))
    code, report = judge(run, server.url, "--concurrency", "4")
    records = [json.loads(line) for line in (Path(run) / "records.jsonl").read_text().splitlines()]
    tokens = sum(len(record["output_ids"]) for record in records)
    assert code == 0
    assert counts(report) == {
        **{"answers": 18, "exact": tokens, "near_tie": 0, "fault": 0},
        **{"near_tie_answers": 0, "fault_answers": 0, "failed": 0},
    }
    asked = {tuple(body["input_ids"]) for body in server.engine.generated}
    assert asked == {(*record["prompt_ids"], *record["output_ids"]) for record in records}
    assert len({body["extra_key"] for body in server.engine.generated}) == 1
    printed = capsys.readouterr().out
    assert (
        f"{tokens} tokens of 18 answers: {tokens} exact, 0 near-tie, 0 fault (passed; the bar is equality)" in printed
    )
    assert ("which speculates itself (AUF)" in printed) == (not kind)


def test_each_call_leaves_cached_prefixes_of_others_alone(fake: Start, record_run: Record) -> None:
    server = fake()
    run = record_run(server)
    judge(run, server.url)
    judge(run, server.url)
    assert len({body["extra_key"] for body in server.engine.generated}) == 2


@pytest.mark.parametrize(
    ("device", "gap", "code", "near_tie", "fault"),
    [("cuda", 0.25, 0, 1, 0), ("cuda", 0.26, 1, 0, 1), ("cpu", 0.125, 1, 1, 0), ("cpu", 0.0, 0, 0, 0)],
)
def test_a_token_that_is_not_the_best_is_judged_by_its_gap(
    fake: Start,
    record_run: Record,
    capsys: pytest.CaptureFixture[str],
    device: str,
    gap: float,
    code: int,
    near_tie: int,
    fault: int,
) -> None:
    """The last case is a tie: another token with an equal logit is right, too."""
    run = record_run(fake(forked="first 4", device=device))
    server = fake(speculative=False, gap=gap, device=device)
    found, report = judge(run, server.url)
    assert found == code
    assert (report["answers"], report["near_tie"], report["fault"]) == (18, near_tie, fault)
    assert (report["near_tie_answers"], report["fault_answers"]) == (near_tie, fault)
    answer = server.engine.tokens([{"role": "user", "content": "first 4"}], 32)
    expected = {"task": "mt_bench", "prompt_id": "m/4", "turn": 0, "position": 3, "emitted": answer[3] + 1000}
    for token in report["worst"]:
        assert {name: token[name] for name in expected} == expected
        assert (token["best"], token["gap"]) == (answer[3], gap)
    assert len(report["worst"]) == near_tie + fault
    if near_tie + fault:
        assert f"m/4 turn 0 token 3: {answer[3] + 1000} for {answer[3]}, {gap:.3f} below" in capsys.readouterr().out


def test_the_bar_is_equality_only_where_run_and_judge_are_on_a_cpu(fake: Start, record_run: Record) -> None:
    run = record_run(fake(forked="first 4", device="cpu"))
    assert judge(run, fake(speculative=False, gap=0.125, device="cuda").url)[0] == 0
    assert judge(run, fake(speculative=False, gap=0.125, device="cpu").url)[0] == 1


def test_the_bar_follows_the_size_of_the_logits(fake: Start, record_run: Record) -> None:
    run = record_run(fake(forked="first 4", device="cuda"))
    server = fake(gap=0.26, device="cuda")
    assert judge(run, server.url)[0] == 1
    assert judge(run, server.url, "--logit-scale", "40")[0] == 0


@pytest.mark.parametrize("position", [0, 5, -1])
def test_a_changed_id_is_a_fault_at_its_place(position: int, fake: Start, record_run: Record) -> None:
    """The last one as well, which is what ended the answer."""
    server = fake(gap=3.0)
    run = record_run(server)
    count = len(change(run, "gsm8k", "g/2")["output_ids"])
    place = position % count
    change(run, "gsm8k", "g/2", output_ids=with_token(place, 1234))
    code, report = judge(run, server.url)
    assert (code, report["fault"], report["fault_answers"]) == (1, 1, 1)
    (token,) = report["worst"]
    assert (token["prompt_id"], token["position"], token["emitted"], token["verdict"]) == ("g/2", place, 1234, "fault")


def test_an_answer_that_its_length_ended_is_judged_to_its_last_token(fake: Start, record_run: Record) -> None:
    server = fake(cut="sum 1", gap=3.0)
    run = record_run(server, "--no-stream")
    record = change(run, "gsm8k", "g/1")
    assert record["finish_reason"] == "length"
    change(run, "gsm8k", "g/1", output_ids=with_token(len(record["output_ids"]) - 1, 1234))
    assert judge(run, server.url)[1]["fault"] == 1


def test_the_worst_tokens_are_listed_and_the_others_counted(
    fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(gap=3.0)
    run = record_run(server)
    for number in range(4):
        change(run, "gsm8k", f"g/{number}", output_ids=with_token(number, 1234))
    code, report = judge(run, server.url, "--worst", "3")
    assert (code, report["fault"], len(report["worst"])) == (1, 4, 3)
    assert "and 1 more that are not exact" in capsys.readouterr().out


def test_what_cannot_be_judged_is_named_and_counted(
    fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake(gap=3.0)
    run = record_run(server)
    strict = change(run, "gsm8k", "g/0", strict_tools=True, output_ids=with_token(2, 1234))
    short = change(run, "gsm8k", "g/1", prompt_tokens=lambda count: count - 1)
    code, report = judge(run, server.url)
    assert (code, report["answers"]) == (0, 16)
    assert [(part["prompt_id"], part["tokens"]) for part in report["unjudged"]] == [
        ("g/0", len(strict["output_ids"])),
        ("g/1", len(short["output_ids"])),
    ]
    printed = capsys.readouterr().out
    assert "gsm8k g/0 turn 0, which has a strict tool" in printed
    assert "gsm8k g/1 turn 0, whose prompt was truncated" in printed


def test_tokens_behind_the_longest_prompt_of_the_judge_are_counted(fake: Start, record_run: Record) -> None:
    """The longest answers of mt_bench's second turns end there; the others have room."""
    server = fake()
    run = record_run(server)
    records = [json.loads(line) for line in (Path(run) / "records.jsonl").read_text().splitlines()]
    lengths = [(len(record["prompt_ids"]), len(record["output_ids"])) for record in records]
    longest = max(map(sum, lengths)) - 3
    code, report = judge(run, fake(most_input=longest + 1).url)
    over = sum(max(0, prompt + answer - longest) for prompt, answer in lengths)
    assert over >= 3
    assert code == 0
    assert sum(part["tokens"] for part in report["unjudged"]) == over
    assert report["exact"] == sum(answer for _, answer in lengths) - over
    assert judge(run, fake(most_input=10).url) == (1, json.loads((Path(run) / "teacher_forced.json").read_text()))


def test_failed_requests_do_not_pass(fake: Start, record_run: Record) -> None:
    server = fake()
    run = record_run(server)
    change(run, "gsm8k", "g/0", error="500", output_ids=None, prompt_ids=None)
    code, report = judge(run, server.url)
    assert (code, report["failed"], report["fault"], report["answers"]) == (1, 1, 0, 17)


def test_a_strict_tool_is_recorded(fake: Start, tmp_path: Path) -> None:
    def tool(**more: Any) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}, **more}}

    prompts = tmp_path / "mine.jsonl"
    asked = {"messages": [{"role": "user", "content": "sum 1"}]}
    write_rows(
        prompts,
        [
            {"id": "none", **asked},
            {"id": "free", **asked, "tools": [tool()]},
            {"id": "strict", **asked, "tools": [tool(), tool(strict=True, name="find")]},
        ],
    )
    out = tmp_path / "run"
    assert main(["run", "--base-url", fake().url, "--prompts", str(prompts), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert {row["prompt_id"]: row["strict_tools"] for row in rows} == {"none": False, "free": False, "strict": True}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"output_ids": None}, "without token ids"),
        ({"prompt_ids": None}, "without token ids"),
        ({"output_ids": lambda ids: ids[:-1]}, "ids for the"),
    ],
)
def test_answers_without_all_their_ids_are_refused(
    fields: dict[str, Any], found: str, fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake()
    run = record_run(server)
    change(run, "gsm8k", "g/3", **fields)
    assert judge(run, server.url) == (2, {})
    printed = capsys.readouterr().err
    assert found in printed and "g/3" in printed


def test_runs_of_vllm_are_judged_by_an_sglang_server(
    fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm = fake(sglang=False, vllm=True)
    run = record_run(vllm)
    code, report = judge(run, fake(speculative=False).url)
    assert (code, report["answers"], report["equality"]) == (0, 18, False)
    assert judge(run, vllm.url)[0] == 2
    assert "an SGLang server" in capsys.readouterr().err


def test_a_run_at_another_temperature_is_refused(
    fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake()
    assert judge(record_run(server, "--temperature", "0.7"), server.url) == (2, {})
    assert "a run at temperature 0.7" in capsys.readouterr().err


def test_one_run_needs_a_server(fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]) -> None:
    run = record_run(fake())
    assert main(["lossless", run]) == 2
    assert "no --base-url" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--concurrency", "--worst"])
def test_flags_of_one_run_are_refused_with_two(
    flag: str, fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    run = record_run(fake())
    assert main(["lossless", run, run, flag, "2"]) == 2
    assert f"{flag} with two runs" in capsys.readouterr().err


def test_a_server_of_another_target_is_no_judge(
    fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    server = fake()
    run = record_run(server)
    manifest = Path(run) / "run.json"
    manifest.write_text(manifest.read_text().replace("/models/toy", "/models/other"))
    assert judge(run, server.url) == (2, {})
    assert "target: '/models/toy' and '/models/other'" in capsys.readouterr().err


def test_a_server_that_leaves_tokens_out_is_no_judge(
    fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    run = record_run(fake())
    assert judge(run, fake(unsaid=1).url) == (2, {})
    assert "those of the" in capsys.readouterr().err


def test_an_unfinished_run_is_refused(fake: Start, record_run: Record, capsys: pytest.CaptureFixture[str]) -> None:
    server = fake()
    run = record_run(server)
    path = Path(run) / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert judge(run, server.url) == (2, {})
    assert "17 of 18 requests" in capsys.readouterr().err
