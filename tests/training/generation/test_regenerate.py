"""What `regenerate` asks and writes, what a kill or a failure leaves, and what is refused."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from sglang_auf import cli
from sglang_auf.errors import ConfigError, DataError, ServerError
from sglang_auf.training.generation import output_file
from sglang_auf.training.generation.output_file import manifest_path
from sglang_auf.training.generation.regenerate import read_prompts, regenerate
from sglang_auf.training.generation.settings import RegenerateSettings
from sglang_auf.training.generation.thoughts import FIRST_ROWS
from sglang_auf.training.generation.workers import GIVE_UP_AFTER
from sglang_auf.training.text import rows
from sglang_auf.training.text.chats import chat_of
from sglang_auf.training.text.conversations import load_conversations
from tests.support.http_servers import serving
from tests.support.toy_tokenizer import toy_tokenizer

ROOT = Path(__file__).parents[3]
SOON = {"retry-after-ms": "1"}
"""The client tries a failed request again after this pause."""


CALL = {"id": "c", "index": 0, "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@dataclass
class Server:
    """An OpenAI-compatible server that does what the question says: ABORT, REFUSE, CUT, CALL, BUSY the first time.

    strict: it refuses unknown request fields. down: every answer is a 503. together: answers come only when this many
    questions are in flight. vllm: it gives token ids as vLLM does. no_ids: it gives none. thought: more fields of the
    answer to a question that says THINK.
    """

    models: list[str] = field(default_factory=lambda: ["toy"])
    strict: bool = False
    down: bool = False
    together: int = 0
    vllm: bool = False
    no_ids: bool = False
    thought: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    in_flight: int = 0
    most_in_flight: int = 0

    def asked(self) -> Counter[str]:
        return Counter(request["messages"][-1]["content"] for request in self.requests)

    async def reply(self, request: Request) -> Response:
        body = await request.json()
        self.keys.add(request.headers.get("authorization"))
        question = body["messages"][-1]["content"]
        seen = self.asked()[question]
        self.requests.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        while self.most_in_flight < self.together:
            await asyncio.sleep(0.005)
        self.in_flight -= 1
        if self.down or ("BUSY" in question and seen == 0):
            return JSONResponse({"message": "busy"}, 503, SOON)
        if "REFUSE" in question or (self.strict and "top_k" in body):
            return JSONResponse({"message": "no such thing"}, 400)
        return JSONResponse(self.completion(body, question))

    def completion(self, body: dict[str, Any], question: str) -> dict[str, Any]:
        finish = "abort" if "ABORT" in question else "length" if "CUT" in question else "stop"
        message: dict[str, Any] = {"role": "assistant", "content": f"to {question}", "reasoning_content": None}
        if "CALL" in question:
            finish, message = "tool_calls", message | {"content": None, "tool_calls": [CALL]}
        if "THINK" in question:
            message |= self.thought
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        }
        if self.vllm and body.get("return_token_ids"):
            reply["prompt_token_ids"] = [len(body["messages"]), 1]
            reply["choices"][0]["token_ids"] = [7, 8, 9]
        if not (self.vllm or self.no_ids) and body.get("return_output_ids_in_sglext"):
            reply["sglext"] = {"input_ids": [len(body["messages"]), 1], "output_ids": [[7, 8, 9]]}
        return reply


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """serve(**Server fields): a running one; it ends with the test."""
    with ExitStack() as running:

        def start(**behaviour: Any) -> Server:
            server, app = Server(**behaviour), FastAPI()
            app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": name} for name in server.models]})
            app.post("/v1/chat/completions")(server.reply)
            server.url = running.enter_context(serving(app))
            return server

        yield start


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    """prompts("question", ...) or prompts({row}, ...): a file of them; questions get the ids p/0, p/1, ..."""

    def write(*rows: Any) -> Path:
        file = tmp_path / "prompts.jsonl"
        dicts = [{"id": f"p/{i}", "turns": [row]} if isinstance(row, str) else row for i, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in dicts))
        return file

    return write


def settings(server: Server, prompts: Path, **more: Any) -> RegenerateSettings:
    values = {
        "inputs": (str(prompts),),
        "out": prompts.with_name("answers.jsonl"),
        "base_url": server.url,
        "retries": 2,
    }
    return RegenerateSettings.model_validate(values | more)


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


Serve = Callable[..., Server]
Prompts = Callable[..., Path]


def test_single_turn_with_exact_ids(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    run = settings(server, prompts("one", "two CUT"), temperature=0.7, max_tokens=9, thinking="off")
    assert regenerate(run) == 2
    assert rows_of(run.out) == {
        "p/0": {
            "id": "p/0",
            "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "to one"}],
            "finish_reason": "stop",
            "chat_template_kwargs": {"enable_thinking": False},
            "prompt_ids": [1, 1],
            "response_ids": [7, 8, 9],
        },
        "p/1": {
            "id": "p/1",
            "messages": [{"role": "user", "content": "two CUT"}, {"role": "assistant", "content": "to two CUT"}],
            "finish_reason": "length",
            "chat_template_kwargs": {"enable_thinking": False},
            "prompt_ids": [1, 1],
            "response_ids": [7, 8, 9],
        },
    }
    request = next(request for request in server.requests if request["messages"][0]["content"] == "one")
    expected = {"model": "toy", "temperature": 0.7, "max_tokens": 9, "top_p": 1.0, "top_k": -1}
    assert request.items() >= (expected | {"chat_template_kwargs": {"enable_thinking": False}}).items()


def test_turns_are_asked_in_order_with_the_models_own_replies(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    sharegpt = [{"from": "gpt", "value": "old"}, {"from": "human", "value": "a CUT"}, {"from": "gpt", "value": "old"}]
    file = prompts(
        {"id": 5, "conversations": [*sharegpt, {"from": "human", "value": "b"}, {"from": "gpt", "value": "old"}]},
        {
            "id": "m",
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "old", "reasoning_content": "old"},
                {"role": "user", "content": "d"},
            ],
        },
    )
    run = settings(server, file)
    regenerate(run)
    rows = rows_of(run.out)
    assert [(m["role"], m["content"]) for m in rows["5"]["messages"]] == [
        ("user", "a CUT"),
        ("assistant", "to a CUT"),
        ("user", "b"),
        ("assistant", "to b"),
    ]
    assert (rows["5"]["finish_reason"], rows["5"]["finish_reasons"]) == ("stop", ["length", "stop"])
    assert [message["content"] for message in rows["m"]["messages"]] == ["be brief", "c", "to c", "d", "to d"]
    assert rows["m"]["prompt_ids"] == [4, 1]
    by_question = {request["messages"][-1]["content"]: request["messages"] for request in server.requests}
    assert by_question["b"] == rows["5"]["messages"][:-1]
    assert by_question["d"] == rows["m"]["messages"][:-1]


def test_a_row_is_asked_with_its_system_text_its_tools_and_its_variables(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    sharegpt = [{"from": "Human", "value": "one CALL"}, {"from": "GPT", "value": "old", "weight": 0}]
    kwargs = {"enable_thinking": False, "effort": 1}
    file = prompts(
        {"id": "a", "conversations": sharegpt, "system": "s", "tools": [TOOL], "chat_template_kwargs": kwargs}
    )
    run = settings(server, file, thinking="off")
    regenerate(run)
    [request] = server.requests
    assert request["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "one CALL"}]
    assert request["tools"][0]["function"] == TOOL["function"] | {"description": None}
    assert request["chat_template_kwargs"] == kwargs
    row = rows_of(run.out)["a"]
    assert (row["tools"], row["chat_template_kwargs"], row["finish_reason"]) == (request["tools"], kwargs, "tool_calls")
    assert row["messages"][-1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    again = chat_of(row)
    assert (again.tools, again.template_kwargs) == (request["tools"], kwargs)


def test_token_ids_of_vllm(serve: Serve, prompts: Prompts) -> None:
    run = settings(serve(vllm=True), prompts("one"))
    regenerate(run)
    row = rows_of(run.out)["p/0"]
    assert (row["prompt_ids"], row["response_ids"]) == ([1, 1], [7, 8, 9])


@pytest.mark.parametrize(
    "thought",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"reasoning": "Hm.", "reasoning_content": None},
        {"reasoning": None, "reasoning_content": "Hm."},
        {"reasoning": "Hm.", "reasoning_content": "Hm."},
    ],
)
def test_a_thought_is_read_under_both_of_its_names(
    serve: Serve, prompts: Prompts, thought: dict[str, str | None]
) -> None:
    run = settings(serve(thought=thought, no_ids=True), prompts("THINK"), thinking="on")
    regenerate(run)
    assert rows_of(run.out)["p/0"]["messages"][-1] == {
        "role": "assistant",
        "content": "to THINK",
        "reasoning_content": "Hm.",
    }


def test_two_thoughts_of_one_answer_are_refused(serve: Serve, prompts: Prompts) -> None:
    server = serve(thought={"reasoning": "Hm.", "reasoning_content": "Ah."})
    with pytest.raises(ServerError, match="two thoughts, in reasoning_content and reasoning: p/0"):
        regenerate(settings(server, prompts("THINK", "two")))


NO_THOUGHT: list[dict[str, Any]] = [{}, {"reasoning": ""}, {"reasoning_content": "\n\n"}]


@pytest.mark.parametrize("thought", NO_THOUGHT)
def test_a_server_that_loses_all_thoughts_ends_the_run(serve: Serve, prompts: Prompts, thought: dict[str, Any]) -> None:
    server = serve(no_ids=True, thought=thought)
    run = settings(server, prompts(*(f"THINK {i}" for i in range(99))), thinking="on", concurrency=4)
    with pytest.raises(ServerError, match=f"the first {FIRST_ROWS} answers came without a thought") as failure:
        regenerate(run)
    assert "--reasoning-parser" in failure.value.remedy
    assert len(server.requests) < FIRST_ROWS + 5
    assert run.out.read_text() == ""
    server.thought = {"reasoning": "Hm."}
    assert regenerate(run) == 99
    assert all(row["messages"][-1]["reasoning_content"] == "Hm." for row in rows_of(run.out).values())


def test_a_model_may_think_nothing_sometimes(serve: Serve, prompts: Prompts, caplog: pytest.LogCaptureFixture) -> None:
    questions = [*map(str, range(FIRST_ROWS - 1)), "THINK", *map(str, range(50, 99))]
    server = serve(no_ids=True, thought={"reasoning": "Hm."})
    run = settings(server, prompts(*questions), thinking="on", concurrency=1)
    assert regenerate(run) == len(questions)
    assert list(rows_of(run.out)) == [f"p/{i}" for i in range(len(questions))]
    assert f"{len(questions) - 1} answers came without a thought: p/0, p/1, " in caplog.text


def test_few_rows_without_a_thought_are_kept_and_named(
    serve: Serve, prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"id": "on", "turns": ["one"], "chat_template_kwargs": {"enable_thinking": True}}
    run = settings(serve(no_ids=True), prompts(row, "two"))
    assert regenerate(run) == 2
    assert "1 answers came without a thought: on." in caplog.text


@pytest.mark.parametrize(
    "behaviour", [{}, {"vllm": True}, {"no_ids": True, "thought": {"content": "<think>\nHm.\n</think>\n\nHi."}}]
)
def test_a_thought_in_token_ids_or_in_the_text_is_not_missed(
    serve: Serve, prompts: Prompts, caplog: pytest.LogCaptureFixture, behaviour: dict[str, Any]
) -> None:
    run = settings(serve(**behaviour), prompts(*(f"THINK {i}" for i in range(FIRST_ROWS + 1))), thinking="on")
    assert regenerate(run) == FIRST_ROWS + 1
    assert "without a thought" not in caplog.text


@pytest.mark.parametrize("thinking", ["off", "server"])
def test_no_thought_is_missed_where_none_was_asked_for(
    serve: Serve, prompts: Prompts, caplog: pytest.LogCaptureFixture, thinking: str
) -> None:
    run = settings(serve(no_ids=True), prompts(*map(str, range(FIRST_ROWS + 1))), thinking=thinking)
    assert regenerate(run) == FIRST_ROWS + 1
    assert "without a thought" not in caplog.text


def test_what_the_row_and_the_command_disagree_on_is_not_asked(
    serve: Serve, prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    row = {"id": "a", "turns": ["one"], "chat_template_kwargs": {"enable_thinking": True}}
    run = settings(server, prompts(row, "two"), thinking="off")
    assert regenerate(run) == 1
    assert "enable_thinking True, and the command says False: a " in caplog.text
    assert server.asked() == {"two": 1}


def test_a_call_in_the_middle_of_a_row_has_no_result(serve: Serve, prompts: Prompts) -> None:
    run = settings(serve(), prompts({"id": "a", "turns": ["one CALL", "two"], "tools": [TOOL]}, "three"))
    with pytest.raises(ServerError, match="the target calls a tool, and the row has no result for it: a"):
        regenerate(run)
    assert set(rows_of(run.out)) == {"p/1"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "Narrator", "content": "x"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "thinking": "y"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}], "functions": [1]},
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]},
        {"prompt": "q", "completion": "x"},
    ],
)
def test_asking_and_training_refuse_a_row_for_the_same_reason(row: dict[str, Any], prompts: Prompts) -> None:
    file = prompts(row)
    with pytest.raises(DataError) as trained:
        load_conversations(file, toy_tokenizer(), max_length=99, min_answer_tokens=1)
    with pytest.raises(DataError) as asked:
        read_prompts([str(file)])
    reason = trained.value.found.partition("(")[2]
    assert reason and reason in asked.value.found


def test_answers_can_be_trained_on(serve: Serve, prompts: Prompts) -> None:
    run = settings(serve(), prompts("one"))
    regenerate(run)
    [conversation] = load_conversations(run.out, toy_tokenizer(), max_length=9, min_answer_tokens=3).conversations
    assert conversation.input_ids == [1, 1, 7, 8, 9]
    assert conversation.loss_mask == [False, False, True, True, True]


def test_many_requests_are_in_flight(serve: Serve, prompts: Prompts) -> None:
    server = serve(together=6)
    regenerate(settings(server, prompts(*map(str, range(20))), concurrency=6))
    assert server.most_in_flight == 6


KILLED = """
import os, signal, sys
from sglang_auf import cli

