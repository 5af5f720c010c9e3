"""The processes that started this one as a rank, found by its environment and its ancestors; without torch.

torchrun sets ``TORCHELASTIC_RUN_ID``, and its agent is above each rank. DeepSpeed's ``launch.py`` sets ``CROSS_SIZE``, the
number of machines; on one machine DeepSpeed's runner, which is the process that a user ends, is above ``launch.py``. Wrappers
may be between them.

A launcher that ended before we looked is no longer an ancestor: its children belong to the init process or to a subreaper.
:func:`is_orphan` distinguishes such a parent from a shell or a program that started us with a launcher's variables.
"""

import os
from collections.abc import Callable, Sequence

import psutil

from scalegpt.system.processes import birth_of, has_ended

TORCHRUN, DEEPSPEED = "TORCHELASTIC_RUN_ID", "CROSS_SIZE"
"""Variables that only these launchers set."""

REAPERS = frozenset(
    {"catatonit", "conmon", "containerd-shim", "docker-init", "dumb-init", "init", "slurmstepd", "systemd", "tini"}
)
"""Programs that adopt orphans."""

Lives = Callable[[], bool]


def under_launcher() -> bool:
    """Whether torchrun or DeepSpeed's ``launch.py`` has set this process's variables."""
    return TORCHRUN in os.environ or DEEPSPEED in os.environ


def launchers() -> list[Lives]:
    """A function for each process above us whose end must end us: whether it is running.

    Empty without a launcher, or where none is found. For a launcher that ended before we looked the function returns False.
    """
    if not under_launcher():
        return []
    try:
        me, above = psutil.Process(), _ancestors()
        if TORCHRUN in os.environ:
            return _watched(me, above, _is_agent)
        found = _watched(me, above, _is_launch)
        at = next((index for index, process in enumerate(above) if _is_launch(process)), None)
        if at is None or os.environ[DEEPSPEED] != "1":  # of several machines, only one has the runner
            return found
        return found + _watched(above[at], above[at + 1 :], _is_runner)
    except psutil.NoSuchProcess:  # it ended while we looked
        return [_gone]


def starter() -> psutil.Process:
    """The process that started all ranks of this machine: torchrun's agent, DeepSpeed's ``launch.py``, else our parent."""
    is_starter = _is_agent if TORCHRUN in os.environ else _is_launch
    above = _ancestors()
    return next((process for process in above if is_starter(process)), above[0] if above else psutil.Process())


def is_orphan(process: psutil.Process, parent: psutil.Process) -> bool:
    """Whether a parent that is not a launcher has adopted a process, rather than started it.

    It has where it is the init process, a known reaper, or of another session: a child starts in its parent's session.
    """
    if os.environ.get("SLURM_TASK_PID") == str(process.pid):
        return False  # slurmstepd, which is a reaper too, has started it itself
    if parent.pid == 1 or any(parent.name().startswith(name) for name in REAPERS):
        return True
    try:
        ours, theirs = os.getsid(process.pid), os.getsid(parent.pid)
    except OSError:  # of another user
        return False
    return ours not in (theirs, process.pid)  # a process with a session of its own, as torchrun's ranks, proves nothing


def _ancestors() -> list[psutil.Process]:
    """Parent, grandparent …, as far as they can be seen."""
    number = os.getppid()
    if number == 0:  # the first process of a container, or one that was started in it from outside
        return []
    parent = psutil.Process(number)
    try:
        return [parent, *parent.parents()]
    except psutil.AccessDenied:
        return [parent]


def _watched(
    process: psutil.Process, above: Sequence[psutil.Process], is_launcher: Callable[[psutil.Process], bool]
) -> list[Lives]:
    """The processes to watch above a process: its launcher and those between."""
    at = next((index for index, each in enumerate(above) if is_launcher(each)), None)
    if at is not None:
        return [_lives(each) for each in above[: at + 1]]
    if above and is_orphan(process, above[0]):
        return [_gone]
    # A program of the user's that starts ranks by the launcher's functions; a shell is not a launcher.
    return [_lives(above[0])] if above and _runs_python(above[0]) else []


def _lives(process: psutil.Process) -> Lives:
    """Whether it runs: the same process, and not a zombie."""
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
    """Its command line; empty where it is not visible to us, or has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _name(word: str) -> str:
    return word.rpartition("/")[2]
