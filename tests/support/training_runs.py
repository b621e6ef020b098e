"""Tiny training runs: a target, answers it could have given, a recipe; and functions that training_forks.py calls."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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
    measured = ("tokens_per_second", "seconds_left", "peak_memory_gib")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


# --- called in a process of their own, see training_forks.py ---


def train_in_fork(recipe: dict[str, Any], out: str, kill_at: int | None = None, term_at: int | None = None) -> None:
    """Train; die at the kill_at-th event (a file or name brought to the disk, a rename, a backward pass).

    term_at: SIGTERM before that event instead, on the last rank only. The signal that ended the run goes to OUT.signal.
    """
    from sglang_auf.training.trainer import train

    events = 0

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal events
            events += 1
            if events == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if events == term_at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return act(*arguments, **named)

        return call

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    torch.Tensor.backward = counted(torch.Tensor.backward)  # type: ignore[method-assign]
    outcome = train(parse_recipe(recipe, "of a test"), Path(out))
    Path(f"{out}.signal").write_text(str(outcome.signal))


def limit_file_size(size: int) -> Callable[[], None]:
    """Writing beyond `size` bytes fails as on a full disk; the function that is returned lifts this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, before)
