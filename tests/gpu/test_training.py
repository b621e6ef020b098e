"""Training on a GPU is training on a CPU, but for rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_auf.models.domino import PrefixGRU, correction_inputs, make_projector
from sglang_auf.training.losses.objectives import DOMINO_OBJECTIVES, OBJECTIVES
from tests.support.training_ranks import PROGRESS, make_step, micro_batches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

CASES = [("dflash", name) for name in OBJECTIVES] + [("domino", name) for name in DOMINO_OBJECTIVES]


def gradients(head: str, objective: str, device: str) -> dict[str, torch.Tensor]:
    """Of the largest micro-batch's loss, by parameter, with the loss itself."""
    step = make_step(head, objective).to(device)
    batch, anchors, valid = micro_batches()[-1]
    tensors = {name: getattr(batch, name).to(device) for name in ("input_ids", "loss_mask", "lengths", "features")}
    terms = step(replace(batch, **tensors), anchors.to(device), valid.to(device), PROGRESS)
    loss = (terms.weights * terms.numerators / terms.denominators).sum()
    loss.backward()
    found = {name: parameter.grad.cpu() for name, parameter in step.drafter.named_parameters()}
    return found | {"loss": loss.detach().cpu()}


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN would multiply a GRU's matrices with mantissas of 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize(("head", "objective"), CASES)
def test_a_step_on_a_gpu_has_the_gradients_of_a_step_on_a_cpu(head: str, objective: str) -> None:
    on_gpu, on_cpu = gradients(head, objective, "cuda"), gradients(head, objective, "cpu")
    for name, expected in on_cpu.items():
        torch.testing.assert_close(
            on_gpu[name], expected, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_small_loss_reaches_dominos_gru() -> None:
    """A loss is divided by all slots of a step: gradients of single states are below float16's smallest number."""
    found = {}
    for scale in (1.0, 1e-7):
        torch.manual_seed(0)
        gru, projector = PrefixGRU(64, 32).cuda(), make_projector(64, 32, 16, 128).cuda()
        hidden, tokens = (torch.randn(4, slots, 64, device="cuda") for slots in (7, 8))
        with torch.autocast("cuda", torch.bfloat16):
            (correction_inputs(gru, projector, hidden.bfloat16(), tokens.bfloat16()).float().sum() * scale).backward()
        found[scale] = gru.weight_hh_l0.grad / scale
    torch.testing.assert_close(found[1e-7], found[1.0], rtol=2e-2, atol=1e-2)
