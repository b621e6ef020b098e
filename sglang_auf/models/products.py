"""Products in bf16 on a CPU that has no instructions for them.

Without AVX512 (or AVX-NE-CONVERT) torch multiplies bf16 matrices one number at a time, a hundred times slower than
float32 ones. Here such a product is one of float32, whose result is rounded: the sums are float32, as with such
instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_ATEN = torch.ops.aten
# How many results of each are bf16, from the first: attention's log-sum-exp is float32 for any type.
_PRODUCTS = {
    _ATEN.mm.default: 1,
    _ATEN.bmm.default: 1,
    _ATEN.addmm.default: 1,
    _ATEN.baddbmm.default: 1,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: 1,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default: 3,
}
# Those that write their result to a tensor that is there.
_WRITING = {
    _ATEN.mm.out: _ATEN.mm.default,
    _ATEN.bmm.out: _ATEN.bmm.default,
    _ATEN.addmm.out: _ATEN.addmm.default,
    _ATEN.baddbmm.out: _ATEN.baddbmm.default,
    _ATEN.addmm_.default: _ATEN.addmm.default,
    _ATEN.baddbmm_.default: _ATEN.baddbmm.default,
}


@cache
def multiplies_bf16() -> bool:
    """Whether torch multiplies bf16 matrices with oneDNN on this CPU."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def bf16_products(device: torch.device | str) -> Iterator[None]:
    """Within it (or a function that it decorates), bf16 products on a CPU take no longer than those of float32.

    device: where the products are. Does nothing on a CPU that has instructions for them, and elsewhere: Dynamo compiles
    nothing while such a mode is on, so flex attention would fail. Of this thread, and of the backward passes that it
    starts.
    """
    if torch.device(device).type != "cpu" or multiplies_bf16():
        yield
        return
    with ByFloat32():
        yield


class ByFloat32(TorchDispatchMode):  # type: ignore[misc]
    """Computes the products of bf16 matrices in a CPU's memory by float32."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = _WRITING.get(func, func)
        if product not in _PRODUCTS or not _is_bf16(args):
            return func(*args, **kwargs)
        target = None
        if product is not func:
            kwargs = dict(kwargs)
            target = kwargs.pop("out", args[0])
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        found = product(*args, **kwargs)
        if target is not None:
            return target.copy_(found)
        if isinstance(found, Tensor):
            return found.bfloat16()
        count = _PRODUCTS[product]
        return *(one.bfloat16() for one in found[:count]), *found[count:]


def _is_bf16(args: Sequence[Any]) -> bool:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors) and any(
        x.dtype == torch.bfloat16 for x in tensors
    )


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
