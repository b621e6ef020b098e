"""SGLang's sampler with our draws, and a seed for every request.

SGLang 0.5.23 fills `sampling_seed` only under --enable-deterministic-inference, refuses it with min_p and with the
flashinfer sampler, and otherwise draws from the generator of the process. Here every request has a seed: the one it
came with, or one drawn when it is first batched. The first token of an answer (after prefill), plain decoding with this
sampler and verification then draw by the same rule, so a seeded answer is the same with and without speculation.

Under --enable-deterministic-inference SGLang insists on its own sampler, in which an unseeded request has seed 42. Then
verification draws with that one (`draw_as`), again so that both kinds of decoding draw by one rule.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_auf.speculative import sampling


@dataclasses.dataclass
class SeededBatchInfo(SamplingBatchInfo):  # type: ignore[misc]
    """SGLang's sampling parameters of a batch, with a seed for each request and what the host knows of its filters.

    The three methods are those that SGLang leaves open for this.
    """

    kinds: Sequence[int] | None = None
    """`sampling.kind_of` each request. SGLang's own flags (need_top_k_sampling, max_top_k) are those of the whole
    batch: they cannot tell a batch of greedy and of plain requests from one whose rows must be filtered."""

    def adjusted_from_schedule_batch(self, batch: Any, vocab_size: int) -> None:
        self.sampling_seed = sampling.on_device([_seed_of(request) for request in batch.reqs], self.temperatures.device)
        # As float32 says it, because the draws compare in float32.
        settings = torch.tensor(
            [(given.sampling_params.top_p, given.sampling_params.min_p) for given in batch.reqs], dtype=torch.float32
        )
        self.kinds = [
            sampling.kind_of(request.sampling_params.top_k, top_p, min_p, vocab_size)
            for request, (top_p, min_p) in zip(batch.reqs, settings.tolist(), strict=True)
        ]

    def adjusted_filter_batch(self, keep_indices: list[int], keep_indices_device: torch.Tensor) -> None:
        if self.kinds is not None:
            self.kinds = [self.kinds[kept] for kept in keep_indices]

    def adjusted_merge_batch(self, other: SamplingBatchInfo) -> None:
        theirs = getattr(other, "kinds", None)
        self.kinds = None if self.kinds is None or theirs is None else [*self.kinds, *theirs]


def _seed_of(request: Any) -> int:
    parameters = request.sampling_params
    if parameters.sampling_seed is None:
        # Kept on the request, because batches are rebuilt and the seed must stay.
        parameters.sampling_seed = _seeds().getrandbits(62)
    return int(parameters.sampling_seed)


@functools.cache
def _seeds() -> random.Random:
    """Where requests without a seed get theirs in this process.

    SGLang seeds Python's generator alike in all processes of a server. Those that compute one replica together must
    draw the same seeds, and replicas (`--dp-size`) other ones: else a prompt has the same "random" answers on each.
    """
    from sglang.srt.runtime_context import get_parallel

    ranks = get_parallel()
    return random.Random(f"{random.getrandbits(62)} {ranks.dp_rank} {ranks.attn_dp_rank}")


def carry_seeds() -> None:
    """Have SGLang make its batches' sampling parameters as SeededBatchInfo. A second call changes nothing."""
    original = SamplingBatchInfo.from_schedule_batch.__func__
    if getattr(original, "carries_seeds", False):
        return

    def from_schedule_batch(cls: type, batch: Any, vocab_size: int) -> Any:
        return original(SeededBatchInfo if cls is SamplingBatchInfo else cls, batch, vocab_size)

    from_schedule_batch.carries_seeds = True  # type: ignore[attr-defined]
    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)


def draw(
    probabilities: torch.Tensor,
    sampling_info: SamplingBatchInfo,
    positions: torch.Tensor,
    rows_per_request: int | torch.Tensor = 1,
) -> torch.Tensor:
    """Draw one token per row: probabilities [rows, vocabulary] -> int64 [rows].

    rows_per_request: how many each request has, or on a CPU a tensor with the number of each. positions: one per row,
    the position of the token whose logits the row holds (as in SGLang, model_runner.py sample).
    """

    def per_row(values: torch.Tensor) -> torch.Tensor:
        return values.flatten().repeat_interleave(rows_per_request)

    kinds = getattr(sampling_info, "kinds", None)
    if kinds is not None and isinstance(rows_per_request, torch.Tensor):
        counts = rows_per_request.tolist()
        kinds = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    return sampling.sample(
        probabilities,
        per_row(sampling_info.top_ks),
        per_row(sampling_info.top_ps),
        per_row(sampling_info.min_ps),
        sampling.uniforms(per_row(sampling_info.sampling_seed), positions.flatten().long()),
        kinds,
    )


def draw_as(
    sampler: Any, probabilities: torch.Tensor, sampling_info: SamplingBatchInfo, positions: torch.Tensor
) -> torch.Tensor:
    """As `draw`, but as `sampler`, one of SGLang's, draws a single row of each request. Not yet run on a GPU."""
    each = len(probabilities) // len(sampling_info.top_ks)
    per_row = {
        name: getattr(sampling_info, name).repeat_interleave(each, dim=0)
        for name in ("temperatures", "top_ks", "top_ps", "min_ps", "sampling_seed")
    }
    rows = dataclasses.replace(sampling_info, sampling_mask_batch_indices=None, **per_row)
    simple = not (rows.need_top_p_sampling or rows.need_top_k_sampling or rows.need_min_p_sampling)
    drawn, _ = sampler._sample_from_probs(probabilities, rows, positions.flatten(), simple)
    return drawn.long()


def create_sampler() -> Any:
    """The sampler of --sampling-backend auf; SGLang calls this (register_sampler_backend)."""
    from sglang.srt.layers.sampler import Sampler, _SamplingMaskCapture

    carry_seeds()

    class AufSampler(Sampler):  # type: ignore[misc]
        """SGLang's sampler with seeded draws. Temperature, logit bias, logprobs and grammar are SGLang's."""

        def _sample_from_probs(
            self,
            probs: torch.Tensor,
            sampling_info: SamplingBatchInfo,
            positions: torch.Tensor,
            simple_sampling_case: bool,
        ) -> tuple[torch.Tensor, Any]:
            rows = sampling_info.sampling_mask_batch_indices
            capture = None
            if rows is not None:  # requests that ask for return_sampling_mask
                filters = (sampling_info.top_ks[rows], sampling_info.top_ps[rows], sampling_info.min_ps[rows])
                weights = sampling.filtered(probs[rows], *filters)
                capture = _SamplingMaskCapture(weights, token_ids=None, selected_weight=None, batch_rows=rows)
            return draw(probs, sampling_info, positions).int(), capture

    return AufSampler()
