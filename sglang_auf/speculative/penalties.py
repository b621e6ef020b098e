"""Penalties and min_new_tokens along drafts: every row of a block is judged with the tokens before it.

SGLang keeps what the tokens of an answer do to logits for each request, and adds one token in each step
(sampling/penaltylib). When blocks are drafted it adds none (schedule_batch.py, prepare_for_decode). Here a request has
such a state of its own. A step adds the anchor to it, judges each row by it and by the drafts on the way to that row,
and keeps what was emitted. Values, and the order in which they are added, are SGLang's, so that greedy answers are
those of plain decoding to the last bit.

Of a row only the logits of few tokens change: those of the answer, of the drafts, and those that end it. No others are
read or written, which on a CPU takes far less time than a pass over the vocabulary.

The host looks at no value of the device here, so it runs ahead of the device, as under the overlap schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sglang_auf.hooks.validation import NEUTRAL_PENALTIES

CELLS_AT_ONCE = 1 << 22
"""A row has a cell for each token with a penalty, which takes some 40 bytes, for which no memory is set aside."""


def asks(sampling_params: Any) -> bool:
    """Whether a request has a penalty, or a least number of tokens."""
    return any(getattr(sampling_params, name) not in (None, value) for name, value in NEUTRAL_PENALTIES.items())


@dataclass(slots=True)
class Penalties:
    """What tokens so far do to logits, of n rows at k columns: all the vocabulary, or some tokens of each row.

    As the requests say, [n, 1]: frequency, presence, repetition; least, the fewest tokens. ends [n, k]: whether a token
    ends the answer. By the tokens so far, [n, k]: by_frequency; seen, whether the token is one of them; count [n, 1],
    how many they are.
    """

    frequency: Tensor
    presence: Tensor
    repetition: Tensor
    least: Tensor
    ends: Tensor
    by_frequency: Tensor
    seen: Tensor
    count: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Penalties]) -> Penalties:
        """Their rows, one after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def rows(self, index: Tensor) -> Penalties:
        """A copy of some rows, each as often as it is named."""
        return Penalties(*(getattr(self, field.name)[index] for field in fields(self)))

    def at(self, rows: Tensor, tokens: Tensor) -> Penalties:
        """A copy of some rows of all the vocabulary, int64 [m], at some tokens of each: int64 [m, k]."""
        columns = ("ends", "by_frequency", "seen")
        every, some = (rows,), (rows[:, None], tokens)
        return Penalties(*(getattr(self, f.name)[some if f.name in columns else every] for f in fields(self)))

    def add(self, tokens: Tensor, counts: Tensor) -> None:
        """One more token for each row, of all the vocabulary: int64 [n]. counts: bool [n], for which rows."""
        index, counts = tokens[:, None], counts[:, None]
        self.by_frequency.scatter_add_(1, index, self.frequency * counts)
        self.seen.scatter_(1, index, self.seen.gather(1, index) | counts)
        self.count += counts

    def add_at(self, columns: Tensor, counts: Tensor) -> None:
        """The same where a row has some tokens. columns: bool [n, k], which of them the token is."""
        columns, counts = columns & counts[:, None], counts[:, None]
        self.by_frequency += self.frequency * columns
        self.seen |= columns
        self.count += counts

    def additive(self) -> Tensor:
        """What is added to logits, [n, k]."""
        held_back = torch.where(self.ends & (self.count < self.least), -torch.inf, 0.0)
        return 0 - self.by_frequency - torch.where(self.seen, self.presence, 0.0) + held_back

    def scaling(self) -> Tensor:
        """What logits are multiplied by below 0, and divided by above, [n, k]."""
        return torch.where(self.seen, self.repetition, 1.0)

    def apply(self, logits: Tensor) -> Tensor:
        """To logits [n, k], which are changed."""
        logits += self.additive()
        scaling = self.scaling()
        return logits.copy_(torch.where(logits < 0, logits * scaling, logits / scaling))


