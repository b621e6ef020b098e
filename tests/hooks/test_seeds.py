"""Choices of one seeded request get different seeds, sent as SGLang's tokenizer manager sends them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_auf.hooks.seeds import spread_seeds

LARGEST = 2**63 - 1


def tokenized(**parameters: Any) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=SamplingParams(**parameters))


def sent(original: SimpleNamespace, choices: int) -> list[SamplingParams]:
    """What `choices` sends of one tokenized request carry, copied and sent as TokenizerManager does."""
    parameters = []
    for _ in range(choices):
        choice = copy.copy(original)
        spread_seeds(None, choice)
        parameters.append(copy.copy(choice.sampling_params))  # serialised at once
    return parameters


def test_choices_of_one_seeded_request_draw_with_seeds_of_their_own() -> None:
    assert [p.sampling_seed for p in sent(tokenized(n=3, sampling_seed=41), 3)] == [41, 42, 43]


def test_the_largest_seed_stays_within_64_bits() -> None:
    seeds = [p.sampling_seed for p in sent(tokenized(n=3, sampling_seed=LARGEST), 3)]
    assert torch.tensor(seeds, dtype=torch.int64).tolist() == [LARGEST, -(2**63), -(2**63) + 1]


@pytest.mark.parametrize("parameters", [{"n": 1, "sampling_seed": 5}, {"n": 3}, {"n": 3, "max_new_tokens": 0}])
def test_other_requests_are_sent_as_they_are(parameters: dict[str, Any]) -> None:
    original = tokenized(**parameters)
    before = original.sampling_params
    assert [p.sampling_seed for p in sent(original, 2)] == [parameters.get("sampling_seed")] * 2
    assert original.sampling_params is before


def test_what_has_no_sampling_parameters_is_let_through() -> None:
    spread_seeds(None, SimpleNamespace(input_ids=[1]))
