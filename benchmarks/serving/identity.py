"""Are greedy answers the tokens of plain decoding? A table over block size, drafter, prefix cache and concurrency.

A cell is one server at one concurrency. At concurrency 1 it is asked the first `alone` prompts, otherwise all of them.
The reference is the plain server in company, so the plain server alone is a check of it too. `unconstrained` is the
plain server without row-invariant products: it is compared with its own answers at concurrency 1, which shows what the
constraint is for, and its speed shows what the constraint costs. Its forks are a finding, not a failure.

A server is asked at 16 first, with an empty prefix cache; at the lower concurrencies it finds these prompts cached, so
that answers from cached prefixes are compared too. Speeds compare at 16 only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.harness.config import IdentityConfig, RunConfig
from benchmarks.harness.records import Key, Record, latest, read_records
from benchmarks.harness.results import Measured, StrictModel, versions
from benchmarks.harness.run import RECORDS, discard, start
from benchmarks.harness.servers import serve
from benchmarks.harness.tasks import Prompt, Selection, first_turns, in_turn, keep, resolve, select
from benchmarks.serving.random_drafter import write_random_drafter
from benchmarks.stats.lossless import comparable_tokens, first_fork
from benchmarks.stats.summary import Throughput, macro, summarize_tasks, throughput
from sglang_auf import provenance
from sglang_auf.errors import ConfigError

log = logging.getLogger(__name__)

COMPANY = 16
REFERENCE = ("plain", COMPANY)
CELL = "cell.json"
SHIPPED_DRAFTER = provenance.CHECKOUT / "drafters" / "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Variant:
    """One server. constrained: its answers must be the reference's; otherwise they are compared with its own alone."""

    name: str
    concurrencies: tuple[int, ...] = (COMPANY,)
    plain: bool = False
    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    random_drafter: bool = False
    constrained: bool = True

    @property
    def reference(self) -> tuple[str, int]:
        return REFERENCE if self.constrained else (self.name, 1)


_ALL = (
    Variant("plain", (COMPANY, 1), plain=True),
    Variant("auf-b8", (COMPANY, 4, 1), settings=("block_size=8",)),
    Variant("auf-b8-no-prefix-cache", settings=("block_size=8", "server_args.disable_radix_cache=true")),
    Variant("auf-b4", settings=("block_size=4",)),
    Variant("random-drafter", random_drafter=True),
    Variant(
        "unconstrained",
        (COMPANY, 1),
        plain=True,
        environment={"SGLANG_AUF_ROW_INVARIANT": "0"},  # read by sglang_auf/cpu/linear.py
        constrained=False,
    ),
)
VARIANTS = {variant.name: variant for variant in _ALL}


class Cell(StrictModel):
    """cell.json: a finished measurement. asked: everything that must be equal for it to be kept on a rerun."""

    asked: dict[str, Any]
    throughput: Throughput
    tau: float | None
    versions: dict[str, str | None]


class ForkedAnswer(StrictModel):
    """First difference of one answer; a token is None where that answer had already ended."""

    task: str
    prompt_id: str
    position: int
    token: int | None
    reference: int | None


class Row(StrictModel):
    """A cell and its comparison. identical None: the cell is the reference itself. tau: macro, None without drafter."""

    variant: str
    concurrency: int
    constrained: bool
    prompts: int
    failed: int
    identical: int | None
    forks: list[ForkedAnswer]
    tokens_per_s: float | None
    tau: float | None
    versions: dict[str, str | None]


