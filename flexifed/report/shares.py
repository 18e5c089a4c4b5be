"""The table in the documentation of what each scheme averages in each family, and what that costs a client."""

from __future__ import annotations

from collections.abc import Iterable

from rich.filesize import decimal

from flexifed.report.plan import PlanSummary, VersionSummary
from flexifed.report.plan_text import percent


def markdown(plans: Iterable[tuple[str, PlanSummary]]) -> str:
    """Render a Markdown table with a row for each plan.

    Args:
        plans: (family, plan), all with the same number of versions.

    Returns:
        For each version: the share of its parameters that is averaged with other clients; in brackets, the share that
        is averaged with clients of other versions; and the bytes that a client sends in a round, and also receives.
    """
    lines: list[str] = []
    for family, plan in plans:
        if not lines:
            versions = " | ".join(version.version.upper() for version in plan.versions)
            lines += [f"| family | scheme | {versions} |", "|---|---|" + "---:|" * len(plan.versions)]
        cells = " | ".join(_cell(version) for version in plan.versions)
        lines.append(f"| {family} | {plan.scheme} | {cells} |")
    return "\n".join(lines)


def _cell(version: VersionSummary) -> str:
    if not version.bytes_up:
        return "-"
    across = sum(layer.num_parameters for layer in version.layers if len(layer.versions) > 1)
    share, shared_across = percent(version.averaged_share), percent(across / version.num_parameters)
    return f"{share} ({shared_across}), {decimal(version.bytes_up)}"
