"""Greedy speculative decoding with torch models alone, which the served drafter must equal token for token.

The order of arXiv 2602.06036 and of SGLang 0.5.23 (speculative/dflash_worker_v2.py, domino_utils.py): prefill the
target, whose choice is the first token; then draft a block after the last token from the features of those before it,
run the target over the block, keep the drafts that are its own choices, and add its next one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sglang_auf.errors import ConfigError
from sglang_auf.models.dflash import Drafter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer. tokens: its tokens, the stop token included. block_size: B.

    accepted: drafts that the target confirmed in each verify step, 0..B-1, before a stop or the length cut any off.
    """

    tokens: list[int]
    accepted: list[int]
    block_size: int

    @property
    def histogram(self) -> list[int]:
        """Verify steps that accepted exactly a drafts, for a = 0..B-1: as acceptance.py takes it."""
        return [self.accepted.count(a) for a in range(self.block_size)]


@torch.no_grad()  # type: ignore[untyped-decorator]
def rollout(
    target: PreTrainedModel,
    drafter: Drafter,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    vocabulary: Tensor | None = None,
) -> Rollout:
    """The target's greedy answer to one prompt, and how many drafts each step got right.

    target: a causal LM of transformers. drafter: on the same device. Every token but the first comes from a verify
    step; tokens after a stop or past max_new_tokens are cut. vocabulary [n]: ascending ids of the tokens a DFlash
    drafter may choose (draft_vocabulary.py), None for all. Raises ConfigError for a tap on the target's last layer.
    """
    _check_taps(target, drafter)
    embedding, head = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    output = _run(target, prompt_ids, None)
    features = _features(output, drafter)
    answer = [int(output.logits[0, -1].argmax())]
    accepted: list[int] = []
    while (end := _end(answer, max_new_tokens, stop_ids)) is None:
        drafts = draft(drafter, features, answer[-1], embedding, head, vocabulary)
        output = _run(target, [answer[-1], *drafts], output.past_key_values)
        choices: list[int] = output.logits[0].argmax(-1).tolist()  # of the token after each slot of the block
        matched = _matches(drafts, choices)
        answer += choices[: matched + 1]
        # The cache keeps the anchor and the right drafts, and nothing of the wrong ones.
        output.past_key_values.crop(matched - len(drafts))
        features = torch.cat([features, _features(output, drafter)[:, : matched + 1]], dim=1)
        accepted.append(matched)
    return Rollout(answer[:end], accepted, drafter.config.block_size)


def draft(
    drafter: Drafter,
    features: Tensor,
    anchor: int,
    embedding: Tensor,
    head: Tensor,
    vocabulary: Tensor | None = None,
) -> list[int]:
    """B - 1 drafted tokens to follow `anchor`, the last token so far.

    features [1, S, taps * H]: of the S tokens before the anchor, whose position is S. embedding, head [V, H].
    vocabulary: as in rollout.
    """
    config, weight = drafter.config, drafter.fc.weight
    block = [anchor] + [config.mask_token_id] * (config.block_size - 1)
    embeddings = embedding[block][None, None].to(weight.dtype)
    position = torch.tensor([[features.shape[1]]], device=features.device)
    hidden = drafter(features.to(weight.dtype), embeddings, position)[0, 0]
    if config.head == "domino":
        return _draft_domino(drafter, hidden, anchor, embedding.to(weight.dtype), head)
    rows = head if vocabulary is None else head[vocabulary]
    chosen = (hidden[1:].to(head.dtype) @ rows.T).argmax(-1)
    drafts: list[int] = (chosen if vocabulary is None else vocabulary[chosen]).tolist()
    return drafts


def _draft_domino(drafter: Drafter, hidden: Tensor, anchor: int, embedding: Tensor, head: Tensor) -> list[int]:
    """Slot k gives the token at anchor + k + 1, from a state that has read the anchor and the k drafts before it.

    Slot 0 has no correction. Every slot chooses from the complete vocabulary.
    """
    base = hidden[:-1].to(head.dtype) @ head.T
    drafts = [int(base[0].argmax())]
    _, state = drafter.prefix_gru(embedding[anchor][None, None])
    for slot in range(1, len(base)):
        _, state = drafter.prefix_gru(embedding[drafts[-1]][None, None], state)
        correction = drafter.embed_proj(torch.cat([hidden[slot], state[0, 0]]))
        drafts.append(int((base[slot] + correction).argmax()))
    return drafts


def _run(target: PreTrainedModel, tokens: Sequence[int], cache: Any) -> Any:
    """The target over `tokens`, which follow the tokens in the cache."""
    ids = torch.tensor([list(tokens)], device=target.device)
    return target(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)


def _features(output: Any, drafter: Drafter) -> Tensor:
    """[1, n, taps * H]. Layer k's output is hidden_states[k + 1], since the first of them is the embedding."""
    return torch.cat([output.hidden_states[layer + 1] for layer in drafter.config.target_layer_ids], dim=-1)


def _matches(drafts: Sequence[int], choices: Sequence[int]) -> int:
    """Drafts before the first one that is not the target's choice."""
    for index, token in enumerate(drafts):
        if token != choices[index]:
            return index
    return len(drafts)


def _end(answer: Sequence[int], max_new_tokens: int, stop_ids: Collection[int]) -> int | None:
    """Length at which the answer ends, None while it goes on."""
    stops = [index + 1 for index, token in enumerate(answer[:max_new_tokens]) if token in stop_ids]
    if stops:
        return stops[0]
    return max_new_tokens if len(answer) >= max_new_tokens else None


def _check_taps(target: PreTrainedModel, drafter: Drafter) -> None:
    last, layers = drafter.config.target_layer_ids[-1], target.config.num_hidden_layers
    if last >= layers - 1:
        raise ConfigError(
            f"a drafter that taps layer {last} of a target with {layers}",
            "taps before the last layer: transformers gives its output only after the final norm",
        )
