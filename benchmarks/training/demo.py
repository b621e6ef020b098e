"""From prompts to a served drafter in one call: answers by the target, training with AUF, export, serving, tau.

Everything runs through the commands a user has: `sglang-auf regenerate`, `train` and `export`, and `python -m server`.
The amounts are a demonstration's: what comes out shows that the path works, not how good a drafter can be.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks.harness.commands import sglang_auf
from benchmarks.harness.config import CompareConfig, TrainDemoConfig
from benchmarks.harness.results import Measured, StrictModel
from benchmarks.harness.servers import serve
from benchmarks.harness.template_prompts import demo_prompts
from benchmarks.reports.figures import png, training_curves
from benchmarks.serving.compare import compare_servers
from benchmarks.serving.random_drafter import write_random_drafter


class Served(StrictModel):
    """A drafter behind the server, next to plain decoding."""

    tau_macro: float | None
    tau_micro: float | None
    speedup: float | None
    identical: int
    compared: int
    passed: bool


class TrainDemo(Measured):
    """train-demo.json. Seconds by part; held_out_tau: the best checkpoint's, by the trainer's own walk."""

    config: TrainDemoConfig
    answers: int
    answer_tokens: int
    held_out_tau: float
    before: Served
    after: Served
    seconds: dict[str, float]
    curves: Path

    @property
    def passed(self) -> bool:
        """Both served losslessly, and training has raised tau."""
        taus = (self.before.tau_macro, self.after.tau_macro)
        return self.before.passed and self.after.passed and None not in taus and taus[1] > taus[0]  # type: ignore[operator]


def train_demo(config: TrainDemoConfig) -> TrainDemo:
    """Run all parts under config.out. What an earlier call finished is used again: every part can be resumed."""
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
    result = TrainDemo(
        config=config,
        answers=len(written),
        answer_tokens=sum(len(row.get("response_ids") or ()) for row in written),
        held_out_tau=max(row["tau"] for row in metrics if row["kind"] == "held_out" and row["tau"] is not None),
        before=before,
        after=after,
        seconds=seconds,
        curves=curves,
    )
    (out / "train-demo.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return result


def _served(config: TrainDemoConfig, drafter: Path, out: Path) -> Served:
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
    lossless = comparison.lossless
    assert lossless is not None
    return Served(
        tau_macro=comparison.macro.tau,
        tau_micro=comparison.micro.tau,
        speedup=comparison.speedup,
        identical=lossless.identical,
        compared=lossless.identical + lossless.near_tie + lossless.fault,
        passed=comparison.passed,
    )
