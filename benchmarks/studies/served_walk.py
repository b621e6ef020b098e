"""Does serving reach the tau that training computes? A served run against a walk of its drafter over the same answers.

The trainer's code walks the drafter over the run's own greedy answers (walk.py). As long as serving taps the same
layers, loads the same weights and drafts in the same way, a chain takes the same verify steps, but for what rounding
changes. A ratio of steps outside of BOUNDS says that the two compute something else.

A prompt that was rendered in another way than in training is not seen, since the same prompt is walked. It lowers tau
in both, so the report shows what the drafter's card promises, and what the server warned of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from benchmarks.harness.config import CommandConfig
from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.records import Record, latest, read_records
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.run import MANIFEST, RECORDS
from benchmarks.harness.server_info import ServerFacts, target_files
from benchmarks.reports.markdown import markdown_document, markdown_table
from benchmarks.reports.numbers import number
from benchmarks.reports.text import drafting_text, vllm_text
from benchmarks.stats.summary import MacroSummary, MicroSummary, TaskSummary, macro, micro, ratio, summarize_tasks
from sglang_auf import ALGORITHM
from sglang_auf.checkpoints.card import CheckedDrafter, MeasuredTau, check_drafter
from sglang_auf.checkpoints.target_facts import TargetFacts
from sglang_auf.checkpoints.weights import weights_sha256
from sglang_auf.errors import ConfigError, DataError

BOUNDS = (0.98, 1.02)
"""Of the ratio of verify steps, served over walked, within which a chain server passes."""

SHOWN = 10
"""Answers that differ most, in the report."""

BLOCK_DRAFTERS = (ALGORITHM, "DFLASH")
"""SGLang's algorithms whose drafters can be walked."""

SERVED, WALKED = "served", "walked"


class WalkConfig(CommandConfig):
    """Walk a drafter over the answers of a run, and compare with what the server accepted."""

    run: Path = Field(description="run directory of a speculating server, at temperature 0")
    drafter: str = Field(description="the drafter that was served: directory or hub id")
    target: str = Field(description="its target: directory, hub id or name of a prepared one")
    out: Path = Field(default_factory=lambda given: given["run"], description="result directory (default: the run's)")


class Figures(StrictModel):
    """What the answers accepted in one way."""

    tasks: dict[str, TaskSummary]
    macro: MacroSummary
    micro: MicroSummary

    @classmethod
    def of(cls, records: Sequence[Record]) -> Figures:
        tasks = summarize_tasks(records)
        return cls(tasks=tasks, macro=macro(tasks.values(), records), micro=micro(records))


class AnswerSteps(StrictModel):
    """Verify steps of one answer, as it was served and as it was walked."""

    task: str
    prompt_id: str
    turn: int
    tokens: int
    served: int
    walked: int


