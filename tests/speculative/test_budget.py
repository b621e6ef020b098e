"""The number of nodes, in worlds whose costs and acceptance are known."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_auf.speculative.budget import (
    EXPLORE_EVERY,
    FLOOR,
    LEARNS_QUICKLY,
    MOST_ROWS,
    NOW_AND_THEN,
    PRIOR_NODES,
    RARELY,
    Budget,
    Calibration,
    Costs,
    Stopwatch,
)
from sglang_auf.speculative.tree import ANCHOR, Node, grow

SLOTS, RANKS = 7, 4


def node(slot: int = 0, rank: int = 0, branched: bool = False, request: int = 0, likely: float = 0.5) -> Node:
    return Node(request, ANCHOR, slot, rank, branched, likely)


# --- calibration ---


def test_before_anything_is_accepted_the_drafter_is_believed() -> None:
    drafted = np.random.default_rng(0).random((SLOTS, RANKS))
    for samples in (False, True):
        assert Calibration(SLOTS, RANKS).chances(drafted[None], [samples]) == [[drafted.tolist()] * 2]


@pytest.mark.parametrize("true", [0.0, 0.1, 0.5, 0.9])
def test_chances_move_towards_what_is_accepted(true: float) -> None:
    """The prior of a few accepted nodes never goes, and weighs little."""
    calibration, chance, drafted = Calibration(SLOTS, RANKS), random.Random(1), np.full((1, SLOTS, RANKS), 0.5)
    distances = []
    for _ in range(4):
        found = calibration.chances(drafted, [False])[0][0][2][1]
        distances.append(abs(found - true))
        for _ in range(100):
            calibration.observe([(node(2, 1), chance.random() < true)], drafted, [False])
    assert distances[-1] <= max(0.15, distances[0])
    # About 50 observations are remembered: half accepted of which the drafter said each time.
    settled = 0.5 * (50 * true + PRIOR_NODES) / (50 * 0.5 + PRIOR_NODES)
    assert calibration.chances(drafted, [False])[0][0][2][1] == pytest.approx(settled, abs=0.12)


@given(st.integers(0, 6), st.integers(0, 3), st.booleans(), st.booleans())
def test_each_slot_rank_branching_and_way_to_choose_is_its_own(
    slot: int, rank: int, branched: bool, samples: bool
) -> None:
    calibration, drafted = Calibration(SLOTS, RANKS), np.full((2, SLOTS, RANKS), 0.4)
    ways = [samples, not samples]  # of the two requests
    for _ in range(20):
        calibration.observe([(node(slot, rank, branched, request=0), False)], drafted, ways)
    for way in (False, True):
        found = np.array(calibration.chances(drafted, ways)[ways.index(way)])
        changed = np.zeros_like(found, dtype=bool)
        if way == samples:
            changed[int(branched), slot, rank] = True
        assert (found[changed] < 0.3).all() and np.allclose(found[~changed], 0.4)


def test_a_nodes_own_request_says_what_was_drafted() -> None:
    """Of the second request the drafter was nearly certain, so its rejections weigh more."""
    changes = []
    for request in (0, 1):
        calibration, drafted = Calibration(SLOTS, RANKS), np.full((2, SLOTS, RANKS), 0.1)
        drafted[1] = 0.9
        calibration.observe([(node(request=request), False)] * 10, drafted, [False, False])
        changes.append(calibration.chances(np.full((1, SLOTS, RANKS), 0.5), [False])[0][0][0][0])
    assert changes[1] < changes[0] < 0.5


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), max_size=60), st.floats(0, 1))
def test_chances_are_probabilities(seen: list[tuple[bool, float]], drafted: float) -> None:
    calibration = Calibration(1, 1)
    for accepted, said in seen:
        calibration.observe([(node(), accepted)], np.full((1, 1, 1), said), [True])
    for table in calibration.chances(np.full((1, 1, 1), drafted), [True])[0]:
        assert 0 <= table[0][0] <= 1


def test_fewer_slots_than_a_block_has() -> None:
    table = Calibration(SLOTS, RANKS).chances(np.full((5, 2, RANKS), 0.3), [True] * 5)
    assert np.array(table).shape == (5, 2, 2, RANKS)


# --- costs ---

Steps = Callable[[int, int, int], float]


@dataclass
class Machine:
    """Products that take these seconds, and steps that take more than their products."""

    verify: Callable[[int], float]
    draft: Callable[[int], float]
    products: float = 1.0  # how much slower than measured alone
    step: float = 0.0
    per_request: float = 0.0
    per_row: float = 0.0

    def seconds(self, requests: int, rows: int, drafted: int) -> float:
        products = self.verify(rows) + self.draft(drafted)
        return self.products * products + self.step + self.per_request * requests + self.per_row * rows


def stairs(*heights: tuple[int, float]) -> Callable[[int], float]:
    """rows -> the height of the first stair with so many rows; beyond the last it goes on in proportion."""

    def of(rows: int) -> float:
        if rows == 0:
            return 0.0
        for most, height in heights:
            if rows <= most:
                return height
        return heights[-1][1] * rows / heights[-1][0]

    return of


SMALL = stairs((1, 0.001), (16, 0.002), (64, 0.005), (256, 0.012))
MACHINES = {
    "32 rows as dear as one": Machine(stairs((32, 0.02), (64, 0.04), (96, 0.06), (128, 0.08)), SMALL),
    "linear in rows": Machine(lambda rows: 0.004 * rows, SMALL),
    "small steps": Machine(
        stairs((1, 0.010), (2, 0.011), (8, 0.013), (16, 0.016), (32, 0.022), (33, 0.03), (64, 0.036), (128, 0.055)),
        SMALL,
        products=1.2,
        step=0.004,
        per_request=0.0004,
        per_row=0.0001,
    ),
    "attention is dear": Machine(stairs((32, 0.01), (64, 0.012), (256, 0.03)), SMALL, step=0.002, per_row=0.002),
}
machines = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)


def seconds(costs: Costs, requests: int, rows: int, drafted: int) -> float:
    return float(costs.seconds(requests, np.array([rows]), drafted)[0])


def random_step(chance: random.Random, requests: int) -> tuple[int, int]:
    """Rows verified and drafted."""
    drafts = chance.random() < 0.9
    rows = requests + (chance.randrange(1 + 28 + 4 * requests) if drafts else 0)
    return rows, requests * chance.randint(2, SLOTS + 1) if drafts else 0


def rates(seconds: np.ndarray, requests: int, likely: np.ndarray) -> np.ndarray:
    found: np.ndarray = (requests + np.concatenate([[0.0], likely.cumsum()])) / seconds
    return found


def true_seconds(machine: Machine, requests: int, nodes: int, drafted: int) -> np.ndarray:
    return np.array([machine.seconds(requests, requests + extra, drafted) for extra in range(nodes + 1)])


def lost(machine: Machine, costs: Costs, requests: int, likely: np.ndarray, drafted: int) -> float:
    """Share of the best rate that is lost by the number of nodes that `costs` favours."""
    true = rates(true_seconds(machine, requests, len(likely), drafted), requests, likely)
    guessed = rates(costs.seconds(requests, requests + np.arange(len(likely) + 1), drafted), requests, likely)
    return 1 - float(true[np.argmax(guessed)] / true.max())


def falling(chance: random.Random, requests: int) -> np.ndarray:
    """Probabilities of the nodes of a batch, descending."""
    first, ratio = chance.uniform(0.3, 0.95), chance.uniform(0.5, 0.95)
    return np.repeat([first * ratio**place for place in range(4 + 28 // requests)], requests)


@machines
@pytest.mark.parametrize("seed", range(4))
def test_the_choice_after_some_steps_is_as_good_as_the_best(machine: Machine, seed: int) -> None:
    """With every step a few per cent off, and some held up for long."""
    chance, costs = random.Random(seed), Costs(machine.verify, machine.draft)
    losses = []
    for number in range(300):
        requests = chance.choice([1, 1, 2, 4, 8, 16])
        rows, drafted = random_step(chance, requests)
        noise = chance.gauss(1, 0.05) if chance.random() > 0.02 else 30.0
        costs.observe(requests, rows, drafted, machine.seconds(requests, rows, drafted) * max(noise, 0.5))
        if number >= 100:
            losses.append(lost(machine, costs, requests, falling(chance, requests), drafted))
    assert np.mean(losses) < 0.02
    assert np.quantile(losses, 0.9) < 0.08


@machines
def test_seconds_are_learnt(machine: Machine) -> None:
    chance, costs = random.Random(3), Costs(machine.verify, machine.draft)
    for _ in range(400):
        requests = chance.choice([1, 2, 4, 8])
        rows, drafted = random_step(chance, requests)
        costs.observe(requests, rows, drafted, machine.seconds(requests, rows, drafted))
    for requests, rows, drafted in ((1, 1, 0), (1, 20, 8), (4, 30, 32), (8, 60, 64)):
        assert seconds(costs, requests, rows, drafted) == pytest.approx(
            machine.seconds(requests, rows, drafted), rel=0.2
        )


@machines
def test_before_any_step_what_was_measured_decides(machine: Machine) -> None:
    costs = Costs(machine.verify, machine.draft)
    expected = machine.verify(1) + machine.verify(20) + machine.draft(8)
    assert seconds(costs, 1, 20, 8) == pytest.approx(expected)


def test_more_rows_than_were_measured_cost_no_less_and_are_no_error() -> None:
    machine = MACHINES["small steps"]
    costs = Costs(machine.verify, machine.draft)
    found = costs.seconds(2, np.array([MOST_ROWS - 1, MOST_ROWS, MOST_ROWS + 1, 9 * MOST_ROWS]), 9 * MOST_ROWS)
    assert np.isfinite(found).all() and (np.diff(found) >= 0).all()
    costs.observe(2, 9 * MOST_ROWS, 9 * MOST_ROWS, 1.0)


def test_a_machine_that_becomes_slower_is_believed_after_some_steps() -> None:
    """Although a step counts as a few times what was expected at most."""
    machine = MACHINES["small steps"]
    costs, chance = Costs(machine.verify, machine.draft), random.Random(0)
    for slower in (1, 6):
        for _ in range(300):
            rows, drafted = random_step(chance, 2)
            costs.observe(2, rows, drafted, slower * machine.seconds(2, rows, drafted))
        assert seconds(costs, 2, 20, 16) == pytest.approx(slower * machine.seconds(2, 20, 16), rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60), st.integers(0, 80), st.floats(0, 100)), max_size=40))
def test_seconds_never_fall_with_rows(steps: list[tuple[int, int, int, float]]) -> None:
    machine = MACHINES["small steps"]
    costs = Costs(machine.verify, machine.draft)
    for requests, more, drafted, took in steps:
        costs.observe(requests, requests + more, drafted, took)
    found = costs.seconds(2, np.arange(2, 61), 16)
    assert np.isfinite(found).all() and (np.diff(found) >= 0).all() and (found >= 0).all()


@pytest.mark.parametrize("measured", [0.7, 1.0, 1.5])
def test_steps_with_little_beside_their_products_are_not_overestimated(measured: float) -> None:
    """Nothing but the products takes time here, and they were measured wrongly when the model was loaded."""
    costs = Costs(lambda rows: measured * DEAR.verify(rows), lambda rows: measured * DEAR.draft(rows))
    for step in range(400):
        rows, drafted = (12, 32) if step % EXPLORE_EVERY == 0 else (4, 0)
        costs.observe(4, rows, drafted, DEAR.verify(rows) + DEAR.draft(drafted))
    for rows, drafted in ((4, 0), (12, 32)):
        true = DEAR.verify(rows) + DEAR.draft(drafted)
        assert costs.seconds(4, np.array([rows]), drafted)[0] == pytest.approx(true, rel=0.15)


def test_a_fit_that_fails_leaves_what_was_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("Maximum number of iterations reached.")

    costs = Costs(SMALL, SMALL)
    before = costs.seconds(4, np.array([4, 9]), 16)
    monkeypatch.setattr("sglang_auf.speculative.budget.nnls", fails)
    costs.observe(4, 9, 16, 1.0)
    assert (costs.seconds(4, np.array([4, 9]), 16) == before).all()
    assert "stays as it was" in caplog.text


def test_a_step_that_was_held_up_is_no_new_truth() -> None:
    machine = MACHINES["small steps"]
    costs, chance = Costs(machine.verify, machine.draft), random.Random(0)
    for _ in range(200):
        rows, drafted = random_step(chance, 2)
        costs.observe(2, rows, drafted, machine.seconds(2, rows, drafted))
    before = seconds(costs, 2, 20, 16)
    costs.observe(2, 20, 16, 60.0)
    for _ in range(NOW_AND_THEN - 1):
        costs.observe(2, 20, 16, machine.seconds(2, 20, 16))
    assert before < seconds(costs, 2, 20, 16) < 1.3 * before


def test_costs_are_computed_at_every_first_step_and_then_every_few() -> None:
    machine = MACHINES["small steps"]
    costs, changes = Costs(machine.verify, machine.draft), []
    for number in range(LEARNS_QUICKLY + 3 * NOW_AND_THEN):
        before = seconds(costs, 2, 20, 16)
        costs.observe(2, 20, 16, machine.seconds(2, 20, 16) * (1 + 0.2 * (number % 3)))
        changes.append(seconds(costs, 2, 20, 16) != before)
    assert all(changes[:LEARNS_QUICKLY])
    assert changes[LEARNS_QUICKLY:] == [number % NOW_AND_THEN == 0 for number in range(1, 3 * NOW_AND_THEN + 1)]


# --- the budget ---


@dataclass
class World:
    """Requests whose drafter says `said` for the likeliest token of each slot, and is right `true` times as often.

    A slot's first rank has `said` of the probability and each further one `spread` of the rest.
    """

    machine: Machine
    said: float = 0.7
    true: float = 1.0
    spread: float = 0.4
    fixed: int | None = None
    noise: float = 0.05
    emitted: list[float] = field(default_factory=list)  # tokens and seconds of each step
    seconds: list[float] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    best: list[float] = field(default_factory=list)  # tokens per second, had all costs and chances been known

    def __post_init__(self) -> None:
        self.chance = random.Random(1)
        self.costs = Costs(self.machine.verify, self.machine.draft)
        self.budget = Budget(SLOTS, self.costs, self.fixed)
        self.calibration = Calibration(SLOTS, RANKS)

    def drafted(self, requests: int, slots: int) -> np.ndarray:
        first = [[min(self.said * self.chance.uniform(0.6, 1.4), 1.0) for _ in range(slots)] for _ in range(requests)]
        rest = [
            (1 - p) * self.spread * (1 - self.spread) ** rank for of in first for p in of for rank in range(RANKS - 1)
        ]
        ranks = np.array(rest).reshape(requests, slots, RANKS - 1)
        found: np.ndarray = -np.sort(-np.concatenate([np.array(first)[:, :, None], ranks], axis=2), axis=2)
        return found

    def run(self, load: Callable[[int], int], steps: int) -> None:
        for step in range(steps):
            self.step(load(step))

    def step(self, requests: int) -> None:
        budget, slots = self.budget, self.budget.to_draft(requests)
        chances = self.drafted(requests, slots)
        rows_drafted = requests * (slots + 1) if slots else 0
        nodes: list[Node] = []
        if slots:
            tables = self.calibration.chances(chances, [False] * requests)
            every = list(islice(grow(tables, [99] * requests, FLOOR), budget.most(requests)))
            nodes = every[: budget.to_verify(requests, every, rows_drafted)]
        rows = requests + len(nodes)
        seconds = self.machine.seconds(requests, rows, rows_drafted)
        tested = list(self.accept(nodes, chances))
        self.costs.observe(requests, rows, rows_drafted, seconds * self.chance.uniform(1 - self.noise, 1 + self.noise))
        if slots:
            budget.used(nodes, slots)
            self.calibration.observe(tested, chances, [False] * requests)
        self.slots.append(slots)
        self.nodes.append(len(nodes))
        self.seconds.append(seconds)
        self.emitted.append(requests + sum(ok for _, ok in tested))
        self.best.append(self.best_rate(requests))

    def accept(self, nodes: Sequence[Node], chances: np.ndarray) -> list[tuple[Node, bool]]:
        """The nodes whose parent was accepted, and whether they were: of each slot at most one rank is the target's."""
        right = [
            [next(iter(self.chance.choices([*range(RANKS), -1], [*p, max(1 - sum(p), 0)])), -1) for p in self.true * of]
            for of in chances
        ]
        accepted: set[int] = set()
        tested = []
        for place, one in enumerate(nodes):
            if one.parent == ANCHOR or one.parent in accepted:
                ok = right[one.request][one.slot] == one.rank
                tested.append((one, ok))
                if ok:
                    accepted.add(place)
        return tested

    def best_rate(self, requests: int) -> float:
        """Of drafting always the same number of slots, the one that is best, and verifying the best number of nodes."""
        key = (requests, self.said, self.true)
        if key not in self._best:
            found = [requests / self.machine.seconds(requests, requests, 0)]
            for slots in range(1, SLOTS + 1):
                emitted = seconds = 0.0
                for _ in range(40):
                    tables = [[(self.true * of).tolist()] * 2 for of in self.drafted(requests, slots)]
                    every = islice(grow(tables, [99] * requests, FLOOR), self.budget.most(requests))
                    likely = np.array([one.likely for one in every])
                    took = true_seconds(self.machine, requests, len(likely), requests * (slots + 1))
                    best = int(np.argmax(rates(took, requests, likely)))
                    emitted, seconds = emitted + requests + likely[:best].sum(), seconds + took[best]
                found.append(emitted / seconds)
            self._best[key] = max(found)
        return self._best[key]

    _best: dict[tuple[int, float, float], float] = field(default_factory=dict)

    def rate(self, since: int) -> float:
        """Tokens per second since that step, as a share of the best."""
        return sum(self.emitted[since:]) / float(np.dot(self.seconds[since:], self.best[since:]))


