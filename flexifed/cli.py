"""The `flexifed` command: inspect sharing plans, models, data and results, and export models, without running anything.

torch, Ray and pandas are imported only by the commands that need them, so that help is quick.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import tyro
from rich.console import Console
from rich.table import Table

from flexifed.config import (
    FAMILIES,
    FAMILY_INPUTS,
    TEXT_LENGTHS,
    BatchNormBuffers,
    ClassifierSharing,
    DatasetName,
    FamilyName,
    InputKind,
    ModelConfig,
    PartitionConfig,
    SchemeName,
    SharingConfig,
    VersionName,
    Weighting,
)
from flexifed.errors import ConfigError, DataError, FlexifedWarning, ResultsError
from flexifed.launch import guarded
from flexifed.wording import counted

if TYPE_CHECKING:
    from flexifed.report.plan import PlanSummary

_POSITIONAL: Any = tyro.conf.Positional
_STATES = {
    "real": "whole",
    "real-partial": "partial; results say real-partial",
    "real-other": "whole, of another release than the paper's; results say real-other",
}
"""How `flexifed data` describes the state of data, by their source."""
_IMAGE_CHANNELS = 3  # as the models of images have by default
_NUM_CLASSES: Mapping[InputKind, int] = MappingProxyType({"image": 10, "text": 4})
"""Classes of CIFAR-10 and of AG News."""
_MOST_CLIENTS = 1_000_000
_EXPERIMENT = "table1"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show which layers a scheme averages over which clients, and what that costs a client."""

    family: FamilyName
    """The clients' models."""
    scheme: SchemeName
    """Which layers are averaged."""
    num_clients: int = PartitionConfig().num_clients
    """Number of clients; they have the versions in turn."""
    versions: tuple[VersionName, ...] | None = None
    """Versions of the clients' models, such as `v1 v4`. Default: all four."""
    num_classes: int | None = None
    """Size of the models' output. Default: 10 for images, 4 for texts."""
    width: float = ModelConfig().width
    """Factor on the number of channels of every layer; the depth, and so what models share, stays."""
    in_channels: int | None = None
    """Channels of an image model's input. Default: 3."""
    weighting: Weighting = SharingConfig().weighting
    """Whether clients count alike or by their number of training samples."""
    batch_norm_buffers: BatchNormBuffers = SharingConfig().batch_norm_buffers
    """Whether running statistics are averaged, or stay with the client."""
    classifier: ClassifierSharing = SharingConfig().classifier
    """Classifier layers: shared where the prefix reaches them, never, or always, across versions too."""
    json: bool = False
    """Print the plan as JSON. Depths count from 0 at the input."""

    def run(self, console: Console) -> None:
        """Print the plan."""
        from flexifed.report.plan import as_json
        from flexifed.report.plan_text import render

        summary = self.summary()
        if self.json:
            settings: dict[str, object] = {"family": self.family, "width": self.width}
            settings |= {"num_classes": self._classes, "in_channels": self._channels}
            text = json.dumps(settings | as_json(summary), indent=2)
            console.print(text, highlight=False, markup=False, soft_wrap=True)
            return
        title = f"{self.scheme} of {self.family}, {self.num_clients} clients, width {self.width:g}"
        for part in render(summary, title=title):
            console.print(part, highlight=False)

    @property
    def _classes(self) -> int:
        return _NUM_CLASSES[FAMILY_INPUTS[self.family]] if self.num_classes is None else self.num_classes

    @property
    def _channels(self) -> int | None:
        """None for texts, which have none."""
        if FAMILY_INPUTS[self.family] == "image" and self.in_channels is None:
            return _IMAGE_CHANNELS
        return self.in_channels

    def summary(self) -> PlanSummary:
        """Compute the plan and summarise it."""
        if self.num_clients > _MOST_CLIENTS:
            raise ConfigError(f"num_clients is {self.num_clients}; it must be at most {_MOST_CLIENTS} to be shown")
        config = ModelConfig(width=self.width, versions=self.versions)  # checks the numbers before torch is imported
        PartitionConfig(num_clients=self.num_clients, num_shards=max(1, self.num_clients))
        from flexifed.core.schemes import sharing_plan
        from flexifed.models import model_signature
        from flexifed.report.plan import plan_summary

        signatures = {
            name: model_signature(name, num_classes=self._classes, width=self.width, in_channels=self.in_channels)
            for name in FAMILIES[self.family]
        }
        models = [FAMILIES[self.family][config.version_of(client)] for client in range(self.num_clients)]
        plan = sharing_plan(
            [signatures[name] for name in models],
            self.scheme,
            weighting=self.weighting,
            batch_norm_buffers=self.batch_norm_buffers,
            classifier=self.classifier,
        )
        return plan_summary(plan, models)


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the model families and their versions, with their parameters and the multiply-adds for one sample."""

    def run(self, console: Console) -> None:
        """Print the list."""
        from flexifed.models import model_signature
        from flexifed.models.cost import model_multiply_adds

        lengths = " or ".join(f"{length:,} characters ({family})" for family, length in TEXT_LENGTHS.items())
        caption = (
            "At full width. Layers: those with weights; a batch norm belongs to its convolution. Multiply-adds: of one "
            f"sample's forward pass. A sample is 3x32x32 pixels with {_NUM_CLASSES['image']} classes, or a text of "
            f"{lengths} with {_NUM_CLASSES['text']} classes."
        )
        table = Table(caption=caption, caption_justify="left")
        for name in ("family", "version", "model"):
            table.add_column(name)
        for name in ("layers", "parameters", "multiply-adds"):
            table.add_column(name, justify="right")
        for family, models in FAMILIES.items():
            num_classes = _NUM_CLASSES[FAMILY_INPUTS[family]]
            for index, model in enumerate(models):
                signature = model_signature(model, num_classes=num_classes)
                cost = model_multiply_adds(model, num_classes=num_classes)
                row = (f"V{index + 1}", model, str(len(signature.layers)), f"{signature.num_parameters:,}", f"{cost:,}")
                table.add_row("" if index else family, *row, end_section=index == len(models) - 1)
        console.print(table)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Print how much of each version every scheme averages, and the bytes a client sends in a round, as Markdown."""

    num_clients: int = PartitionConfig().num_clients
    """Number of clients; client k has version k modulo the number of versions."""
    width: float = ModelConfig().width
    """Factor on the number of channels of every layer; the depth, and so what models share, stays."""

    def run(self, console: Console) -> None:
        """Print the table."""
        from flexifed.report.shares import markdown

        plans = [
            (family, Plan(family=family, scheme=scheme, num_clients=self.num_clients, width=self.width).summary())
            for family in get_args(FamilyName)
            for scheme in get_args(SchemeName)
        ]
        console.print(markdown(plans), highlight=False, markup=False, soft_wrap=True)


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
        print_text = partial(console.print, highlight=False, markup=False, soft_wrap=True)
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

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FlexifedWarning)
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


