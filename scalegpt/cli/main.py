"""``scalegpt COMMAND …``: runs the command, and turns an exception into one error line and an exit status."""

import importlib
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from scalegpt import __version__
from scalegpt.errors import InputError, RunError, nearest
from scalegpt.system.ranks import ranks_or_alone
from scalegpt.system.streams import open_missing
from scalegpt.text import shortened, shown, visible

Command = Callable[[list[str]], int]

COMMANDS = {
    "plan": "find the fastest way to train a model within the memory of any GPU",
    "params": "count a model's parameters, part by part",
    "presets": "list the presets, or compare two",
    "gpus": "list the known GPUs, or show one with its sources",
    "doctor": "check this machine: software, GPUs, disks, limits, ports",
    "data": "prepare text for training, or look at prepared tokens",
    "train": "train a GPT",
    "report": "write a page with the curves of one run, or of several runs in one chart",
    "import": "make a run from a Hugging Face folder",
    "checkpoint": "list, verify or show a run's checkpoints",
    "export": "write a trained model for transformers, llama.cpp and others",
    "eval": "score how well a trained model predicts a text",
    "sample": "continue a prompt with a trained model",
    "completion": "print the script that completes commands in your shell",
}
"""Command → its summary. A command is a module of this package with ``main(argv) -> int``, imported when it runs."""

ELSEWHERE = {"import": "exchange.import_", "export": "exchange.export"}
"""Command → its module, if the module's name differs from the command's."""

LONGEST_LINE, LONGEST_UNEXPECTED = 900, 500
"""The most characters of an error line, and of the message of an unexpected exception, that are printed."""

PACKAGE_OF = {
    "numpy": "numpy", "psutil": "psutil", "rich": "rich", "safetensors": "safetensors", "shtab": "shtab",
    "tiktoken": "tiktoken", "torch": "torch", "yaml": "pyyaml",
}  # fmt: skip
"""Module that a command needs → the package to install if the module is missing."""

SECONDS_FOR_THE_FIRST_RANK = 5
"""Seconds that a rank which prints no error waits before it exits.

A launcher ends all ranks as soon as one has exited, and the first rank must print its error before that.
"""

SIGPIPE_STATUS = 141
"""The exit status that a shell reports for a command that wrote to a closed pipe."""

EXAMPLE = """\
scalegpt: plans the memory of a GPT training run, then trains it

example:
  scalegpt plan --preset 150M_1024 --gpu rtx4090
  scalegpt train --preset tiny --tokenizer byte --vocab_size auto --input_file my_text.txt
  scalegpt sample runs/tiny --prompt "Once upon a time"

commands (each has --help):
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    open_missing()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].startswith(("--local_rank=", "--local-rank=")):
        words = words[1:]  # `deepspeed --module scalegpt train` puts this flag before the command
    for stream in (sys.stdout, sys.stderr):  # print ? for a character that the encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = _dispatch(words)
        sys.stdout.flush()  # raises BrokenPipeError here, not while Python exits, if the pipe's reader has ended
        return status
    except BrokenPipeError:  # the program that reads our output has ended, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SIGPIPE_STATUS
    except KeyboardInterrupt as error:
        _print_error(words, str(error) or "interrupted", 130)
        return 130
    except Exception as error:
        message, status = _message_and_status(error)
        _print_error(words, message, status)
        if "--debug" in words:
            sys.stderr.write(visible(traceback.format_exc()))
        return status


def _message_and_status(error: Exception) -> tuple[str, int]:
    """The message to print for an error, and the exit status of the command."""
    if isinstance(error, InputError | RunError):
        return str(error), error.exit_status
    if isinstance(error, OSError):  # about one of the user's files
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{place}{error.strerror or error}", InputError.exit_status
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGE_OF:
        package = PACKAGE_OF[error.name]
        return f"{package} is not installed; install it with pip install {package}", RunError.exit_status
    if isinstance(error, MemoryError):
        return "this machine does not have enough memory for this command", RunError.exit_status
    said = f"{type(error).__name__}: {error}"
    said = said if len(said) <= LONGEST_UNEXPECTED else f"{said[:LONGEST_UNEXPECTED]}…"
    return f"{said} (a bug in ScaleGPT; --debug shows the traceback)", RunError.exit_status


def run_and_exit(argv: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit status.

    The console script, ``python -m scalegpt``, ``launch/train.py`` and ``python -m scalegpt.train`` call this function.

    With several ranks, the process skips Python's finalization. During finalization, a communication library's native
    thread that waits for the GIL can abort a process that has succeeded ("terminate called without an active
    exception", exit status -6). The launcher would then report a failure.
    """
    status = main(argv)
    if ranks_or_alone().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(EXAMPLE + "\n".join(f"  {name:<12}{summary}" for name, summary in COMMANDS.items()))
        return 0 if words else 2
    if words[0] in {"-V", "--version"}:
        print(f"scalegpt {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise InputError(f"unknown command {shown(words[0])}{nearest(words[0], COMMANDS)}")
    return command(words[0])(words[1:])


def command(name: str) -> Command:
    """Import a command in :data:`COMMANDS`, and return its function, which takes arguments and returns an exit status."""
    function: Command = importlib.import_module(f"scalegpt.cli.{ELSEWHERE.get(name, name)}").main
    return function


def _print_error(words: Sequence[str], message: str, status: int) -> None:
    """Print an error as one line. Bad input is the same for all ranks, so only a machine's first rank reports bad input."""
    ranks = ranks_or_alone()
    if status == InputError.exit_status and ranks.local_rank:
        with suppress(KeyboardInterrupt):
            time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        return
    command = f"scalegpt {words[0]}" if words and words[0] in COMMANDS else "scalegpt"
    if ranks.rank:
        command += f": rank {ranks.rank}"
    line = shortened(visible(" ".join(message.split())), LONGEST_LINE)
    with suppress(OSError):  # the terminal may be closed; the exit status still reports the failure
        # A single write: launchers start Python unbuffered, where print writes twice, and lines of ranks would mix.
        sys.stderr.write(f"{command}: error: {line}\n")
        sys.stderr.flush()
