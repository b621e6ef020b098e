"""Block attention against PyTorch's attention under a dense mask; tokens that a block must not see change nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from sglang_auf.models import attention
from sglang_auf.models.attention import attend, attend_flex, attend_two_part, block_mask, flex_mask, large_mask

Attention = Callable[..., torch.Tensor]
LENGTH, WIDTH, DIM = 9, 4, 8
# Anchors with nothing before, with everything before, twice the same, of overlapping blocks, and unsorted.
ANCHORS = torch.tensor([[0, 4, 9], [5, 5, 1]])


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context_k: torch.Tensor,
    context_v: torch.Tensor,
    anchors: torch.Tensor,
) -> torch.Tensor:
    return attend_flex(q, k, v, context_k, context_v, flex_mask(anchors, context_k.shape[1], q.shape[2]))


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [attend_two_part, flex])
GROUPS = pytest.mark.parametrize(("heads", "keys"), [(4, 2), (3, 3), (4, 1)])


def inputs(heads: int = 4, keys: int = 2, dim: int = DIM) -> list[torch.Tensor]:
    """q, k, v, context_k, context_v."""
    generator = torch.Generator().manual_seed(0)
    rows, blocks = ANCHORS.shape
    in_blocks = [(rows, blocks, WIDTH, heads), (rows, blocks, WIDTH, keys), (rows, blocks, WIDTH, keys)]
    in_context = [(rows, LENGTH, keys)] * 2
    return [torch.randn(*shape, dim, generator=generator) for shape in in_blocks + in_context]


def dense_mask() -> torch.Tensor:
    """Visible keys, [rows, blocks * WIDTH, LENGTH + blocks * WIDTH], written key by key."""
    rows, blocks = ANCHORS.shape
    mask = torch.zeros(rows, blocks * WIDTH, LENGTH + blocks * WIDTH, dtype=torch.bool)
    for row in range(rows):
        for block in range(blocks):
            for slot in range(WIDTH):
                query = block * WIDTH + slot
                for position in range(LENGTH):
                    if position < int(ANCHORS[row, block]):
                        mask[row, query, position] = True
                for other in range(WIDTH):
                    mask[row, query, LENGTH + block * WIDTH + other] = True
    return mask


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context_k: torch.Tensor, context_v: torch.Tensor
) -> torch.Tensor:
    per_key = q.shape[3] // k.shape[3]
    keys = torch.cat([context_k, k.flatten(1, 2)], dim=1).repeat_interleave(per_key, dim=2)
    values = torch.cat([context_v, v.flatten(1, 2)], dim=1).repeat_interleave(per_key, dim=2)
    out = F.scaled_dot_product_attention(
        q.flatten(1, 2).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=dense_mask()[:, None].to(q.device),
    )
    return out.transpose(1, 2).reshape(q.shape)


@IMPLEMENTATIONS
@GROUPS
def test_equals_attention_under_a_dense_mask(implementation: Attention, heads: int, keys: int) -> None:
    tensors = inputs(heads, keys)
    torch.testing.assert_close(implementation(*tensors, ANCHORS), reference(*tensors), rtol=1e-5, atol=1e-6)


def gradients(
    attention: Callable[[list[torch.Tensor]], torch.Tensor], tensors: list[torch.Tensor]
) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attention(leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return list(torch.autograd.grad((out * weights).sum(), leaves))


@GROUPS
def test_gradients_equal_those_under_a_dense_mask(heads: int, keys: int) -> None:
    tensors = inputs(heads, keys)
    ours = gradients(lambda leaves: attend_two_part(*leaves, ANCHORS), tensors)
    theirs = gradients(lambda leaves: reference(*leaves), tensors)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; flex attention has no gradient on a CPU")
def test_the_compiled_kernel_and_its_gradients_equal_those_under_a_dense_mask() -> None:
    tensors = [tensor.cuda() for tensor in inputs(dim=16)]  # the kernel's smallest head
    anchors = ANCHORS.cuda()
    torch.testing.assert_close(flex(*tensors, anchors), reference(*tensors), rtol=1e-2, atol=1e-3)
    ours = gradients(lambda leaves: flex(*leaves, anchors), tensors)
    theirs = gradients(lambda leaves: reference(*leaves), tensors)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_the_mask_of_the_compiled_kernel_is_the_dense_one() -> None:
    visible = block_mask(ANCHORS, LENGTH, WIDTH)
    rows, queries, keys = (torch.arange(size) for size in dense_mask().shape)
    found = visible(rows[:, None, None], torch.tensor(0), queries[None, :, None], keys[None, None, :])
    assert torch.equal(found, dense_mask())


@IMPLEMENTATIONS
def test_context_at_and_after_an_anchor_changes_nothing(implementation: Attention) -> None:
    q, k, v, context_k, context_v = inputs()
    before = implementation(q, k, v, context_k, context_v, ANCHORS)
    for row, block in [(0, 0), (0, 1), (1, 0), (1, 2)]:
        anchor = int(ANCHORS[row, block])
        other_k, other_v = context_k.clone(), context_v.clone()
        other_k[row, anchor:], other_v[row, anchor:] = 7.0, -300.0
        after = implementation(q, k, v, other_k, other_v, ANCHORS)
        assert torch.equal(before[row, block], after[row, block])


@IMPLEMENTATIONS
def test_context_just_before_an_anchor_counts(implementation: Attention) -> None:
    q, k, v, context_k, context_v = inputs()
    before = implementation(q, k, v, context_k, context_v, ANCHORS)
    for row, block in [(0, 1), (0, 2), (1, 0), (1, 2)]:
        other = context_v.clone()
        other[row, int(ANCHORS[row, block]) - 1] += 1.0
        after = implementation(q, k, v, context_k, other, ANCHORS)
        changed = (before[row, block] != after[row, block]).flatten(1).any(1)
        assert changed.all(), "every slot of the block sees it"


@IMPLEMENTATIONS
def test_another_block_changes_nothing_and_the_own_one_counts_in_both_directions(implementation: Attention) -> None:
    q, k, v, context_k, context_v = inputs()
    before = implementation(q, k, v, context_k, context_v, ANCHORS)
    other_q, other_k, other_v = q.clone(), k.clone(), v.clone()
    other_q[1, 1], other_k[1, 1], other_v[1, 1] = 2.0, 7.0, -300.0
    after = implementation(other_q, other_k, other_v, context_k, context_v, ANCHORS)
    same = torch.ones(ANCHORS.shape, dtype=torch.bool)
    same[1, 1] = False
    assert torch.equal(before[same], after[same])

    last = v.clone()
    last[0, 0, -1] += 1.0
    first_slot = implementation(q, k, last, context_k, context_v, ANCHORS)[0, 0, 0]
    assert not torch.equal(first_slot, before[0, 0, 0])


@IMPLEMENTATIONS
def test_a_row_is_the_same_alone_and_with_more_padding(implementation: Attention) -> None:
    q, k, v, context_k, context_v = inputs()
    together = implementation(q, k, v, context_k, context_v, ANCHORS)
    padded = [F.pad(context, (0, 0, 0, 0, 0, 5), value=3.0) for context in (context_k, context_v)]
    alone = implementation(q[1:], k[1:], v[1:], *(context[1:] for context in padded), ANCHORS[1:])
    torch.testing.assert_close(alone, together[1:], rtol=1e-6, atol=1e-7)


def test_two_part_is_what_is_used_without_a_mask_and_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs()
    assert torch.equal(attend(*tensors, ANCHORS), attend_two_part(*tensors, ANCHORS))
    assert torch.equal(attend(*tensors, ANCHORS, flex_mask(ANCHORS, LENGTH, WIDTH)), flex(*tensors, ANCHORS))
    monkeypatch.setattr(attention, "SCORE_BYTES", 0)
    assert large_mask(torch.zeros(*ANCHORS.shape, WIDTH, 8), 2, LENGTH, ANCHORS) is None


def test_scores_decide_whether_a_gpu_gets_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 rows of 3 blocks of 4 slots, 2 heads, 9 + 4 keys, 2 bytes each: 1,248 bytes of scores."""
    blocks = SimpleNamespace(shape=torch.Size([2, 3, 4, 8]), is_cuda=True, element_size=lambda: 2)
    for limit, made in ((1247, True), (1248, False)):
        monkeypatch.setattr(attention, "SCORE_BYTES", limit)
        assert (large_mask(blocks, 2, LENGTH, ANCHORS) is not None) == made


