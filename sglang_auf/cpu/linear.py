"""bf16 linear layers whose result for a row does not depend on how many rows come with it.

Greedy decoding with speculation equals plain decoding bit for bit only if a token's activations are the same whether
it is computed alone (decode), in a block (verify), in a batch with others, or inside a prefill chunk. oneDNN chooses
its blocking from the number of rows, and some choices add up the products in another order, which sometimes changes a
last bit. So a weight is only ever multiplied with row counts from one set whose results agree. Which counts agree
depends on the machine (AMX, AVX512) and on the shape; a probe finds it when the model is loaded. Weights are reordered
for oneDNN once ("prepacked"), which saves about a third of a decode step.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F

from sglang_auf import env

logger = logging.getLogger(__name__)

# Row counts that a product may be padded to. 33 is the smallest with which oneDNN uses its large-batch AMX blocking.
ROW_COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 33, 48, 64, 96, 128, 192, 256)
# Row count for which oneDNN lays out a prepacked weight.
PREPACKED_FOR = 16
# Typical row counts of plain decoding, verification and prefill: a set is chosen by its cost at these.
TYPICAL_ROWS = (1, 8, 32, 128, 512)
# Rows that cost as much as reading the weight once: with fewer, a product is bound by memory.
ROWS_PER_WEIGHT_READ = 96


def can_prepack() -> bool:
    """Whether oneDNN can reorder bf16 weights on this machine (AVX512 or AVX-NE-CONVERT)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True, slots=True)
class RowSet:
    """Row counts, ascending, that give a row the same bits. Products are padded or split to one of them."""

    counts: tuple[int, ...]

    def padded(self, rows: int) -> int:
        """The smallest count that is not below `rows` (rows <= largest)."""
        for count in self.counts:
            if count >= rows:
                return count
        raise ValueError(f"{rows} rows exceed the largest count {self.counts[-1]}")

    @property
    def largest(self) -> int:
        return self.counts[-1]

    def cost(self, rows: int) -> float:
        """Estimated cost of a product with `rows` rows; 1 is the cost of reading the weight once."""
        full, rest = divmod(rows, self.largest)
        pieces = [self.largest] * full + ([self.padded(rest)] if rest else [])
        return sum(1 + piece / ROWS_PER_WEIGHT_READ for piece in pieces)


