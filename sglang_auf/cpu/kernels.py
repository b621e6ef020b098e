"""The operations of a transformer layer as compiled kernels, bf16 in memory and float32 in between.

With one row of a small model, calling a torch operation costs more than its arithmetic, and a layer has dozens. A
kernel here is one Python function over addresses, compiled by numba once per machine and called through ctypes: norms,
gates, rotations, the KV store, attention, products, copies, and last one that runs a list of the others. It
loops over tasks (rows, or queries that share keys). No task reads what another writes, and the same instructions
compute each task whatever the others are, so a row has the same bits alone, in a block and in a batch.

Tasks are divided among the threads of torch's own OpenMP pool: a second pool would compete for the same cores.

Every function here raises ValueError for a tensor of another form than it documents, since its memory would be misread.
All kernels are in one file because numba's cache notices changes only in a kernel's own file.
"""

from __future__ import annotations

import ctypes
import logging
import math
import platform
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import llvmlite.binding as llvm
import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.core.errors import NumbaError
from numba.extending import intrinsic

logger = logging.getLogger(__name__)

# With more elements than these, a second thread pays off.
WORTH_A_THREAD = 16_384
# Keys, and queries of one request, that are computed together: their float32 copies fit the first-level cache.
KEYS_AT_ONCE = 64
QUERIES_AT_ONCE = 4
# Sums may be taken in the order that suits the vector unit, which is the same for each row. NaN and infinity are kept.
FAST = {"reassoc", "contract", "nsz"}

# --- memory, for the compiler: an address (int64) and an index in elements ---


def _place(builder: Any, kind: Any, address: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


_BYTE, _HALF, _WORD, _LONG, _SINGLE = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
# A vector of float32 has so many: a register of AVX512, two of AVX2.
LANES = 16
assert KEYS_AT_ONCE % LANES == 0
# Vectors of sums that stay in registers beside what is added to them: of 32 registers of AVX512, of 16 of AVX2. A sum
# that does not is read and written for every product, which takes longer than the product.
SUMS_AT_ONCE = 16 if llvm.get_host_cpu_features().get("avx512f") else 5
_WORDS, _HALVES, _SINGLES = (ir.VectorType(kind, LANES) for kind in (_WORD, _HALF, _SINGLE))


def _call(builder: Any, name: str, result: Any, *values: Any) -> Any:
    """An instruction by LLVM's name for it."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _at(builder: Any, kind: Any, *addends: Any) -> Any:
    """The place of an LLVM `kind` at the sum of an address and offsets."""
    return builder.inttoptr(reduce(builder.add, addends), kind.as_pointer())


def _in_all_lanes(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, value, _WORD(0)), undefined, _alike(_WORDS, 0))


def _fetch(builder: Any, place: Any) -> None:
    """Have memory on its way to the second-level cache. An address beyond all memory does nothing."""
    read, second_level, data = _WORD(0), _WORD(2), _WORD(1)
    kind = ir.FunctionType(ir.VoidType(), [place.type, _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [place, read, second_level, data])


def _reader(kind: Any, result: Any, align: int, convert: Callable[[Any, Any], Any] | None = None) -> Any:
    """read(address, index): an element of LLVM's `kind` as numba's `result`."""

    @intrinsic  # type: ignore[untyped-decorator]
    def read(typing: Any, address: Any, index: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            found = builder.load(_place(builder, kind, *args), align=align)
            return found if convert is None else convert(builder, found)

        return result(types.int64, types.int64), build

    return read


def _writer(kind: Any, given: Any, align: int, convert: Callable[[Any, Any], Any] | None = None) -> Any:
    """write(address, index, value): numba's `given` as an element of LLVM's `kind`."""

    @intrinsic  # type: ignore[untyped-decorator]
    def write(typing: Any, address: Any, index: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = args[2] if convert is None else convert(builder, args[2])
            builder.store(value, _place(builder, kind, *args[:2]), align=align)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, given), build

    return write


def _widened(builder: Any, half: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(half, _WORD), _WORD(16)), _SINGLE)


def _alike(kind: Any, number: float) -> Any:
    """A constant of LLVM's `kind`, the same number in each lane of a vector."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def _rounded(builder: Any, single: Any) -> Any:
    """To nearest, ties to even; NaN stays NaN. Of one number, or of each lane of a vector."""
    word, half = (_WORDS, _HALVES) if isinstance(single.type, ir.VectorType) else (_WORD, _HALF)
    bits = builder.bitcast(single, word)
    odd = builder.and_(builder.lshr(bits, _alike(word, 16)), _alike(word, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _alike(word, 0x7FFF))), _alike(word, 16))
    rounded = builder.select(builder.fcmp_unordered("uno", single, single), _alike(word, 0x7FC0), rounded)
    return builder.trunc(rounded, half)


_bf16, _set_bf16 = _reader(_HALF, types.float32, 2, _widened), _writer(_HALF, types.float32, 2, _rounded)
_u16, _set_u16 = _reader(_HALF, types.uint16, 2), _writer(_HALF, types.uint16, 2)
_f32, _set_f32 = _reader(_SINGLE, types.float32, 4), _writer(_SINGLE, types.float32, 4)
_i64, _set_i64 = _reader(_LONG, types.int64, 8), _writer(_LONG, types.int64, 8)
_i32 = _reader(_WORD, types.int64, 4, lambda builder, word: builder.sext(word, _LONG))


@intrinsic  # type: ignore[untyped-decorator]
def _take(typing: Any, address: Any, index: Any, count: Any) -> Any:
    """Add count to an int64 that all threads share; returns the value before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, _LONG, args[0], args[1]), args[2], "acq_rel")

    return types.int64(types.int64, types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _as_f32(typing: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], _WORD), _SINGLE)

    return types.float32(types.int64), build


# --- arithmetic; every constant is a float32, or numba would compute in float64 ---

_ZERO, _ONE = np.float32(0), np.float32(1)


@intrinsic  # type: ignore[untyped-decorator]
def _exp(typing: Any, value: Any) -> Any:
    """e^x within 3 units of float32's last place; x is clamped to [-87, 88], and NaN stays NaN.

    Multiply-adds are fused explicitly: a compiler that may fuse them could do so in the vectors of a loop and not in
    its remainder.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def constant(number: float) -> Any:
            return ir.Constant(_SINGLE, float(np.float32(number)))

        def call(name: str, *values: Any) -> Any:
            kind = ir.FunctionType(_SINGLE, [_SINGLE] * len(values))
            return builder.call(builder.module.declare_intrinsic(name, [_SINGLE], kind), values)

        x = call("llvm.minnum", call("llvm.maxnum", args[0], constant(-87)), constant(88))
        n = call("llvm.rint", builder.fmul(x, constant(math.log2(math.e))))
        minus_n = builder.fneg(n)
        high = 0.693359375  # of ln 2, few bits: its product with a small whole number is exact
        r = call("llvm.fma", minus_n, constant(math.log(2) - high), call("llvm.fma", minus_n, constant(high), x))
        series = constant(1 / math.factorial(6))
        for power in range(5, -1, -1):
            series = call("llvm.fma", series, r, constant(1 / math.factorial(power)))
        exponent = builder.add(builder.fptosi(n, _WORD), _WORD(127))
        power_of_two = builder.bitcast(builder.shl(exponent, _WORD(23)), _SINGLE)
        # For NaN, minnum and maxnum return the bound.
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.select(is_nan, args[0], builder.fmul(series, power_of_two))

    return types.float32(types.float32), build


# --- the call ---

