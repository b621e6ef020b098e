"""Trees of drafted tokens: which nodes of a whole batch to verify, and what the target accepts of them.

A block drafter gives for each slot of its block a distribution that does not depend on the other drafts. A node is a
token at a slot, under a node of the slot before; the root is the anchor, which is committed already. A node is accepted
if its parent is and the target's token after the parent is this one, so its probability is the product of those along
its path. `grow` gives the nodes of all requests in descending order of that probability, parents first: any number of
the first ones is the best choice of that many (for one request: DDTree, liranringel/ddtree at c96427a).

Verification is exact at any temperature. The target's token is chosen at every node (by argmax, or drawn for the seed
and position, as sampling.py says), acceptance walks from the anchor to the child that equals it, and the first choice
that no child equals is the bonus token. What was drafted decides only how far the walk goes.

numpy and torch, without SGLang. A chain is a tree of one path.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

ANCHOR = -1
"""In place of a parent, for a child of the anchor."""

RANKS = 8
"""Tokens considered at each slot."""

Chances = Sequence[Sequence[Sequence[float]]]
"""Of one request, [2][slots][ranks]: the probability that a node is accepted if its parent is. [1]: where the path to
its parent has branched, that is, left its slots' likeliest tokens."""


@dataclass(frozen=True, slots=True)
class Node:
    """A drafted token. parent: its place in the order of `grow`, or ANCHOR. slot, rank: from 0.

    branched: whether its parent's path has branched. likely: the probability that it is accepted.
    """

    request: int
    parent: int
    slot: int
    rank: int
    branched: bool
    likely: float


def grow(chances: Sequence[Chances], limits: Sequence[int], floor: float) -> Iterator[Node]:
    """The nodes of all requests, the likeliest next, while their probability is `floor` or more.

    chances: of each request. limits: most nodes of each request. Of equal nodes the one seen first is first.
    """
    heap: list[tuple[float, int, int, int, float, bool, int, int]] = []
    seen = 0

    def offer(request: int, parent: int, above: float, branched: bool, slot: int, rank: int) -> None:
        nonlocal seen
        of_slots = chances[request][branched]
        if slot < len(of_slots) and rank < len(of_slots[slot]):
            likely = above * of_slots[slot][rank]
            if likely >= floor:
                seen += 1
                heapq.heappush(heap, (-likely, seen, request, parent, above, branched, slot, rank))

    left = list(limits)
    for request in range(len(chances)):
        offer(request, ANCHOR, 1.0, False, 0, 0)
    place = 0
    while heap:
        minus, _, request, parent, above, branched, slot, rank = heapq.heappop(heap)
        if not left[request]:
            continue
        left[request] -= 1
        yield Node(request, parent, slot, rank, branched, -minus)
        offer(request, place, -minus, branched or rank > 0, slot + 1, 0)
        offer(request, parent, above, branched, slot, rank + 1)
        place += 1


def accepted_along(
    texts: Sequence[Sequence[int]], chances: np.ndarray, drafts: Sequence[Sequence[Sequence[int]]], nodes: int
) -> list[int]:
    """How many drafts of each request are accepted where what the target says is known, from a tree of `nodes` nodes.

    texts: the tokens behind each anchor [requests][slots], -1 behind their end. chances: the drafter's probabilities
    [requests, slots, ranks], which are used as they are. drafts: the tokens that they are of.
    """
    grown = grow([(table, table) for table in chances.tolist()], [nodes] * len(chances), floor=0.0)
    forest = Forest.of(list(grown), [0] * len(chances), drafts)  # the anchors themselves do not matter
    behind = np.pad(np.asarray(texts), ((0, 0), (0, 1)), constant_values=-1)
    said = behind[np.repeat(np.arange(len(chances)), forest.rows), forest.depths]
    return [len(path) - 1 for path in forest.walk(said.tolist())]


