"""Summarise a sharing plan: which clients average which layers, and the bytes that this costs a client.

Pure functions from a plan to plain dataclasses; `flexifed.report.plan_text` renders them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from flexifed.config import FAMILIES, VERSIONS

if TYPE_CHECKING:
    from flexifed.core.schemes import Group, SharingPlan
    from flexifed.core.signature import LayerSignature
    from flexifed.core.trie import Node

_VERSION_OF = {model: version for models in FAMILIES.values() for version, model in zip(VERSIONS, models, strict=True)}
_WIDTHS = ("out_channels", "out_features", "embedding_dim")


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One layer of one version.

    `depth` counts from 0 at the input. `group` is None for a personal layer; `versions` is then the layer's own version
    and `num_clients` is 1.
    """

    depth: int
    kind: str
    role: str
    num_parameters: int
    group: int | None
    versions: tuple[str, ...]
    num_clients: int


@dataclass(frozen=True, kw_only=True)
class AveragedOver:
    """The number of a version's parameters that are averaged over `num_clients` clients, and their share (0 to 1)."""

    num_clients: int
    num_parameters: int
    share: float


@dataclass(frozen=True, kw_only=True)
class VersionSummary:
    """One architecture: which share of it is averaged, and the bytes that each of its clients sends and receives in a
    round.

    `averaged_over` has the largest groups first; `averaged_share` (0 to 1) is the sum of their shares. Parameters are
    trainable values; bytes include averaged batch-norm buffers.
    """

    version: str
    model: str
    clients: tuple[int, ...]
    num_parameters: int
    averaged_share: float
    averaged_over: tuple[AveragedOver, ...]
    bytes_up: int
    bytes_down: int
    layers: tuple[LayerSummary, ...]


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """The clients that average one layer, and the bytes that each of them sends and receives for it in a round."""

    group: int
    kind: str
    versions: tuple[str, ...]
    clients: tuple[int, ...]
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Members:
    """The versions and the number of clients that a layer is averaged over."""

    versions: tuple[str, ...]
    num_clients: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive layers of one kind that are averaged in the same way.

    `first` and `last` are depths, counted from 0. `widths` are the output channels or features of the first and the
    last layer, if they have any. `averaged` has one entry for each group that averages a layer; `personal` has the
    versions whose layers stay personal.
    """

    first: int
    last: int
    kind: str
    widths: tuple[str, ...]
    averaged: tuple[Members, ...]
    personal: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A part of the prefix trie: the layers that these versions have in common, and the branches that follow."""

    versions: tuple[str, ...]
    segments: tuple[Segment, ...]
    branches: tuple[Branch, ...]


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """The summary of a sharing plan."""

    scheme: str
    weighting: str
    batch_norm_buffers: str
    classifier: str
    num_clients: int
    versions: tuple[VersionSummary, ...]
    groups: tuple[GroupSummary, ...]
    tree: tuple[Branch, ...]

    @property
    def bytes_all_clients(self) -> int:
        """Bytes that all clients together send in a round; they receive the same number."""
        return sum(len(version.clients) * version.bytes_up for version in self.versions)


def plan_summary(plan: SharingPlan, models: Sequence[str]) -> PlanSummary:
    """Summarise a plan.

    Args:
        plan: from `flexifed.core.schemes.sharing_plan`.
        models: the name of each client's model, from `flexifed.config.FAMILIES`, in client order.
    """
    names = [_VERSION_OF[models[clients[0]]] for clients in plan.clients_of]
    return PlanSummary(
        scheme=plan.scheme,
        weighting=plan.weighting,
        batch_norm_buffers=plan.batch_norm_buffers,
        classifier=plan.classifier,
        num_clients=plan.num_clients,
        versions=tuple(
            _version_summary(plan, names, index, models[clients[0]]) for index, clients in enumerate(plan.clients_of)
        ),
        groups=tuple(
            GroupSummary(
                group=group.index,
                kind=group.layer.kind,
                versions=_of(names, group.architectures),
                clients=plan.members(group),
                num_parameters=_num_parameters(group),
                num_bytes=group.num_bytes,
            )
            for group in plan.groups
        ),
        tree=tuple(_branch(plan, names, root) for root in plan.trie.children(None)),
    )


