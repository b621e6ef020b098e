"""Trees: which nodes are chosen, what the rows of a forest are, and that a walk over drawn tokens is plain sampling."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sglang_auf.speculative import sampling
from sglang_auf.speculative.tree import ANCHOR, Chances, Forest, Node, accepted_along, grow

Path = tuple[int, ...]
"""Of a node, the rank at each slot, its own last."""


def paths_of(nodes: Sequence[Node]) -> list[Path]:
    paths: list[Path] = []
    for node in nodes:
        paths.append((*(() if node.parent == ANCHOR else paths[node.parent]), node.rank))
    return paths


def chance(chances: Chances, path: Path) -> float:
    """P(a node is accepted): the product along its path, written out."""
    product, branched = 1.0, False
    for slot, rank in enumerate(path):
        product *= chances[branched][slot][rank]
        branched = branched or rank > 0
    return product


def descending(draw: st.DrawFn, slots: int, ranks: int) -> list[list[float]]:
    """Probabilities [slots][ranks], with equal ones among them, that descend in each slot."""
    some = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0]) | st.floats(0, 1)
    return [sorted(draw(st.lists(some, min_size=ranks, max_size=ranks)), reverse=True) for _ in range(slots)]


@st.composite
def tables(draw: st.DrawFn, slots: int = 3, ranks: int = 3) -> Chances:
    """One request whose branched paths are like others."""
    one = descending(draw, draw(st.integers(1, slots)), draw(st.integers(1, ranks)))
    return [one, one]


@st.composite
def any_tables(draw: st.DrawFn) -> Chances:
    """One request whose branched paths are less likely than others, or more."""
    slots, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return [descending(draw, slots, ranks), descending(draw, slots, ranks)]


def everything(chances: Chances) -> Iterator[Path]:
    slots = len(chances[0])
    for length in range(1, slots + 1):
        yield from itertools.product(*(range(len(chances[0][slot])) for slot in range(length)))


def closed_sets(chances: Chances, size: int) -> Iterator[frozenset[Path]]:
    """All sets of so many nodes that hold each node's parent."""
    found = {frozenset[Path]()}
    for _ in range(size):
        found = {
            chosen | {path}
            for chosen in found
            for path in everything(chances)
            if path not in chosen and (len(path) == 1 or path[:-1] in chosen)
        }
    yield from found


# --- what a known text has accepted ---


@pytest.mark.parametrize(
    ("nodes", "accepted"),
    # One request's nodes: 10, 11, 10 20, 11 20, 10 21, 11 21. The other's: 30, 30 40, 30 41, 31, 31 40, 31 41.
    [(1, [0, 1]), (2, [1, 1]), (3, [1, 2]), (4, [2, 2])],
)
def test_a_text_is_accepted_as_far_as_the_tree_holds_it(nodes: int, accepted: list[int]) -> None:
    chances = np.array([[[0.5, 0.4], [0.6, 0.3]], [[0.9, 0.1], [0.5, 0.4]]])
    drafts = [[[10, 11], [20, 21]], [[30, 31], [40, 41]]]
    assert accepted_along([[11, 20], [30, 41]], chances, drafts, nodes) == accepted


def test_nothing_is_accepted_behind_the_end_of_a_text() -> None:
    chances, drafts = np.array([[[0.6, 0.4], [0.6, 0.4]]]), [[[1, 2], [1, 2]]]
    assert [accepted_along([text], chances, drafts, 6) for text in ([1, 2], [1, -1], [-1, -1], [3, 1])] == [
        [2],
        [1],
        [0],
        [0],
    ]


# --- grow ---


@given(tables(slots=3, ranks=2), st.integers(1, 4))
def test_the_first_nodes_are_the_best_choice_of_that_many(chances: Chances, most: int) -> None:
    """Against every set of nodes that holds its parents."""
    nodes = list(grow([chances], [most], 0.0))
    assert len(nodes) == min(most, len(list(everything(chances))))
    for size in range(1, len(nodes) + 1):
        best = max(sum(chance(chances, path) for path in chosen) for chosen in closed_sets(chances, size))
        assert sum(node.likely for node in nodes[:size]) == pytest.approx(best)


