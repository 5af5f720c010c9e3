"""Runs cases one after another in one process and reports what each did wrong; see ``run.py``."""

import ctypes
import json
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from fuzz import cases
from fuzz.cases import Case

SECONDS = float(os.environ.get("SCALEGPT_FUZZ_SECONDS", "60"))
"""The time limit of a case, on a busy machine."""

MEMORY = 2 << 30
"""Bytes that a case may use in addition to the libraries."""

LONGEST_LINE = 1000

Tree = dict[str, tuple[int, int, int]]


class TookTooLong(BaseException):
    """Not an ``Exception``, so that no command catches it."""


def tree(root: Path) -> Tree:
    """Everything below a folder: its kind and rights, size, and time of its last change."""
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - a name may be no text
            changed = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            found[os.path.relpath(os.path.join(folder, name), root)] = (status.st_mode, size, changed)  # noqa: PTH118
    return found


def execute(words: list[str]) -> tuple[int | str, str, str]:
    """Run a command in this process.

    Returns:
        Its exit status, or what it raised; and what it wrote to standard output and standard error.
    """
    from scalegpt.cli.main import main

    kept = os.dup(1), os.dup(2)
    outcome: int | str
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (TextIOWrapper(os.fdopen(os.dup(fd), "wb"), encoding="utf-8") for fd in (1, 2))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome = main(words)
        except SystemExit as ended:  # --help
            outcome = int(ended.code or 0) if isinstance(ended.code, int | None) else str(ended.code)
        except TookTooLong as late:
            outcome = str(late)
        except BaseException as error:
            outcome = f"main raised {error!r}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.close()
            for fd, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, fd)
                os.close(copy)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(1 << 24).decode("utf-8", "surrogateescape"))
    return outcome, texts[0], texts[1]


def faults(case: Case, outcome: int | str, out: str, err: str) -> list[str]:
    """What is wrong with how a command ended and with what it printed."""
    allowed = {0, 2, 3} | ({1} if case.may_fail else set())
    found = [] if outcome in allowed else [f"exit status {outcome}"]
    if "--debug" not in case.words:
        found += ["a traceback"] if "Traceback (most" in err else []
        found += _faults_of_lines(case, outcome, out, err.splitlines())
    found += ["a bug in ScaleGPT"] if "(a bug in ScaleGPT" in err else []
    # A training run may be too large for limit_memory; no other case needs that much.
    found += ["too much memory"] if "enough memory" in err and case.words[:1] != ["train"] else []
    found += ["control characters on standard error"] if _commands_a_terminal(err) else []
    found += ["control characters on standard output"] if not case.speaks_raw and _commands_a_terminal(out) else []
    return found


def _faults_of_lines(case: Case, outcome: int | str, out: str, lines: list[str]) -> list[str]:
    """What is wrong with the lines on standard error: a command that fails ends with its only line of error."""
    found = ["standard error has a line that is too long"] if any(len(line) > LONGEST_LINE for line in lines) else []
    errors = [line for line in lines if ": error: " in line]
    if outcome not in {1, 2} or _answers(case, outcome, out):
        return found + (["a line of error without a failure"] if errors else [])
    if len(errors) != 1 or errors[0] != lines[-1] or not errors[0].startswith("scalegpt"):
        found.append(f"{len(errors)} lines of error in {len(lines)}")
    if outcome == 2 and not all(line.startswith("scalegpt") for line in lines):
        found.append("a line that is not of the command")
    return found


def _answers(case: Case, outcome: int | str, out: str) -> bool:
    """Whether a command has exit status 1 or 2 with its answer: damage that ``verify`` finds, or the help of no words."""
    if outcome == 1:
        return case.words[:2] == ["checkpoint", "verify"] and bool(out)
    return len([word for word in case.words if word != "--debug"]) < 2 and out.startswith("scalegpt")


def _commands_a_terminal(text: str) -> bool:
    return any(c not in "\n\t\u200c\u200d" and unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"} for c in text)


def written(case: Case, outcome: int | str, before: Tree, after: Tree) -> list[str]:
    """Files that the command made, changed or removed without being asked to."""
    allowed = {"home/.triton", "home/.cache/torch"}
    if case.words and case.words[0] == "train":
        allowed |= {"here/cache", "here/runs/tiny/.lock", "here/runs/new/.lock"}
        allowed |= set() if outcome == 2 else {"here/runs"}
    made = {"here/runs/new"}  # a folder for the lock
    for target in _asked(case) if outcome != 2 else ():
        allowed.add(target)
        made |= {str(parent) for parent in Path(target).parents if str(parent) not in before}
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    extra = [path for path in changed if path not in made and not any(_is_below(path, each) for each in allowed)]
    return [f"wrote {', '.join(map(repr, extra[:4]))}"] if extra else []


def _asked(case: Case) -> Iterator[str]:
    """The paths that a command is asked to write, and what they link to, relative to the case's folder."""
    for flag, word in zip(case.words, [*case.words[1:], ""], strict=True):
        name, _, value = flag.partition("=")
        if name.replace("-", "_").replace("__", "--", 1) in case.writes:  # a flag may be spelled with either
            path = os.path.abspath(os.path.expanduser(value or word))  # noqa: PTH100, PTH111 - pathlib loses the ./ of ./~
            for target in (path, os.path.realpath(path)):
                yield os.path.relpath(target, Path.cwd().parent)


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


def run_case(base: Path, scratch: Path, seed: int, number: int) -> dict[str, Any]:
    """Run a case in its own folder and return its faults."""
    root = scratch / f"case_{number}"
    here = root / "here"

    root.mkdir()
    shutil.copytree(base, here, symlinks=True, copy_function=_copy)
    (root / "home").mkdir()
    (root / "home/text.txt").write_text("At home.\n" * 40)
    os.chdir(here)
    case = cases.draw(seed, number)
    os.environ.update(
        {"HOME": str(root / "home"), "SCALEGPT_CACHE": str(here / "cache"), "SCALEGPT_GPUS": "", **case.environment}
    )
    before = tree(root)
    outcome, out, err = execute(case.words)
    found = faults(case, outcome, out, err) + written(case, outcome, before, tree(root))
    os.chdir(scratch)
    if not found:
        remove(root)
    return {
        "number": number,
        "words": [word[:200] for word in case.words],
        "status": outcome,
        "faults": found,
        "err": err[-3000:],
        "out": out[-500:],
    }


def _copy(source: str, target: str) -> None:
    if stat.S_ISFIFO(os.lstat(source).st_mode):
        os.mkfifo(target)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def obey_rights() -> None:
    """Give up root's power to read and write everything, so that the rights of files hold in a container too."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call; this thread
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def remove(root: Path) -> None:
    """Delete a folder, including locked ones in it."""
    for folder, folders, _ in os.walk(root):
        for name in folders:
            path = os.path.join(folder, name)  # noqa: PTH118 - a name may be no text
            if not os.path.islink(path):  # noqa: PTH114
                os.chmod(path, 0o700)  # noqa: PTH101
    shutil.rmtree(root)


def limit_memory() -> None:
    """Limit the address space to :data:`MEMORY` more than the process uses with its libraries loaded."""
    import torch  # noqa: F401

    import scalegpt.training.run  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Read a line for each case and answer with one."""

    def late(*_: object) -> None:
        raise TookTooLong(f"took more than {SECONDS} s")

    base, scratch, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGALRM, late)
    limit_memory()
    obey_rights()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    numbers = os.fdopen(os.dup(0), encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a command that reads standard input finds its end
    for line in numbers:
        answer = run_case(base, scratch, seed, int(line))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
