"""The memory that a CPU process frees stays with it, so that no page is faulted in twice."""

import subprocess
import sys

import pytest

BLOCKS = """
import resource, sys
import torch
from scalegpt.backends.host_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
# An aligned block may leave a remainder that keeps it from merging with its neighbours, until malloc's cache of a thread is
# full, which takes seven of them.
for _ in range(10):
    torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(faults() - before)
"""
PAGES = 10 * 2**26 // 2**12
"""Of ten blocks of 64 MB, in pages of 4 kB."""


def faults_of(how: str) -> int:
    """Page faults of ten blocks after ten others."""
    done = subprocess.run([sys.executable, "-c", BLOCKS, how], capture_output=True, text=True, timeout=120)
    if done.returncode == 3:
        pytest.skip("the C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_blocks_are_not_faulted_in_again() -> None:
    kept, given_back = faults_of("keep"), faults_of("give back")
    assert kept < PAGES / 100
    assert given_back > 10 * kept
