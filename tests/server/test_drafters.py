"""Swap, watch and verdict: the scheduler is a stand-in that notes what it is told."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints import http_server

from server.drafters import LOOKS, BusyError, Drafters, Finished, Measured
from server.preflight import Speculation
from sglang_auf.acceptance import Acceptance
from sglang_auf.checkpoints.card import CheckedDrafter
from sglang_auf.checkpoints.weights import weights_sha256
from sglang_auf.errors import CardError
from sglang_auf.hooks import metrics
from sglang_auf.speculative import swap
from sglang_auf.speculative.swap import DrafterReqOutput
from tests.server.test_routes import CARD
from tests.support.tiny_models import write_drafter

pytestmark = pytest.mark.anyio

GOOD = [Acceptance.of_request([2, 2, 2, 2 + n % 2], completion_tokens=21 + 4 * (n % 2)) for n in range(LOOKS[-1])]
BAD = [Acceptance.of_request([8, 1 + n % 2, 0, 0], completion_tokens=11 + 2 * (n % 2)) for n in range(LOOKS[-1])]
NO_STEP = Acceptance()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """told: (action, name of the directory). refuses: an action that it fails at."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.refuses = ""

    async def ask(self, manager: Any, action: str, path: str = "") -> DrafterReqOutput:
        await asyncio.sleep(0)
        if action == self.refuses:
            raise CardError("the engine did not", "a drafter that it can load")
        self.told.append((action, Path(path).parent.name))
        return DrafterReqOutput(success=True)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(swap, "ask", made.ask)
    monkeypatch.setattr(http_server, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=None))
    monkeypatch.setattr(metrics, "LISTENERS", [])
    return made


def check(path: str) -> CheckedDrafter:
    return CheckedDrafter(CARD, (), Path(path), None, json.loads((Path(path) / "config.json").read_text()))


@pytest.fixture
def drafter(tmp_path: Path) -> Callable[[str], str]:
    return lambda name: str(write_drafter(tmp_path / name / "drafter"))


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def drafters(engine: Engine, clock: Clock, drafter: Callable[[str], str]) -> Drafters:
    first = drafter("first")
    return Drafters(Speculation(first, check(first), 4, check, "cpu"), clock)


def measured(requests: list[Acceptance]) -> Measured | None:
    return Measured.of([Finished(acceptance, 0.0) for acceptance in requests])


async def finish(drafters: Drafters, requests: list[Acceptance]) -> None:
    """Requests that begin and end now, and whatever follows from them."""
    for acceptance in requests:
        for listener in metrics.LISTENERS:
            listener(acceptance, drafters._now())
        if drafters._verdict is not None:
            await drafters._verdict


async def test_a_swap_begins_a_watch(engine: Engine, drafters: Drafters, drafter: Callable[[str], str]) -> None:
    await finish(drafters, [*GOOD[:30], NO_STEP])
    second = drafter("second")
    found = await drafters.replace(second)
    assert (found.generation, found.state, found.other) == (1, "watching", Path(drafter_of(drafters, "first")))
    assert drafters.running.checked.path == Path(second)
    assert found.before == measured(GOOD[:30])
    assert (engine.told, drafters.watched) == ([("swap", "second")], 0)


def drafter_of(drafters: Drafters, name: str) -> str:
    return str(drafters.running.checked.path.parents[1] / name / "drafter")


async def test_a_fall_is_taken_back_at_the_first_look(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    await finish(drafters, GOOD)
    await drafters.replace(drafter("second"))
    await finish(drafters, BAD[: LOOKS[0] - 1])
    assert drafters.swap.state == "watching"
    await finish(drafters, BAD[:1])
    assert engine.told == [("swap", "second"), ("take back", "")]
    found = drafters.swap
    assert (found.generation, found.state) == (2, "taken back")
    assert found.before is not None and found.after is not None
    assert found.before.tau > found.after.tau > 1
    assert (found.before.requests, found.after.requests) == (LOOKS[-1], LOOKS[0])
    assert drafters.running.checked.path.parent.name == "first"
    assert found.other is not None and found.other.parent.name == "second"
    assert "tau fell from" in caplog.text
    assert drafters.watched == 0, "requests of the bad drafter are no measure of the former one"


async def test_a_drafter_that_was_taken_back_and_is_posted_again_is_watched_again(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str]
) -> None:
    """Also before there are figures of the former one since it took its place again."""
    second = drafter("second")
    await finish(drafters, GOOD)
    await drafters.replace(second)
    await finish(drafters, BAD[: LOOKS[0]])
    await finish(drafters, GOOD[: LOOKS[0] - 1])
    again = await drafters.replace(second)
    assert (again.generation, again.state, again.before) == (3, "watching", measured(GOOD))
    await finish(drafters, BAD[: LOOKS[0]])
    assert (drafters.swap.generation, drafters.swap.state) == (4, "taken back")
    await finish(drafters, GOOD[: LOOKS[0]])
    assert (await drafters.replace(second)).before == measured(GOOD[: LOOKS[0]]), "later figures count where there are"


