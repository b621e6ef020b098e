"""A recorded forward has the modules' bits for any number of rows; what cannot be watched so is left to the modules."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sglang_auf.cpu import kernels, replay
from sglang_auf.cpu.kernels import AttentionTasks
from sglang_auf.cpu.linear import RowInvariantLinear
from sglang_auf.cpu.replay import ROWS, Program, Replayed

HIDDEN, HEADS, KEY_HEADS, HEAD, TOKENS, SLOTS = 96, 4, 2, 32, 50, 900


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Layer(torch.nn.Module):
    """As a layer of SGLang's models: norms, rotation with norms of queries and keys, attention over a pool, a gate."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        widths = {"qkv": (HEADS + 2 * KEY_HEADS) * HEAD, "o": HIDDEN, "up": 128, "down": HIDDEN}
        inputs = {"qkv": HIDDEN, "o": HEADS * HEAD, "up": HIDDEN, "down": 64}
        self.products = {
            name: RowInvariantLinear(normal(width, inputs[name], seed=seed + i) * 0.1)
            for i, (name, width) in enumerate(widths.items())
        }
        self.norm, self.q_norm = normal(HIDDEN, seed=seed + 5), normal(HEAD, seed=seed + 6)
        self.pool = torch.zeros(SLOTS, 2, KEY_HEADS, HEAD, dtype=torch.bfloat16)
        self.table = torch.rand(200, HEAD, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, positions: torch.Tensor, batch: Any) -> Any:
        normed, residual = kernels.rms_norm(x, self.norm, 1e-5, residual)
        q, k, v = self.products["qkv"](normed).split([HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD], dim=-1)
        q = kernels.rms_norm(q.reshape(-1, HEAD), self.q_norm, 1e-5)[0].view(-1, HEADS * HEAD)
        q, k = kernels.rotate(q, k, HEAD, self.table, positions)
        kernels.store(k, v, self.pool, batch.out_cache_loc)
        seen = kernels.attend(q, self.pool, replay.get_attn_backend().tasks, 0.2, False)
        normed, residual = kernels.rms_norm(self.products["o"](seen), self.norm, 1e-5, residual)
        return self.products["down"](kernels.silu_and_mul(self.products["up"](normed))), residual


class Body(torch.nn.Module):
    """Returns the last norm and what two layers read, as targets do whose layers are tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = RowInvariantLinear(normal(TOKENS, HIDDEN, seed=40))
        self.layers = torch.nn.ModuleList([Layer(1), Layer(20)])
        self.calls = 0

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, input_embeds: Any = None) -> Any:
        self.calls += 1
        x = self.embedding.embedding(self, input_ids) if input_embeds is None else input_embeds
        residual, tapped = None, []
        for layer in self.layers:
            x, residual = layer(x, residual, positions, forward_batch)
            tapped.append(residual.clone())
        return self.last(x, residual), tapped

    def last(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.layers[0].norm, 1e-5, residual)[0]


class Server:
    """What a forward is given: tokens of two requests, and their planned attention, as the backend has it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = SimpleNamespace(tasks=None)
        monkeypatch.setattr(replay, "get_attn_backend", lambda: self.backend)
        self.slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(9)).int().view(3, 300)

    def given(self, rows: int, keys: int = 7, seed: int = 0, tree: bool = False) -> tuple[Any, Any, Any]:
        generator = torch.Generator().manual_seed(seed)
        first = rows - rows // 3
        spans = [(0, 0, first, keys + first)] + ([(1, first, rows - first, 90)] if rows > first else [])
        own = None
        if tree:
            counts = torch.randint(1, 4, (rows, 1), generator=generator)
            own = torch.cat([counts, torch.randint(SLOTS, (rows, 3), generator=generator)], dim=1).int()
            spans = [(row, at, queries, keys) for row, at, queries, keys in spans]
        self.backend.tasks = AttentionTasks.of(spans, self.slots, own)
        batch = SimpleNamespace(out_cache_loc=torch.randperm(SLOTS, generator=generator)[:rows])
        tokens = torch.randint(TOKENS, (rows,), generator=generator)
        return tokens, torch.randint(200, (rows,), generator=generator), batch


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(kernels, "WORTH_A_THREAD", 200)  # some calls on one thread, some on both
    yield request.param
    torch.set_num_threads(before)


def equal(one: Any, other: Any) -> bool:
    pairs = zip([one[0], *one[1]], [other[0], *other[1]], strict=True)
    return all(torch.equal(a, b) and a.isfinite().all() for a, b in pairs)


def pools(body: Body) -> list[torch.Tensor]:
    return [layer.pool.clone() for layer in body.layers]  # type: ignore[union-attr, operator]


