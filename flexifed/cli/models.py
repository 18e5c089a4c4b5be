"""`flexifed models`: the model families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rich.console import Console
from rich.table import Table

from flexifed.config import FAMILIES, FAMILY_INPUTS, TEXT_LENGTHS, InputKind

NUM_CLASSES: Mapping[InputKind, int] = MappingProxyType({"image": 10, "text": 4})
"""Classes of CIFAR-10 and of AG News."""


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
            f"sample's forward pass. A sample is 3x32x32 pixels with {NUM_CLASSES['image']} classes, or a text of "
            f"{lengths} with {NUM_CLASSES['text']} classes."
        )
        table = Table(caption=caption, caption_justify="left")
        for name in ("family", "version", "model"):
            table.add_column(name)
        for name in ("layers", "parameters", "multiply-adds"):
            table.add_column(name, justify="right")
        for family, models in FAMILIES.items():
            num_classes = NUM_CLASSES[FAMILY_INPUTS[family]]
            for index, model in enumerate(models):
                signature = model_signature(model, num_classes=num_classes)
                cost = model_multiply_adds(model, num_classes=num_classes)
                row = (f"V{index + 1}", model, str(len(signature.layers)), f"{signature.num_parameters:,}", f"{cost:,}")
                table.add_row("" if index else family, *row, end_section=index == len(models) - 1)
        console.print(table)
