"""The choice of a block, in a world whose costs and acceptance are known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sglang_auf.speculative.adaptive_block import EXPLORE_EVERY, SMALLEST, BlockChooser

LARGEST = 8


class World:
    """Steps cost base + per_request n + per_slot n b seconds, and a draft is accepted with chance alpha."""

    def __init__(self, alpha: float, base: float, per_request: float, per_slot: float, noise: float = 0.1) -> None:
        self.alpha, self.costs, self.noise = alpha, (base, per_request, per_slot), noise
        self.chance = random.Random(1)

    def seconds(self, requests: int, block: int) -> float:
        base, per_request, per_slot = self.costs
        return base + per_request * requests + per_slot * requests * block

    def accepted(self, block: int) -> int:
        count = 0
        while count < block - 1 and self.chance.random() < self.alpha:
            count += 1
        return count

    def best(self, requests: int) -> int:
        def rate(block: int) -> float:
            return sum(self.alpha**k for k in range(block)) / self.seconds(requests, block)

        return max(range(SMALLEST, LARGEST + 1), key=rate)

    def run(self, chooser: BlockChooser, load: Callable[[int], int], steps: int) -> list[int]:
        chosen = []
        for step in range(steps):
            requests = load(step)
            block = chooser.choose(requests)
            seconds = self.seconds(requests, block) * self.chance.uniform(1 - self.noise, 1 + self.noise)
            chooser.observe(requests, block, seconds, [self.accepted(block) for _ in range(requests)])
            chosen.append(block)
        return chosen


def typical(blocks: list[int]) -> float:
    return sum(blocks) / len(blocks)


def test_the_first_block_is_the_largest() -> None:
    assert BlockChooser(LARGEST).choose(5) == LARGEST


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("requests", [1, 4, 16])
def test_it_settles_near_the_best_block(alpha: float, requests: int) -> None:
    world = World(alpha, base=0.036, per_request=0.0006, per_slot=0.0008)
    chosen = world.run(BlockChooser(LARGEST), lambda _: requests, 400)
    best = world.best(requests)
    rate = [sum(alpha**k for k in range(b)) / world.seconds(requests, b) for b in chosen[-100:]]
    best_rate = sum(alpha**k for k in range(best)) / world.seconds(requests, best)
    assert typical(rate) > 0.97 * best_rate


def test_it_steps_back_under_load_and_comes_forward_again() -> None:
    world = World(0.6, base=0.036, per_request=0.0006, per_slot=0.0008)
    chosen = world.run(BlockChooser(LARGEST), lambda step: 1 if step // 200 % 2 == 0 else 24, 800)
    alone, loaded, again = chosen[150:200], chosen[350:400], chosen[550:600]
    assert typical(loaded) < 3
    assert typical(alone) > 4 and typical(again) > 4


def test_a_useless_drafter_gets_the_smallest_block_and_a_perfect_one_the_largest() -> None:
    for alpha, expected in ((0.0, SMALLEST), (1.0, LARGEST)):
        world = World(alpha, base=0.03, per_request=0.0, per_slot=0.001)
        chosen = world.run(BlockChooser(LARGEST), lambda _: 2, 200)
        settled = [block for number, block in enumerate(chosen[100:], 100) if number % EXPLORE_EVERY]
        assert set(settled) == {expected}


def test_every_block_lies_in_range_and_neighbours_are_tried() -> None:
    world = World(0.5, base=0.01, per_request=0.001, per_slot=0.001)
    chosen = world.run(BlockChooser(3), lambda step: 1 + step % 20, 300)
    assert set(chosen) == {1, 2, 3}
    assert set(world.run(BlockChooser(3, smallest=2), lambda step: 1 + step % 20, 300)) == {2, 3}


def test_alpha_follows_recent_steps() -> None:
    chooser = BlockChooser(3)
    for _ in range(400):
        chooser.observe(1, 3, 0.01, [2])
    assert chooser.alpha(1) == pytest.approx(1.0, abs=0.01)
    assert chooser.alpha(2) == pytest.approx(1.0, abs=0.01)
    assert chooser.tau(3) == pytest.approx(3.0, abs=0.03)
    for _ in range(400):
        chooser.observe(1, 3, 0.01, [1])
    assert chooser.alpha(1) == pytest.approx(1.0, abs=0.01)
    assert chooser.alpha(2) == pytest.approx(0.0, abs=0.01)


def test_what_was_not_drafted_says_nothing_of_later_slots() -> None:
    chooser = BlockChooser(4)
    before = [chooser.alpha(k) for k in (2, 3)]
    for _ in range(50):
        chooser.observe(4, 2, 0.01, [1, 1, 0, 1])
    assert [chooser.alpha(k) for k in (2, 3)] == before
    assert chooser.alpha(1) == pytest.approx(0.75, abs=0.02)


def test_a_drafter_that_gets_better_is_found_again_from_plain_decoding() -> None:
    world = World(0.0, base=0.03, per_request=0.0, per_slot=0.001)
    chooser = BlockChooser(LARGEST)
    assert typical(world.run(chooser, lambda _: 8, 200)[100:]) < 1.1
    world.alpha = 0.9
    assert typical(world.run(chooser, lambda _: 8, 1500)[-100:]) > 4


@pytest.mark.parametrize("blocks", [(1, 1), (3, 3), (4, 0)])
def test_blocks_that_leave_no_choice_are_refused(blocks: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="nothing to choose"):
        BlockChooser(*blocks)
