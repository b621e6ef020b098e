"""Domino's head (arXiv 2605.29707): a GRU over the drafted tokens corrects the logits, through a low-rank product.

L_final = L_base + W2 SiLU(W1 [h ; s]), where s is the state of a GRU that has read the block's tokens so far. Names and
shapes are those of SpecForge and SGLang (prefix_gru, embed_proj), with shift_label: slot k predicts the token at
anchor + k + 1, slot 0 has no correction (pure_draft_prefix_len 1), and slot k's state has read anchor .. anchor + k.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class PrefixGRU(nn.GRU):  # type: ignore[misc]
    """One layer, no bias."""

    def __init__(self, hidden_size: int, state_size: int) -> None:
        super().__init__(hidden_size, state_size, bias=False, batch_first=True)


def make_projector(hidden_size: int, state_size: int, rank: int, vocab_size: int) -> nn.Sequential:
    """W1, SiLU, W2. W2 starts at zero, so that an untrained correction changes nothing."""
    projector = nn.Sequential(
        nn.Linear(hidden_size + state_size, rank, bias=False), nn.SiLU(), nn.Linear(rank, vocab_size, bias=False)
    )
    nn.init.zeros_(projector[2].weight)
    return projector


def correction_inputs(gru: nn.GRU, projector: nn.Sequential, hidden: Tensor, tokens: Tensor) -> Tensor:
    """SiLU(W1 [h ; s]) of slots 1.., which W2 turns into logits; -> [blocks, slots, rank].

    hidden [blocks, slots, H]: drafter states of slots 1.. tokens [blocks, slots + 1, H]: embeddings of the tokens at
    anchor, anchor + 1, ...; each slot's state has read those up to its own position.
    """
    joined = torch.cat([hidden, _states(gru, tokens)[:, 1:].to(hidden.dtype)], dim=-1)
    return torch.nn.functional.silu(projector[0](joined))


def _states(gru: nn.GRU, tokens: Tensor) -> Tensor:
    """[blocks, slots, state]: what the GRU has read up to each position.

    On CUDA in the type of its weights: autocast computes a GRU there in float16, whatever type it is asked for, and
    small gradients vanish in that. SGLang serves it in bf16.
    """
    if tokens.device.type != "cuda":
        return cast("Tensor", gru(tokens)[0])
    with torch.autocast("cuda", enabled=False):
        return cast("Tensor", gru(tokens.to(gru.weight_ih_l0.dtype))[0])
