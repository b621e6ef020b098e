"""Which products reach torch's kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Products(TorchDispatchMode):  # type: ignore[misc]
    """Counts products by type. Products of bf16 that reach it were computed in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.by_type: dict[torch.dtype, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name()
        if any(part in name for part in ("mm", "attention", "matmul", "linear", "dot", "mv", "conv")):
            for arg in args:
                if isinstance(arg, Tensor) and arg.is_floating_point():
                    self.by_type[arg.dtype] = self.by_type.get(arg.dtype, 0) + 1
        return func(*args, **(kwargs or {}))
