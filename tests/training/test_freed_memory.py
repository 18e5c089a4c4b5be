from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flexifed.training.memory import keep_freed_memory

FAULTS = """
import resource, torch
from flexifed.training.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if {keep}:
    assert keep_freed_memory()
fewest = None
for _ in range(32):  # the first ones still allocate
    before = faults()
    torch.ones(2**24)
    fewest = faults() - before if fewest is None else min(fewest, faults() - before)
print(fewest)
"""


def fewest_page_faults(*, keep: bool) -> int:
    """The fewest page faults of any of several tensors of 64 MiB, each freed before the next, in a new process."""
    line = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    ("most_mapped", "expected"),
    [(2**31 - 1, [(-3, 2**31 - 1), (-1, 2**31 - 1)]), (2**25, [(-3, 2**25), (-1, 2**31 - 1)])],
)
def test_a_glibc_with_a_lower_limit_is_given_that_limit(
    monkeypatch: pytest.MonkeyPatch, most_mapped: int, expected: list[tuple[int, int]]
) -> None:
    accepted = []

    def mallopt(option: int, value: int) -> int:
        if option == -3 and value > most_mapped:
            return 0
        accepted.append((option, value))
        return 1

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory()
    assert accepted == expected


def test_a_glibc_that_refuses_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=lambda *call: refused.append(call[0]) or 0))
    assert not keep_freed_memory()
    assert -1 not in refused, "after that it would no longer adapt the other by itself"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_memory_that_was_freed_is_not_cleared_again() -> None:
    assert fewest_page_faults(keep=True) < 16 < fewest_page_faults(keep=False)  # 16,384 pages, or 32 large ones
