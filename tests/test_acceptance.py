"""The identities of acceptance.py on requests played out step by step, as an engine would decode them."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_auf.acceptance import (
    Acceptance,
    macro_alpha,
    macro_tau,
    reached_at_least,
    tau_error,
    total_acceptance,
)
from tests.reference.acceptance_identities import cut_tokens, expected_tau


@dataclass(frozen=True)
class Played:
    """One request: `steps[i]` drafts accepted by verify step i of blocks of `block`, the last `cut` tokens cut off."""

    block: int
    steps: tuple[int, ...]
    cut: int

    @property
    def completion_tokens(self) -> int:
        return 1 + sum(accepted + 1 for accepted in self.steps) - self.cut

    @property
    def histogram(self) -> list[int]:
        return [self.steps.count(accepted) for accepted in range(self.block)]

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance.of_request(self.histogram, self.completion_tokens)

    @property
    def meta_info(self) -> dict[str, Any]:
        """As SGLang gives it: no key of speculation without a verify step, and a histogram only as long as needed."""
        meta_info: dict[str, Any] = {"completion_tokens": self.completion_tokens}
        if self.steps:
            meta_info |= {
                "spec_verify_ct": len(self.steps),
                "spec_num_correct_drafts": sum(self.steps),
                "spec_num_proposed_drafts": len(self.steps) * (self.block - 1),
                "spec_correct_drafts_histogram": self.histogram[: max(self.steps) + 1],
            }
        return meta_info


@st.composite
def played(draw: st.DrawFn, block: int | None = None, min_steps: int = 0) -> Played:
    size = draw(st.integers(2, 16)) if block is None else block
    steps = draw(st.lists(st.integers(0, size - 1), min_size=min_steps, max_size=20))
    # A stop cuts inside the last step and leaves at least one token of it.
    cut = draw(st.integers(0, steps[-1])) if steps else 0
    return Played(size, tuple(steps), cut)


@st.composite
def served(draw: st.DrawFn, min_size: int = 0) -> list[Played]:
    """Requests of one server: they share a block size."""
    block = draw(st.integers(2, 16))
    return draw(st.lists(played(block), min_size=min_size, max_size=8))


@given(played(min_steps=1))
def test_counts_are_those_of_the_steps(request: Played) -> None:
    acceptance = request.acceptance
    assert acceptance.verify_steps == sum(acceptance.histogram) == len(request.steps)
    assert acceptance.accepted == sum(a * n for a, n in enumerate(acceptance.histogram)) == sum(request.steps)
    assert acceptance.proposed == len(request.steps) * (request.block - 1)
    assert acceptance.rejected == acceptance.proposed - acceptance.accepted >= 0
    assert acceptance.requests == 1


@given(played(min_steps=1))
def test_what_a_stop_cut_off_is_less_than_a_block(request: Played) -> None:
    acceptance = request.acceptance
    cut = 1 + acceptance.accepted + acceptance.verify_steps - request.completion_tokens
    assert cut_tokens(acceptance) == cut == request.cut
    assert 0 <= cut < request.block


@given(played(min_steps=1))
def test_tau_leaves_out_prefill_and_cut_tokens(request: Played) -> None:
    acceptance = request.acceptance
    steps = len(request.steps)
    assert acceptance.tau == (request.completion_tokens - 1) / steps
    assert acceptance.tau_verify == pytest.approx(sum(a + 1 for a in request.steps) / steps)
    assert acceptance.tau_verify - acceptance.tau == pytest.approx(request.cut / steps)
    assert (acceptance.tau == acceptance.tau_verify) == (request.cut == 0)
    # SGLang's spec_accept_length = completion_tokens / verify_ct counts prefill's token too.
    assert request.completion_tokens / steps == pytest.approx(acceptance.tau + 1 / steps)
    assert 1 / steps <= acceptance.tau <= acceptance.tau_verify <= request.block


@given(played(min_steps=1))
def test_alpha_is_the_conditional_share_of_steps(request: Played) -> None:
    for k, alpha in enumerate(request.acceptance.alpha, start=1):
        reached = [accepted for accepted in request.steps if accepted >= k - 1]
        if reached:
            assert alpha == sum(accepted >= k for accepted in reached) / len(reached)
        else:
            assert alpha is None
    assert len(request.acceptance.alpha) == request.block - 1


@given(played(min_steps=1))
def test_alpha_gives_tau_back(request: Played) -> None:
    assert expected_tau(request.acceptance.alpha) == pytest.approx(request.acceptance.tau_verify)


@given(st.lists(st.integers(0, 9), max_size=16))
def test_reached_at_least_counts_the_tail(histogram: list[int]) -> None:
    assert reached_at_least(histogram) == [sum(histogram[k:]) for k in range(len(histogram))]


@given(played())
def test_sglangs_meta_info_gives_the_same_counts(request: Played) -> None:
    assert Acceptance.from_meta_info(request.meta_info) == request.acceptance


@given(played(min_steps=1), st.data())
def test_of_trees_the_nodes_are_proposed(request: Played, data: st.DataObject) -> None:
    """Any number of rows that holds the accepted path and the anchor, also more than a block has."""
    trees = [data.draw(st.integers(accepted + 1, 3 * request.block)) for accepted in request.steps]
    counts = [trees.count(rows) for rows in range(max(trees) + 1)]
    acceptance = Acceptance.from_meta_info({**request.meta_info, "spec_cap_lens_histogram": counts})
    assert acceptance.proposed == sum(rows - 1 for rows in trees)
    assert acceptance.rejected == acceptance.proposed - sum(request.steps)
    assert (acceptance.tau, acceptance.histogram) == (request.acceptance.tau, request.acceptance.histogram)
    assert acceptance.alpha == request.acceptance.alpha, "a step without a node at a depth does not reach it"
    assert macro_alpha([acceptance]) == macro_alpha([request.acceptance])
    assert (acceptance + request.acceptance).proposed == acceptance.proposed + request.acceptance.proposed


@given(played(min_steps=1))
def test_steps_that_drafted_nothing_propose_nothing(request: Played) -> None:
    plain = Played(request.block, (0,) * len(request.steps), 0)
    acceptance = Acceptance.from_meta_info({**plain.meta_info, "spec_cap_lens_histogram": [0, len(plain.steps)]})
    assert (acceptance.proposed, acceptance.tau, acceptance.alpha[0]) == (0, 1.0, 0.0)


def test_more_accepted_than_drafted_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Acceptance.of_request([0, 0, 2], 7, proposed=3)


@given(played())
def test_a_request_without_a_verify_step_has_no_tau(request: Played) -> None:
    acceptance = request.acceptance
    assert (acceptance == Acceptance()) == (not request.steps)
    assert (acceptance.tau is None) == (acceptance.tau_verify is None) == (not request.steps)
    assert acceptance.requests == bool(request.steps)


@given(served())
def test_sums_add_every_count(requests: list[Played]) -> None:
    summed = total_acceptance(request.acceptance for request in requests)
    for name in ("verify_steps", "accepted", "proposed", "rejected", "emitted", "requests"):
        assert getattr(summed, name) == sum(getattr(request.acceptance, name) for request in requests), name
    assert summed == total_acceptance(request.acceptance for request in reversed(requests))


@given(served(min_size=1))
def test_micro_tau_is_the_mean_weighted_by_steps_and_macro_the_plain_mean(requests: list[Played]) -> None:
    counted = [request.acceptance for request in requests if request.steps]
    micro, macro = total_acceptance(counted).tau, macro_tau(request.acceptance for request in requests)
    if not counted:
        assert (micro, macro) == (None, None)
        return
    taus = [acceptance.tau for acceptance in counted]
    steps = [acceptance.verify_steps for acceptance in counted]
    assert micro == pytest.approx(sum(tau * n for tau, n in zip(taus, steps, strict=True)) / sum(steps))
    assert macro == pytest.approx(sum(taus) / len(taus))


@given(served())
def test_macro_alpha_gives_the_mean_of_the_requests_tau_back(requests: list[Played]) -> None:
    counted = [request.acceptance for request in requests if request.steps]
    alpha = macro_alpha(request.acceptance for request in requests)
    if not counted:
        assert alpha == ()
        return
    mean = sum(acceptance.tau_verify for acceptance in counted) / len(counted)
    assert expected_tau(alpha) == pytest.approx(mean)
    assert all(value is None or 0 <= value <= 1 for value in alpha)


@given(played(min_steps=1), st.integers(1, 5))
def test_copies_of_one_request_do_not_move_alpha(request: Played, copies: int) -> None:
    alpha = macro_alpha([request.acceptance] * copies)
    assert alpha == pytest.approx(request.acceptance.alpha)
    assert total_acceptance([request.acceptance] * copies).alpha == request.acceptance.alpha


@given(played(), played())
def test_block_sizes_do_not_mix(one: Played, other: Played) -> None:
    if one.steps and other.steps and one.block != other.block:
        with pytest.raises(ValueError, match="cannot sum block sizes"):
            one.acceptance + other.acceptance
    else:
        assert (one.acceptance + other.acceptance).proposed == one.acceptance.proposed + other.acceptance.proposed


@given(played())
def test_the_dictionary_is_json_and_holds_the_properties(request: Played) -> None:
    figures = json.loads(json.dumps(request.acceptance.as_dict()))
    assert figures.pop("accepted_histogram") == list(request.acceptance.histogram)
    assert figures.pop("alpha") == list(request.acceptance.alpha)
    assert figures == {name: getattr(request.acceptance, name) for name in figures}


def test_a_worked_example() -> None:
    """Blocks of 4; steps that accept 3, 0, 1, 3 drafts, the last token cut: 1 + 4 + 1 + 2 + 4 - 1 = 11 tokens."""
    acceptance = Acceptance.of_request([1, 1, 0, 2], completion_tokens=11)
    assert acceptance.tau == 10 / 4
    assert acceptance.tau_verify == 11 / 4
    assert acceptance.alpha == (3 / 4, 2 / 3, 2 / 2)
    assert cut_tokens(acceptance) == 1


@pytest.mark.parametrize("counts", [{"histogram": (1, -1)}, {"emitted": -1}, {"requests": -1}])
def test_negative_counts_are_refused(counts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="negative"):
        Acceptance(**counts)


def test_the_error_of_tau_is_how_far_it_is_off_in_other_draws_of_requests() -> None:
    """Against the spread of tau over many sets of requests. Long answers are alike in themselves and not to others."""
    draw = random.Random(4)

    def request() -> Acceptance:
        steps, likely = draw.randint(3, 40), draw.random()
        accepted = [sum(draw.random() < likely for _ in range(3)) for _ in range(steps)]
        return Acceptance.of_request([accepted.count(a) for a in range(4)], 1 + steps + sum(accepted))

    sets = [[request() for _ in range(60)] for _ in range(400)]
    taus = [total_acceptance(requests).tau or 0.0 for requests in sets]
    errors = [tau_error(requests) or 0.0 for requests in sets]
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(taus), rel=0.1)


def test_fewer_than_two_requests_have_no_error() -> None:
    one = Acceptance.of_request([1, 2], 6)
    assert [tau_error(some) for some in ([], [one], [one, Acceptance()])] == [None] * 3
    assert tau_error([one, one]) == 0.0


@given(played(), st.integers(1, 50))
def test_tokens_of_a_second_prefill_belong_to_no_step(request: Played, prefilled: int) -> None:
    """A retracted request is prefilled again, and a prefill beside a decode step may bring a token to all."""
    once = request.acceptance
    again = Acceptance.of_request(request.histogram, request.completion_tokens + prefilled)
    if once.verify_steps:
        assert once.emitted <= again.emitted <= once.accepted + once.verify_steps
        assert again.tau is not None and again.tau_verify is not None and again.tau <= again.tau_verify
