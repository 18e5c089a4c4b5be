"""Numbers formatted for people."""

from __future__ import annotations

from collections.abc import Mapping


def counted(count: int, noun: str) -> str:
    """Format a count with its noun, in the plural where needed.

    >>> counted(1, "cell"), counted(5, "cell"), counted(2, "process")
    ('1 cell', '5 cells', '2 processes')
    """
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"


def accuracy_text(accuracies: Mapping[str, float]) -> str:
    """Format the accuracy of each model version, in percent.

    >>> accuracy_text({"v1": 0.5, "v2": 0.625})
    'V1 50.0 V2 62.5 %'
    """
    if not accuracies:
        return ""
    return " ".join(f"{version.upper()} {100 * value:.1f}" for version, value in accuracies.items()) + " %"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units.

    >>> [duration(seconds) for seconds in (4.2, 75, 8000)]
    ['4 s', '1 min 15 s', '2 h 13 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
