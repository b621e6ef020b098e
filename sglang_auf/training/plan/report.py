"""The table of the command `plan`."""

from __future__ import annotations

from sglang_auf.checkpoints.prepare import resolve_target
from sglang_auf.errors import TargetError
from sglang_auf.files import CONFIG, find_model
from sglang_auf.training.checkpointer import most_at_once
from sglang_auf.training.initial_weights import chosen, shape_of
from sglang_auf.training.plan.memory import OUTSIDE, plan
from sglang_auf.training.plan.work import work
from sglang_auf.training.recipe import AUTO, Recipe

Line = tuple[str, str, str]


def report(recipe: Recipe, *, ranks: int = 1, sharded: bool = False) -> list[Line]:
    """(when or unit, what, number) of memory on each rank, of checkpoints on disk, and of the work of a micro-batch.

    GB are 10 ** 9 bytes.

    Of the target only its config.json is read. Raises ConfigError or TargetError.
    """
    target = find_model(resolve_target(recipe.target), (CONFIG,), TargetError, recipe.target_revision)
    if recipe.drafter.mask_token_id == AUTO:
        recipe = recipe.with_drafter(mask_token_id=0)  # no number depends on it, and there is no tokenizer
    recipe = chosen(recipe, target)
    config = shape_of(recipe.drafter, target)
    found = plan(recipe, config, target, ranks=ranks, sharded=sharded)
    most = most_at_once(recipe.keep_last)
    sizes = [
        *(("always", name, size) for name, size in found.always.items()),
        *(("features", name, size) for name, size in found.features.items()),
        *(("backward", name, size) for name, size in found.backward.items()),
        ("peak", "always, and the larger of the other two", found.peak),
        ("peak", "and what is outside of our tensors (a guess)", found.peak + OUTSIDE),
        ("disk", "a checkpoint", found.checkpoint),
        ("disk", f"{most} checkpoints, the most that a run has at once", most * found.checkpoint),
    ]
    operations = work(recipe, config, target)
    operations["all"] = sum(operations.values())
    return [(when, what, f"{size / 1e9:.2f} GB") for when, what, size in sizes] + [
        ("work", what, f"{count / 1e12:.1f} TFLOP") for what, count in operations.items()
    ]