@torch.inference_mode()
def test_a_replayed_forward_has_the_bits_of_its_modules(server: Server, threads: int) -> None:
    body, modules = Body(), Body()
    replayed = Replayed(body)
    for visit, rows in enumerate([5, *range(1, 70), 200, ROWS, 129, 64, *range(60, 0, -3), 5]):
        tokens, positions, batch = server.given(rows, keys=2 + visit % 30, seed=visit, tree=visit % 2 == 1)
        slots = batch.out_cache_loc
        assert equal(replayed(tokens, positions, batch), modules(tokens, positions, batch)), rows
        assert batch.out_cache_loc is slots, "the batch is left as it was"
        assert all(torch.equal(a, b) for a, b in zip(pools(body), pools(modules), strict=True)), "keys and values"
    assert replayed.program is not None
    assert body.calls == 1 + 9, "the modules were called to record and to check"


@torch.inference_mode()
def test_embeddings_may_be_given(server: Server) -> None:
    body, modules = Body(), Body()
    replayed = Replayed(body)
    for rows in (4, 4, 6, 6):
        _, positions, batch = server.given(rows)
        embeds = normal(rows, HIDDEN, seed=rows)
        expected = modules(None, positions, batch, embeds)
        assert equal(replayed(None, positions, batch, input_embeds=embeds), expected)
    assert body.calls == 3
    tokens, positions, batch = server.given(4)
    assert equal(replayed(tokens, positions, batch), modules(tokens, positions, batch)), "as modules, not as recorded"
    assert body.calls == 4


@torch.inference_mode()
def test_what_a_forward_returned_is_not_written_to_by_the_next(server: Server) -> None:
    replayed = Replayed(Body())
    for rows in (3, 3):
        tokens, positions, batch = server.given(rows)
        output = replayed(tokens, positions, batch)
        kept = output[0].clone(), [tapped.clone() for tapped in output[1]]
        replayed(*server.given(rows, seed=5))
        assert equal(output, kept)


@torch.inference_mode()
def test_forwards_of_many_or_no_rows_and_with_more_arguments_are_the_modules(server: Server) -> None:
    body = Body()
    replayed = Replayed(body)
    tokens, positions, batch = server.given(ROWS)
    replayed(tokens, positions, batch)
    calls = body.calls
    many = torch.cat([tokens, tokens])[: ROWS + 1], torch.cat([positions, positions])[: ROWS + 1]
    spans = [(0, 0, ROWS + 1, ROWS + 20)]
    server.backend.tasks = AttentionTasks.of(spans, server.slots)
    replayed(*many, SimpleNamespace(out_cache_loc=torch.arange(ROWS + 1)))
    assert body.calls == calls + 1
    with pytest.raises(TypeError, match="more"):  # it reaches the modules
        replayed(*server.given(3), more=3)
    replayed(*server.given(ROWS, seed=4))
    assert body.calls == calls + 1