async def test_an_equal_drafter_is_kept_after_the_last_look(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str]
) -> None:
    await finish(drafters, GOOD)
    await drafters.replace(drafter("second"))
    await finish(drafters, GOOD)
    assert engine.told == [("swap", "second"), ("keep", "")]
    assert (drafters.swap.generation, drafters.swap.state, drafters.swap.other) == (1, "kept", None)
    assert drafters.swap.after == measured(GOOD)
    await finish(drafters, BAD)
    assert len(engine.told) == 2, "after the verdict nothing is taken back"


async def test_requests_that_began_before_the_swap_count_for_no_drafter(
    drafters: Drafters, clock: Clock, drafter: Callable[[str], str]
) -> None:
    await finish(drafters, GOOD)
    began = clock.at
    clock.at += 1
    await drafters.replace(drafter("second"))
    for acceptance in BAD:
        drafters.count(acceptance, began)
    assert (drafters.watched, drafters.swap.state) == (0, "watching")


class Traffic:
    """Clients that ask anew once they are answered. Most answers are short, with a low tau; one in five is long."""

    CLIENTS = 16
    KINDS = (*[(50, 2.5)] * 4, (2000, 5.0))
    """Tokens, and tau with a drafter of quality 1. A step takes a second."""

    def __init__(self, clock: Clock, seed: int) -> None:
        self.clock, self.random = clock, random.Random(seed)
        self.running: list[tuple[float, float, Acceptance]] = []

    def ask(self, quality: float) -> None:
        tokens, tau = self.random.choice(self.KINDS)
        mean = max(self.random.gauss(quality * tau, 0.3) - 1, 0.1)
        steps, most = round(tokens / (mean + 1)), int(mean) + 1
        up = round(steps * (mean - int(mean)))
        histogram = [0] * 8
        histogram[most - 1 : most + 1] = steps - up, up
        acceptance = Acceptance.of_request(histogram, tokens)
        end = self.clock.at + steps + self.random.random()
        heapq.heappush(self.running, (end, self.clock.at, acceptance))

    async def run(self, drafters: Drafters, quality: float, answers: int) -> None:
        """Until so many answers have ended, or a watch has."""
        while len(self.running) < self.CLIENTS:
            self.ask(quality)
        watching = drafters.swap.state == "watching"
        for _ in range(answers):
            self.clock.at, received, acceptance = heapq.heappop(self.running)
            drafters.count(acceptance, received)
            if drafters._verdict is not None:
                await drafters._verdict
            if watching and drafters.swap.state != "watching":
                return
            self.ask(quality)


@pytest.mark.parametrize(("quality", "verdict"), [(1.0, "kept"), (0.75, "taken back")])
async def test_answers_of_many_lengths_do_not_decide(
    quality: float, verdict: str, engine: Engine, clock: Clock, drafter: Callable[[str], str]
) -> None:
    """The first to end behind a swap are the short ones, whatever drafts for them."""
    first, second = drafter("first"), drafter("second")
    found = []
    for seed in range(20):
        drafters = Drafters(Speculation(first, check(first), 4, check, "cpu"), clock)
        traffic = Traffic(clock, seed)
        await traffic.run(drafters, 1.0, 300)
        await drafters.replace(second)
        await traffic.run(drafters, quality, 1000)
        found.append(drafters.swap.state)
    assert found.count(verdict) >= 19, found


async def test_without_figures_to_compare_with_the_new_one_is_kept(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str]
) -> None:
    await finish(drafters, GOOD[: LOOKS[0] - 1])
    assert (await drafters.replace(drafter("second"))).state == "kept"
    assert engine.told == [("swap", "second"), ("keep", "")]


async def test_a_swap_in_a_watch_keeps_the_drafter_to_go_back_to(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str]
) -> None:
    """Or two bad drafters in a row would leave the second one."""
    await finish(drafters, GOOD)
    await drafters.replace(drafter("second"))
    await finish(drafters, BAD[:10])
    await drafters.replace(drafter("third"))
    assert drafters.swap.before == measured(GOOD)
    await finish(drafters, BAD)
    assert drafters.running.checked.path.parent.name == "first"
    assert [action for action, _ in engine.told] == ["swap", "swap", "take back"]


async def test_one_swap_at_a_time(engine: Engine, drafters: Drafters, drafter: Callable[[str], str]) -> None:
    paths = [drafter("second"), drafter("third")]
    both = await asyncio.gather(*map(drafters.replace, paths), return_exceptions=True)
    assert [isinstance(found, BusyError) for found in both] == [False, True]
    assert engine.told[0] == ("swap", "second")
    await drafters.replace(paths[1])


async def leave_while_it_swaps(drafters: Drafters, path: str) -> None:
    """As a client that asks for a swap and goes away; returns when the swap has ended."""
    asked = asyncio.ensure_future(drafters.replace(path))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    while drafters._changing:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0)


async def test_a_client_that_goes_away_leaves_no_swap_half_done(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str]
) -> None:
    await finish(drafters, GOOD)
    await leave_while_it_swaps(drafters, drafter("second"))
    assert engine.told == [("swap", "second")]
    assert (drafters.swap.state, drafters.running.checked.path.parent.name) == ("watching", "second")


