"""``scalegpt sample``: continue a prompt with a trained model, printing the text as it is sampled."""

import io
import os
import stat
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from scalegpt.cli.output import note, show_json
from scalegpt.cli.parser import Parser, add_json, add_settings, given_settings, path_argument
from scalegpt.config.sampling import SamplingSettings
from scalegpt.config.settings import setting
from scalegpt.errors import InputError
from scalegpt.storage import TEXT_LIMIT, read_text
from scalegpt.text import visible

if TYPE_CHECKING:  # importing torch takes seconds; --help and a mistyped flag must not wait for it
    from scalegpt.inference.loaded import LoadedModel

EXAMPLE = """\
scalegpt sample runs/tiny --prompt "Once upon a time"
echo "Once upon a time" | scalegpt sample runs/tiny
scalegpt sample runs/tiny --prompt_file start.txt --temperature 0.8 --top_k 50 --num_samples 3
scalegpt sample runs/tiny/checkpoints/step_00001000 --temperature 0 --json"""

PATIENCE_SECONDS = 3.0
"""If standard input has not ended after this time, a note says that the prompt is read from it."""

SEPARATOR = "-" * 40


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplingSettings):
    """The settings of ``scalegpt sample``: how to draw tokens, the number of samples, and the device."""

    num_samples: int = setting(1, "number of samples; the seed increases by one with each", minimum=1, maximum=10**6)
    device: str = setting("auto", "where to compute; auto: CUDA if there is any", choices=("auto", "cpu", "cuda"))


@dataclass
class Totals:
    """The number of tokens drawn in all samples, and the seconds spent, including the forward pass of the prompt."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Drawn tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)


def main(argv: Sequence[str]) -> int:
    """Print the samples that the arguments ask for."""
    arguments = _parser().parse(argv)
    settings = SampleSettings.from_mapping(given_settings(arguments, SampleSettings), "command line")
    prompt = _prompt(arguments)

    from scalegpt.inference.load import load_model

    loaded = load_model(Path(arguments.run), settings.device)
    if prompt is None:  # read after loading, so that nobody types a prompt for a run that does not exist
        prompt = _standard_input()
    ids = loaded.prompt_ids(prompt)
    block = loaded.model.config.block_size
    if len(ids) > block:
        note(f"scalegpt sample: the prompt has {len(ids)} tokens; the model sees the last {block}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 must not end sampling
    totals = Totals()
    samples = (_pieces(loaded, ids, settings, number, totals) for number in range(settings.num_samples))
    if arguments.json:
        texts = ["".join(pieces) for pieces in samples]
        show_json({
            "run": arguments.run,
            "step": loaded.header.progress.step,
            "prompt": prompt,
            "seed": settings.seed,
            "samples": texts,
            "tokens": totals.tokens,
            "tokens_per_second": totals.tokens_per_second,
        })  # fmt: skip
        return 0
    _print_samples(prompt, samples)
    note(f"scalegpt sample: {totals.tokens} tokens, {totals.tokens_per_second:.1f} tokens/s")
    return 0


def _parser() -> Parser:
    parser = Parser("sample", "Continue a prompt with a trained model; the text appears as it is sampled.", EXAMPLE)
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="a run's folder, for its newest checkpoint, or a checkpoint's"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue; -: standard input; none: standard input if it is a pipe, else start a new text",
    )
    parser.add_argument(
        "--prompt_file", type=path_argument, metavar="FILE", help="UTF-8 file to continue instead; -: standard input"
    )
    add_json(parser, "print one JSON object at the end")
    add_settings(parser, "sampling", SampleSettings)
    return parser


def _prompt(arguments: Namespace) -> str | None:
    """The text to continue: empty if no prompt is given, None if the prompt is on standard input.

    The prompt is on standard input if ``--prompt`` or ``--prompt_file`` is ``-``, or if neither flag is given and
    standard input is a pipe or a file.

    Raises:
        InputError: both flags are given, or the file cannot be read.
    """
    text, file = arguments.prompt, arguments.prompt_file
    if text is not None and file is not None:
        raise InputError("give --prompt or --prompt_file, not both")
    if "-" in (text, file) or (text is None and file is None and _is_fed()):
        return None
    if file is None:
        return text or ""
    try:
        return read_text(Path(file))
    except OSError as error:
        raise InputError(f"prompt_file {file}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"prompt_file {file} is not UTF-8 at byte {error.start}; convert it") from None


def _is_fed() -> bool:
    """Whether standard input is a pipe or a file; False for a terminal, for the null device, and if it is closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _standard_input() -> str:
    """The text on standard input, without a newline at its end, since ``echo`` adds one.

    Raises:
        InputError: standard input cannot be read, is too long, or is not UTF-8.
    """
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
    return text.replace("\r\n", "\n").removesuffix("\n")


def _pieces(
    loaded: "LoadedModel", ids: list[int], settings: SampleSettings, number: int, totals: Totals
) -> Iterator[str]:
    """Yield the text of one sample in pieces of whole characters, and add its tokens and seconds to ``totals``."""
    start = time.perf_counter()

    def counted() -> Iterator[int]:
        for token in loaded.draw(ids, replace(settings, seed=settings.seed + number)):
            totals.tokens += 1
            yield token

    yield from loaded.decode(counted())
    totals.seconds += time.perf_counter() - start


def _print_samples(prompt: str, samples: Iterator[Iterator[str]]) -> None:
    """Print each sample after the prompt, piece by piece; on a terminal, control characters are escaped."""
    shown = visible if sys.stdout.isatty() else str
    for number, pieces in enumerate(samples):
        if number:
            print(SEPARATOR)
        print(shown(prompt), end="", flush=True)
        for piece in filter(None, pieces):
            print(shown(piece), end="", flush=True)
        print(flush=True)
