"""A sharing plan for a terminal of 80 columns: the prefix trie as a tree, and a table of what each version shares."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.tree import Tree

from flexifed.report.plan import Branch, Members, PlanSummary, Segment, VersionSummary


def render(summary: PlanSummary, *, title: str) -> list[RenderableType]:
    """Everything about a plan, to be printed part by part.

    Args:
        summary: from `plan_summary`.
        title: what the plan is of.
    """
    tree = Tree("", hide_root=True, highlight=False)
    for branch in summary.tree:
        _grow(tree, branch)
    together = decimal(summary.bytes_all_clients)
    caption = (
        f"In a round a client sends, and gets, what the last column says; all {summary.num_clients} clients together "
        f"send {together}. "
        f"Mean: {summary.weighting}. Batch-norm buffers: {summary.batch_norm_buffers}. "
        f"Classifier: {summary.classifier}."
    )
    return [title, tree, "", _table(summary.versions), caption]


def percent(share: float) -> str:
    """A share of 0 to 1 in percent, with two digits where it is small.

    >>> [percent(share) for share in (0, 0.000068, 0.0325, 0.5, 0.9999, 1)]
    ['0 %', '0.0068 %', '3.2 %', '50 %', '>99.9 %', '100 %']
    """
    value = 100 * share
    if 99.9 < value < 100:
        return ">99.9 %"
    digits = f"{value:.1f}" if value >= 1 else f"{value:.2g}"
    return f"{digits.removesuffix('.0')} %"


def segment_text(segment: Segment) -> str:
    """One line for consecutive layers, counted from 1.

    >>> segment_text(Segment(first=0, last=5, kind="conv", widths=("64", "256"), personal=(),
    ...                      averaged=(Members(versions=("v2", "v3"), num_clients=4),)))
    'layers 1-6 · conv 64..256 · averaged over V2 V3 (4 clients)'
    """
    several = segment.last > segment.first
    layers = f"layers {segment.first + 1}-{segment.last + 1}" if several else f"layer {segment.first + 1}"
    widths = "..".join(dict.fromkeys(segment.widths))
    return " · ".join([layers, f"{segment.kind} {widths}".strip(), _sharing_text(segment)])


def _sharing_text(segment: Segment) -> str:
    """Who averages, in as few words as say it; versions that keep the layers, where others don't."""
    if not segment.averaged:
        return "personal"
    apart = len(segment.averaged) > 1 and all(len(one.versions) == 1 for one in segment.averaged)
    sizes = {one.num_clients for one in segment.averaged}
    if apart and len(sizes) == 1:
        names = _upper([one.versions[0] for one in segment.averaged])
        text = f"averaged within each of {names} ({_clients(sizes.pop())} each)"
    else:
        text = "averaged over " + " and over ".join(_members_text(one) for one in segment.averaged)
    return text + (f"; personal in {_upper(segment.personal)}" if segment.personal else "")


def _members_text(members: Members) -> str:
    return f"{_upper(members.versions)} ({_clients(members.num_clients)})"


def _grow(parent: Tree, branch: Branch) -> None:
    here = parent.add(f"[bold]{_upper(branch.versions)}[/bold]")
    for segment in branch.segments:
        here.add(segment_text(segment))
    for above in branch.branches:
        _grow(here, above)


def _table(versions: Sequence[VersionSummary]) -> Table:
    table = Table()
    table.add_column("clients", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for name in ("parameters", "averaged", "over how\nmany clients", "sends\nand gets"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in versions:
        over = [f"{percent(part.share)} over {part.num_clients}" for part in one.averaged_over]
        table.add_row(
            f"{len(one.clients)} × {one.version.upper()}",
            one.model,
            f"{one.num_parameters:,}",
            percent(one.averaged_share),
            "\n".join(over or ["-"]),
            decimal(one.bytes_up),
        )
    return table


def _clients(count: int) -> str:
    return f"{count} client{'s' if count > 1 else ''}"


def _upper(versions: Sequence[str]) -> str:
    return " ".join(versions).upper()
