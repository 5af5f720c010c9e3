"""The prompts that the arguments give: in a flag, in a file, or on standard input."""

import os
import stat
import sys
import threading
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

from scalegpt.cli.output import note
from scalegpt.errors import InputError
from scalegpt.storage import TEXT_LIMIT, read_text
from scalegpt.structured import parse_json

PATIENCE_SECONDS = 3.0
"""If standard input has not ended after this many seconds, a note says that the prompt is read from it."""

FLAGS = ("prompt", "prompt_file", "prompts_file")
"""The flags that give prompts; at most one of them is given."""

STANDARD_INPUT = "-"
JSON_LINES = (".jsonl", ".ndjson")


def check_flags(arguments: Namespace) -> None:
    """Refuse flags that exclude each other.

    Raises:
        InputError: two flags give prompts; or ``--interactive`` is given together with prompts or ``--json``.
    """
    given = [flag for flag in FLAGS if getattr(arguments, flag) is not None]
    if arguments.interactive:
        given += ["interactive", *(["json"] if arguments.json else [])]
    if len(given) > 1:
        raise InputError(f"give --{given[0]} or --{given[1]}, not both")


def is_interactive(arguments: Namespace) -> bool:
    """Whether to ask for prompts: with ``--interactive``, or on a terminal if no flag gives a prompt or asks for JSON."""
    is_asked = arguments.json or any(getattr(arguments, flag) is not None for flag in FLAGS)
    return arguments.interactive or (not is_asked and _is_terminal(sys.stdin) and _is_terminal(sys.stdout))


def read_prompts(arguments: Namespace) -> list[str] | None:
    """The texts to continue, one empty text if no prompt is given; None if they are on standard input.

    A prompt is on standard input if a flag is ``-``, or if no flag gives a prompt and standard input is a pipe or a file.

    Raises:
        InputError: the file cannot be read, or holds no prompts.
    """
    values = [getattr(arguments, flag) for flag in FLAGS]
    if STANDARD_INPUT in values or (values == [None, None, None] and _is_fed()):
        return None
    if arguments.prompts_file is not None:
        return split_prompts(_read("prompts_file", arguments.prompts_file), f"prompts_file {arguments.prompts_file}")
    if arguments.prompt_file is not None:
        return [_read("prompt_file", arguments.prompt_file)]
    return [arguments.prompt or ""]


def prompts_on_standard_input(arguments: Namespace) -> list[str]:
    """The prompts on standard input: many with ``--prompts_file``, else one, without the newline that ``echo`` adds.

    Raises:
        InputError: standard input cannot be read, is too long, is not UTF-8, or holds no prompts.
    """
    text = _standard_input()
    if arguments.prompts_file is not None:
        return split_prompts(text, "standard input")
    return [text.removesuffix("\n")]


def split_prompts(text: str, name: str) -> list[str]:
    r"""The prompts in a text: one a line, or JSON Lines of objects with a text under ``prompt``. Blank lines are skipped.

    The text is JSON Lines if ``name`` ends in ``.jsonl`` or ``.ndjson``, or if the first line that is not blank is such an
    object.

    Raises:
        InputError: there is no prompt, or a line of JSON Lines is not such an object; the message calls the text
            ``name``.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{name} holds no prompt; write one a line")
    if not name.endswith(JSON_LINES) and not _begins_as_json_lines(lines[0][1]):
        return [line for _, line in lines]
    return [_prompt_of(line, f"{name}, line {number}") for number, line in lines]


def _begins_as_json_lines(line: str) -> bool:
    with suppress(InputError):
        return line.lstrip().startswith("{") and "prompt" in parse_json(line, "")
    return False


def _prompt_of(line: str, where: str) -> str:
    with suppress(InputError):
        values = parse_json(line, where)
        if isinstance(values, dict) and isinstance(values.get("prompt"), str):
            return str(values["prompt"])
    raise InputError(f'{where} is not a JSON object like {{"prompt": "Once upon a time"}}')


def _read(flag: str, file: str) -> str:
    try:
        return read_text(Path(file))
    except OSError as error:
        raise InputError(f"{flag} {file}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {file} is not UTF-8 at byte {error.start}; convert it") from None


def _is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; False if it is closed or missing."""
    try:
        return bool(stream.isatty())
    except (ValueError, AttributeError):
        return False


def _is_fed() -> bool:
    """Whether standard input is a pipe or a file; False for a terminal, for the null device, and if it is closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _standard_input() -> str:
    waiting = threading.Timer(
        PATIENCE_SECONDS,
        note,
        ["scalegpt sample: reading the prompt from standard input until its end; --prompt TEXT gives one instead"],
    )
    waiting.daemon = True
    waiting.start()
    try:
        content = sys.stdin.buffer.read(TEXT_LIMIT + 1)
    except OSError as error:
        raise InputError(f"standard input cannot be read: {error.strerror}; give --prompt TEXT") from None
    finally:
        waiting.cancel()
    if len(content) > TEXT_LIMIT:
        raise InputError(f"standard input has more than {TEXT_LIMIT:,} bytes; give a shorter prompt")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 at byte {error.start}; convert it") from None
    return text.replace("\r\n", "\n")