@given(st.lists(tables(), min_size=1, max_size=3), st.integers(1, 12))
def test_over_several_requests_the_likeliest_nodes_come_first(of_requests: list[Chances], most: int) -> None:
    nodes = list(islice(grow(of_requests, [99] * len(of_requests), 0.0), most))
    every = sorted((chance(chances, path) for chances in of_requests for path in everything(chances)), reverse=True)
    assert [node.likely for node in nodes] == pytest.approx(every[:most])


@given(st.lists(any_tables(), max_size=3), st.data())
def test_nodes_are_each_once_below_their_parents_with_their_own_chance(
    of_requests: list[Chances], data: st.DataObject
) -> None:
    limits = [data.draw(st.integers(0, 12)) for _ in of_requests]
    floor = data.draw(st.sampled_from([0.0, 0.02, 0.3]))
    nodes = list(grow(of_requests, limits, floor))
    paths = paths_of(nodes)
    assert len({(node.request, path) for node, path in zip(nodes, paths, strict=True)}) == len(nodes)
    for place, (node, path) in enumerate(zip(nodes, paths, strict=True)):
        assert node.parent < place
        if node.parent != ANCHOR:
            assert nodes[node.parent].request == node.request
        assert node.slot == len(path) - 1
        assert node.branched == any(path[:-1]), "whether the path to the parent left rank 0"
        assert node.likely == pytest.approx(chance(of_requests[node.request], path))
        assert node.likely >= floor
    for request, limit in enumerate(limits):
        assert sum(node.request == request for node in nodes) <= limit


def test_a_branched_path_has_its_own_chances() -> None:
    """The second rank's child takes [1] and the second rank itself [0], in each slot."""
    straight, branched = [[0.9, 0.5], [0.8, 0.4]], [[0.0, 0.0], [0.7, 0.3]]
    found = {
        path: node
        for nodes in [list(grow([[straight, branched]], [99], 0.0))]
        for path, node in zip(paths_of(nodes), nodes, strict=True)
    }
    likely = {path: node.likely for path, node in found.items()}
    expected = {
        (0,): 0.9, (1,): 0.5, (0, 0): 0.9 * 0.8, (0, 1): 0.9 * 0.4, (1, 0): 0.5 * 0.7, (1, 1): 0.5 * 0.3
    }  # fmt: skip
    assert likely == pytest.approx(expected)
    assert {path for path, node in found.items() if node.branched} == {(1, 0), (1, 1)}


def test_what_is_less_likely_than_the_floor_is_left_out_and_what_is_as_likely_is_not() -> None:
    chances: Chances = [[[0.5, 0.25, 0.2], [0.5, 0.1, 0.0]]] * 2
    assert paths_of(list(grow([chances], [99], 0.25))) == [(0,), (0, 0), (1,)]
    assert list(grow([chances], [99], 0.6)) == []


def test_a_full_request_leaves_the_rest_to_others() -> None:
    good, poor = [[[0.9, 0.8]] * 3] * 2, [[[0.1, 0.1]] * 3] * 2
    nodes = list(grow([good, poor, good], [2, 3, 0], 0.0))
    assert [node.request for node in nodes] == [0, 0, 1, 1, 1]
    assert list(grow([good], [0], 0.0)) == list(grow([], [], 0.0)) == []


def test_equal_nodes_keep_the_order_in_which_they_were_seen() -> None:
    certain: Chances = [[[1.0, 1.0]] * 2] * 2
    nodes = list(grow([certain, certain], [3, 3], 0.0))
    assert [(node.request, path) for node, path in zip(nodes, paths_of(nodes), strict=True)] == [
        (0, (0,)), (1, (0,)), (0, (0, 0)), (0, (1,)), (1, (0, 0)), (1, (1,))
    ]  # fmt: skip


@given(st.lists(st.floats(0.1, 1), min_size=1, max_size=7), st.integers(1, 9))
def test_one_rank_gives_a_chain(of_slots: list[float], limit: int) -> None:
    nodes = list(grow([[[[p] for p in of_slots]] * 2], [limit], 0.0))
    assert [(node.parent, node.slot, node.rank) for node in nodes] == [
        (slot - 1, slot, 0) for slot in range(min(limit, len(of_slots)))
    ]
    assert [node.likely for node in nodes] == pytest.approx(np.cumprod(of_slots)[:limit])
    assert not any(node.branched for node in nodes)


@given(any_tables(), st.integers(0, 20))
def test_more_nodes_do_not_change_the_first_ones(chances: Chances, most: int) -> None:
    assert list(grow([chances], [most], 0.0)) == list(grow([chances], [99], 0.0))[:most]


