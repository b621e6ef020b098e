"""The `sglang-auf` command: prepare a target, check a drafter against one, make training data and drafters."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_auf import __version__
from sglang_auf.errors import AufError, ConfigError
from sglang_auf.process import end_at_once, end_on_sigterm, is_begun_again, is_first_rank, is_one_of_several_ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 with one message on stderr for a mistake that the user can fix, 128 + N after signal N.

    One rank of several that train does not return after an error: it ends, so that what launched it ends the others.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    end_on_sigterm(trains=arguments[:1] == ["train"])
    options = _parser(*arguments[:1]).parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    for library in ("httpx", "openai"):  # they log a line for every request, or for every repeated one
        logging.getLogger(library).setLevel(logging.WARNING)
    ends = options.command == "train" and is_one_of_several_ranks()
    try:
        code: int = options.run(options)
        return code
    except AufError as error:
        print(f"sglang-auf {options.command}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception:
        if not ends:
            raise
        traceback.print_exc()
        code = 1
    if ends:
        end_at_once(code)
    return code


def _parser(command: str = "") -> argparse.ArgumentParser:
    """Parser of all commands. command: the one that is asked for; only its settings model is imported."""
    parser = argparse.ArgumentParser(prog="sglang-auf", description="Tools around drafters trained with AUF.")
    parser.add_argument("--version", action="version", version=f"sglang-auf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make a target model ready to serve, once")
    prepare.add_argument("name", metavar="NAME", help="the target: smollm2-135m")
    prepare.add_argument("--out", metavar="DIR", type=Path, help="directory to make (default: in the user's cache)")
    prepare.set_defaults(run=_prepare)

    check = commands.add_parser("check", help="check a drafter and its card against a target; no weights are loaded")
    check.add_argument("drafter", metavar="DRAFTER", help="directory or hub id")
    check.add_argument("target", metavar="TARGET", help="directory, hub id or prepared target")
    check.set_defaults(run=_check)

    evaluate = commands.add_parser("evaluate", help="tau of a drafter over answers of the target, without a server")
    evaluate.add_argument("drafter", metavar="DRAFTER", help="directory or hub id")
    evaluate.add_argument("target", metavar="TARGET", help="directory, hub id or prepared target")
    evaluate.add_argument(
        "--data",
        metavar="SOURCE",
        action="append",
        required=True,
        help="rows with answers, as for train; may be repeated",
    )
    evaluate.add_argument("--against", metavar="DRAFTER", help="another drafter, compared answer by answer")
    evaluate.add_argument(
        "--limit", metavar="N", type=int, help="only the N conversations that data.held_out N keeps from training"
    )
    evaluate.add_argument("--out", metavar="FILE", type=Path, help="JSON file to write")
    evaluate.set_defaults(run=_evaluate)

    train = commands.add_parser(
        "train",
        help="train a drafter, or go on where a killed run stopped",
        epilog="on several GPUs or machines: torchrun [...] -m sglang_auf.cli train [...], or accelerate launch",
    )
    train.add_argument("recipe", metavar="RECIPE", help="YAML file, or one of ours by name")
    train.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory of the run")
    train.add_argument(
        "--data", metavar="SOURCE", action="append", help="file, folder or hub data set; may be repeated"
    )
    train.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change the recipe, as in a.b=c")
    train.add_argument("--fresh", action="store_true", help="remove the run that is in DIR and start over")
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="memory and work of a recipe on a GPU, counted before anything is loaded")
    plan.add_argument("recipe", metavar="RECIPE", help="YAML file, or one of ours by name")
    plan.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change the recipe, as in a.b=c")
    plan.add_argument("--ranks", metavar="N", type=int, default=1, help="GPUs (default: 1)")
    plan.add_argument("--fsdp", action="store_true", help="the drafter is sharded over the GPUs")
    plan.set_defaults(run=_plan)

    adapt = commands.add_parser(
        "adapt",
        help="train a drafter further on what its server recorded, and export it if it got better",
        epilog="exit code: 0 exported; 3 not better, nothing exported; 2 a mistake that the user can fix; 128 + N "
        "stopped by signal N, and the same command goes on",
    )
    adapt.set_defaults(run=_adapt)
    if command == "adapt":
        from sglang_auf.flags import add_flags
        from sglang_auf.training.adapt.settings import AdaptSettings

        add_flags(adapt, AdaptSettings, positional=("drafter",))

    _add_features(commands.add_parser("features", help="compute the target's features of training data once, on disk"))

    export = commands.add_parser("export", help="write the drafter of a training run as SGLang loads it, and check it")
    export.add_argument("checkpoint", metavar="RUN", type=Path, help="directory of a run, or of one checkpoint")
    _add_output(export, "directory, hub id or prepared target (default: the recipe's)")
    export.set_defaults(run=_export)

    convert = commands.add_parser("convert", help="convert a DFlash or Domino drafter of SpecForge or speculators")
    convert.add_argument("source", metavar="SOURCE", help="directory or hub id")
    _add_output(convert, "directory, hub id or prepared target to check it against (default: the one it names)")
    convert.set_defaults(run=_convert)

    _add_vocabulary(
        commands.add_parser("draft-vocabulary", help="list the frequent tokens, the only ones a drafter then proposes")
    )

    prompts = commands.add_parser("prompts", help="let a server's model write the prompts of training data as well")
    prompts.set_defaults(run=_prompts)
    regenerate = commands.add_parser("regenerate", help="let a server's model answer the prompts of training data")
    regenerate.set_defaults(run=_regenerate)
    if command == "prompts":
        from sglang_auf.flags import add_flags
        from sglang_auf.training.generation.settings import PromptSettings

        add_flags(prompts, PromptSettings, positional=("target",))
    if command == "regenerate":
        from sglang_auf.flags import add_flags
        from sglang_auf.training.generation.settings import RegenerateSettings

        add_flags(regenerate, RegenerateSettings, positional=("inputs",))
    return parser


def _add_features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="SOURCE", action="append", required=True, help="as for train")
    parser.add_argument("--target", metavar="TARGET", required=True, help="directory, hub id or prepared target")
    parser.add_argument("--layers", metavar="N,N,...", required=True, help="0-based layers of the target to tap")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory to make, or to continue")
    parser.add_argument("--max-length", metavar="N", type=int, required=True, help="tokens of a row, as in the recipe")
    parser.add_argument("--overlong", choices=["reject", "truncate"], default="reject", help="longer rows")
    parser.add_argument("--thinking", choices=["on", "off"], help="template switch, as in the recipe")
    parser.add_argument("--split", metavar="NAME", default="train", help="of sources that name none (default: train)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the target")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda:0, ... (default: the GPU if there is one)")
    parser.set_defaults(run=_features)


def _add_vocabulary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("drafter", metavar="DRAFTER", type=Path, help="directory of an exported DFlash drafter")
    parser.add_argument("target", metavar="TARGET", help="directory, hub id or prepared target: its tokenizer")
    parser.add_argument(
        "--data", metavar="SOURCE", action="append", required=True, help="answers to count, as for train"
    )
    parser.add_argument("--size", metavar="N", type=int, required=True, help="tokens of the list")
    parser.add_argument("--split", metavar="NAME", default="train", help="of sources that name none (default: train)")
    parser.add_argument("--force", action="store_true", help="replace an earlier list")
    parser.set_defaults(run=_draft_vocabulary)


def _add_output(parser: argparse.ArgumentParser, target_help: str) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to make")
    parser.add_argument("--target", metavar="TARGET", help=target_help)
    parser.add_argument("--force", action="store_true", help="replace an earlier export")


def _prepare(options: argparse.Namespace) -> int:
    from sglang_auf.checkpoints.prepare import prepare

    print(prepare(options.name, options.out))
    return 0


def _check(options: argparse.Namespace) -> int:
    from sglang_auf.checkpoints.card import check_drafter
    from sglang_auf.checkpoints.prepare import resolve_target

    checked = check_drafter(options.drafter, resolve_target(options.target))
    for name, value in checked.card.model_dump(mode="json").items():
        absent = "unknown" if name in checked.card.unknown else "no"
        print(f"{name:20} {absent if value is None else value}")
    listed = "all tokens" if checked.vocabulary is None else f"{len(checked.vocabulary.tokens)} tokens"
    print(f"{'draft_vocabulary':20} {listed}")
    for warning in checked.warnings:
        print(f"warning: {warning}")
    print(f"{options.drafter} fits {options.target}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from sglang_auf.training.evaluation.evaluate import evaluate

    asked = {"against": options.against, "limit": options.limit, "out": options.out}
    print(evaluate(options.drafter, options.target, options.data, **asked))
    return 0


def _train(options: argparse.Namespace) -> int:
    from sglang_auf.training.recipe import load_recipe
    from sglang_auf.training.trainer import train

    recipe = load_recipe(options.recipe, options.set)
    if options.data:
        recipe = recipe.with_sources(options.data)
    # What torchrun begins again goes on with the run that it began.
    outcome = train(recipe, options.out, fresh=options.fresh and not is_begun_again())
    if is_first_rank():
        print(outcome)
    return outcome.exit_code


def _adapt(options: argparse.Namespace) -> int:
    from sglang_auf.flags import from_flags
    from sglang_auf.training.adapt.adapt import adapt
    from sglang_auf.training.adapt.settings import AdaptSettings

    outcome = adapt(from_flags(AdaptSettings, _given(options)))
    print("\n".join(outcome.lines()))
    return outcome.exit_code


def _plan(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from sglang_auf.training.plan.report import report
    from sglang_auf.training.recipe import load_recipe

    lines = report(load_recipe(options.recipe, options.set), ranks=options.ranks, sharded=options.fsdp)
    print(tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=("left", "left", "right")))
    return 0


def _features(options: argparse.Namespace) -> int:
    from sglang_auf.training.data.feature_writer import cache_features

    try:
        layers = [int(layer) for layer in options.layers.split(",")]
    except ValueError:
        raise ConfigError(f"--layers {options.layers}", "numbers with commas between", "--layers 1,14,27") from None
    manifest = cache_features(
        options.data,
        options.target,
        layers,
        options.out,
        max_length=options.max_length,
        overlong=options.overlong,
        thinking=options.thinking,
        split=options.split,
        dtype=options.dtype,
        device=options.device,
    )
    print(f"{options.out}: features of {len(manifest.ids)} conversations, {sum(manifest.lengths)} tokens")
    return 0


def _draft_vocabulary(options: argparse.Namespace) -> int:
    from sglang_auf.checkpoints import draft_vocabulary
    from sglang_auf.training.data.frequent_tokens import frequent_tokens

    vocabulary = frequent_tokens(options.drafter, options.target, options.data, options.size, split=options.split)
    file = draft_vocabulary.write(vocabulary, options.drafter, force=options.force)
    print(f"{file}: {len(vocabulary.tokens)} tokens, which are {vocabulary.coverage:.4%} of {vocabulary.answer_tokens}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from sglang_auf.training.export import export_checkpoint

    print(export_checkpoint(options.checkpoint, options.out, target=options.target, force=options.force))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from sglang_auf.checkpoints.prepare import resolve_target
    from sglang_auf.training.convert.convert import convert

    target = None if options.target is None else resolve_target(options.target)
    converted = convert(options.source, options.out, target=target, force=options.force)
    for change in converted.changes:
        print(change)
    for warning in converted.warnings:
        print(f"warning: {warning}")
    print(f"{converted.path}, from {converted.kind}")
    return 0


def _prompts(options: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from sglang_auf.flags import from_flags
    from sglang_auf.training.data.features import find_target
    from sglang_auf.training.generation.prompts import write_prompts
    from sglang_auf.training.generation.settings import PromptSettings

    settings = from_flags(PromptSettings, _given(options))
    rows, outcomes = write_prompts(settings, AutoTokenizer.from_pretrained(find_target(settings.target)))
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome:14} {count:8}")
    print(f"{rows} prompts in {settings.out}")
    return 0


def _regenerate(options: argparse.Namespace) -> int:
    from sglang_auf.flags import from_flags
    from sglang_auf.training.generation.regenerate import regenerate
    from sglang_auf.training.generation.settings import RegenerateSettings

    settings = from_flags(RegenerateSettings, _given(options))
    print(f"{regenerate(settings)} rows in {settings.out}")
    return 0


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, by name of their setting."""
    return {name: value for name, value in vars(options).items() if name not in ("command", "run")}


if __name__ == "__main__":
    sys.exit(main())