class WalkReport(Measured, Report):
    """walk.json.

    figures: of the answers that were walked, by way: served, walked with a chain and, of a server with trees, walked
    with a tree of so many nodes. ratio: verify steps of all answers, served over walked with a chain. no_verdict: why
    the ratio decides nothing; "" where it does. failed, short: requests that failed, and answers of one token, which
    are not walked. differing: the answers whose steps differ, those that differ most first. promised: by the drafter's
    card. warnings: other reasons for a lower tau, and for a ratio that is not 1.
    """

    STEM: ClassVar[str] = "walk"

    config: WalkConfig
    server: ServerFacts
    figures: dict[str, Figures]
    ratio: float
    no_verdict: str
    failed: int
    short: int
    differing: list[AnswerSteps]
    promised: MeasuredTau | None
    warnings: list[str]

    @property
    def passed(self) -> bool:
        return bool(self.no_verdict) or BOUNDS[0] <= self.ratio <= BOUNDS[1]

    def markdown(self) -> str:
        server = self.server
        how = drafting_text(server) if server.vllm is None else vllm_text(server.vllm, server.block_size)
        asked = f"{self.config.run.name}: {server.model}, {how}; walked: {self.config.drafter}"
        return markdown_document(
            self, asked, self._verdict(), markdown_table(self._rows()), self._differing_text(), "\n".join(self._notes())
        )

    def _verdict(self) -> str:
        found = f"The server took {self.ratio:.4f} of the verify steps of the walk with a chain"
        bounds = f"{BOUNDS[0]} to {BOUNDS[1]}"
        if self.no_verdict:
            return f"No verdict: {self.no_verdict}. {found}."
        if self.passed:
            return f"Walk passed. {found} ({bounds} pass): serving drafts what training computes."
        return (
            f"Walk FAILED. {found} ({bounds} pass): serving drafts otherwise than training computes. Compare what was "
            "served with what was walked: the drafter's weights, tapped layers (`target_layer_ids`), mask token, rope "
            "and draft vocabulary, and the target's weights."
        )

    def _rows(self) -> list[list[str]]:
        slots = max(len(figures.micro.alpha) for figures in self.figures.values())
        rows = [
            ["task", "", "tau", "verify steps", "steps, served/walked", *(f"alpha_{k}" for k in range(1, slots + 1))]
        ]
        for task in self.figures[SERVED].tasks:
            rows += _rows_of(task, {way: figures.tasks[task] for way, figures in self.figures.items()})
        for way, figures in self.figures.items():
            rows.append(["all (macro)", way, number(figures.macro.tau), *[""] * (slots + 2)])
        return [*rows, *_rows_of("all (micro)", {way: figures.micro for way, figures in self.figures.items()})]

    def _differing_text(self) -> str:
        if not self.differing:
            return "Every answer took as many verify steps as its walk."
        rows = [["answer", "turn", "tokens", "served", "walked"]]
        rows += [
            [f"{part.task} {part.prompt_id}", *map(str, (part.turn, part.tokens, part.served, part.walked))]
            for part in self.differing[:SHOWN]
        ]
        count = sum(task.requests for task in self.figures[SERVED].tasks.values())
        heading = (
            f"{len(self.differing)} of {count} answers took another number of verify steps; those that differ most:"
        )
        return f"{heading}\n\n{markdown_table(rows)}"

    def _notes(self) -> list[str]:
        notes = []
        if self.failed or self.short:
            notes.append(f"- not walked: {self.failed} requests that failed, {self.short} answers of one token")
        if self.promised is not None:
            notes.append(
                f"- the card promises tau {self.promised.value:.2f} ({self.promised.kind}), {self.promised.on}"
            )
        return [*notes, *(f"- warning: {warning}" for warning in self.warnings)]


def _rows_of(name: str, ways: Mapping[str, TaskSummary | MicroSummary]) -> list[list[str]]:
    served = ways[SERVED].verify_steps
    shares = {way: "" if way == SERVED else number(ratio(served, of.verify_steps), 4) for way, of in ways.items()}
    return [
        [name, way, number(of.tau), str(of.verify_steps), shares[way], *map(number, of.alpha)]
        for way, of in ways.items()
    ]


def walk_run(config: WalkConfig) -> WalkReport:
    """Walk the drafter over a finished run. Raises ConfigError, DataError, CardError or TargetError."""
    from benchmarks.studies.walk import Walker  # imports torch
    from sglang_auf.training.data.features import find_target

    manifest = RunManifest.read(config.run / MANIFEST)
    _require_speculating(manifest)
    records = latest(read_records(config.run / RECORDS))
    manifest.require_finished(config.run, records)
    answered = [record for record in records if not record.failed]
    served = [record for record in answered if record.completion_tokens > 1]
    block = _block_of(served)
    target = find_target(config.target)
    checked = check_drafter(config.drafter, str(target))
    _require_known_tokens(served, TargetFacts.of(target))
    warnings = [*_target_warnings(manifest.server, target), *_drafter_warnings(manifest.server, checked, block)]
    trees = _trees(manifest.server, served)
    walked, *of_trees = Walker(str(target), served, trees).walk(
        checked.path, block_size=block, listed=_listed(manifest.server)
    )
    figures = {SERVED: Figures.of(served), WALKED: Figures.of(walked)}
    figures |= {f"{WALKED}, tree of {nodes}": Figures.of(each) for nodes, each in zip(trees, of_trees, strict=True)}
    steps = [figures[way].micro.verify_steps for way in (SERVED, WALKED)]
    return WalkReport(
        config=config,
        server=manifest.server.model_copy(update={"block_size": block}),
        figures=figures,
        ratio=steps[0] / steps[1],
        no_verdict=_no_verdict(manifest.server, served, block),
        failed=len(records) - len(answered),
        short=len(answered) - len(served),
        differing=_differing(served, walked),
        promised=checked.card.tau,
        warnings=[
            *warnings,
            *(each for each in checked.warnings if f"the server warns: {each}" not in manifest.warnings),
            *manifest.warnings,
        ],
    )


