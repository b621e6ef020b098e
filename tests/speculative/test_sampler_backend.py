"""Seeds in SGLang's batches, and the sampler that draws with them: SGLang's own classes, no engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers import sampler as sglang_sampler
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.sampling import sampling_batch_info
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_auf import SAMPLER_NAME
from sglang_auf.speculative import sampler_backend, sampling
from tests.support.syncs import no_syncs

VOCABULARY = 40
LARGEST = 2**63 - 1


def request(**parameters: Any) -> SimpleNamespace:
    """What SamplingBatchInfo reads of a request."""
    return SimpleNamespace(
        sampling_params=SamplingParams(**parameters),
        custom_logit_processor=None,
        return_sampling_mask=False,
        sampling_logprobs_mode=None,
    )


class Batch:
    """What SamplingBatchInfo reads of a batch (a class, because SGLang keeps a weak reference to it)."""

    device = "cpu"

    def __init__(self, *requests: SimpleNamespace) -> None:
        self.reqs = list(requests)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang's process configuration, as far as a batch and a sampler read it; SamplingBatchInfo as it was, after."""
    execution = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False, rl_on_policy_target=None),
        features=SimpleNamespace(
            enable_custom_logit_processor=False, enable_watermark=False, sampling_mask_max_tokens=8
        ),
        kernel=SimpleNamespace(sampling_backend=SAMPLER_NAME),
    )
    parallel = SimpleNamespace(tp_group=SimpleNamespace(device_group=None))
    monkeypatch.setattr(sampling_batch_info, "get_exec", lambda: execution)
    monkeypatch.setattr(sglang_sampler, "get_exec", lambda: execution)
    monkeypatch.setattr(sglang_sampler, "get_parallel", lambda: parallel)
    monkeypatch.setattr(sglang_sampler, "is_dp_attention_enabled", lambda: False)
    ranks = SimpleNamespace(dp_rank=None, attn_dp_rank=0)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: ranks)
    original = SamplingBatchInfo.__dict__["from_schedule_batch"]
    yield
    SamplingBatchInfo.from_schedule_batch = original  # type: ignore[method-assign]
    sampler_backend._seeds.cache_clear()


def info_of(*requests: SimpleNamespace) -> SamplingBatchInfo:
    return SamplingBatchInfo.from_schedule_batch(Batch(*requests), VOCABULARY)


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


# --- seeds ---


@pytest.mark.usefixtures("configured")
def test_upstream_alone_carries_no_seeds() -> None:
    assert info_of(request(sampling_seed=7)).sampling_seed is None


@pytest.mark.usefixtures("configured")
def test_a_batch_carries_the_seeds_of_its_requests() -> None:
    sampler_backend.carry_seeds()
    info = info_of(request(sampling_seed=7), request(sampling_seed=-3), request(sampling_seed=LARGEST))
    assert info.sampling_seed is not None
    assert (info.sampling_seed.tolist(), info.sampling_seed.dtype) == ([7, -3, LARGEST], torch.int64)


@pytest.mark.usefixtures("configured")
def test_a_request_without_a_seed_gets_one_and_keeps_it() -> None:
    sampler_backend.carry_seeds()
    unseeded = [request() for _ in range(50)]
    first = info_of(*unseeded).sampling_seed.tolist()
    assert len(set(first)) == 50
    assert info_of(*reversed(unseeded)).sampling_seed.tolist() == first[::-1]
    assert [r.sampling_params.sampling_seed for r in unseeded] == first


@pytest.mark.usefixtures("configured")
def test_replicas_draw_seeds_of_their_own_and_the_ranks_of_one_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes of a server seed Python's generator alike (managers/scheduler.py, set_random_seed)."""
    sampler_backend.carry_seeds()
    state = random.getstate()

    def drawn(dp_rank: int | None, attn_dp_rank: int = 0, others: int = 0) -> tuple[int, ...]:
        """By a process that has just begun. others: numbers that something else in it draws between two requests."""
        ranks = SimpleNamespace(dp_rank=dp_rank, attn_dp_rank=attn_dp_rank)
        monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: ranks)
        sampler_backend._seeds.cache_clear()
        random.seed(1234)
        seeds = []
        for _ in range(3):
            seeds += info_of(request(), request()).sampling_seed.tolist()
            for _ in range(others):
                random.random()
        return tuple(seeds)

    try:
        replicas = [drawn(None), drawn(0), drawn(1), drawn(1, attn_dp_rank=1)]
        assert len({seed for seeds in replicas for seed in seeds}) == 6 * len(replicas)
        assert [drawn(None), drawn(0), drawn(1, others=5), drawn(1, attn_dp_rank=1)] == replicas
    finally:
        random.setstate(state)


