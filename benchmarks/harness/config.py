"""What a user can set, one model per command. The command line is made from these fields (see cli.py)."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


def _split_commas(value: Any) -> Any:
    parts = [value] if isinstance(value, str) else value
    return [name.strip() for part in parts for name in str(part).split(",") if name.strip()]


def _split_words(value: Any) -> Any:
    return shlex.split(value) if isinstance(value, str) else value


def _bare_url(value: Any) -> Any:
    return value.rstrip("/").removesuffix("/v1") if isinstance(value, str) else value


def _dated_run() -> Path:
    return Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")


Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas), Field(min_length=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split_commas), Field(min_length=1)]
Settings = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[^=]+=")], ...], BeforeValidator(_split_words), Field(min_length=1)
]
ServerUrl = Annotated[str, BeforeValidator(_bare_url), Field(pattern=r"^https?://.+")]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Questions(_Config):
    """What is asked."""

    tasks: Names = Field(("paper",), description="comma-separated tasks or groups (paper, sample)")
    limit: int | None = Field(None, ge=1, description="at most this many prompts of each task")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 is greedy; above 0 nothing else shapes sampling")
    max_tokens: int = Field(512, ge=1, description="new tokens of one answer at most")
    seed: int = Field(42, ge=0, lt=2**31, description="each request's sampling seed derives from it (temperature > 0)")
    thinking: Literal["off", "on", "server"] = Field("off", description="template switch enable_thinking, or as is")
    data_dir: Path | None = Field(None, description="read <task>.jsonl from here instead of the hub")
    timeout_s: float = Field(600.0, gt=0, description="seconds one request may take")


class Workload(Questions):
    """What is asked, and how hard."""

    concurrency: int = Field(1, ge=1, description="conversations in flight; a new one starts when one ends")
    warmup: int | None = Field(None, ge=0, description="requests asked first, not recorded (default: concurrency)")

    @property
    def warmup_requests(self) -> int:
        return self.concurrency if self.warmup is None else self.warmup


class RunConfig(Workload):
    """Ask one server that is already up."""

    base_url: ServerUrl = Field(description="the server, for example http://127.0.0.1:30000")
    model: str | None = Field(None, description="model name to send (default: the first one of /v1/models)")
    stream: bool = Field(True, description="stream answers, which gives the time to the first token")
    plain: bool = Field(False, description="the server decodes plainly: a baseline, without tau")
    out: Path = Field(default_factory=_dated_run, description="run directory")


class CompareConfig(Workload):
    """Start the speculating and the plain server of one profile and ask both the same."""

    profile: str = Field(description="server profile, as for python -m server --profile")
    settings: tuple[str, ...] = Field((), alias="set", description="key=value for both servers; may be repeated")
    mode: Literal["interleaved", "sequential"] = Field(
        "interleaved", description="both servers up and asked in turns, or one after the other if memory is short"
    )
    rounds: int = Field(4, ge=1, description="turns each server gets when interleaved")
    stream: bool = Field(False, description="stream answers; the client then takes CPU from a server on this machine")
    start_timeout_s: float = Field(900.0, gt=0, description="seconds a server may take to be ready")
    out: Path = Field(Path("runs/demo"), description="result directory; results of an earlier comparison are replaced")


class _Started(_Config):
    """What the tables about servers of one profile share: greedy, first turns only."""

    profile: str = Field(description="server profile, as for python -m server --profile")
    settings: tuple[str, ...] = Field((), alias="set", description="key=value for every server; may be repeated")
    thinking: Literal["off", "on", "server"] = Field("off", description="template switch enable_thinking, or as is")
    data_dir: Path | None = Field(None, description="read <task>.jsonl from here instead of the hub")
    timeout_s: float = Field(600.0, gt=0, description="seconds one request may take")
    start_timeout_s: float = Field(900.0, gt=0, description="seconds a server may take to be ready")


class IdentityConfig(_Started):
    """Greedy answers of several servers against plain decoding, token by token; what is measured is not redone."""

    tasks: Names = Field(("paper",), description="comma-separated tasks or groups (paper, sample); first turns")
    limit: int | None = Field(None, ge=1, description="at most this many prompts of each task")
    max_tokens: int = Field(128, ge=1, description="new tokens of one answer at most")
    variants: Names | None = Field(None, description="comma-separated servers to ask beside plain (default: all)")
    alone: int = Field(24, ge=1, description="prompts asked at concurrency 1, of all tasks in turn")
    drafter: Path | None = Field(None, description="drafter whose shape random-drafter has (default: the shipped one)")
    out: Path = Field(Path("runs/identity"), description="result directory; finished cells in it are kept")


class TurnsConfig(_Started):
    """What the tables share whose servers are asked in turns."""

    tasks: Names | None = Field(
        None, description="comma-separated tasks or groups; first turns (default: mt_bench, without --data-dir sample)"
    )
    limit: int = Field(8, ge=1, description="prompts in all, of all tasks in turn; more where more are in flight")
    max_tokens: int = Field(256, ge=2, description="new tokens of one answer at most")
    concurrency: Counts = Field((1,), description="comma-separated numbers of requests in flight")
    rounds: int = Field(3, ge=1, description="turns each server gets at each concurrency; medians are reported")
    pool_tokens: int = Field(16384, ge=1, description="KV pool of each server, in tokens")
    out: Path = Field(description="result directory; earlier results are replaced")

    @property
    def server_settings(self) -> tuple[str, ...]:
        return (f"server_args.max_total_tokens={self.pool_tokens}", *self.settings)


class SpeedConfig(TurnsConfig):
    """AUF, plain decoding and SGLang's built-in DFLASH with the same drafter, asked in turns."""

    concurrency: Counts = Field((1, 4, 16), description="comma-separated numbers of requests in flight")
    out: Path = Field(Path("runs/speed"), description="result directory; earlier results are replaced")


