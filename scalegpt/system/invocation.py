"""The command that starts training with this installation, ready to be pasted into a shell.

A checkout of the repository has ``launch/train.py``; an installed wheel has the module ``scalegpt.train`` instead. The
launchers are beside the interpreter, which need not be on ``PATH``.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

MODULE = "scalegpt.train"
"""The module that trains under every launcher, wherever the package is installed."""

LAUNCHER_MODULES = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}
"""Launcher → its module, for installations without its script."""


def train_command(launcher: str = "python", *options: str) -> str:
    """The command that starts training here, without the run's own flags.

    Args:
        launcher: ``python``, ``torchrun`` or ``deepspeed``.
        options: the launcher's own, such as ``"--nproc_per_node", "8"``.

    Returns:
        Such as ``.venv/bin/torchrun --nproc_per_node 8 launch/train.py``, quoted for a shell.
    """
    return shlex.join([*program(launcher), *options, *_target(launcher)])


def program(name: str) -> list[str]:
    """A program of this installation: its plain name where a shell finds the same program, else its path.

    Args:
        name: ``python``, ``scalegpt``, ``torchrun`` or ``deepspeed``.
    """
    python = Path(sys.executable)
    path = python if name == "python" else python.with_name(name)
    if name != "python" and not path.is_file():
        return [*program("python"), "-m", LAUNCHER_MODULES.get(name, name)]
    found = shutil.which(name)
    return [name] if found is not None and _is_beside(Path(found), path) else [_shown(path)]


def script() -> Path | None:
    """``launch/train.py`` of the checkout that this package belongs to; None for an installed wheel."""
    path = Path(__file__).resolve().parents[2] / "launch" / "train.py"
    return path if path.is_file() else None


def _target(launcher: str) -> list[str]:
    path = script()
    if path is not None:
        return [_shown(path)]
    return ["--module" if launcher == "deepspeed" else "-m", MODULE]


def _is_beside(one: Path, other: Path) -> bool:
    """Whether two programs are of the same installation. A virtual environment's interpreter is a link to another one."""
    return os.path.realpath(one.parent) == os.path.realpath(other.parent)


def _shown(path: Path) -> str:
    """A path as short as it can be written here: relative to the current folder where it lies below."""
    try:
        below = Path(os.path.abspath(path)).relative_to(Path.cwd())  # noqa: PTH100 - resolve() would follow .venv's links
    except (ValueError, OSError):
        return str(path)
    return str(below) if len(below.parts) > 1 else f"./{below}"  # a shell looks for a bare name on PATH
