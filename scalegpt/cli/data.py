"""``scalegpt data``: prepare text for training, show prepared tokens, or show which tokens a run trained on."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalegpt.cli.output import ProgressLine, aligned, show, show_json, show_row
from scalegpt.cli.parser import Parser, add_json, add_settings, given_settings, path_argument, run_action
from scalegpt.config import DataConfig
from scalegpt.config.run import READING
from scalegpt.config.settings import Section, setting, steps_of
from scalegpt.errors import InputError
from scalegpt.inputs import as_text
from scalegpt.structured import read_lines
from scalegpt.text import one_line
from scalegpt.units import human_count, human_time

if TYPE_CHECKING:
    from scalegpt.data.windows.ledger import Window

OVERVIEW = """\
scalegpt data: text to tokens

example:
  scalegpt data prepare book.txt src/ --out tokens
  scalegpt data inspect tokens

actions (each has --help):
  prepare          tokenise text files and folders into a folder of tokens
  inspect          show what token files or texts hold, and check them
  ledger           show which windows of the data a run's steps trained on
  train-tokenizer  make a tokenizer of your own text
"""

_PREPARED = ("tokenizer", "end_of_text", "val_fraction", "deduplicate", "shard_tokens", "workers", *READING)
"""The settings that are flags of ``data prepare``: which tokens are made from which files, and how."""

LEDGER, METRICS = "data_ledger.jsonl", "metrics.jsonl"


def main(argv: Sequence[str]) -> int:
    """Run the action that the first word names; return the exit status.

    Raises:
        InputError: an action or a flag is unknown, or the data cannot be used.
    """
    actions = {"prepare": _prepare, "inspect": _inspect, "ledger": _ledger, "train-tokenizer": _train_tokenizer}
    return run_action(argv, OVERVIEW, actions)


def _prepare(words: list[str]) -> int:
    parser = Parser(
        "data prepare",
        "Tokenise text and code into a folder that the trainer reads (--input_file DIR).",
        "scalegpt data prepare book.txt --out tokens\n"
        "scalegpt data prepare src/ docs/ --out tokens --tokenizer byte --val_fraction 0.05\n"
        "scalegpt data prepare dump/ --out tokens --deduplicate true --shard_tokens 100_000_000",
    )
    parser.add_argument("input", nargs="+", type=path_argument, metavar="INPUT", help="text files and folders of them")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder to make")
    add_settings(parser, "tokens", DataConfig, _PREPARED)
    add_json(parser)
    arguments = parser.parse(words)
    settings = DataConfig.from_mapping(given_settings(arguments, DataConfig), "command line")
    from scalegpt.data.inspection import describe
    from scalegpt.data.prepare import prepare

    with _progress("tokenising") as progress:
        tokens = prepare(arguments.input, arguments.out, settings, progress=progress)
    _print(describe(tokens), as_json=arguments.json)
    return 0


@dataclass(frozen=True, kw_only=True)
class VocabularySettings(Section):
    """The setting of ``data train-tokenizer``."""

    vocab: int = setting(
        8192, "number of tokens, with the 256 bytes and the end of text", minimum=257, maximum=1_000_000
    )


def _train_tokenizer(words: list[str]) -> int:
    parser = Parser(
        "data train-tokenizer",
        "Train a byte-level BPE on text, and write tokenizer.json and tokenizer_config.json (--tokenizer DIR).",
        "scalegpt data train-tokenizer --input_file book.txt --vocab 8192 --out tok\n"
        "scalegpt data prepare book.txt --tokenizer tok --out tokens",
    )
    parser.add_argument(
        "--input_file",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files and folders of them",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder to make")
    add_settings(parser, "tokenizer", VocabularySettings)
    add_settings(parser, "text", DataConfig, READING)
    add_json(parser)
    arguments = parser.parse(words)
    vocabulary = VocabularySettings.from_mapping(given_settings(arguments, VocabularySettings), "command line")
    settings = DataConfig.from_mapping(
        {key: getattr(arguments, key) for key in READING if key in arguments}, "command line"
    )
    from scalegpt.data.prepare import split_inputs
    from scalegpt.data.tokenizer_training import train_tokenizer

    inputs = split_inputs(as_text(arguments.input_file))
    with _progress("counting words") as progress:
        made = train_tokenizer(inputs, arguments.out, vocabulary.vocab, settings, progress=progress)
    facts = {
        "folder": arguments.out,
        "vocab_size": made.vocab_size,
        "end_of_text": made.end_token,
        "digest": made.digest,
    }
    if arguments.json:
        show_json(facts)
    else:
        show(f"{arguments.out}: byte-level BPE of {made.vocab_size:,} tokens; use it with --tokenizer {arguments.out}")
    return 0


def _inspect(words: list[str]) -> int:
    parser = Parser(
        "data inspect",
        "Show what a path holds: tokens of ScaleGPT, nanoGPT, llm.c, Megatron or datatrove, whose ids are checked, or text.",
        "scalegpt data inspect tokens\nscalegpt data inspect my_text_document.bin --tokenizer my_tokenizer",
    )
    parser.add_argument(
        "folder", type=path_argument, metavar="PATH", help="a file, a folder, or a prefix of Megatron's"
    )
    tokenizer = ("tokenizer", "end_of_text")
    add_settings(parser, "tokens of another program", DataConfig, tokenizer, {"tokenizer": "as the files say"})
    add_settings(parser, "text", DataConfig, READING)
    add_json(parser)
    arguments = parser.parse(words)
    given = given_settings(arguments, DataConfig)
    settings = DataConfig.from_mapping(given, "command line")
    from scalegpt.data.inspection import inspect_text, inspect_tokens
    from scalegpt.data.remote.download import local_path
    from scalegpt.data.text.documents import is_prepared

    with _progress("checking") as progress:
        path = local_path(arguments.folder, progress)
        if is_prepared(path):
            facts = inspect_tokens(path, settings, named="tokenizer" in given, progress=progress)
        else:
            facts = inspect_text(arguments.folder, settings)
    if arguments.json:
        show_json(facts)
    elif "forms" in facts:
        _print_text(facts)
    else:
        _print(facts, as_json=False)
    if facts.get("ids_outside_vocabulary"):
        raise InputError(
            f"{one_line(arguments.folder)} has {facts['ids_outside_vocabulary']:,} ids outside the vocabulary of "
            f"{facts['vocab_size']:,}; name the tokenizer that made them, or prepare the data again"
        )
    return 0


def _print_text(facts: dict[str, Any]) -> None:
    rows = {
        "path": facts["folder"],
        "format": ", ".join(f"{count:,} × {form}" for form, count in facts["forms"].items()),
        "documents": f"{facts['documents']:,}",
        "size": f"{facts['bytes'] / 1e6:,.3f} MB, of text {facts['text_bytes'] / 1e6:,.3f} MB",
        "read as": ", ".join(facts["encodings"]),
        "skipped": ", ".join(f"{count} {reason}" for reason, count in facts["skipped"].items()),
        "begins": repr(facts["text"]),
    }
    for name, value in rows.items():
        if value:
            show_row(f"{name:<17}", value)


def _print(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(facts)
        return
    total = facts["train_tokens"] + facts["val_tokens"]
    split = facts.get("split") or {}
    how = {"documents": "whole documents", "tails": "the end of each document"}.get(str(split.get("method")), "")
    rows = {
        "folder": facts["folder"],
        "format": facts.get("format", ""),
        "tokenizer": _tokenizer(facts),
        "training": f"{facts['train_tokens']:,} tokens",
        "stored as": ", ".join(sorted({each["dtype"] for each in facts.get("files", [])})) or facts["dtype"],
        "held out": f"{facts['val_tokens']:,} tokens, {facts['val_tokens'] / total:.1%}{': ' + how if how else ''}"
        if facts["val_tokens"]
        else "",
        "read as": facts.get("origin", ""),
        "files": f"{len(facts['files']):,}" if "files" in facts else "",
        "documents": "" if facts.get("documents") is None else f"{facts['documents']:,}",
        "duplicates": f"{facts['duplicates']:,} documents left out" if facts.get("duplicates") else "",
        "sources": _sources(facts) if "sources" in facts and "origin" not in facts else "",
        "skipped": ", ".join(f"{count} {reason}" for reason, count in facts.get("skipped", {}).items()),
        "digest": facts.get("digest", ""),
        "ids": _ids(facts) if "largest_id" in facts else "",
        "checked": "sizes, contents, every id" if facts.get("checked") else "",
        "training begins": repr(facts["train_text"]) if "train_text" in facts else "",
        "held out begins": repr(facts["val_text"]) if "val_text" in facts else "",
    }
    for name, value in rows.items():
        if value:
            show_row(f"{name:<17}", value)


def _tokenizer(facts: dict[str, Any]) -> str:
    if "tokenizer" not in facts:
        made_with = facts["made_with"]
        return f"{made_with!r}; give it with --tokenizer" if made_with else "unknown; give it with --tokenizer"
    padded = f" (padded {facts['padded_vocab_size']:,})" if facts["padded_vocab_size"] != facts["vocab_size"] else ""
    return f"{facts['tokenizer']}, vocabulary {facts['vocab_size']:,}{padded}"


def _ids(facts: dict[str, Any]) -> str:
    outside, ends = facts["ids_outside_vocabulary"], facts["end_of_text_tokens"]
    return (
        f"{facts['smallest_id']:,} to {facts['largest_id']:,}"
        + ("" if outside is None else f", {outside:,} outside the vocabulary")
        + ("" if ends is None else f", {ends:,} end a document")
    )


def _sources(facts: dict[str, Any]) -> str:
    sources = facts["sources"]
    if not sources:
        return "unknown"
    size = sum(source["bytes"] for source in sources) if facts["bytes"] is None else facts["bytes"]
    name = sources[0]["path"] if len(sources) == 1 else f"{facts['documents'] or len(sources):,} documents"
    return ", ".join([name, f"{size / 1e6:,.3f} MB", *facts["encodings"]])


@contextmanager
def _progress(doing: str) -> Iterator["_ProgressLine | None"]:
    """A progress line while the block runs, if standard error is a terminal."""
    line = _ProgressLine(doing) if sys.stderr.isatty() else None
    try:
        yield line
    finally:
        if line is not None:
            line.clear()


class _ProgressLine(ProgressLine):
    """Shows how much of a text is done, how fast, and the time left. Call it with bytes done, total bytes and tokens made."""

    def __init__(self, doing: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._doing = doing
        self._start: tuple[float, int, int] | None = None  # of an interrupted preparation a part is done from the start

    def __call__(self, done: int, total: int, tokens: int = 0) -> None:
        if (seconds := self.due(is_last=done >= total)) is None:
            return
        began, done_before, tokens_before = self._start = self._start or (seconds, done, tokens)
        parts = [f"{self._doing} {done / max(total, 1):4.0%}", f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB"]
        if seconds > began and done > done_before:
            rate = (done - done_before) / (seconds - began)
            parts.append(f"{rate / 1e6:.1f} MB/s")
            if tokens:
                parts.append(f"{human_count((tokens - tokens_before) / (seconds - began))} tokens/s")
            if done < total:
                parts.append(f"{human_time((total - done) / rate)} left")
        self.show("  ".join(parts))


# --- ledger ----------------------------------------------------------------------------------------------------------


def _ledger(words: list[str]) -> int:
    parser = Parser(
        "data ledger",
        "Show which windows of the data each optimizer step of a run trained on.",
        "scalegpt data ledger runs/tiny --steps 100:102\nscalegpt data ledger runs/tiny --steps 250 --json",
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--steps", required=True, metavar="A[:B]", help="steps A to B inclusive, as numbered in metrics.jsonl"
    )
    add_json(parser, "print one JSON object for each step")
    arguments = parser.parse(words)
    folder = Path(arguments.run)
    first, last = steps_of(arguments.steps, "steps")
    taken = _steps_taken(folder)
    if last > taken:
        rest = f"{taken:,} steps; ask for at most step {taken}" if taken else "no step yet; train it first"
        raise InputError(f"steps {arguments.steps}: {folder} has taken {rest}")
    from scalegpt.data.windows.ledger import Ledger

    steps = Ledger(folder / LEDGER).windows(range(first, last + 1))
    for line in _json_lines(steps) if arguments.json else _windows_table(steps):
        show(line)
    return 0


def _steps_taken(folder: Path) -> int:
    """The number of the last step in a run's metrics; 0 before the first step.

    Raises:
        InputError: the folder is not a run, or its metrics cannot be read.
    """
    try:
        steps = [values.get("step") for _, values in deque(read_lines(folder / METRICS), maxlen=1)]
    except FileNotFoundError:
        from scalegpt.training.runs.find import check_run  # imported here, since it imports torch, which takes seconds

        check_run(folder)
        raise InputError(
            f"{folder / METRICS} is missing, so the number of steps is unknown; restore it from a backup"
        ) from None
    return next((step for step in steps if type(step) is int), 0)


def _json_lines(steps: Iterator[tuple[int, "list[Window]"]]) -> Iterator[str]:
    for step, windows in steps:
        yield json.dumps({"step": step, "windows": [asdict(window) for window in windows]})


def _windows_table(steps: Iterator[tuple[int, "list[Window]"]]) -> Iterator[str]:
    """A table for each step. A file that all windows of a step begin in is named above it, several files in the rows."""
    files: set[str] = set()
    for step, windows in steps:
        before, files = files, {each.file for each in windows}
        if len(files) == 1 and files != before:
            yield f"{windows[0].file}; offsets and lengths in tokens"
        rows = [[str(step), str(each.order), str(each.number), str(each.offset), str(each.length)] for each in windows]
        head = ["step", "order", "window", "offset", "length"]
        if len(files) > 1:
            head += ["source", "file"]
            rows = [[*row, each.source, each.file] for row, each in zip(rows, windows, strict=True)]
        yield aligned([head, *rows], right=range(5))
