"""Penalties along drafts: the bits of SGLang's own, which see one token a step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling import penaltylib
from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_auf.speculative import penalties
from sglang_auf.speculative.penalties import State, asks, begin, prefill
from sglang_auf.speculative.tree import ANCHOR, Forest, Node
from tests.support.syncs import no_syncs

VOCABULARY = 23
PENALIZERS = (
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedRepetitionPenalizer,
)
NONE: dict[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "stop_token_ids": None,
}
ASKED: list[dict[str, Any]] = [
    {"frequency_penalty": 0.3},
    {"presence_penalty": -0.7},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 4, "stop_token_ids": {5, 6}},
    {"frequency_penalty": 0.1, "presence_penalty": 1.1, "repetition_penalty": 0.8, "min_new_tokens": 2},
]


class Request:
    """What penalties read of SGLang's Req."""

    def __init__(self, **params: Any) -> None:
        self.sampling_params = SimpleNamespace(**{**NONE, **params})
        self.eos_token_ids = {2}
        self.tokenizer = SimpleNamespace(additional_stop_token_ids={3, 99}, eos_token_id=2)
        self.output_ids: list[int] = []


class Reference:
    """SGLang's state of one request, by its own classes."""

    def __init__(self, request: Request) -> None:
        self._batch = _Batch([request])
        self._penalizers = BatchedPenalizerOrchestrator(100, self._batch, set(PENALIZERS))  # type: ignore[arg-type]

    def after(self, tokens: list[int], logits: Tensor) -> Tensor:
        """logits [vocabulary] of the row behind these tokens."""
        state = BatchedPenalizerOrchestrator(100, self._batch, set(PENALIZERS))  # type: ignore[arg-type]
        for token in tokens:
            state.cumulate_output_tokens(torch.tensor([token]))
        wide = torch.zeros(1, 100)
        wide[0, :VOCABULARY] = logits
        added = torch.zeros(1, 100)
        state.accumulate_additive_penalties(added)
        wide += added
        scaling = state.accumulate_scaling_penalties()
        if scaling is not None:
            wide = torch.where(wide < 0, wide * scaling, wide / scaling)
        return wide[0, :VOCABULARY]


class _Batch:
    def __init__(self, reqs: list[Request]) -> None:
        self.reqs, self.device = reqs, "cpu"


def batch_of(requests: list[Request], anchors: list[int], vocabulary: int = VOCABULARY) -> Any:
    info = SimpleNamespace(
        vocab_size=vocabulary,
        temperatures=torch.ones(len(requests), 1),
        acc_additive_penalties=torch.zeros(len(requests), vocabulary),
        acc_scaling_penalties=torch.ones(len(requests), vocabulary),
        logit_bias=None,
    )
    return SimpleNamespace(
        reqs=requests, sampling_info=info, spec_info=SimpleNamespace(bonus_tokens=torch.tensor(anchors))
    )