def test_requests_that_take_no_drafts_say_nothing_of_what_drafts_bring() -> None:
    """One of eight takes drafts. When it is alone again it is drafted for as before."""
    world = World(MACHINES["32 rows as dear as one"], said=0.8)
    world.run(lambda _: 1, 100)
    before, budget = world.budget._gains.copy(), world.budget
    for _ in range(100):
        if slots := budget.to_draft(8, taking=1):
            nodes = [Node(3, ANCHOR, slot, 0, False, float(gain)) for slot, gain in enumerate(before[:SLOTS])]
            assert 0 < budget.to_verify(8, nodes, 8 * (slots + 1), taking=1) <= len(nodes)
            budget.used(nodes, slots)
    assert budget._gains[:SLOTS] == pytest.approx(before[:SLOTS], abs=1e-6)
    assert budget.to_draft(1) > 0
    assert budget.to_draft(8, taking=0) == Budget(SLOTS, world.costs, fixed=3).to_draft(2, taking=0) == 0


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("requests", [1, 4, 16])
@pytest.mark.parametrize(("said", "true"), [(0.8, 1.0), (0.5, 1.0), (0.8, 0.5)])
def test_it_settles_near_the_best_rate(name: str, requests: int, said: float, true: float) -> None:
    """A steady load says little of what fewer rows would cost, where rows are dear beside their products."""
    world = World(MACHINES[name], said, true)
    world.run(lambda _: requests, 350)
    if name == "attention is dear":
        assert world.rate(since=150) > 0.5
        return
    assert world.rate(since=150) > 0.75
    plain = requests / world.machine.seconds(requests, requests, 0)
    assert sum(world.emitted[150:]) / sum(world.seconds[150:]) > 0.95 * plain, "drafting must not be worse than none"


