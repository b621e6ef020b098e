"""Penalties and min_new_tokens along drafts: every row of a block is judged with the tokens before it.

SGLang keeps what the tokens of an answer do to logits for each request, and adds one token in each step
(sampling/penaltylib). When blocks are drafted it adds none (schedule_batch.py, prepare_for_decode). Here a request has
such a state of its own. A step adds the anchor to it, copies it for every row of the request, adds to each copy the
drafts on the way to that row, and keeps what was emitted. Values, and the order in which they are added, are SGLang's,
so that greedy answers are those of plain decoding to the last bit.

The host looks at no value of the device here, so it runs ahead of the device, as under the overlap schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sglang_auf.hooks.validation import NEUTRAL_PENALTIES

ROWS_AT_ONCE = 128
"""A row takes six vectors of the vocabulary in float32, for which no memory is set aside: 0.5 GB for 152,000 tokens."""


def asks(sampling_params: Any) -> bool:
    """Whether a request has a penalty, or a least number of tokens."""
    return any(getattr(sampling_params, name) not in (None, value) for name, value in NEUTRAL_PENALTIES.items())


@dataclass(slots=True)
class Penalties:
    """What tokens so far do to the logits of n rows.

    As the requests say, [n, 1]: frequency, presence, repetition; least, the fewest tokens. stops [n, vocabulary]: -inf
    where a token ends the answer. By the tokens so far, [n, vocabulary]: by_frequency, by_presence, scaling;
    count [n, 1], how many they are.
    """

    frequency: Tensor
    presence: Tensor
    repetition: Tensor
    least: Tensor
    stops: Tensor
    by_frequency: Tensor
    by_presence: Tensor
    scaling: Tensor
    count: Tensor

    @classmethod
    def of(cls, request: Any, vocab_size: int, device: torch.device) -> Penalties:
        """Those of SGLang's Req before its first token."""
        given = request.sampling_params

        def one(value: float, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.full((1, 1), value, dtype=kind, device=device)

        stops = torch.zeros(1, vocab_size)
        stops[0, [token for token in _ending(request) if token < vocab_size]] = -torch.inf
        blank = torch.zeros(1, vocab_size, device=device)
        return cls(
            frequency=one(given.frequency_penalty),
            presence=one(given.presence_penalty),
            repetition=one(given.repetition_penalty),
            least=one(given.min_new_tokens, torch.int32),
            stops=stops.to(device, non_blocking=True),
            by_frequency=blank,
            by_presence=blank.clone(),
            scaling=torch.ones_like(blank),
            count=one(0, torch.int32),
        )

    @classmethod
    def joined(cls, parts: Sequence[Penalties]) -> Penalties:
        """Their rows, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def rows(self, index: Tensor | slice) -> Penalties:
        """Some rows, each as often as it is named: a copy for an index, the rows themselves for a slice."""
        return Penalties(*(getattr(self, field.name)[index] for field in fields(self)))

    def add(self, tokens: Tensor, counts: Tensor) -> None:
        """One more token for each row: int64 [n]. counts: bool [n], for which rows."""
        index, counts = tokens[:, None], counts[:, None]
        self.by_frequency.scatter_add_(1, index, self.frequency * counts)
        for so_far, value in ((self.by_presence, self.presence), (self.scaling, self.repetition)):
            so_far.scatter_(1, index, torch.where(counts, value, so_far.gather(1, index)))
        self.count += counts

    def additive(self) -> Tensor:
        """What is added to logits, [n, vocabulary]."""
        return 0 - self.by_frequency - self.by_presence + torch.where(self.count < self.least, self.stops, 0.0)

    def apply(self, logits: Tensor) -> Tensor:
        """To logits [n, vocabulary], which are changed."""
        logits += self.additive()
        return logits.copy_(torch.where(logits < 0, logits * self.scaling, logits / self.scaling))


def _ending(request: Any) -> set[int]:
    """Tokens that may not come before the answer has its least number of tokens (penaltylib/min_new_tokens.py)."""
    tokenizer = request.tokenizer
    given = (request.sampling_params.stop_token_ids, request.eos_token_ids)
    ending = {token for tokens in given for token in tokens or ()}
    if tokenizer is not None:
        ending |= {*(tokenizer.additional_stop_token_ids or ()), tokenizer.eos_token_id}
    return ending - {None}


class PenalisedStep:
    """The requests of a decoding batch that ask for penalties, in one step. Made by `begin`."""

    def __init__(self, batch: Any, asking: list[int]) -> None:
        info, anchors = batch.sampling_info, batch.spec_info.bonus_tokens
        self.asking = asking
        self._requests = [batch.reqs[index] for index in asking]
        self._of = torch.tensor(asking).to(anchors.device, non_blocking=True)
        self._own = Penalties.joined([_state(request, info.vocab_size, anchors.device) for request in self._requests])
        self._own.add(anchors[self._of], torch.ones_like(self._of, dtype=torch.bool))
        # SGLang's own, which have seen no token. What a forward has is a copy (scheduler.py, _forward_isolation).
        info.acc_additive_penalties = info.acc_scaling_penalties = None
        # It is added behind penalties, as plain decoding does.
        self.bias, info.logit_bias = info.logit_bias, None

    def apply(self, logits: Tensor, rows: Tensor, owners: Tensor, paths: Tensor, depths: Tensor) -> None:
        """To some rows of logits, in place. rows: int64 [n]; owners: of each, which of `asking`, by place.

        paths: int64 [n, slots], the drafts on the way from the anchor to each row; depths [n]: how many they are.
        """
        for start in range(0, rows.shape[0], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            penalties = self._own.rows(owners[part])
            for slot in range(paths.shape[1]):
                penalties.add(paths[part, slot], slot < depths[part])
            logits[rows[part]] = penalties.apply(logits[rows[part]])

    def apply_to_blocks(self, logits: Tensor, blocks: Tensor) -> None:
        """To logits [requests * B, vocabulary] of chains, with logit bias. blocks: [requests, B], the anchor first."""
        block = blocks.shape[1]
        owners = torch.arange(len(self.asking), device=logits.device).repeat_interleave(block)
        depths = torch.arange(block, device=logits.device).repeat(len(self.asking))
        self.apply(logits, self._of[owners] * block + depths, owners, blocks[self._of][owners, 1:], depths)
        if self.bias is not None:
            logits += self.bias.repeat_interleave(block, dim=0)

    def keep(self, emitted: Tensor, lengths: Tensor) -> None:
        """What the step emitted: the first `lengths` [requests] of `emitted` [requests, B]; then the anchor."""
        emitted, drafts = emitted[self._of], lengths[self._of] - 1
        for slot in range(emitted.shape[1] - 1):
            self._own.add(emitted[:, slot], slot < drafts)
        for place, request in enumerate(self._requests):
            # A copy: a request that waits or is remembered must not keep the whole batch's.
            request.auf_penalties = self._own.rows(torch.tensor([place]).to(lengths.device, non_blocking=True))


def begin(batch: Any) -> PenalisedStep | None:
    """For a batch that decodes; None where no request asks for penalties."""
    asking = [index for index, request in enumerate(batch.reqs) if asks(request.sampling_params)]
    return PenalisedStep(batch, asking) if asking else None


def prefill(batch: Any) -> None:
    """For a batch of prompts: a request's first token, or, of one that gave its cache up, its next one."""
    info = batch.sampling_info
    for index, request in enumerate(batch.reqs):
        if not asks(request.sampling_params):
            continue
        state = Penalties.of(request, info.vocab_size, info.temperatures.device)
        for token in request.output_ids:
            one = torch.tensor([token]).to(state.count.device, non_blocking=True)
            state.add(one, torch.ones_like(one, dtype=torch.bool))
        # SGLang's own begin anew with every prefill.
        info.acc_additive_penalties[index] = state.additive()[0]
        if info.acc_scaling_penalties is not None:
            info.acc_scaling_penalties[index] = state.scaling[0]
        request.auf_penalties = state


def _state(request: Any, vocab_size: int, device: torch.device) -> Penalties:
    state: Penalties | None = getattr(request, "auf_penalties", None)
    return Penalties.of(request, vocab_size, device) if state is None else state
