"""The torch reference of speculative decoding: its answer is that of plain greedy decoding, whatever the drafts."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_auf.acceptance import Acceptance
from sglang_auf.errors import ConfigError
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.models.domino import correction_inputs
from tests.reference.rollout import Rollout, draft, rollout
from tests.support.tiny_models import drafter_config, target_config

DOMINO = {
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "shift_label": True,
    "gru_hidden_dim": 12,
    "emb_dim": 6,
}
PROMPT = [5, 9, 33, 21, 7]
LENGTH = 18
NO_STOP: list[int] = []


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    """The tiny Llama in float32, with weights large enough that its answers do not go in circles."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**target_config(), "torch_dtype": "float32"})).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def plain(target: LlamaForCausalLM) -> list[int]:
    """The greedy answer, every token from a new forward pass over the text; longer than any test asks for."""
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(LENGTH + 16):
            tokens.append(int(target(torch.tensor([tokens])).logits[0, -1].argmax()))
    answer = tokens[len(PROMPT) :]
    assert len(set(answer)) > LENGTH // 2, "an answer of one token would prove little"
    return answer


def make_drafter(block_size: int, seed: int = 0, **dflash: Any) -> Drafter:
    config = DrafterConfig.from_checkpoint(drafter_config(block_size, **dflash))
    drafter = Drafter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = 1.0 if name.startswith("embed_proj.2") else 0.2
            weight.copy_(1 + 0.3 * noise if weight.ndim == 1 else scale * noise)
    return drafter


HEADS = pytest.mark.parametrize("dflash", [{}, DOMINO], ids=["dflash", "domino"])