def compiles(limit: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often flex attention is compiled for batches of very different shapes. Results are compared."""
    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(attention, "KERNELS", limit)
    kernel = attention.compiled(flex_attention, backend)
    monkeypatch.setattr(attention, "_flex", lambda device: kernel)
    for rows, blocks, length in [(2, 8, 100), (2, 9, 131), (3, 7, 200), (1, 5, 77), (1, 1, 64), (4, 12, 128)]:
        shapes = [(rows, blocks, 16, 2), (rows, blocks, 16, 1), (rows, blocks, 16, 1), (rows, length, 1)]
        q, k, v, context = (torch.randn(*shape, 16) for shape in shapes)
        anchors = torch.randint(1, length, (rows, blocks))
        expected = attend_two_part(q, k, v, context, context, anchors)
        torch.testing.assert_close(flex(q, k, v, context, context, anchors), expected, rtol=1e-4, atol=1e-5)
    return len(seen)


def test_a_run_s_shapes_are_compiled_and_never_computed_by_the_eager_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager version holds the scores of all heads: 47 GB for a batch of the Qwen3-8B recipe."""
    found = compiles(attention.KERNELS, monkeypatch)
    assert 3 < found < attention.KERNELS / 4
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiles(1, monkeypatch)


def test_bfloat16_stays_within_its_rounding() -> None:
    tensors = [tensor.bfloat16() for tensor in inputs()]
    exact = reference(*(tensor.float() for tensor in tensors))
    found = attend_two_part(*tensors, ANCHORS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)
