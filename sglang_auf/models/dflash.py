"""The drafter: Qwen3 decoder layers over mask blocks, with the target's features injected as keys and values.

Architecture: arXiv 2602.06036 section 3. Parameters have the names and shapes of the checkpoint (see
checkpoints/weights.py), so that SGLang loads `state_dict()`. Embedding and head are the target's and frozen; they are
not part of this module.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sglang_auf.errors import ConfigError
from sglang_auf.models.attention import attend, large_mask
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.domino import PrefixGRU, make_projector

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

INIT_STD = 0.02


class RMSNorm(nn.Module):  # type: ignore[misc]
    """y = x / rms(x) * weight over the last dimension, computed in float32, returned in x's type."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Rotary(nn.Module):  # type: ignore[misc]
    """Rotary positions, NeoX style (first half with second half), over complete heads, computed in float32."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        self.inverse()  # refuses an unknown kind of scaling now

    def inverse(self, device: torch.device | None = None) -> Tensor:
        """Radians per position, [D / 2]. No buffer: casting the drafter would round it, and spoil far positions."""
        exponents = torch.arange(0, self.config.head_dim, 2, device=device).float() / self.config.head_dim
        return _scaled(self.config.rope_theta**-exponents, self.config.rope_scaling)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., heads, D] at positions [...]."""
        angles = positions[..., None, None].float() * self.inverse(x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _scaled(inverse: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """Inverse frequencies under rope_scaling: none, "linear" or "llama3" (transformers' modeling_rope_utils.py)."""
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if scaling is None or kind == "default":
        return inverse
    if kind == "linear":
        return inverse / scaling["factor"]
    if kind == "llama3":
        original = scaling["original_max_position_embeddings"]
        wavelength = 2 * math.pi / inverse
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return inverse * (smooth + (1 - smooth) / scaling["factor"])
    raise ConfigError(
        f"rope_scaling of type {kind!r}",
        "none, linear or llama3, which this trainer computes as SGLang does",
    )


class Attention(nn.Module):  # type: ignore[misc]
    """Attention of a block to the context's features and to itself."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        rotary: Rotary,
        positions: Tensor,
        context_positions: Tensor,
        anchors: Tensor,
        mask: BlockMask | None,
    ) -> Tensor:
        q = rotary(self.q_norm(self._heads(self.q_proj(x))), positions)
        k = rotary(self.k_norm(self._heads(self.k_proj(x))), positions)
        context_k = rotary(self.k_norm(self._heads(self.k_proj(context))), context_positions)
        v, context_v = self._heads(self.v_proj(x)), self._heads(self.v_proj(context))
        return self.o_proj(attend(q, k, v, context_k, context_v, anchors, mask).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):  # type: ignore[misc]
    """down(silu(gate x) * up x)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):  # type: ignore[misc]
    """Pre-norm attention and MLP. The context gives keys and values only, and skips the input norm."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Tensor, *geometry: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, *geometry)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(nn.Module):  # type: ignore[misc]
    """DFlash backbone, with Domino's head where the config asks for it.

    recompute: whether the backward pass computes a layer's activations again, from the layer's input, which is then all
    that is kept. The numbers are the same.
    """

    recompute = False

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.fc = nn.Linear(len(config.target_layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.rotary = Rotary(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
        if config.head == "domino":
            assert config.gru_hidden_dim is not None and config.emb_dim is not None
            self.prefix_gru = PrefixGRU(hidden, config.gru_hidden_dim)
            self.embed_proj = make_projector(hidden, config.gru_hidden_dim, config.emb_dim, config.vocab_size)

    def forward(self, features: Tensor, embeddings: Tensor, anchors: Tensor) -> Tensor:
        """States of all block slots after the final norm, [R, N, B, H].

        features [R, S, taps * H]: the target's, at positions 0..S-1 (a block ignores those at and after its anchor).
        embeddings [R, N, B, H]: of the anchor's token and B - 1 mask tokens. anchors [R, N]: position of slot 0.
        """
        context = self.hidden_norm(self.fc(features))
        context_positions = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
        positions = anchors[..., None] + torch.arange(embeddings.shape[2], device=anchors.device)
        mask = large_mask(embeddings, self.config.num_attention_heads, features.shape[1], anchors)
        x = embeddings
        given = (context, self.rotary, positions, context_positions, anchors, mask)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, *given)
        return self.norm(x)
