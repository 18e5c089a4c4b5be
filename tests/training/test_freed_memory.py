from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from flexifed.training.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
for _ in range(8):  # the first ones find their places
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*, keep: bool) -> int:
    """Of the last of eight tensors of 64 MiB, each freed before the next, in a process of its own."""
    line = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_that_was_freed_is_not_cleared_again() -> None:
    assert page_faults(keep=True) < 100 < page_faults(keep=False)
