"""The prefix trie over distinct architectures: one structure, of which every scheme is a cut.

A node stands for one layer on top of everything below it. The architectures that pass through a node are exactly those
that have this prefix in common. Building it costs O(sum of the lengths of the distinct architectures), where the
paper's pairwise clustering (algorithm 2, appendix A.2) compares clients with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexifed.core.signature import LayerSignature, ModelSignature


@dataclass(frozen=True)
class Node:
    """A common prefix that ends in `layer`, and the architectures (indices, ascending) that share it."""

    layer: LayerSignature
    depth: int
    architectures: tuple[int, ...]


@dataclass(frozen=True)
class PrefixTrie:
    """The trie, held as the path of each architecture through it; paths share their nodes.

    `paths[a][d]` is the node of layer d (from 0, at the input) of architecture a.
    """

    paths: tuple[tuple[Node, ...], ...]

    def children(self, node: Node | None) -> tuple[Node, ...]:
        """The nodes one layer above `node` (of the input, for None), in the order of their first architecture."""
        depth = 0 if node is None else node.depth + 1
        members = range(len(self.paths)) if node is None else node.architectures
        above = (self.paths[member][depth] for member in members if depth < len(self.paths[member]))
        return tuple({id(child): child for child in above}.values())

    def common_depth(self, first: int, second: int) -> int:
        """How many layers two architectures have in common, from the input."""
        return sum(second in node.architectures for node in self.paths[first])


def build_trie(architectures: Sequence[ModelSignature]) -> PrefixTrie:
    """Build the trie of distinct architectures.

    Level by level, so that depth is bounded by memory and not by the interpreter's stack.
    """
    paths: list[list[Node]] = [[] for _ in architectures]
    groups = [tuple(range(len(architectures)))]
    depth = 0
    while groups:
        deeper: list[tuple[int, ...]] = []
        for group in groups:
            by_layer: dict[LayerSignature, list[int]] = {}
            for index in group:
                if depth < len(architectures[index].layers):
                    by_layer.setdefault(architectures[index].layers[depth], []).append(index)
            for layer, members in by_layer.items():
                node = Node(layer, depth, tuple(members))
                for index in members:
                    paths[index].append(node)
                deeper.append(node.architectures)
        groups, depth = deeper, depth + 1
    return PrefixTrie(tuple(tuple(path) for path in paths))
