"""Checks of the operating system: clock, limits, environment variables."""

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from scalegpt.doctor.checks import FAILURE, OK, WARNING, Finding, Setting, check
from scalegpt.system.cores import usable_cores
from scalegpt.system.launchers import TORCHRUN, under_launcher

FEW_FILES = 1024
"""A lower limit on open files is a warning: many ranks, or many shards of data, need more."""

OBSERVED, DRIFT = 0.3, 0.05
"""The clocks are compared for this many seconds; a difference of this many seconds is a warning."""

VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "MKL_NUM_THREADS",
             "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_LAUNCH_BLOCKING", "MASTER_ADDR", "MASTER_PORT",
             "RANK", "WORLD_SIZE")  # fmt: skip
"""Environment variables that change how training runs. So do those that begin with :data:`PREFIXES`."""

PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "DS_", "SCALEGPT_")


@check("clock")
def clock(_: Setting) -> Iterator[Finding]:
    """Check that the wall clock runs as fast as the monotonic clock, and is not days behind."""
    start, wall = time.monotonic(), time.time()
    time.sleep(OBSERVED)
    gap = (time.time() - wall) - (time.monotonic() - start)
    newest = Path(__file__).stat().st_mtime
    if time.time() < newest - 86400:
        yield Finding(
            WARNING, "the clock is days behind: ScaleGPT's files are newer", "set it: timedatectl set-ntp true"
        )
    elif abs(gap) > DRIFT:
        yield Finding(
            WARNING,
            f"the wall clock jumped by {gap:+.2f} s just now",
            "wait until NTP has set the clock: timedatectl status",
        )
    else:
        yield Finding(OK, "the wall clock runs steadily")


@check("limits")
def limits(_: Setting) -> Iterator[Finding]:
    """Check the limits on open files, on locked memory and on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    words = f"{_limit(soft)} open files, {_limit(locked)} bytes of locked memory"
    if size != resource.RLIM_INFINITY:
        yield Finding(FAILURE, f"files may have at most {size:,} bytes: checkpoints fail", "ulimit -f unlimited")
    elif soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        yield Finding(WARNING, f"{words}; many ranks or data files need more", f"ulimit -n {min(65536, hard)}")
    else:
        yield Finding(OK, words)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


@check("environment")
def environment(_: Setting) -> Iterator[Finding]:
    """Report environment variables that change training, since a run does not print them."""
    found = {
        name: value for name, value in sorted(os.environ.items()) if name in VARIABLES or name.startswith(PREFIXES)
    }
    # torchrun sets OMP_NUM_THREADS itself, and a run under it sets its own number of threads.
    threads, cores = "" if TORCHRUN in os.environ else os.environ.get("OMP_NUM_THREADS", ""), usable_cores()
    if threads.isdecimal() and int(threads) < cores:
        yield Finding(
            WARNING, f"OMP_NUM_THREADS is {threads}: training on the CPU leaves {cores - int(threads)} of {cores} cores idle",
            "unset OMP_NUM_THREADS",
        )  # fmt: skip
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in {"", "0"}:
        yield Finding(WARNING, "CUDA_LAUNCH_BLOCKING is set, which makes training slow", "unset CUDA_LAUNCH_BLOCKING")
    if not under_launcher() and (os.environ.get("WORLD_SIZE", "1") != "1" or "RANK" in os.environ):
        yield Finding(
            WARNING,
            "RANK or WORLD_SIZE is set: a run without a launcher waits for other ranks",
            "unset RANK WORLD_SIZE",
        )
    yield Finding(OK, ", ".join(f"{name}={value}" for name, value in found.items()) or "no variable changes training")
