"""Render a sharing plan for a terminal of 80 columns: the prefix trie as a tree, and a table of the versions."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from flexifed.report.plan import Branch, Members, PlanSummary, Segment, VersionSummary
from flexifed.wording import counted


def render(summary: PlanSummary, *, title: str) -> list[RenderableType]:
    """Render a plan as a list of parts, to be printed one after another.

    Args:
        summary: from `plan_summary`.
        title: the first line.
    """
    tree = Tree("", hide_root=True)
    for branch in summary.tree:
        _add_branch(tree, branch)
    total = decimal(summary.bytes_all_clients)
    caption = (
        f"In a round, a client sends the amount in the last column, and receives as much; all {summary.num_clients} "
        f"clients together send {total}. "
        f"Mean: {summary.weighting}. Batch-norm buffers: {summary.batch_norm_buffers}. "
        f"Classifier: {summary.classifier}."
    )
    return [title, tree, "", _table(summary.versions), caption]


def percent(share: float) -> str:
    """Format a share of 0 to 1 in percent, with two digits if it is small.

    >>> [percent(share) for share in (0, 0.000068, 0.0325, 0.5, 0.9999, 1)]
    ['0 %', '0.0068 %', '3.2 %', '50 %', '>99.9 %', '100 %']
    """
    value = 100 * share
    if 99.9 < value < 100:
        return ">99.9 %"
    digits = f"{value:.1f}" if value >= 1 else f"{value:.2g}"
    return f"{digits.removesuffix('.0')} %"


def segment_text(segment: Segment) -> str:
    """Describe consecutive layers in one line; layers are counted from 1.

    >>> segment_text(Segment(first=0, last=5, kind="conv", widths=("64", "256"), personal=(),
    ...                      averaged=(Members(versions=("v2", "v3"), num_clients=4),)))
    'layers 1-6 · conv 64..256 · averaged over V2 V3 (4 clients)'
    """
    several = segment.last > segment.first
    layers = f"layers {segment.first + 1}-{segment.last + 1}" if several else f"layer {segment.first + 1}"
    widths = "..".join(dict.fromkeys(segment.widths))
    return " · ".join([layers, f"{segment.kind} {widths}".strip(), _sharing_text(segment)])


def _sharing_text(segment: Segment) -> str:
    """Say which versions average the layers, and in which versions they are personal."""
    if not segment.averaged:
        return "personal"
    is_within_versions = len(segment.averaged) > 1 and all(len(group.versions) == 1 for group in segment.averaged)
    sizes = {group.num_clients for group in segment.averaged}
    if is_within_versions and len(sizes) == 1:
        names = _upper_names([group.versions[0] for group in segment.averaged])
        text = f"averaged within each of {names} ({counted(sizes.pop(), 'client')} each)"
    else:
        text = "averaged over " + " and over ".join(_members_text(group) for group in segment.averaged)
    return text + (f"; personal in {_upper_names(segment.personal)}" if segment.personal else "")


def _members_text(members: Members) -> str:
    return f"{_upper_names(members.versions)} ({counted(members.num_clients, 'client')})"


def _add_branch(parent: Tree, branch: Branch) -> None:
    node = parent.add(Text(_upper_names(branch.versions), style="bold"))
    for segment in branch.segments:
        node.add(segment_text(segment))
    for child in branch.branches:
        _add_branch(node, child)


def _table(versions: Sequence[VersionSummary]) -> Table:
    table = Table()
    table.add_column("clients", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for name in ("parameters", "averaged", "over how\nmany clients", "sent and\nreceived"):
        table.add_column(name, justify="right", no_wrap=True)
    for version in versions:
        over = [f"{percent(part.share)} over {part.num_clients}" for part in version.averaged_over]
        table.add_row(
            f"{len(version.clients)} × {version.version.upper()}",
            version.model,
            f"{version.num_parameters:,}",
            percent(version.averaged_share),
            "\n".join(over or ["-"]),
            decimal(version.bytes_up),
        )
    return table


def _upper_names(versions: Sequence[str]) -> str:
    return " ".join(versions).upper()
