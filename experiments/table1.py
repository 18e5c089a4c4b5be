"""Table 1 of FlexiFed (The Web Conference 2023): accuracy of four versions under five schemes.

python experiments/table1.py                                        every cell, with quick settings
python experiments/table1.py --profile thin --seeds 0 1 2           thin models, about half an hour a row and seed
python experiments/table1.py --profile authors --only 'cifar10/*/*' the published program's protocol
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flexifed.grid import make_cells
from flexifed.launch import run_experiment

ROWS = (
    ("cifar10", "vgg"),
    ("cifar10", "resnet"),
    ("cinic10", "vgg"),
    ("cinic10", "resnet"),
    ("agnews", "charcnn"),
    ("agnews", "vdcnn"),
    ("speech_commands", "vgg"),
    ("speech_commands", "resnet"),
)
"""The rows of the paper's table: (data set, family)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status."""
    return run_experiment(
        "table1",
        make_cells(ROWS),
        argv,
        prog="table1.py",
        description="Accuracy of four versions under FlexiFed's five schemes (Table 1 of the paper).",
    )


if __name__ == "__main__":
    sys.exit(main())
