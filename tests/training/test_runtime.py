"""Launches that a recipe cannot be trained with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from sglang_auf.errors import ConfigError
from sglang_auf.training.runtime import check_launch
from tests.support.training_runs import tiny_recipe


def launched(ranks: int, kind: DistributedType = DistributedType.MULTI_GPU) -> Any:
    return SimpleNamespace(num_processes=ranks, distributed_type=kind)


def test_ranks_share_micro_batches_evenly() -> None:
    recipe = tiny_recipe("t", "d", batch={"micro_batches": 6})
    for ranks in (1, 2, 3, 6):
        check_launch(recipe, launched(ranks))
    with pytest.raises(ConfigError) as caught:
        check_launch(recipe, launched(4))
    assert "micro_batches 6 on 4 ranks" in caught.value.found
    assert "batch.micro_batches=8" in caught.value.remedy


def test_muon_needs_whole_matrices() -> None:
    muon = tiny_recipe("t", "d", optimiser={"name": "muon", "muon_lr": 0.01})
    check_launch(muon, launched(2))
    check_launch(tiny_recipe("t", "d"), launched(2, DistributedType.FSDP))
    with pytest.raises(ConfigError, match="muon under FSDP"):
        check_launch(muon, launched(2, DistributedType.FSDP))
