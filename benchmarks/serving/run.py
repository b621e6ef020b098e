"""Ask one server that is up, and report tau, alpha_k, throughput and latency."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from benchmarks.harness.config import RunConfig
from benchmarks.harness.results import Report
from benchmarks.harness.run import ask, chosen_prompts
from benchmarks.reports.groups import groups_text
from benchmarks.reports.text import (
    OPEN_LOOP,
    UNKNOWN,
    asked_text,
    broken_rows_text,
    decoding_text,
    speed_line,
    task_table,
    tau_text,
    vllm_text,
)
from benchmarks.stats.summary import RunSummary, summarize_run


class AskConfig(RunConfig):
    """Ask one server that is already up."""

    resume: bool = Field(False, description="continue the run in --out: what is answered is not asked")

    @model_validator(mode="after")
    def _groups_have_tau(self) -> Self:
        if self.plain and self.group_by is not None:
            raise ValueError("--group-by with --plain, which has no tau to show by group")
        return self


class RunReport(RunSummary, Report):
    """summary.json."""

    STEM: ClassVar[str] = "summary"

    @property
    def passed(self) -> bool:
        return not self.throughput.failed and not self.broken_rows

    def text(self) -> str:
        if self.vllm is not None:
            decoding = vllm_text(self.vllm, self.block_size)
        else:
            decoding = decoding_text(self.drafter, self.block_size) if self.sglang else UNKNOWN
        parts = [asked_text(self.target, decoding, self.temperature, self.max_tokens)]
        parts.append(task_table(self.tasks))
        if self.micro.verify_steps:
            parts.append(tau_text(self.tasks, self.macro, self.micro))
        parts += filter(None, [groups_text(self.groups, self.without_group)])
        parts += [f"warning: {warning}" for warning in self.warnings]
        parts += filter(None, [broken_rows_text(self.broken_rows)])
        if self.sessions > 1:
            parts.append(f"written in {self.sessions} sessions: throughput is not that of one uninterrupted run")
        parts += [OPEN_LOOP] if self.rate is not None else []
        lines = [speed_line("throughput", self.throughput, self.rate)]
        for name, seconds in self.latency:
            if seconds is not None:
                figures = ", ".join(f"{share} {1000 * value:.0f} ms" for share, value in seconds)
                lines.append(f"{name:<11} {figures}")
        return "\n\n".join([*parts, "\n".join(lines)])


def ask_server(config: AskConfig) -> RunReport:
    """Raises ConfigError where config.out holds another run, ServerError where the server cannot be asked."""
    stored = RunConfig(**config.model_dump(exclude={"resume"}))
    label = "plain" if config.plain else "auf"
    run = ask(stored, chosen_prompts(stored, stored.group_by), label, resume=config.resume)
    return RunReport(**dict(summarize_run(run.manifest, list(run.records.values()))))