# The first arguments of every kernel: the next task, the number of tasks, how many a thread takes at a time, the next
# thread's number, whether an index lay outside its table, and in a list how many threads are at it. The kernel's own
# arguments follow.
_NEXT, TASKS, GRAIN, _THREAD, _FAULT, _INSIDE, OWN = 0, 1, 2, 3, 4, 5, 6


@cache
def _parallel() -> Any:
    """GOMP_parallel of the OpenMP library that torch has loaded; None where torch has another kind of pool."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    try:
        # Looked up through torch: dlsym also searches a library's dependencies, so the pool is torch's own.
        found = ctypes.CDLL(str(libraries[0])).GOMP_parallel
    except (IndexError, OSError, AttributeError):
        logger.warning("torch has no GNU OpenMP pool here: norms, rotations and attention run on one thread")
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return found


class Kernel:
    """A compiled function, which takes the address of its int64 arguments."""

    def __init__(self, function: Callable[[int], None]) -> None:
        self.function = function

    @cached_property
    def _compiled(self) -> Any:
        options = {"fastmath": FAST, "error_model": "numpy"}
        try:
            return cfunc("void(int64)", cache=True, **options)(self.function)
        except NumbaError:  # an error in the function, not in the cache
            raise
        except Exception as error:  # an unwritable directory, a full disk, or a file damaged by a crash
            logger.warning("numba's cache is of no use, %s is compiled anew: %r", self.function.__name__, error)
            return cfunc("void(int64)", **options)(self.function)

    def prepare(self) -> None:
        """Compile it now, and not during the first request."""
        _ = self._call

    @property
    def address(self) -> int:
        """Of the compiled function."""
        found: int = self._compiled.address
        return found

    @cached_property
    def _call(self) -> Any:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def __call__(self, tasks: int, threads: int, grain: int, *values: int) -> None:
        """Run `tasks` tasks on up to `threads` threads, each taking `grain` at a time. values: the kernel's arguments.

        Raises IndexError for a position or slot outside its table, which is not read or written.
        """
        arguments = (ctypes.c_int64 * (OWN + len(values)))(0, tasks, grain, 0, 0, 0, *values)
        began = time.perf_counter()
        if threads > 1 and (parallel := _parallel()) is not None:
            parallel(self.address, arguments, threads, 0)
        else:
            self._call(arguments)
        global _SPENT
        _SPENT += time.perf_counter() - began
        if arguments[_FAULT]:
            raise IndexError(f"{self.function.__name__[1:]}: a position or slot outside its table")


_SPENT = 0.0


def seconds_spent() -> float:
    """In kernels, by this process so far. Kernels that a list runs count once, as the list."""
    return _SPENT


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a kernel, as a recording keeps it (replay.py)."""

    kernel: Kernel
    kind: Literal["rows", "product", "attention"]
    tasks: int
    threads: int
    grain: int
    values: tuple[int, ...]
    elements: int  # that decide how many threads pay off

    def run(self) -> None:
        self.kernel(self.tasks, self.threads, self.grain, *self.values)
        if _LISTENERS:
            _LISTENERS[-1](self)


_LISTENERS: list[Callable[[Call], None]] = []


@contextmanager
def listening(hear: Callable[[Call], None]) -> Iterator[None]:
    """Calls of kernels that a forward is made of are heard, after they have run."""
    _LISTENERS.append(hear)
    try:
        yield
    finally:
        _LISTENERS.pop()


def threads_for(elements: int) -> int:
    """Threads that pay off."""
    return torch.get_num_threads() if elements > WORTH_A_THREAD else 1


def _rows(kernel: Kernel, rows: int, elements: int, *values: int) -> None:
    threads = threads_for(elements)
    Call(kernel, "rows", rows, threads, -(-rows // threads), values, elements).run()


@cache  # few values, needed at every call
def _float_bits(value: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def _require(holds: bool, what: str) -> None:
    """Raises ValueError where memory would be misread."""
    if not holds:
        raise ValueError(f"not {what}")


def is_rows(x: torch.Tensor) -> bool:
    """Whether x is a bf16 matrix with contiguous rows, which the kernels call "rows"."""
    return bool(x.dtype == torch.bfloat16 and x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] <= 1))


def _row_stride(x: torch.Tensor) -> int:
    if not is_rows(x):
        raise ValueError(f"not bf16 rows: {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}")
    stride: int = x.stride(0)
    return stride


def _is_index(x: torch.Tensor, rows: int) -> bool:
    return bool(x.dtype == torch.int64 and x.is_contiguous() and x.shape == (rows,))


def _is_pool(x: torch.Tensor) -> bool:
    return bool(x.dtype == torch.bfloat16 and x.dim() == 4 and x.is_contiguous())


# --- RMSNorm ---


@Kernel
def _rms_norm(args):  # type: ignore[no-untyped-def]
    x, x_stride, residual, residual_stride = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9)
    total, out, weight, features = _i64(args, 10), _i64(args, 11), _i64(args, 12), _i64(args, 13)
    per_feature, epsilon = _as_f32(_i64(args, 14)), _as_f32(_i64(args, 15))
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for row in range(first, min(first + grain, tasks)):
            source, target = x + 2 * row * x_stride, out + 2 * row * features
            if residual != 0:
                other, summed = residual + 2 * row * residual_stride, total + 2 * row * features
                for i in range(features):
                    _set_bf16(summed, i, _bf16(source, i) + _bf16(other, i))
                source = summed
            square = _ZERO
            for i in range(features):
                value = _bf16(source, i)
                square += value * value
            scale = _ONE / np.sqrt(square * per_feature + epsilon)
            for i in range(features):
                _set_bf16(target, i, _bf16(source, i) * scale * _bf16(weight, i))
        first = _take(args, _NEXT, grain)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / sqrt(mean of squares + epsilon) * weight, x) of bf16 x [rows, features]; the mean is over each row.

    With a residual of the same shape, both use x + residual in place of x. weight: bf16 [features].
    """
    rows, features = x.shape
    out = torch.empty(rows, features, dtype=torch.bfloat16)
    total = x if residual is None else torch.empty_like(out)
    _require(weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.numel() == features, "its weight")
    _require(residual is None or residual.shape == x.shape, "its residual")
    _rows(
        _rms_norm,
        rows,
        rows * features,
        x.data_ptr(),
        _row_stride(x),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else _row_stride(residual),
        total.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        features,
        _float_bits(1 / features),
        _float_bits(epsilon),
    )
    return out, total


# --- SwiGLU ---


@Kernel
def _silu_and_mul(args):  # type: ignore[no-untyped-def]
    x, stride, out, features = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9)
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for row in range(first, min(first + grain, tasks)):
            gate, target = x + 2 * row * stride, out + 2 * row * features
            up = gate + 2 * features
            for i in range(features):
                value = _bf16(gate, i)
                _set_bf16(target, i, value / (_ONE + _exp(-value)) * _bf16(up, i))
        first = _take(args, _NEXT, grain)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(x[:, :half]) * x[:, half:] of bf16 [rows, 2 * half]."""
    rows, features = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, features, dtype=torch.bfloat16)
    _rows(_silu_and_mul, rows, x.numel(), x.data_ptr(), _row_stride(x), out.data_ptr(), features)
    return out


# --- rotary embedding ---


