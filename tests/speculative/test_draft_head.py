"""The greedy choice among listed tokens, eager and as SGLang's captured sampler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.speculative.dflash_worker_v2 import _DflashDraftSampler

from sglang_auf.cpu import linear
from sglang_auf.errors import ConfigError
from sglang_auf.speculative.draft_head import DraftHead, ListedDraftSampler

LISTED = [1, 4, 7, 30, 63]


def weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    made = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    made[7] = made[4]  # of equal logits the first is drafted
    return made


def masked_choice(head: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The other way to say it: all logits, those of unlisted tokens at minus infinity."""
    logits = (hidden.to(head.dtype) @ head.T).float()
    unlisted = torch.ones(64, dtype=torch.bool)
    unlisted[LISTED] = False
    return logits.masked_fill(unlisted, -torch.inf).argmax(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_best_of_the_listed_tokens(dtype: torch.dtype) -> None:
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    found = DraftHead(SimpleNamespace(weight=weight(dtype)), LISTED)(hidden)
    expected = masked_choice(weight(dtype), hidden)
    assert torch.equal(found, expected)
    assert set(found.tolist()) == {1, 4, 30, 63}


def test_on_the_cpu_platform_a_draft_does_not_depend_on_its_company() -> None:
    lm_head = SimpleNamespace(weight=weight(), quant_method=linear.RowInvariantLinear(weight()))
    head = DraftHead(lm_head, LISTED)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = head(hidden)
    assert torch.equal(together, torch.cat([head(row[None]) for row in hidden]))
    assert set(together.tolist()) <= set(LISTED)
    assert len(head(hidden[:0])) == 0


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_likeliest_of_the_listed_tokens_begin_with_the_drafted_one(count: int) -> None:
    head = DraftHead(SimpleNamespace(weight=weight(), quant_method=linear.RowInvariantLinear(weight())), LISTED)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    chances, tokens = head.likeliest(hidden, count)
    logits = linear.RowInvariantLinear(weight()[LISTED].contiguous())(hidden)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(tokens, torch.tensor(LISTED)[order])
    assert torch.equal(tokens[:, 0], head(hidden))
    expected = torch.log_softmax(logits.float(), dim=-1).gather(1, order)
    torch.testing.assert_close(chances, expected, rtol=1e-5, atol=1e-5)
    alone = [head.likeliest(row[None], count) for row in hidden]
    assert torch.equal(chances, torch.cat([of for of, _ in alone]))


@pytest.mark.parametrize("lm_head", [SimpleNamespace(), SimpleNamespace(weight=torch.zeros(4, 4, dtype=torch.int8))])
def test_a_quantised_head_is_refused(lm_head: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="draft vocabulary"):
        DraftHead(lm_head, [1])


def test_the_captured_sampler_chooses_alike_and_writes_where_sglang_reads() -> None:
    block, most = 4, 3
    whole = _DflashDraftSampler(weight=weight(), block_size=block, num_org=64, org_vocab_start=0, max_bs=most)
    head = DraftHead(SimpleNamespace(weight=weight()), LISTED)
    listed = ListedDraftSampler(head, whole)
    assert listed.out.shape == whole.out.shape
    for requests in (3, 1, 2):  # with what a larger batch left behind in the buffer
        hidden = torch.randn(requests * block, 32, generator=torch.Generator().manual_seed(requests)).bfloat16()
        address = listed.out.data_ptr()
        listed(hidden)
        assert listed.out.data_ptr() == address, "a captured graph writes to one place"
        drafted = listed.out[: requests * (block - 1)]
        places = hidden.view(requests, block, -1)[:, 1:].reshape(-1, 32)
        assert torch.equal(drafted, masked_choice(weight(), places))