@dataclass(slots=True)
class State:
    """A request between two steps. penalties: one row, of all the vocabulary.

    touched: int64 [tokens]: no other token has a penalty. Some are there more than once, and some have none: what of a
    step counts is not known to the host. As many as the vocabulary has tokens: any token may have one.
    """

    penalties: Penalties
    touched: Tensor

    @classmethod
    def of(cls, request: Any, vocab_size: int, device: torch.device) -> State:
        """That of SGLang's Req before its first token."""
        given = request.sampling_params

        def one(value: float, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.full((1, 1), value, dtype=kind, device=device)

        ending = torch.tensor(sorted(token for token in _ending(request) if token < vocab_size), dtype=torch.int64)
        ends = torch.zeros(1, vocab_size, dtype=torch.bool)
        ends[0, ending] = True
        penalties = Penalties(
            frequency=one(given.frequency_penalty),
            presence=one(given.presence_penalty),
            repetition=one(given.repetition_penalty),
            least=one(given.min_new_tokens, torch.int32),
            ends=ends.to(device, non_blocking=True),
            by_frequency=torch.zeros(1, vocab_size, device=device),
            seen=torch.zeros(1, vocab_size, dtype=torch.bool, device=device),
            count=one(0, torch.int32),
        )
        return cls(penalties, ending.to(device, non_blocking=True))

    def add(self, tokens: Sequence[int]) -> None:
        """Tokens of the answer, in their order."""
        of_device = torch.tensor(tokens, dtype=torch.int64).to(self.touched.device, non_blocking=True)
        counts = torch.ones(1, dtype=torch.bool, device=of_device.device)
        for place in range(len(tokens)):
            self.penalties.add(of_device[place : place + 1], counts)
        self.touched = torch.cat([self.touched, of_device])


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
        self._before = [_state(request, info.vocab_size, anchors.device) for request in self._requests]
        self._own = Penalties.joined([state.penalties for state in self._before])
        own_anchors = anchors[self._of]
        self._own.add(own_anchors, torch.ones_like(self._of, dtype=torch.bool))
        self._touched = [torch.cat([state.touched, own_anchors[i : i + 1]]) for i, state in enumerate(self._before)]
        # SGLang's own, which have seen no token. What a forward has is a copy (scheduler.py, _forward_isolation).
        info.acc_additive_penalties = info.acc_scaling_penalties = None
        # It is added behind penalties, as plain decoding does.
        self.bias, info.logit_bias = info.logit_bias, None

    def apply(self, logits: Tensor, rows: Tensor, owners: Tensor, paths: Tensor, depths: Tensor) -> None:
        """To some rows of logits, in place. rows: int64 [n]; owners: of each, which of `asking`, by place.

        paths: int64 [n, slots], the drafts on the way from the anchor to each row; depths [n]: how many they are.
        """
        vocabulary = self._own.seen.shape[1]
        longest = max(len(touched) for touched in self._touched)
        if longest < vocabulary:
            touched = torch.stack([pad(some, (0, longest - len(some))) for some in self._touched])  # by token 0
        else:
            touched = torch.arange(vocabulary, device=logits.device).expand(len(self._touched), -1)
        at_touched = self._own.at(torch.arange(len(touched), device=touched.device), touched)
        at_once = max(CELLS_AT_ONCE // touched.shape[1], 1)
        for start in range(0, rows.shape[0], at_once):
            part = slice(start, start + at_once)
            row, owner, depth = rows[part, None], owners[part], depths[part]
            before, path = touched[owner], paths[part]
            of_before, of_path = at_touched.rows(owner), self._own.at(owner, path)
            for slot in range(path.shape[1]):
                of_path.add_at(path == path[:, slot, None], slot < depth)
            of_before.count += depth[:, None]
            changed = of_before.apply(logits[row, before]), of_path.apply(logits[row, path])
            # A draft may be a token of the answer, too; its own penalties know of both.
            logits[row, before], logits[row, path] = changed

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
        for place, (request, before, touched) in enumerate(
            zip(self._requests, self._before, self._touched, strict=True)
        ):
            # Copies: a request that waits or is remembered must not keep the whole batch's.
            by_frequency, seen, count = (
                of_all[place : place + 1].clone()
                for of_all in (self._own.by_frequency, self._own.seen, self._own.count)
            )
            penalties = replace(before.penalties, by_frequency=by_frequency, seen=seen, count=count)
            # As many as the vocabulary has stand for all of it.
            request.auf_penalties = State(penalties, torch.cat([touched, emitted[place, :-1]])[: seen.shape[1]])


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
        state = State.of(request, info.vocab_size, info.temperatures.device)
        state.add(request.output_ids)
        # SGLang's own begin anew with every prefill.
        info.acc_additive_penalties[index] = state.penalties.additive()[0]
        if info.acc_scaling_penalties is not None:
            info.acc_scaling_penalties[index] = state.penalties.scaling()[0]
        request.auf_penalties = state


def _state(request: Any, vocab_size: int, device: torch.device) -> State:
    state: State | None = getattr(request, "auf_penalties", None)
    return State.of(request, vocab_size, device) if state is None else state