def test_the_first_step_drafts_the_whole_block() -> None:
    assert Budget(SLOTS, Costs(SMALL, SMALL)).to_draft(5) == SLOTS


DEAR = Machine(lambda rows: 0.01 * rows, lambda rows: 0.004 * rows)


def test_where_rows_are_dear_and_little_is_accepted_nothing_is_drafted_but_now_and_then() -> None:
    world = World(DEAR, said=0.3, true=0.5)
    world.run(lambda _: 4, 1000)
    drafts = [step for step, slots in enumerate(world.slots) if slots]
    late = [step for step in drafts if step > 150]
    assert late, "else a drafter that gets better is never found"
    assert all(EXPLORE_EVERY <= after - before <= EXPLORE_EVERY * RARELY for before, after in pairwise(late))
    assert sum(nodes for step, nodes in enumerate(world.nodes) if step > 150) < 2 * 4 * len(late)


def test_a_drafter_that_proposes_nothing_likely_is_not_asked_for_ever() -> None:
    """Hardly a node reaches the floor, so no node says how poor it is."""
    world = World(MACHINES["small steps"], said=0.015, spread=0.01)
    world.run(lambda _: 2, 200)
    assert sum(world.nodes) <= 2
    assert sum(slots > 0 for slots in world.slots) <= 1 + 200 / EXPLORE_EVERY