# --- a forest ---

VOCABULARY = 50


@st.composite
def forests(draw: st.DrawFn, most: int = 4) -> tuple[Forest, list[Node], list[int], list[list[list[int]]]]:
    """A forest with what it was made of; every slot's tokens differ, and slots share tokens."""
    requests = draw(st.integers(1, most))
    slots, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    chance = random.Random(draw(st.integers(0, 10_000)))
    table = [
        [[sorted((chance.random() for _ in range(ranks)), reverse=True) for _ in range(slots)]] * 2
        for _ in range(requests)
    ]
    nodes = list(grow(table, [draw(st.integers(0, 12)) for _ in range(requests)], 0.0))
    anchors = [chance.randrange(VOCABULARY) for _ in range(requests)]
    drafts = [[chance.sample(range(ranks + 2), ranks) for _ in range(slots)] for _ in range(requests)]
    return Forest.of(nodes, anchors, drafts), nodes, anchors, drafts


def paths_of_rows(forest: Forest) -> list[tuple[int, ...]]:
    """Of each row, the rows from its anchor to itself."""
    paths: list[tuple[int, ...]] = []
    for row, parent in enumerate(forest.parents.tolist()):
        paths.append((row,) if parent == row else (*paths[parent], row))
    return paths


def firsts_of(forest: Forest) -> list[int]:
    return [0, *itertools.accumulate(forest.rows)][:-1]


def chosen_of(forest: Forest, chance: random.Random) -> list[int]:
    """A token after each row: mostly that of a child, if it has any."""
    tokens = forest.tokens.tolist()
    chosen = []
    for row in range(len(tokens)):
        children = [other for other, parent in enumerate(forest.parents.tolist()) if parent == row != other]
        accepts = children and chance.random() < 0.8
        chosen.append(tokens[chance.choice(children)] if accepts else chance.randrange(VOCABULARY))
    return chosen


@given(forests())
def test_rows_are_anchors_with_their_nodes_parents_first(made: Any) -> None:
    forest, nodes, anchors, drafts = made
    assert forest.rows == [1 + sum(node.request == request for node in nodes) for request in range(len(anchors))]
    assert len(forest.parents) == len(forest.depths) == len(forest.nodes) == len(forest.tokens) == sum(forest.rows)
    assert [node for node in forest.nodes if node] == sorted(nodes, key=lambda node: node.request)
    for request, (first, rows) in enumerate(zip(firsts_of(forest), forest.rows, strict=True)):
        assert forest.nodes[first] is None
        assert (forest.parents[first], forest.depths[first], forest.tokens[first]) == (first, 0, anchors[request])
        for row in range(first + 1, first + rows):
            node, parent = forest.nodes[row], int(forest.parents[row])
            assert node is not None and first <= parent < row
            assert forest.nodes[parent] is (None if node.parent == ANCHOR else nodes[node.parent])
            assert forest.depths[row] == forest.depths[parent] + 1 == node.slot + 1
            assert forest.tokens[row] == drafts[request][node.slot][node.rank]
    assert forest.deepest == max((node.slot + 1 for node in nodes), default=0)


@given(forests(), st.integers(0, 10_000))
def test_a_walk_goes_as_far_as_the_targets_tokens_are_drafted(made: Any, seed: int) -> None:
    forest, _, anchors, _ = made
    chosen = chosen_of(forest, random.Random(seed))
    tokens, paths = forest.tokens.tolist(), paths_of_rows(forest)
    firsts = firsts_of(forest)
    expected = []
    for first, rows in zip(firsts, forest.rows, strict=True):
        # By the drafted tokens of each path: no row numbers, no parents.
        drafted = {tuple(tokens[r] for r in paths[row][1:]): row for row in range(first, first + rows)}
        answer: tuple[int, ...] = ()
        while (*answer, chosen[drafted[answer]]) in drafted:
            answer = (*answer, chosen[drafted[answer]])
        expected.append([drafted[answer[:length]] for length in range(len(answer) + 1)])
    assert forest.walk(chosen) == expected
    assert len(expected) == len(anchors)


