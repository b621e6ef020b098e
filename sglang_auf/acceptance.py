"""Tau and its relatives: the one definition that replies, server, benchmark and trainer share.

One verify step drafts B-1 tokens, the target accepts the first A of them (0 <= A <= B-1) and adds one of its own.
All figures derive from counts:

    histogram[a]      verify steps that accepted exactly a drafted tokens; length B
    emitted           tokens of the answer that came from verify steps = completion_tokens - 1, the first being
                      prefill's; tokens that a stop cut off do not count
    tau               emitted / verify_steps                      (headline)
    tau_verify        1 + accepted / verify_steps                 (what verification accepted, before any cut)
    alpha_k           P(A >= k | A >= k-1), k = 1..B-1            (Spec-AUF, arXiv 2607.01893, section on alpha_k)
    proposed          drafted tokens: B-1 a verify step; fewer where the block followed the load (adaptive.py), and
                      alpha_k is then not known, as the histogram does not say who was asked for a k-th draft

Pure arithmetic on integers: neither torch nor SGLang is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts of one request, or the sum of many (`+`). Only requests with at least one verify step are counted."""

    histogram: tuple[int, ...] = ()
    emitted: int = 0
    requests: int = 0
    unasked: int = 0
    """Drafts that shorter blocks than B left out; `proposed` is the rest."""

    def __post_init__(self) -> None:
        if any(count < 0 for count in (*self.histogram, self.emitted, self.requests, self.unasked, self.rejected)):
            raise ValueError(f"counts must not be negative: {self}")

    @classmethod
    def of_request(cls, histogram: Sequence[int], completion_tokens: int, proposed: int | None = None) -> Acceptance:
        """One finished request. `histogram[a]` counts steps with a accepted drafts, a = 0..B-1; its length is B.

        proposed: drafted tokens, where blocks were shorter than B. A request without a verify step (one token, or no
        speculation) has no tau: it gives the empty sum.
        """
        if sum(histogram) == 0:
            return cls()
        most = sum(histogram) * (len(histogram) - 1)
        unasked = 0 if proposed is None else most - proposed
        return cls(tuple(histogram), max(completion_tokens - 1, 0), 1, unasked)

    @classmethod
    def from_meta_info(cls, meta_info: Mapping[str, Any]) -> Acceptance:
        """One request from SGLang's `meta_info` (tokenizer_manager.py, `spec_correct_drafts_histogram`).

        SGLang grows its histogram only up to the longest acceptance seen; it is padded to the block size, which
        SGLang gives as proposed drafts per verify step. Blocks that were shorter are in `spec_cap_lens_histogram`.
        """
        steps = int(meta_info.get("spec_verify_ct") or 0)
        if steps == 0:
            return cls()
        histogram = [int(count) for count in meta_info["spec_correct_drafts_histogram"]]
        block = int(meta_info["spec_num_proposed_drafts"]) // steps + 1
        histogram += [0] * (block - len(histogram))
        shorter = enumerate(meta_info.get("spec_cap_lens_histogram") or ())
        unasked = sum((block - length) * int(count) for length, count in shorter)
        return cls.of_request(histogram, int(meta_info["completion_tokens"]), steps * (block - 1) - unasked)

    def __add__(self, other: Acceptance) -> Acceptance:
        """Sum of requests that share a block size; of different ones, `proposed` and `alpha` would mean nothing."""
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
            self.unasked + other.unasked,
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
        """Drafted tokens the target confirmed, before a stop cut any off."""
        return sum(a * count for a, count in enumerate(self.histogram))

    @property
    def proposed(self) -> int:
        return self.verify_steps * (self.block_size - 1) - self.unasked if self.histogram else 0

    @property
    def rejected(self) -> int:
        return self.proposed - self.accepted

    @property
    def tau(self) -> float | None:
        """Mean emitted length; over a sum of requests this is the micro mean. None without a verify step."""
        return self.emitted / self.verify_steps if self.verify_steps else None

    @property
    def tau_verify(self) -> float | None:
        """1 + accepted / verify_steps as one division, so that it equals tau exactly where nothing was cut off."""
        return (self.verify_steps + self.accepted) / self.verify_steps if self.verify_steps else None

    @property
    def alpha(self) -> tuple[float | None, ...]:
        """alpha_1 .. alpha_{B-1}; None where no step reached k-1, and all of them where blocks were shorter than B."""
        if self.unasked:
            return (None,) * (self.block_size - 1)
        reached = reached_at_least(self.histogram)
        return tuple(reached[k] / reached[k - 1] if reached[k - 1] else None for k in range(1, len(reached)))

    def as_dict(self) -> dict[str, Any]:
        """What replies, routes and result files print."""
        return {
            "tau": self.tau,
            "tau_verify": self.tau_verify,
            "verify_steps": self.verify_steps,
            "accepted": self.accepted,
            "proposed": self.proposed,
            "emitted": self.emitted,
            "requests": self.requests,
            "accepted_histogram": list(self.histogram),
            "alpha": list(self.alpha),
        }


def reached_at_least(histogram: Sequence[int]) -> list[int]:
    """N_k = steps that accepted k drafts or more, k = 0..B-1."""
    totals: list[int] = []
    running = 0
    for count in reversed(histogram):
        running += count
        totals.append(running)
    return totals[::-1]


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


def total(requests: Iterable[Acceptance]) -> Acceptance:
    """Sum over requests; its `tau` is the micro mean (ratio of sums)."""
    result = Acceptance()
    for request in requests:
        result += request
    return result


def macro_tau(requests: Iterable[Acceptance]) -> float | None:
    """Mean over requests of their own tau (the paper's average inside a task); requests without a step are left out."""
    taus = [request.tau for request in requests if request.tau is not None]
    return sum(taus) / len(taus) if taus else None


def mean_survival(requests: Iterable[Acceptance]) -> list[float]:
    """P(A >= k) for k = 0.., histograms normalised per request and then averaged; [] without such steps of B slots."""
    known = [request for request in requests if request.verify_steps and not request.unasked]
    survival = [0.0] * max((request.block_size for request in known), default=0)
    for request in known:
        for k, count in enumerate(reached_at_least(request.histogram)):
            survival[k] += count / request.verify_steps / len(known)
    return survival


def conditional(survival: Sequence[float]) -> tuple[float | None, ...]:
    """alpha_1 .. from P(A >= k), k = 0..; None where nothing reached k-1."""
    return tuple(survival[k] / survival[k - 1] if survival[k - 1] else None for k in range(1, len(survival)))


def macro_alpha(requests: Iterable[Acceptance]) -> tuple[float | None, ...]:
    """alpha_k with every request weighted equally: histograms normalised per request, averaged, then the ratio.

    This is the reading of the paper's figure 5 that never divides 0 by 0 inside one request.
    """
    return conditional(mean_survival(requests))


def cut_tokens(request: Acceptance) -> int:
    """Tokens that verification accepted and a stop, the length limit or a grammar's end cut off: 0 <= cut < B.

    Identity for one request that was never retracted: completion_tokens = 1 + accepted + verify_steps - cut.
    A retracted request is prefilled again, and each retraction adds one token that no verify step emitted.
    """
    return request.accepted + request.verify_steps - request.emitted
