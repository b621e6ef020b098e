from __future__ import annotations

import pytest

from benchmarks.shapes.qwen3_8b import DRAFTER, TARGET, Widths, configs, taps
from sglang_auf.errors import ConfigError
from sglang_auf.models.config import DrafterConfig


def test_all_layers_are_the_public_models() -> None:
    assert configs(36) == (TARGET, DRAFTER)


@pytest.mark.parametrize("layers", range(6, 41))
@pytest.mark.parametrize(("widths", "hidden"), [("full", 4096), ("half", 2048), ("toy", 128)])
def test_fewer_layers_keep_block_and_taps(layers: int, widths: Widths, hidden: int) -> None:
    target, drafter = configs(layers, widths)
    shape = DrafterConfig.from_checkpoint(drafter)  # refuses taps that repeat or that the target lacks
    assert (shape.block_size, len(shape.target_layer_ids), shape.num_hidden_layers) == (16, 5, 5)
    assert shape.target_layer_ids[-1] < layers - 1
    assert shape.num_target_layers == target["num_hidden_layers"] == layers
    assert shape.hidden_size == target["hidden_size"] == hidden


@pytest.mark.parametrize("layers", [1, 4, 5])
def test_too_few_layers_are_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match="at least 6"):
        taps(layers)
