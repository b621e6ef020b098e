"""SGLang's DFLASH worker with exact verification at any temperature, draft vocabularies and trees (CPU)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.sampler import sampler_softmax
from sglang.srt.model_executor.runner_utils.pool import borrow_graph_pool
from sglang.srt.speculative.dflash_worker_v2 import SIMULATE_ACC_LEN, DFlashWorkerV2, _DflashDraftSampler
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.cpu.linear import RowInvariantLinear
from sglang_auf.hooks.validation import speculates
from sglang_auf.speculative import penalties, sampler_backend, sampling
from sglang_auf.speculative.algorithm import verifies_trees
from sglang_auf.speculative.draft_head import DraftHead, ListedDraftSampler

# What is drawn to see how much memory it takes: (kind of the first request, of the others, top_k, top_p). No filter;
# two kinds, whose rows are copied apart; top_k; and top_p alone, for which everything is sorted.
REHEARSED = (
    (sampling.PLAIN, sampling.PLAIN, 1 << 30, 1.0),
    (sampling.GREEDY, sampling.PLAIN, 1 << 30, 1.0),
    (sampling.POOLS[0], sampling.POOLS[0], 20, 0.95),
    (sampling.OPEN, sampling.OPEN, 1 << 30, 0.95),
)


@dataclass(frozen=True, slots=True)
class Drafter:
    """A loaded drafter. head: the head of its draft vocabulary, None without one."""

    model: torch.nn.Module
    head: DraftHead | None


class AufWorker(DFlashWorkerV2):  # type: ignore[misc]
    """Drafts, verifies and commits as DFLASH does, but draws the target's token at every slot with the request's seed.

    Upstream's sampling verification ignores min_p and seeds, and without its CUDA kernel it verifies greedily at any
    temperature (dflash_worker_v2.py `_accept_block`).
    """

    _trees: Any = None
    _penalised: penalties.PenalisedStep | None = None
    """Of the step that is computed: set where a request of its batch asks for penalties."""

    _undrafted: torch.Tensor | None = None
    """Of the step that is computed: which requests take no drafts, bool [bs]; None where all do."""

    former: Drafter | None = None
    """The drafter before the last swap, until it is known which of the two stays (swap.py)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _ = self._draft_head  # refuses a draft vocabulary that does not fit the target's head now, not in a request
        is_mrope = self.target_worker.model_runner.model_config.model_is_mrope
        if verifies_trees(str(self.device), is_mrope) and SIMULATE_ACC_LEN <= 0:
            from sglang_auf.speculative.tree_step import TreeStep  # compiles kernels of the CPU platform

            self._trees = TreeStep(self)

    def forward_batch_generation(
        self, batch: Any, on_publish: Any = None, grammar_barrier: Any = None, pp_proxy_tensors: Any = None
    ) -> Any:
        """One step, as upstream; with trees, those that decode are tree_step.py's."""
        decodes = batch.forward_mode.is_decode()
        self._penalised = penalties.begin(batch) if decodes else None
        if self._trees is not None and decodes and not batch.is_extend_in_batch:
            return self._trees(batch, on_publish, grammar_barrier, self._penalised)
        if self._trees is not None:
            self._trees.make_way()
        self._undrafted = undrafted(batch) if decodes else None
        if batch.forward_mode.is_extend():
            penalties.prefill(batch)
        if grammar_barrier is not None and batch.has_grammar and batch.forward_mode.is_mixed():
            # Upstream calls it in a verification alone. Here requests that decode take part beside a prompt, and the
            # sampler's masks would be those before their last tokens.
            grammar_barrier()
        return super().forward_batch_generation(batch, on_publish, grammar_barrier, pp_proxy_tensors)

    def _likeliest(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` likeliest drafts of hidden states [slots, hidden]: log-probabilities and ids, [slots, count]."""
        from sglang_auf.cpu import kernels

        if self._draft_head is not None:
            return self._draft_head.likeliest(hidden, count)
        head = self.target_worker.model_runner.model.lm_head
        logits = head.quant_method.apply(head, hidden)[:, : head.org_vocab_size]
        return kernels.largest(logits.bfloat16(), count)  # a quantised head may give other floats

    def _accept_block(
        self,
        *,
        candidates: torch.Tensor,
        next_token_logits: torch.Tensor,
        sampling_info: Any,
        draft_input: Any,
        prefix_lens: torch.Tensor,
        bs: int,
        target_predict: torch.Tensor | None = None,
    ) -> Any:
        """candidates [bs, B] (anchor and drafts), next_token_logits [bs * B, vocabulary].

        A batch of greedy requests goes upstream unchanged. Otherwise the target's tokens are drawn here, and upstream's
        greedy acceptance of those tokens is exact speculative sampling (sglang_auf/speculative/sampling.py).
        """
        if self._penalised is not None:
            self._penalised.apply_to_blocks(next_token_logits, candidates)
        if target_predict is None and sampling_info is not None and not sampling_info.is_all_greedy:
            block = len(next_token_logits) // bs
            positions = prefix_lens[:, None] + torch.arange(block, device=prefix_lens.device)
            target_predict = self._draw(next_token_logits, sampling_info, positions.flatten(), block)
            # SGLang sends greedy choices to the other ranks too, unless SGLANG_SPEC_TP_SYNC keeps it to random ones.
            self._tp_sync.sync(SpecTpSyncSite.DFLASH_ACCEPT_SAMPLE, target_predict)
        accepted = super()._accept_block(
            candidates=candidates,
            next_token_logits=next_token_logits,
            sampling_info=sampling_info,
            draft_input=draft_input,
            prefix_lens=prefix_lens,
            bs=bs,
            target_predict=target_predict,
        )
        if self._undrafted is not None:
            accepted = first_only(accepted, self._undrafted)
        if self._penalised is not None:
            _, lengths, _, emitted, _ = accepted
            self._penalised.keep(emitted.view(bs, -1), lengths)
        return accepted

    def _can_skip_verify_logits(self, batch: Any, sampling_info: Any) -> bool:
        """Upstream takes the argmax of logits that lie on several devices where nothing changes them."""
        return self._penalised is None and bool(super()._can_skip_verify_logits(batch, sampling_info))

    def _draw(
        self, logits: torch.Tensor, sampling_info: Any, positions: torch.Tensor, rows: int | torch.Tensor
    ) -> torch.Tensor:
        """The target's tokens, drawn at every row: logits [n, vocabulary], positions [n] -> int64 [n].

        rows: how many each request has, or of each. The host looks at no value of the device here (see
        sampling.sample), so it runs ahead of the device.
        """
        drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        # As upstream's verification does: what is as wide as the vocabulary may lie in the graphs' idle memory.
        with borrow_graph_pool(user="AUF draw"):
            scaled = logits / sampling_info.temperatures.repeat_interleave(rows, dim=0)
            if self._deterministic_sampler is None:
                chances = sampler_softmax(scaled)
                drawn.copy_(sampler_backend.draw(chances, sampling_info, positions, rows_per_request=rows))
            else:  # with the softmax that SGLang's sampler uses then
                chances = torch.softmax(scaled, dim=-1)
                drawn.copy_(sampler_backend.draw_as(self._deterministic_sampler, chances, sampling_info, positions))
        return drawn

    @cached_property
    def _deterministic_sampler(self) -> Any:
        """SGLang's sampler, with which plain decoding draws under --enable-deterministic-inference; else None."""
        sampler = self.target_worker.model_runner.sampler
        return sampler if sampler.enable_deterministic else None

    def _measure_sampling_peak(
        self, *, candidates: torch.Tensor, target_logits: torch.Tensor, sampling_info: Any
    ) -> int:
        """Bytes that a sampled step takes at most, for upstream's `prewarm_sampling`. Called on CUDA only.

        Upstream's own would compile and rehearse its verification, which this worker never calls. candidates [bs, B];
        target_logits [bs * B, vocabulary], all equal: the rows with the most to sort.
        """
        bs, device = len(candidates), target_logits.device
        seeds = torch.zeros(bs, dtype=torch.int64, device=device)
        positions = torch.zeros(len(target_logits), dtype=torch.int64, device=device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["allocated_bytes.all.current"]
        for first, others, top_k, top_p in REHEARSED:
            given = dataclasses.replace(
                sampling_info,
                top_ks=torch.full_like(sampling_info.top_ks, top_k),
                top_ps=torch.full_like(sampling_info.top_ps, top_p),
                sampling_seed=seeds,
                need_top_k_sampling=top_k < 1 << 30,
                need_top_p_sampling=top_p < 1,
            )
            given.kinds = [first, *[others] * (bs - 1)]
            self._draw(target_logits, given, positions, candidates.shape[1])
        torch.cuda.synchronize()
        return int(torch.cuda.memory_stats()["allocated_bytes.all.peak"]) - int(before)

    def _validate_phase1_sampling_support(self, batch: Any) -> None:
        """Upstream warns here that it will verify greedily, which is not true of this worker."""

    @cached_property
    def _draft_head(self) -> DraftHead | None:
        """The head of the draft vocabulary, None without one. Made when upstream's __init__ first asks for it."""
        return self.head_of(Path(self.server_args.speculative_draft_model_path))

    def head_of(self, drafter: Path) -> DraftHead | None:
        """The head of the draft vocabulary beside a drafter's weights, None without one."""
        vocabulary = draft_vocabulary.in_use(drafter)
        if vocabulary is None:
            return None
        return DraftHead(self.target_worker.model_runner.model.lm_head, vocabulary.tokens)

    @property
    def drafter(self) -> Drafter:
        """What drafts. Another one of the same shape may be put in its place between two steps, on a CPU."""
        return Drafter(self.draft_model, self._draft_head)

    @drafter.setter
    def drafter(self, other: Drafter) -> None:
        runner = self.draft_model_runner
        self.draft_model = runner.model = runner.kv_cache_configurator.model = other.model
        self._draft_head = other.head
        self.draft_model.set_block_size(self.block_size)
        if self._trees is not None:
            self._trees.forget_drafter()

    def _maybe_build_draft_sampler(self) -> Any:
        """The sampler of the captured draft graph: upstream's, or ours where the drafter has a draft vocabulary."""
        made = super()._maybe_build_draft_sampler()
        if self._draft_head is None or not isinstance(made, _DflashDraftSampler):
            return made
        return ListedDraftSampler(self._draft_head, made)

    def _greedy_sample_from_vocab_parallel_head(
        self, *, hidden_states: torch.Tensor, lm_head: Any, chunk_size: int = 256
    ) -> torch.Tensor:
        """Greedy drafts of hidden_states [slots, hidden] -> ids [slots], on the CPU platform with its own products."""
        if self._draft_head is not None:
            return torch.cat([self._draft_head(some) for some in hidden_states.split(chunk_size)])
        method = getattr(lm_head, "quant_method", None)
        if not isinstance(method, RowInvariantLinear):
            return super()._greedy_sample_from_vocab_parallel_head(
                hidden_states=hidden_states, lm_head=lm_head, chunk_size=chunk_size
            )
        # torch's argmax over bf16 is slower than its max, which is vectorised. Both give the first of equal values.
        return torch.cat(
            [
                method.apply(lm_head, some)[:, : lm_head.org_vocab_size].max(dim=-1).indices
                for some in hidden_states.split(chunk_size)
            ]
        )


def undrafted(batch: Any) -> torch.Tensor | None:
    """Which requests of a batch take no drafts, bool [bs] on the device; None where all do."""
    given = [not speculates(request.sampling_params.custom_params) for request in batch.reqs]
    if not any(given):
        return None
    device = batch.seq_lens.device
    return torch.tensor(given, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def first_only(accepted: Any, undrafted: torch.Tensor) -> Any:
    """What upstream's `_accept_block` returns, with one token in these rows: the first, which is the target's own.

    accepted: (accepted drafts [bs], lengths [bs], bonus tokens [bs], emitted tokens [bs, B], new lengths of the texts
    or None, for which upstream adds the lengths itself, as after its simulated acceptance).
    """
    drafts, lengths, bonus, emitted, _ = accepted
    first = emitted.view(len(lengths), -1)[:, 0].to(bonus.dtype)
    return (
        drafts.masked_fill(undrafted, 0),
        lengths.masked_fill(undrafted, 1),
        torch.where(undrafted, first, bonus),
        emitted,
        None,
    )
