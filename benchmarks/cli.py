"""The command line: flags made from the configuration models, and exit codes.

0: done; 1: done, but requests failed or answers were not lossless or not identical; 2: the user has something to mend;
130: interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from benchmarks.harness.config import (
    CompareConfig,
    FailoverConfig,
    IdentityConfig,
    LosslessConfig,
    OverlapConfig,
    ReportConfig,
    RivalStepsConfig,
    RunConfig,
    SoakConfig,
    SpeedConfig,
    StepConfig,
    StudyConfig,
    SweepConfig,
    TrainDemoConfig,
    VariantsConfig,
)
from sglang_auf.errors import AufError, ConfigError

Config = TypeVar("Config", bound=BaseModel)
Options = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    command: Callable[[Options], int] = options.pop("command")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return command(options)
    except AufError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(options: Options) -> int:
    from benchmarks.harness.run import Run
    from benchmarks.harness.tasks import resolve, select
    from benchmarks.reports.text import run_text
    from benchmarks.stats.summary import summarize_run

    resume = options.pop("resume")
    config = _validated(RunConfig, options)
    selections = [select(task, config.data_dir, config.limit) for task in resolve(config.tasks)]
    prompts = [prompt for chosen in selections for prompt in chosen.prompts]
    run = Run.begin(config, selections, resume)
    if run.unfinished(prompts):
        asyncio.run(run.warm_up())
        run.open()
        asyncio.run(run.ask(prompts, "plain" if config.plain else "auf"))
    run.require_tau()
    summary = summarize_run(run.manifest, list(run.records.values()))
    (config.out / "summary.json").write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(run_text(summary))
    print(f"\nwritten to {config.out}")
    return 1 if summary.throughput.failed else 0


def _compare(options: Options) -> int:
    from benchmarks.reports.text import comparison_text
    from benchmarks.serving.compare import compare_servers

    config = _validated(CompareConfig, options)
    comparison = compare_servers(config)
    print(comparison_text(comparison))
    print(f"\nwritten to {config.out}")
    return 0 if comparison.passed else 1


def _lossless(options: Options) -> int:
    from benchmarks.reports.text import lossless_text
    from benchmarks.stats.lossless_check import check_runs

    config = _validated(LosslessConfig, options)
    result = check_runs(config)
    (config.speculating / "lossless.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(lossless_text(result))
    return 0 if result.passed else 1


def _identity(options: Options) -> int:
    from benchmarks.reports.markdown import identity_markdown
    from benchmarks.serving.identity import measure_identity

    config = _validated(IdentityConfig, options)
    report = measure_identity(config)
    print(_written(report, identity_markdown(report), config.out / "identity"))
    return 0 if report.passed else 1


def _speed(options: Options) -> int:
    from benchmarks.reports.markdown import speed_markdown
    from benchmarks.serving.speed import measure_speed

    config = _validated(SpeedConfig, options)
    report = measure_speed(config)
    print(_written(report, speed_markdown(report), config.out / "speed"))
    return 1 if report.failed else 0


def _variants(options: Options) -> int:
    from benchmarks.reports.markdown import variants_markdown
    from benchmarks.serving.variants import measure_variants

    config = _validated(VariantsConfig, options)
    report = measure_variants(config)
    print(_written(report, variants_markdown(report), config.out / "variants"))
    return 0 if report.passed else 1


def _sweep(options: Options) -> int:
    from benchmarks.reports.markdown import sweep_markdown
    from benchmarks.serving.sweep import measure_sweep

    config = _validated(SweepConfig, options)
    sweep = measure_sweep(config)
    print(_written(sweep, sweep_markdown(sweep), config.out / "sweep"))
    return 1 if sweep.failed else 0


def _report(options: Options) -> int:
    from benchmarks.reports.report import write_report

    config = _validated(ReportConfig, options)
    page = write_report(config)
    print(f"written to {page}")
    return 0


def _study(options: Options) -> int:
    from benchmarks.studies.report import claims_text, read_results, write_study_report
    from benchmarks.studies.run import require_same, run_study

    config = _validated(StudyConfig, options)
    if config.report_only:
        require_same(config.study, config.out / "records")
    else:
        run_study(config)
    results = read_results(config.out / "records")
    page = write_study_report(results, config.out)
    print(claims_text(results))
    print(f"\nwritten to {page}")
    return 0


def _soak(options: Options) -> int:
    from benchmarks.reports.markdown import soak_markdown
    from benchmarks.serving.soak import soak

    config = _validated(SoakConfig, options)
    report = soak(config)
    print(_written(report, soak_markdown(report), config.out / "soak"))
    return 0 if report.passed else 1


def _failover(options: Options) -> int:
    from benchmarks.reports.markdown import failover_markdown
    from benchmarks.serving.failover import measure_failover

    config = _validated(FailoverConfig, options)
    report = measure_failover(config)
    print(_written(report, failover_markdown(report), config.out / "failover"))
    return 0 if report.passed else 1


def _step(options: Options) -> int:
    from benchmarks.training.step import measure_step
    from benchmarks.training.step_markdown import step_markdown

    config = _validated(StepConfig, options)
    report = measure_step(config)
    print(_written(report, step_markdown(report), config.out / "step"))
    return 0


def _rival_steps(options: Options) -> int:
    from benchmarks.training.rival_steps import measure_rival_steps
    from benchmarks.training.step_markdown import rival_steps_markdown

    config = _validated(RivalStepsConfig, options)
    report = measure_rival_steps(config)
    print(_written(report, rival_steps_markdown(report), config.out / "rival-steps"))
    return 1 if any(step.error for step in report.steps) else 0


def _overlap(options: Options) -> int:
    from benchmarks.training.overlap import measure_overlap, overlap_markdown

    config = _validated(OverlapConfig, options)
    report = measure_overlap(config)
    config.out.mkdir(parents=True, exist_ok=True)
    print(_written(report, overlap_markdown(report), config.out / "overlap"))
    return 1 if any(task.identical or task.near for task in report.tasks) else 0


def _train_demo(options: Options) -> int:
    from benchmarks.reports.text import train_demo_text
    from benchmarks.training.demo import train_demo

    config = _validated(TrainDemoConfig, options)
    result = train_demo(config)
    print(train_demo_text(result))
    print(f"\nwritten to {config.out}")
    return 0 if result.passed else 1


def _written(report: BaseModel, text: str, stem: Path) -> str:
    """Write STEM.json and STEM.md; returns what to print."""
    stem.with_suffix(".json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    return f"{text}\nwritten to {stem.parent}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Tau, speed and losslessness, measured.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="ask one server that is up", description=RunConfig.__doc__)
    _add_fields(run, RunConfig)
    run.add_argument("--resume", action="store_true", help="continue the run in --out: what is answered is not asked")
    run.set_defaults(command=_run)
    compare = commands.add_parser("compare", help="AUF against plain decoding", description=CompareConfig.__doc__)
    _add_fields(compare, CompareConfig)
    compare.set_defaults(command=_compare)
    lossless = commands.add_parser("lossless", help="compare two runs by token", description=LosslessConfig.__doc__)
    _add_fields(lossless, LosslessConfig, positional={"speculating", "plain"})
    lossless.set_defaults(command=_lossless)
    identity = commands.add_parser("identity", help="table of bit identity", description=IdentityConfig.__doc__)
    _add_fields(identity, IdentityConfig)
    identity.set_defaults(command=_identity)
    speed = commands.add_parser("speed", help="table of speeds, DFLASH included", description=SpeedConfig.__doc__)
    _add_fields(speed, SpeedConfig)
    speed.set_defaults(command=_speed)
    variants = commands.add_parser(
        "variants", help="blocks, drafters, settings in turns", description=VariantsConfig.__doc__
    )
    _add_fields(variants, VariantsConfig)
    variants.set_defaults(command=_variants)
    sweep = commands.add_parser("sweep", help="speed and latency by concurrency", description=SweepConfig.__doc__)
    _add_fields(sweep, SweepConfig)
    sweep.set_defaults(command=_sweep)
    report = commands.add_parser("report", help="one page of runs that were made", description=ReportConfig.__doc__)
    _add_fields(report, ReportConfig, positional={"runs"})
    report.set_defaults(command=_report)
    study = commands.add_parser("study", help="compare training arms over seeds", description=StudyConfig.__doc__)
    _add_fields(study, StudyConfig, positional={"study"})
    study.set_defaults(command=_study)
    soaking = commands.add_parser("soak", help="mixed load for minutes, nothing wrong", description=SoakConfig.__doc__)
    _add_fields(soaking, SoakConfig)
    soaking.set_defaults(command=_soak)
    failover = commands.add_parser(
        "failover", help="a server killed behind the router, nothing lost", description=FailoverConfig.__doc__
    )
    _add_fields(failover, FailoverConfig)
    failover.set_defaults(command=_failover)
    step = commands.add_parser("step", help="time and memory of a training step", description=StepConfig.__doc__)
    _add_fields(step, StepConfig)
    step.set_defaults(command=_step)
    rivals = commands.add_parser(
        "rival-steps", help="a training step against other packages'", description=RivalStepsConfig.__doc__
    )
    _add_fields(rivals, RivalStepsConfig)
    rivals.set_defaults(command=_rival_steps)
    overlap = commands.add_parser(
        "overlap", help="benchmark prompts in training data", description=OverlapConfig.__doc__
    )
    _add_fields(overlap, OverlapConfig)
    overlap.set_defaults(command=_overlap)
    demo = commands.add_parser("train-demo", help="train a drafter and serve it", description=TrainDemoConfig.__doc__)
    _add_fields(demo, TrainDemoConfig)
    demo.set_defaults(command=_train_demo)
    return parser


def _add_fields(parser: argparse.ArgumentParser, model: type[BaseModel], positional: Collection[str] = ()) -> None:
    """One flag a field; absent flags stay absent, so that defaults live in the model alone."""
    for name, field in model.model_fields.items():
        if name in positional:
            several: Options = {"nargs": "+"} if _takes_several(field.annotation) else {}
            parser.add_argument(name, metavar=name.upper(), help=field.description, **several)
            continue
        flag = _flag(name, field)
        kind: Options = {"metavar": flag.removeprefix("--").upper()}
        if field.annotation is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif _takes_several(field.annotation):
            kind["action"] = "append"
        parser.add_argument(
            flag,
            dest=name,
            required=field.is_required(),
            default=argparse.SUPPRESS,
            help=_help(field),
            **kind,
        )


def _takes_several(annotation: Any) -> bool:
    """A tuple, annotated or optional."""
    return get_origin(annotation) is tuple or any(_takes_several(part) for part in get_args(annotation))


def _flag(name: str, field: FieldInfo) -> str:
    return "--" + (field.alias or name).replace("_", "-")


def _help(field: FieldInfo) -> str:
    default = field.default
    if field.is_required() or default is None or field.default_factory is not None or default == ():
        return field.description or ""
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{field.description} (default: {shown})"


def _validated(model: type[Config], options: Options) -> Config:
    try:
        return model.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        field = next(field for key, field in model.model_fields.items() if name in (key, field.alias))
        raise ConfigError(
            f"{_flag(name, field)} {problem['input']!r}",
            problem["msg"],
            f"give {_flag(name, field)} such a value: {field.description}",
        ) from None
