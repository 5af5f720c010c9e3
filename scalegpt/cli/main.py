"""``scalegpt COMMAND …``: finds the command, runs it, and turns what it raises into a line and an exit status."""

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from scalegpt import __version__
from scalegpt.errors import InputError, RunError, nearest
from scalegpt.system.ranks import ranks_or_alone
from scalegpt.system.streams import open_missing
from scalegpt.text import shortened, shown, visible

COMMANDS = {
    "plan": "choose the fastest way to train that fits, on any GPU",
    "params": "count a model's parameters, part by part",
    "presets": "list the presets, or compare two",
    "gpus": "list the GPUs that are known, or show one with its sources",
    "data": "prepare text for training, or look at prepared tokens",
    "train": "train a GPT",
    "checkpoint": "list, verify or show a run's checkpoints, or take their weights out",
    "sample": "continue a prompt with a trained model",
}
"""Command → what it does. Each is a module of this package with ``main(argv) -> int``, imported only when it is named."""

_LONGEST_LINE = 900
"""Characters of an error: a terminal shows it whole."""

SIGPIPE_STATUS = 141
"""What a shell gives a command that was ended by writing to a closed pipe."""

LONGEST = 500
"""Characters of an unexpected error's message that are shown: a library may have put pages into it."""

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
        words = words[1:]  # `deepspeed --module scalegpt train` puts it before the command
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode shows ? where it must, and no traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        status = _dispatch(words)
        sys.stdout.flush()  # a reader that has gone is noticed here, not while Python exits
        return status
    except (InputError, RunError) as error:
        _complain(words, str(error), error.exit_status)
        _show_traceback(words)
        return error.exit_status
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does: nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SIGPIPE_STATUS
    except KeyboardInterrupt:
        _complain(words, "interrupted", 130)
        return 130
    except OSError as error:  # of the user's files; a run that trains says itself what became of it
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        _complain(words, f"{place}{error.strerror or error}", InputError.exit_status)
        _show_traceback(words)
        return InputError.exit_status
    except MemoryError:
        _complain(words, "this machine has not enough memory for it", RunError.exit_status)
        _show_traceback(words)
        return RunError.exit_status
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        said = said if len(said) <= LONGEST else f"{said[:LONGEST]}…"
        _complain(words, f"{said} (an error of ours; --debug shows where)", 1)
        _show_traceback(words)
        return 1


def run_and_exit(argv: Sequence[str] | None = None) -> None:
    """Run a command as a process of its own: the console script, ``launch/train.py`` and ``scalegpt.train``.

    A rank of several ends without Python's finalization: there, a native thread of the communication libraries that asks
    for the interpreter's lock is ended by force, which now and then aborts a process that has done all its work ("terminate
    called without an active exception", exit status -6), and its launcher then reports a failure.
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
    status: int = importlib.import_module(f"scalegpt.cli.{words[0]}").main(words[1:])
    return status


def _complain(words: Sequence[str], message: str, status: int) -> None:
    """Print one line; of several ranks on a machine that fail alike over bad input, only the first speaks."""
    ranks = ranks_or_alone()
    if status == InputError.exit_status and ranks.local_rank:
        return
    command = f"scalegpt {words[0]}" if words and words[0] in COMMANDS else "scalegpt"
    if ranks.rank:
        command += f": rank {ranks.rank}"
    line = shortened(visible(" ".join(message.split())), _LONGEST_LINE)
    with suppress(OSError):  # a terminal that was closed: the status still tells
        # One write with its end: print makes two where Python is unbuffered, as launchers start it, and ranks' lines mix.
        sys.stderr.write(f"{command}: error: {line}\n")
        sys.stderr.flush()


def _show_traceback(words: Sequence[str]) -> None:
    if "--debug" in words:
        sys.stderr.write(visible(traceback.format_exc()))
