"""Greedy answers to random prompts: AUF's against plain decoding's, and what the random drafter had accepted."""

from __future__ import annotations

import hashlib
from typing import Any

from benchmarks.harness.config import RunConfig
from benchmarks.harness.records import Record, read_records
from benchmarks.harness.results import Cell
from benchmarks.harness.run import RECORDS, ask, discard
from benchmarks.harness.server_info import server_facts
from benchmarks.harness.sources.prompt import Prompt
from benchmarks.harness.tasks import Selection, Task
from benchmarks.shapes.config import ServeShapeConfig
from benchmarks.shapes.visit import Visit
from benchmarks.stats.lossless import Losslessness
from benchmarks.stats.lossless_check import check_records
from benchmarks.stats.summary import MicroSummary, micro
from sglang_auf.errors import ServerError

TASK = "random"


class AnswersCell(Cell):
    """Answers of one server at one concurrency, in records.jsonl of sha256. acceptance: all None for plain decoding."""

    concurrency: int
    sha256: str
    acceptance: MicroSummary


class AgreementCell(Cell):
    """Answers of AUF at one concurrency against those of plain decoding."""

    concurrency: int
    losslessness: Losslessness


def answers(visit: Visit, concurrency: int) -> AnswersCell:
    """Ask all prompts, or keep the answers of an earlier call. Raises ServerError where a request fails."""
    config = visit.config
    chosen = _prompts(config)

    def measure(whole: dict[str, Any]) -> AnswersCell:
        place = visit.place / f"c{concurrency}"
        discard(place)
        run_config = RunConfig(
            **config.model_dump(include={"max_tokens", "timeout_s"}),
            base_url=visit.server().base_url,
            tasks=(TASK,),
            thinking="server",
            concurrency=concurrency,
            warmup=1,
            plain=visit.plain,
            stream=False,
            empty_cache=True,
            out=place,
        )
        records = list(ask(run_config, [chosen], f"{visit.name} at {concurrency}").records.values())
        if failed := [record for record in records if record.failed]:
            raise ServerError(
                f"{len(failed)} of {len(records)} requests failed, the first with {failed[0].error}",
                "an answer to each",
                "read the server's log, then repeat the command",
            )
        return AnswersCell(
            asked=whole, concurrency=concurrency, sha256=_sha256(visit, concurrency), acceptance=micro(records)
        )

    asked = {"prompts": chosen.sha256, "max_tokens": config.max_tokens, "concurrency": concurrency}
    return visit.cell(AnswersCell, f"answers-c{concurrency}", asked, measure)


def agreement(auf: Visit, ours: AnswersCell, plain: Visit, theirs: AnswersCell) -> AgreementCell:
    """Compare as `benchmarks compare` does: equality on a CPU, elsewhere up to near-ties."""

    def measure(whole: dict[str, Any]) -> AgreementCell:
        url = plain.server().base_url
        found = check_records(
            _records(auf, ours.concurrency), _records(plain, theirs.concurrency), server_facts(url), url
        )
        return AgreementCell(asked=whole, concurrency=ours.concurrency, losslessness=found)

    asked = {"auf": ours.sha256, "plain": theirs.sha256}
    return plain.cell(AgreementCell, f"agreement-c{ours.concurrency}", asked, measure)


def _prompts(config: ServeShapeConfig) -> Selection:
    prompts = tuple(
        Prompt(TASK, f"{TASK}/{number}", (" ".join(map(str, config.random_prompt("answers", number))),))
        for number in range(config.prompts)
    )
    return Selection(Task(TASK, config.prompts), prompts, "random ids")


def _records(visit: Visit, concurrency: int) -> list[Record]:
    return read_records(visit.place / f"c{concurrency}" / RECORDS)


def _sha256(visit: Visit, concurrency: int) -> str:
    return hashlib.sha256((visit.place / f"c{concurrency}" / RECORDS).read_bytes()).hexdigest()
