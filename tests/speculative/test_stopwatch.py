"""The parts of a step, on a clock that the test moves."""

from __future__ import annotations

import logging

import pytest

from sglang_auf.speculative.stopwatch import Stopwatch


class Clock:
    """kernels: seconds that passed in them, half of every part of a step."""

    def __init__(self) -> None:
        self.seconds = self.kernels = 0.0

    def __call__(self) -> float:
        return self.seconds

    def watch(self, steps: int) -> Stopwatch:
        return Stopwatch(steps, lambda: self.kernels, self)


def step(watch: Stopwatch, clock: Clock, **parts: float) -> None:
    for part, seconds in parts.items():
        clock.seconds += seconds
        clock.kernels += seconds / 2
        watch.lap(part)
    watch.step_ends()


def test_the_means_of_so_many_steps_are_logged_and_begun_anew(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    watch = clock.watch(2)
    step(watch, clock, draft=0.01, verify=0.03)
    assert not caplog.messages
    step(watch, clock, verify=0.04)
    clock.seconds += 60
    clock.kernels += 50
    watch.lap(None)
    step(watch, clock, verify=0.05)
    step(watch, clock, verify=0.05)
    assert caplog.messages == [
        "mean of 2 steps: 40.00 ms, of it 20.00 ms (50.0%) in kernels; draft 5.00 ms (12.5%), verify 35.00 ms (87.5%)",
        "mean of 2 steps: 50.00 ms, of it 25.00 ms (50.0%) in kernels; verify 50.00 ms (100.0%)",
    ]


def test_it_is_silent_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    watch = clock.watch(0)
    for _ in range(5):
        step(watch, clock, draft=1.0)
    assert not caplog.messages
