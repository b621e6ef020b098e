"""The worker's verification through SGLang's own acceptance code, without an engine around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner import SamplingPrewarmResult
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative import dflash_worker_v2
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2, _DflashDraftSampler

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.cpu import linear
from sglang_auf.env import DRAFT_VOCABULARY, TREE
from sglang_auf.speculative import sampler_backend, sampling
from sglang_auf.speculative.draft_head import ListedDraftSampler
from sglang_auf.speculative.worker import AufWorker, undrafted
from tests.support.syncs import no_syncs

VOCABULARY, BLOCK, SEEDS = 5, 4, 20_000
OFF = 1 << 30
LOGITS = torch.randn(BLOCK, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 1.5
ANCHOR = 0
# The most probable token, one that is likely, and one that is not: accepted often, sometimes, rarely.
DRAFTS = [int(LOGITS[slot].argsort(descending=True)[rank]) for slot, rank in enumerate((0, 1, 3))]


@pytest.fixture
def worker() -> AufWorker:
    """The attributes that acceptance reads, on the path that SGLang takes without Triton."""
    made = AufWorker.__new__(AufWorker)
    made.block_size = BLOCK
    made._selector_sample = None
    made._use_triton_accept_bonus = False
    made._tp_sync = SimpleNamespace(sync=lambda *_: None)
    made._draft_head = None
    made._deterministic_sampler = None
    return made


def info(n: int, temperature: float = 1.0, top_k: int = OFF, top_p: float = 1.0, min_p: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        is_all_greedy=top_k == 1,
        temperatures=torch.full((n, 1), temperature),
        top_ks=torch.full((n,), top_k, dtype=torch.int32),
        top_ps=torch.full((n,), top_p),
        min_ps=torch.full((n,), min_p),
        sampling_seed=torch.arange(n) * 7 + 1,
    )


def accept(worker: AufWorker, sampling_info: Any, n: int, method: Any = AufWorker._accept_block, **given: Any) -> Any:
    """n requests that all verify the same block at position 30: (accept_len, commit_lens, bonus, out_tokens)."""
    accept_len, commit_lens, bonus, out_tokens, _ = method(
        worker,
        candidates=torch.tensor([[ANCHOR, *DRAFTS]]).repeat(n, 1),
        next_token_logits=LOGITS.repeat(n, 1),
        sampling_info=sampling_info,
        draft_input=None,
        prefix_lens=torch.full((n,), 30),
        bs=n,
        **given,
    )
    return accept_len, commit_lens, bonus, out_tokens


def expected(temperature: float, top_k: int, top_p: float, min_p: float) -> dict[tuple[int, ...], float]:
    """P of every emitted run: the chain of the target's tokens up to the first that is not the draft."""
    outcomes: dict[tuple[int, ...], float] = {}
    reach, run = 1.0, []
    for slot in range(BLOCK):
        p = torch.softmax(LOGITS[slot].double() / temperature, dim=-1).numpy()
        kept, before = np.zeros(VOCABULARY), 0.0
        for rank, token in enumerate(np.argsort(-p)):
            if rank < top_k and before <= top_p and p[token] >= min_p * p.max():
                kept[token] = p[token]
            before += p[token]
        kept /= kept.sum()
        draft = DRAFTS[slot] if slot < BLOCK - 1 else None
        for token in range(VOCABULARY):
            if token != draft:
                outcomes[(*run, token)] = reach * kept[token]
        if draft is not None:
            reach *= kept[draft]
            run.append(draft)
    return outcomes


def goodness(out_tokens: torch.Tensor, commit_lens: torch.Tensor, probability: dict[tuple[int, ...], float]) -> float:
    runs = [tuple(row[:length]) for row, length in zip(out_tokens.tolist(), commit_lens.tolist(), strict=True)]
    counts = {run: 0 for run in probability}
    for run in runs:
        counts[run] += 1
    assert all(counts[run] == 0 for run, p in probability.items() if p == 0), "an impossible run was emitted"
    likely = [run for run, p in probability.items() if p * len(runs) >= 5]
    seen = np.array([*(counts[run] for run in likely), len(runs) - sum(counts[run] for run in likely)], dtype=float)
    due = np.array([*(probability[run] for run in likely), 1 - sum(probability[run] for run in likely)]) * len(runs)
    enough = due > 1e-9
    return float(chisquare(seen[enough], due[enough] * seen[enough].sum() / due[enough].sum()).pvalue)


