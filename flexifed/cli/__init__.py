"""The `flexifed` command: inspect sharing plans, models, data and results, and export models, without running anything.

torch, Ray and pandas are imported only once a command needs them, so that help is quick.
"""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from flexifed.cli.data import Data
from flexifed.cli.export import Export
from flexifed.cli.models import Models
from flexifed.cli.plan import Plan, Shares
from flexifed.cli.report import Report
from flexifed.launch import guarded, plain_console


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command line; None for that of the process.

    Returns:
        Exit status: 0; 2 for errors that the user can fix; see `guarded` for others.

    Raises:
        SystemExit: the line can't be parsed (status 2), or asks for `--help` (status 0).
    """
    command: Plan | Shares | Models | Data | Report | Export = tyro.cli(
        Plan | Shares | Models | Data | Report | Export,
        prog="flexifed",
        description="Inspect sharing plans, models, data and results; export models. Scripts in experiments/ train.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return guarded(lambda: command.run(plain_console()))