append, write = 4, os.write

def torn_write(descriptor, data):
    global append
    append -= 1
    if append:
        return write(descriptor, data)
    write(descriptor, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

os.write = torn_write
cli.main(sys.argv[1:])
"""


def test_kill_in_the_middle_of_a_write_loses_and_repeats_no_row(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    run = settings(server, prompts(*(f"question {i}" for i in range(8))), concurrency=2)
    flags = ["regenerate", *run.inputs, "--base-url", server.url, "--out", str(run.out), "--concurrency", "2"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *flags], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    torn = run.out.read_bytes()
    assert torn.count(b"\n") == 3
    assert not torn.endswith(b"\n")
    kept = {json.loads(line)["id"] for line in torn.splitlines()[:3]}
    server.requests.clear()

    assert cli.main(flags) == 0
    resumed = rows_of(run.out)
    assert run.out.read_bytes().startswith(torn[: torn.rindex(b"\n") + 1])
    assert server.asked() == {f"question {i}": 1 for i in range(8) if f"p/{i}" not in kept}
    whole = settings(server, Path(run.inputs[0]), out=run.out.with_name("whole.jsonl"))
    regenerate(whole)
    assert resumed == rows_of(whole.out)
    server.requests.clear()
    assert regenerate(run) == 8
    assert not server.requests


@pytest.mark.parametrize(
    "change", [{"temperature": 1.0}, {"seed": 7}, {"max_tokens": 5}, {"thinking": "on"}, {"model": "b"}]
)
def test_file_made_with_other_settings_is_not_continued(serve: Serve, prompts: Prompts, change: dict[str, Any]) -> None:
    run = settings(serve(), prompts("one"))
    regenerate(run)
    before = run.out.read_bytes()
    [(name, value)] = change.items()
    with pytest.raises(DataError, match=rf"{name} was .* and is {value}"):
        regenerate(run.model_copy(update=change))
    assert run.out.read_bytes() == before


def test_file_of_other_prompts_or_of_unknown_origin_is_not_continued(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    run = settings(server, prompts("one"))
    regenerate(run)
    prompts("another one")
    with pytest.raises(DataError, match="input_sha256"):
        regenerate(run)
    manifest_path(run.out).write_text("{")
    with pytest.raises(DataError, match="manifest"):
        regenerate(run)
    manifest_path(run.out).unlink()
    with pytest.raises(DataError, match=r"no answers.jsonl.manifest.json says what made them"):
        regenerate(run)


def test_a_version_that_names_rows_otherwise_does_not_continue_the_file(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would ask all of them again."""
    file = tmp_path / "nameless.jsonl"
    file.write_text(json.dumps({"turns": ["one"]}))
    run = settings(serve(), file)
    regenerate(run)
    monkeypatch.setattr(rows, "ID_LENGTH", rows.ID_LENGTH - 1)
    with pytest.raises(DataError, match="input_sha256"):
        regenerate(run)


def test_raised_limit_continues_the_file(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    file = prompts(*map(str, range(5)))
    assert regenerate(settings(server, file, limit=2)) == 2
    assert set(server.asked()) == {"0", "1"}
    assert regenerate(settings(server, file)) == 5
    assert server.asked() == dict.fromkeys("01234", 1)


def test_the_limit_holds_for_each_input(serve: Serve, prompts: Prompts, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"turns": [f"other {i}"]}) + "\n" for i in range(3)))
    server, file = serve(), prompts(*map(str, range(5)))
    run = settings(server, file, limit=2)
    assert regenerate(run.model_copy(update={"inputs": (*run.inputs, str(other))})) == 4
    assert set(server.asked()) == {"0", "1", "other 0", "other 1"}


