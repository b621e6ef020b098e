"""Which answers SGLang's own server hands to the recorder, over scripted ones; and which it does not."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from sglang_auf.recording import capture
from sglang_auf.recording.capture import _note_prompt, _receive, allowed
from sglang_auf.recording.recorder import Recorder
from sglang_auf.recording.ring import row_files
from sglang_auf.recording.settings import RecordSettings
from tests.support.scripted_server import WORDS
from tests.support.tiny_models import write_target

OFF = {"X-SGLang-AUF-Record": "off"}


def ids(prompt: str) -> list[int]:
    return [WORDS.index(word) for word in prompt.split()]


class Served:
    """The scripted server (see scripted_server.py for what a prompt means), and what its recording grew by."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=address, timeout=60)
        self.before = self.read()

    def read(self) -> dict[str, Any]:
        """What is recorded, when nothing waits to be written."""
        deadline = time.monotonic() + 60
        while True:
            figures: dict[str, Any] = self.client.get("/recording").raise_for_status().json()
            if not figures["waiting_tokens"]:
                return figures
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def rows(self) -> list[tuple[list[int], int]]:
        """(prompt, tokens of the answer) of the new rows."""
        after = self.read()
        lines = [line for file in row_files(Path(after["directory"])) for line in file.read_text().splitlines()]
        found = [json.loads(line) for line in lines[self.before["rows"] :]]
        return [(row["prompt_ids"], len(row["response_ids"])) for row in found]

    def dropped(self) -> dict[str, int]:
        counts = Counter(self.read()["dropped"])
        counts.subtract(self.before["dropped"])
        return {reason: count for reason, count in counts.items() if count}

    def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> str:
        return self.client.post(path, json=body, headers=headers).raise_for_status().text


@pytest.fixture
def served(scripted_server: str) -> Iterator[Served]:
    served = Served(scripted_server)
    yield served
    served.client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_every_route_is_recorded_streamed_or_not(served: Served, stream: bool) -> None:
    last = "5" if stream else "4"
    served.post("/generate", text=f"3 0 {last}", stream=stream)
    served.post("/v1/completions", model="scripted", prompt=f"2 2 {last}", stream=stream)
    chat = [{"role": "user", "content": f"1 1 {last}"}]
    served.post("/v1/chat/completions", model="scripted", messages=chat, stream=stream)
    drafts = int(last)
    assert served.rows() == [
        (ids(f"3 0 {last}"), 1 + 4 + 1 + drafts + 1),
        (ids(f"2 2 {last}"), 1 + 3 + 3 + drafts + 1),
        (ids(f"1 1 {last}"), 1 + 2 + 2 + drafts + 1),
    ]
    assert served.dropped() == {}


@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_is_a_row_and_the_prefill_before_them_is_none(served: Served, stream: bool) -> None:
    prompt = f"3 next 1 next {6 if stream else 7}"
    served.post("/v1/completions", model="scripted", prompt=prompt, n=3, stream=stream)
    assert sorted(served.rows()) == sorted((ids(prompt), length) for length in (5, 3, 8 if stream else 9))
    assert served.dropped() == {}


def test_lists_of_prompts_as_text_and_as_tokens(served: Served) -> None:
    served.post("/v1/completions", model="scripted", prompt=["0 1 2", "0 1 3"])
    served.post("/v1/completions", model="scripted", prompt=[ids("0 1 4"), ids("0 1 5")])  # sent as one batch
    served.post("/generate", input_ids=[ids("0 1 6"), ids("0 1 7")])
    assert sorted(served.rows()) == [(ids(f"0 1 {drafts}"), 1 + 1 + 2 + drafts + 1) for drafts in range(2, 8)]


def test_a_request_refuses(served: Served) -> None:
    chat = [{"role": "user", "content": "2 3"}]
    served.post("/generate", OFF, text="2 3")
    served.post("/v1/chat/completions", OFF, model="scripted", messages=chat, stream=True)
    served.post("/v1/completions", OFF, model="scripted", prompt=[ids("2 3"), ids("3 2")], n=2)
    served.post("/generate", {"X-SGLang-AUF-Record": "no"}, text="2 3")
    served.post("/generate", text=["2 3", "3 2"], no_logs=True)
    assert (served.rows(), served.dropped()) == ([], {"refused": 1 + 1 + 4 + 1 + 2})
    served.post("/generate", {"X-SGLang-AUF-Record": "On"}, text="2 3")
    assert served.rows() == [(ids("2 3"), 1 + 3 + 4)]