@given(forests(), st.integers(0, 10_000))
def test_tested_are_the_nodes_whose_parent_was_accepted(made: Any, seed: int) -> None:
    forest, *_ = made
    walked = forest.walk(chosen_of(forest, random.Random(seed)))
    accepted = set(itertools.chain(*walked))
    expected = [
        (forest.nodes[path[-1]], path[-1] in accepted)
        for path in paths_of_rows(forest)
        if len(path) > 1 and set(path[:-1]) <= accepted
    ]
    found = list(forest.tested(walked))
    assert found == expected
    assert sum(ok for _, ok in found) == sum(len(path) - 1 for path in walked)


@given(forests(), st.integers(0, 10_000))
def test_own_slots_are_those_of_the_path_behind_the_anchor(made: Any, seed: int) -> None:
    forest, *_ = made
    slots = torch.randperm(9999, generator=torch.Generator().manual_seed(seed))[: sum(forest.rows)]
    own = forest.own_slots(slots)
    assert (own.dtype, own.shape) == (torch.int32, (sum(forest.rows), 1 + forest.deepest))
    for row, path in zip(own.tolist(), paths_of_rows(forest), strict=True):
        expected = [int(slots[other]) for other in path[1:]]
        assert row[: 1 + row[0]] == [len(expected), *expected]


@given(forests(), st.integers(0, 10_000))
def test_committed_first_loses_no_row_and_begins_with_the_accepted_ones(made: Any, seed: int) -> None:
    forest, *_ = made
    walked = forest.walk(chosen_of(forest, random.Random(seed)))
    order = forest.committed_first(walked)
    assert order.dtype == np.int64
    for first, rows, path in zip(firsts_of(forest), forest.rows, walked, strict=True):
        of_request = order[first : first + rows].tolist()
        assert of_request[: len(path)] == path
        assert sorted(of_request) == list(range(first, first + rows))


class Recorder:
    """Stands in for SGLang's grammar: notes after which tokens each row is visited, and allows what a test says."""

    def __init__(self, allowed: int = -1) -> None:
        self.allowed = allowed  # tokens as bits
        self.history: list[int] = []
        self.seen: dict[int, tuple[int, ...]] = {}

    def accept_token(self, token: int) -> None:
        self.history.append(token)

    def rollback(self, count: int) -> None:
        del self.history[-count:]

    def is_terminated(self) -> bool:
        return False

    def fill_vocab_mask(self, mask: torch.Tensor, row: int) -> None:
        assert row not in self.seen
        self.seen[row] = tuple(self.history)
        mask[row] = torch.tensor([self.allowed, self.allowed])


def test_sglang_visits_each_row_behind_the_tokens_of_its_path() -> None:
    from sglang.srt.speculative.spec_utils import traverse_tree

    @given(forests(most=3), st.sampled_from([-1, 0b10111]))
    def check(made: Any, allowed: int) -> None:
        forest, *_ = made
        child, sibling, token = forest.links()
        widest = max(forest.rows)
        assert child.shape == sibling.shape == token.shape == (len(forest.rows), widest)
        assert child.dtype == sibling.dtype == token.dtype == torch.int64
        tokens, paths = forest.tokens.tolist(), paths_of_rows(forest)
        for request, (first, rows) in enumerate(zip(firsts_of(forest), forest.rows, strict=True)):
            recorder = Recorder(allowed)
            mask = torch.zeros(widest, 2, dtype=torch.int32)
            traverse_tree(child[request], sibling[request], token[request], recorder, mask)
            drafted = {row: tuple(tokens[r] for r in paths[first + row][1:]) for row in range(rows)}
            assert recorder.seen == {
                row: path for row, path in drafted.items() if all(allowed >> token & 1 for token in path)
            }
            assert (child[request, rows:] == -1).all() and (sibling[request, rows:] == -1).all()

    check()


def test_requests_without_nodes_have_their_anchor_alone() -> None:
    forest = Forest.of([], [7, 9], [])
    assert (forest.rows, forest.deepest, forest.tokens.tolist()) == ([1, 1], 0, [7, 9])
    assert forest.walk([7, 9]) == [[0], [1]]
    assert forest.own_slots(torch.tensor([3, 4])).tolist() == [[0], [0]]
    assert forest.committed_first([[0], [1]]).tolist() == [0, 1]
    assert [links.tolist() for links in forest.links()] == [[[-1], [-1]], [[-1], [-1]], [[7], [9]]]
    assert list(forest.tested([[0], [1]])) == []


