"""The command that starts training with this installation, ready to be pasted into a shell.

In a checkout of the repository it starts ``launch/train.py``, in an installation from a wheel the module
``scalegpt.train``. The launchers are in the interpreter's folder, which need not be on ``PATH``.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

MODULE = "scalegpt.train"
"""The module with which launchers start training. It exists in a wheel and in a checkout."""

IN_BROWSER = sys.platform == "emscripten"
"""Whether this is Python in a browser (Pyodide). A browser has no programs, so commands are then for another machine."""

LAUNCHER_MODULES = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}
"""Launcher → its Python module, for installations that lack the launcher's script."""


def train_command(launcher: str = "python", *options: str) -> str:
    """The command line that starts training with this installation, without the run's flags.

    Args:
        launcher: ``python``, ``torchrun`` or ``deepspeed``.
        options: the launcher's options, for example ``"--nproc_per_node", "8"``.

    Returns:
        The command, quoted for a shell, for example ``.venv/bin/torchrun --nproc_per_node 8 launch/train.py``.
    """
    return shlex.join([*program(launcher), *options, *script_words("--module" if launcher == "deepspeed" else "-m")])


def program(name: str) -> list[str]:
    """The words of the command line that start a program of this installation.

    This is the program's name in a browser, or if a shell finds the same program by that name. Otherwise it is the
    program's path, or if the program has no script, ``python -m`` and its module.

    Args:
        name: ``python``, ``scalegpt``, ``torchrun`` or ``deepspeed``.
    """
    if IN_BROWSER:
        return [name]
    python = Path(sys.executable)
    path = python if name == "python" else python.with_name(name)
    if name != "python" and not path.is_file():
        return [*program("python"), "-m", LAUNCHER_MODULES.get(name, name)]
    found = shutil.which(name)
    return [name] if found is not None and _is_beside(Path(found), path) else [_shown(path)]


def script() -> Path | None:
    """The path of ``launch/train.py`` in the checkout that this package belongs to; None for an installed wheel."""
    path = Path(__file__).resolve().parents[2] / "launch" / "train.py"
    return path if path.is_file() else None


def script_words(module_flag: str = "-m") -> list[str]:
    """The words that tell Python or a launcher what to run; ``module_flag`` is its flag for a module."""
    path = script()
    return [_shown(path)] if path is not None else [module_flag, MODULE]


def _is_beside(one: Path, other: Path) -> bool:
    """Whether two programs are in the same folder and therefore belong to the same installation.

    Symbolic links are resolved in the folders' paths, but the programs themselves are not resolved: in a virtual
    environment the interpreter is a link to an interpreter elsewhere.
    """
    return os.path.realpath(one.parent) == os.path.realpath(other.parent)


def _shown(path: Path) -> str:
    """A path in its shortest form: relative to the current folder if it is inside, else as given."""
    try:
        below = Path(os.path.abspath(path)).relative_to(Path.cwd())  # noqa: PTH100 - resolve() would follow .venv's links
    except (ValueError, OSError):
        return str(path)
    return str(below) if len(below.parts) > 1 else f"./{below}"  # a shell looks for a bare name on PATH
