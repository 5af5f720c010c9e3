"""Finds the launcher processes (torchrun, DeepSpeed) that started this rank, from environment variables and ancestors.

torchrun sets ``TORCHELASTIC_RUN_ID``, and its agent is an ancestor of each rank. DeepSpeed's ``launch.py`` sets
``CROSS_SIZE``, the number of machines, and is an ancestor of each rank. On one machine DeepSpeed's runner, the process that a
user stops, is an ancestor of ``launch.py``. Wrappers may be between these processes.

A launcher that has already ended is no longer an ancestor: its children now have the init process or a subreaper as
their parent. :func:`is_orphan` distinguishes such a parent from a shell or program that itself started this process
with a launcher's variables set. Nothing here loads torch.
"""

import os
from collections.abc import Callable, Sequence

import psutil

from scalegpt.system.processes import birth_of, has_ended

TORCHRUN, DEEPSPEED = "TORCHELASTIC_RUN_ID", "CROSS_SIZE"
"""The environment variable that only torchrun sets, and the one that only DeepSpeed sets."""

REAPERS = frozenset(
    {"catatonit", "conmon", "containerd-shim", "docker-init", "dumb-init", "init", "slurmstepd", "systemd", "tini"}
)
"""Names of programs that adopt orphaned processes."""

Lives = Callable[[], bool]


def under_launcher() -> bool:
    """Whether this process has environment variables that only torchrun or DeepSpeed's ``launch.py`` sets."""
    return TORCHRUN in os.environ or DEEPSPEED in os.environ


def launchers() -> list[Lives]:
    """Find the launchers without which this rank must not continue; for each, return a function that says whether it runs.

    The list is empty if there is no launcher, or none is found. For a launcher that has already ended, the function
    returns False.
    """
    if not under_launcher():
        return []
    try:
        me, above = psutil.Process(), _ancestors()
        if TORCHRUN in os.environ:
            return _watched(me, above, _is_agent)
        found = _watched(me, above, _is_launch)
        at = next((index for index, process in enumerate(above) if _is_launch(process)), None)
        if at is None or os.environ[DEEPSPEED] != "1":  # several machines, of which only one has the runner
            return found
        return found + _watched(above[at], above[at + 1 :], _is_runner)
    except psutil.NoSuchProcess:  # a process ended while we looked
        return [_gone]


def starter() -> psutil.Process:
    """The process that started this machine's ranks: torchrun's agent or DeepSpeed's ``launch.py``, else the parent."""
    is_starter = _is_agent if TORCHRUN in os.environ else _is_launch
    above = _ancestors()
    return next((process for process in above if is_starter(process)), above[0] if above else psutil.Process())


def is_orphan(process: psutil.Process, parent: psutil.Process) -> bool:
    """Whether the parent that started a process has ended, and ``parent``, its current parent, has adopted it.

    This is the case if ``parent`` is the init process or one of :data:`REAPERS`, or is in another session than the
    process, since a process starts in the session of its parent. ``parent`` must not be a launcher.
    """
    if os.environ.get("SLURM_TASK_PID") == str(process.pid):
        return False  # slurmstepd, which is also a reaper, started it
    if parent.pid == 1 or any(parent.name().startswith(name) for name in REAPERS):
        return True
    try:
        ours, theirs = os.getsid(process.pid), os.getsid(parent.pid)
    except OSError:  # a process of another user
        return False
    return ours not in (theirs, process.pid)  # a session leader, as torchrun's ranks are, differs anyway: no evidence


def _ancestors() -> list[psutil.Process]:
    """The ancestors of this process, its parent first, as far as the operating system shows them."""
    number = os.getppid()
    if number == 0:  # the first process of a container, or one started from outside of it
        return []
    parent = psutil.Process(number)
    try:
        return [parent, *parent.parents()]
    except psutil.AccessDenied:
        return [parent]


def _watched(
    process: psutil.Process, above: Sequence[psutil.Process], is_launcher: Callable[[psutil.Process], bool]
) -> list[Lives]:
    """For each ancestor of ``process`` up to its launcher, a function that returns whether the ancestor runs.

    ``above`` are the ancestors, the parent first. If no launcher is among them, only the parent counts. If it has
    adopted ``process``, it stands for a launcher that has ended. If it runs Python, it counts as a running launcher.
    Otherwise it does not count.
    """
    at = next((index for index, each in enumerate(above) if is_launcher(each)), None)
    if at is not None:
        return [_lives(each) for each in above[: at + 1]]
    if above and is_orphan(process, above[0]):
        return [_gone]
    # A Python parent may be the user's program that starts ranks by the launcher's functions; a shell is no launcher.
    return [_lives(above[0])] if above and _runs_python(above[0]) else []


def _lives(process: psutil.Process) -> Lives:
    """A function that returns whether ``process`` is still running. A zombie does not count as running."""
    pid, birth = process.pid, birth_of(process.pid)
    return lambda: birth is not None and not has_ended(pid, birth)


def _gone() -> bool:
    return False


def _is_agent(process: psutil.Process) -> bool:
    return _runs_python(process) and any(
        _name(word) in {"torchrun", "accelerate"} or "torch.distributed." in word or "torch/distributed/" in word
        for word in _words(process)
    )


def _is_launch(process: psutil.Process) -> bool:
    return any("deepspeed.launcher.launch" in word or "deepspeed/launcher/launch" in word for word in _words(process))


def _is_runner(process: psutil.Process) -> bool:
    return _runs_python(process) and any(
        _name(word) in {"deepspeed", "deepspeed.pt", "ds"}
        or "deepspeed.launcher.runner" in word
        or "deepspeed/launcher/runner" in word
        for word in _words(process)
    )


def _runs_python(process: psutil.Process) -> bool:
    words = _words(process)
    return bool(words) and _name(words[0]).startswith(("python", "pypy"))


def _words(process: psutil.Process) -> list[str]:
    """The words of a process's command line; empty if we may not read them, or the process has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _name(word: str) -> str:
    return word.rpartition("/")[2]
