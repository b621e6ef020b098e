"""Tau and related figures, as replies, server, benchmarks and trainer all compute them.

One verify step drafts B-1 tokens; the target accepts the first A of them (0 <= A <= B-1) and adds one of its own.
All figures follow from counts:

    histogram[a]      verify steps that accepted exactly a drafted tokens; length B
    emitted           tokens of the answer that came from verify steps: all but the first one, which is prefill's, and
                      no more than the steps gave (accepted + verify_steps), since a request that is prefilled again
                      or beside a prefill has more tokens without a step; tokens that a stop cut off do not count
    tau               emitted / verify_steps                      (headline)
    tau_verify        1 + accepted / verify_steps                 (what verification accepted, before any cut)
    alpha_k           P(A >= k | A >= k-1), k = 1..B-1            (Spec-AUF, arXiv 2607.01893, section on alpha_k)
    proposed          drafted tokens that were verified: B-1 per verify step of a chain, the nodes of a tree
                      (speculative/tree.py). A tree may have no node at depth k; such a step does not reach k

Pure arithmetic on integers: neither torch nor SGLang is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts of one request, or the sum of many (`+`). Only requests with at least one verify step are counted."""

    histogram: tuple[int, ...] = ()
    emitted: int = 0
    requests: int = 0
    proposed: int = 0

    def __post_init__(self) -> None:
        if any(count < 0 for count in (*self.histogram, self.emitted, self.requests, self.rejected)):
            raise ValueError(f"counts must not be negative: {self}")

    @classmethod
    def of_request(cls, histogram: Sequence[int], completion_tokens: int, proposed: int | None = None) -> Acceptance:
        """One finished request. `histogram[a]` counts steps with a accepted drafts, a = 0..B-1; its length is B.

        proposed: drafted tokens, where that is not B-1 per step. A request without a verify step (one token, or
        no speculation) has no tau and gives the empty sum.
        """
        if sum(histogram) == 0:
            return cls()
        if proposed is None:
            proposed = sum(histogram) * (len(histogram) - 1)
        given = sum((a + 1) * count for a, count in enumerate(histogram))
        return cls(tuple(histogram), min(max(completion_tokens - 1, 0), given), 1, proposed)

    @classmethod
    def from_meta_info(cls, meta_info: Mapping[str, Any]) -> Acceptance:
        """One request from SGLang's `meta_info` (tokenizer_manager.py, `spec_correct_drafts_histogram`).

        SGLang's histogram ends at the longest acceptance seen. Here it is padded to the block size, which SGLang gives
        as proposed drafts per verify step. How many rows a tree's steps had is in `spec_cap_lens_histogram`.
        """
        steps = int(meta_info.get("spec_verify_ct") or 0)
        if steps == 0:
            return cls()
        histogram = [int(count) for count in meta_info["spec_correct_drafts_histogram"]]
        block = int(meta_info["spec_num_proposed_drafts"]) // steps + 1
        histogram += [0] * (block - len(histogram))
        of_trees = meta_info.get("spec_cap_lens_histogram")
        proposed = sum((rows - 1) * int(count) for rows, count in enumerate(of_trees)) if of_trees else None
        return cls.of_request(histogram, int(meta_info["completion_tokens"]), proposed)

    def __add__(self, other: Acceptance) -> Acceptance:
        """Sum of requests that share a block size: with different ones, `proposed` and `alpha` would mean nothing."""
        if not self.histogram or not other.histogram:
            histogram = self.histogram or other.histogram
        elif len(self.histogram) == len(other.histogram):
            histogram = tuple(a + b for a, b in zip(self.histogram, other.histogram, strict=True))
        else:
            raise ValueError(f"cannot sum block sizes {self.block_size} and {other.block_size}")
        return Acceptance(
            histogram,
            self.emitted + other.emitted,
            self.requests + other.requests,
            self.proposed + other.proposed,
        )

    @property
    def block_size(self) -> int:
        """B; 0 for the empty sum."""
        return len(self.histogram)

    @property
    def verify_steps(self) -> int:
        return sum(self.histogram)

    @property
    def accepted(self) -> int:
        """Drafted tokens that the target confirmed, before a stop cut any off."""
        return sum(a * count for a, count in enumerate(self.histogram))

    @property
    def rejected(self) -> int:
        return self.proposed - self.accepted

    @property
    def nodes_per_step(self) -> float | None:
        """Mean number of drafted tokens that a step verified. None without a verify step."""
        return self.proposed / self.verify_steps if self.verify_steps else None

    @property
    def tau(self) -> float | None:
        """Mean emitted length; of a sum of requests, the micro mean. None without a verify step."""
        return self.emitted / self.verify_steps if self.verify_steps else None

    @property
    def tau_verify(self) -> float | None:
        """1 + accepted / verify_steps, in one division so that it equals tau exactly where nothing was cut off."""
        return (self.verify_steps + self.accepted) / self.verify_steps if self.verify_steps else None

    @property
    def alpha(self) -> tuple[float | None, ...]:
        """alpha_1 .. alpha_{B-1}; alpha_k is None where no step reached k-1."""
        return alpha_from_survival(reached_at_least(self.histogram))

    def as_dict(self) -> dict[str, Any]:
        """The figures as replies, routes and result files give them."""
        return {
            "tau": self.tau,
            "tau_verify": self.tau_verify,
            "verify_steps": self.verify_steps,
            "accepted": self.accepted,
            "proposed": self.proposed,
            "nodes_per_step": self.nodes_per_step,
            "emitted": self.emitted,
            "requests": self.requests,
            "accepted_histogram": list(self.histogram),
            "alpha": list(self.alpha),
        }


