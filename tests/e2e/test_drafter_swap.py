"""Another drafter in the place of the running one, under load: answers are plain decoding's before, during and after.

Engines of a tiny model, and the shipped profile over HTTP with drafters made from the shipped one.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.template_prompts import demo_prompts
from server.drafters import LOOKS
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary, write
from sglang_auf.env import CPU_OVERLAP, TREE_NODES
from tests.e2e.test_identity import GREEDY, prompts, tokens
from tests.support.engines import ONE_THREAD, run_engine
from tests.support.streams import events
from tests.support.tiny_models import write_drafter

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "drafters" / "smollm2-135m"
MODEL, KEY = "smollm2-135m", "a-key"


def test_answers_of_a_swap_under_load_are_plain_decodings(tiny_target: Path, tmp_path: Path) -> None:
    """The first drafter drafts a token that no answer has, the second one the token that answers have most."""
    inputs = prompts(32)
    lengths = [GREEDY | {"max_new_tokens": 24 + 11 * (number % 9)} for number in range(len(inputs))]
    load = {"inputs": inputs, "sampling": lengths, "concurrency": 12}
    engine = {"model_path": str(tiny_target), "context_length": 256}
    [plain] = run_engine(tmp_path / "plain", engine, [load | {"concurrency": 1}])
    counted = Counter(token for answer in tokens(plain) for token in answer)
    never = min(range(4, 64), key=lambda token: counted[token])
    bad, good = write_drafter(tmp_path / "bad"), write_drafter(tmp_path / "good", seed=5)
    write(DraftVocabulary(tokens=(never,)), bad)
    write(DraftVocabulary(tokens=(counted.most_common(1)[0][0],)), good)
    for overlap in ("0", "1"):
        arguments = engine | {"speculative_algorithm": "AUF", "speculative_draft_model_path": str(bad)}
        environment = {CPU_OVERLAP.name: overlap, TREE_NODES: "1"}
        swaps = {"swaps": [str(good), str(bad), str(good)]}
        before, during, after = run_engine(
            tmp_path / f"overlap-{overlap}", arguments, [load, load | swaps, load], **environment
        )
        answers, swapped = during[: len(inputs)], during[len(inputs) :]
        assert sum(reply["swap"]["requeued"] for reply in swapped) > 3, "no requests were in flight"
        for found in (before, answers, after):
            assert tokens(found) == tokens(plain)
        # Of prefixes that the cache knew before the swaps, and of prompts that it did not.
        assert accepted(before) < accepted(after), "the drafts are those of the drafter that was swapped in"


def accepted(answers: list[dict[str, Any]]) -> int:
    return sum(answer["meta"]["spec_num_correct_drafts"] for answer in answers)


class Server:
    """The shipped profile with its management routes open."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self.process, self.log = url, process, log
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300)

    def swap(self, path: Path | str) -> httpx.Response:
        return self.http.post("/v1/auf/drafter", json={"path": str(path)})

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/v1/auf/card").raise_for_status().json()["swap"]
        return found

    def ask(self, number: int, max_tokens: int = 24) -> str:
        """A greedy answer, to every other prompt as a stream. Prompts repeat, so that prefixes are in the cache."""
        body = {"model": MODEL, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": number % 2 == 1, "messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}]}
        reply = self.http.post("/v1/chat/completions", json=body).raise_for_status()
        if number % 2 == 0:
            return str(reply.json()["choices"][0]["message"]["content"])
        return "".join(
            choice["delta"].get("content") or "" for chunk in events(reply.text) for choice in chunk["choices"]
        )

    def load(self, requests: int, max_tokens: int = 24) -> list[str]:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda number: self.ask(number, max_tokens), range(requests)))


PROMPTS = [str(row["turns"][0]) for row in demo_prompts(10)]  # type: ignore[index]
ARGUMENTS = ["server", "--profile", MODEL, "--api-key", KEY, "--set", "server_args.max_total_tokens=8192"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, start_server: Any) -> list[str]:
    log = tmp_path_factory.mktemp("plain") / "log"
    with start_server([*ARGUMENTS, "--plain"], log, **ONE_THREAD) as (url, process):
        return Server(url, process, log).load(len(PROMPTS))


