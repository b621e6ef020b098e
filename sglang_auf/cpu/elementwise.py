"""RMSNorm and rotary embedding for a CPU: the same arithmetic as SGLang's native forms in fewer, wider calls.

SGLang's native forms are chains of small operations; at one row a call costs more than its arithmetic, so a layer
spends as long here as in a matrix product. Every result depends on its own row alone. Registered per operator class
through `BaseFusedOp.register_oot_forward` (sglang/kernels/fused_op.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

DISPATCH_KEY = "auf_cpu"


class _RotaryRows:
    """cos and sin of the positions of the running forward, shared by its layers.

    All layers of a forward rotate by the same positions. `begin_forward` is called by the attention backend when it
    plans a forward, so that a positions tensor which is reused and rewritten in place is never read from here.
    """

    def __init__(self) -> None:
        self.forward = 0
        self._key: tuple[int, int, torch.Tensor] | None = None
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin_forward(self) -> None:
        self.forward += 1
        self._key = self._rows = None

    def of(self, rotary: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each [tokens, 1, rotary_dim / 2] float32."""
        key = self._key
        if self._rows is None or key is None or key[:2] != (self.forward, id(rotary)) or key[2] is not positions:
            table = rotary.cos_sin_cache.index_select(0, positions.flatten()).float()
            cos, sin = table.unsqueeze(1).chunk(2, dim=-1)
            self._key, self._rows = (self.forward, id(rotary), positions), (cos, sin)
        assert self._rows is not None
        return self._rows


ROTARY_ROWS = _RotaryRows()


def _one_view(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """[tokens, q + k] over the storage of both, when key follows query in each row of one fused projection."""
    if (
        query.dim() == 2
        and query.stride() == key.stride()
        and query.stride(1) == 1
        and key.data_ptr() == query.data_ptr() + query.shape[1] * query.element_size()
        and query.stride(0) >= query.shape[1] + key.shape[1]
    ):
        return query.as_strided((query.shape[0], query.shape[1] + key.shape[1]), query.stride())
    return None


def _rotate(x: torch.Tensor, head_size: int, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [tokens, heads * head_size] in float32; half-split ("NeoX") pairs; returns x's dtype."""
    half = head_size // 2
    wide = x.unflatten(-1, (-1, head_size)).float()
    first, second = wide[..., :half], wide[..., half:]
    out = torch.empty_like(wide)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out.to(x.dtype).flatten(-2)


def rotary_forward(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: object | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RotaryEmbedding.forward: query and key [tokens, heads * head_size], rotated."""
    if offsets is not None or not self.is_neox_style or self.rotary_dim != self.head_size:
        return self.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)  # type: ignore[no-any-return]
    cos, sin = ROTARY_ROWS.of(self, positions)
    both = _one_view(query, key)
    if both is not None:
        rotated = _rotate(both, self.head_size, cos, sin)
        return rotated[:, : query.shape[1]], rotated[:, query.shape[1] :]
    return (
        _rotate(query.flatten(1), self.head_size, cos, sin).view(query.shape),
        _rotate(key.flatten(1), self.head_size, cos, sin).view(key.shape),
    )


def rms_norm_forward(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: torch.nn.Module | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm.forward: the normed x, and with a residual also x + residual."""
    if (
        post_residual_addition is not None
        or self.variance_size_override is not None
        or self.fp32_residual
        or self.cast_x_before_out_mul
        or self.override_orig_dtype is not None
    ):
        return self.forward_native(x, residual, post_residual_addition)
    if residual is not None:
        x = residual = x + residual
    normed = F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)
    return normed if residual is None else (normed, residual)


def register() -> None:
    """Make SGLang's operators use the forms above on our platform."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    BaseFusedOp.register_oot_forward(RMSNorm, rms_norm_forward, DISPATCH_KEY)
    BaseFusedOp.register_oot_forward(RotaryEmbedding, rotary_forward, DISPATCH_KEY)
