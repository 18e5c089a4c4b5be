"""The prefix trie over the distinct architectures. Every scheme is a cut of this one structure.

A node stands for a layer together with everything below it. The architectures that pass through a node are exactly
those that have this prefix in common. Building the trie costs O(sum of the lengths of the distinct architectures); the
paper's pairwise clustering (algorithm 2, appendix A.2) compares clients with each other, O(K) at best and O(K^2) at
worst for K clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexifed.core.signature import LayerSignature, ModelSignature


@dataclass(frozen=True)
class Node:
    """A common prefix whose last layer is `layer`, and the architectures (indices, ascending) that share it."""

    layer: LayerSignature
    depth: int
    architectures: tuple[int, ...]


@dataclass(frozen=True)
class PrefixTrie:
    """The trie, stored as each architecture's path through it. Paths share their nodes.

    Attributes:
        paths: `paths[a][d]` is the node of layer d of architecture a, with layer 0 at the input.
    """

    paths: tuple[tuple[Node, ...], ...]

    def children(self, node: Node | None) -> tuple[Node, ...]:
        """The nodes one layer above `node`, in the order of their first architecture; None stands for the input."""
        depth = 0 if node is None else node.depth + 1
        members = range(len(self.paths)) if node is None else node.architectures
        above = (self.paths[member][depth] for member in members if depth < len(self.paths[member]))
        return tuple({id(child): child for child in above}.values())

    def common_depth(self, first: int, second: int) -> int:
        """The number of layers that two architectures have in common, counted from the input."""
        return sum(second in node.architectures for node in self.paths[first])


def build_trie(architectures: Sequence[ModelSignature]) -> PrefixTrie:
    """Build the trie of distinct architectures.

    It is built level by level: at each depth, every group of architectures splits by its next layer. Depth is therefore
    bounded by memory and not by the interpreter's stack.
    """
    paths: list[list[Node]] = [[] for _ in architectures]
    groups = [tuple(range(len(architectures)))]
    depth = 0
    while groups:
        next_groups: list[tuple[int, ...]] = []
        for group in groups:
            by_layer: dict[LayerSignature, list[int]] = {}
            for architecture in group:
                if depth < len(architectures[architecture].layers):
                    by_layer.setdefault(architectures[architecture].layers[depth], []).append(architecture)
            for layer, members in by_layer.items():
                node = Node(layer, depth, tuple(members))
                for architecture in members:
                    paths[architecture].append(node)
                next_groups.append(node.architectures)
        groups, depth = next_groups, depth + 1
    return PrefixTrie(tuple(tuple(path) for path in paths))
