"""Speech Commands as in its author's own program: ten commands, unknown words and silence. Not in the paper.

python experiments/speech_commands_12.py                    every cell, with quick settings
python experiments/speech_commands_12.py --profile thin     thin models, real data
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flexifed.grid import make_cells
from flexifed.launch import run_experiment

ROWS = (("speech_commands_12", "vgg"), ("speech_commands_12", "resnet"))
"""(data set, family)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns the exit status."""
    return run_experiment(
        "speech_commands_12",
        make_cells(ROWS),
        argv,
        prog="speech_commands_12.py",
        description="Accuracy of four versions under FlexiFed's five schemes, on twelve classes of Speech Commands.",
    )


if __name__ == "__main__":
    sys.exit(main())
