"""Aborting one request reaches no request whose id merely begins alike, answers end where their room does, and a
grammar that came too late is compiled again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, BaseGrammarObject, InvalidGrammarObject
from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarBackend

from sglang_auf.hooks import aborts, registry
from sglang_auf.hooks.aborts import abort_one, end_with_the_pool, name_by_complete_ids, room_behind_a_context

IDS = ("x_1", "x_10", "x_11", "x", "0", "00")


class Request:
    """What `Scheduler.abort_request` looks at, in any of its queues."""

    def __init__(self, rid: str) -> None:
        self.rid, self.to_finish, self.finished_reason = rid, None, None
        self.grammar, self.kv = None, SimpleNamespace(holds_mamba=False)

    def finished(self) -> bool:
        return self.finished_reason is not None

    def set_finish_with_abort(self, message: str) -> None:
        self.to_finish = message


class Queues:
    """A real scheduler's abort, over one request of each id that waits, has no grammar yet, runs and is prefilled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.disaggregation.utils import DisaggregationMode
        from sglang.srt.managers import scheduler

        monkeypatch.setattr(scheduler, "get_parallel", lambda: SimpleNamespace(pp_size=1))
        monkeypatch.setattr(scheduler, "_make_abort_req", lambda request, **_: request)
        self.waiting, self.compiled, self.running = ([Request(rid) for rid in IDS] for _ in range(3))
        self.ended: list[str] = []
        grammars = object.__new__(GrammarManager)
        grammars.grammar_queue = self.compiled
        self.scheduler = object.__new__(scheduler.Scheduler)
        nothing = SimpleNamespace(retire_group=lambda _: None)
        vars(self.scheduler).update(
            chunked_req=self.running[0],
            _pending_chunked_abort_req=None,
            waiting_queue=list(self.waiting),
            grammar_manager=grammars,
            running_batch=SimpleNamespace(reqs=self.running[:3]),
            last_batch=SimpleNamespace(reqs=self.running[3:]),
            enable_continuous_input_polling=False,
            disaggregation_mode=DisaggregationMode.NULL,
            mm_receiver=None,
            dllm_config=None,
            beam_coordinator=nothing,
            _release_aborted_request=lambda _: None,
            send_abort_output=lambda request, _: self.ended.append(request.rid),
        )
        name_by_complete_ids(None, SimpleNamespace(scheduler=self.scheduler))

    def aborted(self) -> tuple[list[str], ...]:
        """Ids of the waiting ones, of those without a grammar, of those that run; and of the one in chunks."""
        marked = [[one.rid for one in queue if one.to_finish] for queue in (self.compiled, self.running)]
        chunked = self.scheduler._pending_chunked_abort_req
        return (self.ended, *marked, [chunked.rid] if chunked else [])


