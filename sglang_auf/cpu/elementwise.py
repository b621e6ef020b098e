"""SGLang's norms, rotations and gates on a CPU, as row kernels (kernels.py) in place of chains of torch operations.

They are registered per operator class through `BaseFusedOp.register_oot_forward` (sglang/kernels/fused_op.py). Cases
that a kernel does not cover go to SGLang's native form. No input is written to. The kernels need numba and are imported
at the first call, because every process registers these forms and only a scheduler computes.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_auf import PLATFORM

DISPATCH_KEY = PLATFORM


def rms_norm_forward(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: torch.nn.Module | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm.forward of x [..., features]: the normed x; with a residual (the normed x + residual, x + residual)."""
    from sglang_auf.cpu import kernels

    if (
        post_residual_addition is not None
        or self.variance_size_override is not None
        or self.fp32_residual
        or self.cast_x_before_out_mul
        or self.override_orig_dtype is not None
        or not x.dtype == self.weight.dtype == torch.bfloat16
        or (residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape))
    ):
        return self.forward_native(x, residual, post_residual_addition)
    shape = x.shape
    if not kernels.is_rows(x) or not (residual is None or kernels.is_rows(residual)):
        x = x.reshape(-1, shape[-1]).contiguous()
        residual = None if residual is None else residual.reshape(x.shape).contiguous()
    normed, total = kernels.rms_norm(x, self.weight, self.variance_epsilon, residual)
    if len(shape) != 2:
        normed, total = normed.view(shape), total.view(shape)
    return normed if residual is None else (normed, total)


def rotary_forward(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: object | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RotaryEmbedding.forward: query and key [tokens, heads * head_size] or [tokens, heads, head_size], rotated."""
    from sglang_auf.cpu import kernels

    table = self.cos_sin_cache
    if (
        offsets is not None
        or fused_set_kv_buffer_arg is not None
        or not self.is_neox_style
        or self.rotary_dim != self.head_size
        or table.dtype != torch.float32
        or not query.dtype == key.dtype == torch.bfloat16
    ):
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)  # type: ignore[no-any-return]
    places = positions.flatten().long().contiguous()
    rotated = kernels.rotate(_rows(query), _rows(key), self.head_size, table, places)
    return rotated[0].unflatten(1, query.shape[1:]), rotated[1].unflatten(1, key.shape[1:])


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, ...] as [tokens, features], each row contiguous."""
    x = x.flatten(1)
    return x if x.stride(1) == 1 else x.contiguous()


def silu_and_mul_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """SiluAndMul.forward: silu of the first half of x's features times the second half."""
    from sglang_auf.cpu import kernels

    if not kernels.is_rows(x):
        native: torch.Tensor = self.forward_native(x)
        return native
    return kernels.silu_and_mul(x)


def register() -> None:
    """Make SGLang's operators use the functions above on our platform."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import LinearScalingRotaryEmbedding, RotaryEmbedding
    from sglang.srt.layers.rotary_embedding.rope_variant import DynamicNTKScalingRotaryEmbedding, Llama3RotaryEmbedding
    from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding

    BaseFusedOp.register_oot_forward(RMSNorm, rms_norm_forward, DISPATCH_KEY)
    for kind in (  # SGLang looks up the class itself; these differ in their table alone
        RotaryEmbedding,
        LinearScalingRotaryEmbedding,
        DynamicNTKScalingRotaryEmbedding,
        Llama3RotaryEmbedding,
        YaRNScalingRotaryEmbedding,
    ):
        BaseFusedOp.register_oot_forward(kind, rotary_forward, DISPATCH_KEY)
    BaseFusedOp.register_oot_forward(SiluAndMul, silu_and_mul_forward, DISPATCH_KEY)
