"""What a step of a batch costs.

A batch of random prompts is asked for short answers, and another one for longer answers. The difference of the two
times over the difference of the steps is the time of a step, without prefill, HTTP and the first steps. A step is a
token of plain decoding, or a verify step with its drafting.

A random drafter's drafts are all wrong, so acceptance is forced: SGLang drafts, verifies and draws as always, and then
takes as many drafts as it is told (SGLANG_SIMULATE_ACC_LEN). All requests of a batch then end in the same step, and the
answers mean nothing.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from benchmarks.harness.results import Cell
from benchmarks.harness.server_info import call
from benchmarks.shapes.config import FIRST_STEPS, ServeShapeConfig
from benchmarks.shapes.visit import Visit
from sglang_auf.errors import ServerError

TEMPERATURES = (0.0, 1.0)
UNEVEN_STEPS = 1
"""With overlap, SGLang may count a step more, which it began before it knew that the answer had ended."""


def forced(emitted: int) -> dict[str, str]:
    """Environment of a server whose verify steps all emit so many tokens: drafts, and one that the target chose."""
    return {"SGLANG_SIMULATE_ACC_LEN": str(emitted), "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token"}


class StepCell(Cell):
    """seconds: of a step, by round."""

    temperature: float
    batch: int
    seconds: list[float]

    @property
    def step_s(self) -> float | None:
        """The median; None where other work on the machine hid the step."""
        return found if (found := median(self.seconds)) > 0 else None


def step_cells(visit: Visit) -> dict[tuple[float, int], StepCell]:
    """(temperature, batch) -> cell, of one server."""
    config = visit.config
    emitted = 1 if visit.plain else config.emitted
    found = {}
    for temperature in TEMPERATURES:
        for batch in config.batches:
            asked = config.model_dump(mode="json", include={"steps", "rounds", "prompt_tokens"})
            asked |= {"temperature": temperature, "batch": batch, "emitted": emitted}

            def measure(whole: dict[str, Any], temperature: float = temperature, batch: int = batch) -> StepCell:
                url = visit.server().base_url
                timer = _Timer(config, url, temperature, batch, emitted, speculating=not visit.plain)
                timer.seconds("warm-up", FIRST_STEPS)
                seconds = [timer.step(number) for number in range(config.rounds)]
                return StepCell(asked=whole, temperature=temperature, batch=batch, seconds=seconds)

            found[temperature, batch] = visit.cell(StepCell, f"steps-t{temperature:g}-b{batch}", asked, measure)
    return found


class _Timer:
    """Asks one server for batches of one size at one temperature. emitted: tokens of a step."""

    def __init__(
        self, config: ServeShapeConfig, url: str, temperature: float, batch: int, emitted: int, speculating: bool
    ) -> None:
        self._config, self._url = config, url
        self._temperature, self._batch = temperature, batch
        self._emitted, self._speculating = emitted, speculating

    def step(self, number: int) -> float:
        """Seconds of a step in round `number`."""
        few = self.seconds(f"{number}/few", FIRST_STEPS)
        many = self.seconds(f"{number}/many", FIRST_STEPS + self._config.steps)
        return (many - few) / self._config.steps

    def seconds(self, name: str, steps: int) -> float:
        """Of a batch of answers of 1 + steps * emitted tokens: the first token is prefill's.

        name: other prompts for another name, so that no prefix is cached. Raises ServerError where a request took
        another number of steps.
        """
        prompts = [
            self._config.random_prompt(self._temperature, self._batch, name, number) for number in range(self._batch)
        ]
        tokens = 1 + steps * self._emitted
        sampling = {"temperature": self._temperature, "max_new_tokens": tokens, "ignore_eos": True}
        began = time.perf_counter()
        body = {"input_ids": prompts, "sampling_params": sampling}
        replies = call(self._url, "/generate", body, timeout_s=self._config.timeout_s)
        seconds = time.perf_counter() - began
        for reply in replies:
            self._check(reply["meta_info"], tokens, steps)
        return seconds

    def _check(self, meta: dict[str, Any], tokens: int, steps: int) -> None:
        if meta["completion_tokens"] != tokens:
            raise ServerError(f"{meta['completion_tokens']} tokens of an answer", f"{tokens}", "read the server's log")
        taken = int(meta.get("spec_verify_ct") or 0)
        if self._speculating and not steps <= taken <= steps + UNEVEN_STEPS:
            raise ServerError(
                f"{taken} verify steps for {tokens - 1} tokens",
                f"{steps}: SGLANG_SIMULATE_ACC_LEN forces {self._emitted} tokens a step",
                "use SGLang 0.5.23",
            )