class VariantsConfig(TurnsConfig):
    """A profile, the same with other settings, and plain decoding, asked in turns: which is served fastest here?"""

    variants: Annotated[tuple[Settings, ...], Field(min_length=1)] = Field(
        alias="variant",
        description='the profile with other settings, as "block_size=6 drafter=DIR"; given once for each variant',
    )
    out: Path = Field(Path("runs/variants"), description="result directory; earlier results are replaced")


class SweepConfig(Questions):
    """One server at several concurrencies, and a plain one beside it: speed-up, time to first token, time per token."""

    base_url: ServerUrl = Field(description="the speculating server")
    plain_url: ServerUrl | None = Field(None, description="a plain server of the same target, for the speed-up")
    concurrency: Counts = Field((1, 2, 4, 8, 16, 32), description="comma-separated numbers of requests in flight")
    out: Path = Field(Path("runs/sweep"), description="result directory; levels that are finished in it are kept")


class ReportConfig(_Config):
    """One page of benchmark runs and training runs: tau, alpha_k, accepted lengths, speed-up, training, provenance."""

    runs: tuple[Path, ...] = Field(
        min_length=1, description="directories of `run` or `sweep`, or of `sglang-auf train`"
    )
    paper: bool = Field(False, description="set the figures of arXiv 2607.01893 beside these")
    title: str = Field("Acceptance of a block drafter", description="the page's title")
    out: Path = Field(Path("runs/report"), description="directory for report.html, report.md and the pictures")


class StudyConfig(_Config):
    """Arms x seeds of a training study, trained, walked, served and compared; a killed study goes on."""

    study: Path = Field(description="the study as YAML, see benchmarks/studies")
    data_dir: Path | None = Field(
        None, description="read <task>.jsonl of the measured tasks, and files the study names, from here"
    )
    out: Path = Field(Path("runs/study"), description="directory of the study; what is finished in it is not redone")
    jobs: int = Field(1, ge=1, description="trainings at a time, sharing the cores of one CPU")
    report_only: bool = Field(False, description="only write the report anew, from OUT/records")


class SoakConfig(_Config):
    """Mixed load on a server for minutes, checked against plain decoding; memory, files and KV slots are watched."""

    profile: str = Field("smollm2-135m", description="server profile, as for python -m server --profile")
    settings: tuple[str, ...] = Field(
        ("server_args.max_running_requests=8", "server_args.max_total_tokens=1024", "server_args.context_length=1024"),
        alias="set",
        description="key=value for both servers; may be repeated. A small pool has requests wait and be retracted",
    )
    minutes: float = Field(30.0, gt=0, description="how long the load lasts")
    clients: int = Field(12, ge=1, description="requests in flight")
    questions: int = Field(24, ge=1, description="different prompts; plain decoding answers each three times first")
    seed: int = Field(0, ge=0, description="of what is drawn: kinds of request and prompts")
    sample_s: float = Field(
        5.0, gt=0, validate_default=True, description="seconds between looks at the server, a tenth of the time at most"
    )
    timeout_s: float = Field(600.0, gt=0, description="seconds one request may take")
    out: Path = Field(Path("runs/soak"), description="directory of soak.json, soak.md and the servers' logs")

    @field_validator("sample_s")
    @classmethod
    def _often_enough(cls, value: float, info: ValidationInfo) -> float:
        """Growth is read off the samples' first and last fifths, which must not be empty."""
        if value > info.data.get("minutes", value) * 6:
            raise ValueError("must be a tenth of the time that the load lasts at most")
        return value