PARAMETERS = [
    (1.0, OFF, 1.0, 0.0),
    (0.6, OFF, 1.0, 0.0),
    (1.3, 3, 1.0, 0.0),
    (1.0, OFF, 0.8, 0.0),
    (1.0, OFF, 1.0, 0.2),
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=["T=1", "T=0.6", "top_k", "top_p", "min_p"])
def test_emitted_runs_follow_the_target_exactly(worker: AufWorker, parameters: tuple[float, int, float, float]) -> None:
    _, commit_lens, _, out_tokens = accept(worker, info(SEEDS, *parameters), SEEDS)
    assert goodness(out_tokens, commit_lens, expected(*parameters)) > 0.01


@pytest.mark.parametrize("broken", ["greedy", "trusting"])
def test_a_broken_verifier_fails_that_test(worker: AufWorker, broken: str) -> None:
    predicted = LOGITS.argmax(dim=-1).repeat(SEEDS)
    if broken == "trusting":
        predicted = torch.tensor([*DRAFTS, int(LOGITS[-1].argmax())]).repeat(SEEDS)
    _, commit_lens, _, out_tokens = accept(worker, info(SEEDS), SEEDS, target_predict=predicted)
    assert goodness(out_tokens, commit_lens, expected(*PARAMETERS[0])) < 1e-6


def test_the_tokens_are_those_that_plain_sampling_draws_at_each_position(worker: AufWorker) -> None:
    sampling_info = info(50, 0.8)
    accept_len, commit_lens, bonus, out_tokens = accept(worker, sampling_info, 50)
    for slot in range(BLOCK):
        probabilities = torch.softmax(LOGITS[slot] / 0.8, dim=-1).repeat(50, 1)
        plain = sampler_backend.draw(probabilities, sampling_info, torch.full((50,), 30 + slot))
        emitted = commit_lens > slot
        assert torch.equal(out_tokens[emitted, slot], plain[emitted])
    assert torch.equal(commit_lens, accept_len + 1)
    assert torch.equal(bonus, out_tokens.gather(1, accept_len.long()[:, None]).squeeze(1))
    assert len(set(commit_lens.tolist())) > 1, "some blocks are accepted further than others"


def test_greedy_requests_among_sampled_ones_are_verified_greedily(worker: AufWorker) -> None:
    sampling_info = info(6)
    sampling_info.top_ks[::2] = 1
    _, commit_lens, _, out_tokens = accept(worker, sampling_info, 6)
    _, greedy_lens, _, greedy_tokens = accept(worker, info(6, top_k=1), 6)
    assert torch.equal(commit_lens[::2], greedy_lens[::2])
    assert torch.equal(out_tokens[::2, : greedy_lens[0]], greedy_tokens[::2, : greedy_lens[0]])


def known(sampling_info: SimpleNamespace) -> SimpleNamespace:
    """With the kinds that our batches carry."""
    settings = zip(*(getattr(sampling_info, name).tolist() for name in ("top_ks", "top_ps", "min_ps")), strict=True)
    sampling_info.kinds = [sampling.kind_of(*of, VOCABULARY) for of in settings]
    return sampling_info


def mixed(n: int) -> SimpleNamespace:
    """Greedy, plain, top_k, top_p and min_p requests side by side."""
    made = info(n)
    made.top_ks[::5], made.top_ks[2::5] = 1, 3
    made.top_ps[3::5], made.min_ps[4::5] = 0.8, 0.2
    return known(made)