def test_failed_rows_are_named_and_the_others_kept(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    run = settings(server, prompts("one", "two ABORT", "three", "four REFUSE"))
    with pytest.raises(ServerError) as failure:
        regenerate(run)
    assert "2 rows failed" in failure.value.found
    assert "finish_reason 'abort': p/1" in failure.value.found
    assert re.search(r"refused with status 400.*no such thing.*: p/3", failure.value.found)
    assert set(rows_of(run.out)) == {"p/0", "p/2"}
    server.requests.clear()
    with pytest.raises(ServerError):
        regenerate(run)
    assert set(server.asked()) == {"two ABORT", "four REFUSE"}


def test_row_fails_as_a_whole_if_a_later_turn_does(serve: Serve, prompts: Prompts) -> None:
    run = settings(serve(), prompts({"id": "a", "turns": ["one", "two ABORT"]}, "three"))
    with pytest.raises(ServerError, match="finish_reason 'abort': a;"):
        regenerate(run)
    assert set(rows_of(run.out)) == {"p/1"}


def test_failures_that_pass_are_tried_again(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    assert regenerate(settings(server, prompts("one BUSY", "two"))) == 2
    assert server.asked() == {"one BUSY": 2, "two": 1}


def test_server_that_stays_down_ends_the_run_early(serve: Serve, prompts: Prompts) -> None:
    server = serve()
    file = prompts(*(f"question {i}" for i in range(100)))
    regenerate(settings(server, file, limit=3))
    server.down = True
    server.requests.clear()
    with pytest.raises(ServerError, match=f"{GIVE_UP_AFTER} rows in a row without an answer") as failure:
        regenerate(settings(server, file, concurrency=4))
    assert "the 3 rows" in failure.value.remedy
    assert len(server.requests) < 3 * (GIVE_UP_AFTER + 4)
    assert max(server.asked().values()) == 3  # once, and two retries


def test_no_server(prompts: Prompts) -> None:
    file = prompts("one")
    with pytest.raises(ServerError, match="Connection"):
        regenerate(settings(Server(url="http://127.0.0.1:9"), file, retries=0))
    assert not file.with_name("answers.jsonl").exists()


@pytest.mark.parametrize("models", [[], ["a", "b"]])
def test_model_has_to_be_named_unless_there_is_one(serve: Serve, prompts: Prompts, models: list[str]) -> None:
    server = serve(models=models)
    file = prompts("one")
    with pytest.raises(ConfigError, match="a, b" if models else "no model"):
        regenerate(settings(server, file))
    regenerate(settings(server, file, model="b"))
    assert server.requests[0]["model"] == "b"


def test_server_that_refuses_unknown_fields(serve: Serve, prompts: Prompts, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(strict=True)
    run = settings(server, prompts("one", "two", "three REFUSE"), thinking="off", concurrency=1)
    with pytest.raises(ServerError, match=r"refused with status 400.*: p/2"):
        regenerate(run)
    assert [set(row) for row in rows_of(run.out).values()] == [
        {"id", "messages", "finish_reason", "chat_template_kwargs"}
    ] * 2
    assert server.asked() == {"one": 2, "two": 1, "three REFUSE": 1}
    assert all(request["chat_template_kwargs"] == {"enable_thinking": False} for request in server.requests)
    assert [record.message[:33] for record in caplog.records if record.levelname == "WARNING"] == [
        "the server refuses the request fi"
    ]


def test_refused_question_does_not_turn_exact_ids_off(serve: Serve, prompts: Prompts) -> None:
    run = settings(serve(), prompts("one REFUSE", "two"), concurrency=1)
    with pytest.raises(ServerError):
        regenerate(run)
    assert rows_of(run.out)["p/1"]["response_ids"] == [7, 8, 9]


def test_every_request_has_a_seed_of_its_own_and_the_same_one_again(serve: Serve, prompts: Prompts) -> None:
    def seeds(**more: Any) -> dict[str, int]:
        server = serve()
        file = prompts("one", {"id": "b", "turns": ["two", "three"]})
        run = settings(server, file, out=file.with_name(f"{server.url[-5:]}.jsonl"), temperature=1.0, **more)
        regenerate(run)
        return {request["messages"][-1]["content"]: request["seed"] for request in server.requests}

    first = seeds()
    assert len(set(first.values())) == 3
    assert seeds() == first
    assert not set(seeds(seed=1).values()) & set(first.values())


def test_rows_that_cannot_be_asked_are_named_and_left_out(
    serve: Serve, prompts: Prompts, caplog: pytest.LogCaptureFixture
) -> None:
    tool = {"id": "t", "messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}
    run = settings(
        serve(), prompts("one", tool, {"id": "e", "turns": [" "]}, {"id": "a", "conversations": [{}]}, "two")
    )
    assert regenerate(run) == 2
    (warning,) = (record.getMessage() for record in caplog.records if "cannot be asked" in record.getMessage())
    assert warning.startswith("3 rows")
    for named in ("role 'tool'.*: t \\(prompts.jsonl:2\\)", "an empty message of a user: e ", "without a role: a "):
        assert re.search(named, warning)
    assert set(rows_of(run.out)) == {"p/0", "p/4"}
    with pytest.raises(DataError, match=r"no prompt in .*prompts.jsonl"):
        regenerate(settings(serve(), prompts(tool)))


def test_full_disk_keeps_all_rows(serve: Serve, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    run = settings(server, prompts(*map(str, range(6))), concurrency=2)
    write, written = os.write, 0

    def write_until_full(descriptor: int, data: bytes) -> int:
        nonlocal written
        written += 1
        if written == 3:
            return write(descriptor, data[:20])
        if written > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(output_file.os, "write", write_until_full)
    with pytest.raises(DataError, match="No space left on device; its 2 rows are kept"):
        regenerate(run)
    monkeypatch.undo()
    assert len(rows_of(run.out)) == 2
    assert regenerate(run) == 6


def test_command_line(
    serve: Serve, prompts: Prompts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    file = prompts("one", "two REFUSE")
    out = file.with_name("cli.jsonl")
    flags = ["regenerate", str(file), "--base-url", f"{server.url}/v1/", "--out", str(out), "--temperature", "0.5"]
    assert cli.main([*flags, "--limit", "1"]) == 0
    assert capsys.readouterr().out == f"1 rows in {out}\n"
    assert server.keys == {"Bearer sesame"}
    assert cli.main(flags) == 2
    assert "p/1" in capsys.readouterr().err
    assert json.loads(manifest_path(out).read_text())["temperature"] == 0.5


@pytest.mark.parametrize(
    "flag", [["--temperature", "-1"], ["--concurrency", "0"], ["--max-tokens", "many"], ["--base-url", "localhost:1"]]
)
def test_wrong_values(tmp_path: Path, flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["regenerate", "prompts.jsonl", "--base-url", "http://x", "--out", str(tmp_path / "o.jsonl"), *flag]
    assert cli.main(arguments) == 2
    name, value = flag
    assert re.match(f"sglang-auf regenerate: found: {name} '?{value}'?;", capsys.readouterr().err)


def test_help_names_the_defaults_that_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["regenerate", "--help"])
    shown = re.findall(r"--([\w-]+) \S+\s+[^-]*?\(default:\s+([\w.]+)\)", capsys.readouterr().out)
    named = {flag.replace("-", "_"): value for flag, value in shown}
    fields = RegenerateSettings.model_fields
    assert set(named) == {name for name, info in fields.items() if not info.is_required() and info.default is not None}
    assert named == {name: str(fields[name].default) for name in named}
