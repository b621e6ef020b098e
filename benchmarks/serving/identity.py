"""Are greedy answers the tokens of plain decoding? A table over block size, drafter, prefix cache and concurrency.

A cell is one server at one concurrency. At concurrency 1 it is asked the first `alone` prompts, otherwise all of them.
The reference is the plain server at concurrency 16, so the plain server at concurrency 1 checks the reference too.
`unconstrained` is the plain server without row-invariant products. It is compared with its own answers at concurrency
1, which shows what the constraint is for, and its speed shows what the constraint costs. Its forks are a finding, not a
failure.

A server is asked at concurrency 16 first, with an empty prefix cache. At lower concurrencies these prompts are cached,
so that answers from cached prefixes are compared too. Speeds can be compared at 16 only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from benchmarks.harness.config import AskedTasks, Names, RunConfig, StartedServersConfig
from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.records import Key, Record, latest, read_records
from benchmarks.harness.results import ROOT, Cell, Measured, Report, StrictModel
from benchmarks.harness.run import MANIFEST, RECORDS, ask, chosen_prompts, discard
from benchmarks.harness.servers import serve
from benchmarks.harness.sources.prompt import Prompt
from benchmarks.harness.tasks import Selection, first_turns, in_turn, keep
from benchmarks.reports.markdown import kept_text, markdown_document, markdown_table, prompts_cell
from benchmarks.reports.numbers import number
from benchmarks.reports.text import broken_rows_text
from benchmarks.serving.random_drafter import write_random_drafter
from benchmarks.stats.lossless import comparable_tokens, first_fork, other_ends
from benchmarks.stats.summary import Throughput, macro, summarize_tasks, throughput
from sglang_auf import env
from sglang_auf.errors import ConfigError

logger = logging.getLogger(__name__)

COMPANY = 16
REFERENCE = ("plain", COMPANY)
CELL = "cell.json"
SHIPPED_DRAFTER = ROOT / "drafters" / "smollm2-135m"


class IdentityConfig(StartedServersConfig, AskedTasks):
    """Greedy answers of several servers against plain decoding, token by token; what is measured is not redone."""

    max_tokens: int = Field(128, ge=1, description="new tokens of one answer at most")
    variants: Names | None = Field(None, description="comma-separated servers to ask beside plain (default: all)")
    alone: int = Field(24, ge=1, description="prompts asked at concurrency 1, of all tasks in turn")
    drafter: Path | None = Field(None, description="drafter whose shape random-drafter has (default: the shipped one)")
    out: Path = Field(Path("runs/identity"), description="result directory; finished cells in it are kept")


@dataclass(frozen=True, slots=True)
class ServerVariant:
    """One server. constrained: its answers must be the reference's; otherwise they are compared with its own."""

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
    ServerVariant("plain", (COMPANY, 1), plain=True),
    ServerVariant("auf-b8", (COMPANY, 4, 1), settings=("block_size=8",)),
    ServerVariant("auf-b8-no-prefix-cache", settings=("block_size=8", "server_args.disable_radix_cache=true")),
    ServerVariant("auf-b4", settings=("block_size=4",)),
    ServerVariant("random-drafter", random_drafter=True),
    ServerVariant(
        "unconstrained",
        (COMPANY, 1),
        plain=True,
        environment={env.ROW_INVARIANT.name: "0"},
        constrained=False,
    ),
)
VARIANTS = {variant.name: variant for variant in _ALL}


class MeasuredCell(Cell):
    """cell.json."""

    throughput: Throughput
    tau: float | None


class ForkedAnswer(StrictModel):
    """First difference of one answer; a token is None where that answer had already ended.

    finish: both finish reasons, ours first, where only these differ.
    """

    task: str
    prompt_id: str
    position: int
    token: int | None
    reference: int | None
    finish: tuple[str, str] | None = None

    def __str__(self) -> str:
        if self.finish is not None:
            return f"{self.prompt_id}: finished by {self.finish[0]!r} and not {self.finish[1]!r}"
        return f"{self.prompt_id} token {self.position}: {self.token} for {self.reference}"


class ComparedCell(StrictModel):
    """A cell and its comparison. identical: None for the reference itself. tau: macro, None without a drafter."""

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


