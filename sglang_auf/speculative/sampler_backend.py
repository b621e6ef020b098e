"""SGLang's sampler with our draws, and a seed for every request.

SGLang 0.5.23 fills `sampling_seed` only under --enable-deterministic-inference, refuses it with min_p and with the
flashinfer sampler, and otherwise draws from the generator of the process. Here every request has a seed: the one it
came with, or one drawn when it is first batched. The first token of an answer (after prefill), plain decoding on the
CPU platform and verification then draw by the same rule, so a seeded answer is the same with and without speculation.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from sglang_auf.speculative import sampling

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


def _seed_of(request: Any) -> int:
    parameters = request.sampling_params
    if parameters.sampling_seed is None:
        # Kept on the request, because batches are rebuilt and the seed must stay.
        parameters.sampling_seed = random.getrandbits(62)
    return int(parameters.sampling_seed)


def carry_seeds() -> None:
    """Make every SamplingBatchInfo hold its requests' seeds. A second call changes nothing.

    Extends SamplingBatchInfo.from_schedule_batch (sampling_batch_info.py, `sampling_seed = ... if
    enable_deterministic`). Not needed once SGLang fills the seeds without that flag.
    """
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    original = SamplingBatchInfo.from_schedule_batch.__func__
    if getattr(original, "carries_seeds", False):
        return

    def from_schedule_batch(cls: type, batch: Any, vocab_size: int) -> Any:
        info = original(cls, batch, vocab_size)
        info.sampling_seed = torch.tensor([_seed_of(request) for request in batch.reqs], dtype=torch.int64).to(
            info.temperatures.device, non_blocking=True
        )
        return info

    from_schedule_batch.carries_seeds = True  # type: ignore[attr-defined]
    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)


def draw(
    probabilities: torch.Tensor, sampling_info: SamplingBatchInfo, positions: torch.Tensor, rows_per_request: int = 1
) -> torch.Tensor:
    """Draw one token per row: probabilities [requests * rows_per_request, vocabulary] -> int64 [rows].

    positions: one per row, the position of the token whose logits the row holds (as in SGLang, model_runner.py sample).
    """

    def per_row(values: torch.Tensor) -> torch.Tensor:
        return values.flatten().repeat_interleave(rows_per_request)

    return sampling.sample(
        probabilities,
        per_row(sampling_info.top_ks),
        per_row(sampling_info.top_ps),
        per_row(sampling_info.min_ps),
        sampling.uniforms(per_row(sampling_info.sampling_seed), positions.flatten().long()),
    )


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
