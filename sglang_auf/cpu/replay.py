"""The forward of few rows as a list of kernels, watched once and run again without the model's modules.

With one row of a small model, calling its modules takes longer than all of their arithmetic. Most of a forward is
kernels of ours (kernels.py), each a function and a row of numbers. So one forward is watched: which kernels it calls,
with what addresses, in memory that has room for ROWS rows and is kept. From then on a forward writes its tokens,
positions and slots where the first one had them, changes the number of rows, and runs the list on one team of threads.

A forward that does anything else, as some models do, is not replayed, with a line in the log. The first
forwards of a number of rows are computed both ways, and results that are not equal bit for bit end it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from sglang.srt.model_executor.forward_context import get_attn_backend
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_auf.cpu import kernels
from sglang_auf.cpu.kernels import COUNTED, GEOMETRY, GRAIN, OWN, PLANNED, TASKS, AttentionTasks, Call

logger = logging.getLogger(__name__)

ROWS = 256
"""Forwards of more rows, as long prefills are, spend their time in arithmetic."""

CHECKS = 0
"""Forwards of this process that were computed both ways, which takes several times as long."""

CACHE_LINE = 64
GIVEN = ["input_ids", "positions", "forward_batch", "input_embeds"]  # of a body's forward; some write inputs_embeds

_aten = torch.ops.aten


class NotReplayable(Exception):
    """What a forward does besides calling kernels."""


class Program:
    """Recorded calls, which run again for any number of rows.

    The memory that they read and write has room for as many rows as are ever asked for, at the same addresses.
    """

    def __init__(self, calls: list[Call], rows: int) -> None:
        """rows: of the forward that was recorded. Raises NotReplayable where a call's tasks are no multiple of them."""
        self.calls = calls
        self._arguments = np.zeros((len(calls), OWN + max(len(call.values) for call in calls)), dtype=np.int64)
        for arguments, call in zip(self._arguments, calls, strict=True):
            arguments[[TASKS, GRAIN]] = call.tasks, call.grain
            arguments[OWN : OWN + len(call.values)] = call.values
        self._kernels = np.array([call.kernel.address for call in calls], dtype=np.int64)

        by_rows = [call for call in calls if call.kind == "rows"]
        if any(call.tasks % rows or call.elements % rows for call in by_rows):
            raise NotReplayable("a number of tasks that is no multiple of the rows")
        self._by_rows, self._products = self._places("rows"), self._places("product")
        self._tasks = np.array([call.tasks // rows for call in by_rows], dtype=np.int64)
        self._elements = np.array([call.elements // rows for call in by_rows], dtype=np.int64)
        self._attentions = self._places("attention")
        geometries = {calls[place].values[GEOMETRY] for place in self._attentions}
        if len(geometries) > 1:  # they are planned one after the other, in the same scratch memory
            raise NotReplayable(f"attention of several shapes: {sorted(geometries)}")
        self._geometry: Any = next(iter(geometries), None)
        self._rows = 0
        self._known_shares: dict[int, tuple[Any, Any]] = {}

    def _shares(self, rows: int) -> tuple[Any, Any]:
        """Of each call by rows: its tasks, and how many of them a thread takes at a time."""
        if rows not in self._known_shares:
            count = self._tasks * rows
            threads = np.array([kernels.threads_for(elements * rows) for elements in self._elements], dtype=np.int64)
            self._known_shares[rows] = count, -(-count // threads)
        return self._known_shares[rows]

    def _places(self, kind: str) -> Any:
        return np.array([place for place, call in enumerate(self.calls) if call.kind == kind], dtype=np.int64)

    @property
    def attends(self) -> bool:
        """Whether an attention is among the calls."""
        return self._geometry is not None

    def __call__(self, rows: int, tasks: AttentionTasks | None) -> None:
        """tasks: the attention of these rows; None without one.

        Raises IndexError for a position, slot or token outside its table.
        """
        arguments = self._arguments
        if rows != self._rows:
            self._rows = rows
            arguments[self._by_rows, TASKS], arguments[self._by_rows, GRAIN] = self._shares(rows)
            arguments[self._products, OWN + COUNTED : OWN + COUNTED + 2] = kernels.rows_of_product(rows)
        if self.attends:
            assert tasks is not None
            arguments[self._attentions, TASKS], _, planned = kernels.attention_plan(tasks, self._geometry)
            arguments[self._attentions, OWN + PLANNED : OWN + PLANNED + len(planned)] = planned
        kernels.run_list(arguments, self._kernels)


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


def _references(blocks: list[np.ndarray[Any, Any]]) -> list[int]:
    """To each of them, in Python. A tensor made from an array refers to it until its last view is gone."""
    return [sys.getrefcount(block) for block in blocks]


# To one that is in a list and nowhere else.
UNUSED = _references([np.empty(0)])[0]


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Lets a forward make views and memory, which has room for ROWS rows, and call kernels. Refuses all else.

    Memory is used again once no tensor refers to it, as torch does by itself.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.calls: list[Call] = []
        self.blocks: list[np.ndarray[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.empty.memory_format:
            return self._empty(args[0], (kwargs or {}).get("dtype") or torch.float32)
        if func in (_aten.new_empty.default, _aten.empty_like.default):
            shape = args[1] if func is _aten.new_empty.default else args[0].shape
            return self._empty(shape, (kwargs or {}).get("dtype") or args[0].dtype)
        if func is _aten.embedding.default and len(args) == 2:
            table, index = args
            out = self._empty((*index.shape, table.shape[1]), table.dtype)
            kernels.copy(table, out.flatten(0, -2), index.flatten())
            return out
        if func is _aten.clone.default:
            return self._copied(args[0], args[0].shape)
        if func.is_view or func is _aten._unsafe_view.default:
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor) or _shares(result, args[0]):
                return result
            if result.dtype == args[0].dtype:  # a reshape that could not be a view
                return self._copied(args[0], result.shape)
        raise NotReplayable(str(func))

    def _copied(self, source: torch.Tensor, shape: Any) -> torch.Tensor:
        rows = source.flatten(1)
        if not _shares(rows, source) or not kernels.is_rows(rows):
            raise NotReplayable(f"a copy of {tuple(source.shape)} with strides {source.stride()}, {source.dtype}")
        out = self._empty(shape, source.dtype)
        kernels.copy(rows, out.view(rows.shape))
        return out

    def _empty(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        if not shape or shape[0] % self.rows:
            raise NotReplayable(f"memory of {tuple(shape)} for {self.rows} rows")
        whole = (shape[0] // self.rows * ROWS, *shape[1:])
        size = math.prod(whole) * dtype.itemsize
        references = enumerate(_references(self.blocks))
        free = [i for i, count in references if count == UNUSED and self.blocks[i].nbytes == size]
        if not free:
            free = [len(self.blocks)]
            self.blocks.append(_aligned(size))
        memory = torch.from_numpy(self.blocks[free[0]]).view(dtype).view(whole)
        return memory[: shape[0]]


def _aligned(size: int) -> np.ndarray[Any, Any]:
    """Bytes that begin where a cache line does."""
    memory = np.empty(size + CACHE_LINE, dtype=np.uint8)
    first = -memory.ctypes.data % CACHE_LINE
    return memory[first : first + size]


def _each(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A forward's output with each of its tensors changed: a tensor, a sequence, or SGLang's LogitsProcessorOutput."""
    if output is None:
        return None
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, (list, tuple)):
        return type(output)([_each(part, change) for part in output])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
        tensors = {name: change(found) for name, found in fields.items() if isinstance(found, torch.Tensor)}
        return dataclasses.replace(output, **tensors)
    raise NotReplayable(f"an output of {type(output).__name__}")


def _tensors(output: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _each(output, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


class Recorded:
    """A function of tensors with a row for each token (`compute`), whose kernels run again without it.

    Each call may have another number of rows. What it returns are copies: the next call writes to the same memory.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.program: Program | None = None
        self.refused = False
        self._checked: set[int] = set()
        self._given: list[torch.Tensor] = []  # [ROWS, ...] each
        self._blocks: list[np.ndarray[Any, Any]] = []
        self._output: Any = None

    def compute(self, *given: torch.Tensor) -> Any:
        """By modules."""
        raise NotImplementedError

    def results(self, output: Any, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What is to be equal both ways."""
        return _tensors(output)

    def __call__(self, *given: torch.Tensor) -> Any:
        """What `compute` returns, bit for bit."""
        rows = len(given[0])
        if self.refused or not 0 < rows <= ROWS:
            return self.compute(*given)
        if self.program is None and rows == 1:
            return self.compute(*given)  # of one row nearly all is a view, so what it copies with more rows is not seen
        if self.program is None and not self._record(given):
            return self.compute(*given)
        if any(
            one.shape[1:] != kept.shape[1:] or one.dtype != kept.dtype
            for one, kept in zip(given, self._given, strict=True)
        ):
            return self.compute(*given)
        replayed = self._replay(given)
        checked = 1 << (rows - 1).bit_length()  # one number of rows up to each power of two
        if checked in self._checked:
            return replayed
        global CHECKS
        CHECKS += 1
        ours = self.results(replayed, given)
        output = self.compute(*given)
        if all(torch.equal(our, its) for our, its in zip(ours, self.results(output, given), strict=True)):
            self._checked.add(checked)
        else:
            self._refuse(f"{rows} rows gave other results than its modules")
        return output

    def _record(self, given: Sequence[torch.Tensor]) -> bool:
        """Whether it could be recorded."""
        rows = len(given[0])
        with torch.inference_mode(False):
            self._given = [torch.zeros(ROWS, *one.shape[1:], dtype=one.dtype) for one in given]
        watch = _Watch(rows)
        try:
            first = self._give(given)
            with watch, kernels.listening(watch.calls.append):
                output = self.compute(*first)
            self._blocks = watch.blocks
            self._output = _each(output, self._whole)
            self.program = Program(watch.calls, rows)
        except Exception as reason:  # of a body unlike those we know: if it is at fault, its modules will say so
            self._refuse(str(reason) or repr(reason))
            return False
        logger.info("%s: up to %d rows are %d kernels", self.name, ROWS, len(watch.calls))
        return True

    def _give(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Write what a call is given to where the recorded one has it."""
        rows = len(given[0])
        for one, kept in zip(given, self._given, strict=True):
            kept[:rows] = one
        return [kept[:rows] for kept in self._given]

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """The memory of an output, with room for ROWS rows."""
        size = tensor[0].nbytes * ROWS
        for block in self._blocks:
            if block.ctypes.data == tensor.data_ptr() and block.nbytes == size and tensor.is_contiguous():
                return torch.from_numpy(block).view(tensor.dtype).view(ROWS, *tensor.shape[1:])
        raise NotReplayable("an output that no kernel has written")

    def _replay(self, given: Sequence[torch.Tensor]) -> Any:
        assert self.program is not None
        rows = len(given[0])
        self._give(given)
        self.program(rows, get_attn_backend().tasks if self.program.attends else None)
        return _each(self._output, lambda whole: whole[:rows].clone())

    def _refuse(self, reason: str) -> None:
        self.refused, self.program, self._blocks, self._output = True, None, [], None
        logger.warning("%s is not replayed, its modules are called in each step: %s", self.name, reason)


class Replayed(Recorded):
    """The forward of a model's body: embedding (or given embeddings), layers and last norm. Takes its place."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__(type(body).__name__)
        self.forward = body.forward
        self._batch: Any = None

    def __call__(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
        *others: Any,
        **more: Any,
    ) -> Any:
        """As the body's forward, whose results these are, bit for bit."""
        asks_for_more = any(other is not None and other is not False for other in (*others, *more.values()))
        is_padded = get_attn_backend().tasks.tokens != len(positions)
        if asks_for_more or positions.dim() != 1 or is_padded:
            return self.forward(input_ids, positions, forward_batch, input_embeds, *others, **more)
        self._batch = forward_batch
        first = input_ids if input_embeds is None else input_embeds
        try:
            return super().__call__(first, positions, forward_batch.out_cache_loc)
        finally:
            self._batch = None

    def compute(self, first: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> Any:
        """first: token ids [rows], or embeddings [rows, hidden]."""
        batch = self._batch
        given = (first, None) if first.dim() == 1 else (None, first)
        kept, batch.out_cache_loc = batch.out_cache_loc, slots
        try:
            return self.forward(given[0], positions, batch, given[1])
        finally:
            batch.out_cache_loc = kept


def install(model: torch.nn.Module) -> bool:
    """Have the body of a loaded SGLang model replayed; False for a model without one of the usual form."""
    body = getattr(model, "model", model)
    usual = isinstance(body, torch.nn.Module) and hasattr(body, "layers") and not isinstance(body.forward, Replayed)
    if not usual or [name.replace("inputs_", "input_") for name in signature(body.forward).parameters][:4] != GIVEN:
        return False
    body.forward = Replayed(body)
    return True
