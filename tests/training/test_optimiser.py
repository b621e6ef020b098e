"""Learning rates over a run, and which weights which optimiser takes."""

from __future__ import annotations

import pytest
import torch

from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.training.optimiser import make_optimisers, schedule, set_learning_rate
from sglang_auf.training.recipe import OptimiserSettings
from tests.support.tiny_models import target_config


def domino() -> Drafter:
    config = DrafterConfig.for_target(
        target_config(), num_layers=2, target_layer_ids=[1], block_size=4, mask_token_id=3,
        head="domino", gru_hidden_dim=8, emb_dim=4,
    )  # fmt: skip
    return Drafter(config)


def test_schedule_warms_up_linearly_and_falls_as_a_cosine() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates) > 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedule_of_very_short_runs(steps: int) -> None:
    assert all(0 < schedule(step, steps, ratio) <= 1 for step in range(steps) for ratio in (0.0, 0.04, 0.99))


def test_adamw_takes_every_weight_once() -> None:
    drafter = domino()
    [optimiser] = make_optimisers(drafter, OptimiserSettings(lr=0.01))
    assert len(optimiser.param_groups[0]["params"]) == len(list(drafter.parameters()))


def test_muon_takes_the_matrices_of_the_layers_and_fc() -> None:
    drafter = domino()
    adamw, muon = make_optimisers(drafter, OptimiserSettings(name="muon", lr=0.01, muon_lr=0.02))
    names = {id(parameter): name for name, parameter in drafter.named_parameters()}
    of_muon, of_adamw = ({names[id(p)] for p in each.param_groups[0]["params"]} for each in (muon, adamw))
    assert of_muon | of_adamw == set(names.values()) and not of_muon & of_adamw
    assert {name for name in of_muon if not name.endswith("_proj.weight")} == {"fc.weight"}
    assert len(of_muon) == 1 + 2 * 7
    assert {"prefix_gru.weight_ih_l0", "embed_proj.0.weight", "embed_proj.2.weight", "norm.weight"} <= of_adamw
    assert isinstance(muon, torch.optim.Muon)


def test_learning_rates_are_shares_of_each_ones_peak() -> None:
    optimisers = make_optimisers(domino(), OptimiserSettings(name="muon", lr=0.01, muon_lr=0.02))
    for factor in (0.5, 0.25):
        set_learning_rate(optimisers, factor)
        assert [each.param_groups[0]["lr"] for each in optimisers] == [0.01 * factor, 0.02 * factor]
