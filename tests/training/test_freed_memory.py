from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from flexifed.training.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if {keep}:
    assert keep_freed_memory()
fewest = None
for _ in range(32):  # the first ones find their places
    before = faults()
    torch.ones(2**24)
    fewest = faults() - before if fewest is None else min(fewest, faults() - before)
print(fewest)
"""


def fewest_page_faults(*, keep: bool) -> int:
    """Of any of some tensors of 64 MiB, each freed before the next, in a process of its own."""
    line = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_that_was_freed_is_not_cleared_again() -> None:
    assert fewest_page_faults(keep=True) < 16 < fewest_page_faults(keep=False)  # 16,384 pages, or 32 large ones
