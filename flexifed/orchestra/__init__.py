"""Turns plain classes into Ray actors. The only floor that imports Ray; it adds no rule of its own.

Importing this package sets environment variables for Ray and CUDA, unless they are set already. A Ray that is started
here passes them on to its workers; those of a running cluster import this package before they use CUDA.
"""

from __future__ import annotations

import os

_ENVIRONMENT = {
    # Under `uv run` Ray would rebuild the Python environment in every worker, from a copy of the working folder.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Without it, an actor that asks for no GPU would see all of them.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Streams that share a hardware queue can wait for each other. CUDA's default is 8 queues, fewer than `--streams 8`
    # and the default stream need; 32 is the maximum. Under MPS, whose processes share one pool of queues, set fewer.
    # Sources: CUDA Programming Guide, "CUDA Environment Variables"; Multi-Process Service, "Environment Variables".
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # This package handles progress, results and signals; Tune's own files and tables would only repeat them.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
