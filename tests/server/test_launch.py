"""How a launch ends: SGLang's server is a stand-in, its signals are real."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import engine, http_server
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.utils.auth import add_api_key_middleware

from server import launch
from server.launch import Start, closed_because, run
from server.middleware import MAX_BODY
from server.preflight import ServedModel, Speculation
from server.probe import Probe
from server.profile import Profile
from sglang_auf.checkpoints.card import CheckedDrafter
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.env import BUNDLED, CPU_OVERLAP, TREE, TREE_NODES, tree_nodes
from sglang_auf.errors import ServerError
from sglang_auf.recording import capture
from sglang_auf.recording.recorder import THREAD as RECORDER
from sglang_auf.recording.recorder import Recorder
from sglang_auf.recording.ring import row_files
from sglang_auf.recording.settings import RecordSettings
from tests.server.test_routes import CARD
from tests.support.tiny_models import write_target

TARGET = TargetFacts("tiny", None, None, "llama", 64, 4, 100, "c0", None, 512, "bfloat16")
SERVED = ServedModel("small", TARGET, None)
OVERLAP_FLAG = "disable_overlap_schedule"
SERVER_ARGS: Any = SimpleNamespace(url=lambda: "http://127.0.0.1:30000")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The signal handlers of the test runner, back in place afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Sglang:
    """SGLang's side: its app, its manager, and a launch_server that does what a test asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = FastAPI()
        self.manager = SimpleNamespace(gracefully_exit=False, server_status=ServerStatus.Starting)
        self.swept: list[int] = []
        self.behaviour: Callable[..., None] = lambda **_: None
        monkeypatch.setattr(http_server, "app", self.app)
        monkeypatch.setattr(http_server, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=self.manager))
        monkeypatch.setattr(http_server, "launch_server", lambda _, **options: self.behaviour(**options))
        monkeypatch.setattr("sglang.srt.utils.kill_process_tree", lambda pid, include_parent: self.swept.append(pid))

    def run(self, behaviour: Callable[..., None]) -> None:
        self.behaviour = behaviour
        run(SERVER_ARGS, SERVED, None)

    def drained(self, **_: Any) -> None:
        """What SGLang does after SIGTERM."""
        self.manager.gracefully_exit = True


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Sglang:
    return Sglang(monkeypatch)


