"""A user's own prompts: what each form of a row asks, what is named as broken, and whole runs over such files."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.harness.records import read_records
from benchmarks.harness.sources.files import select_from_files, turns_of
from benchmarks.harness.sources.prompt import Prompt
from benchmarks.harness.tasks import TASKS
from sglang_auf.errors import ConfigError, DataError
from sglang_auf.training.text.rows import BadRow

Start = Callable[..., Any]

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **how: Any) -> dict[str, Prompt]:
    (chosen,) = select_from_files([path], **how)
    return {prompt.id: prompt for prompt in chosen.prompts}


def only(path: Path, *rows: object, **how: Any) -> Prompt:
    (prompt,) = read(write(path, *rows), **how).values()
    return prompt


ONE_QUESTION = [
    {"turns": ["How?"]},
    {"messages": [user("How?")]},
    {"messages": [user("How?"), model("So.")]},
    {"conversation": [user("How?")]},
    {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]},
    {"prompt": "How?"},
    {"prompt": "How?", "completion": "So."},
    {"prompt": [user("How?")]},
    {"prompt": [user("How?")], "completion": [model("So.")]},
    {"instruction": "How?", "output": "So."},
    {"PROMPT": "How?", "messages": None, "temperature": 0.7, "model": "gpt"},
    {"messages": [user("How?")], "prompt": "How? A copy, as dumps keep one."},
]


@pytest.mark.parametrize("row", ONE_QUESTION)
def test_every_form_of_a_question_is_the_same_question(tmp_path: Path, row: dict[str, Any]) -> None:
    assert only(tmp_path / "mine.jsonl", row).turns == ("How?",)


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([user("a"), user("b")], ("a", "b")),
        ([user("a"), model("A"), user("b")], ((user("a"), model("A"), user("b")),)),
        ([user("a"), model("A"), user("b"), model("B")], ((user("a"), model("A"), user("b")),)),
        ([SYSTEM, user("a"), user("b")], ((SYSTEM, user("a")), "b")),
        ([user("a"), SYSTEM, user("b")], ("a", (SYSTEM, user("b")))),
        ([user("a"), SYSTEM], ((user("a"), SYSTEM),)),
        ([user("a"), SYSTEM, model("A"), user("b")], ((user("a"), SYSTEM, model("A"), user("b")),)),
        ([model("Hello."), user("a")], ((model("Hello."), user("a")),)),
        (
            [user("a"), model("call"), {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}],
            ((user("a"), model("call"), {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"}),),
        ),
    ],
)
def test_the_conversation_is_asked_as_it_stands(messages: list[Any], turns: tuple[Any, ...]) -> None:
    assert turns_of(messages) == turns


@pytest.mark.parametrize("messages", [[SYSTEM], [model("a")], [SYSTEM, model("a")]])
def test_a_conversation_that_asks_nothing_is_broken(messages: list[Any]) -> None:
    with pytest.raises(BadRow, match="no message of a user"):
        turns_of(messages)


def test_system_tools_and_variables_of_the_template_are_asked_with(tmp_path: Path) -> None:
    messages = [user("a"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    row = {"system": "Be brief.", "messages": messages, "tools": [TOOL], "chat_template_kwargs": {"style": "short"}}
    prompt = only(tmp_path / "mine.jsonl", row)
    ((system, _, called, _),) = prompt.turns
    assert system == SYSTEM
    assert json.loads(called["tool_calls"][0]["function"]["arguments"]) == {"a": 1}, "text, as OpenAI's API has it"  # type: ignore[index]
    assert prompt.request["tools"][0]["function"]["name"] == "add"
    assert prompt.request["chat_template_kwargs"] == {"style": "short"}


BROKEN = {
    '{"turns": ["x"]': "broken JSON",
    '["x"]': "no JSON object",
    '{"text": "x"}': "none of messages",
    '{"turns": ["x", 3]}': "turns that is no text",
    '{"turns": ["  "]}': "an empty message of a user",
    '{"messages": [{"role": "robot", "content": "x"}]}': "role 'robot'",
    '{"messages": [{"role": "system", "content": "x"}]}': "no message of a user",
    '{"messages": [{"role": "user", "content": "x"}], "turns": ["x"]}': "which one is the conversation",
    '{"prompt": "x", "turns": ["y"]}': "prompt and turns, which say different things",
    '{"turns": "x"}': "turns that are a text, and not a list of texts",
    '{"turns": []}': "nothing in turns",
    '{"prompt_ids": []}': "nothing in prompt_ids",
    '{"prompt": 7}': "neither a text nor a list of messages",
    '{"turns": ["x"], "images": ["y"]}': "images",
    '{"turns": ["x"], "chat_template_kwargs": {"budget": NaN}}': "NaN or Infinity, which JSON does not have",
    '{"turns": ["x"], "tools": [{"least": -Infinity}]}': "NaN or Infinity, which JSON does not have",
    '{"id": "good", "turns": ["x"]}': "an id for the second time",
    '{"turns": ["x"], "chat_template_kwargs": {"enable_thinking": true}}': "enable_thinking True",
}


@pytest.mark.parametrize(("line", "fault"), BROKEN.items())
def test_a_broken_row_is_named_and_the_others_are_asked(
    tmp_path: Path, line: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"id": "good", "turns": ["fine"]}}\n\n{line}\n{{"turns": ["last"]}}', encoding="utf-8")
    (chosen,) = select_from_files([path])
    assert {prompt.turns for prompt in chosen.prompts} == {("fine",), ("last",)}
    assert chosen.file is not None
    (broken,) = chosen.file.broken
    assert broken.startswith("mine.jsonl:3: ")
    assert fault in broken
    assert chosen.file.rows == 3
    assert chosen.file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "mine.jsonl:3" in caplog.text
    assert fault in caplog.text
    assert 'expected: one JSON object a line, with "messages"' in caplog.text


def test_a_row_of_a_list_with_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('[{"prompt": "NaN"}, {"prompt": "a", "chat_template_kwargs": {"budget": Infinity}}]')
    (chosen,) = select_from_files([path])
    assert [prompt.turns for prompt in chosen.prompts] == [("NaN",)]
    assert chosen.file is not None
    assert chosen.file.broken == ["mine.json[1]: NaN or Infinity, which JSON does not have"]


def test_a_field_that_nobody_sends_may_hold_anything(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"turns": ["a"], "score": NaN}\n')
    (chosen,) = select_from_files([path])
    assert [prompt.turns for prompt in chosen.prompts] == [("a",)]


@pytest.mark.parametrize("content", ["", "\n\n", "nothing\n", '{"id": "a"}\n'])
def test_a_file_without_a_good_row_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"no prompt in .*mine\.jsonl"):
        select_from_files([path])


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(DataError, match="no file"):
            select_from_files([path])


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    first, second = (write(folder / "mine.jsonl", {"prompt": "x"}) for folder in (tmp_path, tmp_path / "more"))
    for paths in ([first, second], [write(tmp_path / next(iter(TASKS)), {"prompt": "x"})]):
        with pytest.raises(ConfigError, match="rename the file"):
            select_from_files(paths)


def test_a_byte_order_mark_and_a_long_line_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"turns": ["one\u2028line"]}, {"turns": ["x" * 3_000_000]}]
    path.write_bytes(codecs.BOM_UTF8 + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    assert {len(prompt.text) for prompt in read(path).values()} == {8, 3_000_000}


def test_equal_prompts_are_asked_as_often_as_they_come(tmp_path: Path) -> None:
    assert len(read(write(tmp_path / "mine.jsonl", {"turns": ["x"]}, {"turns": ["x"]}))) == 2


def test_a_limit_takes_the_head_of_a_fixed_order(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", *({"id": f"m/{number}", "prompt": str(number)} for number in range(30)))
    whole, part = list(read(path)), list(read(path, limit=7))
    assert part == whole[:7]
    assert whole != sorted(whole, key=lambda id: int(id.split("/")[1]))


def test_sharegpt_as_one_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": "a"}]}, {"conversations": []}]))
    (chosen,) = select_from_files([path])
    assert [prompt.turns for prompt in chosen.prompts] == [("a",)]
    assert chosen.file is not None
    assert chosen.file.broken[0].startswith("sharegpt.json[1]: ")


def test_a_raw_text_is_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    prompt = only(path, {"prompt": " def f(x):\n"}, {"turns": ["x"]}, {"prompt": "a", "system": "b"}, raw=True)
    assert prompt.raw
    assert prompt.text == " def f(x):\n"
    (chosen,) = select_from_files([path], raw=True)
    assert chosen.file is not None
    assert [row.split(":")[1] for row in chosen.file.broken] == ["2", "3"]


def test_raw_and_rendered_are_other_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {"prompt": "x"})
    (chat,), (raw,) = select_from_files([path]), select_from_files([path], raw=True)
    assert chat.sha256 != raw.sha256


# Groups

GROUPED: list[dict[str, Any]] = [
    {"id": "a", "turns": ["How?"], "language": "en"},
    {"id": "b", "turns": ["Wie?"], "language": "de"},
    {"id": "c", "turns": ["?"]},
    {"id": "d", "turns": ["!"], "language": ["en", "de"]},
]


def test_a_field_of_the_row_is_its_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "mine.jsonl", *GROUPED)
    (chosen,) = select_from_files([path], group_by="language")
    assert {prompt.id: prompt.group for prompt in chosen.prompts} == {"a": "en", "b": "de", "c": "", "d": ""}
    assert chosen.file is not None
    assert chosen.file.without_group == ["mine.jsonl:3", "mine.jsonl:4"]
    assert "no 'language' in mine.jsonl:3, mine.jsonl:4" in caplog.text


def test_groups_change_no_digest(tmp_path: Path) -> None:
    """The literal is what the version before groups made of these rows."""
    rows = [
        {"id": "a", "turns": ["How?"], "language": "en"},
        {"id": "b", "messages": [{"role": "system", "content": "s"}, user("u")], "tools": [TOOL]},
        {"id": "c", "prompt": "x", "prompt_ids": [1, 2], "language": 3},
    ]
    path = write(tmp_path / "mine.jsonl", *rows)
    (plain,), (groups,) = select_from_files([path]), select_from_files([path], group_by="language")
    assert plain.sha256 == groups.sha256 == "81eee6184cdb50a98cc0f3a1fba2d3cce60eb3c3319983b5b1980045179b0a93"


def test_of_the_rows_that_are_asked_those_without_a_group_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", *GROUPED)
    (chosen,) = select_from_files([path], group_by="language", limit=2)
    assert chosen.file is not None
    named = {f"mine.jsonl:{'abcd'.index(prompt.id) + 1}" for prompt in chosen.prompts if prompt.group == ""}
    assert set(chosen.file.without_group) == named


def test_a_field_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path, other = write(tmp_path / "mine.jsonl", *GROUPED), write(tmp_path / "other.jsonl", {"turns": ["x"]})
    with pytest.raises(DataError, match=r"--group-by langauge.*mine\.jsonl.*check its name"):
        select_from_files([path], group_by="langauge")
    _, without = select_from_files([path, other], group_by="language")
    assert without.file is not None and without.file.without_group == ["other.jsonl:1"]


# Whole runs

BROKEN_PROMPT = "mine.jsonl:{}: a prompt that is neither a text nor a list of messages"


def run(url: str, file: Path, out: Path, *more: str) -> int:
    return main(["run", "--base-url", url, "--prompts", str(file), "--out", str(out), "--max-tokens", "32", *more])


def test_ten_rows_of_each_form_are_a_task_of_their_own(fake: Start, tmp_path: Path) -> None:
    forms: list[Callable[[str], dict[str, Any]]] = [
        lambda text: {"turns": [text]},
        lambda text: {"messages": [SYSTEM, user("before"), model("yes"), user(text)]},
        lambda text: {"prompt": text},
        lambda text: {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "no"}]},
    ]
    server = fake()
    for form_number, form in enumerate(forms):
        file = write(tmp_path / f"form{form_number}.jsonl", *(form(f"{form_number}-{n}") for n in range(10)))
        out = tmp_path / f"run{form_number}"
        assert run(server.url, file, out) == 0
        summary, manifest = (json.loads((out / f"{name}.json").read_text()) for name in ("summary", "run"))
        assert list(summary["tasks"]) == [file.name]
        assert summary["tasks"][file.name]["requests"] == 10
        assert summary["macro"]["tau"] == summary["tasks"][file.name]["tau"] > 1
        origin = manifest["tasks"][file.name]["file"]
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert origin == {"sha256": digest, "rows": 10, "broken": [], "without_group": []}
    assert set(server.asked()) == {f"{form}-{n}" for form in range(4) for n in range(10)}
    with_context = [body["messages"] for body in server.engine.requests if len(body["messages"]) == 4]
    assert len(with_context) == 10
    assert all(messages[:3] == [SYSTEM, user("before"), model("yes")] for messages in with_context)


def test_a_broken_row_is_in_the_report_and_on_stderr_and_the_others_are_measured(
    fake: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "mine.jsonl", *({"prompt": f"p{n}"} for n in range(9)), {"prompt": 3})
    server, out = fake(), tmp_path / "run"
    assert run(server.url, file, out) == 1
    assert len(server.asked()) == 9
    assert "mine.jsonl:10" in caplog.text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tasks"]["mine.jsonl"]["requests"] == 9
    assert summary["broken_rows"] == [BROKEN_PROMPT.format(10)]
    printed = capsys.readouterr().out
    assert 'broken rows of --prompts, not asked: 1; expected: one JSON object a line, with "messages"' in printed
    assert f"- {BROKEN_PROMPT.format(10)}" in printed
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "mine.jsonl:10: a prompt that is neither" in (tmp_path / "report" / "report.md").read_text()


def test_without_a_good_row_no_server_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "mine.jsonl", {"text": "x"})
    assert run("http://127.0.0.1:9", file, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "no prompt in" in error
    assert "mine.jsonl:1" in error


def test_tasks_may_be_asked_beside_a_file(fake: Start, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", {"prompt": "x"}, {"prompt": "y"})
    out = tmp_path / "run"
    assert run(fake().url, file, out, "--tasks", "sample_gsm8k", "--limit", "1") == 0
    tasks = json.loads((out / "summary.json").read_text())["tasks"]
    assert {name: task["requests"] for name, task in tasks.items()} == {"sample_gsm8k": 1, "mine.jsonl": 1}


def test_a_run_over_a_file_is_resumed_from_elsewhere_but_not_over_another_one(
    fake: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(), tmp_path / "run"
    file = write(tmp_path / "mine.jsonl", {"prompt": "x"})
    assert run(server.url, file, out) == 0
    (tmp_path / "moved").mkdir()
    assert run(server.url, file.rename(tmp_path / "moved" / "mine.jsonl"), out, "--resume") == 0
    assert run(server.url, write(file, {"prompt": "y"}), out, "--resume") == 2
    assert "mine.jsonl.prompts" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_raw_texts_go_to_the_route_without_a_template(fake: Start, tmp_path: Path, stream: str) -> None:
    server, out = fake(), tmp_path / "run"
    file = write(tmp_path / "mine.jsonl", {"prompt": "def f("}, {"prompt": "import "})
    assert run(server.url, file, out, "--raw-prompts", stream) == 0
    assert server.engine.requests == [], "not the warm-up either: a base model has no chat template"
    sent = {body["prompt"]: body for body in server.engine.continued}
    assert {"def f(", "import "} < set(sent)
    assert "chat_template_kwargs" not in sent["def f("]
    for record in read_records(out / "records.jsonl"):
        assert record.output_ids is not None
        assert record.prompt_ids is not None
        assert len(record.output_ids) == record.completion_tokens
        assert sum(record.accepted_histogram) == record.verify_steps > 0


def test_tools_reach_the_server_and_a_call_ends_the_conversation(fake: Start, tmp_path: Path) -> None:
    server, out = fake(), tmp_path / "run"
    row = {"turns": ["CALL it", "then?"], "tools": [TOOL], "chat_template_kwargs": {"style": "short"}}
    file = write(tmp_path / "mine.jsonl", row)
    assert run(server.url, file, out, "--no-stream", "--warmup", "0") == 1
    (body,) = server.engine.requests
    assert body["tools"][0]["function"]["name"] == "add"
    assert body["chat_template_kwargs"] == {"style": "short", "enable_thinking": False}
    first, second = read_records(out / "records.jsonl")
    assert first.finish_reason == "tool_calls"
    assert second.error == "not asked: turn 0 of this conversation calls a tool, whose result the row does not have"


@pytest.mark.usefixtures("fake_server_program")
def test_no_server_is_started_for_a_file_without_a_good_row(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.jsonl").write_text("?")
    assert main(["compare", "--profile", "toy", "--prompts", "mine.jsonl", "--out", "out"]) == 2
    assert "broken JSON" in capsys.readouterr().err
    assert not Path("out").exists()