class FailoverConfig(_Config):
    """Two servers behind SGLang's router; one is killed under load, and clients that retry must lose nothing."""

    profile: str = Field("smollm2-135m", description="server profile, as for python -m server --profile")
    settings: tuple[str, ...] = Field(
        ("server_args.max_total_tokens=4096", "server_args.context_length=2048"),
        alias="set",
        description="key=value for both servers; may be repeated",
    )
    requests: int = Field(48, ge=6, description="different prompts, asked with both servers up, and during the kill")
    clients: int = Field(6, ge=1, description="requests in flight")
    max_tokens: int = Field(64, ge=2, description="new tokens of one answer")
    retries: int = Field(8, ge=0, description="of one request, by the openai client, with its pauses")
    timeout_s: float = Field(300.0, gt=0, description="seconds one request may take")
    out: Path = Field(Path("runs/failover"), description="directory of failover.json, failover.md and the logs")


class LosslessConfig(_Config):
    """Compare a speculating run with a plain one, answer by answer."""

    speculating: Path = Field(description="run directory of the speculating server")
    plain: Path = Field(description="run directory of the plain server of the same target")
    base_url: ServerUrl | None = Field(None, description="the plain server, asked only where two answers differ")
    logit_scale: float = Field(24.0, gt=0, description="size of the target's top logits; sets the near-tie bar")


class TrainDemoConfig(_Config):
    """From prompts to a served drafter: regenerate, train, export, serve, and tau before and after."""

    profile: str = Field("smollm2-135m", description="server profile; its target answers and is trained for")
    recipe: str = Field("smollm2-135m-demo", description="training recipe, a name or a file")
    prompts: int = Field(160, ge=8, description="training prompts, made from templates")
    max_tokens: int = Field(96, ge=8, description="new tokens of one answer at most, trained on and measured")
    concurrency: int = Field(16, ge=1, description="training answers in flight")
    limit: int = Field(2, ge=1, description="measured prompts of each bundled sample task")
    out: Path = Field(Path("runs/train-demo"), description="result directory; what is done in it is not done again")


class StepConfig(_Config):
    """One training step of AUF against `decay`, forward and backward, on synthetic batches: time and peak memory."""

    shapes: Names = Field(("smollm2-135m", "qwen3-8b"), description="comma-separated shapes (tiny is another one)")
    r_active: float = Field(0.25, gt=0, lt=1, description="share of a block's slots that AUF is to keep, about")
    rounds: int = Field(5, ge=1, description="steps of each variant, interleaved; medians are reported")
    dense: bool = Field(True, description="also decay as it is usually written: minutes a step on a CPU")
    table: bool = Field(True, description="also anchors x length, on one row of the first shape")
    table_anchors: Counts = Field((64, 128, 256, 512), description="comma-separated anchors of that table")
    table_lengths: Counts = Field((1024, 2048, 3072), description="comma-separated tokens of its row")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu or cuda")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 (autocast, as the trainer has it) or fp32")
    out: Path = Field(Path("runs/step"), description="result directory; earlier results are replaced")


class OverlapConfig(_Config):
    """Benchmark prompts that the prompts of training data repeat, or nearly do."""

    training: tuple[str, ...] = Field(min_length=1, description="file, folder or hub data set; may be repeated")
    tasks: Names = Field(("paper",), description="comma-separated tasks or groups (paper, sample)")
    limit: int | None = Field(None, ge=1, description="at most this many prompts of each task")
    data_dir: Path | None = Field(None, description="read <task>.jsonl from here instead of the hub")
    words: int = Field(8, ge=1, description="words of a run that two prompts may have in common")
    share: float = Field(0.5, gt=0, le=1, description="overlap from which on a prompt is named")
    out: Path = Field(Path("runs/overlap"), description="result directory; earlier results are replaced")


class RivalStepsConfig(_Config):
    """One DFlash training step of this trainer against other packages', each in a virtual environment of its own."""

    venvs: tuple[str, ...] = Field(
        (), alias="venv", description="specforge=PATH or speculators=PATH, its environment; may be repeated"
    )
    shape: str = Field("smollm2-135m", description="shape of the drafter: smollm2-135m, qwen3-8b or tiny")
    length: int = Field(1024, ge=16, description="tokens of the one row")
    anchors: int = Field(128, ge=1, description="blocks in it")
    r_active: float = Field(0.25, gt=0, lt=1, description="share of a block's slots that AUF is to keep, about")
    rounds: int = Field(5, ge=1, description="steps of each trainer, interleaved; medians are reported")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu or cuda")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16, as each package trains in it, or fp32")
    out: Path = Field(Path("runs/rival-steps"), description="result directory; earlier results are replaced")
