"""Tiny training runs: a target, answers it could have given, a recipe; and functions that training_forks.py calls."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sglang_auf.errors import AufError
from sglang_auf.training.recipe import Recipe, parse_recipe
from tests.support.tiny_models import VOCABULARY, write_target
from tests.support.toy_tokenizer import toy_tokenizer

ROWS, HELD_OUT = 26, 4
POISON = 60
"""A token that only poisoned rows hold."""


def write_models(directory: Path, poisoned: Sequence[int] = ()) -> tuple[str, str]:
    """(target, data). Answers repeat a short pattern. Rows in `poisoned` hold a token whose embedding is not finite."""
    target = write_target(directory / "target")
    toy_tokenizer().save_pretrained(target)
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = float("nan")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    dice = random.Random(7)
    lines = []
    for row in range(ROWS):
        pattern = [dice.randrange(5, POISON) for _ in range(3)]
        prompt = [dice.randrange(5, POISON) for _ in range(dice.randrange(2, 9))] + [POISON] * (row in poisoned)
        answer = (pattern * 9)[: dice.randrange(8, 26)]
        lines.append(json.dumps({"id": f"row-{row}", "prompt_ids": prompt, "response_ids": answer}))
    data = directory / "answers.jsonl"
    data.write_text("\n".join(lines))
    assert POISON < VOCABULARY
    return str(target), str(data)


def tiny_recipe(target: str, data: str, **sections: Any) -> Recipe:
    """6 steps of 4 micro-batches; `sections` are laid over it."""
    content: dict[str, Any] = {
        "target": target,
        "data": {"sources": [data], "max_length": 40, "held_out": HELD_OUT},
        "drafter": {"num_layers": 1, "target_layer_ids": [1, 3], "block_size": 4, "mask_token_id": 3},
        "objective": {"name": "auf"},
        "optimiser": {"lr": 0.01},
        "schedule": {"max_steps": 6, "warmup_ratio": 0.2},
        "batch": {"batch_tokens": 120, "micro_batches": 4, "anchors_per_row": 3},
        "precision": "fp32",
        "log_every": 1,
        "evaluate_every": 3,
        "save_every": 2,
    }
    for name, section in sections.items():
        content[name] = {**content[name], **section} if isinstance(section, dict) else section
    return parse_recipe(content, "of a test")


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(run: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = ("tokens_per_second", "step_seconds", "seconds_left", "peak_memory_gib")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


# --- called in a process of their own, see training_forks.py ---


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2 ...` puts into the environment."""


def allow_fsdp_on_a_cpu() -> None:
    """accelerate shards on accelerators only, and on a CPU would train with DDP; PyTorch shards on both."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def as_on_gpus(self: AcceleratorState, *arguments: Any, **named: Any) -> None:
        if not PartialState._shared_state:
            PartialState(True).distributed_type = DistributedType.MULTI_GPU
        begin(self, *arguments, **named)

    AcceleratorState.__init__ = as_on_gpus  # type: ignore[method-assign]


def train_in_fork(
    recipe: dict[str, Any],
    out: str,
    kill_at: int | None = None,
    term_at: int | None = None,
    kill_last_at: int | None = None,
    slow_last: bool = False,
    environment: dict[str, str] | None = None,
) -> None:
    """Train; die at the kill_at-th event (a file or name brought to the disk, a rename, a backward pass).

    term_at, kill_last_at: SIGTERM or SIGKILL before that event, on the last rank only. slow_last: the clock of the last
    rank is slower by a factor of a million. environment: is added to the process's. The signal that ended the run goes
    to OUT.signal, what a rank finds wrong to OUT.error-RANK.
    """
    if environment:
        os.environ |= environment
        allow_fsdp_on_a_cpu()
    from sglang_auf.training.trainer import train

    count_events(kill_at, term_at, kill_last_at)
    if slow_last and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        clock = time.monotonic
        time.monotonic = lambda: clock() / 1e6
    try:
        outcome = train(parse_recipe(recipe, "of a test"), Path(out))
    except AufError as error:
        Path(f"{out}.error-{os.environ['RANK']}").write_text(error.found)
        raise
    Path(f"{out}.signal").write_text(str(outcome.signal))


def command_in_fork(arguments: list[str], out: str) -> None:
    """`sglang-auf ARGUMENTS`, as one rank. stdout and stderr go to OUT.stdout-RANK and OUT.stderr-RANK.

    OUT.returned-RANK has the exit code where the command returns, so that Python would end the process.
    OUT.destroyed-RANK is made where the process group is destroyed.
    """
    from sglang_auf.cli import main

    rank, destroy = os.environ["RANK"], torch.distributed.destroy_process_group

    def noted(*groups: Any) -> None:
        Path(f"{out}.destroyed-{rank}").touch()
        destroy(*groups)

    torch.distributed.destroy_process_group = noted
    with (
        Path(f"{out}.stdout-{rank}").open("w") as stdout,
        Path(f"{out}.stderr-{rank}").open("w") as stderr,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        code = main(arguments)
    Path(f"{out}.returned-{rank}").write_text(str(code))


def adapt_in_fork(arguments: list[str], kill_at: int | None = None, term_at: int | None = None) -> None:
    """`sglang-auf adapt`, killed as in train_in_fork. This process ends with the command's exit code."""
    from sglang_auf.cli import main

    count_events(kill_at, term_at)
    code = main(["adapt", *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def count_events(kill_at: int | None, term_at: int | None = None, kill_last_at: int | None = None) -> None:
    """Count what train_in_fork calls events from now on, and send the signals that are due."""
    rank, last, events = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1, 0

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal events
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if events == term_at and rank == last:
                os.kill(os.getpid(), signal.SIGTERM)
            if events == kill_last_at and rank == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **named)

        return call

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    torch.Tensor.backward = counted(torch.Tensor.backward)  # type: ignore[method-assign]


def limit_file_size(size: int) -> Callable[[], None]:
    """Writing beyond `size` bytes fails as on a full disk; the function that is returned lifts this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, before)
