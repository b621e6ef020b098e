"""bf16 linear layers whose result for a row does not depend on how many rows come with it.

Greedy decoding with speculation equals plain decoding bit for bit only if a token's activations are the same whether
it is computed alone (decode), in a block (verify), in a batch with others, or inside a prefill chunk. Libraries choose
how they add up a product by the number of rows, which sometimes changes a last bit. Here a product adds in one order,
whatever the number of rows, and reads the weight once (kernels.py, "products").
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from sglang_auf import env

# Row count for which oneDNN lays out a prepacked weight.
PREPACKED_FOR = 16


def can_prepack() -> bool:
    """Whether oneDNN can reorder bf16 weights on this machine (AVX512 or AVX-NE-CONVERT)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


Product = Callable[[torch.Tensor], torch.Tensor]
Add = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _in_one_order(weight: torch.Tensor) -> tuple[Product, Add]:
    from sglang_auf.cpu import kernels  # needs numba, and on a GPU nobody does

    product = partial(kernels.product, packed=kernels.pack(weight), outputs=len(weight))
    return lambda x: product(x if kernels.is_rows(x) else x.contiguous()), kernels.add


def _unconstrained(weight: torch.Tensor) -> tuple[Product, Add]:
    """The quickest that torch has."""
    if not can_prepack():
        return partial(F.linear, weight=weight), torch.add
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PREPACKED_FOR)
    return lambda x: torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], ""), torch.add


class RowInvariantLinear:
    """y = x W^T (+ b) in bf16 with results per row that do not depend on the other rows.

    Replaces SGLang's unquantised linear or embedding method (`quant_method`) of a loaded module and has its interface.
    The module keeps its `.weight`, which the drafter reads directly. With env.ROW_INVARIANT off, products are oneDNN's:
    the cost of equal bits is measured against that.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self._product, self._add = (_in_one_order if env.ROW_INVARIANT.is_on() else _unconstrained)(weight)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, in] -> [rows, out]."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.weight.shape[0])
        result = self._product(x)
        return result if bias is None else self._add(result, bias)

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
    from sglang.srt.models.dflash import DFlashAttention

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
        if isinstance(module, DFlashAttention):
            _take_keys_and_values(module)
    return installed


def _take_keys_and_values(attention: torch.nn.Module) -> None:
    """Give a drafter's attention (models/dflash.py) a product of its keys and values alone, for accepted tokens."""
    qkv, queries, width = attention.qkv_proj, attention.q_size, attention.kv_size
    weight, scaled = getattr(qkv, "weight", None), attention.v_scale is not None
    if weight is None or weight.dtype != torch.bfloat16 or scaled or getattr(qkv, "bias", None) is not None:
        return
    product = RowInvariantLinear(weight.data[queries : queries + 2 * width])
    attention.kv_proj_only = lambda x: product(x).split([width, width], dim=-1)


# Weights that are timed: enough to lie in memory and not in a cache, and few enough for a large model's start.
TIMED_BYTES = 384 * 2**20
TIMED_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
TIMED_PASSES = 5


def product_seconds(model: torch.nn.Module) -> Callable[[int], float]:
    """rows -> seconds that the products of a model with that many rows take, as measured here and now.

    A staircase, each number of rows as the next of TIMED_ROWS; beyond them it goes on in steps of the last one. Of a
    large model only some products are timed, and the time is scaled.
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
    best = dict.fromkeys(TIMED_ROWS, float("inf"))
    for _ in range(
        TIMED_PASSES
    ):  # each over all numbers of rows, so that what disturbs some moments disturbs them alike
        for count in TIMED_ROWS:
            began = time.perf_counter()
            for product in timed:
                product(torch.zeros(count, product.weight.shape[1], dtype=torch.bfloat16))
            best[count] = min(best[count], time.perf_counter() - began)
    seconds: list[float] = []
    for count in TIMED_ROWS:
        # A product of more rows takes no less, whatever disturbed the measurement.
        seconds.append(max([best[count] * whole / max(size, 1), *seconds]))

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
