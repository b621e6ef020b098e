"""This trainer's step, through the same protocol as the steps of other packages."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.training.rivals.protocol import DriverJob, MakeStep, Step, serve
from benchmarks.training.step_shapes import SHAPES
from benchmarks.training.step_variants import Bench
from sglang_auf.training.data.batching import draw_anchors


def prepare(job: DriverJob, attention: str) -> MakeStep:
    bench = Bench(SHAPES[job["shape"]], job["device"], job["precision"])

    def make_step(length: int, anchors: int, number: int) -> Step:
        size = bench.shape.sized(anchors, length)
        batch, drawn, valid = bench.batch(size, job["r_active"], seed=number)
        generator = torch.Generator().manual_seed(number)

        def step() -> Tensor:
            draw_anchors(batch.loss_mask, anchors, [generator])  # for its time: other packages draw in the step
            return torch.tensor(bench.run(job["step"], (batch, drawn, valid)).loss)

        bench.drop_gradients()
        return step

    return make_step


if __name__ == "__main__":
    serve("sglang-auf", ["own"], prepare)
