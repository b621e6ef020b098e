"""The probe against attention kernels whose faults are known, because they are put in here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_auf.cpu.attention_probe import PIECE, Shapes, agreeing_shapes

ALL_PIECES = tuple(range(64, PIECE + 1, 64))


@pytest.fixture(autouse=True)
def _probe_anew() -> Iterator[None]:
    agreeing_shapes.cache_clear()
    yield
    agreeing_shapes.cache_clear()


def exact(q: Any, k: Any, v: Any, attn_mask: Any, scale: float) -> torch.Tensor:
    """Attention in float64, rounded where its own rounding is far away: the same bits in any shape."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale + attn_mask
    return (scores.softmax(-1) @ v.double()).mul(2**6).round().div(2**6).to(q.dtype)


def kernel(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    """A kernel that is exact but for the shapes `wrong(rows, keys)`, where it is off by half a unit."""

    def attention(q: Any, k: Any, v: Any, attn_mask: Any, scale: float) -> torch.Tensor:
        result = exact(q, k, v, attn_mask, scale)
        return result + 0.5 if wrong(q.shape[2], k.shape[2]) else result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)


def test_a_kernel_without_faults_needs_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, lambda rows, keys: False)
    assert agreeing_shapes(32) == Shapes(2, ALL_PIECES, repeatable=True)


@pytest.mark.parametrize("piece", [1000, 64])
def test_few_rows_that_differ_are_avoided(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows in all, or in what whole pieces leave over."""
    kernel(monkeypatch, lambda rows, keys: 0 < rows % piece < 4)
    assert agreeing_shapes(32) == Shapes(4, ALL_PIECES, repeatable=True)


def test_lengths_of_a_piece_that_differ_are_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, lambda rows, keys: 192 < keys < 384)
    assert agreeing_shapes(32) == Shapes(2, (64, 128, 192, 384, 448, 512), repeatable=True)


def test_a_kernel_that_differs_for_many_rows_is_not_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, lambda rows, keys: rows == 128)
    assert not agreeing_shapes(32).repeatable


def test_a_kernel_that_differs_in_a_batch_is_not_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: Any, k: Any, v: Any, attn_mask: Any, scale: float) -> torch.Tensor:
        return exact(q, k, v, attn_mask, scale) + (0.5 if len(q) > 1 else 0.0)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    assert not agreeing_shapes(32).repeatable


def test_rows_that_differ_at_lengths_that_are_not_used_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, lambda rows, keys: 192 < keys < 384 and rows != 128)
    assert agreeing_shapes(32) == Shapes(2, (64, 128, 192, 384, 448, 512), repeatable=True)


def test_rows_that_differ_among_themselves_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: Any, k: Any, v: Any, attn_mask: Any, scale: float) -> torch.Tensor:
        result = exact(q, k, v, attn_mask, scale)
        result[:, :, -1] += 0.5
        return result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    assert not agreeing_shapes(32).repeatable


@pytest.mark.parametrize("keys", [1, 64, 65, 193, 300, 384, 512, 513, 600, 705, 1024, 1025])
def test_keys_are_padded_to_whole_pieces_and_an_agreeing_last_one(keys: int) -> None:
    pieces = (64, 192, 384, 512)
    padded = Shapes(2, pieces, repeatable=True).padded_keys(keys)
    assert padded >= keys
    assert padded % PIECE in (0, *pieces)
    smaller = [n for n in range(keys, padded) if n % PIECE in (0, *pieces)]
    assert not smaller