@pytest.fixture(scope="module")
def server(plain: list[str], tmp_path_factory: pytest.TempPathFactory, start_server: Any) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--set", "management=true", "--set", "tree_nodes=7", "--set", "server_args.enable_metrics=true"]
    with start_server([*ARGUMENTS, *options], log, **ONE_THREAD) as (url, process):
        yield Server(url, process, log)


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A copy of the shipped drafter, with changes to its config.json and a function of its weights."""

    def make(change: Callable[[torch.Tensor], torch.Tensor] | None = None, **config: Any) -> Path:
        path = tmp_path_factory.mktemp("candidate") / "drafter"
        shutil.copytree(SHIPPED, path)
        if config:
            (path / "auf_card.json").unlink()
            file = path / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | config))
        if change is not None:
            file = path / "model.safetensors"
            weights = {name: change(weight).contiguous() for name, weight in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
        return path

    return make


def shuffled(weight: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(3))
    return weight.flatten()[order].view(weight.shape)


def test_what_cannot_take_the_place_is_refused_and_nothing_changes(
    server: Server, plain: list[str], candidate: Callable[..., Path], tmp_path: Path
) -> None:
    truncated = candidate()
    with (truncated / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    diverged = candidate(lambda weight: weight * float("nan"))
    deep = candidate(num_hidden_layers=1, layer_types=["full_attention"])
    taps = candidate(dflash_config={"mask_token_id": 3, "target_layer_ids": [7, 20, 27]})
    for path, says in (
        (tmp_path / "nowhere", "absolute path"),
        (f"{MODEL}", "absolute path"),
        ("/" + "x" * 4000, "absolute path"),
        (tmp_path, "config.json"),
        (truncated, "truncated"),
        (diverged, "NaN"),
        (deep, "layers.1."),
        (taps, "target_layer_ids"),
        (candidate(block_size=4), "block_size 4 where the running drafter has 8"),
        (candidate(rope_theta=10000.0), "rope_theta"),
    ):
        refused = server.swap(path)
        assert (refused.status_code, says in refused.text) == (400, True), refused.text
    assert server.http.post("/v1/auf/drafter", json={"path": str(SHIPPED), "force": True}).status_code == 400
    assert httpx.post(f"{server.url}/v1/auf/drafter", json={"path": str(SHIPPED)}).status_code == 401
    assert server.state()["generation"] == 0
    assert server.load(4) == plain[:4]


def test_new_weights_are_refused_and_the_server_goes_on(server: Server, plain: list[str]) -> None:
    """Products hold them in an order of their own."""
    target = server.http.get("/get_model_info").json()["model_path"]
    refused = server.http.post("/update_weights_from_disk", json={"model_path": target})
    assert (refused.status_code, refused.json()["success"]) == (400, False)
    assert "start a server with the new ones" in refused.json()["message"]
    assert server.load(4) == plain[:4]


def test_a_bad_drafter_is_taken_back_by_the_server(
    server: Server, plain: list[str], candidate: Callable[..., Path]
) -> None:
    """Under load all the time, and every answer is plain decoding's. A swap while another one runs is refused."""
    began = server.state()
    assert (began["state"], began["path"]) == ("started", str(SHIPPED))
    assert server.load(LOOKS[0] + 5) == (plain * LOOKS[0])[: LOOKS[0] + 5]
    bad = candidate(shuffled)
    stop, wrong = threading.Event(), []

    def keep_asking(number: int) -> None:
        while not stop.is_set():
            if server.ask(number) != plain[number]:
                wrong.append(number)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        try:
            asked = [pool.submit(keep_asking, number) for number in range(8)]
            replies = list(pool.map(server.swap, [bad] * 4))
            assert {reply.status_code for reply in replies} == {200, 409}, [reply.text for reply in replies]
            swapped = [reply.json() for reply in replies if reply.status_code == 200]
            last = {"generation": len(swapped), "state": "watching", "path": str(bad), "other": str(SHIPPED)}
            assert last.items() <= max(swapped, key=lambda reply: reply["generation"]).items()
            wait_for(lambda: server.state()["state"] == "taken back")
        finally:
            stop.set()
    assert [task.exception() for task in asked] == [None] * 8
    assert wrong == []
    found = server.state()
    assert (found["generation"], found["path"], found["other"]) == (len(swapped) + 1, str(SHIPPED), str(bad))
    assert found["before"]["tau"] > found["after"]["tau"] >= 1
    assert f"with {bad}; generation {len(swapped) + 1} is {SHIPPED} again" in server.log.read_text()
    counted = server.http.get("/metrics").text
    assert f'auf_drafter_swaps_total{{model_name="smollm2-135m"}} {len(swapped)}.0' in counted
    assert 'auf_drafter_taken_back_total{model_name="smollm2-135m"} 1.0' in counted
    assert server.load(len(plain)) == plain


def test_a_drafter_that_is_as_good_is_kept(server: Server, plain: list[str], candidate: Callable[..., Path]) -> None:
    same = candidate()
    (same / "draft_vocabulary.json").unlink()
    server.load(LOOKS[0])
    assert server.swap(same).raise_for_status().json()["state"] == "watching"
    assert server.http.get("/v1/auf/card").json()["draft_vocabulary"] is None

    def judged() -> bool:
        assert server.load(len(plain)) == plain
        return server.state()["state"] != "watching"

    wait_for(judged)
    found = server.state()
    assert found["after"]["requests"] == LOOKS[-1]
    assert (found["state"], found["path"], found["other"]) == ("kept", str(same), None)


def test_sigterm_in_the_middle_of_a_swap_loses_no_answer(
    server: Server, plain: list[str], candidate: Callable[..., Path]
) -> None:
    """Runs last: the server finishes what it has begun, the swap too, and ends with 0."""
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(server.ask, number, 200) for number in range(8)]
        wait_for(lambda: server.http.get("/v1/auf/load").json()["running"] == 8)
        swap = pool.submit(server.swap, candidate())
        os.kill(server.process.pid, signal.SIGTERM)
        assert [answer.result()[: len(text)] for answer, text in zip(answers, plain, strict=False)] == plain[:8]
        assert swap.result().status_code in (200, 503), "503: it came after the signal"
    assert server.process.wait(timeout=120) == 0


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