def reached_at_least(histogram: Sequence[int]) -> list[int]:
    """N_k: steps that accepted k drafts or more, for k = 0..B-1."""
    totals: list[int] = []
    running = 0
    for count in reversed(histogram):
        running += count
        totals.append(running)
    return totals[::-1]


def total_acceptance(requests: Iterable[Acceptance]) -> Acceptance:
    """Sum over requests; its `tau` is the micro mean (ratio of sums)."""
    result = Acceptance()
    for request in requests:
        result += request
    return result


def tau_error(requests: Sequence[Acceptance]) -> float | None:
    """Standard error of the micro tau, which is a ratio of two sums over requests; None of fewer than two requests.

    Steps of one answer are alike, so requests are what was drawn, and not steps (Cochran, Sampling Techniques, 3rd
    edition, section 2.11: without the correction for a finite population).
    """
    known = [request for request in requests if request.verify_steps]
    total = total_acceptance(known)
    if len(known) < 2 or total.tau is None:
        return None
    squares = sum((request.emitted - total.tau * request.verify_steps) ** 2 for request in known)
    return math.sqrt(len(known) / (len(known) - 1) * squares) / total.verify_steps


def macro_tau(requests: Iterable[Acceptance]) -> float | None:
    """Mean of the requests' taus (the paper's average inside a task), without requests that have no verify step."""
    taus = [request.tau for request in requests if request.tau is not None]
    return sum(taus) / len(taus) if taus else None


def mean_survival(requests: Iterable[Acceptance]) -> list[float]:
    """P(A >= k) for k = 0..: histograms are normalised per request, then averaged.

    Requests without a verify step are left out; [] where none is left.
    """
    known = [request for request in requests if request.verify_steps]
    survival = [0.0] * max((request.block_size for request in known), default=0)
    for request in known:
        for k, count in enumerate(reached_at_least(request.histogram)):
            survival[k] += count / request.verify_steps / len(known)
    return survival


def alpha_from_survival(survival: Sequence[float]) -> tuple[float | None, ...]:
    """alpha_1 .. from P(A >= k) or its counts, for k = 0..; None where nothing reached k-1."""
    return tuple(survival[k] / survival[k - 1] if survival[k - 1] else None for k in range(1, len(survival)))


def macro_alpha(requests: Iterable[Acceptance]) -> tuple[float | None, ...]:
    """alpha_k with equal weights of the requests: the ratios of `mean_survival`.

    This reading of the paper's figure 5 never divides 0 by 0 inside one request.
    """
    return alpha_from_survival(mean_survival(requests))