@dataclass(frozen=True, slots=True)
class Forest:
    """The rows of one verify pass: of each request its anchor and then its nodes, parents before children.

    rows: how many each request has. parents, depths [total rows]: a row's parent (an anchor's is itself) and its
    distance from its anchor. nodes: of each row, None for an anchor. tokens: int64 [total rows].
    """

    rows: list[int]
    parents: np.ndarray
    depths: np.ndarray
    nodes: list[Node | None]
    tokens: torch.Tensor

    @classmethod
    def of(cls, nodes: Sequence[Node], anchors: Sequence[int], drafts: Sequence[Sequence[Sequence[int]]]) -> Forest:
        """nodes: the first ones that `grow` gave. anchors: a token each. drafts: tokens [requests][slots][ranks]."""
        of_request: list[list[int]] = [[] for _ in anchors]
        for place, node in enumerate(nodes):
            of_request[node.request].append(place)
        row_of: dict[int, int] = {}
        ordered: list[Node | None] = []
        tokens, parents, depths = [], [], []
        for anchor, places in zip(anchors, of_request, strict=True):
            first = len(ordered)
            ordered.append(None)
            tokens.append(anchor)
            parents.append(first)
            depths.append(0)
            for place in places:
                node = nodes[place]
                row_of[place] = len(ordered)
                ordered.append(node)
                tokens.append(drafts[node.request][node.slot][node.rank])
                parents.append(first if node.parent == ANCHOR else row_of[node.parent])
                depths.append(node.slot + 1)
        rows = [1 + len(places) for places in of_request]
        return cls(rows, np.array(parents), np.array(depths), ordered, torch.tensor(tokens, dtype=torch.int64))

    @property
    def deepest(self) -> int:
        return int(self.depths.max(initial=0))

    def own_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """int32 [total rows, 1 + deepest]: how many keys a row sees behind its anchor, and their slots in their order.

        slots: the pool slot of each row.
        """
        own = np.zeros((len(self.parents), 1 + self.deepest), dtype=np.int32)
        own[:, 0] = self.depths
        of_row = slots.numpy()
        for depth in range(1, self.deepest + 1):
            at = np.nonzero(self.depths == depth)[0]
            own[at, 1:depth] = own[self.parents[at], 1:depth]
            own[at, depth] = of_row[at]
        return torch.from_numpy(own)

    def ways(self, requests: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the rows of some requests: their places, whose they are (0 for the first request named), the drafts on the
        way from the anchor to each and the row itself, [rows, deepest], and how many those are. All int64.
        """
        first = np.cumsum(self.rows) - self.rows
        of_requests = [np.arange(first[request], first[request] + self.rows[request]) for request in requests]
        places = torch.from_numpy(np.concatenate(of_requests))
        owners = torch.arange(len(requests)).repeat_interleave(torch.tensor([len(some) for some in of_requests]))
        ways = self.own_slots(self.tokens)[places].long()
        return places, owners, ways[:, 1:], ways[:, 0]

    def walk(self, chosen: Sequence[int]) -> list[list[int]]:
        """The accepted rows of each request, its anchor first. chosen: the target's token after each row."""
        child = {
            (parent, token): row
            for row, (parent, token) in enumerate(zip(self.parents.tolist(), self.tokens.tolist(), strict=True))
            if parent != row
        }
        paths: list[list[int]] = []
        first = 0
        for rows in self.rows:
            path = [first]
            while (row := child.get((path[-1], chosen[path[-1]]))) is not None:
                path.append(row)
            paths.append(path)
            first += rows
        return paths

    def tested(self, paths: Sequence[Sequence[int]]) -> Iterator[tuple[Node, bool]]:
        """The nodes whose parent was accepted, and whether they were. paths: as `walk` gave them."""
        accepted = {row for path in paths for row in path}
        for row, node in enumerate(self.nodes):
            if node is not None and int(self.parents[row]) in accepted:
                yield node, row in accepted

    def committed_first(self, paths: Sequence[Sequence[int]]) -> np.ndarray:
        """int64 [total rows]: each request's rows with the accepted ones first, in their order, and no row lost."""
        order: list[int] = []
        first = 0
        for rows, path in zip(self.rows, paths, strict=True):
            kept = set(path)
            order += [*path, *(row for row in range(first, first + rows) if row not in kept)]
            first += rows
        return np.array(order, dtype=np.int64)

    def links(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """First child, next sibling and token of each row, int64 [requests, widest], -1 and 0 where there is none.

        Rows count from their request's anchor. SGLang's form of a tree (speculative/spec_utils.py, traverse_tree).
        """
        widest = max(self.rows, default=0)
        child, sibling = np.full((2, len(self.rows), widest), -1)
        token = np.zeros((len(self.rows), widest), dtype=np.int64)
        first = 0
        for request, rows in enumerate(self.rows):
            token[request, :rows] = self.tokens[first : first + rows].numpy()
            latest: dict[int, int] = {}
            for row in range(1, rows):
                parent = int(self.parents[first + row]) - first
                if parent in latest:
                    sibling[request, latest[parent]] = row
                else:
                    child[request, parent] = row
                latest[parent] = row
            first += rows
        return torch.from_numpy(child), torch.from_numpy(sibling), torch.from_numpy(token)