@Kernel
def _rotate(args):  # type: ignore[no-untyped-def]
    q, q_stride, q_heads = _i64(args, 6), _i64(args, 7), _i64(args, 8)
    k, k_stride, k_heads = _i64(args, 9), _i64(args, 10), _i64(args, 11)
    out, head_size, table, positions = _i64(args, 12), _i64(args, 13), _i64(args, 14), _i64(args, 15)
    half, limit = head_size // 2, _i64(args, 16)
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for row in range(first, min(first + grain, tasks)):
            position = _i64(positions, row)
            if position < 0 or position >= limit:
                _set_i64(args, _FAULT, 1)
                continue
            cosine = table + 4 * head_size * position
            sine = cosine + 4 * half
            for head in range(q_heads + k_heads):
                if head < q_heads:
                    source = q + 2 * (row * q_stride + head * head_size)
                else:
                    source = k + 2 * (row * k_stride + (head - q_heads) * head_size)
                target = out + 2 * (row * (q_heads + k_heads) + head) * head_size
                for i in range(half):
                    a, b = _bf16(source, i), _bf16(source, half + i)
                    c, s = _f32(cosine, i), _f32(sine, i)
                    _set_bf16(target, i, a * c - b * s)
                    _set_bf16(target, half + i, b * c + a * s)
        first = _take(args, _NEXT, grain)