@dataclass(frozen=True, kw_only=True)
class Report:
    """Print the tables of an experiment from its results, and draw its figures, for each set of settings."""

    results_dir: Annotated[Path, _POSITIONAL] = Path("results")
    """The --results-dir of the runs, or the folder of one experiment."""
    experiment: str | None = None
    """Folder of an experiment in the results. Default: table1, or the newest that --fresh made (table1-2, ...)."""
    pick: Literal["last", "best", "final"] = "last"
    """Rounds that numbers are taken from. last: mean of the last tenth, at most 50. best: the best. final: the last."""
    profile: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Only runs under this profile. Default: all, with a table for each."""
    format: Literal["terminal", "markdown", "latex", "csv"] = "terminal"
    """Format of the tables. csv: Table 1 only, with a line for each number. All formats have the same numbers."""
    target: float | None = None
    """Accuracy, in percent, to which rounds are counted. Default: where Clustered-FL ends under the same seed."""
    figures: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Also draw the figures, as PNG and PDF, in a subfolder for each table. Needs the extra `analysis`."""

    def run(self, console: Console) -> None:
        """Print the tables, and write the figures.

        Raises:
            ConfigError: a target that is no accuracy.
            ResultsError: no results, or damaged ones.
        """
        from flexifed.report.curves import check_target
        from flexifed.report.study import load, report, report_text, results_folder
        from flexifed.results.attempts import experiment_folders
        from flexifed.results.store import ResultsFolder

        check_target(self.target)
        if self.figures is not None:
            from flexifed.report.figures import drawings  # refuses before anything is read or printed
        results_dir = self.results_dir.expanduser().absolute()
        root = results_folder(results_dir, self.experiment).root
        folders = experiment_folders(results_dir, self.experiment or _EXPERIMENT)
        if others := [folder.name for folder in folders if folder != root]:
            note = f"{root}; there are also (choose with --experiment): {', '.join(others)}"
            print(note, file=sys.stdout if self.format == "terminal" else sys.stderr)
        studies = load(ResultsFolder(root), self.profile)
        if self.format == "terminal":
            for part in report(studies, pick=self.pick, target=self.target):
                console.print(part, highlight=False, markup=False)
        else:
            for text in report_text(studies, self.format, pick=self.pick, target=self.target):
                print(text)
        if self.figures is not None:
            for study in studies:
                for drawing in drawings(study, self.pick, self.target):
                    for path in drawing.save(self.figures.expanduser() / study.slug):
                        print(path, file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the trained models of runs: a safetensors file for each client, and a description."""

    runs: Annotated[tuple[Path, ...], _POSITIONAL, tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(required)")]
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
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FlexifedWarning)
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
        for warning in caught:
            console.print(f"warning: {warning.message}", highlight=False, markup=False, soft_wrap=True)
        for clients in found:
            target = clients.export(self.to.expanduser())
            rounds = counted(clients.rounds, "round")
            if not clients.is_final:
                rounds = f"{clients.rounds} of {counted(clients.metadata['rounds'], 'round')}"
            console.print(
                f"{target}: {counted(len(clients), 'model')} after {rounds}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


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
    return guarded(lambda: command.run(Console()))
