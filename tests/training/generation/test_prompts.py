"""What `prompts` asks for, keeps, continues and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from sglang_auf import cli
from sglang_auf.errors import DataError, ServerError
from sglang_auf.training.generation.prompts import USELESS_IN_A_ROW, write_prompts
from sglang_auf.training.generation.regenerate import read_prompts
from sglang_auf.training.generation.settings import PromptSettings
from sglang_auf.training.generation.workers import GIVE_UP_AFTER
from tests.support.http_servers import serving
from tests.support.toy_tokenizer import toy_tokenizer


@dataclass
class Server:
    """A completions route. says: (text, finish_reason) of the n-th request, or None for a 400."""

    says: Callable[[int], tuple[str, str] | None]
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def reply(self, request: Request) -> Response:
        self.requests.append(await request.json())
        said = self.says(len(self.requests) - 1)
        if said is None:
            return JSONResponse({"message": "no such thing"}, 400)
        choice = {"index": 0, "text": said[0], "finish_reason": said[1], "logprobs": None}
        usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        body = {"id": "x", "object": "text_completion", "created": 0, "model": "toy", "choices": [choice]}
        return JSONResponse(body | {"usage": usage})


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as running:

        def start(says: Callable[[int], tuple[str, str] | None]) -> Server:
            server, app = Server(says), FastAPI()
            app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": "toy"}]})
            app.post("/v1/completions")(server.reply)
            server.url = running.enter_context(serving(app))
            return server

        yield start


def settings(server: Server, tmp_path: Path, **more: Any) -> PromptSettings:
    values = {"target": "toy", "out": tmp_path / "prompts.jsonl", "base_url": server.url, "count": 6, "concurrency": 2}
    return PromptSettings.model_validate(values | more)


def texts(file: Path) -> list[str]:
    return [json.loads(line)["turns"][0] for line in file.read_text().splitlines()]


def test_the_model_is_given_the_template_up_to_the_user_and_what_it_says_is_a_prompt(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server, tokenizer = serve(lambda n: (f" question {n}\n", "stop")), toy_tokenizer()
    wanted = settings(server, tmp_path)
    assert write_prompts(wanted, tokenizer)[1]["kept"] == 6
    assert sorted(texts(wanted.out)) == [f"question {n}" for n in range(6)]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
    opening = tokenizer(rendered[: rendered.index("question")], add_special_tokens=False)["input_ids"]
    assert opening
    assert all(request["prompt"] == opening for request in server.requests)
    assert all((request["temperature"], request["max_tokens"]) == (1.0, 256) for request in server.requests)
    seeds = {request["seed"] for request in server.requests}
    assert len(seeds) == len(server.requests) >= 6, "each has a stream of its own"
    assert len(read_prompts([str(wanted.out)]).prompts) == 6, "what regenerate reads"


def test_openings_are_given_in_turn_and_are_part_of_the_prompt(serve: Callable[..., Server], tmp_path: Path) -> None:
    server, tokenizer = serve(lambda n: (" \n" if n == 2 else f" of {n}?", "stop")), toy_tokenizer()
    wanted = settings(server, tmp_path, count=3, concurrency=1, opening=["What ", "Write"])
    assert write_prompts(wanted, tokenizer)[1] == {"kept": 3, "empty": 1}
    assert texts(wanted.out) == ["What of 0?", "Write of 1?", "Write of 3?"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
    users = [rendered[: rendered.index("question")] + opening for opening in ("What", "Write") * 2]
    asked = [request["prompt"] for request in server.requests]
    assert asked == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in users]
    with pytest.raises(DataError, match="input"):
        write_prompts(settings(server, tmp_path, count=9, opening=["What"]), tokenizer)


def test_what_is_cut_off_empty_or_there_already_is_not_kept_and_is_counted(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    said = [("once", "stop"), ("once", "stop"), ("long", "length"), (" \n", "stop"), ("twice", "stop")]
    wanted = settings(serve(lambda n: said[n]), tmp_path, count=2, concurrency=1)
    assert write_prompts(wanted, toy_tokenizer())[1] == {"kept": 2, "there already": 1, "cut off": 1, "empty": 1}
    assert texts(wanted.out) == ["once", "twice"]


def test_a_file_that_is_full_is_the_end_whatever_is_still_in_flight(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    concurrency = USELESS_IN_A_ROW + 60
    rows, outcomes = write_prompts(
        settings(serve(lambda n: (f"{n}", "stop")), tmp_path, count=concurrency + 1, concurrency=concurrency),
        toy_tokenizer(),
    )
    assert outcomes["kept"] == rows == concurrency + 1 == len(texts(tmp_path / "prompts.jsonl"))


@pytest.mark.parametrize("own_end", [True, False])
def test_a_text_ends_with_the_users_turn_also_where_the_model_would_go_on(
    own_end: bool, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server, tokenizer = serve(lambda n: (f"{n}", "stop")), toy_tokenizer()
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
    end = tokenizer(rendered.split("question")[1], add_special_tokens=False)["input_ids"][0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end if own_end else end + 1)
    write_prompts(settings(server, tmp_path), tokenizer)
    assert all(request.get("stop_token_ids") == (None if own_end else [end]) for request in server.requests)


def test_a_later_run_goes_on_with_new_seeds_and_knows_what_is_there(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(lambda n: (["a", "b", "a", "c"][n], "stop"))
    write_prompts(settings(server, tmp_path, count=2, concurrency=1), toy_tokenizer())
    again = write_prompts(settings(server, tmp_path, count=3, concurrency=1), toy_tokenizer())
    assert again == (3, {"there already": 1, "kept": 1})
    assert texts(tmp_path / "prompts.jsonl") == ["a", "b", "c"]
    assert len({request["seed"] for request in server.requests}) == 4
    for count in (3, 1):
        assert write_prompts(settings(server, tmp_path, count=count), toy_tokenizer()) == (3, {})
    assert len(server.requests) == 4, "a file that has them all asks nothing"


def test_a_file_made_otherwise_is_not_continued(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda n: (f"{n}", "stop"))
    write_prompts(settings(server, tmp_path), toy_tokenizer())
    with pytest.raises(DataError, match=r"temperature was 1\.0 and is 0\.5"):
        write_prompts(settings(server, tmp_path, count=9, temperature=0.5), toy_tokenizer())
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "mine/1", "turns": ["x"]}\n')
    with pytest.raises(DataError, match="other rows"):
        write_prompts(settings(server, tmp_path), toy_tokenizer())


def test_a_model_that_does_not_write_prompts_is_given_up(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda n: ("first", "stop") if n == 0 else ("and on and on", "length"))
    with pytest.raises(DataError, match=f"{USELESS_IN_A_ROW} texts in a row of no use .* cut off"):
        write_prompts(settings(server, tmp_path), toy_tokenizer())
    assert texts(tmp_path / "prompts.jsonl") == ["first"]


def test_a_server_that_refuses_is_given_up_and_what_is_there_is_kept(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(lambda n: ("first", "stop") if n == 0 else None)
    with pytest.raises(ServerError, match=f"{GIVE_UP_AFTER} requests in a row failed.* refused with status 400"):
        write_prompts(settings(server, tmp_path, concurrency=1), toy_tokenizer())
    assert texts(tmp_path / "prompts.jsonl") == ["first"]


def test_a_text_that_the_server_gave_up_is_a_failure_of_the_server(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match="finish_reason 'abort'"):
        write_prompts(settings(serve(lambda n: ("half a", "abort")), tmp_path), toy_tokenizer())


def test_a_template_without_a_place_for_the_user_is_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
    tokenizer = toy_tokenizer()
    for template in ("{{ messages[0].content }}", "always the same"):
        tokenizer.chat_template = template
        with pytest.raises(DataError, match="chat template"):
            write_prompts(settings(serve(lambda n: None), tmp_path), tokenizer)


@pytest.mark.parametrize(
    ("flag", "value"), [("--count", "0"), ("--temperature", "0"), ("--base-url", "nowhere"), ("--opening", " ")]
)
def test_impossible_flags_name_themselves(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"--base-url": "http://127.0.0.1:1", "--out": "prompts.jsonl", "--count": "3"} | {flag: value}
    assert cli.main(["prompts", "toy", *(part for pair in flags.items() for part in pair)]) == 2
    assert re.search(f"{flag} '?{value}", capsys.readouterr().err)
