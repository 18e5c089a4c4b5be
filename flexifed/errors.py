"""What can go wrong, as types. Every message names the value, the valid choices and the remedy.

The command line turns a `FlexifedError` into one short line and an exit status; anything else is a defect and keeps its
traceback. All of them survive pickling, because they travel between Ray processes.
"""

from __future__ import annotations

from collections.abc import Iterable


class FlexifedWarning(UserWarning):
    """Something that changes what a result means, though nothing is wrong with the run."""


class FlexifedError(Exception):
    """Base of all errors that a user can mend; `exit_status` is what a command ends with."""

    exit_status = 2


class ConfigError(FlexifedError, ValueError):
    """A setting has a value that it can't have."""


class SignatureError(FlexifedError, ValueError):
    """A model can't be read as a sequence of layers, or states do not fit the models they are said to be of."""


class DataError(FlexifedError):
    """A data set is missing, damaged or too small."""


class ResourceError(FlexifedError):
    """The machine or the cluster can't hold what was asked for."""


class ResultsError(FlexifedError):
    """The results folder can't be read or written."""


class ClientError(FlexifedError):
    """A client failed: which one, in which round (from 0), doing what, and why."""

    exit_status = 1

    def __init__(self, client: int, round_index: int, stage: str, reason: str) -> None:
        super().__init__(client, round_index, stage, reason)  # all four in `args`, so that pickling keeps them
        self.client, self.round_index, self.stage, self.reason = client, round_index, stage, reason

    def __str__(self) -> str:
        return f"client {self.client}, round {self.round_index}, {self.stage}: {self.reason}"


class DeviceMemoryError(FlexifedError):
    """A client's device has too little memory left: which client, doing what.

    The same cell runs with fewer processes on it.
    """

    exit_status = 1


class CellsFailedError(FlexifedError):
    """Some cells of a grid failed; the others are complete."""

    exit_status = 1


def invalid_choice(field: str, value: object, choices: Iterable[object]) -> str:
    """The sentence for a value that is none of the valid ones.

    >>> invalid_choice("scheme", "max", ["standalone", "max_common"])
    "scheme is 'max'; choose one of: standalone, max_common"
    """
    return f"{field} is {value!r}; choose one of: {', '.join(str(choice) for choice in choices)}"
