"""What a step of trees reports."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_auf.speculative.tree_step import TreeStep

PATHS = [[0, 2, 3], [4]]
"""Accepted rows of two requests, of blocks of 8."""


def test_log_probabilities_are_computed_for_the_longest_path_and_not_for_a_block() -> None:
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    chain = torch.tensor([path + path[-1:] * (8 - len(path)) for path in PATHS])
    tokens = torch.arange(16).view(2, 8)
    batch: Any = SimpleNamespace(
        seq_lens=[30, 9],
        return_logprob=True,
        sampling_info=SimpleNamespace(is_all_greedy=True),
        top_logprobs_nums=[2, 0],
        token_ids_logprobs=None,
    )
    output: Any = SimpleNamespace(next_token_logits=logits)
    step = TreeStep.__new__(TreeStep)
    step.slots = 7
    step._report(batch, output, chain, tokens, torch.tensor([3, 1]))
    assert output.next_token_logits.shape == (2 * 3, 100)
    assert output.next_token_logprobs.shape == (2, 3)
    expected = torch.log_softmax(logits, dim=-1)
    for request, path in enumerate(PATHS):
        for place, row in enumerate(path):
            assert output.next_token_logprobs[request, place] == expected[row, tokens[request, place]]
            number = batch.top_logprobs_nums[request]
            found = output.next_token_top_logprobs_val[3 * request + place]
            assert torch.equal(torch.as_tensor(found), expected[row].topk(number).values)