class Multiplies(Body):
    def last(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().last(x, residual) * 2


class ReadsValues(Body):
    def last(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().last(x, residual)[: int(x[0, 0].item() * 0) + len(x)]


class ReturnsItsInput(Body):
    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, input_embeds: Any = None) -> Any:
        return super().forward(input_ids, positions, forward_batch, input_embeds)[0], [positions]


class TwoShapes(Body):
    def last(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        tasks = replay.get_attn_backend().tasks
        kernels.attend(x[:, : KEY_HEADS * HEAD], self.layers[0].pool, tasks, 0.2, False)
        return super().last(x, residual)


class OneForAll(Body):
    seven = normal(7, 3)

    def last(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        kernels.widen(self.seven)
        return super().last(x, residual)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Multiplies, "mul"),
        (ReadsValues, "item"),
        (ReturnsItsInput, "no kernel"),
        (OneForAll, "memory of"),
        (TwoShapes, "several shapes"),
    ],
)
@torch.inference_mode()
def test_what_is_no_kernel_is_not_recorded(
    kind: type[Body], reason: str, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    body, modules = kind(), kind()
    replayed = Replayed(body)
    with caplog.at_level(logging.WARNING, "sglang_auf.cpu.replay"):
        for seed in range(3):
            tokens, positions, batch = server.given(5, seed=seed)
            assert equal(replayed(tokens, positions, batch), modules(tokens, positions, batch))
    assert replayed.program is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert kind.__name__ in said and reason in said and "modules are called" in said


class Fails(Body):
    fails = True

    def last(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("a layer is missing")
        return super().last(x, residual)


@torch.inference_mode()
def test_an_error_of_the_modules_is_raised_by_them(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    body, modules = Fails(), Body()
    replayed = Replayed(body)
    given = server.given(4)
    with pytest.raises(RuntimeError, match="a layer is missing"):
        replayed(*given)
    body.fails = False
    assert equal(replayed(*given), modules(*given))
    assert body.calls == 3


class DependsOnRows(Body):
    def last(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().last(x, residual if len(x) <= 8 else x)


@torch.inference_mode()
def test_a_forward_that_is_another_one_for_more_rows_ends_the_recording(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    body, modules = DependsOnRows(), DependsOnRows()
    replayed = Replayed(body)
    with caplog.at_level(logging.WARNING, "sglang_auf.cpu.replay"):
        for rows in (3, 8, 3, 9, 3):
            tokens, positions, batch = server.given(rows, seed=rows)
            assert equal(replayed(tokens, positions, batch), modules(tokens, positions, batch)), rows
    assert [record.getMessage() for record in caplog.records] == [
        "DependsOnRows is not replayed, its modules are called in each step: 9 rows gave other results than its modules"
    ]


@torch.inference_mode()
def test_a_padded_forward_is_the_modules(server: Server) -> None:
    body = Body()
    replayed = Replayed(body)
    tokens, positions, batch = server.given(4)
    replayed(tokens, positions, batch)
    calls = body.calls
    server.given(3)  # so many are planned
    with pytest.raises(ValueError, match="the queries of the planned forward"):
        replayed(tokens, positions, batch)
    assert body.calls == calls + 1


@pytest.mark.parametrize("wrong", ["token", "position", "slot"])
@torch.inference_mode()
def test_what_lies_outside_its_table_is_an_error(wrong: str, server: Server) -> None:
    replayed = Replayed(Body())
    replayed(*server.given(4))
    tokens, positions, batch = server.given(4)
    {"token": tokens, "position": positions, "slot": batch.out_cache_loc}[wrong][2] = 100_000
    with pytest.raises(IndexError, match="outside its table"):
        replayed(tokens, positions, batch)
    modules = Body()
    given = server.given(4, seed=3)
    for first, other in zip(replayed.forward.__self__.layers, modules.layers, strict=True):  # type: ignore[attr-defined]
        first.pool.copy_(other.pool)
    assert equal(replayed(*given), modules(*given)), "the next one is right"


def test_tasks_that_are_no_multiple_of_the_rows_are_not_recorded() -> None:
    calls: list[kernels.Call] = []
    with kernels.listening(calls.append):
        kernels.widen(normal(5, 8))
    with pytest.raises(replay.NotReplayable, match="multiple"):
        Program(calls, 3)


def test_the_body_of_a_model_is_replaced_once() -> None:
    model = torch.nn.Module()
    model.model, body = Body(), None
    body = model.model
    assert replay.install(model) and isinstance(body.forward, Replayed)
    assert not replay.install(model)
    drafter = Body()
    assert replay.install(drafter) and isinstance(drafter.forward, Replayed)
    assert not replay.install(torch.nn.Linear(3, 3))


class AnotherBody(Body):
    def forward(self, input_ids: Any, forward_batch: Any, positions: Any, inputs_embeds: Any = None) -> Any:
        return super().forward(input_ids, positions, forward_batch, inputs_embeds)


class SmallerBody(Body):
    def forward(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        return super().forward(input_ids, positions, forward_batch)


@pytest.mark.parametrize("kind", [AnotherBody, SmallerBody])
def test_a_body_that_is_called_otherwise_is_left_alone(kind: type[Body]) -> None:
    body = kind()
    assert not replay.install(body)
    assert not isinstance(body.forward, Replayed)


def test_an_embedding_of_other_rows_than_the_table_has() -> None:
    table, index = normal(TOKENS, HIDDEN), torch.tensor([4, 0, 49])
    with replay._Watch(3):
        found = F.embedding(index, table)
    assert torch.equal(found, table[index])


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    with replay._Watch(2) as watch:
        first = torch.empty(2, 64, dtype=torch.bfloat16)
        view, address = first.view(4, 32)[1:], first.data_ptr()
        del first
        second = torch.empty(2, 64, dtype=torch.bfloat16)
        assert second.data_ptr() != address, "a view of it is left"
        del view
        other = torch.empty(2, 65, dtype=torch.bfloat16)
        third = torch.empty(2, 64, dtype=torch.bfloat16)
    assert third.data_ptr() == address
    assert other.data_ptr() not in (address, second.data_ptr())
    assert sum(block.nbytes for block in watch.blocks) == (64 + 64 + 65) * 2 * ROWS