def test_aborted_answers_are_counted_and_not_kept(served: Served) -> None:
    served.post("/generate", text="5 abort")
    served.client.post("/generate", json={"text": "queue"})
    assert (served.rows(), served.dropped()) == ([], {"unfinished": 1})


def test_health_checks_are_nobodys_answers(served: Served) -> None:
    served.client.get("/health_generate").raise_for_status()
    served.post("/generate", text="6 6", log_metrics=False)
    assert (served.rows(), served.dropped()) == ([], {})


def test_what_is_no_plain_conversation_is_counted(served: Served) -> None:
    served.post("/generate", text="4 4", sampling_params={"ignore_eos": True})
    assert (served.rows(), served.dropped()) == ([], {"unusable": 1})


def test_nothing_of_a_finished_request_stays_in_memory_and_tau_is_as_before(served: Served) -> None:
    reply = json.loads(served.post("/v1/completions", model="scripted", prompt="7 0 7"))
    assert reply["usage"]["completion_tokens"] == 1 + 8 + 1 + 8
    assert "prompt_token_ids" not in json.dumps(reply)


# The parts alone


def request(rid: str, **changes: Any) -> Any:
    settings = SimpleNamespace(max_new_tokens=8, ignore_eos=False)
    fields = dict.fromkeys(("mm_inputs", "session_id", "session_params", "lora_id"))
    given = {"rid": rid, "input_ids": [1, 2], "sampling_params": settings, "no_logs": False, **fields, **changes}
    return SimpleNamespace(**given)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A manager with 200 running requests, whose requests may be recorded with a share of 0.3."""
    recorder = Recorder.opened(
        RecordSettings(directory=str(tmp_path / "rows"), share=0.3), write_target(tmp_path / "target")
    )
    monkeypatch.setattr(capture, "_recorder", recorder)
    asked = SimpleNamespace(log_metrics=True, no_logs=False)
    states = {str(rid): SimpleNamespace(obj=asked, output_ids=[3]) for rid in range(200)}
    return SimpleNamespace(rid_to_state=states, recorder=recorder)


def note(manager: Any, consents: bool, **changes: Any) -> None:
    def act() -> None:
        allowed.set(consents)
        for rid in manager.rid_to_state:
            _note_prompt(manager, request(rid, **changes))

    copy_context().run(act)


def test_the_share_is_drawn(manager: Any) -> None:
    note(manager, consents=True)
    dropped = manager.recorder.snapshot()["dropped"]
    assert 100 < dropped["share"] < 180
    assert sum(hasattr(state, capture.PROMPT) for state in manager.rid_to_state.values()) == 200 - dropped["share"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mm_inputs": object()}, "unusable"),
        ({"session_id": "a"}, "unusable"),
        ({"session_params": object()}, "unusable"),
        ({"lora_id": "a"}, "unusable"),
    ],
)
def test_what_is_not_kept_is_counted(manager: Any, changes: dict[str, Any], reason: str) -> None:
    note(manager, consents=True, **changes)
    assert manager.recorder.snapshot()["dropped"][reason] == 200
    output = SimpleNamespace(rids=["0"], finished_reasons=[{"type": "stop"}], output_ids=[[4]])
    _receive(manager, output)
    assert manager.recorder.snapshot()["waiting_tokens"] == 0


def test_an_error_ends_the_recording_and_nothing_else(
    manager: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Recorder, "drop", lambda *_: 1 // 0)
    note(manager, consents=False)
    assert capture._recorder is None
    [said] = [record.getMessage() for record in caplog.records]
    assert "the recording in" in said and "has ended" in said
    assert manager.recorder.snapshot()["error"] == "the recorder failed, the server's log says why"


def test_nothing_is_noted_where_no_http_request_allowed_it(manager: Any) -> None:
    for rid in manager.rid_to_state:
        _note_prompt(manager, request(rid))
    assert manager.recorder.snapshot()["dropped"]["refused"] == 200
