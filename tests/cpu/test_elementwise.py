"""RMSNorm, rotary embedding and SwiGLU against float64 and against SGLang's native forms; rows stay independent."""

from __future__ import annotations

import pytest
import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import LinearScalingRotaryEmbedding, RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import DynamicNTKScalingRotaryEmbedding, Llama3RotaryEmbedding
from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding

from sglang_auf.cpu import elementwise
from sglang_auf.cpu.elementwise import rms_norm_forward, rotary_forward, silu_and_mul_forward
from sglang_auf.cpu.platform import AufCpuPlatform

HEADS, KEY_HEADS, HEAD = 9, 3, 64
BF16_HALF_STEP = 2.0**-8


@pytest.fixture(autouse=True)
def on_our_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other platforms SGLang's rotary embedding asks for a device kernel when it is made."""
    monkeypatch.setattr("sglang.srt.layers.rotary_embedding.base.current_platform", AufCpuPlatform())
    monkeypatch.setenv("SGLANG_ROPE_CACHE_FP32", "1")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- RMSNorm ---


def norm_of(size: int, epsilon: float = 1e-5) -> RMSNorm:
    norm = RMSNorm(size, eps=epsilon)
    norm.weight.data = normal(size, seed=3).bfloat16()
    return norm.requires_grad_(False)


