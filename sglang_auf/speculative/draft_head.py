"""The greedy choice of drafts among the tokens of a draft vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.speculative.dflash_worker_v2 import _DflashDraftSampler

from sglang_auf.checkpoints.draft_vocabulary import FILE
from sglang_auf.cpu.linear import RowInvariantLinear
from sglang_auf.env import DRAFT_VOCABULARY
from sglang_auf.errors import ConfigError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class DraftHead:
    """hidden [slots, H] -> token ids [slots]. tokens [n]: the listed ids. weight [n, H]: a copy of their rows."""

    def __init__(self, lm_head: Any, tokens: Sequence[int]) -> None:
        """lm_head: the target's head, loaded. Raises ConfigError if it is quantised."""
        weight = getattr(lm_head, "weight", None)
        if weight is None or weight.dtype not in FLOATS:
            raise ConfigError(
                f"a draft vocabulary ({FILE}) and a head of {getattr(weight, 'dtype', 'no weight')}",
                "a head in bf16, fp16 or fp32, whose rows can be copied",
                f"set {DRAFT_VOCABULARY.name}=0",
            )
        self.tokens = torch.tensor(tokens, dtype=torch.int64, device=weight.device)
        self.weight = weight.data[self.tokens]
        as_target = isinstance(getattr(lm_head, "quant_method", None), RowInvariantLinear)
        self._logits: Callable[[torch.Tensor], torch.Tensor] = (
            RowInvariantLinear(self.weight) if as_target else partial(F.linear, weight=self.weight)
        )

    def likeliest(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` likeliest tokens of each slot: log-probabilities among the listed ones, and ids, [slots, count].

        On the CPU platform only.
        """
        from sglang_auf.cpu import kernels  # needs numba

        chances, places = kernels.largest(self._logits(hidden), count)
        return chances, self.tokens[places]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        # Of equal logits max gives the first, which is the token with the lowest id because the list ascends.
        return self.tokens[self._logits(hidden.to(self.weight.dtype)).max(dim=-1).indices]


class ListedDraftSampler(_DflashDraftSampler):  # type: ignore[misc]
    """SGLang's sampler of its captured draft graph (CUDA), among the listed tokens. Not for tensor parallelism."""

    def __init__(self, head: DraftHead, original: _DflashDraftSampler) -> None:
        """original: what SGLang would have used; the sizes of its buffers are kept."""
        super().__init__(
            weight=head.weight,
            block_size=original.block_size,
            num_org=len(head.tokens),
            org_vocab_start=0,
            max_bs=len(original.out) // (original.block_size - 1),
        )
        self._tokens = head.tokens

    def __call__(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> None:
        super().__call__(hidden_states, input_ids)
        requests = len(hidden_states) // self.block_size
        drafted = self.out[: requests * (self.block_size - 1)]
        drafted.copy_(self._tokens[drafted])