def test_a_drafter_that_becomes_useless_is_noticed() -> None:
    world = World(MACHINES["small steps"], said=0.8)
    world.run(lambda _: 2, 200)
    assert np.mean(np.array(world.slots[100:]) > 0) > 0.95
    world.said, world.spread = 0.015, 0.01
    world.run(lambda _: 2, 300)
    assert sum(slots > 0 for slots in world.slots[-100:]) <= 1 + 100 / EXPLORE_EVERY


def test_a_drafter_that_gets_better_is_found_again_from_plain_decoding() -> None:
    world = World(MACHINES["small steps"], said=0.5, true=0.02)
    world.run(lambda _: 8, 300)
    assert np.mean(np.array(world.slots[-100:]) > 0) < 0.1
    world.said, world.true = 0.9, 1.0
    world.run(lambda _: 8, 1500)
    assert np.mean(np.array(world.slots[-100:]) > 0) > 0.9
    assert np.mean(world.nodes[-100:]) > 8


def between(points: dict[int, float]) -> Callable[[int], float]:
    """rows -> seconds on the line between the two nearest of `points`, and behind the last in proportion."""
    most = max(points)
    return lambda rows: float(np.interp(rows, list(points), list(points.values()))) * max(rows / most, 1)


def test_a_drafter_that_was_wrong_for_a_while_is_believed_again() -> None:
    """It says the same all the time. While it is wrong no node seems worth a row, and none would be tested again."""
    measured = {0: 0.0, 1: 0.0136, 8: 0.0186, 16: 0.0315, 64: 0.1057}
    draft = between({rows: 0.14 * seconds for rows, seconds in measured.items()})
    world = World(Machine(between(measured), draft, step=0.001, per_request=0.0002), said=0.7, true=0.04, spread=0.01)
    world.run(lambda _: 4, 300)
    assert np.mean(world.nodes[-100:]) < 1
    world.true = 0.93
    world.run(lambda _: 4, 2000)
    assert np.mean(np.array(world.nodes[-200:]) > 0) > 0.8


