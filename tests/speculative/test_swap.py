"""A swap in the scheduler without an engine around it, and its messages on SGLang's wire. e2e/test_drafter_swap.py has
the engines."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput, msgpack_decode, msgpack_encode
from sglang.utils import TypeBasedDispatcher

from sglang_auf.errors import CardError
from sglang_auf.speculative import swap
from sglang_auf.speculative.swap import DrafterReqInput, DrafterReqOutput, requeue, update_weights_from_disk
from sglang_auf.speculative.worker import AufWorker, Drafter


@pytest.fixture(autouse=True)
def known_messages() -> None:
    swap.register()


@pytest.mark.parametrize(
    "message",
    [
        DrafterReqInput(action="swap", model_path="/a/drafter"),
        DrafterReqInput(action="take back", model_path=""),
        DrafterReqOutput(success=True, seconds=0.5, requeued=3),
    ],
)
def test_messages_arrive_as_they_were_sent(message: Any) -> None:
    arrived = msgpack_decode(msgpack_encode(message))
    assert (type(arrived), arrived) == (type(message), message)


def test_the_schedulers_dispatcher_takes_it_for_an_update_of_weights() -> None:
    dispatch = TypeBasedDispatcher([(UpdateWeightFromDiskReqInput, lambda message: message.model_path)])
    assert dispatch(DrafterReqInput(action="swap", model_path="/a/drafter")) == "/a/drafter"


class Scheduler:
    """What `requeue` uses of SGLang's scheduler: two requests wait, and two run."""

    def __init__(self, limit: int | None = 2, paused: bool = False) -> None:
        self.waiting_queue, self.running = ["waiting 1", "waiting 2"], ["running 1", "running 2"]
        self.max_queued_requests, self._engine_paused = limit, paused
        self.tree_cache = SimpleNamespace(evictable_size=lambda: 7, evict=self.evict)
        self.evicted = 0

    def pause_generation(self, request: Any) -> None:
        assert request.mode == "retract"
        self._engine_paused = True
        assert self.max_queued_requests is None, "a full queue would abort a running request"
        self.waiting_queue += self.running
        self.running = []

    def evict(self, params: Any) -> None:
        assert not self.running, "what running requests hold cannot be evicted"
        self.evicted += params.num_tokens

    def continue_generation(self, request: Any) -> None:
        assert not request.torch_empty_cache, "there is no CUDA"
        self._engine_paused = False


@pytest.mark.parametrize("paused", [False, True])
def test_running_requests_go_ahead_of_those_that_wait_and_no_prefix_stays(paused: bool) -> None:
    scheduler = Scheduler(paused=paused)
    assert requeue(scheduler) == 2
    assert scheduler.waiting_queue == ["running 1", "running 2", "waiting 1", "waiting 2"]
    assert (scheduler.evicted, scheduler.max_queued_requests) == (7, 2)
    assert scheduler._engine_paused is paused, "an engine that an operator has paused stays paused"


class Model(torch.nn.Module):
    """Its forward is replaced by one that refers to it, as on the CPU platform."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.block_size = name, 0
        self.forward = partial(print, self)

    def set_block_size(self, block_size: int) -> None:
        self.block_size = block_size


class Trees:
    forgotten = 0

    def forget_drafter(self) -> None:
        self.forgotten += 1


def worker(device: str = "cpu") -> AufWorker:
    made = AufWorker.__new__(AufWorker)
    made.device, made.block_size = device, 8
    made.draft_model_runner = SimpleNamespace(kv_cache_configurator=SimpleNamespace())
    made._trees = Trees()
    made.drafter = Drafter(Model("first"), None)
    return made


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter is its directory's name; "broken" does not load."""

    def load(_: Any, path: str) -> Drafter:
        if path == "broken":
            raise RuntimeError("shapes differ")
        return Drafter(Model(path), f"head of {path}")  # type: ignore[arg-type]

    monkeypatch.setattr(swap, "load", load)


def tell(on: AufWorker, action: Any, path: str = "") -> DrafterReqOutput:
    def original(*_: Any) -> None:
        pytest.fail("this is no update of SGLang's")

    updater = SimpleNamespace(scheduler=Scheduler(), draft_worker=on)
    found: DrafterReqOutput = update_weights_from_disk(
        original, updater, DrafterReqInput(action=action, model_path=path)
    )
    return found


