"""Words for numbers."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "cell"), counted(5, "cell"), counted(2, "process")
    ('1 cell', '5 cells', '2 processes')
    """
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"