@pytest.mark.parametrize(
    "sampling_info",
    [info(6, top_k=1), *(known(info(6, *parameters)) for parameters in PARAMETERS), mixed(10)],
    ids=["greedy", "T=1", "T=0.6", "top_k", "top_p", "min_p", "mixed"],
)
def test_no_step_waits_for_a_gpu(
    worker: AufWorker, sampling_info: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise SGLang could not prepare the next step while this one runs."""
    monkeypatch.setattr(sampling, "looking_waits", lambda _: True)
    n = len(sampling_info.top_ks)
    with no_syncs():
        found = accept(worker, sampling_info, n)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(found, accept(worker, sampling_info, n), strict=True))


def test_other_ranks_get_the_draws_where_they_get_random_choices_only(worker: AufWorker) -> None:
    """SGLANG_SPEC_TP_SYNC=rng leaves out what SGLang takes for a greedy choice."""
    sent: list[tuple[str, int]] = []
    worker._tp_sync = SimpleNamespace(sync=lambda site, values: sent.append((site.name, values.numel())))
    accept(worker, info(3), 3)
    assert ("DFLASH_ACCEPT_SAMPLE", 3 * BLOCK) in sent


def test_a_deterministic_server_draws_with_sglangs_sampler(worker: AufWorker) -> None:
    """Each row as plain decoding would draw it: the request's settings, the row's own position."""
    seen: list[Any] = []

    def sample_from_probs(probabilities: Any, rows: Any, positions: Any, simple: bool) -> Any:
        seen.append((probabilities, rows, positions, simple))
        return probabilities.argmin(dim=-1).int(), None

    worker._deterministic_sampler = SimpleNamespace(_sample_from_probs=sample_from_probs)
    given = batch_info(2)
    _, commit_lens, bonus, _ = accept(worker, given, 2)
    ((probabilities, rows, positions, simple),) = seen
    assert positions.tolist() == [30, 31, 32, 33] * 2
    assert rows.sampling_seed.tolist() == [5] * BLOCK + [6] * BLOCK
    assert rows.temperatures.shape == (2 * BLOCK, 1)
    assert not simple
    assert torch.equal(probabilities, torch.softmax(LOGITS.repeat(2, 1) / 0.7, dim=-1))
    assert given.sampling_seed.tolist() == [5, 6], "the batch itself stays as it is"
    assert commit_lens.tolist() == [1, 1], "the least likely tokens are not the drafts"
    assert bonus.tolist() == [int(LOGITS[0].argmin())] * 2


def batch_info(n: int) -> SamplingBatchInfo:
    """SGLang's own class, with top_p."""
    return SamplingBatchInfo(
        temperatures=torch.full((n, 1), 0.7),
        top_ps=torch.full((n,), 0.9),
        top_ks=torch.full((n,), OFF, dtype=torch.int32),
        min_ps=torch.zeros(n),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=VOCABULARY,
        sampling_seed=torch.arange(n) + 5,
    )


@pytest.mark.parametrize("enabled", [False, True])
def test_the_sampler_is_sglangs_on_a_deterministic_server_alone(enabled: bool) -> None:
    made = AufWorker.__new__(AufWorker)
    sampler = SimpleNamespace(enable_deterministic=enabled)
    made._target_worker = SimpleNamespace(model_runner=SimpleNamespace(sampler=sampler))
    assert made._deterministic_sampler is (sampler if enabled else None)


# --- the rehearsal before the first request ---


@pytest.fixture
def rehearsing(worker: AufWorker, monkeypatch: pytest.MonkeyPatch) -> AufWorker:
    """A worker on what SGLang takes for CUDA: 3 requests at most, 900 bytes in use, 7000 at the peak."""
    memory = {"allocated_bytes.all.current": 900, "allocated_bytes.all.peak": 7000}
    monkeypatch.setattr(dflash_worker_v2, "is_cuda", lambda: True)
    monkeypatch.setattr(dflash_worker_v2, "is_dflash_sampling_verify_available", lambda: True)
    monkeypatch.setattr(
        dflash_worker_v2,
        "compute_dflash_sampling_correct_drafts_and_bonus",
        lambda **_: pytest.fail("upstream's verification would be compiled"),
    )
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: memory)
    worker.device = "cpu"
    runner = SimpleNamespace(
        max_decode_logits_rows=lambda: 64 * BLOCK,
        max_running_requests=3,
        prewarm_sampling=SamplingPrewarmResult,
        model_config=SimpleNamespace(vocab_size=VOCABULARY),
    )
    worker._target_worker = SimpleNamespace(model_runner=runner)
    worker.model_runner = runner
    worker.model_config = runner.model_config
    return worker


