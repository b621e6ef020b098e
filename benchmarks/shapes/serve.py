"""Serve random models of a real model's shape: are answers plain decoding's, what memory, what does a step cost?

Three servers, one after the other: AUF, plain decoding, and AUF with forced acceptance (steps.py) for the step table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from benchmarks.harness.results import Cell, Measured, Report, StrictModel
from benchmarks.reports.markdown import kept_text, markdown_document, markdown_table, milliseconds
from benchmarks.reports.numbers import number
from benchmarks.shapes.answers import AgreementCell, AnswersCell, agreement, answers
from benchmarks.shapes.config import ServeShapeConfig
from benchmarks.shapes.memory import ServerCell, memory_of
from benchmarks.shapes.steps import StepCell, forced, step_cells
from benchmarks.shapes.visit import Visit
from benchmarks.shapes.write import DRAFTER_DIR, TARGET_DIR
from benchmarks.stats.summary import ratio

TAUS = (2, 3, 4)
AUF, PLAIN, FORCED = "auf", "plain", "forced"


class StepRow(StrictModel):
    """One batch at one temperature. Seconds: auf_s of a verify step, plain_s of a token."""

    temperature: float
    batch: int
    auf_s: float | None
    plain_s: float | None

    @property
    def ratio(self) -> float | None:
        """Plain steps that an AUF step takes: the tau from which AUF is faster."""
        return ratio(self.auf_s, self.plain_s)

    def speed_up(self, tau: float) -> float | None:
        """Over plain decoding, with a drafter of this tau."""
        return ratio(tau, self.ratio)


class ShapeReport(Measured, Report):
    """serve-shape.json. acceptance: by concurrency. kept: versions of cells that were measured with others."""

    STEM: ClassVar[str] = "serve-shape"

    config: ServeShapeConfig
    layers: int
    acceptance: list[AnswersCell]
    agreement: list[AgreementCell]
    servers: dict[str, ServerCell]
    steps: list[StepRow]
    kept: list[dict[str, str | None]]

    @property
    def passed(self) -> bool:
        return all(cell.losslessness.passed for cell in self.agreement)

    def markdown(self) -> str:
        facts = self.servers[AUF].facts
        shape = ", ".join(f"{name} {self.config.target[name]}" for name in ("hidden_size", "vocab_size"))
        lines = [
            f"Random weights, {self.layers} layers, {shape}, {str(facts.dtype).removeprefix('torch.')}; "
            f"{facts.device}, block {facts.block_size}. Prompts of {self.config.prompt_tokens} random tokens."
        ]
        lines.append(kept_text(self.kept, self.versions))
        parts = [f"Identity {'passed' if self.passed else 'FAILED'}.", self._answers(), self._memory()]
        parts.append(f"A step: AUF's emits {self.config.emitted} tokens, which is forced; plain decoding's is a token.")
        return markdown_document(self, *lines, *parts, self._steps())

    def _answers(self) -> str:
        rows = [
            ["concurrency", "answers", "identical", "near-tie", "fault", "tokens compared", "bar", "tau", "alpha_1"]
        ]
        for ours, compared in zip(self.acceptance, self.agreement, strict=True):
            found = compared.losslessness
            bar = "equality" if found.exact else f"{found.near_tie_bar:g} in logits"
            counts = [self.config.prompts, found.identical, found.near_tie, found.fault]
            alpha = ours.acceptance.alpha
            cells = [
                *map(str, counts),
                found.tokens_text(),
                bar,
                number(ours.acceptance.tau),
                number(alpha[0] if alpha else None),
            ]
            rows.append([str(ours.concurrency), *cells])
        return markdown_table(rows)

    def _memory(self) -> str:
        rows = [["server", "planned", "of it", "in use afterwards", "the server's own account"]]
        for name, cell in self.servers.items():
            planned = sum(cell.planned.values()) if cell.planned else None
            cells = [number(planned, 1), _sizes(cell.planned), number(cell.used, 1), _sizes(cell.said)]
            rows.append([name, *cells])
        note = "Memory in GiB. On a CPU a server's account is what the machine has less free, whoever took it."
        return f"{note}\n\n{markdown_table(rows)}"

    def _steps(self) -> str:
        rows = [["T", "batch", "AUF", "plain", "AUF / plain", *(f"speed-up at tau {tau}" for tau in TAUS)]]
        for row in self.steps:
            cells = [milliseconds(row.auf_s), milliseconds(row.plain_s), number(row.ratio)]
            rows.append([f"{row.temperature:g}", str(row.batch), *cells, *(number(row.speed_up(tau)) for tau in TAUS)])
        return markdown_table(rows)


def serve_shape(config: ServeShapeConfig) -> ShapeReport:
    """Measure what is not measured yet. Raises ConfigError, ServerError."""
    config.check()
    models = [config.models / TARGET_DIR, config.models / DRAFTER_DIR]
    auf, plain = Visit(config, AUF, False, {}), Visit(config, PLAIN, True, {})
    servers: dict[str, ServerCell] = {}
    with auf:
        ours = [answers(auf, level) for level in config.levels]
        servers[AUF] = _server_cell(auf, models)
    with plain:
        theirs = answers(plain, config.levels[-1])
        compared = [agreement(auf, cell, plain, theirs) for cell in ours]
        plain_steps = step_cells(plain)
        servers[PLAIN] = _server_cell(plain, models[:1])
    with Visit(config, FORCED, False, forced(config.emitted)) as speculating:
        auf_steps = step_cells(speculating)
        servers[FORCED] = _server_cell(speculating, models)
    report = ShapeReport(
        config=config,
        layers=config.target["num_hidden_layers"],
        acceptance=ours,
        agreement=compared,
        servers=servers,
        steps=[_row(auf_steps[key], plain_steps[key]) for key in auf_steps],
        kept=[],
    )
    cells: list[Cell] = [*ours, theirs, *compared, *plain_steps.values(), *auf_steps.values(), *servers.values()]
    report.kept = [cell.versions for cell in cells if cell.versions != report.versions]
    return report


def _server_cell(visit: Visit, models: list[Path]) -> ServerCell:
    def measure(whole: dict[str, Any]) -> ServerCell:
        server = visit.server()
        return memory_of(server, whole, models, visit.used_before)

    return visit.cell(ServerCell, "server", {}, measure)


def _row(auf: StepCell, plain: StepCell) -> StepRow:
    return StepRow(temperature=auf.temperature, batch=auf.batch, auf_s=auf.step_s, plain_s=plain.step_s)


def _sizes(parts: dict[str, float]) -> str:
    return "; ".join(f"{name}: {size:.2f}" for name, size in parts.items()) or "-"