class Scripted(torch.nn.Module):
    """A drafter that knows the answer and drafts `right[n]` right tokens in its n-th block.

    It records its inputs.
    """

    def __init__(self, target: LlamaForCausalLM, answer: list[int], block_size: int, right: list[int]) -> None:
        super().__init__()
        self.config = DrafterConfig.from_checkpoint(drafter_config(block_size))
        self.fc = torch.nn.Linear(1, 1)
        self.answer, self.right = answer, right
        self.inverse = torch.linalg.pinv(target.get_output_embeddings().weight.detach())
        self.calls: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def forward(self, features: torch.Tensor, embeddings: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        done = int(anchors) - len(PROMPT)  # the anchor is answer[done]
        right = self.right[len(self.calls) % len(self.right)]
        self.calls.append((features, embeddings, int(anchors)))
        wanted = [self.answer[done + slot] for slot in range(self.config.block_size)]
        if right + 1 < self.config.block_size:
            wanted[right + 1] = (wanted[right + 1] + 1) % self.inverse.shape[1]
        return self.inverse.T[wanted][None, None]


# --- the answer ---


@HEADS
@pytest.mark.parametrize("block_size", [2, 3, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_answer_is_plain_greedy_decodings(
    target: LlamaForCausalLM, plain: list[int], dflash: dict[str, Any], block_size: int, seed: int
) -> None:
    drafter = make_drafter(block_size, seed, **dflash)
    found = rollout(target, drafter, PROMPT, max_new_tokens=LENGTH, stop_ids=NO_STOP)
    assert found.tokens == plain[:LENGTH]


@pytest.mark.parametrize("block_size", [2, 5])
def test_a_perfect_drafter_has_all_of_its_block_accepted(
    target: LlamaForCausalLM, plain: list[int], block_size: int
) -> None:
    drafter = Scripted(target, plain, block_size, [block_size - 1])
    found = rollout(target, drafter, PROMPT, max_new_tokens=1 + 3 * block_size, stop_ids=NO_STOP)  # type: ignore[arg-type]
    assert found.tokens == plain[: 1 + 3 * block_size]
    assert found.accepted == [block_size - 1] * 3
    assert found.histogram == [0] * (block_size - 1) + [3]


@given(data=st.data())
@examples(max_examples=12)
def test_exactly_the_drafts_before_the_first_mistake_are_accepted(
    target: LlamaForCausalLM, plain: list[int], data: st.DataObject
) -> None:
    block_size = data.draw(st.integers(2, 6))
    right = data.draw(st.lists(st.integers(0, block_size - 1), min_size=1, max_size=6))
    drafter = Scripted(target, plain, block_size, right)
    found = rollout(target, drafter, PROMPT, max_new_tokens=LENGTH, stop_ids=NO_STOP)  # type: ignore[arg-type]
    assert found.tokens == plain[:LENGTH]
    assert found.accepted == [right[step % len(right)] for step in range(len(found.accepted))]
    # The first token is prefill's; the steps before the last one were not enough.
    assert sum(found.accepted[:-1]) + len(found.accepted[:-1]) < LENGTH - 1 <= sum(found.accepted) + len(found.accepted)


def test_what_the_drafter_is_given_in_each_step(target: LlamaForCausalLM, plain: list[int]) -> None:
    """Features of all tokens before the anchor, equal to those of one pass over the text; anchor and masks."""
    drafter = Scripted(target, plain, 4, [2, 0, 3, 1])
    found = rollout(target, drafter, PROMPT, max_new_tokens=LENGTH, stop_ids=NO_STOP)  # type: ignore[arg-type]
    text = PROMPT + plain
    with torch.no_grad():
        states = target(torch.tensor([text]), output_hidden_states=True).hidden_states
    features = torch.cat([states[2], states[3]], dim=-1)  # outputs of layers 1 and 2; states[0] is the embedding
    embedding = target.get_input_embeddings().weight
    position = len(PROMPT)
    for (seen, embeddings, anchor), accepted in zip(drafter.calls, found.accepted, strict=True):
        assert anchor == position
        assert seen.shape == (1, position, 128)
        torch.testing.assert_close(seen, features[:, :position], rtol=1e-4, atol=1e-4)
        assert torch.equal(embeddings[0, 0], embedding[[text[position], 3, 3, 3]])
        position += accepted + 1


# --- where it ends ---


@HEADS
@pytest.mark.parametrize("length", [1, 2, 7])
def test_no_more_tokens_than_asked_for(
    target: LlamaForCausalLM, plain: list[int], dflash: dict[str, Any], length: int
) -> None:
    found = rollout(target, make_drafter(4, **dflash), PROMPT, max_new_tokens=length, stop_ids=NO_STOP)
    assert found.tokens == plain[:length]
    if length == 1:
        assert found.accepted == [], "the first token is prefill's: no step, no tau"


@pytest.mark.parametrize("at", [0, 1, 2, 3, 6, 10])
@pytest.mark.parametrize("right", [3, 0])
def test_a_stop_ends_the_answer_and_is_its_last_token(
    target: LlamaForCausalLM, plain: list[int], at: int, right: int
) -> None:
    stop = plain[at]
    end = plain.index(stop) + 1
    drafter = Scripted(target, plain, 4, [right])
    found = rollout(target, drafter, PROMPT, max_new_tokens=LENGTH, stop_ids=[stop, 9999])  # type: ignore[arg-type]
    assert found.tokens == plain[:end]
    assert len(found.accepted) == -(-(end - 1) // (right + 1)), "no step after the stop"
    assert found.accepted == [right] * len(found.accepted), "what the stop cuts off was accepted all the same"


def test_a_stop_past_the_length_does_not_count(target: LlamaForCausalLM, plain: list[int]) -> None:
    drafter = Scripted(target, plain, 8, [7])
    stop = next(token for index, token in enumerate(plain[4:9], 4) if token not in plain[:4])
    found = rollout(target, drafter, PROMPT, max_new_tokens=4, stop_ids=[stop])  # type: ignore[arg-type]
    assert found.tokens == plain[:4]


def test_the_histogram_is_what_acceptance_takes() -> None:
    found = Rollout([1, 2, 3, 4, 5, 6, 7], [3, 0, 0], 4)
    assert found.histogram == [2, 0, 0, 1]
    counts = Acceptance.of_request(found.histogram, len(found.tokens))
    assert (counts.tau, counts.tau_verify, counts.verify_steps) == (2.0, 2.0, 3)


def test_a_tap_on_the_last_layer_is_refused(target: LlamaForCausalLM) -> None:
    drafter = make_drafter(4, target_layer_ids=[1, 4])
    with pytest.raises(ConfigError, match="taps layer 4 of a target with 5"):
        rollout(target, drafter, PROMPT, max_new_tokens=4, stop_ids=NO_STOP)


# --- Domino's drafts ---


def sglangs_rollout() -> Callable[..., torch.Tensor]:
    """SGLang's function, loaded from its file alone: importing the package takes seconds and needs a platform."""
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "srt" / "speculative" / "domino_utils.py"
    spec = importlib.util.spec_from_file_location("domino_utils_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., torch.Tensor] = module.domino_greedy_rollout
    return function


@torch.no_grad()
@pytest.mark.parametrize("block_size", [2, 3, 8])
def test_domino_drafts_are_sglangs_over_the_whole_vocabulary(target: LlamaForCausalLM, block_size: int) -> None:
    theirs = sglangs_rollout()
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings().weight
    corrected = 0
    for seed in range(5):
        drafter = make_drafter(block_size, seed, **DOMINO)
        generator = torch.Generator().manual_seed(seed)
        features, anchor = torch.randn(1, 9, 128, generator=generator), 20 + seed
        block = torch.tensor([anchor] + [3] * (block_size - 1))
        hidden = drafter(features, embedding(block)[None, None], torch.tensor([[9]]))[0]
        expected = theirs(
            draft_hidden=hidden,
            bonus_tokens=torch.tensor([anchor]),
            target_embedding=embedding,
            lm_head_weight=head,
            prefix_gru=drafter.prefix_gru,
            embed_proj=drafter.embed_proj,
            vocab_size=64,
            shift_label=True,
            candidate_pool_size=0,
            in_cuda_graph=False,
        )
        found = draft(drafter, features, anchor, embedding.weight, head)
        assert found == expected[0].tolist()
        uncorrected = (hidden[0, :-1] @ head.T).argmax(-1).tolist()
        assert found[0] == uncorrected[0]
        corrected += found != uncorrected
    assert corrected or block_size == 2, "the correction must have changed something"


@torch.no_grad()
def test_domino_feeds_its_own_tokens_to_the_gru_as_training_feeds_the_texts(target: LlamaForCausalLM) -> None:
    """Teacher forced with the drafted tokens, the training head predicts the same tokens."""
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    drafter = make_drafter(8, 1, **DOMINO)
    features = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(0))
    drafts = draft(drafter, features, 20, embedding, head)
    hidden = drafter(features, embedding[[20] + [3] * 7][None, None], torch.tensor([[9]]))[0]
    read = embedding[[20, *drafts[:-1]]][None]
    states = correction_inputs(drafter.prefix_gru, drafter.embed_proj, hidden[:, 1:-1], read)
    logits = hidden[0, 1:-1] @ head.T + states[0] @ drafter.embed_proj[2].weight.T
    assert logits.argmax(-1).tolist() == drafts[1:]


# --- types ---


@HEADS
def test_a_bfloat16_target_may_have_a_float32_drafter(target: LlamaForCausalLM, dflash: dict[str, Any]) -> None:
    rounded = copy.deepcopy(target).bfloat16()
    found = rollout(rounded, make_drafter(4, **dflash), PROMPT, max_new_tokens=8, stop_ids=NO_STOP)
    assert len(found.tokens) == 8
    assert all(0 <= a <= 3 for a in found.accepted)


# --- a draft vocabulary ---


def test_a_listed_vocabulary_changes_drafts_and_no_answer(target: LlamaForCausalLM, plain: list[int]) -> None:
    drafter, listed = make_drafter(4, 1), torch.tensor([0, 9, 20, 33, 63])
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    features = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(0))
    drafts = draft(drafter, features, 20, embedding, head, listed)
    hidden = drafter(features, embedding[[20, 3, 3, 3]][None, None], torch.tensor([[9]]))[0, 0, 1:]
    logits = hidden @ head.T
    unlisted = torch.ones(64, dtype=torch.bool)
    unlisted[listed] = False
    assert drafts == logits.masked_fill(unlisted, -torch.inf).argmax(-1).tolist()
    assert drafts != logits.argmax(-1).tolist(), "the list must have mattered"
    found = rollout(target, drafter, PROMPT, max_new_tokens=LENGTH, stop_ids=NO_STOP, vocabulary=listed)
    assert found.tokens == plain[:LENGTH]
