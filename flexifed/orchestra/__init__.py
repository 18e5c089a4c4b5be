"""Plain classes become Ray actors here. The only floor that imports Ray, and it adds no rule of its own.

Importing this package sets what Ray reads from the environment.
"""

from __future__ import annotations

import os

_RAY_ENVIRONMENT = {
    # Under `uv run` Ray would rebuild the environment in every worker, from a copy of the working folder.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # An actor without GPUs sees none, instead of all.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Progress, results and signals are ours; Tune's own files and boxes would only repeat them.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in _RAY_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