def normal(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_who_asks() -> None:
    assert not asks(Request().sampling_params)
    assert not asks(SimpleNamespace(**dict.fromkeys(NONE)))
    assert all(asks(Request(**params).sampling_params) for params in ASKED)


@pytest.mark.parametrize("params", ASKED)
def test_tokens_one_by_one(params: dict[str, Any]) -> None:
    request = Request(**params)
    state, tokens = State.of(request, VOCABULARY, torch.device("cpu")).penalties, [7, 7, 3, 7, 11, 3]
    for place in range(len(tokens) + 1):
        logits = normal(VOCABULARY, seed=place)
        expected = Reference(request).after(tokens[:place], logits)
        assert torch.equal(state.apply(logits[None].clone())[0], expected)
        if place < len(tokens):
            state.add(torch.tensor([0]), torch.tensor([False]))  # a token that does not count
            state.add(torch.tensor([tokens[place]]), torch.tensor([True]))


@pytest.mark.parametrize("seed", range(4))
def test_trees_over_several_steps_beside_requests_that_ask_for_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of a tree has its ancestors counted, and a step keeps the tokens that it emitted, its bonus excepted."""
    monkeypatch.setattr(penalties, "CELLS_AT_ONCE", (1 << 22, 1 << 22, 40, 1)[seed])
    generator = torch.Generator().manual_seed(seed)

    def token() -> int:
        return int(torch.randint(VOCABULARY, (), generator=generator))

    requests = [Request(), *(Request(**params) for params in ASKED), Request()]
    for request in requests:
        request.output_ids = [token()]
    for step in range(5):
        anchors = [request.output_ids[-1] for request in requests]
        # A chain of two, and beside its first node a second one with a child of its own.
        nodes = [
            node
            for i in range(len(requests))
            for node in (
                Node(i, ANCHOR, 0, 0, False, 0.9),
                Node(i, 4 * i, 1, 0, False, 0.8),
                Node(i, ANCHOR, 0, 1, True, 0.7),
                Node(i, 4 * i + 2, 1, 1, True, 0.6),
            )
        ]
        drafts = [[[token(), token()], [token(), token()]] for _ in requests]
        forest = Forest.of(nodes, anchors, drafts)
        batch = batch_of(requests, anchors)
        penalised = begin(batch)
        assert penalised is not None and penalised.asking == [1, 2, 3, 4, 5]
        assert batch.sampling_info.acc_additive_penalties is None
        logits = normal(len(forest.parents), VOCABULARY, seed=100 * seed + step)
        expected = logits.clone()
        first = 0
        for request, of, rows in zip(requests, drafts, forest.rows, strict=True):
            ways = [[], [of[0][0]], [of[0][0], of[1][0]], [of[0][1]], [of[0][1], of[1][1]]]
            for row, way in enumerate(ways):
                expected[first + row] = Reference(request).after([*request.output_ids, *way], expected[first + row])
            first += rows
        penalised.apply(logits, *forest.ways(penalised.asking))
        assert torch.equal(logits, expected)

        lengths = [1 + (token() + step) % 3 for _ in requests]
        emitted = [[token() for _ in range(3)] for _ in requests]
        penalised.keep(torch.tensor(emitted), torch.tensor(lengths))
        for request, tokens, length in zip(requests, emitted, lengths, strict=True):
            request.output_ids += tokens[:length]


@pytest.mark.parametrize("seed", range(3))
def test_chains_of_requests_that_come_and_go(seed: int) -> None:
    """Answers of a batch have different lengths, and a request keeps its own tokens whatever its place."""
    generator, block = torch.Generator().manual_seed(seed), 5

    def some(*shape: int, end: int = VOCABULARY) -> Any:
        return torch.randint(end, shape, generator=generator).tolist()

    requests = [Request(**params) for params in (NONE, *ASKED, *ASKED)]
    for request, length in zip(requests, some(len(requests), end=9), strict=True):
        request.output_ids = some(length)
        prefill(batch_of([request], [0]))
        request.output_ids += some(1)  # what the prefill drew
    for step in range(8):
        of_step = [requests[i] for i in torch.randperm(len(requests), generator=generator)[: 3 + step]]
        blocks = torch.tensor([[request.output_ids[-1], *some(block - 1)] for request in of_step])
        penalised = begin(batch_of(of_step, blocks[:, 0].tolist()))
        assert penalised is not None
        logits = normal(len(of_step) * block, VOCABULARY, seed=10 * seed + step)
        expected = logits.clone()
        for row in range(len(logits)):
            request, drafts = of_step[row // block], blocks[row // block, 1 : 1 + row % block].tolist()
            expected[row] = Reference(request).after(request.output_ids + drafts, logits[row])
        penalised.apply_to_blocks(logits, blocks)
        assert torch.equal(logits, expected)
        emitted, lengths = some(len(of_step), block), [1 + length for length in some(len(of_step), end=block)]
        penalised.keep(torch.tensor(emitted), torch.tensor(lengths))
        for request, tokens, length in zip(of_step, emitted, lengths, strict=True):
            request.output_ids += tokens[:length]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation made."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor) and not any(result is given for given in args):
            self.made = max(self.made, result.numel())
        return result


def test_rows_take_no_pass_over_the_vocabulary() -> None:
    """Such passes took several times as long as the rest of a step."""
    vocabulary, requests = 50_000, [Request(**ASKED[-1]) for _ in range(2)]
    penalised = begin(batch_of(requests, [4, 5], vocabulary))
    assert penalised is not None
    logits, blocks = torch.ones(2 * 4, vocabulary), torch.tensor([[4, 8, 8, 1], [5, 1, 1, 1]])
    with Largest() as largest:
        penalised.apply_to_blocks(logits, blocks)
    assert 0 < largest.made < 1000
    assert (logits != 1).any(dim=1).all()


@pytest.mark.parametrize("copies", [1, 2 * VOCABULARY])
def test_a_long_answer_takes_no_more_than_the_vocabulary(copies: int) -> None:
    """On a device the tokens of a step are noted whether they count or not, again and again."""
    request, block = Request(**ASKED[-1]), 3
    request.output_ids = [4, 7, 4, 9]
    prefill(batch_of([request], [0]))
    request.auf_penalties.touched = request.auf_penalties.touched.repeat(copies)
    request.output_ids.append(2)
    blocks = torch.tensor([[2, 7, 11]])
    for emitted, length in (([7, 11, 5], 3), ([1, 1, 1], 1)):
        penalised = begin(batch_of([request], [request.output_ids[-1]]))
        assert penalised is not None
        logits = normal(block, VOCABULARY, seed=copies)
        expected = [
            Reference(request).after([*request.output_ids, *blocks[0, 1 : 1 + row].tolist()], logits[row])
            for row in range(block)
        ]
        penalised.apply_to_blocks(logits, torch.tensor([[request.output_ids[-1], *blocks[0, 1:].tolist()]]))
        assert torch.equal(logits, torch.stack(expected))
        penalised.keep(torch.tensor([emitted]), torch.tensor([length]))
        request.output_ids += emitted[:length]
        assert len(request.auf_penalties.touched) <= VOCABULARY


def test_chains_have_penalties_before_their_logit_bias() -> None:
    """Plain decoding scales logits first, and then adds the bias."""
    requests, block = [Request(repetition_penalty=1.5), Request()], 4
    requests[0].output_ids, requests[1].output_ids = [4], [9]
    batch = batch_of(requests, [4, 9])
    bias = batch.sampling_info.logit_bias = normal(2, VOCABULARY, seed=1)
    penalised = begin(batch)
    assert penalised is not None
    assert batch.sampling_info.logit_bias is None, "upstream's step would add it before"
    blocks = torch.tensor([[4, 8, 8, 1], [9, 1, 1, 1]])
    logits = normal(2 * block, VOCABULARY, seed=2)
    expected = logits.clone()
    for row in range(block):
        expected[row] = Reference(requests[0]).after(blocks[0, : row + 1].tolist(), expected[row])
    expected += bias.repeat_interleave(block, dim=0)
    with no_syncs():
        penalised.apply_to_blocks(logits, blocks)
        penalised.keep(blocks, torch.tensor([2, 4]))
    assert torch.equal(logits, expected)
    requests[0].output_ids += [4, 8]  # of which the last is the next anchor
    after = begin(batch_of(requests, [8, 1]))
    assert after is not None
    found = logits[:1].clone()
    after.apply(found, *Forest.of([], [8, 1], [[], []]).ways([0]))
    assert torch.equal(found[0], Reference(requests[0]).after([4, 4, 8], logits[0]))


def test_a_batch_without_penalties_is_left_alone() -> None:
    batch = batch_of([Request()], [4])
    bias = batch.sampling_info.logit_bias = normal(1, VOCABULARY, seed=1)
    assert begin(batch) is None
    assert batch.sampling_info.logit_bias is bias


@pytest.mark.parametrize("params", ASKED)
def test_a_first_token_has_what_no_token_before_it_changes(params: dict[str, Any]) -> None:
    request = Request(**params)
    prefill(batch := batch_of([Request(), request], [0, 0]))
    logits = normal(VOCABULARY, seed=5)
    assert torch.equal(logits + batch.sampling_info.acc_additive_penalties[1], Reference(request).after([], logits))
    assert (batch.sampling_info.acc_scaling_penalties == 1).all()


def test_a_request_that_is_computed_again_goes_on_with_the_penalties_of_its_answer() -> None:
    request = Request(**ASKED[-1])
    request.output_ids = [7, 7, 11]
    batch = batch_of([Request(), request], [0, 0])
    prefill(batch)
    info = batch.sampling_info
    logits = normal(VOCABULARY, seed=3)
    changed = logits + info.acc_additive_penalties[1]
    changed = torch.where(changed < 0, changed * info.acc_scaling_penalties[1], changed / info.acc_scaling_penalties[1])
    assert torch.equal(changed, Reference(request).after(request.output_ids, logits))
    assert not info.acc_additive_penalties[0].any() and (info.acc_scaling_penalties[0] == 1).all()

    request.output_ids.append(5)  # what the prefill drew is the next step's anchor
    penalised = begin(batch_of([request], [5]))
    assert penalised is not None
    found = logits[None].clone()
    penalised.apply(found, *Forest.of([], [5], [[]]).ways([0]))
    assert torch.equal(found[0], Reference(request).after(request.output_ids, logits))
