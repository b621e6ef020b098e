"""Domino's head: the tokens that each slot's state has read; an untrained correction changes nothing."""

from __future__ import annotations

import pytest
import torch

from sglang_auf.models.domino import PrefixGRU, correction_inputs, make_projector

HIDDEN, STATE, RANK, VOCABULARY = 6, 5, 3, 11
BLOCKS, SLOTS = 2, 4  # corrected slots 1..SLOTS


@pytest.fixture
def parts() -> tuple[PrefixGRU, torch.nn.Sequential, torch.Tensor, torch.Tensor]:
    """GRU, projector, hidden of slots 1.., embeddings of the tokens at anchor .. anchor + SLOTS."""
    torch.manual_seed(0)
    hidden, tokens = torch.randn(BLOCKS, SLOTS, HIDDEN), torch.randn(BLOCKS, SLOTS + 1, HIDDEN)
    return PrefixGRU(HIDDEN, STATE), make_projector(HIDDEN, STATE, RANK, VOCABULARY), hidden, tokens


def state_after(gru: torch.nn.GRU, tokens: torch.Tensor) -> torch.Tensor:
    """The GRU's equations, token by token, tokens [n, HIDDEN]."""
    state = torch.zeros(STATE)
    for token in tokens:
        reset_in, update_in, new_in = (gru.weight_ih_l0 @ token).chunk(3)
        reset_state, update_state, new_state = (gru.weight_hh_l0 @ state).chunk(3)
        reset = torch.sigmoid(reset_in + reset_state)
        update = torch.sigmoid(update_in + update_state)
        state = (1 - update) * torch.tanh(new_in + reset * new_state) + update * state
    return state


def test_slot_k_has_read_the_tokens_from_the_anchor_to_anchor_plus_k(
    parts: tuple[PrefixGRU, torch.nn.Sequential, torch.Tensor, torch.Tensor],
) -> None:
    gru, projector, hidden, tokens = parts
    found = correction_inputs(gru, projector, hidden, tokens)
    assert found.shape == (BLOCKS, SLOTS, RANK)
    for block in range(BLOCKS):
        for slot in range(1, SLOTS + 1):
            state = state_after(gru, tokens[block, : slot + 1])
            inner = projector[0].weight @ torch.cat([hidden[block, slot - 1], state])
            torch.testing.assert_close(found[block, slot - 1], inner * torch.sigmoid(inner))


def test_a_slot_depends_on_no_token_after_its_own_position(
    parts: tuple[PrefixGRU, torch.nn.Sequential, torch.Tensor, torch.Tensor],
) -> None:
    gru, projector, hidden, tokens = parts
    before = correction_inputs(gru, projector, hidden, tokens)
    for position in range(SLOTS + 1):
        other = tokens.clone()
        other[:, position] += 1.0
        changed = (correction_inputs(gru, projector, hidden, other) != before).flatten(2).any(2).all(0)
        assert changed.tolist() == [slot >= position for slot in range(1, SLOTS + 1)]


def test_an_untrained_correction_is_zero_and_can_learn(
    parts: tuple[PrefixGRU, torch.nn.Sequential, torch.Tensor, torch.Tensor],
) -> None:
    gru, projector, hidden, tokens = parts
    inputs = correction_inputs(gru, projector, hidden, tokens)
    logits = projector[2](inputs)
    assert logits.shape == (BLOCKS, SLOTS, VOCABULARY)
    assert not logits.any()
    (gradient,) = torch.autograd.grad(logits[..., 0].sum(), [projector[2].weight])
    assert gradient[0].any()


def test_the_shapes_are_sglangs() -> None:
    shapes = {name: tuple(weight.shape) for name, weight in PrefixGRU(HIDDEN, STATE).state_dict().items()}
    assert shapes == {"weight_ih_l0": (3 * STATE, HIDDEN), "weight_hh_l0": (3 * STATE, STATE)}
    projector = make_projector(HIDDEN, STATE, RANK, VOCABULARY)
    assert {name: tuple(weight.shape) for name, weight in projector.state_dict().items()} == {
        "0.weight": (RANK, HIDDEN + STATE),
        "2.weight": (VOCABULARY, RANK),
    }


def test_a_block_of_two_has_no_corrected_slot() -> None:
    gru, projector = PrefixGRU(HIDDEN, STATE), make_projector(HIDDEN, STATE, RANK, VOCABULARY)
    assert correction_inputs(gru, projector, torch.zeros(2, 0, HIDDEN), torch.zeros(2, 1, HIDDEN)).shape == (2, 0, RANK)
