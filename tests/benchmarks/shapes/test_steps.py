"""Times of steps, from a server whose clock is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.shapes import steps, visit
from benchmarks.shapes.config import FIRST_STEPS, ServeShapeConfig
from benchmarks.shapes.steps import forced, step_cells
from benchmarks.shapes.visit import Visit
from sglang_auf.errors import ServerError

PREFILL_S, STEP_S = 5.0, 0.25


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("target", "drafter"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(json.dumps({"bos_token_id": 50}))
    return tmp_path / "models"


@pytest.fixture
def config(models: Path, tmp_path: Path) -> ServeShapeConfig:
    return ServeShapeConfig.model_validate(
        {"models": models, "out": tmp_path / "out", "batch": "1,4", "steps": 8, "rounds": 2, "prompt_tokens": 6}
    )


class Clock:
    """A server that takes PREFILL_S and STEP_S a step, a tenth more for each request beside the first."""

    def __init__(self, emitted: int, speculating: bool = True, pool: int = 10_000) -> None:
        self.now = 0.0
        self.bodies: list[dict[str, Any]] = []
        self._emitted, self._speculating, self._pool = emitted, speculating, pool

    def call(self, url: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 0.0) -> Any:
        if path == "/server_info":
            return {"internal_states": [{"memory_usage": {"token_capacity": self._pool}}]}
        assert body is not None
        self.bodies.append(body)
        tokens = body["sampling_params"]["max_new_tokens"]
        taken = -(-(tokens - 1) // self._emitted)
        self.now += PREFILL_S + taken * STEP_S * (1 + 0.1 * (len(body["input_ids"]) - 1))
        counts = {"spec_verify_ct": taken} if self._speculating else {}
        return [{"meta_info": {"completion_tokens": tokens, **counts}}] * len(body["input_ids"])


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], Clock]:
    def installed(clock: Clock) -> Clock:
        monkeypatch.setattr(steps, "call", clock.call)
        monkeypatch.setattr(visit, "call", clock.call)
        monkeypatch.setattr(steps.time, "perf_counter", lambda: clock.now)
        monkeypatch.setattr(visit, "serve", lambda *_, **__: nullcontext(SimpleNamespace(base_url="http://x")))
        return clock

    return installed


@pytest.mark.parametrize("plain", [True, False])
def test_a_step_is_timed_without_prefill(
    plain: bool, config: ServeShapeConfig, install: Callable[[Clock], Clock]
) -> None:
    clock = install(Clock(emitted=1 if plain else 3, speculating=not plain))
    with Visit(config, "server", plain, {}) as visiting:
        cells = step_cells(visiting)
    assert list(cells) == [(0.0, 1), (0.0, 4), (1.0, 1), (1.0, 4)]
    for (temperature, batch), cell in cells.items():
        assert cell.seconds == pytest.approx([STEP_S * (1 + 0.1 * (batch - 1))] * 2)
        assert (cell.temperature, cell.batch) == (temperature, batch)
    emitted = 1 if plain else 3
    lengths = {body["sampling_params"]["max_new_tokens"] for body in clock.bodies}
    assert lengths == {1 + FIRST_STEPS * emitted, 1 + (FIRST_STEPS + 8) * emitted}
    prompts = [tuple(ids) for body in clock.bodies for ids in body["input_ids"]]
    assert len(set(prompts)) == len(prompts), "a cached prefix would be prefilled faster"
    assert all(len(ids) == 6 and max(ids) < 50 for ids in prompts)


def test_finished_cells_are_kept_and_no_server_is_started(
    config: ServeShapeConfig, install: Callable[[Clock], Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = install(Clock(emitted=3))
    with Visit(config, "forced", False, forced(3)) as visiting:
        first = step_cells(visiting)
    (config.out / "forced" / "steps-t1-b4.json").unlink()
    asked = len(clock.bodies)
    with Visit(config, "forced", False, forced(3)) as visiting:
        assert step_cells(visiting) == first
    assert len(clock.bodies) - asked == 1 + 2 * config.rounds, "only the missing cell is measured"
    monkeypatch.setattr(visit, "serve", lambda *_, **__: pytest.fail("a server was started"))
    with Visit(config, "forced", False, forced(3)) as visiting:
        assert step_cells(visiting) == first


def test_a_cell_of_another_question_or_machine_is_measured_again(
    config: ServeShapeConfig, install: Callable[[Clock], Clock], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = install(Clock(emitted=3))
    with Visit(config, "forced", False, forced(3)) as visiting:
        step_cells(visiting)
    asked = len(clock.bodies)
    with Visit(config.model_copy(update={"steps": 4}), "forced", False, forced(3)) as visiting:
        step_cells(visiting)
    assert len(clock.bodies) == 2 * asked
    monkeypatch.setattr(visit.provenance, "machine", lambda: {"cpu": "another", "cores": 1, "gpus": ["a card"]})
    with Visit(config.model_copy(update={"steps": 4}), "forced", False, forced(3)) as visiting:
        step_cells(visiting)
    assert len(clock.bodies) == 3 * asked


def test_cells_of_other_models_at_the_same_path_are_measured_again(
    config: ServeShapeConfig, install: Callable[[Clock], Clock]
) -> None:
    clock = install(Clock(emitted=3))

    def measured() -> int:
        before = len(clock.bodies)
        with Visit(config, "forced", False, forced(3)) as visiting:
            step_cells(visiting)
        return len(clock.bodies) - before

    every = measured()
    assert measured() == 0
    (config.models / "drafter" / "config.json").write_text(json.dumps({"block_size": 8}))
    assert measured() == every
    for seed in (0, 1):
        (config.models / "shape.json").write_text(json.dumps({"config": {"seed": seed}}))
        assert measured() == every
    assert measured() == 0


def test_acceptance_that_is_not_forced_is_an_error(config: ServeShapeConfig, install: Callable[[Clock], Clock]) -> None:
    install(Clock(emitted=1))
    with (
        pytest.raises(ServerError, match="6 verify steps for 6 tokens; expected: 2"),
        Visit(config, "forced", False, forced(3)) as visiting,
    ):
        step_cells(visiting)


def test_a_pool_that_does_not_hold_the_batch_is_an_error(
    config: ServeShapeConfig, install: Callable[[Clock], Clock]
) -> None:
    """The requests would wait for each other, and the time would be of a smaller batch."""
    install(Clock(emitted=3, pool=100))
    with (
        pytest.raises(ServerError, match="a KV pool of 100 tokens"),
        Visit(config, "forced", False, forced(3)) as visiting,
    ):
        step_cells(visiting)