def _require_speculating(manifest: RunManifest) -> None:
    if manifest.config.temperature != 0:
        raise ConfigError(
            f"a run at temperature {manifest.config.temperature:g}",
            "greedy answers: what a drawn answer accepts depends on the draws",
            "run with --temperature 0",
        )
    algorithm, of_vllm = manifest.server.algorithm, manifest.server.vllm is not None
    if manifest.config.plain or algorithm is None:
        raise ConfigError(
            "a run of plain decoding",
            "a run with verify steps to compare with",
            "give the run of the speculating server",
        )
    if not of_vllm and algorithm not in BLOCK_DRAFTERS:
        raise ConfigError(
            f"a run with speculative_algorithm {algorithm}", f"one with a block drafter: {' or '.join(BLOCK_DRAFTERS)}"
        )


def _block_of(served: Sequence[Record]) -> int:
    """B of all steps. Raises DataError where no answer has a verify step, and where they do not agree."""
    blocks = sorted({record.block_size for record in served if record.block_size and record.verify_steps})
    if not blocks:
        raise DataError(
            "no answer with a verify step", "counts of verify steps to compare with", "ask a speculating server"
        )
    if len(blocks) > 1:
        raise DataError(f"blocks of {blocks} tokens in one run", "one block size", "run the benchmark again")
    return blocks[0]


def _require_known_tokens(served: Sequence[Record], target: TargetFacts) -> None:
    for record in served:
        highest = max([*(record.prompt_ids or ()), *(record.output_ids or ())], default=0)
        if highest >= target.vocab_size:
            raise DataError(
                f"token {highest} in the answer to {record.key}",
                f"tokens of {target.name}, which has {target.vocab_size}",
                "give the target that the run was asked of",
            )


def _target_warnings(server: ServerFacts, target: Path) -> list[str]:
    """[] where the run's target is this one. Raises ConfigError where it is another, if it can be read here."""
    asked = target_files(server)
    if asked is None:
        return [f"the run's target, {server.target}, is not on this machine: whether {target} is the same is not known"]
    if TargetFacts.of(asked).config_hash != TargetFacts.of(target).config_hash:
        raise ConfigError(f"--target {target}", f"the target of the run, {server.target}")
    return []


def _drafter_warnings(server: ServerFacts, checked: CheckedDrafter, block: int) -> list[str]:
    """In what the drafter that was served is not the one that is walked, as far as the server said it."""
    found = []
    if server.weights is not None and (own := weights_sha256(checked.path)) != server.weights:
        found.append(f"other weights than those that were served: {own[:8]} for {server.weights[:8]} (SHA-256)")
    if block != checked.card.block_size:
        found.append(f"a drafter of block {checked.card.block_size}, served and walked with block {block}")
    own_list = None if checked.vocabulary is None else len(checked.vocabulary.tokens)
    if _listed(server) and own_list != server.draft_vocabulary and server.tree is not None:
        found.append(f"a draft vocabulary of {own_list} tokens, where the server drafted {server.draft_vocabulary}")
    if own_list is not None and not _listed(server):
        found.append("the drafter's draft vocabulary was not used by the server, nor in the walk")
    return found


def _listed(server: ServerFacts) -> bool:
    """Whether the server kept to the drafter's list. An AUF server of an earlier version, which says nothing, did."""
    return server.algorithm == ALGORITHM and (server.tree is None or server.draft_vocabulary is not None)


def _trees(server: ServerFacts, served: Sequence[Record]) -> tuple[int, ...]:
    """Nodes of the tree to walk with, where the server has trees: as many as it says, or had on average."""
    if not server.tree:
        return ()
    acceptances = [record.acceptance for record in served]
    steps = sum(each.verify_steps for each in acceptances)
    return (server.tree_nodes or max(1, round(sum(each.proposed for each in acceptances) / steps)),)


def _no_verdict(server: ServerFacts, served: Sequence[Record], block: int) -> str:
    if server.tree:
        return (
            "the server verifies trees. It chooses their nodes by what was accepted lately and by the load, which a "
            "walk does not know; for a verdict serve chains (--set tree=false)"
        )
    if any(record.acceptance.proposed != record.verify_steps * (block - 1) for record in served):
        return f"not every verify step drafted {block - 1} tokens, as each step of the walk does"
    if without := sum(not record.verify_steps for record in served):
        return f"{without} answers were decoded without a verify step"
    return ""


def _differing(served: Sequence[Record], walked: Sequence[Record]) -> list[AnswerSteps]:
    found = [
        AnswerSteps(
            task=ours.task,
            prompt_id=ours.prompt_id,
            turn=ours.turn,
            tokens=ours.completion_tokens,
            served=ours.verify_steps,
            walked=its.verify_steps,
        )
        for ours, its in zip(served, walked, strict=True)
        if ours.verify_steps != its.verify_steps
    ]
    return sorted(found, key=lambda part: -abs(part.served - part.walked))