def test_a_step_that_only_tries_verifies_a_node_for_each_request() -> None:
    world = World(DEAR, said=0.7, true=0.02, spread=0.01)
    world.run(lambda _: 4, 400)
    tried = [(slots, nodes) for slots, nodes in zip(world.slots[100:], world.nodes[100:], strict=True) if slots]
    assert len(tried) >= 2
    assert all(nodes >= 4 for _, nodes in tried)


def test_it_follows_the_load() -> None:
    world = World(MACHINES["small steps"], said=0.7)
    world.run(lambda step: 1 if step // 200 % 2 == 0 else 24, 800)
    per_request = [
        np.mean(world.nodes[step : step + 50]) / requests for step, requests in ((150, 1), (350, 24), (550, 1))
    ]
    alone, loaded, again = per_request
    assert loaded < 0.5 * alone
    assert 0.7 * alone < again < 1.4 * alone


def test_only_slots_that_are_used_are_drafted_and_one_more() -> None:
    budget, chance = Budget(SLOTS, Costs(SMALL, SMALL)), random.Random(0)
    deepest = 2
    for _ in range(200):
        budget.used([node(slot) for slot in range(deepest + 1)], budget._useful())
    assert budget._useful() == deepest + 2
    for _ in range(200):  # a deeper slot in every fourth step
        deep = 4 if chance.random() < 0.25 else 1
        budget.used([node(slot) for slot in range(deep + 1) if slot < budget._useful()], budget._useful())
    assert budget._useful() >= 4
    for _ in range(200):
        budget.used([], budget._useful())
    assert budget._useful() == 1
    for _ in range(200):
        slots = budget._useful()
        budget.used([node(slot) for slot in range(slots)], slots)
    assert budget._useful() == SLOTS, "slot after slot comes back"


@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 300))
def test_the_number_of_nodes_lies_between_none_and_all(requests: int, count: int, rows: int) -> None:
    budget = Budget(SLOTS, Costs(SMALL, SMALL))
    nodes = [node(likely=0.9**place) for place in range(count)]
    assert 0 <= budget.to_verify(requests, nodes, rows) <= count
    assert budget.to_verify(requests, [], rows) == 0
    assert 0 <= budget.to_draft(requests) <= SLOTS


@pytest.mark.parametrize("fixed", [1, 6, 40])
def test_a_fixed_number_ignores_the_load(fixed: int) -> None:
    budget = Budget(SLOTS, Costs(DEAR.verify, DEAR.draft), fixed)
    for requests in (1, 24):
        assert budget.to_draft(requests) == SLOTS
        assert budget.most(requests) == fixed * requests
        nodes = [node(likely=0.001)] * (fixed * requests)
        for _ in range(100):
            assert budget.to_verify(requests, nodes, requests * (SLOTS + 1)) == len(nodes)
            budget.used(nodes[:1], SLOTS)
            budget.costs.observe(requests, requests + len(nodes), requests * (SLOTS + 1), 5.0)
    assert budget.to_draft(24) == SLOTS


# --- the parts of a step, on a clock that the test moves ---


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