def as_json(summary: PlanSummary) -> dict[str, Any]:
    """Convert a summary to what `json.dumps` takes, without the tree: layers and groups have all of its information."""
    content = asdict(summary)
    del content["tree"]
    return content


def _version_summary(plan: SharingPlan, names: Sequence[str], architecture: int, model: str) -> VersionSummary:
    clients = plan.clients_of[architecture]
    signature = plan.architectures[architecture]
    layers, averaged = [], dict[int, int]()
    for depth, (layer, index) in enumerate(zip(signature.layers, plan.group_of[architecture], strict=True)):
        group = None if index is None else plan.groups[index]
        layers.append(
            LayerSummary(
                depth=depth,
                kind=layer.kind,
                role=layer.role,
                num_parameters=layer.num_parameters,
                group=index,
                versions=_of(names, group.architectures if group else [architecture]),
                num_clients=plan.num_members(group) if group else 1,
            )
        )
        if group:
            members = plan.num_members(group)
            averaged[members] = averaged.get(members, 0) + _num_parameters(group)
    total = max(1, signature.num_parameters)
    num_bytes = plan.bytes_per_round(clients[0])
    return VersionSummary(
        version=names[architecture],
        model=model,
        clients=clients,
        num_parameters=signature.num_parameters,
        averaged_share=sum(averaged.values()) / total,
        averaged_over=tuple(
            AveragedOver(num_clients=members, num_parameters=count, share=count / total)
            for members, count in sorted(averaged.items(), reverse=True)
        ),
        bytes_up=num_bytes,
        bytes_down=num_bytes,
        layers=tuple(layers),
    )


def _branch(plan: SharingPlan, names: Sequence[str], node: Node) -> Branch:
    """Follow the trie from a node until its versions diverge, then do the same for each branch."""
    architectures, segments = node.architectures, [_segment(plan, names, node)]
    while len(children := plan.trie.children(node)) == 1 and children[0].architectures == architectures:
        node = children[0]
        segment, previous = _segment(plan, names, node), segments[-1]
        if (segment.kind, segment.averaged, segment.personal) == (previous.kind, previous.averaged, previous.personal):
            widths = (*previous.widths[:1], *segment.widths[-1:])
            segments[-1] = replace(previous, last=segment.last, widths=widths)
        else:
            segments.append(segment)
    return Branch(
        versions=_of(names, architectures),
        segments=tuple(segments),
        branches=tuple(_branch(plan, names, child) for child in children),
    )


def _segment(plan: SharingPlan, names: Sequence[str], node: Node) -> Segment:
    """A segment of one layer: the layer of a node."""
    indices = [plan.group_of[architecture][node.depth] for architecture in node.architectures]
    groups = [plan.groups[index] for index in dict.fromkeys(indices) if index is not None]
    personal = [architecture for architecture, index in zip(node.architectures, indices, strict=True) if index is None]
    return Segment(
        first=node.depth,
        last=node.depth,
        kind=_short_kind(node.layer),
        widths=_width(node.layer),
        averaged=tuple(
            Members(versions=_of(names, group.architectures), num_clients=plan.num_members(group)) for group in groups
        ),
        personal=_of(names, personal),
    )


def _short_kind(layer: LayerSignature) -> str:
    """The name of a layer's module, in lower case; convolutions of any dimension are `conv`.

    Of several modules it is that of the first one, or, after a normalisation, that of the module that is normalised.
    """
    names = [kind.rsplit(".", 1)[-1].lower() for kind in layer.kind.split(" + ")]
    name = next((name for name in names if "norm" not in name), names[0])
    return "conv" if name.startswith("conv") else name


def _width(layer: LayerSignature) -> tuple[str, ...]:
    return tuple(value for name, value in layer.hyperparameters if name in _WIDTHS)[:1]


def _num_parameters(group: Group) -> int:
    return sum(spec.num_elements for spec in group.specs if not spec.buffer)


def _of(names: Sequence[str], architectures: Iterable[int]) -> tuple[str, ...]:
    return tuple(names[architecture] for architecture in architectures)