def probe_that(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    def outcome(self: Probe, needs_verify_steps: bool) -> int:
        if error is not None:
            raise error
        return 1

    monkeypatch.setattr(Probe, "run", outcome)


def test_drained_server_ends_well_and_sweeps(sglang: Sglang) -> None:
    sglang.run(sglang.drained)
    assert sglang.swept == [os.getpid()]


def test_routes_and_gate_are_in_place_before_the_port_opens(sglang: Sglang) -> None:
    replies: list[int] = []

    def look(**_: Any) -> None:
        client = TestClient(sglang.app)
        replies.append(client.get("/v1/auf/card").status_code)
        replies.append(client.post("/v1/chat/completions").status_code)
        sglang.drained()

    sglang.run(look)
    assert replies == [404, 503], "the plain server's 404, and the gate of a server that is starting"


@pytest.mark.parametrize(("management", "status"), [(False, 404), (True, 200)])
def test_management_routes_are_opened_by_the_profile_alone(management: bool, status: int, sglang: Sglang) -> None:
    @sglang.app.post("/update_weights_from_disk")
    async def answer() -> None: ...

    def look(**_: Any) -> None:
        assert TestClient(sglang.app).post("/update_weights_from_disk").status_code == status
        sglang.drained()

    sglang.behaviour = look
    run(SERVER_ARGS, SERVED, None, management=management)


def test_the_size_of_a_request_is_bounded(sglang: Sglang) -> None:
    @sglang.app.put("/auf/length")
    async def length(request: Request) -> int:
        return len(await request.body())

    def look(**_: Any) -> None:
        client = TestClient(sglang.app)
        assert client.put("/auf/length", content=b"x" * MAX_BODY).json() == MAX_BODY
        undeclared = (b"x" * 2**20 for _ in range(MAX_BODY // 2**20 + 1))
        for content in (b"x" * (MAX_BODY + 1), undeclared):
            assert client.put("/auf/length", content=content).status_code == 413
        sglang.drained()

    sglang.run(look)


def test_the_page_needs_no_key_and_what_it_asks_does(sglang: Sglang) -> None:
    replies: list[int] = []

    def look(**_: Any) -> None:
        add_api_key_middleware(sglang.app, api_key="secret", admin_api_key=None)
        replies.extend(TestClient(sglang.app).get(path).status_code for path in ("/auf", "/v1/auf/load"))
        sglang.drained()

    sglang.run(look)
    assert replies == [200, 401]


def test_failed_probe_stops_the_server_by_sigterm_and_is_what_the_user_reads(
    sglang: Sglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_that(monkeypatch, ServerError("no verify step", "one", "look above"))

    def start(execute_warmup_func: Callable[[Any], bool], **_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sglang.drained())  # as SGLang does at its first request
        assert execute_warmup_func(SERVER_ARGS) is False
        assert sglang.manager.gracefully_exit

    with pytest.raises(ServerError, match="no verify step"):
        sglang.run(start)
    assert sglang.manager.server_status == ServerStatus.Starting, "health must never have said ready"


def test_failed_probe_is_reported_even_before_sglang_drains_on_sigterm(
    sglang: Sglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_that(monkeypatch, ServerError("no answer", "one", "look above"))

    def start(execute_warmup_func: Callable[[Any], bool], **_: Any) -> None:
        execute_warmup_func(SERVER_ARGS)
        time.sleep(10)

    with pytest.raises(ServerError, match="no answer"):
        sglang.run(start)
    assert sglang.swept == [os.getpid()]


def test_passed_probe_makes_the_server_ready(
    sglang: Sglang, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe_that(monkeypatch)
    caplog.set_level("INFO")

    def start(execute_warmup_func: Callable[[Any], bool], launch_callback: Callable[[], None], **_: Any) -> None:
        assert closed_because() is not None
        assert execute_warmup_func(SERVER_ARGS) is True
        assert not [record for record in caplog.records if "READY" in record.getMessage()]
        launch_callback()
        assert closed_because() is None
        sglang.drained()

    sglang.run(start)
    [ready] = [record.getMessage() for record in caplog.records if "READY" in record.getMessage()]
    assert "http://127.0.0.1:30000/v1" in ready
    assert "tiny" in ready


@pytest.mark.parametrize("named_after_target", [False, True])
def test_the_announcement_says_where_the_models_name_is_from(
    named_after_target: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    start = Start(SERVER_ARGS, replace(SERVED, named_after_target=named_after_target), None)
    start.announce()
    [ready] = [record.getMessage() for record in caplog.records if "READY" in record.getMessage()]
    assert "/v1 serves small" in ready
    assert ("no served_model_name" in ready) is named_after_target


def test_clients_see_the_targets_name_where_the_profile_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_device", "check_port", "load_sglang", "check_server_args"):
        monkeypatch.setattr(launch, name, lambda *_, **__: None)
    monkeypatch.setattr(launch, "check_models", lambda *_: SERVED)
    monkeypatch.setattr(launch, "build_server_args", lambda arguments: arguments)
    launched: list[Any] = []
    monkeypatch.setattr(launch, "run", lambda arguments, *_, **__: launched.append(arguments))
    launch.serve(Profile.model_validate({"target": "owner/target", "device": "cpu"}), plain=True)
    assert launched[0]["served_model_name"] == SERVED.model


def test_answers_are_recorded_from_the_announcement_on_and_a_stop_loses_none(
    sglang: Sglang, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe_that(monkeypatch)
    record = RecordSettings(directory=str(tmp_path / "rows"))
    recorder = Recorder.opened(record, write_target(tmp_path / "target"))

    def start(execute_warmup_func: Callable[[Any], bool], launch_callback: Callable[[], None], **_: Any) -> None:
        assert execute_warmup_func(SERVER_ARGS) is True
        assert capture._recorder is None, "the probe is nobody's answer"
        assert RECORDER not in {thread.name for thread in threading.enumerate()}, "SGLang forks its processes first"
        launch_callback()
        assert capture._recorder is recorder
        for first in range(100):
            recorder.offer([first] * 500, [1, 2])
        client = TestClient(sglang.app)
        assert client.get("/v1/auf/recording").json()["recording"]["directory"] == str(tmp_path / "rows")
        sglang.drained()

    sglang.behaviour = start
    run(SERVER_ARGS, SERVED, None, recorder=recorder)
    assert capture._recorder is None
    assert sum(len(file.read_text().splitlines()) for file in row_files(tmp_path / "rows")) == 100
    Recorder.opened(record, tmp_path / "target").stop()  # the directory is free again


def test_unexpected_failure_of_the_probe_stops_the_server_too(monkeypatch: pytest.MonkeyPatch) -> None:
    probe_that(monkeypatch, ZeroDivisionError())
    stopped: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: stopped.append(number))
    start = Start(SERVER_ARGS, SERVED, None)
    assert start.prove(SERVER_ARGS) is False
    assert stopped == [signal.SIGTERM]
    assert isinstance(start.failure, ZeroDivisionError)


def test_sigterm_while_loading_unwinds_and_sweeps(sglang: Sglang) -> None:
    def load(**_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    with pytest.raises(SystemExit) as stop:
        sglang.run(load)
    assert stop.value.code == 143
    assert sglang.swept == [os.getpid()]


def test_engine_that_dies_while_loading_is_reported(sglang: Sglang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "init_tokenizer_manager", lambda *arguments: arguments)

    def load(init_tokenizer_manager_func: Callable[..., Any], **_: Any) -> None:
        signal.signal(signal.SIGQUIT, lambda *_: pytest.fail("SGLang's handler would kill the process"))
        assert init_tokenizer_manager_func("args", "ports") == ("args", "ports")
        os.kill(os.getpid(), signal.SIGQUIT)
        time.sleep(10)

    with pytest.raises(ServerError, match="died while it was starting"):
        sglang.run(load)
    assert sglang.swept == [os.getpid()]


@pytest.mark.parametrize(
    ("raised", "said"),
    [(RuntimeError("Rank 0 scheduler died"), "Rank 0 scheduler died"), (SystemExit(0), "engine died")],
)
def test_death_of_the_engine_is_never_a_success(raised: BaseException, said: str, sglang: Sglang) -> None:
    def die(**_: Any) -> None:
        raise raised

    with pytest.raises(ServerError, match=said):
        sglang.run(die)
    assert sglang.swept == [os.getpid()]


def test_exit_code_of_the_http_server_is_kept(sglang: Sglang) -> None:
    def die(**_: Any) -> None:
        raise SystemExit(1)

    with pytest.raises(SystemExit) as stop:
        sglang.run(die)
    assert stop.value.code == 1


def test_server_that_ends_unasked_is_a_failure(sglang: Sglang) -> None:
    with pytest.raises(ServerError, match="by itself"):
        sglang.run(lambda **_: None)


@pytest.mark.parametrize(
    ("stopping", "status", "closed"),
    [
        (False, ServerStatus.Starting, True),
        (False, ServerStatus.Up, False),
        (False, ServerStatus.UnHealthy, False),
        (True, ServerStatus.Up, True),
    ],
)
def test_gate_follows_sglangs_state(stopping: bool, status: ServerStatus, closed: bool, sglang: Sglang) -> None:
    sglang.manager.gracefully_exit, sglang.manager.server_status = stopping, status
    assert (closed_because() is not None) == closed


@pytest.mark.parametrize(
    ("settings", "on", "nodes"), [({}, True, None), ({"tree": False}, False, None), ({"tree_nodes": 6}, True, 6)]
)
def test_the_scheduler_is_told_of_trees_by_its_environment(
    settings: dict[str, Any], on: bool, nodes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("check_device", "check_port", "load_sglang", "check_server_args", "build_server_args"):
        monkeypatch.setattr(launch, name, lambda *_, **__: None)
    monkeypatch.setattr(launch, "check_models", lambda *_: SERVED)
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)
    for name in (TREE.name, TREE_NODES, BUNDLED):  # so that what `serve` sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    profile = {"target": "owner/target", "device": "cpu", "served_model_name": "small"}
    launch.serve(Profile.model_validate(profile | settings), plain=True)
    assert (TREE.is_on(), tree_nodes()) == (on, nodes)
    assert not TREE.is_asked_for(), "a default is no request, which a GPU would refuse"
    assert BUNDLED in os.environ, "requests are checked without a drafter too"


@pytest.mark.parametrize(("given", "on"), [({}, False), ({OVERLAP_FLAG: True}, False), ({OVERLAP_FLAG: False}, True)])
def test_a_profile_that_wants_the_overlap_schedule_gets_it_on_a_cpu_too(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, bool], on: bool
) -> None:
    for name in (CPU_OVERLAP.name, BUNDLED):
        monkeypatch.setenv(name, "0")  # restored after the test
    for name in ("check_device", "check_port", "load_sglang", "build_server_args", "run"):
        monkeypatch.setattr(launch, name, lambda *_, **__: None)
    monkeypatch.setattr(launch, "check_models", lambda *_: SERVED)
    fields = {"target": "owner/target", "device": "cpu", "served_model_name": "small", "server_args": given}
    launch.serve(Profile.model_validate(fields))
    assert CPU_OVERLAP.is_on() is on


def test_serve_refuses_in_the_cheapest_order(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setenv(BUNDLED, "1")  # restored after the test

    def step(name: str) -> Callable[..., ServedModel]:
        def record(*_: Any, **__: Any) -> ServedModel:
            done.append(name)
            return SERVED

        return record

    steps = ["check_device", "check_port", "load_sglang", "check_server_args", "prepare", "check_models"]
    for name in steps:
        monkeypatch.setattr(launch, name, step(name))
    monkeypatch.setattr(launch, "build_server_args", lambda arguments: arguments)
    launched: list[Any] = []
    monkeypatch.setattr(launch, "run", lambda *arguments, **_: launched.append(arguments))
    profile = Profile.model_validate({"target": "smollm2-135m", "device": "cpu", "served_model_name": "small"})
    launch.serve(profile, plain=True, api_key="secret")
    assert done == steps
    [(arguments, served, api_key)] = launched
    assert (arguments["api_key"], served, api_key) == ("secret", SERVED, "secret")


@pytest.mark.parametrize(
    ("changes", "plain", "said"),
    [
        ({}, False, ["trained with thinking on"]),
        ({"drafter_notice": "not trained with AUF"}, False, ["not trained with AUF", "trained with thinking on"]),
        ({"drafter_notice": "not trained with AUF"}, True, []),
    ],
)
def test_what_may_lower_tau_is_said_before_anything_loads(
    changes: dict[str, str],
    plain: bool,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = CheckedDrafter(CARD, ("trained with thinking on",), Path("/models/drafter"))
    speculation = Speculation("owner/drafter", found, 4, lambda _: found, "cpu")
    served = replace(SERVED, speculation=None if plain else speculation)
    fields = {"target": "owner/target", "drafter": "owner/drafter", "device": "cpu", "served_model_name": "small"}
    profile = Profile.model_validate(fields | changes)
    checked = launch.Checked(profile, "owner/target", served, {}, SERVER_ARGS)
    monkeypatch.setattr(launch, "check", lambda *_, **__: checked)
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)
    launch.serve(profile, plain=plain)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"DRAFTER: {text}" for text in said
    ]
