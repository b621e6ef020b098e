"""From prompts to a served drafter in one call: answers of the target, training with AUF, export, serving, tau.

Everything runs through a user's commands: `sglang-auf regenerate`, `train` and `export`, and `python -m server`. The
amounts are small: the result shows that the path works, not how good a drafter can be.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from benchmarks.harness.commands import sglang_auf
from benchmarks.harness.config import ServedProfile
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.servers import serve
from benchmarks.harness.template_prompts import demo_prompts
from benchmarks.reports.figures import png, require_matplotlib, training_curves
from benchmarks.reports.numbers import number
from benchmarks.serving.compare import CompareConfig, compare_servers
from benchmarks.serving.random_drafter import write_random_drafter


class TrainDemoConfig(ServedProfile):
    """From prompts to a served drafter: regenerate, train, export, serve, and tau before and after."""

    profile: str = Field("smollm2-135m", description="server profile; its target answers and is trained for")
    recipe: str = Field("smollm2-135m-demo", description="training recipe, a name or a file")
    prompts: int = Field(160, ge=8, description="training prompts, made from templates")
    max_tokens: int = Field(96, ge=8, description="new tokens of one answer at most, trained on and measured")
    concurrency: int = Field(16, ge=1, description="training answers in flight")
    limit: int = Field(2, ge=1, description="measured prompts of each bundled sample task")
    out: Path = Field(Path("runs/train-demo"), description="result directory; what is done in it is not done again")


class ServedDrafter(StrictModel):
    """A drafter behind the server, compared with plain decoding."""

    tau_macro: float | None
    tau_micro: float | None
    speedup: float | None
    identical: int
    compared: int
    passed: bool


class TrainDemo(Measured, Report):
    """train-demo.json. seconds: by part. held_out_tau: of the best checkpoint, by the trainer's walk."""

    STEM: ClassVar[str] = "train-demo"

    config: TrainDemoConfig
    answers: int
    answer_tokens: int
    held_out_tau: float
    before: ServedDrafter
    after: ServedDrafter
    seconds: dict[str, float]
    curves: Path

    @property
    def passed(self) -> bool:
        """Whether both drafters are served losslessly and training has raised tau."""
        taus = (self.before.tau_macro, self.after.tau_macro)
        return self.before.passed and self.after.passed and None not in taus and taus[1] > taus[0]  # type: ignore[operator]

    def text(self) -> str:
        config = self.config
        lines = [
            f"{self.answers} answers of {config.profile_text} to prompts from templates, {self.answer_tokens:,} "
            f"tokens; recipe {config.recipe}",
            f"held-out tau at the best checkpoint, by the trainer's walk: {self.held_out_tau:.3f}",
            "",
            "served: the bundled sample tasks, greedy, concurrency 1",
            _served_line("before", self.before),
            _served_line("after", self.after),
            "",
            "seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in self.seconds.items()),
            f"loss curve: {self.curves}",
        ]
        return "\n".join(lines)


def _served_line(name: str, served: ServedDrafter) -> str:
    return (
        f"{name:8} tau {number(served.tau_macro)} macro, {number(served.tau_micro)} micro; speed-up "
        f"{number(served.speedup)}; {served.identical} of {served.compared} answers are plain decoding's"
    )


def train_demo(config: TrainDemoConfig) -> TrainDemo:
    """Run all parts under config.out. What an earlier call finished is used again, because each part can be resumed.

    Raises ConfigError without matplotlib.
    """
    require_matplotlib()
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    prompts, answers, run, drafter = out / "prompts.jsonl", out / "answers.jsonl", out / "run", out / "drafter"
    rows = demo_prompts(config.prompts)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    began = time.monotonic()
    with serve(config.profile, plain=True, log_file=out / "plain-server.log") as server:
        sglang_auf(
            [
                *("regenerate", str(prompts), "--base-url", f"{server.base_url}/v1", "--out", str(answers)),
                *("--max-tokens", str(config.max_tokens), "--concurrency", str(config.concurrency)),
            ]
        )
    seconds["regenerate"] = time.monotonic() - began

    began = time.monotonic()
    sglang_auf(["train", config.recipe, "--data", str(answers), "--out", str(run)])
    sglang_auf(["export", str(run), str(drafter), "--force"])
    seconds["train and export"] = time.monotonic() - began

    began = time.monotonic()
    untrained = write_random_drafter(drafter, out / "untrained")
    before = _served(config, untrained, out / "before")
    after = _served(config, drafter.resolve(), out / "after")
    seconds["serve and measure, twice"] = time.monotonic() - began

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    written = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    curves = out / "curves.png"
    curves.write_bytes(png(training_curves({"demo": metrics})))
    return TrainDemo(
        config=config,
        answers=len(written),
        answer_tokens=sum(len(row.get("response_ids") or ()) for row in written),
        held_out_tau=max(row["tau"] for row in metrics if row["kind"] == "held_out" and row["tau"] is not None),
        before=before,
        after=after,
        seconds=seconds,
        curves=curves,
    )


def _served(config: TrainDemoConfig, drafter: Path, out: Path) -> ServedDrafter:
    comparison = compare_servers(
        CompareConfig.model_validate(
            {
                "profile": config.profile,
                "set": [f"drafter={drafter}"],
                "tasks": ["sample"],
                "limit": config.limit,
                "max_tokens": config.max_tokens,
                "rounds": 2,
                "out": out,
            }
        )
    )
    comparison.write(out)
    lossless = comparison.lossless
    assert lossless is not None
    return ServedDrafter(
        tau_macro=comparison.macro.tau,
        tau_micro=comparison.micro.tau,
        speedup=comparison.speedup,
        identical=lossless.identical,
        compared=lossless.identical + lossless.near_tie + lossless.fault,
        passed=comparison.passed,
    )