async def test_why_a_swap_failed_is_logged_where_its_client_is_gone(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuses = "swap"
    await leave_while_it_swaps(drafters, drafter("second"))
    assert "stays as it was: found: the engine did not" in caplog.text


async def test_what_the_engine_does_not_load_changes_nothing(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str]
) -> None:
    engine.refuses = "swap"
    await finish(drafters, GOOD)
    with pytest.raises(CardError):
        await drafters.replace(drafter("second"))
    assert (drafters.swap.generation, drafters.watched) == (0, len(GOOD))
    assert drafters.running.checked.path.parent.name == "first"
    engine.refuses = ""
    await drafters.replace(drafter("third"))


async def test_a_taking_back_that_fails_is_tried_again_at_the_next_look(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str]
) -> None:
    await finish(drafters, GOOD)
    await drafters.replace(drafter("second"))
    engine.refuses = "take back"
    await finish(drafters, BAD[: LOOKS[0]])
    assert drafters.swap.state == "watching"
    engine.refuses = ""
    await finish(drafters, BAD[LOOKS[0] : LOOKS[1]])
    assert drafters.swap.state == "taken back"


async def test_the_digest_is_of_the_weights_that_draft(engine: Engine, drafters: Drafters, tmp_path: Path) -> None:
    """Also after a swap and back, and whatever has been written into the former one's directory meanwhile."""
    first = drafters.running.checked.path
    second = write_drafter(tmp_path / "second" / "drafter", seed=3)
    digest = hashlib.sha256((first / "model.safetensors").read_bytes()).hexdigest()
    await finish(drafters, GOOD)
    await drafters.replace(str(second))
    assert await drafters.weights() == weights_sha256(second) != digest
    shutil.copy(second / "model.safetensors", first)
    await finish(drafters, BAD)
    assert drafters.swap.state == "taken back"
    assert await drafters.weights() == digest


async def test_weights_that_were_written_after_the_start_have_no_digest(drafters: Drafters) -> None:
    file = drafters.running.checked.path / "model.safetensors"
    time.sleep(0.05)  # the clock of files is coarser than that of Python
    file.write_bytes(file.read_bytes())
    assert await drafters.weights() is None
    file.unlink()
    assert await drafters.weights() is None


async def test_weights_that_were_linked_elsewhere_after_the_start_have_no_digest(
    engine: Engine, drafter: Callable[[str], str]
) -> None:
    first, second = (Path(drafter(name)) for name in ("first", "second"))
    file = first / "model.safetensors"
    file.rename(first / "real")
    file.symlink_to("real")
    time.sleep(0.05)  # the clock of files is coarser than that of Python
    drafters = Drafters(Speculation(str(first), check(str(first)), 4, check, "cpu"))
    time.sleep(0.05)
    file.unlink()
    file.symlink_to(second / "model.safetensors")
    assert await drafters.weights() is None


@pytest.mark.parametrize("path", ["", "drafter", "owner/name", "/nowhere", "/" + "x" * 4000, "/\0"])
async def test_a_path_is_absolute_and_a_directory(path: str, engine: Engine, drafters: Drafters) -> None:
    with pytest.raises(CardError, match="absolute path"):
        await drafters.replace(path)
    assert engine.told == []


async def test_another_shape_and_broken_weights_are_refused(
    engine: Engine, drafters: Drafters, tmp_path: Path, drafter: Callable[[str], str]
) -> None:
    other = write_drafter(tmp_path / "other" / "drafter", block_size=8)
    broken = Path(drafter("broken"))
    (broken / "model.safetensors").write_bytes(b"nothing")
    for path, says in ((other, "block_size 8 where the running drafter has 4"), (broken, "cannot be read")):
        with pytest.raises(CardError, match=says):
            await drafters.replace(str(path))
    assert engine.told == []


async def test_a_drafter_that_memory_has_no_room_for_is_not_loaded(
    engine: Engine, drafters: Drafters, drafter: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two copies has nearly room, both together have not."""
    second = drafter("second")
    size = sum(file.stat().st_size for file in Path(second).glob("*.safetensors"))
    monkeypatch.setattr("sglang_auf.cpu.memory.free_memory", lambda: 2 * size - 1)
    with pytest.raises(CardError, match="free memory"):
        await drafters.replace(second)
    assert engine.told == []
    monkeypatch.setattr("sglang_auf.cpu.memory.free_memory", lambda: 2 * size)
    await drafters.replace(second)
    assert drafters.running.checked.path == Path(second)


async def test_the_check_of_the_start_is_asked(drafters: Drafters, drafter: Callable[[str], str]) -> None:
    def refuse(path: str) -> CheckedDrafter:
        raise CardError(path, "another target")

    drafters.running = replace(drafters.running, check=refuse)
    with pytest.raises(CardError, match="another target"):
        await drafters.replace(drafter("second"))


def test_too_few_requests_are_no_measure() -> None:
    assert measured(GOOD[: LOOKS[0] - 1]) is None
    found = measured(GOOD[: LOOKS[0]])
    assert found is not None
    assert not found.fell_to(found)
