"""Answers of a server, walked by a drafter as serving would walk them: tau at T=0 without a server.

A greedy answer does not depend on the drafter, so one run of plain decoding gives the text for every drafter, and the
walk over it gives the tau of a served run. Two things may differ. The target's features come from transformers here and
from SGLang there, which round differently. And the last step of an answer accepts no draft past the end of the text,
whereas a server counts drafts that it accepted and then cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.records import Record
from sglang_auf.acceptance import Acceptance
from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.errors import DataError
from sglang_auf.models.loading import load_drafter
from sglang_auf.training.data.batching import Batch, with_features
from sglang_auf.training.data.features import OnlineFeatures, find_target
from sglang_auf.training.evaluation.comparison import batches, step_of
from sglang_auf.training.evaluation.walk import walking, walks
from sglang_auf.training.text.reader import Conversation


@dataclass(frozen=True, slots=True)
class _Known:
    """The answers with their features under one set of tapped layers."""

    source: OnlineFeatures
    batches: list[tuple[list[Record], Batch]]


class Walker:
    """Walks drafters over the same answers. Features are computed once for each set of tapped layers."""

    def __init__(self, target: str, answers: Sequence[Record], trees: Sequence[int] = ()) -> None:
        """answers: greedy ones. trees: numbers of nodes of trees to walk with, beside the chain.

        Raises DataError where an answer has no token ids, or none is long enough.
        """
        self._target, self._trees = find_target(target), trees
        self._answers = [record for record in answers if not record.failed and record.completion_tokens > 1]
        for record in self._answers:
            if record.prompt_ids is None or record.output_ids is None or record.temperature != 0:
                known = [name for name in ("prompt_ids", "output_ids") if getattr(record, name) is not None]
                raise DataError(
                    f"the answer to {record.prompt_id} at temperature {record.temperature:g}, with {known or 'no ids'}",
                    "greedy answers with their token ids",
                    "ask a server of SGLang or vLLM, with `python -m benchmarks run --temperature 0`",
                )
        if not self._answers:
            raise DataError("no answer of two tokens or more", "answers to walk")
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._known: dict[tuple[int, ...], _Known] = {}

    def walk(self, drafter: Path, *, block_size: int | None = None, listed: bool = True) -> list[list[Record]]:
        """Records with a chain, and then with each kind of tree: one for each answer, without times.

        block_size: B to walk with; None: the drafter's. listed: it keeps to its draft vocabulary, where it has one.
        Raises CardError for a broken drafter.
        """
        model = load_drafter(drafter)
        if block_size is not None:
            model.config = model.config.model_copy(update={"block_size": block_size})
        vocabulary = draft_vocabulary.in_use(drafter) if listed else None
        drafted = None if vocabulary is None else torch.tensor(vocabulary.tokens, device=self._device)
        known = self._features(model.config.target_layer_ids)
        step = step_of(model, known.source)
        walked: list[list[Record]] = [[] for _ in (None, *self._trees)]
        with walking(self._device):
            for records, batch in known.batches:
                for found, counts in zip(walked, walks(step, batch, drafted, self._trees), strict=True):
                    found += [_record(*pair) for pair in zip(records, counts, strict=True)]
        place = {record.key: number for number, record in enumerate(self._answers)}
        return [sorted(found, key=lambda record: place[record.key]) for found in walked]

    def _features(self, layers: tuple[int, ...]) -> _Known:
        if layers not in self._known:
            source = OnlineFeatures(self._target, layers, device=self._device)
            self._known[layers] = _Known(source, list(self._batches(source)))
        return self._known[layers]

    def _batches(self, source: OnlineFeatures) -> Iterator[tuple[list[Record], Batch]]:
        sizes = [len(_conversation(record)) for record in self._answers]
        for rows in batches(sizes):
            records = [self._answers[row] for row in rows]
            yield records, with_features([_conversation(record) for record in records], source)


def _conversation(record: Record) -> Conversation:
    assert record.prompt_ids is not None and record.output_ids is not None
    mask = [False] * len(record.prompt_ids) + [True] * len(record.output_ids)
    return Conversation(record.prompt_id, [*record.prompt_ids, *record.output_ids], mask)


def _record(answer: Record, counts: Acceptance) -> Record:
    return Record(
        task=answer.task,
        prompt_id=answer.prompt_id,
        turn=answer.turn,
        temperature=0.0,
        finish_reason=answer.finish_reason,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        verify_steps=counts.verify_steps,
        accepted_histogram=list(counts.histogram),
        proposed=counts.proposed,
        block_size=counts.block_size,
        started_at=0.0,
        latency_s=0.0,
    )
