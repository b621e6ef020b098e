"""A decoding step of the CPU platform that verifies a tree of drafts for each request.

It is upstream's step (dflash_worker_v2.py, forward_batch_generation) with rows of any number for each request, which
captured CUDA graphs cannot have. What it leaves behind is what upstream's leaves: the accepted tokens' keys and values
at the request's positions, of target and drafter, and a result in the layout of a chain.

A node's key lies where its row was computed. Once the path is known, the slots of the request's positions are permuted
(page size 1), and nothing is copied.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_worker_v2 import make_draft_block_spec_info
from sglang.srt.speculative.domino_utils import domino_greedy_rollout
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_sampling_mask import SpeculativeSamplingMaskCapture
from sglang.srt.speculative.spec_utils import GrammarTree, build_grammar_vocab_mask, draft_tp_context

from sglang_auf.cpu import kernels, replay
from sglang_auf.cpu.commit import Context
from sglang_auf.cpu.linear import product_seconds
from sglang_auf.env import step_log, tree_nodes
from sglang_auf.hooks.validation import speculates
from sglang_auf.speculative.budget import FLOOR, Budget, Calibration, Costs, Stopwatch
from sglang_auf.speculative.penalties import PenalisedStep
from sglang_auf.speculative.tree import RANKS, Forest, Node, grow

logger = logging.getLogger(__name__)

DOMINO_CHANCE = 0.6
"""Of a Domino draft, before any was accepted: its path is chosen token by token, without probabilities of its own."""

SAID = (1, 8, 16, 64)
"""Numbers of rows whose products' time the log says."""

LONGEST_PAUSE_S = 0.02
"""What the scheduler does between two steps counts as the second one's, unless something else came between."""

NO_DRAFTS: tuple[np.ndarray, list[Any]] = (np.zeros((0, 0, 0)), [])


@dataclass
class ForestVerifyInput(DFlashVerifyInput):  # type: ignore[misc]
    """SGLang's verify input, with trees, which the CPU attention backend looks for."""

    forest: Forest | None = None


