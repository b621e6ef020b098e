"""A server that records: its answers are on the disk, also after SIGTERM in the middle, and a drafter learns."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.cli import main as benchmark
from benchmarks.harness.records import read_records
from sglang_auf.recording.ring import row_files
from sglang_auf.training.adapt.adapt import adapt
from sglang_auf.training.adapt.settings import AdaptSettings
from tests.support.tiny_models import write_drafter, write_target
from tests.support.toy_tokenizer import toy_tokenizer

pytestmark = pytest.mark.e2e

VOCABULARY = 264
OFF = {"X-SGLang-AUF-Record": "off"}


def replay(url: str, rows: Path, out: Path) -> list[tuple[list[int] | None, list[int] | None]]:
    """Ask a server what it has recorded, greedily: (prompt, answer) of each row, as token ids."""
    flags = ["--prompts", str(rows), "--max-tokens", "24", "--concurrency", "2"]
    assert benchmark(["run", "--base-url", url, *flags, "--out", str(out)]) == 0
    records = read_records(out / "records.jsonl")
    assert any(record.cached_tokens for record in records), "the server has seen these prompts"
    assert all(record.output_text == "" and record.verify_steps for record in records if record.completion_tokens > 1)
    return [(record.prompt_ids, record.output_ids) for record in records]


def test_what_is_answered_is_recorded_and_learnt_from(tmp_path: Path, start_server: Any) -> None:
    target = write_target(tmp_path / "target", vocabulary=VOCABULARY)
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(target)
    drafter = write_drafter(tmp_path / "drafter", vocabulary=VOCABULARY)
    arguments = ["server", "--profile", "smollm2-135m", "--set", f"target={target}", "--set", f"drafter={drafter}"]
    more = ("tree_nodes=3", "server_args.context_length=256", "server_args.enable_cache_report=true")
    for setting in (f"record.directory={tmp_path / 'rows'}", *more):
        arguments += ["--set", setting]
    expected: list[tuple[list[int], list[int]]] = []

    def ask(client: httpx.Client, prompt: str, tokens: int, **headers: Any) -> list[int]:
        body = {"text": prompt, "sampling_params": {"max_new_tokens": tokens, "temperature": 0}}
        reply = client.post("/generate", json=body, **headers).raise_for_status().json()
        output: list[int] = reply["output_ids"]
        return output

    with start_server(arguments, tmp_path / "log") as (url, process), httpx.Client(base_url=url, timeout=300) as client:
        for number in range(30):
            prompt = f"question {number * 37}"
            expected.append((tokenizer(prompt)["input_ids"], ask(client, prompt, 24)))
        ask(client, "nobody's business", 24, headers=OFF)
        chat = {"model": target.name, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 16}
        client.post("/v1/chat/completions", json=chat | {"n": 2, "temperature": 1.0}).raise_for_status()
        with client.stream("POST", "/v1/chat/completions", json=chat | {"stream": True, "seed": 7}) as reply:
            assert reply.read()
        figures = client.get("/v1/auf/recording").raise_for_status().json()["recording"]
        assert figures["directory"] == str(tmp_path / "rows")
        assert figures["dropped"]["refused"] == 1
        while client.get("/v1/auf/recording").json()["recording"]["waiting_tokens"]:
            time.sleep(0.05)
        recorded = client.get("/v1/auf/recording").json()["recording"]["recorded"]
        replayed = replay(url, tmp_path / "rows", tmp_path / "replayed")
        assert len(replayed) == recorded
        for prompt, answer in expected:
            assert len(answer) < 2 or (prompt, answer) in replayed
        figures = client.get("/v1/auf/recording").json()["recording"]
        assert (figures["recorded"], figures["waiting_tokens"]) == (recorded, 0), "nothing is recorded twice"
        with ThreadPoolExecutor(1) as other:
            last = other.submit(ask, client, "the last one", 200)
            while client.get("/v1/auf/load").json()["running"] == 0 and not last.done():
                pass
            process.send_signal(signal.SIGTERM)
            expected.append((tokenizer("the last one")["input_ids"], last.result()))
        assert process.wait(timeout=120) == 0

    lines = [line for file in row_files(tmp_path / "rows") for line in file.read_text().splitlines()]
    rows = [(row["prompt_ids"], row["response_ids"]) for row in map(json.loads, lines)]
    for prompt, answer in expected:
        assert len(answer) < 2 or (prompt, answer) in rows
    hidden = tokenizer("nobody's business")["input_ids"]
    assert all(prompt != hidden for prompt, _ in rows)
    assert len(rows) > len([answer for _, answer in expected if len(answer) > 1]), "the chats too"

    settings = {"drafter": str(drafter), "recorded": tmp_path / "rows", "out": tmp_path / "new", "target": str(target)}
    outcome = adapt(AdaptSettings.model_validate(settings | {"min_rows": 20, "steps": 20, "held_out": 0.3}))
    assert outcome.comparison is not None and outcome.comparison.answers >= 6
    assert (tmp_path / "new").exists() is outcome.comparison.better is (outcome.exit_code == 0)