def names(on: AufWorker) -> tuple[str, str | None]:
    """Of the running drafter, everywhere where it is looked for, and of the former one."""
    assert on.draft_model is on.draft_model_runner.model is on.drafter.model
    assert on.draft_model is on.draft_model_runner.kv_cache_configurator.model
    assert on.draft_model.block_size == 8
    return on.draft_model.name, on.former and on.former.model.name  # type: ignore[return-value]


def test_other_updates_are_sglangs() -> None:
    given = UpdateWeightFromDiskReqInput(model_path="/a/target")
    assert update_weights_from_disk(lambda updater, request: (updater, request), "updater", given) == ("updater", given)


def test_a_swap_takes_the_model_its_head_and_what_was_learnt() -> None:
    on = worker()
    learnt = on._trees.forgotten
    reply = tell(on, "swap", "second")
    assert (reply.success, reply.requeued, reply.message) == (True, 2, "")
    assert names(on) == ("second", "first")
    assert on._draft_head == "head of second"
    assert on._trees.forgotten == learnt + 1


def test_the_drafter_of_the_last_verdict_is_the_one_to_go_back_to() -> None:
    on = worker()
    for path in ("second", "third"):
        assert tell(on, "swap", path).success
    assert names(on) == ("third", "first")
    assert tell(on, "take back").success
    assert names(on) == ("first", None)
    assert on._draft_head is None
    assert tell(on, "swap", "second").success and tell(on, "keep").success
    assert names(on) == ("second", None)


@pytest.fixture
def frozen_collector() -> Iterator[None]:
    """As SGLang leaves it after the start: circles are never found."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("verdict", ["keep", "take back", "another swap"])
def test_the_drafter_that_goes_is_freed(verdict: Any, frozen_collector: None) -> None:
    on = worker()
    first = weakref.ref(on.draft_model)
    tell(on, "swap", "second")
    second = weakref.ref(on.draft_model)
    if verdict == "another swap":
        tell(on, "swap", "third")
    else:
        tell(on, verdict)
    assert (first() is None, second() is None) == (verdict == "keep", verdict != "keep")


@pytest.mark.parametrize(
    ("device", "action", "path", "says"),
    [
        ("cpu", "swap", "broken", "RuntimeError: shapes differ"),
        ("cpu", "take back", "", "no former drafter"),
        ("cuda:0", "swap", "second", "a swap on cuda:0"),
    ],
)
def test_what_fails_leaves_the_running_drafter(device: str, action: str, path: str, says: str) -> None:
    on = worker(device)
    reply = tell(on, action, path)
    assert not reply.success
    assert says in reply.message
    assert names(on) == ("first", None)


def test_a_load_that_fails_leaves_the_runner_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    on = worker()
    config = SimpleNamespace(model_path="/first")

    def load_model() -> None:
        assert on.draft_model_runner.model_config.model_path == "/second"
        on.draft_model_runner.model = None
        raise RuntimeError("truncated")

    on.draft_model_runner.model_config, on.draft_model_runner.load_model = config, load_model
    for scope in ("layers.moe.utils.draft_model_build_scope", "speculative.spec_utils.draft_pp_context"):
        monkeypatch.setattr(f"sglang.srt.{scope}", nullcontext)
    on.draft_parallel_layout = SimpleNamespace(tp_group=None)
    with pytest.raises(RuntimeError, match="truncated"):
        swap.load(on, "/second")
    assert on.draft_model_runner.model is on.draft_model
    assert on.draft_model_runner.model_config is config
    assert config.model_path == "/first"


def test_a_reply_of_no_success_is_an_error_with_its_reason() -> None:
    async def communicator(message: DrafterReqInput) -> list[DrafterReqOutput]:
        done = message.model_path == "good"
        return [DrafterReqOutput(success=done, message="" if done else "no such shape", requeued=4)]

    manager = SimpleNamespace(auto_create_handle_loop=lambda: None, auf_drafter_communicator=communicator)
    assert asyncio.run(swap.ask(manager, "swap", "good")).requeued == 4
    with pytest.raises(CardError, match="no such shape"):
        asyncio.run(swap.ask(manager, "swap", "bad"))