@pytest.mark.usefixtures("configured")
def test_seeds_follow_their_requests_through_filter_and_merge() -> None:
    sampler_backend.carry_seeds()
    batch, other = Batch(*(request(sampling_seed=s) for s in (1, 2, 3))), Batch(request(sampling_seed=9))
    info = SamplingBatchInfo.from_schedule_batch(batch, VOCABULARY)
    info.filter_batch([0, 2], torch.tensor([0, 2]))
    info.merge_batch(SamplingBatchInfo.from_schedule_batch(other, VOCABULARY))
    assert info.sampling_seed.tolist() == [1, 3, 9]
    assert info.copy_for_forward().sampling_seed.tolist() == [1, 3, 9]


@pytest.mark.usefixtures("configured")
def test_carrying_seeds_twice_is_once_and_stays_a_classmethod() -> None:
    sampler_backend.carry_seeds()
    once = SamplingBatchInfo.__dict__["from_schedule_batch"]
    sampler_backend.carry_seeds()
    assert SamplingBatchInfo.__dict__["from_schedule_batch"] is once
    assert isinstance(once, classmethod)

    class Derived(SamplingBatchInfo):
        pass

    assert type(Derived.from_schedule_batch(Batch(request()), VOCABULARY)) is Derived
    assert type(info_of(request())) is sampler_backend.SeededBatchInfo


@pytest.mark.usefixtures("configured")
def test_kinds_follow_their_requests_through_filter_merge_and_copy() -> None:
    """On the host, so that no draw has to look at the device for them."""
    sampler_backend.carry_seeds()
    greedy, plain, few, rest = (request(temperature=0.0), request(), request(top_k=20, top_p=0.9), request(min_p=0.1))
    info = SamplingBatchInfo.from_schedule_batch(batch := Batch(greedy, plain, few), VOCABULARY)
    assert info.kinds == [sampling.GREEDY, sampling.PLAIN, 64]
    info.filter_batch([0, 2], torch.tensor([0, 2]))
    other = SamplingBatchInfo.from_schedule_batch(others := Batch(rest), VOCABULARY)
    info.merge_batch(other)
    copy = info.copy_for_forward()
    assert copy.kinds == [sampling.GREEDY, 64, sampling.OPEN]
    info.filter_batch([2], torch.tensor([2]))
    assert (copy.kinds, info.kinds) == ([sampling.GREEDY, 64, sampling.OPEN], [sampling.OPEN])
    del batch, others  # SGLang keeps weak references to them


@pytest.mark.usefixtures("configured")
def test_a_filter_that_float32_does_not_see_is_none() -> None:
    sampler_backend.carry_seeds()
    assert info_of(request(top_p=1 - 1e-12), request(min_p=1e-60)).kinds == [sampling.PLAIN] * 2


# --- draws ---


@pytest.mark.usefixtures("configured")
def test_each_row_of_a_block_is_drawn_with_its_requests_parameters_at_its_own_position() -> None:
    sampler_backend.carry_seeds()
    requests = [
        request(sampling_seed=5, top_k=3),
        request(sampling_seed=6, top_p=0.5),
        request(sampling_seed=7, temperature=0.0),
        request(sampling_seed=5),
    ]
    info, block = info_of(*requests), 4
    probabilities = torch.softmax(logits_of(len(requests) * block), dim=-1)
    positions = torch.tensor([[10], [20], [30], [10]]) + torch.arange(block)
    drawn = sampler_backend.draw(probabilities, info, positions, rows_per_request=block)
    assert drawn.shape == (len(requests) * block,)
    for row in range(len(requests) * block):
        of, slot = divmod(row, block)
        parameters = requests[of].sampling_params
        uniform = sampling.uniforms(torch.tensor([parameters.sampling_seed]), positions[of, slot].view(1))
        alone = sampling.sample(
            probabilities[row : row + 1],
            torch.tensor([parameters.top_k]),
            torch.tensor([parameters.top_p]),
            torch.tensor([parameters.min_p]),
            uniform,
        )
        assert drawn[row] == alone[0]
    assert torch.equal(drawn[2 * block : 3 * block], probabilities[2 * block : 3 * block].argmax(dim=-1))


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("carried", [True, False], ids=["with kinds", "without"])
def test_rows_of_trees_are_drawn_as_each_would_be_alone(carried: bool) -> None:
    """A request may have any number of rows, some of them at one position."""
    if carried:
        sampler_backend.carry_seeds()
    requests = [
        request(sampling_seed=5, top_k=3),
        request(sampling_seed=6, temperature=0.0),
        request(sampling_seed=7, top_p=0.5),
        request(sampling_seed=8, min_p=0.1),
    ]
    info, counts = info_of(*requests), [5, 1, 3, 2]
    if not carried:
        info.sampling_seed = torch.tensor([5, 6, 7, 8])
    positions = torch.tensor([10, 11, 11, 12, 12, 20, 30, 31, 31, 40, 41])
    probabilities = torch.softmax(logits_of(sum(counts)), dim=-1)
    drawn = sampler_backend.draw(probabilities, info, positions, torch.tensor(counts))
    first = 0
    for one, count in zip(requests, counts, strict=True):
        alone = info_of(one)
        alone.sampling_seed = torch.tensor([one.sampling_params.sampling_seed])
        for row in range(first, first + count):
            expected = sampler_backend.draw(probabilities[row : row + 1], alone, positions[row : row + 1])
            assert drawn[row] == expected[0]
        first += count