def test_our_draw_is_rehearsed_and_measured(rehearsing: AufWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, list[int]]] = []
    sample = sampling.sample

    def spy(probabilities: torch.Tensor, *settings: Any) -> torch.Tensor:
        seen.append((len(probabilities), settings[-1]))
        return sample(probabilities, *settings)

    monkeypatch.setattr(sampling, "sample", spy)
    result = rehearsing.prewarm_sampling()
    assert {rows for rows, _ in seen} == {3 * BLOCK}, "the largest batch"
    assert {kinds[0] for _, kinds in seen} == {sampling.PLAIN, sampling.GREEDY, sampling.POOLS[0], sampling.OPEN}
    assert any(len(set(kinds)) > 1 for _, kinds in seen), "rows of two kinds are copied apart"
    logits_bytes = 3 * BLOCK * VOCABULARY * 4
    assert result == SamplingPrewarmResult(logits_bytes, logits_bytes + 7000 - 900)
    assert rehearsing.model_runner.sampling_prewarm_result == result


def test_off_cuda_nothing_is_rehearsed(rehearsing: AufWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dflash_worker_v2, "is_cuda", lambda: False)
    monkeypatch.setattr(sampling, "sample", lambda *_: pytest.fail("drawn"))
    assert rehearsing.prewarm_sampling() == SamplingPrewarmResult()


@pytest.mark.parametrize("sampling_info", [None, info(3, top_k=1)], ids=["none", "greedy"])
def test_greedy_batches_are_sglangs_own(worker: AufWorker, sampling_info: Any) -> None:
    ours = accept(worker, sampling_info, 3)
    theirs = accept(worker, sampling_info, 3, DFlashWorkerV2._accept_block)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    drafted = LOGITS.argmax(dim=-1)[:-1].tolist()
    agree = [guess == token for guess, token in zip(DRAFTS, drafted, strict=True)]
    assert ours[0].tolist() == [agree.index(False)] * 3


@pytest.mark.parametrize("sampling_info", [None, info(4)], ids=["greedy", "sampled"])
def test_requests_without_drafts_take_the_targets_first_token_and_change_nothing_for_others(
    worker: AufWorker, sampling_info: Any
) -> None:
    full = accept(worker, sampling_info, 4)
    asked = [None, {"speculative": False}, {"speculative": True}, {"speculative": False}]
    reqs = [SimpleNamespace(sampling_params=SimpleNamespace(custom_params=custom)) for custom in asked]
    worker._undrafted = undrafted(SimpleNamespace(reqs=reqs, seq_lens=torch.full((4,), 30)))
    drafts, lengths, bonus, emitted = accept(worker, sampling_info, 4)
    assert full[0][1] > 0, "there is something to leave out"
    for row, plain in enumerate([False, True, False, True]):
        assert int(drafts[row]) == (0 if plain else int(full[0][row]))
        assert int(lengths[row]) == int(drafts[row]) + 1
        assert int(bonus[row]) == int(emitted[row, lengths[row] - 1])
        assert emitted[row, : lengths[row]].tolist() == full[3][row, : lengths[row]].tolist()
    assert undrafted(SimpleNamespace(reqs=reqs[::2])) is None


def test_what_sglang_predicted_already_is_not_drawn_again(worker: AufWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_backend, "draw", lambda *_, **__: pytest.fail("drawn again"))
    accept(worker, info(2), 2, target_predict=LOGITS.argmax(dim=-1).repeat(2))


def test_no_warning_says_that_sampling_is_verified_greedily(worker: AufWorker, caplog: Any) -> None:
    worker._validate_phase1_sampling_support(SimpleNamespace(sampling_info=info(1)))
    assert caplog.records == []


def test_drafts_come_from_the_reordered_head_without_its_padding(worker: AufWorker) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    weight[90:] = 50 * weight[:6]  # rows beyond the vocabulary must never win
    weight[60:90] = weight[30:60]  # of equal logits the first wins
    hidden = torch.randn(300, 64, generator=generator).bfloat16()
    head = SimpleNamespace(weight=weight, org_vocab_size=90, quant_method=linear.RowInvariantLinear(weight))
    found = worker._greedy_sample_from_vocab_parallel_head(hidden_states=hidden, lm_head=head)
    assert torch.equal(found, head.quant_method(hidden)[:, :90].argmax(dim=-1))
    assert found.max() < 60


