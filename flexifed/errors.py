"""Exceptions and warnings. Every message names the invalid value, the valid choices and the remedy.

The command line turns a `FlexifedError` into a one-line message and an exit status; any other exception is a bug and
keeps its traceback. All of them can be pickled, because they are sent between Ray processes.
"""

from __future__ import annotations

from collections.abc import Iterable


class FlexifedWarning(UserWarning):
    """Base of warnings about something that changes the meaning of results without being an error."""


class FlexifedError(Exception):
    """Base of all errors that a user can fix; `exit_status` is the command's exit status."""

    exit_status = 2


class ConfigError(FlexifedError, ValueError):
    """A setting has an invalid value."""


class SignatureError(FlexifedError, ValueError):
    """A model can't be read as a sequence of layers, or a state does not match its model."""


class DataError(FlexifedError):
    """A data set is missing, damaged or too small."""


class ResourceError(FlexifedError):
    """The machine or the cluster lacks the requested resources."""


class ResultsError(FlexifedError):
    """The results folder can't be read or written."""


class ClientError(FlexifedError):
    """A client failed.

    Args:
        client: index of the client.
        round_index: index of the round, from 0.
        stage: what the client was doing.
        reason: why it failed.
    """

    exit_status = 1

    def __init__(self, client: int, round_index: int, stage: str, reason: str) -> None:
        super().__init__(client, round_index, stage, reason)  # all four in `args`, so that pickling keeps them
        self.client, self.round_index, self.stage, self.reason = client, round_index, stage, reason

    def __str__(self) -> str:
        return f"client {self.client}, round {self.round_index}, {self.stage}: {self.reason}"


class DeviceMemoryError(FlexifedError):
    """A client's device ran out of memory; the message names the client and what it was doing.

    The cell may fit with fewer processes on the device.
    """

    exit_status = 1


class CellsFailedError(FlexifedError):
    """Some cells of a grid failed; the others are complete."""

    exit_status = 1


def invalid_choice(field: str, value: object, choices: Iterable[object]) -> str:
    """The error message for a value that is not one of the valid choices.

    >>> invalid_choice("scheme", "max", ["standalone", "max_common"])
    "scheme is 'max'; choose one of: standalone, max_common"
    """
    return f"{field} is {value!r}; choose one of: {', '.join(str(choice) for choice in choices)}"