def exact_norm(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    """The exact value, rounded to bf16 before and after it is multiplied by the weight, as Llama's own norm does."""
    return bool(((found.double() - exact).abs() <= exact.abs() * (2 * BF16_HALF_STEP + 1e-4) + 1e-30).all())


def normed(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    result = rms_norm_forward(norm, x)
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("shape", [(1, 576), (7, 576), (5, 3, 64)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rms_norm_is_the_exact_one_rounded(shape: tuple[int, ...], scale: float) -> None:
    norm = norm_of(shape[-1])
    x = (normal(*shape) * scale).bfloat16()
    before = x.clone()
    assert close(normed(norm, x), exact_norm(x, norm))
    assert (normed(norm, x).float() - norm.forward_native(x).float()).abs().max() <= 0.05
    assert torch.equal(x, before), "the input is somebody else's"


def test_rms_norm_forward_adds_the_residual_and_returns_the_sum() -> None:
    norm, x, residual = norm_of(576), normal(4, 576).bfloat16(), (normal(4, 576, seed=1) * 20).bfloat16()
    kept = x.clone(), residual.clone()
    result, total = rms_norm_forward(norm, x, residual)
    assert torch.equal(total, x + residual)
    assert close(result, exact_norm(x + residual, norm))
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])
    theirs, their_total = norm.forward_native(x, residual)
    assert torch.equal(total, their_total)
    assert (result.float() - theirs.float()).abs().max() <= 0.05


@pytest.mark.parametrize("options", [{"cast_x_before_out_mul": True}, {"fp32_residual": True}, {"var_hidden_size": 32}])
def test_other_kinds_of_rms_norm_are_sglangs_own(options: dict[str, object]) -> None:
    norm = RMSNorm(64, **options).requires_grad_(False)
    norm.weight.data = norm.weight.data.bfloat16()
    x, residual = normal(3, 64).bfloat16(), normal(3, 64, seed=1).bfloat16()
    for ours, theirs in zip(rms_norm_forward(norm, x, residual), norm.forward_native(x, residual), strict=True):
        assert torch.equal(ours, theirs)


def test_rms_norm_with_a_third_summand_is_sglangs_own() -> None:
    norm, (x, residual, third) = norm_of(64), (normal(3, 64, seed=s).bfloat16() for s in range(3))
    for ours, theirs in zip(
        rms_norm_forward(norm, x, residual, third), norm.forward_native(x, residual, third), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_rows_that_are_not_contiguous_and_residuals_of_another_kind() -> None:
    norm, x = norm_of(64), normal(5, 64).bfloat16()
    across = x.T.contiguous().T
    assert torch.equal(normed(norm, across), normed(norm, x))
    for residual in (normal(5, 64), normal(64).bfloat16()):
        for ours, theirs in zip(rms_norm_forward(norm, x, residual), norm.forward_native(x, residual), strict=True):
            assert torch.equal(ours, theirs)


def test_a_normed_row_has_the_same_bits_in_any_company() -> None:
    norm, x = norm_of(576), normal(300, 576).bfloat16()
    together = normed(norm, x)
    for count in (1, 2, 7, 64, 255):
        part = torch.randperm(300, generator=torch.Generator().manual_seed(count))[:count]
        assert torch.equal(normed(norm, x[part]), together[part])
    wide = normal(300, 1152).bfloat16()
    wide[:, 100:676] = x
    assert torch.equal(normed(norm, wide[:, 100:676]), together), "a view, as after a split"


# --- rotary embedding ---


def rotary_of(neox: bool = True, dim: int = HEAD, base: int = 100_000) -> RotaryEmbedding:
    return RotaryEmbedding(HEAD, dim, 4096, base, neox, torch.bfloat16)


@pytest.fixture
def rotary() -> RotaryEmbedding:
    return rotary_of()


def exact_rotation(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate half-split pairs as complex numbers: (a + ib) e^(i position theta_j). x [tokens, heads * HEAD]."""
    theta = 100_000.0 ** (-torch.arange(0, HEAD, 2).double() / HEAD)
    turn = torch.polar(torch.ones(len(positions), HEAD // 2).double(), positions.double()[:, None] * theta)
    pairs = x.double().unflatten(-1, (-1, HEAD))
    rotated = torch.complex(pairs[..., : HEAD // 2], pairs[..., HEAD // 2 :]) * turn[:, None]
    return torch.cat([rotated.real, rotated.imag], dim=-1).flatten(1)


def projection(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v as SGLang splits them off one projection: views with its row stride."""
    fused = normal(tokens, (HEADS + 2 * KEY_HEADS) * HEAD, seed=seed).bfloat16()
    q, k, v = fused.split([HEADS * HEAD, KEY_HEADS * HEAD, KEY_HEADS * HEAD], dim=-1)
    return q, k, v


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_rotation_is_the_complex_one_rounded_once(rotary: RotaryEmbedding, tokens: int) -> None:
    positions = torch.randint(0, 4096, (tokens,), generator=torch.Generator().manual_seed(tokens))
    q, k, _ = projection(tokens)
    for found, x in zip(rotary_forward(rotary, positions, q, k), (q, k), strict=True):
        exact = exact_rotation(x, positions)
        size = x.double().unflatten(-1, (-1, HEAD)).norm(dim=-1, keepdim=True).expand(-1, -1, HEAD).flatten(1)
        # A float32 angle of 4096 radians is off by up to 2e-4.
        assert ((found.double() - exact).abs() <= exact.abs() * BF16_HALF_STEP + size * 5e-4).all()
        assert (found.shape, found.dtype) == (x.shape, torch.bfloat16)


def test_rotation_agrees_with_sglangs_native_form(rotary: RotaryEmbedding) -> None:
    positions = torch.arange(40) * 97
    q, k, _ = projection(40)
    for ours, theirs in zip(
        rotary_forward(rotary, positions, q, k),
        rotary.forward_native(positions, q.contiguous(), k.contiguous()),
        strict=True,
    ):
        # SGLang rounds sine, cosine and every product to bf16; we round once.
        assert (ours.float() - theirs.float()).abs().max() <= 0.06
        assert ours.shape == theirs.shape


def test_views_of_one_projection_and_separate_tensors_give_the_same_bits(rotary: RotaryEmbedding) -> None:
    positions = torch.arange(5) * 11
    q, k, v = projection(5)
    kept = q.clone(), k.clone(), v.clone()
    fused = rotary_forward(rotary, positions, q, k)
    separate = rotary_forward(rotary, positions, q.clone(), k.clone())
    by_head = rotary_forward(rotary, positions, q.clone().view(5, HEADS, HEAD), k.clone().view(5, KEY_HEADS, HEAD))
    for first, second, third in zip(fused, separate, by_head, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, third.flatten(1))
    assert all(torch.equal(now, then) for now, then in zip((q, k, v), kept, strict=True))


def test_positions_and_heads_in_other_forms(rotary: RotaryEmbedding) -> None:
    positions = torch.arange(5) * 11
    q, k, _ = projection(5)
    expected = rotary_forward(rotary, positions, q, k)
    strided = (torch.arange(10) * 11).view(5, 2).T.contiguous().T.flatten()[::2] // 2
    for other in (positions.int(), strided):
        assert all(torch.equal(a, b) for a, b in zip(rotary_forward(rotary, other, q, k), expected, strict=True))
    mixed = rotary_forward(rotary, positions, q, k.unflatten(1, (KEY_HEADS, HEAD)))
    assert mixed[1].shape == (5, KEY_HEADS, HEAD)
    assert torch.equal(mixed[1].flatten(1), expected[1])
    across = rotary_forward(rotary, positions, q.T.contiguous().T, k.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(across, expected, strict=True))


def test_a_rotated_row_has_the_same_bits_in_any_company(rotary: RotaryEmbedding) -> None:
    positions = torch.randint(0, 4096, (200,), generator=torch.Generator().manual_seed(0))
    q, k, _ = projection(200)
    together = rotary_forward(rotary, positions, q, k)
    for count in (1, 2, 9, 128):
        part = torch.randperm(200, generator=torch.Generator().manual_seed(count))[:count]
        for whole, some in zip(together, rotary_forward(rotary, positions[part], q[part], k[part]), strict=True):
            assert torch.equal(whole[part], some)


def test_positions_that_are_written_anew_and_another_table_are_read_anew(rotary: RotaryEmbedding) -> None:
    """SGLang reuses the buffer of a block's positions, and the drafter has another table."""
    positions = torch.tensor([3, 50])
    q, k, _ = projection(2)
    first = rotary_forward(rotary, positions, q, k)
    positions.copy_(torch.tensor([900, 901]))
    second = rotary_forward(rotary, positions, q, k)
    expected = rotary_forward(rotary, torch.tensor([900, 901]), q, k)
    other = rotary_forward(rotary_of(base=10_000), positions, q, k)
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(other[0], second[0])


@pytest.mark.parametrize("kind", [{"neox": False}, {"dim": 32}])
def test_other_kinds_of_rotation_are_sglangs_own(kind: dict[str, object]) -> None:
    rotary = rotary_of(**kind)  # type: ignore[arg-type]
    positions = torch.arange(6) * 7
    q, k, _ = projection(6)
    for ours, theirs in zip(
        rotary_forward(rotary, positions, q.contiguous(), k.contiguous()),
        rotary.forward_native(positions, q.contiguous(), k.contiguous()),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        (LinearScalingRotaryEmbedding, (512, 10_000, True, 4.0, torch.bfloat16)),
        (DynamicNTKScalingRotaryEmbedding, (512, 10_000, True, 4.0, torch.bfloat16)),
        (Llama3RotaryEmbedding, (2048, 500_000, True, torch.bfloat16, 8.0, 1.0, 4.0, 512)),
        (YaRNScalingRotaryEmbedding, (512, 10_000, True, 4.0, torch.bfloat16)),
    ],
)
def test_scaled_positions_differ_in_their_table_alone(
    kind: type[RotaryEmbedding], scaling: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = kind(HEAD, HEAD, *scaling)
    monkeypatch.setattr(BaseFusedOp, "_oot_forward_registry", {})
    elementwise.register()
    monkeypatch.setattr("sglang.kernels.fused_op._oot_dispatch_key", lambda: elementwise.DISPATCH_KEY)
    assert scaled._resolve_forward_method().__func__ is rotary_forward
    assert scaled.cos_sin_cache.dtype == torch.float32
    positions = torch.randint(0, 2048, (33,), generator=torch.Generator().manual_seed(1))
    q, k, _ = projection(33)
    cos, sin = scaled.cos_sin_cache[positions].double().chunk(2, dim=-1)
    turn = torch.complex(cos, sin)[:, None]
    for found, x in zip(rotary_forward(scaled, positions, q, k), (q, k), strict=True):
        pairs = x.double().unflatten(-1, (-1, HEAD))
        rotated = torch.complex(pairs[..., : HEAD // 2], pairs[..., HEAD // 2 :]) * turn
        exact = torch.cat([rotated.real, rotated.imag], dim=-1).flatten(1)
        assert ((found.double() - exact).abs() <= exact.abs() * BF16_HALF_STEP + 1e-5).all()


def test_offsets_are_left_to_sglang(rotary: RotaryEmbedding) -> None:
    positions, offsets = torch.arange(6), torch.full((6,), 40)
    q, k, _ = projection(6)
    shifted = rotary_forward(rotary, positions, q.contiguous(), k.contiguous(), offsets)
    theirs = rotary.forward_native(positions + 40, q.contiguous(), k.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(shifted, theirs, strict=True))


# --- SwiGLU ---


@pytest.mark.parametrize("rows", [1, 9, 200])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_silu_and_mul_is_the_exact_one_rounded(rows: int, scale: float) -> None:
    x = (normal(rows, 300) * scale).bfloat16()
    exact = torch.nn.functional.silu(x[:, :150].double()) * x[:, 150:].double()
    found = silu_and_mul_forward(SiluAndMul(), x)
    assert close(found, exact)
    assert (found.double() - SiluAndMul().forward_native(x).double()).abs().max() <= exact.abs().max() * 2.0**-6


def test_other_forms_of_silu_and_mul_are_sglangs_own() -> None:
    for x in (normal(3, 8), normal(2, 3, 8).bfloat16(), normal(8, 4).bfloat16().T):
        assert torch.equal(silu_and_mul_forward(SiluAndMul(), x), SiluAndMul().forward_native(x))


# --- registration ---


def test_our_platform_dispatches_to_these_forms_and_no_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseFusedOp, "_oot_forward_registry", {})
    elementwise.register()
    norm, rotary = norm_of(64), rotary_of()
    monkeypatch.setattr("sglang.kernels.fused_op._oot_dispatch_key", lambda: elementwise.DISPATCH_KEY)
    assert norm._resolve_forward_method().__func__ is rms_norm_forward
    assert SiluAndMul()._resolve_forward_method().__func__ is silu_and_mul_forward
    assert rotary._resolve_forward_method().__func__ is rotary_forward
    special = type("Special", (RotaryEmbedding,), {})(HEAD, HEAD, 64, 10_000, True, torch.bfloat16)
    assert special._resolve_forward_method().__func__ is RotaryEmbedding.forward_native
    monkeypatch.setattr("sglang.kernels.fused_op._oot_dispatch_key", lambda: "another")
    assert norm._resolve_forward_method().__func__ is RMSNorm.forward_native


def test_sglangs_forward_method_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseFusedOp, "_oot_forward_registry", {})
    elementwise.register()
    monkeypatch.setattr("sglang.kernels.fused_op._oot_dispatch_key", lambda: elementwise.DISPATCH_KEY)
    norm, x, residual = norm_of(576), normal(4, 576).bfloat16(), normal(4, 576, seed=1).bfloat16()
    for through, ours in zip(norm(x, residual), rms_norm_forward(norm, x, residual), strict=True):
        assert torch.equal(through, ours)