class IdentityReport(Measured):
    """identity.json. versions of a row are those it was measured with; those of the report, of the last call."""

    config: IdentityConfig
    rows: list[Row]

    @property
    def passed(self) -> bool:
        """Every request was answered, and every constrained cell is free of forks."""
        return not any(row.failed or (row.constrained and row.forks) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Job:
    """A cell to be measured. selections: of exactly these prompts."""

    config: IdentityConfig
    variant: Variant
    concurrency: int
    prompts: list[Prompt]
    selections: list[Selection]

    @property
    def place(self) -> Path:
        return self.config.out / self.variant.name / f"c{self.concurrency}"

    @property
    def shape_of(self) -> Path | None:
        return (self.config.drafter or SHIPPED_DRAFTER) if self.variant.random_drafter else None

    @property
    def asked(self) -> dict[str, Any]:
        return {
            **self.config.model_dump(mode="json", include={"profile", "max_tokens", "thinking"}),
            "settings": [*self.config.settings, *self.variant.settings],
            "environment": dict(self.variant.environment),
            "random_drafter_of": str(self.shape_of) if self.shape_of else None,
            "prompts": {chosen.task.name: chosen.sha256 for chosen in self.selections},
        }

    def finished(self) -> Cell | None:
        """The cell measured before, if it was asked the same and every request was answered."""
        path = self.place / CELL
        if not path.exists():
            return None
        try:
            cell = Cell.model_validate_json(path.read_bytes())
        except ValidationError:
            log.warning("%s is of another version of the benchmark; the cell is measured again", path)
            return None
        return cell if cell.asked == self.asked and not cell.throughput.failed else None

    def measure(self, base_url: str) -> Cell:
        """cell.json comes last, atomically: a cell without it is measured again."""
        discard(self.place)
        (self.place / CELL).unlink(missing_ok=True)
        run_config = RunConfig(
            **self.config.model_dump(include={"tasks", "limit", "max_tokens", "thinking", "data_dir", "timeout_s"}),
            base_url=base_url,
            concurrency=self.concurrency,
            plain=self.variant.plain,
            stream=False,
            out=self.place,
        )
        run = start(run_config, self.selections)
        asyncio.run(run.ask(self.prompts, f"{self.variant.name} at {self.concurrency}"))
        run.require_tau()
        records = list(run.records.values())
        cell = Cell(
            asked=self.asked,
            throughput=throughput(records, self.concurrency),
            tau=macro(summarize_tasks(records).values()).tau,
            versions=versions(),
        )
        fresh = self.place / f"{CELL}.tmp"
        fresh.write_text(cell.model_dump_json(indent=2) + "\n", encoding="utf-8")
        fresh.replace(self.place / CELL)
        return cell

    def records(self) -> dict[Key, Record]:
        return {record.key: record for record in latest(read_records(self.place / RECORDS))}


def measure_identity(config: IdentityConfig) -> IdentityReport:
    """Ask every variant that is not measured yet, then compare what is on disk."""
    variants = chosen_variants(config.variants)
    selections = first_turns(select(task, config.data_dir, config.limit) for task in resolve(config.tasks))
    everything = in_turn(selections)
    jobs: dict[tuple[str, int], Job] = {}
    for variant in variants:
        for number in variant.concurrencies:
            prompts = everything[: config.alone] if number == 1 else everything
            jobs[variant.name, number] = Job(config, variant, number, prompts, keep(selections, prompts))
    cells = [cell for variant in variants for cell in _cells([jobs[variant.name, n] for n in variant.concurrencies])]
    rows = [
        _row(job, cell, None if job is (against := jobs[job.variant.reference]) else against.records())
        for job, cell in zip(jobs.values(), cells, strict=True)
    ]
    return IdentityReport(
        config=config,
        rows=rows,
    )


def chosen_variants(names: Sequence[str] | None) -> list[Variant]:
    """plain, the reference, is always one of them. ConfigError for an unknown name."""
    for name in names or ():
        if name not in VARIANTS:
            raise ConfigError(f"variant {name!r}", "one of " + ", ".join(VARIANTS), "mend --variants")
    return [variant for variant in _ALL if names is None or variant.name in {REFERENCE[0], *names}]


def _cells(jobs: list[Job]) -> list[Cell]:
    """The cells of one variant; its server is started only where one is missing."""
    cells = [job.finished() for job in jobs]
    if None not in cells:
        log.info("%s is measured already", jobs[0].variant.name)
        return [cell for cell in cells if cell is not None]
    config, variant = jobs[0].config, jobs[0].variant
    settings = [*config.settings, *variant.settings]
    if shape_of := jobs[0].shape_of:
        settings.append(f"drafter={write_random_drafter(shape_of, config.out / 'random-drafter-weights')}")
    with serve(
        config.profile,
        variant.plain,
        settings=settings,
        environment=variant.environment,
        log_file=config.out / f"{variant.name}-server.log",
        timeout_s=config.start_timeout_s,
    ) as server:
        return [cell or job.measure(server.base_url) for job, cell in zip(jobs, cells, strict=True)]


def _row(job: Job, cell: Cell, reference: Mapping[Key, Record] | None) -> Row:
    """Answers that are in both, and not failed in either, are compared; failures count in their own rows."""
    forks, identical = [], 0
    ours_and_theirs = [] if reference is None else [(r, reference.get(r.key)) for r in job.records().values()]
    for ours, theirs in ours_and_theirs:
        if theirs is None or ours.failed or theirs.failed:
            continue
        fork = first_fork(*comparable_tokens(ours, theirs))
        if fork is None:
            identical += 1
        else:
            forks.append(
                ForkedAnswer(
                    task=ours.task,
                    prompt_id=ours.prompt_id,
                    position=fork.position,
                    token=fork.speculating,
                    reference=fork.plain,
                )
            )
    return Row(
        variant=job.variant.name,
        concurrency=job.concurrency,
        constrained=job.variant.constrained,
        prompts=cell.throughput.requests,
        failed=cell.throughput.failed,
        identical=None if reference is None else identical,
        forks=forks,
        tokens_per_s=cell.throughput.tokens_per_s,
        tau=cell.tau,
        versions=cell.versions,
    )
