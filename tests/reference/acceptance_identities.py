"""Identities that tie the counts of acceptance.py together."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_auf.acceptance import Acceptance


def expected_tau(alpha: Iterable[float | None]) -> float:
    """E[tau_verify] = 1 + sum_k prod_{i<=k} alpha_i: the identity that ties alpha_k to tau.

    A None, as in `Acceptance.alpha`, ends the sum: no step got that far.
    """
    total, survival = 1.0, 1.0
    for value in alpha:
        if value is None:
            break
        survival *= value
        total += survival
    return total


def cut_tokens(request: Acceptance) -> int:
    """Tokens that verification accepted and a stop, the length limit or a grammar's end cut off: 0 <= cut < B.

    Identity for one request that was never retracted: completion_tokens = 1 + accepted + verify_steps - cut.
    A retracted request is prefilled again, and each retraction adds one token that no verify step emitted.
    """
    return request.accepted + request.verify_steps - request.emitted