@pytest.mark.parametrize(
    ("asked", "ended", "chunked"),
    [
        ({"rid": "x_1"}, ["x_1"], ["x_1"]),
        ({"rid": "x"}, ["x"], []),
        ({"rid": "0", "abort_message": "Request running timeout reached."}, ["0"], []),
        ({"rid": "y"}, [], []),
        ({"abort_all": True}, sorted(IDS), ["x_1"]),
    ],
)
def test_an_abort_ends_the_request_with_that_id_alone(
    asked: dict[str, Any], ended: list[str], chunked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.io_struct import AbortReq

    queues = Queues(monkeypatch)
    waiting = queues.scheduler.waiting_queue
    queues.scheduler.abort_request(AbortReq(**asked))
    assert queues.scheduler.waiting_queue is waiting
    assert [sorted(found) for found in queues.aborted()] == [ended, ended, ended, chunked]
    left = [one.rid for one in queues.scheduler.waiting_queue]
    assert left == [rid for rid in IDS if rid not in ended], "in the order in which they came"
    assert all([one.rid for one in queue] == list(IDS) for queue in (queues.compiled, queues.running))


def test_a_failed_abort_leaves_every_id(monkeypatch: pytest.MonkeyPatch) -> None:
    queues = Queues(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        abort_one(lambda _: 1 / 0, queues.scheduler, SimpleNamespace(rid="x", abort_all=False))
    assert [one.rid for one in queues.scheduler.waiting_queue] == list(IDS)
    assert all([one.rid for one in queue] == list(IDS) for queue in (queues.waiting, queues.compiled, queues.running))


@pytest.fixture
def speculating(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with AUF whose steps take 32 slots."""
    monkeypatch.setattr(aborts, "serves_auf", lambda: True)
    monkeypatch.setattr(aborts, "_room_of_a_step", lambda: 32)


def test_the_slot_table_has_columns_for_a_step_at_the_end_of_a_context(
    speculating: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [room_behind_a_context(columns) for columns in (20, 40)] == [32, 40]
    monkeypatch.setattr(aborts, "serves_auf", lambda: False)
    assert room_behind_a_context(20) == 20


def limit(pool: int, prompt: int, most: int | None) -> int | None:
    """Tokens of an answer to a prompt of `prompt` tokens that SGLang lets have `most`."""

    def original(*arguments: object, **more: object) -> int | None:
        assert (arguments, more) == (("allocator", prompt, 5000), {"token_capacity": pool, "chunk_size": 7})
        return most

    return end_with_the_pool(original, "allocator", prompt, 5000, token_capacity=pool, chunk_size=7)


def test_an_answer_ends_where_the_pool_has_no_room_for_a_step(
    speculating: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limit(1000, 100, 867) == 867
    assert limit(1000, 100, 898) == 868
    assert limit(1000, 980, 18) == 1, "its first token needs no step"
    assert limit(1000, 100, 0) == 0
    assert limit(1000, 1001, None) is None, "the prompt does not fit"
    monkeypatch.setattr(aborts, "serves_auf", lambda: False)
    assert limit(1000, 100, 898) == 898


class Compiler(BaseGrammarBackend):
    """SGLang's backend, whose compiler waits while the machine is busy, and knows one wrong schema."""

    allocate_vocab_mask = move_vocab_mask = apply_vocab_mask = None  # which answers with thoughts look up

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.compiled = threading.Event(), list[str]()

    def dispatch_json(self, key_string: str) -> BaseGrammarObject:
        self.idle.wait(60)
        self.compiled.append(key_string)
        return InvalidGrammarObject("wrong type") if key_string == "wrong" else BaseGrammarObject()


class Asking:
    """What `GrammarManager` reads of SGLang's Req, for an answer in a schema."""

    def __init__(self, schema: str) -> None:
        self.sampling_params = SimpleNamespace(json_schema=schema, custom_params=None)
        self.origin_input_ids, self.require_reasoning = [1], False
        self.grammar: Any = None
        self.grammar_key: Any = None
        self.grammar_wait_ct, self.said = 0, ""

    def finished(self) -> bool:
        return False

    def set_finish_with_abort(self, message: str) -> None:
        self.grammar, self.said = None, message


class Grammars:
    """A real grammar manager of one rank, and its compiler."""

    def __init__(self, compiler: Compiler, backend: BaseGrammarBackend) -> None:
        self.compiler, self.manager = compiler, object.__new__(GrammarManager)
        vars(self.manager).update(
            scheduler=SimpleNamespace(model_config=None),
            grammar_queue=[],
            grammar_backend=backend,
            grammar_sync_size=1,
            pp_rank=0,
            pp_size=1,
            SGLANG_GRAMMAR_POLL_INTERVAL=0.001,
        )

    def ask(self, *schemas: str, in_time: bool = True) -> list[Asking]:
        """Requests that have waited for their grammars, on an idle machine or on one that is too busy for them."""
        if in_time:
            self.compiler.idle.set()
        else:
            self.compiler.idle.clear()
        self.manager.SGLANG_GRAMMAR_MAX_POLL_ITERATIONS = 1_000_000 if in_time else 1
        asked = [Asking(schema) for schema in schemas]
        for one in asked:
            self.manager.process_req_with_grammar(one)  # type: ignore[arg-type]
        while self.manager.has_waiting_grammars():
            self.manager.get_ready_grammar_requests()
        return asked


def plain(compiler: Compiler) -> BaseGrammarBackend:
    return compiler


def with_thoughts(compiler: Compiler) -> BaseGrammarBackend:
    """As where SGLang has a parser for thoughts."""
    detector = SimpleNamespace(
        think_end_token="</think>",
        think_excluded_tokens=[],
        get_think_end_token_ids=lambda _: [7],
        get_answer_frame=lambda: None,
    )
    return ReasonerGrammarBackend(compiler, SimpleNamespace(detector=detector), None)  # type: ignore[arg-type]


@pytest.fixture(params=[plain, with_thoughts])
def grammars(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Grammars]:
    """With our hook, on a server of ours."""
    (hook,) = (one for one in aborts.HOOKS if one.target.endswith(":BaseGrammarBackend.set_cache"))
    assert hook.kind == "AROUND"
    hooked = functools.partialmethod(_around, hook.function, BaseGrammarBackend.set_cache)
    monkeypatch.setattr(BaseGrammarBackend, "set_cache", hooked)
    monkeypatch.setattr(registry, "is_ours", lambda: True)
    compiler = Compiler()
    yield Grammars(compiler, request.param(compiler))
    compiler.idle.set()


def _around(backend: Any, hook: Any, original: Any, *arguments: Any) -> None:
    hook(original, backend, *arguments)


def test_a_grammar_that_came_too_late_is_compiled_again(grammars: Grammars) -> None:
    (late,) = grammars.ask("schema", in_time=False)
    assert "timed out" in late.said
    (again,) = grammars.ask("schema")
    assert again.said == "" and again.grammar is not None
    assert ("json", "schema") in grammars.manager.grammar_backend.cache


def test_a_grammar_that_always_comes_too_late_is_refused_at_last(grammars: Grammars) -> None:
    """A compilation goes on behind its time-out, on a thread that other clients' grammars need."""
    said = [one.said for _ in range(aborts.MOST_TIMES_LATE + 2) for one in grammars.ask("schema", in_time=False)]
    refused = f"Failed to compile json grammar: {aborts.TIMED_OUT}"
    assert [one == refused for one in said] == [False] * aborts.MOST_TIMES_LATE + [True] * 2
    (another,) = grammars.ask("another")
    assert another.said == ""


def test_other_servers_remember_it_as_sglang_does(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, SGLang has mended it, and the hook can go."""
    monkeypatch.setattr(registry, "is_ours", lambda: False)
    grammars.ask("schema", in_time=False)
    (again,) = grammars.ask("schema")
    assert again.said == f"Failed to compile json grammar: {aborts.TIMED_OUT}"


def test_a_late_grammar_takes_the_place_of_no_compiled_one(grammars: Grammars) -> None:
    grammars.ask("schema")
    kept = dict(grammars.manager.grammar_backend.cache)
    aborts.remember_unless_late(
        BaseGrammarBackend.set_cache,
        grammars.manager.grammar_backend,
        ("json", "schema"),
        InvalidGrammarObject(aborts.TIMED_OUT),
    )
    assert grammars.manager.grammar_backend.cache == kept


def test_a_wrong_grammar_is_remembered_as_wrong(grammars: Grammars) -> None:
    said = [one.said for one in (*grammars.ask("wrong"), *grammars.ask("wrong"))]
    assert said == ["Failed to compile json grammar: wrong type"] * 2
    assert grammars.compiler.compiled == ["wrong"]