class IdentityReport(Measured, Report):
    """identity.json. The versions of a row are those of its measurement; the report's are those of the last call."""

    STEM: ClassVar[str] = "identity"

    config: IdentityConfig
    rows: list[ComparedCell]
    broken_rows: list[str] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Every row was read, every request answered, and every constrained cell is free of forks."""
        return not self.broken_rows and not any(row.failed or (row.constrained and row.forks) for row in self.rows)

    def markdown(self) -> str:
        config = self.config
        rows = [["variant", "concurrency", "prompts", "identical", "forks", "tokens/s", "tau"]]
        for row in self.rows:
            identical, forks = "reference", "-"
            if row.identical is not None:
                identical, forks = f"{row.identical} of {row.identical + len(row.forks)}", str(len(row.forks))
            cells = [row.variant, str(row.concurrency), prompts_cell(row.prompts, row.failed), identical, forks]
            rows.append([*cells, number(row.tokens_per_s, 1), number(row.tau)])
        names = [*config.tasks, *(path.name for path in config.prompts)]
        asked = f"{config.profile_text}, temperature 0, at most {config.max_tokens} new tokens, {', '.join(names)}"
        outcome = "passed" if self.passed else "FAILED"
        notes = [
            f"Identity {outcome}. The reference of `unconstrained`, which promises nothing, is itself alone; of the "
            "others it is plain decoding at concurrency 16. Speeds compare at concurrency 16.",
            *(f"- fork: {row.variant} at {row.concurrency}, {fork}" for row in self.rows for fork in row.forks),
        ]
        kept = kept_text((row.versions for row in self.rows), self.versions)
        broken = broken_rows_text(self.broken_rows)
        return markdown_document(self, asked, markdown_table(rows), "\n".join(notes), kept, broken)


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """A cell to be measured. selections: of exactly these prompts."""

    config: IdentityConfig
    variant: ServerVariant
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
            **self.config.model_dump(mode="json", include={"profile", "profile_sha256", "max_tokens", "thinking"}),
            "settings": [*self.config.settings, *self.variant.settings],
            "environment": dict(self.variant.environment),
            "random_drafter_of": str(self.shape_of) if self.shape_of else None,
            "prompts": {chosen.task.name: chosen.sha256 for chosen in self.selections},
        }

    def finished(self) -> MeasuredCell | None:
        """The measurement of an earlier call, if it was asked the same and every request was answered."""
        cell = MeasuredCell.kept(self.place / CELL, self.asked)
        return None if cell is None or cell.throughput.failed else cell

    def measure(self, base_url: str) -> MeasuredCell:
        """Ask the server and write cell.json last: a cell without it is measured again."""
        discard(self.place)
        (self.place / CELL).unlink(missing_ok=True)
        run_config = RunConfig(
            **self.config.model_dump(include={*AskedTasks.model_fields, "max_tokens", "timeout_s"}),
            base_url=base_url,
            concurrency=self.concurrency,
            plain=self.variant.plain,
            stream=False,
            out=self.place,
        )
        label = f"{self.variant.name} at {self.concurrency}"
        records = list(ask(run_config, self.selections, label, prompts=self.prompts).records.values())
        cell = MeasuredCell(
            asked=self.asked,
            throughput=throughput(records, self.concurrency),
            tau=macro(summarize_tasks(records).values()).tau,
        )
        cell.write(self.place / CELL)
        return cell

    def records(self) -> dict[Key, Record]:
        return {record.key: record for record in latest(read_records(self.place / RECORDS))}


def measure_identity(config: IdentityConfig) -> IdentityReport:
    """Ask every variant that is not measured yet, then compare what is on disk."""
    variants = chosen_variants(config.variants)
    selections = first_turns(chosen_prompts(config))
    everything = in_turn(selections)
    planned: dict[tuple[str, int], PlannedCell] = {}
    for variant in variants:
        for concurrency in variant.concurrencies:
            prompts = everything[: config.alone] if concurrency == 1 else everything
            cell = PlannedCell(config, variant, concurrency, prompts, keep(selections, prompts))
            planned[variant.name, concurrency] = cell
    measured = [
        cell for variant in variants for cell in _measured([planned[variant.name, n] for n in variant.concurrencies])
    ]
    rows = [
        _compared(cell, result, None if cell is (against := planned[cell.variant.reference]) else against.records())
        for cell, result in zip(planned.values(), measured, strict=True)
    ]
    # As the runs have them: some rows are known to be broken once a server is up, which finished cells need no more.
    broken = [row for cell in planned.values() for row in RunManifest.read(cell.place / MANIFEST).broken_rows]
    return IdentityReport(config=config, rows=rows, broken_rows=list(dict.fromkeys(broken)))


def chosen_variants(names: Sequence[str] | None) -> list[ServerVariant]:
    """The variants of these names, and always plain, the reference. Raises ConfigError for an unknown name."""
    for name in names or ():
        if name not in VARIANTS:
            raise ConfigError(f"variant {name!r}", "one of " + ", ".join(VARIANTS))
    return [variant for variant in _ALL if names is None or variant.name in {REFERENCE[0], *names}]


def _measured(cells: list[PlannedCell]) -> list[MeasuredCell]:
    """The cells of one variant, measured. Its server is started only where a cell is missing."""
    finished = [cell.finished() for cell in cells]
    if None not in finished:
        logger.info("%s is measured already", cells[0].variant.name)
        return [result for result in finished if result is not None]
    config, variant = cells[0].config, cells[0].variant
    settings = [*config.settings, *variant.settings]
    if shape_of := cells[0].shape_of:
        settings.append(f"drafter={write_random_drafter(shape_of, config.out / 'random-drafter-weights')}")
    with serve(
        config.profile,
        variant.plain,
        settings=settings,
        environment=variant.environment,
        log_file=config.out / f"{variant.name}-server.log",
        timeout_s=config.start_timeout_s,
    ) as server:
        return [result or cell.measure(server.base_url) for cell, result in zip(cells, finished, strict=True)]


def _compared(cell: PlannedCell, result: MeasuredCell, reference: Mapping[Key, Record] | None) -> ComparedCell:
    """Compare the answers that both have and that failed in neither. Each cell counts its own failures."""
    forks, identical = [], 0
    ours_and_theirs = [] if reference is None else [(r, reference.get(r.key)) for r in cell.records().values()]
    for ours, theirs in ours_and_theirs:
        if theirs is None or ours.failed or theirs.failed:
            continue
        tokens = comparable_tokens(ours, theirs)
        fork, ends = first_fork(*tokens), other_ends(ours, theirs)
        if fork is None and ends is None:
            identical += 1
        else:
            forks.append(
                ForkedAnswer(
                    task=ours.task,
                    prompt_id=ours.prompt_id,
                    position=fork.position if fork else len(tokens[0]),
                    token=fork.speculating if fork else None,
                    reference=fork.plain if fork else None,
                    finish=None if fork else ends,
                )
            )
    return ComparedCell(
        variant=cell.variant.name,
        concurrency=cell.concurrency,
        constrained=cell.variant.constrained,
        prompts=result.throughput.requests,
        failed=result.throughput.failed,
        identical=None if reference is None else identical,
        forks=forks,
        tokens_per_s=result.throughput.tokens_per_s,
        tau=result.tau,
        versions=result.versions,
    )
