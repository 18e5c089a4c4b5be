"""`flexifed data`: which data sets are there, and how to get the others."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from flexifed.config import DatasetName
from flexifed.errors import DataError, FlexifedWarning

_STATES = {
    "real": "whole",
    "real-partial": "partial; results say real-partial",
    "real-other": "whole, of another release than the paper's; results say real-other",
}
"""How `flexifed data` describes the state of data, by their source."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """List the data sets, whether they are complete, and how to get missing ones."""

    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("FLEXIFED_DATA_DIR") or "data"))
    """Folder of the data sets. Default: $FLEXIFED_DATA_DIR, or ./data."""
    download: bool = False
    """Download data that are missing, damaged or incomplete from their publishers."""
    only: tuple[DatasetName, ...] = ()
    """Only these data sets. Default: all."""

    def run(self, console: Console) -> None:
        """Print a block for each data set.

        Raises:
            DataError: data are damaged, or can't be downloaded; raised after all were listed.
        """
        from flexifed.data import SOURCES

        data_dir = self.data_dir.expanduser()
        note = "" if self.download or os.path.exists(data_dir) else " (does not exist)"
        print_text = partial(console.print, soft_wrap=True)
        print_text(f"data folder: {data_dir}{note}")
        problem = "could not be downloaded" if self.download else "can't be used"
        failed: list[str] = []
        remedies: dict[str, str] = {}
        for name, source in SOURCES.items():
            if self.only and name not in self.only:
                continue
            try:
                state, *facts = self._look(name, data_dir)
            except DataError as error:
                failed.append(name)
                state, facts = problem, [str(error)]
            else:
                if state not in (_STATES["real"], _STATES["real-other"]):
                    remedy = source.real.remedy(data_dir)
                    facts.append(f"As for {remedies[remedy]}." if remedy in remedies else remedy)
                    remedies.setdefault(remedy, name)
            print_text("\n  ".join([f"\n{name}: {state}", *facts]))
        if failed:
            raise DataError(f"{', '.join(failed)} {problem}; see above")

    def _look(self, name: str, data_dir: Path) -> list[str]:
        """The state of a data set, and lines with details."""
        from flexifed.data import PartialDataWarning, find_dataset

        with warnings.catch_warnings(record=True, action="always", category=FlexifedWarning) as caught:
            info = find_dataset(name, data="auto", data_dir=data_dir, download=self.download)
        if info.source == "synthetic":
            return ["absent; runs use a synthetic stand-in"]
        counts = f"{info.num_train:,} training and {info.num_test:,} test samples of {info.num_classes} classes"
        notes = [
            f"There: {warning.difference}." if isinstance(warning, PartialDataWarning) else str(warning)
            for warning in (record.message for record in caught)
        ]
        state = _STATES[info.source]
        return [state, f"{counts} ({info.layout} version).", *notes]
