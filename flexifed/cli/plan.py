"""`flexifed plan` and `flexifed shares`: what the schemes average."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from rich.console import Console

from flexifed.cli.models import NUM_CLASSES
from flexifed.config import (
    FAMILIES,
    FAMILY_INPUTS,
    BatchNormBuffers,
    ClassifierSharing,
    FamilyName,
    ModelConfig,
    PartitionConfig,
    SchemeName,
    SharingConfig,
    VersionName,
    Weighting,
)
from flexifed.errors import ConfigError

if TYPE_CHECKING:
    from flexifed.report.plan import PlanSummary

_IMAGE_CHANNELS = 3  # as the models of images have by default
_MOST_CLIENTS = 1_000_000


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
            console.print(text, soft_wrap=True)
            return
        title = f"{self.scheme} of {self.family}, {self.num_clients} clients, width {self.width:g}"
        for part in render(summary, title=title):
            console.print(part)

    @property
    def _classes(self) -> int:
        return NUM_CLASSES[FAMILY_INPUTS[self.family]] if self.num_classes is None else self.num_classes

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
        config.check_clients(self.num_clients)
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
        console.print(markdown(plans), soft_wrap=True)
