"""Checks of the fields of frozen dataclasses, for their `__post_init__`. Errors name the field and its value."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

from flexifed.errors import ConfigError, invalid_choice

_LARGEST_FLOAT = sys.float_info.max
_LARGEST_INTEGER = 2**63 - 1  # the largest in a Parquet column


def check_integer(config: object, name: str, minimum: int, maximum: int = _LARGEST_INTEGER) -> None:
    """Check a whole number.

    Raises:
        ConfigError: it is not one, or is out of range.
    """
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        upper_bound = "below 2**63" if maximum == _LARGEST_INTEGER else f"at most {maximum}"
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {minimum} and {upper_bound}")


def check_number(
    config: object, name: str, *, minimum: float = -math.inf, above: float = -math.inf, below: float = _LARGEST_FLOAT
) -> None:
    """Check a real number and store it as a float, so that 1 and 1.0 give the same config.

    Raises:
        ConfigError: it is not a finite number, or is out of range.
    """
    value = getattr(config, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and minimum <= value and above < value < below):
        limits = {"at least": minimum, "above": above, "below": below}
        bounds = " and ".join(f"{word} {limit:g}" for word, limit in limits.items() if abs(limit) < _LARGEST_FLOAT)
        raise ConfigError(f"{name} is {value!r}; it must be a finite number {bounds}")
    object.__setattr__(config, name, float(value))


def check_bool(config: object, name: str) -> None:
    """Check that a field is True or False.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value := getattr(config, name), bool):
        raise ConfigError(invalid_choice(name, value, (True, False)))


def check_literal(config: object, name: str, choices: Iterable[str]) -> None:
    """Check a field that takes one of a few names.

    Raises:
        ConfigError: it is none of them.
    """
    valid = tuple(choices)
    if (value := getattr(config, name)) not in valid:
        raise ConfigError(invalid_choice(name, value, valid))
