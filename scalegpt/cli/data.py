"""``scalegpt data``: prepare text for training, or look at prepared tokens."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from scalegpt.cli.output import show_json, show_row
from scalegpt.cli.parser import Parser, path_argument
from scalegpt.config import DataConfig
from scalegpt.config.run import TOKENIZERS
from scalegpt.errors import InputError, nearest

if TYPE_CHECKING:
    from scalegpt.data.shards import TokenSet

OVERVIEW = """\
scalegpt data: text to tokens

example:
  scalegpt data prepare book.txt src/ --out tokens
  scalegpt data inspect tokens

actions (each has --help):
  prepare   tokenise text files and folders into a folder of tokens
  inspect   show what a folder of tokens holds, and check it
  ledger    show which windows of the data a run's steps consumed
"""

_PREVIEW_TOKENS = 60
_CHOICES = ("as_text", "follow_links")


def main(argv: Sequence[str]) -> int:
    """Run ``prepare``, ``inspect`` or ``ledger``; return the exit status.

    Raises:
        InputError: an unknown action or flag, or data that cannot be used.

    """
    words = list(argv)
    actions = {"prepare": _prepare, "inspect": _inspect, "ledger": _ledger}
    if not words or words[0] in {"-h", "--help"}:
        print(OVERVIEW, end="")
        return 0 if words else 2
    if words[0] not in actions:
        raise InputError(f"unknown action {words[0]!r}{nearest(words[0], actions)}")
    return actions[words[0]](words[1:])


def _prepare(words: list[str]) -> int:
    parser = Parser(
        "data prepare",
        "tokenise text and code into a folder that the trainer reads (--input_file DIR)",
        "scalegpt data prepare book.txt --out tokens\n"
        "scalegpt data prepare src/ docs/ --out tokens --tokenizer byte --val_fraction 0.05",
    )
    keys = DataConfig.settings()
    parser.add_argument("input", nargs="+", type=path_argument, metavar="INPUT", help="text files and folders of them")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--tokenizer", default="gpt2", metavar="|".join(TOKENIZERS), help="[gpt2]")
    parser.add_argument("--encoding", default="utf-8", metavar="E", help=f"{keys['encoding'].metadata['help']} [utf-8]")
    parser.add_argument("--val_fraction", metavar="X", help=keys["val_fraction"].metadata["help"])
    for key in _CHOICES:
        parser.add_argument(
            f"--{key}", default="false", metavar="true|false", help=f"{keys[key].metadata['help']} [false]"
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse(words)
    settings = DataConfig.from_mapping(
        {key: getattr(arguments, key) for key in ("tokenizer", "encoding", "val_fraction", *_CHOICES)}, "command line"
    )
    from scalegpt.data.prepare import prepare

    progress = _ProgressLine() if sys.stderr.isatty() else None
    try:
        tokens = prepare(
            arguments.input,
            arguments.out,
            tokenizer=settings.tokenizer,
            encoding=settings.encoding,
            val_fraction=settings.val_fraction,
            as_text=settings.as_text,
            follow_links=settings.follow_links,
            progress=progress,
        )
    finally:
        if progress is not None:
            progress.clear()
    _print(describe(tokens), as_json=arguments.json)
    return 0


def _inspect(words: list[str]) -> int:
    parser = Parser(
        "data inspect", "show what a folder of tokens holds, and check every id", "scalegpt data inspect tokens"
    )
    parser.add_argument("folder", type=path_argument, metavar="DIR", help="made by scalegpt data prepare, or nanoGPT's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse(words)
    from scalegpt.data.shards import open_tokens

    tokens = open_tokens(arguments.folder)
    tokens.check_contents()
    tokens.check_vocabulary(tokens.tokenizer.vocab_size)
    _print({**describe(tokens), "checked": True, **_previews(tokens)}, as_json=arguments.json)
    return 0


def _ledger(words: list[str]) -> int:
    from scalegpt.cli.data_ledger import main as ledger

    return ledger(words)


def describe(tokens: "TokenSet") -> dict[str, Any]:
    """Gather what both actions show."""
    meta, tokenizer = tokens.meta, tokens.tokenizer
    return {
        "folder": str(tokens.path),
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": tokenizer.padded_vocab_size,
        "train_tokens": len(tokens.train),
        "val_tokens": len(tokens.val),
        "documents": meta.get("documents"),
        "split": meta.get("split"),
        "encoding": meta.get("encoding"),
        "encodings": tokens.encodings,
        "skipped": tokens.skipped,
        "bytes": meta.get("bytes"),
        "sources": meta.get("sources", []),
        "digest": tokens.digest,
    }


def _previews(tokens: "TokenSet") -> dict[str, str]:
    parts = {"train": tokens.train, "val": tokens.val}
    return {f"{split}_text": tokens.tokenizer.decode(part[:_PREVIEW_TOKENS]) for split, part in parts.items()}


def _print(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(facts)
        return
    total = facts["train_tokens"] + facts["val_tokens"]
    split = facts["split"] or {}
    how = {"documents": "whole documents", "tails": "the end of each document"}.get(str(split.get("method")), "")
    rows = {
        "folder": facts["folder"],
        "tokenizer": f"{facts['tokenizer']}, vocabulary {facts['vocab_size']:,}"
        + (f" (padded {facts['padded_vocab_size']:,})" if facts["padded_vocab_size"] != facts["vocab_size"] else ""),
        "training": f"{facts['train_tokens']:,} tokens",
        "held out": f"{facts['val_tokens']:,} tokens, {facts['val_tokens'] / total:.1%}{': ' + how if how else ''}",
        "sources": _sources(facts),
        "skipped": ", ".join(f"{count} {reason}" for reason, count in facts["skipped"].items()),
        "digest": facts["digest"],
        "checked": "sizes, contents, every id" if facts.get("checked") else "",
        "training begins": repr(facts["train_text"]) if "train_text" in facts else "",
        "held out begins": repr(facts["val_text"]) if "val_text" in facts else "",
    }
    for name, value in rows.items():
        if value:
            show_row(f"{name:<17}", value)


def _sources(facts: dict[str, Any]) -> str:
    sources = facts["sources"]
    if not sources:
        return "unknown"
    size = sum(source["bytes"] for source in sources) if facts["bytes"] is None else facts["bytes"]
    name = sources[0]["path"] if len(sources) == 1 else f"{facts['documents'] or len(sources):,} documents"
    return ", ".join([name, f"{size / 1e6:,.3f} MB", *facts["encodings"]])


class _ProgressLine:
    """One line on a terminal, rewritten at most ten times a second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began, self._next = clock, clock(), 0.0

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if now < self._next and done < total:
            return
        self._next = now + 0.1
        rate = done / 1e6 / max(now - self._began, 1e-9)
        line = f"tokenising {done / max(total, 1):4.0%}  {done / 1e6:,.1f} of {total / 1e6:,.1f} MB  {rate:.1f} MB/s"
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the terminal as it was."""
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