def sample_with(info: SamplingBatchInfo, logits: torch.Tensor, positions: torch.Tensor, logprobs: bool = False) -> Any:
    """Tokens and the output object of a pass through SGLang's sampler with ours inside."""
    output = LogitsProcessorOutput(next_token_logits=logits.clone())
    n = len(logits)
    tokens = sampler_backend.create_sampler()(output, info, logprobs, [0] * n, [None] * n, positions)
    return tokens, output


@pytest.mark.usefixtures("configured")
def test_sglangs_sampler_draws_through_ours() -> None:
    created = sampler_backend.create_sampler()
    assert isinstance(created, sglang_sampler.Sampler)
    info = info_of(request(sampling_seed=1, temperature=0.7), request(sampling_seed=2, top_p=0.8), request(min_p=0.2))
    logits, positions = logits_of(3), torch.tensor([4, 9, 0])
    tokens, _ = sample_with(info, logits, positions)
    probabilities = torch.softmax(logits / info.temperatures, dim=-1)
    assert tokens.tolist() == sampler_backend.draw(probabilities, info, positions).tolist()
    assert tokens.dtype == torch.int32


@pytest.mark.usefixtures("configured")
def test_prefill_and_plain_decoding_do_not_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass through SGLang's sampler, from logits to tokens, for every kind of request at once and alone."""
    sampler_backend.carry_seeds()
    monkeypatch.setattr(sampling, "looking_waits", lambda _: True)
    requests = [
        *(request(temperature=0.0), request(), request(top_k=5, top_p=0.9), request(top_p=0.8), request(min_p=0.1))
    ]
    for given in (requests, *([one] for one in requests)):
        info, logits, positions = info_of(*given), logits_of(len(given)), torch.arange(len(given))
        with no_syncs():
            tokens, _ = sample_with(info, logits, positions)
        with monkeypatch.context() as on_a_cpu:
            on_a_cpu.setattr(sampling, "looking_waits", lambda _: False)
            assert torch.equal(tokens, sample_with(info, logits, positions)[0])


@pytest.mark.usefixtures("configured")
def test_the_same_seed_repeats_and_another_differs() -> None:
    sampler_backend.carry_seeds()
    logits, positions = logits_of(1).expand(60, -1), torch.arange(60)

    def answer(seed: int) -> list[int]:
        info = info_of(*(request(sampling_seed=seed) for _ in range(60)))
        return list(sample_with(info, logits, positions)[0].tolist())

    assert answer(3) == answer(3) != answer(4)
    assert len(set(answer(3))) > 5, "one seed must not draw one token at every position"


@pytest.mark.usefixtures("configured")
def test_log_probabilities_are_sglangs_own() -> None:
    sampler_backend.carry_seeds()
    info = info_of(request(sampling_seed=1, temperature=0.5))
    logits = logits_of(1)
    tokens, output = sample_with(info, logits, torch.tensor([3]), logprobs=True)
    expected = torch.log_softmax(logits / 0.5, dim=-1)[0, tokens[0]]
    assert output.next_token_logprobs[0].item() == pytest.approx(expected.item(), abs=1e-4)
