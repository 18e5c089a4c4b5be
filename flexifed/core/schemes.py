"""The five schemes of FlexiFed's Table 1, each a cut of the prefix trie, and the sharing plan that results from a cut.

A scheme answers one question: over which architectures is the layer at a node averaged, in a given architecture? The
clients of those architectures are the layer's group. A layer that only one client would average is personal.

Source: Wang et al., "FlexiFed: Personalized Federated Learning for Edge Clients with Heterogeneous Model
Architectures", The Web Conference 2023, section 4 (doi 10.1145/3543507.3583347).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from types import MappingProxyType
from typing import get_args

from torch import nn

from flexifed.config import BatchNormBuffers, ClassifierSharing, Weighting
from flexifed.core.signature import LayerSignature, ModelSignature, TensorSpec, signature
from flexifed.core.trie import Node, PrefixTrie, build_trie
from flexifed.errors import ConfigError, invalid_choice

Cut = Callable[[Node, int, int], tuple[int, ...]]
"""A scheme. Takes a layer's node in the trie, the index of the architecture that has the layer, and the number of
architectures; returns the indices of the architectures that average the layer together, ascending, or () where it is
personal."""


def standalone(node: Node, architecture: int, num_architectures: int) -> tuple[int, ...]:
    """Nothing is averaged; every client trains alone.

    Options: none has an effect, not even `classifier="always"`, since nothing is sent.
    """
    return ()


def clustered_fl(node: Node, architecture: int, num_architectures: int) -> tuple[int, ...]:
    """Every layer is averaged over the clients with the identical architecture: one FedAvg for each architecture.

    Options: `classifier="always"` averages classifier layers of equal shapes over all clients instead; `"never"` leaves
    them personal. `batch_norm_buffers="local"` keeps each client's running statistics. `weighting="samples"` weights
    each member of a group by its number of training samples.
    """
    return (architecture,)


def basic_common(node: Node, architecture: int, num_architectures: int) -> tuple[int, ...]:
    """The common base layers, the prefix that all clients share, are averaged over all clients; nothing else is.

    Options: with `classifier="prefix"` the classifier is averaged only where all clients have one architecture;
    `"always"` adds classifier layers of equal shapes; the others act as in `clustered_fl`.
    """
    return node.architectures if len(node.architectures) == num_architectures else ()


def clustered_common(node: Node, architecture: int, num_architectures: int) -> tuple[int, ...]:
    """Basic-Common, then the personal layers are averaged over the clients with the identical architecture.

    Options: with `classifier="prefix"` the classifier is averaged among identical models; the others act as in
    `clustered_fl`.
    """
    return basic_common(node, architecture, num_architectures) or (architecture,)


def max_common(node: Node, architecture: int, num_architectures: int) -> tuple[int, ...]:
    """Every layer is averaged over all clients that have it and everything below it in common.

    The paper defines it recursively: the prefix that a group shares is averaged over the group, then the group splits
    by its next layer and each part continues alone. The groups of this recursion are exactly the nodes of the trie,
    each with the clients whose models pass through it.

    Options: with `classifier="prefix"` the classifier is averaged where the common prefix reaches it; the others act as
    in `clustered_fl`.
    """
    return node.architectures


SCHEMES: Mapping[str, Cut] = MappingProxyType(
    {scheme.__name__: scheme for scheme in (standalone, clustered_fl, basic_common, clustered_common, max_common)}
)


@dataclass(frozen=True)
class Group:
    """A layer, and the architectures over whose clients it is averaged.

    After aggregation all members hold the same values, so a group is also the unit in which the global state is stored
    and sent.

    Attributes:
        index: position of the group in its plan.
        layer: the layer that is averaged.
        architectures: indices of the architectures, ascending.
        tensors: the tensors of the layer that are averaged, as positions in `layer.tensors`.
    """

    index: int
    layer: LayerSignature
    architectures: tuple[int, ...]
    tensors: tuple[int, ...]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors that are averaged."""
        return tuple(self.layer.tensors[position] for position in self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes that a member sends in a round, and that it receives."""
        return sum(spec.num_bytes for spec in self.specs)


@dataclass(frozen=True, eq=False)
class SharingPlan:
    """For each layer of each architecture, the group it is averaged over, or None where it is personal.

    Attributes:
        scheme: name of the scheme.
        weighting: whether clients count alike, or by their number of training samples.
        batch_norm_buffers: whether running statistics are averaged with their layer, or stay with the client.
        classifier: whether classifier layers are averaged like other layers, never, or always.
        signatures: one for each client; clients with equal models share one object.
        architectures: the distinct architectures, in the order of their first client.
        architecture_of: for each client, the index of its architecture.
        trie: the prefix trie over the architectures, of which the plan is a cut.
        groups: the layers that are averaged, each with the architectures that average it.
        group_of: for each architecture and layer, an index into `groups`, or None.
    """

    scheme: str
    weighting: Weighting
    batch_norm_buffers: BatchNormBuffers
    classifier: ClassifierSharing
    signatures: tuple[ModelSignature, ...] = field(repr=False)
    architectures: tuple[ModelSignature, ...] = field(repr=False)
    architecture_of: tuple[int, ...]
    trie: PrefixTrie = field(repr=False)
    groups: tuple[Group, ...] = field(repr=False)
    group_of: tuple[tuple[int | None, ...], ...] = field(repr=False)

    @property
    def num_clients(self) -> int:
        """Number of clients that the plan is for."""
        return len(self.signatures)

    @cached_property
    def clients_of(self) -> tuple[tuple[int, ...], ...]:
        """The clients of each architecture, ascending."""
        clients: list[list[int]] = [[] for _ in self.architectures]
        for client, architecture in enumerate(self.architecture_of):
            clients[architecture].append(client)
        return tuple(map(tuple, clients))

    def members(self, group: Group) -> tuple[int, ...]:
        """The clients of a group, ascending."""
        return tuple(sorted(client for index in group.architectures for client in self.clients_of[index]))

    def num_members(self, group: Group) -> int:
        """Number of clients in a group."""
        return sum(len(self.clients_of[index]) for index in group.architectures)

    def groups_of(self, architecture: int) -> tuple[Group, ...]:
        """The groups that the layers of an architecture belong to, in forward order."""
        return tuple(self.groups[index] for index in self.group_of[architecture] if index is not None)

    def groups_with(self, clients: Iterable[int]) -> tuple[Group, ...]:
        """The groups that have a member among the given clients."""
        architectures = {self.architecture_of[client] for client in clients}
        return tuple(group for group in self.groups if architectures.intersection(group.architectures))

    def groups_within(self, clients: Iterable[int]) -> tuple[Group, ...]:
        """The groups whose members are all among the given clients."""
        counts = Counter(self.architecture_of[client] for client in clients)
        complete = {index for index, count in counts.items() if count == len(self.clients_of[index])}
        return tuple(group for group in self.groups if complete.issuperset(group.architectures))

    def groups_across(self, parts: Iterable[Iterable[int]]) -> tuple[Group, ...]:
        """The groups that have members in more than one of the given parts of the clients."""
        within = {group.index for clients in parts for group in self.groups_within(clients)}
        return tuple(group for group in self.groups if group.index not in within)

    def shared_names(self, client: int) -> dict[int, tuple[str, ...]]:
        """The state-dict keys of the tensors that are averaged, for each of a client's groups (by index)."""
        names = self.signatures[client].names
        return {
            index: tuple(names[layer][position] for position in self.groups[index].tensors)
            for layer, index in enumerate(self.group_of[self.architecture_of[client]])
            if index is not None
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of which tensors of which clients are averaged together, by position and not by name."""
        groups = [(group.architectures, group.tensors) for group in self.groups]
        return hashlib.sha256(repr((self.architecture_of, groups, self.group_of)).encode()).hexdigest()

    def bytes_per_round(self, client: int) -> int:
        """Bytes of the tensors that a client sends in a round. It receives as many."""
        return sum(group.num_bytes for group in self.groups_of(self.architecture_of[client]))


def sharing_plan(
    models: Sequence[nn.Module | ModelSignature],
    scheme: str | Cut,
    *,
    weighting: Weighting = "uniform",
    batch_norm_buffers: BatchNormBuffers = "average",
    classifier: ClassifierSharing = "prefix",
) -> SharingPlan:
    """Decide which layers of which clients are averaged together.

    Args:
        models: one for each client, in client order: modules (on any device) or signatures.
        scheme: `standalone`, `clustered_fl`, `basic_common`, `clustered_common` or `max_common`; or a function of your
            own (see `Cut`), whose name the plan takes.
        weighting: `uniform` counts every client of a group alike, as the authors' program does; `samples` is FedAvg's
            rule, and `aggregate` then needs each client's number of samples.
        batch_norm_buffers: `average` treats running statistics like weights, as the authors' program does; `local`
            leaves them with the client. Counters (`num_batches_tracked`) always stay local.
        classifier: `prefix` shares classifier layers where the scheme's prefix reaches them; `never` leaves them
            personal; `always` averages the n-th classifier layer over all clients whose n-th classifier layer has the
            same kind and shapes, across versions too (the paper's Table 3).

    Raises:
        ConfigError: the scheme or an option is unknown, there is no client, or a scheme of your own puts architectures
            together that do not have the layer in common, or to which it gives different answers.
        SignatureError: a model can't be read as layers.

    >>> from flexifed.models import build_model
    >>> models = [build_model(name, num_classes=10, width=0.1) for name in ("vgg11_bn", "vgg13_bn", "vgg16_bn")]
    >>> plan = sharing_plan(models, "max_common")
    >>> [len(plan.groups_of(architecture)) for architecture in range(3)]
    [1, 6, 6]
    """
    if not callable(scheme):
        _check_choice("scheme", scheme, SCHEMES)
    cut = scheme if callable(scheme) else SCHEMES[scheme]
    name = _name(cut)
    _check_choice("weighting", weighting, get_args(Weighting))
    _check_choice("batch_norm_buffers", batch_norm_buffers, get_args(BatchNormBuffers))
    _check_choice("classifier", classifier, get_args(ClassifierSharing))
    if isinstance(models, nn.Module):
        raise ConfigError(f"models is a single {type(models).__name__}; give a list with one model for each client")
    if not models:
        raise ConfigError("a sharing plan needs at least one client; models is empty")

    signatures, architectures, architecture_of = _distinct(models)
    trie = build_trie(architectures)

    num_clients = Counter(architecture_of)
    same_classifiers = _same_classifiers(architectures) if classifier == "always" else {}
    groups: dict[tuple[Hashable, tuple[int, ...]], Group] = {}
    group_of: list[tuple[int | None, ...]] = []
    for architecture, path in enumerate(trie.paths):
        row: list[int | None] = []
        for node in path:
            key, members = _averaged_over(node, architecture, architectures, cut, classifier, same_classifiers)
            tensors = _averaged_tensors(node.layer, batch_norm_buffers)
            if sum(num_clients[member] for member in members) < 2 or not tensors:
                row.append(None)
            else:
                group = Group(len(groups), node.layer, members, tensors)
                row.append(groups.setdefault((key, members), group).index)
        group_of.append(tuple(row))
    for group in groups.values():
        if odd := [member for member in group.architectures if group.index not in group_of[member]]:
            raise ConfigError(
                f"scheme {name!r} averages {group.layer.kind} over architectures {list(group.architectures)}, "
                f"but answers otherwise for {odd}; it must give all architectures that it puts together the same answer"
            )
    return SharingPlan(
        scheme=name,
        weighting=weighting,
        batch_norm_buffers=batch_norm_buffers,
        classifier=classifier,
        signatures=signatures,
        architectures=architectures,
        architecture_of=architecture_of,
        trie=trie,
        groups=tuple(groups.values()),
        group_of=tuple(group_of),
    )


def _distinct(
    models: Sequence[nn.Module | ModelSignature],
) -> tuple[tuple[ModelSignature, ...], tuple[ModelSignature, ...], tuple[int, ...]]:
    """Each client's signature, the distinct architectures, and the index of each client's architecture."""
    same: dict[tuple[str, tuple[tuple[str, ...], ...]], ModelSignature] = {}
    index_of: dict[str, int] = {}
    architectures: list[ModelSignature] = []
    signatures: list[ModelSignature] = []
    for model in models:
        if not isinstance(model, nn.Module | ModelSignature):
            raise ConfigError(
                f"client {len(signatures)} has {model!r}; give a torch.nn.Module or a signature for each client"
            )
        model_signature = model if isinstance(model, ModelSignature) else signature(model)
        signatures.append(same.setdefault((model_signature.digest, model_signature.names), model_signature))
        if index_of.setdefault(model_signature.digest, len(architectures)) == len(architectures):
            architectures.append(model_signature)
    architecture_of = tuple(index_of[client_signature.digest] for client_signature in signatures)
    return tuple(signatures), tuple(architectures), architecture_of


def _averaged_over(
    node: Node,
    architecture: int,
    architectures: Sequence[ModelSignature],
    cut: Cut,
    classifier: ClassifierSharing,
    same_classifiers: Mapping[tuple[object, ...], tuple[int, ...]],
) -> tuple[Hashable, tuple[int, ...]]:
    """Decide over which architectures a layer of one architecture is averaged.

    Args:
        node: the layer's node on the architecture's path through the trie.
        architecture: index of the architecture that has the layer.
        architectures: all distinct architectures.
        cut: the scheme.
        classifier: as in `sharing_plan`.
        same_classifiers: from `_same_classifiers`; read with `classifier="always"` only.

    Returns:
        (key, members). The members are the indices of the architectures, ascending, or () where the layer is personal.
        The key is the node's id, or that of `_classifier_key` for a classifier layer that is shared across versions.
        Layers with equal key and members are one group.
    """
    key: Hashable = id(node)
    if classifier != "prefix":
        role = architectures[architecture].layers[node.depth].role
        if role == "classifier":
            if classifier == "never" or cut is standalone:
                return key, ()
            key = _classifier_key(architectures[architecture], node.depth)
            return key, same_classifiers[key]
        # The same layer may belong to the classifier of another architecture, which then does not have it in common.
        same_role = (index for index in node.architectures if architectures[index].layers[node.depth].role == role)
        node = replace(node, architectures=tuple(same_role))
    answer: object = cut(node, architecture, len(architectures))
    answer = tuple(answer) if isinstance(answer, Iterable) else answer
    if not isinstance(answer, tuple) or not all(isinstance(member, Integral) for member in answer):
        raise ConfigError(
            f"scheme {_name(cut)!r} returns {answer!r} for layer {node.depth} of architecture {architecture}; it must "
            "return a tuple of architectures, or () where the layer is personal"
        )
    members = tuple(sorted(map(int, answer)))
    if members and not {architecture} <= {*members} <= {*node.architectures}:
        raise ConfigError(
            f"scheme {_name(cut)!r} averages layer {node.depth} of architecture {architecture} over {list(members)}; "
            f"it must be one of them, and only {list(node.architectures)} have this layer in common"
        )
    return key, members


def _name(cut: Cut) -> str:
    return getattr(cut, "__name__", type(cut).__name__)


def _averaged_tensors(layer: LayerSignature, batch_norm_buffers: BatchNormBuffers) -> tuple[int, ...]:
    """The positions of the layer's tensors that are averaged."""
    return tuple(
        position
        for position, spec in enumerate(layer.tensors)
        if spec.can_be_averaged and not (spec.normalisation_buffer and batch_norm_buffers == "local")
    )


def _classifier_key(architecture: ModelSignature, depth: int) -> tuple[object, ...]:
    """What must agree with `classifier="always"`: position within the classifier, kind and shapes."""
    layer = architecture.layers[depth]
    position = sum(below.role == "classifier" for below in architecture.layers[:depth])
    return (position, layer.kind, layer.tensors)


def _same_classifiers(architectures: Sequence[ModelSignature]) -> dict[tuple[object, ...], tuple[int, ...]]:
    """The architectures that have a classifier layer, by the layer's key."""
    members: dict[tuple[object, ...], tuple[int, ...]] = {}
    for index, architecture in enumerate(architectures):
        for depth, layer in enumerate(architecture.layers):
            if layer.role == "classifier":
                key = _classifier_key(architecture, depth)
                members[key] = (*members.get(key, ()), index)
    return members


def _check_choice(field_name: str, value: object, choices: Iterable[str]) -> None:
    if value not in (valid := tuple(choices)):
        raise ConfigError(invalid_choice(field_name, value, valid))
