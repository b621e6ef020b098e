"""The gradient of a step does not depend on how its micro-batches are shared among ranks and accumulation steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sglang_auf.training.accumulation import pooled_gradient
from tests.support import training_ranks
from tests.support.training_runs import FSDP

CASES = [
    ("dflash", "full"),
    ("dflash", "auf"),
    ("dflash", "auf+decay"),
    ("domino", "decay"),
    ("domino", "b-auf"),
    ("domino", "s-auf+d"),
    ("domino", "f-auf"),
]

IN_BF16 = [("dflash", "auf"), ("domino", "b-auf")]

LAUNCHES: dict[str, tuple[int, dict[str, str]]] = {"one": (1, {}), "two": (2, {}), "sharded": (2, FSDP)}


@pytest.fixture(scope="module")
def found(
    in_fork: Callable[..., list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """Launch -> what step_gradient wrote."""
    directory = tmp_path_factory.mktemp("gradients")
    for launch, (count, environment) in LAUNCHES.items():
        statuses = in_fork(
            "tests.support.training_ranks:step_gradient",
            ranks=count, cases=CASES, out=str(directory / launch), environment=environment,
        )  # fmt: skip
        assert statuses == [0] * count
    return {launch: training_ranks.gradients_in(directory / launch) for launch in LAUNCHES}


@pytest.fixture(scope="module")
def found_in_bf16(
    in_fork: Callable[..., list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("gradients-in-bf16")
    for launch, (count, environment) in LAUNCHES.items():
        statuses = in_fork(
            "tests.support.training_ranks:step_gradient",
            ranks=count, cases=IN_BF16, out=str(directory / launch), environment=environment, precision="bf16",
        )  # fmt: skip
        assert statuses == [0] * count
    return {launch: training_ranks.gradients_in(directory / launch) for launch in LAUNCHES}


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("head", "objective"), CASES)
def test_one_rank_of_eight_and_two_ranks_of_four_are_the_definition_sharded_or_not(
    found: dict[str, dict[str, torch.Tensor]], head: str, objective: str
) -> None:
    gradients, loss = training_ranks.reference(head, objective)
    for launch, (ranks, _) in LAUNCHES.items():
        of_case = {
            name.removeprefix(f"{head} {objective} "): tensor
            for name, tensor in found[launch].items()
            if name.startswith(f"{head} {objective} ")
        }
        assert float(of_case.pop("loss")) == pytest.approx(loss, rel=1e-5)
        assert of_case.pop("blocks") == sum(int(valid.sum()) for _, _, valid in training_ranks.micro_batches())
        waves = of_case.pop("waves").tolist()
        # Ranks wait for each other in the gradient only, however many waves each has.
        assert len(waves) == ranks == 1 or (waves[0] != waves[1]) == ("auf" in objective)
        assert of_case.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(of_case[name], gradient, rtol=1e-4, atol=1e-6)


def test_ranks_add_gradients_of_bf16_products_in_float32(found_in_bf16: dict[str, dict[str, torch.Tensor]]) -> None:
    """Each micro-batch has the same products on any rank, sharded or not. Sums in bf16 would be off by 1 / 256.

    Of norms FSDP holds the weights in bf16 too for a micro-batch, and so their gradient of it.
    """
    alone = {name: tensor for name, tensor in found_in_bf16["one"].items() if not name.endswith(" waves")}
    for launch in ("two", "sharded"):
        for name, gradient in alone.items():
            rounded = launch == "sharded" and name.endswith("norm.weight")
            torch.testing.assert_close(
                found_in_bf16[launch][name],
                gradient,
                rtol=0,
                atol=float(gradient.abs().max()) * (2**-8 if rounded else 1e-6),
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_a_mean_of_means_would_be_another_gradient() -> None:
    """What the test above would miss if the micro-batches were alike."""
    step = training_ranks.make_step("dflash", "auf")
    for micro_batch in training_ranks.micro_batches():
        terms = step(*micro_batch, training_ranks.PROGRESS, False)
        (terms.numerators / terms.denominators).sum().div(training_ranks.MICRO_BATCHES).backward()
    gradients, _ = training_ranks.reference("dflash", "auf")
    wrong = step.drafter.fc.weight.grad
    assert wrong is not None and not torch.allclose(wrong, gradients["fc.weight"], rtol=0.05)


def test_micro_batches_are_made_one_at_a_time(accelerator: Accelerator) -> None:
    """Their features are what fills the memory: none is asked for before the one before it went backward."""
    step = training_ranks.make_step("dflash", "auf")
    norms: list[float] = []

    def drawn() -> Iterator[training_ranks.MicroBatch]:
        for micro_batch in training_ranks.micro_batches():
            gradient = step.drafter.fc.weight.grad
            norms.append(0.0 if gradient is None else float(gradient.norm()))
            yield micro_batch

    pooled_gradient(accelerator, step, drawn(), 8, branches=1, progress=0.0, diagnostics=False)
    assert len(norms) == 8 and norms[0] == 0 and all(norms[1:]) and len(set(norms)) == 8


@pytest.mark.parametrize(("head", "branches"), [("dflash", 1), ("domino", 2)])
@pytest.mark.parametrize("count", [1, 2])
def test_without_any_label_the_loss_is_nan(accelerator: Accelerator, head: str, branches: int, count: int) -> None:
    step = training_ranks.make_step(head, "decay")
    batch, anchors, valid = training_ranks.micro_batches()[3]
    nothing = (batch, anchors, torch.zeros_like(valid))
    pooled = pooled_gradient(
        accelerator, step, [nothing] * count, count, branches=branches, progress=0.5, diagnostics=False
    )
    assert math.isnan(pooled.loss)


def test_metrics_are_gathered_only_when_asked_for(accelerator: Accelerator) -> None:
    step, mine = training_ranks.make_step("dflash", "auf"), training_ranks.micro_batches()[:2]
    for diagnostics in (False, True):
        pooled = pooled_gradient(accelerator, step, mine, 2, branches=1, progress=0.0, diagnostics=diagnostics)
        assert ("common_correct" in pooled.metrics) == bool(pooled.metrics) == diagnostics