def test_the_likeliest_drafts_are_those_of_the_head_without_its_padding(worker: AufWorker) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    weight[90:] = 50 * weight[:6]  # rows beyond the vocabulary must never win, and have no probability
    hidden = torch.randn(40, 64, generator=generator).bfloat16()
    head = SimpleNamespace(weight=weight, org_vocab_size=90, quant_method=linear.RowInvariantLinear(weight))
    worker._target_worker = SimpleNamespace(model_runner=SimpleNamespace(model=SimpleNamespace(lm_head=head)))
    chances, tokens = worker._likeliest(hidden, 8)
    logits = head.quant_method(hidden)[:, :90].float()
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :8]
    assert torch.equal(tokens, order)
    torch.testing.assert_close(chances, torch.log_softmax(logits, dim=-1).gather(1, order), rtol=1e-5, atol=1e-5)
    drafted = worker._greedy_sample_from_vocab_parallel_head(hidden_states=hidden, lm_head=head)
    assert torch.equal(tokens[:, 0], drafted)


def test_the_likeliest_drafts_are_listed_where_the_drafter_has_a_list(tmp_path: Path) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    worker = listing_worker(tmp_path, weight)
    worker.target_worker.model_runner.model.lm_head.quant_method = linear.RowInvariantLinear(weight)
    chances, tokens = worker._likeliest(torch.randn(9, 32).bfloat16(), 3)
    assert (tokens.sort(dim=1).values == torch.tensor([2, 5, 11])).all()
    torch.testing.assert_close(chances.exp().sum(dim=1), torch.ones(9))


def test_steps_that_decode_are_the_trees_and_all_others_upstreams(
    worker: AufWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DFlashWorkerV2, "forward_batch_generation", lambda self, *given: ("upstream", given))

    def batch(decodes: bool, extends: bool) -> SimpleNamespace:
        mode = SimpleNamespace(is_decode=lambda: decodes, is_extend=lambda: not decodes)
        of_none = {"reqs": [], "sampling_info": None, "has_grammar": False}
        return SimpleNamespace(forward_mode=mode, is_extend_in_batch=extends, **of_none)

    assert worker.forward_batch_generation(batch(True, False))[0] == "upstream", "without trees"
    written: list[bool] = []

    class Trees:
        def make_way(self) -> None:
            written.append(True)

        def __call__(self, *given: Any) -> Any:
            return "trees", given

    worker._trees = Trees()
    for decodes, extends, whose in ((True, False, "trees"), (True, True, "upstream"), (False, True, "upstream")):
        written.clear()
        found, given = worker.forward_batch_generation(one := batch(decodes, extends), "publish", "barrier")
        assert (found, given[:3]) == (whose, (one, "publish", "barrier"))
        assert written == ([] if whose == "trees" else [True]), "the drafter's context, before a prompt takes its slots"


