"""`flexifed export`: trained models, as files."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from flexifed.errors import ConfigError, FlexifedWarning, ResultsError
from flexifed.wording import counted


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the trained models of runs: a safetensors file for each client, and a description."""

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(required)")
    ]
    """Folders of runs, such as results/table1/runs/*max_common-seed0*."""
    to: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("models")
    """Folder in which each run gets a folder of its own, named after it. Models that are there are replaced."""

    def run(self, console: Console) -> None:
        """Write the files.

        Raises:
            ConfigError: two of the runs have the same name.
            ResultsError: folders that are not a run's, or have no checkpoint, all of them named, before anything is
                written; or the files can't be written.
        """
        if not self.runs:
            raise ConfigError("no run is given; name folders of runs, such as results/table1/runs/*")
        from flexifed.cells.trained import load_clients

        found, problems = [], []
        with warnings.catch_warnings(record=True, action="always", category=FlexifedWarning) as caught:
            for folder in self.runs:
                try:
                    found.append(load_clients(folder))
                except (ConfigError, ResultsError) as error:
                    problems.append(str(error))
        if problems:
            count = f"{len(problems)} of {counted(len(self.runs), 'run')} can't be exported, so nothing was written:"
            raise ResultsError("\n  ".join([count, *problems]))
        names = Counter(clients.folder.name for clients in found)
        if same := [name for name, count in names.items() if count > 1]:
            raise ConfigError(f"several of the runs are called {same[0]}; export them one by one, each to another --to")
        print_text = partial(console.print, soft_wrap=True)
        for warning in caught:
            print_text(f"warning: {warning.message}")
        for clients in found:
            target = clients.export(self.to.expanduser())
            rounds = counted(clients.rounds, "round")
            if not clients.is_final:
                rounds = f"{clients.rounds} of {counted(clients.metadata['rounds'], 'round')}"
            print_text(f"{target}: {counted(len(clients), 'model')} after {rounds}")
