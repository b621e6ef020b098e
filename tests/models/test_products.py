"""Products of bf16 by float32: the same numbers. (test_trainer.py: every product of a run is one.)"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_auf.models import products
from sglang_auf.models.products import ByFloat32, bf16_products
from tests.support.products_seen import Products


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


A, B, C = normal(5, 7), normal(7, 9, seed=1), normal(5, 9, seed=2)
AS, BS, CS = normal(3, 5, 7), normal(3, 7, 9, seed=1), normal(3, 5, 9, seed=2)


@pytest.mark.parametrize(
    ("product", "exact"),
    [
        (lambda: A @ B, lambda: A.float() @ B.float()),
        (lambda: F.linear(A, B.T, C[0]), lambda: A.float() @ B.float() + C[0].float()),
        (lambda: torch.addmm(C, A, B, beta=0.5, alpha=2), lambda: 0.5 * C.float() + 2 * A.float() @ B.float()),
        (lambda: C.clone().addmm_(A, B), lambda: C.float() + A.float() @ B.float()),
        (lambda: torch.mm(A, B, out=torch.empty_like(C)), lambda: A.float() @ B.float()),
        (lambda: AS @ BS, lambda: AS.float() @ BS.float()),
        (lambda: torch.baddbmm(CS, AS, BS), lambda: CS.float() + AS.float() @ BS.float()),
        (lambda: CS.clone().baddbmm_(AS, BS), lambda: CS.float() + AS.float() @ BS.float()),
        (lambda: torch.bmm(AS, BS, out=torch.empty_like(CS)), lambda: AS.float() @ BS.float()),
    ],
)
def test_is_the_float32_product_rounded_once(product: Callable[[], Tensor], exact: Callable[[], Tensor]) -> None:
    with ByFloat32():
        found = product()
    assert found.dtype == torch.bfloat16
    # Sums of another order may round to the neighbouring bf16, whose distance is 2^-8 of the number.
    torch.testing.assert_close(found.float(), exact(), rtol=2**-8, atol=1e-6)
    assert (found == exact().bfloat16()).float().mean() > 0.95


def test_what_writes_in_place_returns_the_tensor_that_it_wrote() -> None:
    out, summed = torch.empty_like(C), C.clone()
    with ByFloat32():
        assert torch.mm(A, B, out=out) is out
        assert summed.addmm_(A, B) is summed
    assert torch.equal(out, (A.float() @ B.float()).bfloat16())
    assert not torch.equal(summed, C)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients(masked: bool) -> None:
    mask = torch.ones(6, 6, dtype=torch.bool).tril() if masked else None

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (normal(2, 3, 6, 8, seed=i).to(dtype).requires_grad_() for i in range(3))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked)
        out.backward(normal(2, 3, 6, 8, seed=3).to(dtype))
        assert q.grad is not None and k.grad is not None and v.grad is not None
        return out.detach(), q.grad, k.grad, v.grad

    with ByFloat32():
        found = run(torch.bfloat16)
    for ours, exact in zip(found, run(torch.float32), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), exact, rtol=2**-6, atol=2**-6)


def test_other_products_are_left_as_they_are() -> None:
    a, b = A.float(), B.float()
    with Products() as seen, ByFloat32():
        assert torch.equal(a @ b, torch.mm(a, b))
        assert torch.equal(A + A, A.float().mul(2).bfloat16())
    assert seen.by_type == {torch.float32: 4}


@pytest.fixture
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without instructions for bf16."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda: False)


@pytest.mark.usefixtures("no_instructions")
def test_ends_with_its_block() -> None:
    with Products() as outside:
        with bf16_products("cpu"):
            A @ B
        inside = dict(outside.by_type)
        A @ B
    assert inside == {torch.float32: 2}
    assert outside.by_type == {torch.float32: 2, torch.bfloat16: 2}


@pytest.mark.usefixtures("no_instructions")
def test_a_gpu_is_left_alone_whatever_the_cpu_beside_it_has() -> None:
    """Dynamo compiles nothing while a dispatch mode is on."""
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        with bf16_products(device):
            assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    with bf16_products("cpu"):
        assert torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_does_nothing_on_a_cpu_with_such_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bf16", lambda: True)
    with Products() as outside, bf16_products("cpu"):
        A @ B
    assert outside.by_type == {torch.bfloat16: 2}