def rotate(
    q: torch.Tensor, k: torch.Tensor, head_size: int, table: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, bf16 [tokens, heads * head_size], rotated in pairs (i, i + head_size / 2).

    table: float32 [positions, head_size], cosines before sines. positions: int64 [tokens]. Raises IndexError for a
    position outside the table.
    """
    rows, width = q.shape[0], q.shape[1] + k.shape[1]
    _require(table.dtype == torch.float32 and table.is_contiguous() and table.shape[1] == head_size, "its table")
    _require(_is_index(positions, rows), "a position for each row")
    _require(k.shape[0] == rows and q.shape[1] % head_size == 0 and k.shape[1] % head_size == 0, "whole heads")
    out = torch.empty(rows, width, dtype=torch.bfloat16)
    _rows(
        _rotate,
        rows,
        rows * width,
        q.data_ptr(),
        _row_stride(q),
        q.shape[1] // head_size,
        k.data_ptr(),
        _row_stride(k),
        k.shape[1] // head_size,
        out.data_ptr(),
        head_size,
        table.data_ptr(),
        positions.data_ptr(),
        table.shape[0],
    )
    return out[:, : q.shape[1]], out[:, q.shape[1] :]


# --- keys and values into the pool ---


@Kernel
def _store(args):  # type: ignore[no-untyped-def]
    k, k_stride, v, v_stride = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9)
    pool, slots, width, limit = _i64(args, 10), _i64(args, 11), _i64(args, 12), _i64(args, 13)
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for row in range(first, min(first + grain, tasks)):
            key, value, slot = k + 2 * row * k_stride, v + 2 * row * v_stride, _i64(slots, row)
            if slot < 0 or slot >= limit:
                _set_i64(args, _FAULT, 1)
                continue
            target = pool + 4 * width * slot
            for i in range(width):
                _set_u16(target, i, _u16(key, i))
            for i in range(width):
                _set_u16(target + 2 * width, i, _u16(value, i))
        first = _take(args, _NEXT, grain)


def store(k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> None:
    """Write bf16 k and v [tokens, key heads * head_dim] to pool [slots, 2, key heads, head_dim]. slots: int64 [tokens].

    A slot that is listed twice ends with the values of either row. Raises IndexError for a slot outside the pool.
    """
    rows, width = k.shape
    _require(_is_pool(pool) and 2 * width == pool.stride(0) and v.shape == k.shape, "k and v of the pool's heads")
    _require(_is_index(slots, rows), "a slot for each row")
    _rows(
        _store,
        rows,
        2 * rows * width,
        k.data_ptr(),
        _row_stride(k),
        v.data_ptr(),
        _row_stride(v),
        pool.data_ptr(),
        slots.data_ptr(),
        width,
        pool.shape[0],
    )


# --- attention over the pool ---

# The parts are inlined before the kernel is compiled. As calls they would run their own code in a process that compiled
# the kernel, and the kernel's copy of it in a process that read the kernel from the cache; the two round differently.


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c of float32 vectors, rounded once."""
    return _call(builder, f"llvm.fma.v{LANES}f32", _SINGLES, a, b, c)


def _across(builder: Any, sums: list[Any]) -> Any:
    """LANES vectors -> the sum of each one's lanes, in its place. All are added in the same order."""
    # With a flag of their own, or numba would let them be added in another one (core/fastmathpass.py).
    as_written = ("nsz",)
    if len(sums) == 1:
        return sums[0]
    half = len(sums) // 2
    lanes = range(LANES)
    own = ir.Constant(_WORDS, [lane + (LANES if lane & half else 0) for lane in lanes])
    others = ir.Constant(_WORDS, [(lane ^ half) + (LANES if lane & half else 0) for lane in lanes])
    pairs = zip(sums[:half], sums[half:], strict=True)
    shuffle = builder.shuffle_vector
    return _across(
        builder, [builder.fadd(shuffle(a, b, own), shuffle(a, b, others), flags=as_written) for a, b in pairs]
    )


@intrinsic  # type: ignore[untyped-decorator]
def _dots(typing: Any, q: Any, keys: Any, scores: Any, count: Any, width: Any) -> Any:
    """scores[j] = q . keys[j], for `count` keys; all float32 [width], a multiple of LANES.

    Lanes behind `count` are computed with whatever lies behind the keys, and not written: there is room for a multiple
    of LANES keys.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        q, keys, scores, count, width = args
        size = builder.mul(width, _LONG(4))
        lanes = ir.Constant(ir.VectorType(_LONG, LANES), list(range(LANES)))
        sums = [cgutils.alloca_once(builder, _SINGLES) for _ in range(LANES)]
        with cgutils.for_range_slice(builder, _LONG(0), count, _LONG(LANES), intp=_LONG) as (first, _):
            for sum_ in sums:
                builder.store(_alike(_SINGLES, 0.0), sum_)
            rows = [builder.add(keys, builder.mul(builder.add(first, _LONG(i)), size)) for i in range(LANES)]
            for start in range(0, LANES, SUMS_AT_ONCE):
                some = slice(start, start + SUMS_AT_ONCE)
                with cgutils.for_range(builder, builder.udiv(width, _LONG(LANES)), intp=_LONG) as loop:
                    offset = builder.mul(loop.index, _LONG(4 * LANES))
                    part = builder.load(_at(builder, _SINGLES, q, offset), align=4)
                    for row, sum_ in zip(rows[some], sums[some], strict=True):
                        key = builder.load(_at(builder, _SINGLES, row, offset), align=4)
                        builder.store(_fused(builder, key, part, builder.load(sum_)), sum_)
            found = _across(builder, [builder.load(sum_) for sum_ in sums])
            left = builder.trunc(builder.sub(count, first), _WORD)
            written = builder.icmp_signed("<", builder.trunc(lanes, _WORDS), _in_all_lanes(builder, left))
            place = _at(builder, _SINGLES, scores, builder.mul(first, _LONG(4)))
            name = f"llvm.masked.store.v{LANES}f32.p0"
            _call(builder, name, ir.VoidType(), found, place, _WORD(4), written)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), build


@intrinsic  # type: ignore[untyped-decorator]
def _widen_vectors(typing: Any, source: Any, target: Any, count: Any) -> Any:
    """`count` vectors of LANES bf16, as float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target, count = args
        with cgutils.for_range(builder, count, intp=_LONG) as loop:
            offset = builder.mul(loop.index, _LONG(2 * LANES))
            halves = builder.load(_at(builder, _HALVES, source, offset), align=2)
            words = builder.shl(builder.zext(halves, _WORDS), _alike(_WORDS, 16))
            place = _at(builder, _SINGLES, target, builder.mul(offset, _LONG(2)))
            builder.store(builder.bitcast(words, _SINGLES), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), build


# Rows, and vectors of each, whose sums are in registers together.
_ROWS_TOGETHER = 4
_VECTORS_TOGETHER = SUMS_AT_ONCE // _ROWS_TOGETHER


@intrinsic  # type: ignore[untyped-decorator]
def _weigh(typing: Any, weights: Any, step: Any, values: Any, out: Any, rows: Any, count: Any, width: Any) -> Any:
    """out[r] += sum of weights[r, j] values[j], one j after the other: `rows` rows, _ROWS_TOGETHER at most.

    All float32; values and out [width], a multiple of LANES. step: bytes from a row's weights to the next one's.
    """

    def vectors(builder: Any, args: Any, rows: int, first: Any, number: int) -> None:
        """Vectors first to first + number of each row."""
        weights, step, values, out, _, count, width = args
        size, start = builder.mul(width, _LONG(4)), builder.mul(first, _LONG(4 * LANES))
        outs = [
            [builder.add(builder.add(out, builder.mul(size, _LONG(row))), _LONG(4 * LANES * i)) for i in range(number)]
            for row in range(rows)
        ]
        places = [[_at(builder, _SINGLES, part, start) for part in row] for row in outs]
        sums = [[cgutils.alloca_once(builder, _SINGLES) for _ in row] for row in places]
        for place, sum_ in zip(chain.from_iterable(places), chain.from_iterable(sums), strict=True):
            builder.store(builder.load(place, align=4), sum_)
        with cgutils.for_range(builder, count, intp=_LONG) as loop:
            value = builder.add(builder.add(values, builder.mul(loop.index, size)), start)
            parts = [builder.load(_at(builder, _SINGLES, value, _LONG(4 * LANES * i)), align=4) for i in range(number)]
            for row, of_row in enumerate(sums):
                at = builder.add(builder.mul(step, _LONG(row)), builder.mul(loop.index, _LONG(4)))
                weight = _in_all_lanes(builder, builder.load(_at(builder, _SINGLE, weights, at), align=4))
                for part, sum_ in zip(parts, of_row, strict=True):
                    builder.store(_fused(builder, weight, part, builder.load(sum_)), sum_)
        for place, sum_ in zip(chain.from_iterable(places), chain.from_iterable(sums), strict=True):
            builder.store(builder.load(sum_), place, align=4)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        all_vectors = builder.udiv(args[-1], _LONG(LANES))
        whole = builder.sub(all_vectors, builder.urem(all_vectors, _LONG(_VECTORS_TOGETHER)))
        for rows in range(1, _ROWS_TOGETHER + 1):
            with builder.if_then(builder.icmp_signed("==", args[4], _LONG(rows))):
                step = _LONG(_VECTORS_TOGETHER)
                with cgutils.for_range_slice(builder, _LONG(0), whole, step, intp=_LONG) as (first, _):
                    vectors(builder, args, rows, first, _VECTORS_TOGETHER)
                with cgutils.for_range_slice(builder, whole, all_vectors, _LONG(1), intp=_LONG) as (first, _):
                    vectors(builder, args, rows, first, 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), build


@njit(inline="always")
def _softmax(scores, count):  # type: ignore[no-untyped-def]
    """scores -> e^(score - largest), in place; returns their sum."""
    largest = _f32(scores, 0)
    for j in range(1, count):
        largest = max(largest, _f32(scores, j))
    total = _ZERO
    for j in range(count):
        weight = _exp(_f32(scores, j) - largest)
        _set_f32(scores, j, weight)
        total += weight
    return total


@intrinsic  # type: ignore[untyped-decorator]
def _ask_for(typing: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _fetch(builder, _at(builder, _BYTE, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), build


# Slots are read in no order that a processor could guess. So many before one is read, its memory is asked for.
_SLOTS_AHEAD, _CACHE_LINE = 8, 64


@njit(inline="always")
def _gather(args, pool, limit, slots, count, slot_width, head_dim, out, width, values):  # type: ignore[no-untyped-def]
    """Float32 copies of one head of `count` slots, zeros up to width. pool: the address of that head in slot 0.

    values: how many bytes behind the keys the values are, to ask for both ahead; 0: they were asked for.
    """
    for j in range(count):
        if values != 0 and j + _SLOTS_AHEAD < count:
            ahead = pool + 2 * slot_width * _i32(slots, j + _SLOTS_AHEAD)  # one outside the pool does no harm
            for i in range(0, 2 * head_dim, _CACHE_LINE):
                _ask_for(ahead + i)
                _ask_for(ahead + values + i)
        slot = _i32(slots, j)
        if slot < 0 or slot >= limit:
            _set_i64(args, _FAULT, 1)
            slot = 0
        source, target = pool + 2 * slot_width * slot, out + 4 * j * width
        whole = head_dim // LANES
        _widen_vectors(source, target, whole)
        if head_dim % LANES != 0:
            for i in range(whole * LANES, width):
                _set_f32(target, i, _bf16(source, i) if i < head_dim else _ZERO)


@njit(inline="always")
def _begin(q, stride, rows, per_key, head, head_dim, scale, queries, sums, width):  # type: ignore[no-untyped-def]
    """The scaled queries of a task in float32, and zero sums. A row is a token and one query head of the key head."""
    for row in range(rows):
        source = q + 2 * (row // per_key * stride + (head * per_key + row % per_key) * head_dim)
        for i in range(head_dim):
            _set_f32(queries, row * width + i, _bf16(source, i) * scale)
        for i in range(head_dim, width):
            _set_f32(queries, row * width + i, _ZERO)
        for i in range(width):
            _set_f32(sums, row * width + i, _ZERO)


@njit(inline="always")
def _finish(sums, totals, rows, per_key, head, head_dim, out, out_width, width):  # type: ignore[no-untyped-def]
    """Write sums / totals, rounded, to the rows' places in out."""
    for row in range(rows):
        target = out + 2 * (row // per_key * out_width + (head * per_key + row % per_key) * head_dim)
        share = _ONE / _f32(totals, row)
        for i in range(head_dim):
            _set_bf16(target, i, _f32(sums, row * width + i) * share)


# Of an attention task.
_FIELDS = 6


@Kernel
def _attend(args):  # type: ignore[no-untyped-def]
    q, q_stride, out, pool, limit = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9), _i64(args, 10)
    scale, whole_block, at_once = _as_f32(_i64(args, 11)), _i64(args, 12), _i64(args, 13)
    key_heads, per_key, head_dim, table = _i64(args, 14), _i64(args, 15), _i64(args, 16), _i64(args, 17)
    longest, most, tail_width = _i64(args, 18), _i64(args, 19), _i64(args, 20)
    scratch, scratch_size = _i64(args, 21), _i64(args, 22)
    copies = scratch + 4 * scratch_size * _take(args, _THREAD, 1)
    wide = -(-head_dim // LANES) * LANES
    queries = copies + 4 * at_once * wide
    sums = queries + 4 * most * wide
    totals = sums + 4 * most * wide
    scores = totals + 4 * most
    slot_width, width = 2 * key_heads * head_dim, key_heads * per_key * head_dim
    tasks = _i64(args, TASKS)
    unit = _take(args, _NEXT, 1)
    while unit < tasks:
        task, head = table + 8 * _FIELDS * (unit // key_heads), unit % key_heads
        slots, first, tokens, seen, keys = _i64(task, 0), _i64(task, 1), _i64(task, 2), _i64(task, 3), _i64(task, 4)
        tails = _i64(task, 5)  # 0: none
        rows, more = tokens * per_key, 1  # more: how many more keys a token sees than the one before it
        if whole_block != 0:
            seen, more = keys, 0
        keys = seen + more * (tokens - 1)  # what the last one sees
        if tails != 0:
            more, keys = 0, seen
            for token in range(tokens):
                keys = max(keys, seen + _i32(tails, token * tail_width))
        _begin(q + 2 * first * q_stride, q_stride, rows, per_key, head, head_dim, scale, queries, sums, wide)
        source = pool + 2 * head * head_dim
        for start in range(0, keys, at_once):
            count = min(at_once, keys - start)
            shared = count if tails == 0 else max(0, min(count, seen - start))
            _gather(args, source, limit, slots + 4 * start, shared, slot_width, head_dim, copies, wide, slot_width)
            for token in range(tokens):
                tail = tails + 4 * token * tail_width
                sees = seen + (more * token if tails == 0 else _i32(tail, 0))
                visible = max(0, min(count, sees - start))
                if visible > shared:  # where a token's own keys begin, after those that all of its request see
                    own = tail + 4 * (1 + start + shared - seen)
                    place = copies + 4 * shared * wide
                    _gather(args, source, limit, own, visible - shared, slot_width, head_dim, place, wide, slot_width)
                for row in range(token * per_key, (token + 1) * per_key):
                    _dots(queries + 4 * row * wide, copies, scores + 4 * (row * longest + start), visible, wide)
        for row in range(rows):
            token = row // per_key
            sees = seen + (more * token if tails == 0 else _i32(tails, token * tail_width))
            _set_f32(totals, row, _softmax(scores + 4 * row * longest, sees))
        source = pool + 2 * (key_heads + head) * head_dim
        for start in range(0, keys, at_once):
            count = min(at_once, keys - start)
            shared = count if tails == 0 else max(0, min(count, seen - start))
            _gather(args, source, limit, slots + 4 * start, shared, slot_width, head_dim, copies, wide, 0)
            for token in range(tokens):
                tail = tails + 4 * token * tail_width
                sees = seen + (more * token if tails == 0 else _i32(tail, 0))
                visible = max(0, min(count, sees - start))
                if visible > shared:  # where a token's own keys begin, after those that all of its request see
                    own = tail + 4 * (1 + start + shared - seen)
                    place = copies + 4 * shared * wide
                    _gather(args, source, limit, own, visible - shared, slot_width, head_dim, place, wide, 0)
                last = (token + 1) * per_key
                for row in range(token * per_key, last, _ROWS_TOGETHER):
                    weights, some = scores + 4 * (row * longest + start), min(_ROWS_TOGETHER, last - row)
                    _weigh(weights, 4 * longest, copies, sums + 4 * row * wide, some, visible, wide)
        _finish(sums, totals, rows, per_key, head, head_dim, out + 2 * first * width, width, wide)
        unit = _take(args, _NEXT, 1)


@dataclass(frozen=True, slots=True)
class AttentionTasks:
    """A planned forward: rows of [address of slots, first query, queries, keys that the first query sees, keys, tails].

    tails: the address of the first query's row of `own`, or 0.
    """

    table: np.ndarray[Any, Any]
    slots: torch.Tensor  # the addresses lead into it
    own: torch.Tensor  # and into it
    tokens: int  # of the whole batch
    queries: int  # of the largest task
    longest: int  # keys of the longest request
    keys: int  # keys read, over all tasks

    @classmethod
    def of(
        cls, spans: Iterable[tuple[int, int, int, int]], slots: torch.Tensor, own: torch.Tensor | None = None
    ) -> AttentionTasks:
        """spans: for each request (row of slots, first query, queries, keys); its queries are at its last keys.

        slots: int32 [rows, longest context], the pool slot of each key, read when `attend` runs. Raises ValueError for
        a span outside it.

        own: for trees, int32 [tokens, 1 + most]: of each query the number of keys of its own (its ancestors and
        itself), and their slots in order. It sees them after the keys of its request, which all its queries share.
        """
        _require(slots.dtype == torch.int32 and slots.dim() == 2 and slots.stride(1) == 1, "an int32 table of slots")
        is_tree = own is not None
        own = torch.zeros(0, 1, dtype=torch.int32) if own is None else own
        is_table = own.dtype == torch.int32 and own.dim() == 2 and own.shape[1] > 0 and own.is_contiguous()
        _require(is_table, "an int32 table of own keys")
        deepest = own.shape[1] - 1
        base, step = slots.data_ptr(), 4 * slots.stride(0)
        rows: list[tuple[int, int, int, int, int, int]] = []
        tokens = 0
        for row, first, queries, keys in spans:
            fits = keys > 0 if is_tree else queries <= keys
            if not (0 <= row < slots.shape[0] and queries >= 0 and fits and keys <= slots.shape[1] and first == tokens):
                raise ValueError(f"row {row}, queries {first} + {queries}, {keys} keys, table {tuple(slots.shape)}")
            tokens += queries
            for done in range(0, queries, QUERIES_AT_ONCE):
                some = min(QUERIES_AT_ONCE, queries - done)
                seen = keys if is_tree else keys - queries + done + 1
                tails = own.data_ptr() + 4 * own.shape[1] * (first + done) if is_tree else 0
                rows.append((base + step * row, first + done, some, seen, keys + deepest, tails))
        if is_tree:
            counts = own[:, 0]
            _require(len(own) == tokens and bool(((counts >= 0) & (counts <= deepest)).all()), "own keys of each query")
        return cls(
            np.array(rows, dtype=np.int64).reshape(-1, _FIELDS),
            slots,
            own,
            tokens,
            max((row[2] for row in rows), default=0),
            max((row[4] for row in rows), default=0),
            sum(row[4] for row in rows),
        )


class _Scratch:
    """Memory for the threads of `attend`, as large as the largest call so far needed."""

    def __init__(self) -> None:
        self.memory = np.empty(0, dtype=np.float32)
        self._address = 0

    def address(self, floats: int) -> int:
        if self.memory.size < floats:
            self.memory = np.empty(0, dtype=np.float32)  # freed before the larger one is allocated
            self.memory = np.empty(floats + floats // 4, dtype=np.float32)  # contexts grow token by token
            self._address = self.memory.ctypes.data
        return self._address


_SCRATCH = _Scratch()


def attend(q: torch.Tensor, pool: torch.Tensor, tasks: AttentionTasks, scale: float, whole_block: bool) -> torch.Tensor:
    """softmax(q K^T scale) V of bf16 q [tokens, heads * head_dim] over pool [slots, 2, key heads, head_dim].

    A query sees the keys up to itself, or with whole_block all keys of its request. Query heads are split evenly over
    key heads. Returns [tokens, heads * head_dim]. Raises IndexError for a slot outside the pool. A process may make one
    call at a time, as SGLang's schedulers do: scratch memory is shared.
    """
    _require(_is_pool(pool), "a pool of bf16 keys and values")
    _require(not (whole_block and tasks.own.numel()), "a tree, in which no query sees the whole block")
    key_heads, head_dim = pool.shape[2], pool.shape[3]
    per_key = q.shape[1] // (key_heads * head_dim)
    _require(q.shape == (tasks.tokens, per_key * key_heads * head_dim), "the queries of the planned forward")
    out = torch.empty(q.shape, dtype=torch.bfloat16)
    units, threads, planned = attention_plan(tasks, (key_heads, per_key, head_dim))
    fixed = (q.data_ptr(), _row_stride(q), out.data_ptr(), pool.data_ptr(), pool.shape[0], _float_bits(scale))
    values = (*fixed, int(whole_block), KEYS_AT_ONCE, *planned)
    Call(_attend, "attention", units, threads, 1, values, 0).run()
    return out


# Where attention's planned values begin, and of these its geometry.
PLANNED = 8
GEOMETRY = slice(PLANNED, PLANNED + 3)


def attention_plan(tasks: AttentionTasks, geometry: tuple[int, int, int]) -> tuple[int, int, tuple[int, ...]]:
    """The number of an attention's tasks, its threads, and those of its values that are not the same in each forward.

    geometry: key heads, query heads of each, head_dim.
    """
    key_heads, per_key, head_dim = geometry
    units = len(tasks.table) * key_heads
    threads = min(units, threads_for(tasks.keys * per_key * key_heads * head_dim))
    most = tasks.queries * per_key
    wide = -(-head_dim // LANES) * LANES
    size = KEYS_AT_ONCE * wide + 2 * most * wide + most + most * tasks.longest
    table, tail_width = tasks.table.ctypes.data, tasks.own.shape[1]
    scratch = _SCRATCH.address(torch.get_num_threads() * size)  # in a list, any of the threads may come
    return units, threads, (*geometry, table, tasks.longest, most, tail_width, scratch, size)


# --- copies ---


@Kernel
def _copy(args):  # type: ignore[no-untyped-def]
    table, stride, index, limit = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9)
    out, out_stride, width = _i64(args, 10), _i64(args, 11), _i64(args, 12)
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for row in range(first, min(first + grain, tasks)):
            place = row if index == 0 else _i64(index, row)
            if place < 0 or place >= limit:
                _set_i64(args, _FAULT, 1)
                continue
            source, target = table + 2 * place * stride, out + 2 * row * out_stride
            for i in range(width):
                _set_u16(target, i, _u16(source, i))
        first = _take(args, _NEXT, grain)


def copy(table: torch.Tensor, out: torch.Tensor, index: torch.Tensor | None = None) -> None:
    """out[i] = table[i], or table[index[i]], of bf16 rows. index: int64. Raises IndexError for one outside of it."""
    rows, width = out.shape
    _require(table.shape[1] == width and (index is not None or len(table) == rows), "rows of one width")
    _require(index is None or _is_index(index, rows), "an index for each row")
    _rows(
        _copy,
        rows,
        rows * width,
        table.data_ptr(),
        _row_stride(table),
        0 if index is None else index.data_ptr(),
        len(table) if index is not None else 1 << 62,
        out.data_ptr(),
        _row_stride(out),
        width,
    )


@Kernel
def _widen(args):  # type: ignore[no-untyped-def]
    x, stride, out, width = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9)
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for row in range(first, min(first + grain, tasks)):
            source, target = x + 2 * row * stride, out + 4 * row * width
            for i in range(width):
                _set_f32(target, i, _bf16(source, i))
        first = _take(args, _NEXT, grain)


def widen(x: torch.Tensor) -> torch.Tensor:
    """bf16 rows as float32, contiguous."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.float32)
    _rows(_widen, rows, rows * width, x.data_ptr(), _row_stride(x), out.data_ptr(), width)
    return out


@Kernel
def _add(args):  # type: ignore[no-untyped-def]
    x, stride, bias, out, width = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9), _i64(args, 10)
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for row in range(first, min(first + grain, tasks)):
            source, target = x + 2 * row * stride, out + 2 * row * width
            for i in range(width):
                _set_bf16(target, i, _bf16(source, i) + _bf16(bias, i))
        first = _take(args, _NEXT, grain)


def add(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + bias of bf16 rows, the bias of each."""
    rows, width = x.shape
    _require(bias.dtype == torch.bfloat16 and bias.is_contiguous() and bias.shape == (width,), "a bf16 bias of a row")
    out = torch.empty(rows, width, dtype=torch.bfloat16)
    _rows(_add, rows, rows * width, x.data_ptr(), _row_stride(x), bias.data_ptr(), out.data_ptr(), width)
    return out


# --- the likeliest tokens ---

# Columns whose largest value is looked at before the columns themselves.
_STRETCH = 64


@Kernel
def _largest(args):  # type: ignore[no-untyped-def]
    x, stride, columns, count = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9)
    values, places = _i64(args, 10), _i64(args, 11)
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for row in range(first, min(first + grain, tasks)):
            source, value, place = x + 2 * row * stride, values + 4 * row * count, places + 8 * row * count
            for i in range(count):
                _set_f32(value, i, np.float32(-np.inf))
                _set_i64(place, i, 0)
            for start in range(0, columns, _STRETCH):
                end = min(start + _STRETCH, columns)
                most = _bf16(source, start)
                for column in range(start + 1, end):
                    most = max(most, _bf16(source, column))
                if most <= _f32(value, count - 1):
                    continue
                for column in range(start, end):
                    found = _bf16(source, column)
                    if found <= _f32(value, count - 1):
                        continue
                    i = count - 1
                    while i > 0 and _f32(value, i - 1) < found:
                        _set_f32(value, i, _f32(value, i - 1))
                        _set_i64(place, i, _i64(place, i - 1))
                        i -= 1
                    _set_f32(value, i, found)
                    _set_i64(place, i, column)
            most, total = _f32(value, 0), _ZERO
            for column in range(columns):
                total += _exp(_bf16(source, column) - most)
            shift = most + np.log(total)
            for i in range(count):
                _set_f32(value, i, _f32(value, i) - shift)
        first = _take(args, _NEXT, grain)


def largest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row of bf16 logits x [rows, columns], descending; of equal ones the first column's.

    Returns their log-probabilities among all columns, float32 [rows, count], and their columns, int64 [rows, count].
    """
    rows, columns = x.shape
    _require(0 < count <= columns, f"{count} of {columns} columns")
    values, places = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
    _rows(_largest, rows, x.numel(), x.data_ptr(), _row_stride(x), columns, count, values.data_ptr(), places.data_ptr())
    return values, places


# --- products ---

# A packed weight is [strips, pairs of inputs, LANES outputs, 2]: strips of LANES outputs, in which the pairs of inputs
# follow one another. So a product reads it once, from its first byte to its last. TILE_PAIRS pairs of a strip are a
# tile of AMX. Strips and tiles are whole: what a weight lacks is zeros.
STRIPS = 2  # of a task, computed together where registers hold their sums
TILE_PAIRS, TILE_ROWS = 16, 16
# Rows that vector instructions compute together. From _BUSY of them on, memory is asked for _AHEAD bytes before it is
# needed: else its time and that of the arithmetic add up.
_TOGETHER = (1, 2, 4, min(8, SUMS_AT_ONCE))
_BUSY, _AHEAD = 4, 4096


class _Bfloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


_PAIRS = ir.VectorType(_Bfloat(), 2 * LANES)


class _Unit:
    """A task of a product, for the compiler: STRIPS strips of the weight, and all rows."""

    def __init__(self, builder: Any, args: Any, index: Any) -> None:
        fields = [builder.load(_place(builder, _LONG, args, _LONG(OWN + i)), align=8) for i in range(7)]
        weight, self.pairs, self.x, self.x_stride, out, self.out_stride, self.rows = fields  # strides in bytes
        self.builder = builder
        size = builder.mul(self.pairs, _LONG(4 * LANES))
        first = builder.add(weight, builder.mul(builder.mul(index, _LONG(STRIPS)), size))
        self.strips = [builder.add(first, builder.mul(size, _LONG(strip))) for strip in range(STRIPS)]
        self.out = builder.add(out, builder.mul(index, _LONG(2 * LANES * STRIPS)))

    def row(self, number: Any) -> Any:
        """Its address in x."""
        return self.builder.add(self.x, self.builder.mul(number, self.x_stride))

    def write(self, row: Any, strip: int, sums: Any) -> None:
        """sums: LANES float32."""
        offset = self.builder.mul(row, self.out_stride)
        place = _at(self.builder, _HALVES, self.out, offset, _LONG(2 * LANES * strip))
        self.builder.store(_rounded(self.builder, sums), place, align=2)

    def smaller(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed("<", a, b), a, b)


def _task(compute: Callable[[_Unit], None]) -> Any:
    """task(args, index), from what emits its instructions."""

    @intrinsic  # type: ignore[untyped-decorator]
    def task(typing: Any, args: Any, index: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            compute(_Unit(builder, *values))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), build

    return task


def _by_vectors(add_pair: Callable[[Any, Any, Any, Any], Any], pair_bytes: int) -> Any:
    """A task by vector instructions: each sum is one chain over the pairs of inputs.

    add_pair(builder, sums, words, x): sums, of LANES outputs, with the products of a pair of inputs. words: of each
    output the pair of weights; x: the address of the row's pair, which has pair_bytes.
    """

    def group(unit: _Unit, first: Any, left: Any, count: int) -> None:
        """`count` rows, of which `left` are there; in place of the others the last one is computed again."""
        builder = unit.builder
        last = builder.sub(left, _LONG(1))
        xs = [unit.row(builder.add(first, unit.smaller(_LONG(i), last))) for i in range(count)]
        together = min(STRIPS, SUMS_AT_ONCE // count)
        for start in range(0, STRIPS, together):
            strips = range(start, start + together)
            sums = [[cgutils.alloca_once(builder, _SINGLES) for _ in xs] for _ in strips]
            for sum_ in chain.from_iterable(sums):
                builder.store(_alike(_SINGLES, 0.0), sum_)
            with cgutils.for_range(builder, unit.pairs, intp=_LONG) as loop:
                offset = builder.mul(loop.index, _LONG(4 * LANES))
                for strip, of_strip in zip(strips, sums, strict=True):
                    words = builder.load(_at(builder, _WORDS, unit.strips[strip], offset), align=4 * LANES)
                    if count >= _BUSY:
                        _fetch(builder, _at(builder, _BYTE, unit.strips[strip], offset, _LONG(_AHEAD)))
                    for x, sum_ in zip(xs, of_strip, strict=True):
                        pair = builder.add(x, builder.mul(loop.index, _LONG(pair_bytes)))
                        builder.store(add_pair(builder, builder.load(sum_), words, pair), sum_)
            for i in range(count):
                with builder.if_then(builder.icmp_signed("<", _LONG(i), left)):
                    for strip, of_strip in zip(strips, sums, strict=True):
                        unit.write(builder.add(first, _LONG(i)), strip, builder.load(of_strip[i]))

    def fitting(unit: _Unit, first: Any, left: Any, counts: tuple[int, ...]) -> None:
        if len(counts) == 1:
            group(unit, first, unit.smaller(left, _LONG(counts[0])), counts[0])
            return
        with unit.builder.if_else(unit.builder.icmp_signed("<=", left, _LONG(counts[0]))) as (fits, is_more):
            with fits:
                group(unit, first, left, counts[0])
            with is_more:
                fitting(unit, first, left, counts[1:])

    def compute(unit: _Unit) -> None:
        most = _LONG(_TOGETHER[-1])
        with cgutils.for_range_slice(unit.builder, _LONG(0), unit.rows, most, intp=_LONG) as (first, _):
            fitting(unit, first, unit.builder.sub(unit.rows, first), _TOGETHER)

    return _task(compute)


def _add_pair(builder: Any, sums: Any, words: Any, x: Any) -> Any:
    """With multiply-adds of float32, of which x is a pair."""
    even, odd = (_in_all_lanes(builder, builder.load(_at(builder, _SINGLE, x, _LONG(i)), align=4)) for i in (0, 4))
    low = builder.bitcast(builder.shl(words, _alike(_WORDS, 16)), _SINGLES)
    high = builder.bitcast(builder.and_(words, _alike(_WORDS, 0xFFFF0000)), _SINGLES)
    return _fused(builder, low, even, _fused(builder, high, odd, sums))


def _add_bf16_pair(builder: Any, sums: Any, words: Any, x: Any) -> Any:
    """With AVX512-BF16, which takes pairs as they are."""
    pair = _in_all_lanes(builder, builder.load(_at(builder, _WORD, x), align=2))
    words, pair = builder.bitcast(words, _PAIRS), builder.bitcast(pair, _PAIRS)
    return _call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _SINGLES, sums, words, pair)


def _by_tiles(unit: _Unit) -> None:
    """With AMX: tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights."""
    builder, nothing = unit.builder, ir.VoidType()
    height = unit.smaller(unit.rows, _LONG(TILE_ROWS))
    tile_bytes = 4 * LANES * TILE_ROWS
    buffer = cgutils.alloca_once(builder, _SINGLES, 2 * STRIPS * TILE_ROWS)
    buffer = builder.ptrtoint(buffer, _LONG)

    def load(tile: int, stride: Any, *place: Any) -> None:
        _call(builder, "llvm.x86.tileloadd64", nothing, _BYTE(tile), _at(builder, _BYTE, *place), stride)

    def compute(starts: list[Any]) -> None:
        """The rows from each of these on, as many as a tile has."""
        xs = [unit.row(start) for start in starts]
        sums = [[STRIPS * i + strip for strip in range(STRIPS)] for i in range(len(starts))]
        for tile in chain.from_iterable(sums):
            _call(builder, "llvm.x86.tilezero", nothing, _BYTE(tile))
        with cgutils.for_range(builder, builder.udiv(unit.pairs, _LONG(TILE_PAIRS)), intp=_LONG) as loop:
            for i, strip in enumerate(unit.strips):
                load(6 + i, _LONG(4 * LANES), strip, builder.mul(loop.index, _LONG(tile_bytes)))
            for i, x in enumerate(xs):
                load(4 + i, unit.x_stride, x, builder.mul(loop.index, _LONG(4 * TILE_PAIRS)))
            for i, of_rows in enumerate(sums):
                for strip, tile in enumerate(of_rows):
                    _call(builder, "llvm.x86.tdpbf16ps", nothing, _BYTE(tile), _BYTE(4 + i), _BYTE(6 + strip))
        for tile in chain.from_iterable(sums):
            place = _at(builder, _BYTE, buffer, _LONG(tile_bytes * tile))
            _call(builder, "llvm.x86.tilestored64", nothing, _BYTE(tile), place, _LONG(4 * LANES))
        with cgutils.for_range(builder, height, intp=_LONG) as loop:
            for start, of_rows in zip(starts, sums, strict=True):
                for strip, tile in enumerate(of_rows):
                    offset = builder.mul(loop.index, _LONG(4 * LANES))
                    row = builder.load(_at(builder, _SINGLES, buffer, _LONG(tile_bytes * tile), offset), align=4)
                    unit.write(builder.add(start, loop.index), strip, row)

    with cgutils.for_range_slice(builder, _LONG(0), unit.rows, _LONG(2 * TILE_ROWS), intp=_LONG) as (first, _):
        second = builder.add(first, _LONG(TILE_ROWS))
        # A last tile that is not full begins earlier, and computes some rows twice.
        last = builder.sub(unit.rows, height)
        starts = [unit.smaller(first, last), unit.smaller(second, last)]
        with builder.if_else(builder.icmp_signed("<", second, unit.rows)) as (are_two, is_one):
            with are_two:
                compute(starts)
            with is_one:
                compute(starts[:1])


_fma_task, _bf16_task, _tile_task = _by_vectors(_add_pair, 8), _by_vectors(_add_bf16_pair, 4), _task(_by_tiles)


@intrinsic  # type: ignore[untyped-decorator]
def _shape_tiles(typing: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), _at(builder, _BYTE, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _release_tiles(typing: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), build


@Kernel
def _product_by_fma(args):  # type: ignore[no-untyped-def]
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for index in range(first, min(first + grain, tasks)):
            _fma_task(args, index)
        first = _take(args, _NEXT, grain)


@Kernel
def _product_by_bf16(args):  # type: ignore[no-untyped-def]
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for index in range(first, min(first + grain, tasks)):
            _bf16_task(args, index)
        first = _take(args, _NEXT, grain)


@Kernel
def _product_by_tiles(args):  # type: ignore[no-untyped-def]
    _shape_tiles(_i64(args, 13))
    tasks, grain = _i64(args, TASKS), _i64(args, GRAIN)
    first = _take(args, _NEXT, grain)
    while first < tasks:
        for index in range(first, min(first + grain, tasks)):
            _tile_task(args, index)
        first = _take(args, _NEXT, grain)
    _release_tiles()


# From the slowest. Every machine has the first.
PRODUCTS = {"fma": _product_by_fma, "avx512_bf16": _product_by_bf16, "amx": _product_by_tiles}


def _may_use_tiles() -> bool:
    """Asks Linux for the right to use AMX's registers, which a process has to do once."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)) == 0


@cache
def product_methods() -> tuple[str, ...]:
    """Of PRODUCTS, what this machine can compute, the quickest last."""
    features = llvm.get_host_cpu_features()
    methods = ["fma"]
    if features.get("avx512bf16"):
        methods.append("avx512_bf16")
    if features.get("amx-tile") and features.get("amx-bf16") and sys.platform == "linux" and _may_use_tiles():
        methods.append("amx")
    return tuple(methods)


@cache
def _tile_shapes(rows: int) -> torch.Tensor:
    """AMX's configuration of eight tiles, 64 bytes. Each is 64 bytes wide; those of weights have TILE_PAIRS rows."""
    palette, widths, heights = 1, [4 * LANES] * 8, [rows] * 6 + [TILE_PAIRS] * 2
    return torch.frombuffer(bytearray(struct.pack("<B15x8H16x8B8x", palette, *widths, *heights)), dtype=torch.uint8)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """bf16 [outputs, inputs] in the order in which `product` reads it (see above)."""
    _require(weight.dtype == torch.bfloat16 and weight.dim() == 2, "a bf16 matrix")
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, -inputs % (2 * TILE_PAIRS), 0, -outputs % (STRIPS * LANES)))
    strips = padded.view(padded.shape[0] // LANES, LANES, padded.shape[1] // 2, 2)
    return strips.transpose(1, 2).contiguous()


def product(x: torch.Tensor, packed: torch.Tensor, outputs: int, method: str | None = None) -> torch.Tensor:
    """x W^T of bf16 x [rows, inputs], rounded from float32: [rows, outputs]. packed: W [outputs, inputs], from `pack`.

    method: of product_methods(), which differ in the order of summation; the quickest by itself. With one of them a
    row has the same bits in every batch: its sums are over the inputs in one order, whatever the number of rows.
    """
    rows, inputs = x.shape
    strips, pairs = packed.shape[:2]
    _require(packed.dtype == torch.bfloat16 and packed.is_contiguous() and packed.shape[2:] == (LANES, 2), "packed")
    fits = 0 < outputs <= strips * LANES and inputs + -inputs % (2 * TILE_PAIRS) == 2 * pairs
    _require(fits, f"a packed weight of {outputs} outputs and {inputs} inputs: {tuple(packed.shape)}")
    method = method or product_methods()[-1]
    if inputs != 2 * pairs:
        x = F.pad(x, (0, 2 * pairs - inputs))
    stride = 2 * _row_stride(x)
    if method == "fma":
        x = widen(x)
        stride = 4 * x.shape[1]
    out = torch.empty(rows, strips * LANES, dtype=torch.bfloat16)
    if rows:
        units, threads = strips // STRIPS, threads_for(packed.numel())
        addresses = (packed.data_ptr(), pairs, x.data_ptr(), stride, out.data_ptr(), 2 * strips * LANES)
        values = (*addresses, *rows_of_product(rows))
        Call(PRODUCTS[method], "product", units, threads, max(1, units // (8 * threads)), values, 0).run()
    return out[:, :outputs]


# Where the values of a product begin that depend on the number of rows.
COUNTED = 6


def rows_of_product(rows: int) -> tuple[int, int]:
    """Those values: the number of rows, and the shapes of AMX's tiles for it."""
    return rows, _tile_shapes(min(rows, TILE_ROWS)).data_ptr()


# --- a list of calls ---

# A call is done when its last task is. So threads do not wait for one another but for work: one that another program
# keeps from its core holds up the others only with the tasks that it has begun.

# How often a thread looks at what is not done yet, some 50 microseconds, before it sleeps for so many and looks again:
# the thread that is waited for may need its core.
_LOOKS, _SLEEP = 1_000, 20


@intrinsic  # type: ignore[untyped-decorator]
def _now(typing: Any, address: Any, index: Any) -> Any:
    """An int64 that other threads change."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_place(builder, _LONG, *args), "seq_cst", 8)

    return types.int64(types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _change(typing: Any, address: Any, index: Any, count: Any) -> Any:
    """Add count to it: what this thread wrote before is seen by those who see the change."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.atomic_rmw("add", _place(builder, _LONG, *args[:2]), args[2], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic  # type: ignore[untyped-decorator]
def _pause(typing: Any) -> Any:
    """A moment, in which another thread on the same core may go on."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), build


@intrinsic  # type: ignore[untyped-decorator]
def _jump(typing: Any, function: Any, argument: Any) -> Any:
    """function(argument)"""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_LONG]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@Kernel
def _run(args):  # type: ignore[no-untyped-def]
    arguments, calls, size, kernels = _i64(args, 6), _i64(args, 7), _i64(args, 8), _i64(args, 9)
    sleep = _i64(args, 10)
    for i in range(calls):
        call = arguments + i * size
        tasks = _i64(call, TASKS)
        if _now(call, _NEXT) < tasks:
            _change(call, _INSIDE, 1)
            _jump(_i64(kernels, i), call)
            _change(call, _INSIDE, -1)
        looks = 0
        while _now(call, _NEXT) < tasks or _now(call, _INSIDE) != 0:
            looks += 1
            if looks % _LOOKS == 0:
                _jump(sleep, _SLEEP)
            else:
                _pause()


@cache
def _usleep() -> int:
    return ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0


def run_list(arguments: np.ndarray[Any, Any], kernels: np.ndarray[Any, Any]) -> None:
    """Run calls one after the other on one team of threads.

    arguments: int64 [calls, OWN + most values]. kernels: int64 [calls], their addresses. Raises IndexError as the
    calls do.
    """
    arguments[:, _NEXT] = arguments[:, _THREAD] = arguments[:, _FAULT] = arguments[:, _INSIDE] = 0
    addresses = (arguments.ctypes.data, len(arguments), arguments.strides[0], kernels.ctypes.data, _usleep())
    _run(1, torch.get_num_threads(), 1, *addresses)
    if arguments[:, _FAULT].any():
        raise IndexError("a position, slot or token outside its table")


KERNELS = (_rms_norm, _silu_and_mul, _rotate, _store, _attend, _largest, _copy, _widen, _add, _run)


def prepare() -> None:
    """Compile all kernels, or load them from numba's cache. Compiling takes seconds, once per machine."""
    for kernel in (*KERNELS, PRODUCTS[product_methods()[-1]]):
        kernel.prepare()