class TreeStep:
    """Drafts, chooses nodes, verifies and commits, for a worker (worker.py) on the CPU platform."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.slots = int(worker.block_size) - 1
        target, drafter = worker.target_worker.model_runner.model, worker.draft_model
        verify, draft = product_seconds(target), product_seconds(drafter)
        for name, of in (("target", verify), ("drafter", draft)):
            logger.info("products of the %s: %s", name, ", ".join(f"{n} rows {1e3 * of(n):.1f} ms" for n in SAID))
        self._costs = Costs(verify, draft)
        self._blocks: dict[int, Any] = {}
        self._ended = 0.0
        self._watch = Stopwatch(step_log(), kernels.seconds_spent)
        self.forget_drafter()

    def forget_drafter(self) -> None:
        """Begin anew to learn what the worker's drafter is worth. What steps cost is still known: shapes are equal."""
        head = self.worker._draft_head
        listed = RANKS if head is None else len(head.tokens)
        self.ranks = 1 if self.worker._is_domino else min(RANKS, listed)
        self.budget = Budget(self.slots, self._costs, tree_nodes())
        self.calibration = Calibration(self.slots, self.ranks)
        self.context = Context(self.worker)

    def make_way(self) -> None:
        """Before a step that is not a tree's: a prompt takes slots that may be another request's no more."""
        self.context.write()
        self._ended = 0.0  # what passes until the next step is not that one's

    def __call__(
        self, batch: Any, on_publish: Any = None, grammar_barrier: Any = None, penalised: PenalisedStep | None = None
    ) -> GenerationBatchResult:
        """One step of a batch that decodes, as upstream's forward_batch_generation."""
        began, checks = time.perf_counter(), replay.CHECKS
        continues = began - self._ended < LONGEST_PAUSE_S
        self._watch.lap("between steps" if continues else None)
        anchors = batch.spec_info.bonus_tokens
        requests = len(anchors)
        slots = self.budget.to_draft(requests, sum(_drafted(batch)))
        left_over = self.context.write_if_due(batch.req_pool_indices, drafts=slots > 0)
        self._watch.lap("commit")
        chances, tokens = self._draft(batch, anchors, slots) if slots else NO_DRAFTS
        drafted = requests * (slots + 1) if slots else 0
        self._watch.lap("draft")
        nodes = self._choose(batch, chances, drafted) if slots else []
        forest = Forest.of(nodes, anchors.tolist(), tokens)
        self._watch.lap("tree")
        result, paths = self._verify(batch, forest, on_publish, grammar_barrier, penalised)
        if continues:
            began = self._ended
        self._ended = time.perf_counter()
        if checks == replay.CHECKS:  # else it took what no other step will
            self.budget.costs.observe(requests, len(forest.parents), drafted, self._ended - began - left_over)
        if slots:
            self.budget.used(nodes, slots)
            self.calibration.observe(forest.tested(paths), chances, _samples(batch))
        self._watch.lap("tree")
        self._watch.step_ends()
        return result

    # --- drafting ---

    def _draft(self, batch: Any, anchors: torch.Tensor, slots: int) -> tuple[np.ndarray, list[Any]]:
        """Probabilities [requests, slots, ranks] and token ids of the same shape, descending in each slot."""
        worker, requests, block = self.worker, len(anchors), slots + 1
        if block not in self._blocks:
            self._blocks[block] = make_draft_block_spec_info(draft_token_num=block, device=worker.device)
        worker.draft_model.set_block_size(block)
        ids = torch.full((requests, block), int(worker._mask_token_id), dtype=torch.int64)
        ids[:, 0] = anchors
        positions = (batch.seq_lens[:, None] + torch.arange(block)).flatten()
        slots_of_keys = _slots(worker, batch.req_pool_indices.repeat_interleave(block), positions)
        embedding = worker.target_worker.model_runner.model.get_input_embeddings()
        with torch.inference_mode(), draft_tp_context(worker.draft_parallel_layout):
            embeds = embedding(ids.flatten())
            if worker._noise_embed_scale != 1.0:
                embeds = embeds * worker._noise_embed_scale
            host_lengths = batch.seq_lens.cpu() + block
            forward = ForwardBatch(
                forward_mode=ForwardMode.TARGET_VERIFY,
                batch_size=requests,
                input_ids=ids.flatten(),
                req_pool_indices=batch.req_pool_indices,
                seq_lens=batch.seq_lens,
                out_cache_loc=slots_of_keys,
                seq_lens_sum=int(host_lengths.sum()),
                seq_lens_cpu=host_lengths,
                positions=positions,
                input_embeds=embeds,
                spec_algorithm=SpeculativeAlgorithm.DFLASH,
                spec_info=self._blocks[block],
                capture_hidden_mode=CaptureHiddenMode.NULL,
                global_num_token_non_padded_cpu=requests * block,
                can_run_decode_cuda_graph=False,
            )
            _plan(worker, batch, slots_of_keys, block).bind(forward, worker.draft_model_runner.kv_index_translator)
            hidden = worker.draft_model_runner.forward(forward).logits_output.hidden_states.view(requests, block, -1)
            if worker._is_domino:
                path = self._roll_out(hidden, anchors, embedding)
                return np.full((*path.shape, 1), DOMINO_CHANCE), path[:, :, None].tolist()
            chances, tokens = worker._likeliest(hidden[:, 1:].flatten(0, 1), self.ranks)
        shape = (requests, slots, self.ranks)
        return chances.exp().view(shape).numpy(), tokens.view(shape).tolist()

    def _roll_out(self, hidden: torch.Tensor, anchors: torch.Tensor, embedding: Any) -> torch.Tensor:
        """The one path of a Domino drafter, int64 [requests, slots]."""
        worker, head = self.worker, self.worker.target_worker.model_runner.model.lm_head
        path: torch.Tensor = domino_greedy_rollout(
            draft_hidden=hidden,
            bonus_tokens=anchors,
            target_embedding=embedding,
            lm_head_weight=head.weight,
            prefix_gru=worker.draft_model.prefix_gru,
            embed_proj=worker.draft_model.embed_proj,
            vocab_size=int(worker.model_runner.model_config.vocab_size),
            shift_label=bool(worker.draft_model.shift_label),
            candidate_pool_size=worker.domino_candidate_pool_size,
            tp_group=None,
            in_cuda_graph=False,
        )
        return path

    def _choose(self, batch: Any, chances: np.ndarray, drafted: int) -> list[Node]:
        """The nodes to verify, in the order of `grow`."""
        requests = len(chances)
        # So many slots are allotted behind each request's committed tokens (DFlashDraftInputV2.prepare_for_decode).
        room = [
            max(request.kv.kv_allocated_len - committed - 1, 0) if drafted else 0
            for request, committed, drafted in zip(batch.reqs, batch.seq_lens.tolist(), _drafted(batch), strict=True)
        ]
        of_requests = self.calibration.chances(chances, _samples(batch))
        floor = FLOOR
        if (fixed := self.budget.fixed) is not None:
            room, floor = [min(slots, fixed) for slots in room], 0.0
        nodes = list(islice(grow(of_requests, room, floor), self.budget.most(requests)))
        return nodes[: self.budget.to_verify(requests, nodes, drafted, sum(_drafted(batch)))]

    # --- verification ---

    def _verify(
        self, batch: Any, forest: Forest, on_publish: Any, grammar_barrier: Any, penalised: PenalisedStep | None
    ) -> tuple[GenerationBatchResult, list[list[int]]]:
        """The step's result, and the accepted rows of each request."""
        worker, sampling_info = self.worker, batch.sampling_info
        committed = batch.seq_lens
        rows = torch.tensor(forest.rows)
        # In numpy, whose calls cost a fraction of torch's for so few numbers.
        of_rows = np.repeat(np.arange(len(forest.rows)), forest.rows)
        pool_rows, starts = batch.req_pool_indices.numpy()[of_rows], committed.numpy()[of_rows]
        places = starts + np.arange(len(of_rows)) - (np.cumsum(forest.rows) - forest.rows)[of_rows]
        positions = torch.from_numpy(starts + forest.depths)
        table = worker.model_runner.req_to_token_pool.req_to_token.numpy()
        slots = torch.from_numpy(table[pool_rows, places].astype(np.int64))
        plan = _plan(worker, batch, slots, max(forest.rows))
        tree = GrammarTree.from_host(*forest.links()) if batch.has_grammar else None

        output = self._forward(batch, forest, positions, slots, plan)
        self._watch.lap("verify")
        logits, mask = output.next_token_logits, None
        if tree is not None:
            mask = build_grammar_vocab_mask(
                reqs=batch.reqs, tree=tree, sampling_info=sampling_info, device=logits.device, barrier=grammar_barrier
            )
        bias = sampling_info.logit_bias
        if penalised is not None:
            penalised.apply(logits, *forest.ways(penalised.asking))
            bias = penalised.bias
        if bias is not None:
            logits += bias.repeat_interleave(rows, dim=0)
        if mask is not None:
            widest = max(forest.rows)
            own = torch.cat([request * widest + torch.arange(n) for request, n in enumerate(forest.rows)])
            GrammarMask(mask.grammar, mask.vocab_mask[own]).apply(logits)
        if sampling_info.is_all_greedy:
            chosen = torch.from_numpy(logits.numpy().argmax(axis=1))  # torch's takes twice as long
        else:
            chosen = worker._draw(logits, sampling_info, positions, rows)

        paths = forest.walk(chosen.tolist())
        self._watch.lap("accept")
        counts = np.array([len(path) for path in paths])
        lengths = torch.from_numpy(counts)
        # A chain's layout, [requests, B]: behind a path, its last row again, which nobody reads.
        chain = np.array([path + path[-1:] * (self.slots + 1 - len(path)) for path in paths])
        chosen_of = chosen.numpy()[chain]
        emitted, bonus = torch.from_numpy(chosen_of), torch.from_numpy(chosen_of[np.arange(len(paths)), counts - 1])
        if penalised is not None:
            penalised.keep(emitted, lengths)
        self._report(batch, output, torch.from_numpy(chain), emitted, lengths)
        new_lengths = committed + lengths
        if on_publish is not None:
            on_publish(new_lengths)

        committed_rows = [output.hidden_states, positions, worker._draft_write_ids(plan)]
        if len(of_rows) > len(paths):  # there are nodes beside the anchors
            table[pool_rows, places] = slots.numpy()[forest.committed_first(paths)]
            kept = torch.tensor([row for path in paths for row in path])
            committed_rows = [of_all[kept] for of_all in committed_rows]
        self.context.add(batch.req_pool_indices, *committed_rows)
        output.hidden_states = None
        self._watch.lap("commit")
        result = GenerationBatchResult(
            logits_output=output,
            next_token_ids=emitted.flatten(),
            accept_lens=lengths.int(),
            can_run_cuda_graph=False,
            next_draft_input=worker._make_next_draft_input_decode(bonus_tokens=bonus, new_seq_lens=new_lengths),
            speculative_num_draft_tokens=self.slots + 1,
            new_seq_lens=new_lengths,
            # SGLang carries this to the reply's counts, as it does for DSPARK (batch_result_processor.py).
            cap_lens=rows.int(),
        )
        return result, paths

    def _forward(self, batch: Any, forest: Forest, positions: torch.Tensor, slots: torch.Tensor, plan: Any) -> Any:
        """Logits and tapped features of all rows."""
        worker = self.worker
        verify = ForestVerifyInput(
            draft_token=forest.tokens,
            positions=positions,
            draft_token_num=max(forest.rows),
            custom_mask=None,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            kv_loc_plan=plan,
            forest=forest,
        )
        batch.out_cache_loc = slots
        lengths, total = batch.seq_lens_cpu, batch.seq_lens_sum
        batch.seq_lens_cpu = batch.seq_lens.cpu() + torch.tensor(forest.rows)
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
        # The runner plans attention itself (runner/eager_runner.py).
        forward, _ = verify.prepare_for_verify(batch, worker.target_worker, defer_metadata_init=True)
        batch.seq_lens_cpu, batch.seq_lens_sum = lengths, total
        out = worker.target_worker.forward_batch_generation(batch=None, forward_batch=forward, is_verify=True)
        return out.logits_output

    def _report(
        self, batch: Any, output: Any, chain: torch.Tensor, emitted: torch.Tensor, lengths: torch.Tensor
    ) -> None:
        """Log-probabilities and sampling masks, for the requests that ask for them."""
        masked = getattr(batch.sampling_info, "sampling_mask_batch_indices", None) is not None
        if not (batch.return_logprob or masked):
            return
        width = int(lengths.max())  # what is as wide as the vocabulary is made for no place that no path has
        chain, emitted = chain[:, :width], emitted[:, :width]
        output.next_token_logits = output.next_token_logits[chain.flatten()]
        if masked:
            capture = SpeculativeSamplingMaskCapture.from_logits(
                batch.sampling_info,
                next_token_logits=output.next_token_logits,
                draft_input=batch.spec_info,
                draft_token_num=width,
                bs=len(lengths),
            )
            output.sampling_mask_output = capture.build_output(out_tokens=emitted, commit_lens=lengths.int())
        if batch.return_logprob:
            compute_spec_logprobs(batch, output, emitted.flatten(), chain_stride=width)


def _slots(worker: Any, pool_rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pool slots of positions of requests, int64."""
    slots: torch.Tensor = worker.model_runner.req_to_token_pool.req_to_token[pool_rows, positions].long()
    return slots


def _plan(worker: Any, batch: Any, slots: torch.Tensor, extent: int) -> Any:
    """SGLang's plan of the slots that a forward writes. extent: how far behind the committed tokens it reads."""
    return worker.target_worker.model_runner.kv_index_translator.plan(
        req_pool_indices=batch.req_pool_indices,
        seq_lens=batch.seq_lens,
        seq_lens_cpu=batch.seq_lens_cpu,
        write_virtual=slots,
        read_extent=extent,
    )


def _drafted(batch: Any) -> list[bool]:
    """Of each request, whether drafts may be verified for it."""
    return [speculates(request.sampling_params.custom_params) for request in batch.reqs]


def _samples(batch: Any) -> list[bool]:
    """Of each request, whether it draws its tokens."""
    return [request.sampling_params.top_k != 1 for request in batch.reqs]
