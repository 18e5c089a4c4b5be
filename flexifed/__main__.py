"""`python -m flexifed` is the `flexifed` command."""

from __future__ import annotations

import sys

from flexifed.cli import main

sys.exit(main())
