"""Each choice of a seeded request with n > 1 gets a seed of its own."""

from __future__ import annotations

import copy
from typing import Any

from sglang_auf.compat import Seam
from sglang_auf.hooks.registry import SEND_REQUEST, Hook

SEAMS = tuple(
    Seam(f"sglang.srt.sampling.sampling_params:SamplingParams.{name}", "hooks.seeds")
    for name in ("n", "sampling_seed", "max_new_tokens")
)


def spread_seeds(manager: Any, tokenized: Any) -> None:
    """Before `TokenizerManager._send_one_request`: of n > 1 seeded choices, choice k draws with seed + k.

    SGLang sends one request per choice, all with the same sampling parameters object; with one seed they would all be
    the same answer. The prefill that it sends ahead of them has its own copy, with max_new_tokens 0.
    """
    shared = getattr(tokenized, "sampling_params", None)
    if shared is None or shared.n == 1 or shared.sampling_seed is None or shared.max_new_tokens == 0:
        return
    tokenized.sampling_params = copy.copy(shared)
    # Within the 64 bits that SGLang admits: the largest seed is followed by the smallest.
    shared.sampling_seed = (shared.sampling_seed + 1 + 2**63) % 2**64 - 2**63


HOOKS = (Hook(SEND_REQUEST, "BEFORE", spread_seeds, ("self", "tokenized_obj")).on_ours(),)
