"""Finds, on a CPU, the operations for which the host would have to wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Their result's shape or value is on the host.
LOOKING = {
    *(aten.nonzero, aten._local_scalar_dense, aten.masked_select, aten.is_nonzero, aten.equal, aten.unique_dim),
    *(aten._unique, aten._unique2, aten.unique_consecutive, aten.nonzero_static, aten.bincount, aten.item),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
MASKS = (torch.bool, torch.uint8)
# Methods that copy to the host, which a tensor of a CPU does without an operation.
READING = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__")


class Sync(AssertionError):
    """The host would wait for the device here."""


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in LOOKING:
            raise Sync(str(func))
        masks = [index for index in args[1] if index is not None and index.dtype in MASKS] if packet in INDEXING else []
        if masks:
            raise Sync(f"{func} with a mask")
        if packet is aten.repeat_interleave and isinstance(kwargs.get("repeats", args[-1]), torch.Tensor):
            raise Sync(f"{func} with repeats on the device")
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING:
            raise Sync(f"Tensor.{name}")
        return func(*args, **kwargs or {})


@contextmanager
def no_syncs() -> Iterator[None]:
    """Within it, an operation raises Sync if the host would have to wait for a GPU. SGLang's code counts as ours."""
    with _Methods(), _Operations():
        yield