def test_the_anchors_own_token_may_be_drafted_again() -> None:
    """Twice the same token, one after the other: the second is no child of itself."""
    forest = Forest.of(list(grow([[[[0.5], [0.5]]] * 2], [2], 0.0)), [4], [[[4], [4]]])
    assert forest.walk([4, 4, 4]) == [[0, 1, 2]]
    assert forest.walk([4, 1, 4]) == [[0, 1]]


# --- what is emitted: a target with 4 tokens, whose next token depends on its position and the two tokens before ---

TOKENS, ANSWER, ANSWERS = 4, 3, 4000
TARGET = torch.softmax(
    1.5 * torch.randn(ANSWER + 5, TOKENS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(8)), dim=-1
)
START = [1, 2]  # what every answer begins after


def choose(probabilities: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    n = len(seeds)
    no_filter = (torch.full((n,), 1 << 30, dtype=torch.int32), torch.ones(n), torch.zeros(n))
    return sampling.sample(probabilities, *no_filter, sampling.uniforms(seeds, positions))


def plain(seeds: torch.Tensor) -> list[Path]:
    """Token by token."""
    texts = torch.tensor([START] * len(seeds))
    for position in range(ANSWER):
        p = TARGET[position, texts[:, -2], texts[:, -1]]
        texts = torch.cat([texts, choose(p, seeds, torch.full_like(seeds, position))[:, None]], dim=1)
    return [tuple(text[2:]) for text in texts.tolist()]


def by_trees(seeds: torch.Tensor, trusting: bool = False) -> list[Path]:
    """With a random tree for each request at each step. trusting: broken, accepts each anchor's first child."""
    chance = random.Random(5)
    texts = [list(START) for _ in seeds]
    while running := [request for request, text in enumerate(texts) if len(text) < 2 + ANSWER]:
        tables = []
        for _ in running:
            falls = chance.uniform(0.2, 0.95)
            tables.append([[[falls, falls / 2, falls / 3]] * 3] * 2)
        nodes = list(grow(tables, [chance.randrange(8) for _ in running], 0.0))
        drafts = [[chance.sample(range(TOKENS), 3) for _ in range(3)] for _ in running]
        forest = Forest.of(nodes, [texts[request][-1] for request in running], drafts)
        rows = torch.tensor(forest.rows)
        lengths = torch.tensor([len(texts[request]) for request in running]).repeat_interleave(rows)
        positions = lengths - 2 + torch.from_numpy(forest.depths)
        before = forest.tokens[torch.from_numpy(forest.parents)]
        is_anchor = torch.from_numpy(forest.depths) == 0
        before[is_anchor] = torch.tensor([texts[request][-2] for request in running])
        p = TARGET[positions, before, forest.tokens]
        chosen = choose(p, seeds[torch.tensor(running)].repeat_interleave(rows), positions).tolist()
        if trusting:
            for row, node in enumerate(forest.nodes):
                if node is not None and node.parent == ANCHOR and node.rank == 0:
                    chosen[int(forest.parents[row])] = int(forest.tokens[row])
        for request, path in zip(running, forest.walk(chosen), strict=True):
            texts[request] += [chosen[row] for row in path]
    return [tuple(text[2 : 2 + ANSWER]) for text in texts]


def goodness(answers: list[Path]) -> float:
    """p of Pearson's chi-square against the chain rule; rare answers are put together."""
    expected, counts = [], []
    for answer in itertools.product(range(TOKENS), repeat=ANSWER):
        text, product = [*START, *answer], 1.0
        for position in range(ANSWER):
            product *= float(TARGET[position, text[position], text[position + 1], text[position + 2]])
        expected.append(product * len(answers))
        counts.append(answers.count(answer))
    due, seen = np.array(expected), np.array(counts, dtype=float)
    common = due >= 5
    due, seen = np.append(due[common], due[~common].sum()), np.append(seen[common], seen[~common].sum())
    return float(chisquare(seen, due * seen.sum() / due.sum()).pvalue)


def test_answers_of_verified_trees_follow_the_target_and_are_those_of_plain_decoding() -> None:
    seeds = torch.arange(ANSWERS) * 31 + 5
    answers = by_trees(seeds)
    assert goodness(answers) > 0.01
    assert answers == plain(seeds)


def test_a_broken_verifier_fails_that_test() -> None:
    assert goodness(by_trees(torch.arange(ANSWERS) * 31 + 5, trusting=True)) < 1e-6