@pytest.mark.parametrize(
    ("device", "switch", "simulated", "mrope", "trees"),
    [
        ("cpu", None, -1, False, True),
        ("cpu", "0", -1, False, False),
        ("cpu", "1", 3, False, False),
        ("cpu", None, -1, True, False),
        ("cuda", None, -1, False, False),
    ],
)
def test_a_worker_on_a_cpu_verifies_trees_unless_told_otherwise(
    device: str, switch: str | None, simulated: int, mrope: bool, trees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_auf.speculative import tree_step

    runner = SimpleNamespace(model_config=SimpleNamespace(model_is_mrope=mrope))

    def begin(self: Any, *_: Any) -> None:
        self.device, self._draft_head = torch.device(device), None
        self._target_worker = SimpleNamespace(model_runner=runner)

    monkeypatch.setattr(DFlashWorkerV2, "__init__", begin)
    monkeypatch.setattr(tree_step, "TreeStep", lambda worker: ("trees of", worker))
    monkeypatch.setattr("sglang_auf.speculative.worker.SIMULATE_ACC_LEN", simulated)
    monkeypatch.delenv(TREE.name, raising=False)
    if switch is not None:
        monkeypatch.setenv(TREE.name, switch)
    made = AufWorker()
    assert made._trees == (("trees of", made) if trees else None)


def test_rows_of_trees_are_drawn_at_their_own_temperature_and_position(worker: AufWorker) -> None:
    given, rows = info(3), torch.tensor([3, 1, 2])
    given.temperatures = torch.tensor([[0.5], [1.0], [2.0]])
    logits, positions = LOGITS[[0, 1, 2, 3, 0, 1]], torch.tensor([7, 8, 8, 30, 4, 5])
    drawn = worker._draw(logits, given, positions, rows)
    for row, request in enumerate([0, 0, 0, 1, 2, 2]):
        alone = info(1)
        alone.sampling_seed = given.sampling_seed[request : request + 1]
        p = torch.softmax(logits[row : row + 1] / given.temperatures[request], dim=-1)
        assert drawn[row] == sampler_backend.draw(p, alone, positions[row : row + 1])[0]


@pytest.mark.parametrize("mode", [ForwardMode.MIXED, ForwardMode.EXTEND, ForwardMode.DECODE])
@pytest.mark.parametrize("grammar", [True, False])
def test_masks_beside_a_prompt_follow_the_tokens_of_the_step_before(
    mode: ForwardMode, grammar: bool, worker: AufWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a verification SGLang's own worker catches up."""
    done: list[str] = []
    monkeypatch.setattr(DFlashWorkerV2, "forward_batch_generation", lambda *_: done.append("step"))
    batch = SimpleNamespace(
        forward_mode=mode, has_grammar=grammar, is_extend_in_batch=False, reqs=[], sampling_info=None
    )
    worker.forward_batch_generation(batch, grammar_barrier=lambda: done.append("grammar"))
    assert done == (["grammar"] if mode.is_mixed() and grammar else []) + ["step"]
    worker.forward_batch_generation(batch)  # SGLang's loop without overlap gives no barrier
    assert done[-1] == "step"


def test_other_heads_are_left_to_sglang(worker: AufWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        DFlashWorkerV2, "_greedy_sample_from_vocab_parallel_head", lambda self, **given: ("theirs", given["chunk_size"])
    )
    head = SimpleNamespace(weight=torch.zeros(4, 4))  # a plain linear layer has no quant_method
    found = worker._greedy_sample_from_vocab_parallel_head(hidden_states=torch.zeros(1, 4), lm_head=head, chunk_size=9)
    assert found == ("theirs", 9)


def listing_worker(drafter: Path, weight: torch.Tensor) -> AufWorker:
    """A worker between a target with that head and a drafter that lists three tokens."""
    draft_vocabulary.write(draft_vocabulary.DraftVocabulary(tokens=(2, 5, 11)), drafter)
    made = AufWorker.__new__(AufWorker)
    made.server_args = SimpleNamespace(speculative_draft_model_path=str(drafter))
    target = SimpleNamespace(lm_head=SimpleNamespace(weight=weight))
    made._target_worker = SimpleNamespace(model_runner=SimpleNamespace(model=target))
    return made


def test_only_listed_tokens_are_drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    worker = listing_worker(tmp_path, weight)
    drafts = [
        worker._greedy_sample_from_vocab_parallel_head(hidden_states=hidden, lm_head=None, chunk_size=size)
        for size in (256, 7)
    ]
    assert torch.equal(drafts[0], torch.tensor([2, 5, 11])[(hidden @ weight[[2, 5, 11]].T).argmax(-1)])
    assert torch.equal(drafts[0], drafts[1])

    monkeypatch.setenv(DRAFT_VOCABULARY.name, "0")
    whole = AufWorker.__new__(AufWorker)
    whole.server_args = worker.server_args
    assert whole._draft_head is None


def test_the_captured_draft_graph_keeps_to_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang keeps eager stays eager, and chooses as above."""
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    worker = listing_worker(tmp_path, weight)
    made: list[Any] = [None, _DflashDraftSampler(weight=weight, block_size=4, num_org=16, org_vocab_start=0, max_bs=2)]
    monkeypatch.setattr(DFlashWorkerV2, "_maybe_build_draft_sampler", lambda self: made.pop(0))
    assert worker._maybe_build_draft_sampler() is None
    captured = worker._maybe_build_draft_sampler()
    assert isinstance(captured, ListedDraftSampler)
    captured(torch.randn(8, 8))
    assert set(captured.out.tolist()) <= {2, 5, 11}