def _product(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
    if packed is None:
        return F.linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")


def _prepack(weight: torch.Tensor) -> torch.Tensor | None:
    return torch.ops.mkldnn._reorder_linear_weight(weight, PREPACKED_FOR) if can_prepack() else None


@cache
def agreeing_row_counts(out_features: int, in_features: int) -> tuple[RowSet, ...]:
    """Partition ROW_COUNTS into sets whose products agree bit for bit, by trying them (bf16, this machine).

    The probe's inputs cancel: each product sums +v and -v at random places, so the exact result is 0 and only rounding
    remains. Any change in the order of summation shows in nearly every output. Every row of a product holds one of
    four vectors, so that a dependence on the row's place shows too; a count with such a dependence is in no set.
    """
    generator = torch.Generator().manual_seed(out_features * 131 + in_features)
    half = in_features // 2
    places = torch.randperm(in_features, generator=generator)
    values = torch.randn(4, half, generator=generator) * 2.0 ** torch.randint(0, 12, (4, half), generator=generator)
    x = torch.zeros(4, in_features)
    x[:, places[:half]] = values
    x[:, places[half : 2 * half]] = -values
    row = torch.randn(out_features, half, generator=generator)
    weight = torch.zeros(out_features, in_features)
    weight[:, places[:half]] = row
    weight[:, places[half : 2 * half]] = row
    weight, x = weight.bfloat16(), x.bfloat16()
    packed = _prepack(weight)

    sets: list[tuple[torch.Tensor, list[int]]] = []
    for count in ROW_COUNTS:
        of_row = torch.arange(count) % 4
        result = _product(x[of_row], weight, packed)
        first = result[: min(4, count)]
        if not torch.equal(result, first[of_row]):
            continue
        for index, (reference, counts) in enumerate(sets):
            shared = min(len(reference), len(first))
            if torch.equal(reference[:shared], first[:shared]):
                sets[index] = (max(reference, first, key=len), [*counts, count])
                break
        else:
            sets.append((first, [count]))
    return tuple(RowSet(tuple(counts)) for _, counts in sets)


@cache
def choose_row_set(out_features: int, in_features: int) -> RowSet:
    """The agreeing set with the lowest estimated cost over TYPICAL_ROWS. Depends on the machine and the shape only."""
    sets = agreeing_row_counts(out_features, in_features)
    best = min(sets, key=lambda row_set: (sum(row_set.cost(rows) for rows in TYPICAL_ROWS), row_set.counts))
    logger.info("linear %d x %d: rows padded to %s", out_features, in_features, best.counts)
    return best


@cache
def _padding(rows: int, features: int) -> torch.Tensor:
    """A buffer to pad in. Its last rows may hold anything from earlier products, because rows do not mix."""
    # The drafter's head runs outside inference mode, where an inference tensor cannot be written to.
    with torch.inference_mode(False):
        return torch.zeros(rows, features, dtype=torch.bfloat16)


class RowInvariantLinear:
    """y = x W^T (+ b) in bf16 with results per row that do not depend on the other rows.

    Replaces SGLang's unquantised linear or embedding method (`quant_method`) of a loaded module and has its interface.
    The module keeps its `.weight`, which the drafter reads directly. With env.ROW_INVARIANT off, nothing is padded or
    split: the cost of equal bits is measured against that.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.packed = _prepack(weight)
        self.rows = choose_row_set(*weight.shape) if env.ROW_INVARIANT.is_on() else None

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, in] -> [rows, out]."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.weight.shape[0])
        if self.rows is None:
            result = _product(x, self.weight, self.packed)
        elif x.shape[0] <= self.rows.largest:
            result = self._padded(x, self.rows)
        else:
            result = torch.cat([self._padded(piece, self.rows) for piece in x.split(self.rows.largest)])
        return result if bias is None else result + bias

    def _padded(self, x: torch.Tensor, row_set: RowSet) -> torch.Tensor:
        rows = x.shape[0]
        count = row_set.padded(rows)
        if count == rows:
            return _product(x, self.weight, self.packed)
        padded = _padding(count, x.shape[1])
        padded[:rows] = x
        return _product(padded, self.weight, self.packed)[:rows]

    # The part of SGLang's LinearMethodBase / QuantizeMethodBase interface that a loaded model calls.
    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dim() == 2:
            return self(x, bias)
        return self(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)

    def embedding(self, layer: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)


def install(model: torch.nn.Module) -> int:
    """Give each unquantised bf16 linear layer and head of a loaded SGLang model a RowInvariantLinear; returns how many.

    An embedding table that is also the head (tied) is one module in SGLang and is packed once.
    """
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    head = getattr(model, "lm_head", None)
    installed = 0
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        is_linear = isinstance(module, LinearBase) and isinstance(method, UnquantizedLinearMethod)
        is_head = (
            module is head
            and isinstance(module, VocabParallelEmbedding)
            and isinstance(method, UnquantizedEmbeddingMethod)
        )
        if (is_linear or is_head) and module.weight.dtype == torch.bfloat16:
            module.quant_method = RowInvariantLinear(module.weight.data)
            installed += 1
        elif type(module) is torch.nn.Linear and "forward" not in vars(module) and _is_plain(module):
            # DFlash drafters fuse the tapped features (models/dflash.py) with a plain torch layer.
            module.forward = partial(RowInvariantLinear(module.weight.data).apply, module)
            installed += 1
    return installed


# Weights that are timed: enough to lie in memory and not in a cache, and few enough for a large model's start.
TIMED_BYTES = 384 * 2**20
TIMED_ROWS = tuple(count for count in ROW_COUNTS if count <= 64)
TIMED_PASSES = 2


def product_seconds(model: torch.nn.Module) -> Callable[[int], float]:
    """rows -> seconds that the products of a model with that many rows take, as measured here and now.

    A staircase, because rows are padded; beyond TIMED_ROWS it goes on in steps of the last of them. Of a large model
    only some products are timed, and the time is scaled.
    """
    products = [
        product
        for module in model.modules()
        if isinstance(product := getattr(module, "quant_method", None) or _replaced(module), RowInvariantLinear)
    ]
    whole = sum(product.weight.nbytes for product in products)
    timed, size = [], 0
    for product in products:
        if size < TIMED_BYTES:
            timed.append(product)
            size += product.weight.nbytes
    seconds: list[float] = []
    for count in TIMED_ROWS:
        best = float("inf")
        for _ in range(TIMED_PASSES):
            began = time.perf_counter()
            for product in timed:
                product(_padding(count, product.weight.shape[1]))
            best = min(best, time.perf_counter() - began)
        # A product of more rows takes no less, whatever disturbed the measurement.
        seconds.append(max([best * whole / max(size, 1), *seconds]))

    def of(rows: int) -> float:
        full, rest = divmod(rows, TIMED_ROWS[-1])
        return full * seconds[-1] + (seconds[bisect_left(TIMED_ROWS, rest)] if rest else 0.0)

    return of


def _replaced(module: torch.nn.Module) -> RowInvariantLinear | None:
    """The product of a plain torch layer that `install` has changed."""
    forward = vars(module).get("forward")
    return getattr(forward.func, "__self__", None) if isinstance(forward, partial) else None


def _is_plain(module: torch.nn.Linear) -> bool:
    return module.bias is None and module.weight.dtype == torch.bfloat16
