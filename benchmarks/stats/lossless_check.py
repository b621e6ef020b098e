"""The losslessness check on recorded runs: two are compared, and plain decoding is asked about each fork.

One run alone is judged by a server's prefill: a greedy one token by token (teacher_forced.py), one at temperature 1
by statistics of all its tokens (sampled.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from benchmarks.harness.config import CommandConfig, ServerUrl
from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.records import Record, latest, read_records
from benchmarks.harness.results import Report
from benchmarks.harness.run import MANIFEST, RECORDS
from benchmarks.harness.server_info import ServerFacts, next_token_logprobs, server_facts
from benchmarks.stats.judged import GREEDY, JudgedRun
from benchmarks.stats.lossless import Candidates, Fork, Losslessness, compare, near_tie_bar
from benchmarks.stats.sampled import Sampled, check_sampled
from benchmarks.stats.teacher_forced import TeacherForced, check_greedy
from sglang_auf.errors import ConfigError, DataError, ServerError

MAY_DIFFER = {
    "plain",
    "stream",
    "record_steps",
    "empty_cache",
    "concurrency",
    "warmup",
    "seed",
    "model",
    "tasks",
    "limit",
    "group_by",
    "rate",
}
"""Settings that may differ between a speculating run and its baseline; their greedy answers still compare."""


LOGIT_SCALE = 24.0
LogitScale = Annotated[float, Field(gt=0, description="size of the target's top logits; sets the near-tie bar")]


class LosslessConfig(CommandConfig):
    """Compare a speculating run with a plain one, answer by answer; or judge one run by prefills of its answers."""

    speculating: Path = Field(
        description="run directory of the speculating server; alone: of any run at temperature 0 or 1"
    )
    plain: Path | None = Field(None, description="run directory of the plain server of the same target")
    base_url: ServerUrl | None = Field(
        None, description="the plain server, asked only where two answers differ; of one run, the server that judges it"
    )
    logit_scale: LogitScale = LOGIT_SCALE
    concurrency: int = Field(1, ge=1, description="of one run: answers that are judged at a time")
    worst: int = Field(20, ge=0, description="of one greedy run: how many of its worst tokens are listed")

    @model_validator(mode="after")
    def _one_run_or_two(self) -> Self:
        of_one = sorted({"concurrency", "worst"} & self.model_fields_set)
        if self.plain is not None and of_one:
            raise ValueError(f"--{of_one[0]} with two runs, which asks a server only where two answers differ")
        return self

    @property
    def out(self) -> Path:
        return self.speculating


class LosslessReport(Losslessness, Report):
    """lossless.json, beside the speculating run."""

    STEM: ClassVar[str] = "lossless"


def check_runs(config: LosslessConfig) -> LosslessReport | TeacherForced | Sampled:
    """Compare two run directories of finished runs, or judge one. Tasks that only one of two has count as missing."""
    if config.plain is None:
        return _judge(config)
    ours, theirs = RunManifest.read(config.speculating / MANIFEST), RunManifest.read(config.plain / MANIFEST)
    _require_comparable(ours, theirs)
    if config.base_url is not None:
        _require_baseline(config.base_url, theirs)
    speculating = latest(read_records(config.speculating / RECORDS))
    plain = latest(read_records(config.plain / RECORDS))
    ours.require_finished(config.speculating, speculating)
    theirs.require_finished(config.plain, plain)
    found = check_records(
        speculating,
        plain,
        theirs.server,
        config.base_url,
        config.logit_scale,
    )
    return LosslessReport(**dict(found))


def _judge(config: LosslessConfig) -> TeacherForced | Sampled:
    if config.base_url is None:
        raise ConfigError(
            f"{config.speculating} alone, and no --base-url",
            "a server of the run's target that judges each token, or a plain run to compare with",
            "python -m benchmarks lossless RUN --base-url URL, or lossless SPECULATING PLAIN",
        )
    run = JudgedRun.of(config.speculating, config.base_url)
    if run.manifest.config.temperature == GREEDY:
        return check_greedy(run, config.logit_scale, concurrency=config.concurrency, worst=config.worst)
    if of_greedy := sorted({"logit_scale", "worst"} & config.model_fields_set):
        raise ConfigError(
            f"--{of_greedy[0].replace('_', '-')} with a sampled run",
            "a greedy run: of a drawn token no gap is judged",
            "leave it out",
        )
    return check_sampled(run, concurrency=config.concurrency)


def check_records(
    speculating: Iterable[Record],
    plain: Iterable[Record],
    plain_server: ServerFacts,
    base_url: str | None,
    logit_scale: float = LOGIT_SCALE,
) -> Losslessness:
    """Compare records. The bar is equality on a CPU, whose backend promises it, and a near-tie elsewhere.

    base_url: of the plain server, None where there is none to ask.
    """
    return compare(
        {record.key: record for record in latest(speculating)},
        {record.key: record for record in latest(plain)},
        PlainJudge(base_url),
        near_tie_bar(logit_scale),
        exact=plain_server.device == "cpu",
    )


class PlainJudge:
    """Asks the plain server about the two tokens of a fork, by a prefill of the prompt and the common prefix."""

    def __init__(self, base_url: str | None) -> None:
        self._base_url = base_url

    def __call__(self, plain: Record, fork: Fork) -> Candidates:
        assert plain.prompt_ids is not None
        assert plain.output_ids is not None
        assert fork.speculating is not None
        assert fork.plain is not None
        if self._base_url is None:
            raise ConfigError(
                f"answers to {plain.key} that differ at token {fork.position}, and no server to ask about it",
                "the plain server, whose logits distinguish a near-tie from a fault",
                "start python -m server --plain and add --base-url",
            )
        prefix = plain.prompt_ids + plain.output_ids[: fork.position]
        values, best = next_token_logprobs(self._base_url, prefix, [fork.speculating, fork.plain])
        return Candidates(values[fork.speculating], values[fork.plain], best)


def _require_comparable(ours: RunManifest, theirs: RunManifest) -> None:
    if ours.config.plain or not theirs.config.plain:
        raise ConfigError(
            f"a {_kind(ours)} run, then a {_kind(theirs)} one",
            "the speculating run first, then the plain one",
            "python -m benchmarks lossless SPECULATING PLAIN",
        )
    if theirs.server.sglang is None and theirs.server.vllm is None:
        raise DataError(
            "a plain run of a server that is neither SGLang nor vLLM",
            "token ids in both runs: equal texts do not prove equal tokens",
            "ask the same target by python -m server --plain",
        )
    if ours.config.temperature != 0:
        raise ConfigError(f"temperature {ours.config.temperature}", "greedy answers", "run both with --temperature 0")
    mine, its = ours.identity(), theirs.identity()
    shared = {name for name in mine if name in its and name not in MAY_DIFFER and not name.startswith("server.")}
    changed = sorted(name for name in shared | {"server.target", "server.dtype"} if mine[name] != its[name])
    if changed:
        raise DataError(
            "; ".join(f"{name}: {mine[name]!r} and {its[name]!r}" for name in changed),
            "the same target asked the same prompts in the same way",
            "run both with the same settings against servers of the same profile",
        )


def _require_baseline(base_url: str, plain: RunManifest) -> None:
    facts = server_facts(base_url)
    if facts.algorithm is not None or facts.target != plain.server.target:
        raise ServerError(
            f"{base_url} serves {facts.target} with speculative_algorithm {facts.algorithm}",
            f"plain decoding of {plain.server.target}",
            "give the server of the plain run: python -m server --plain",
        )


def _kind(manifest: RunManifest) -> str:
    return "plain" if manifest.config.plain else "speculating"
