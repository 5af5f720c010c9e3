"""Open token files of other programs as a :class:`~scalegpt.data.shards.TokenSet`, without copying a token."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scalegpt.config.tokenizer import is_file
from scalegpt.data.foreign.found import Found, TokensOfFile
from scalegpt.data.shards import TokenSet
from scalegpt.data.stored import Part
from scalegpt.data.token_file import TokenFile, opened
from scalegpt.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from scalegpt.errors import InputError
from scalegpt.text import one_line, shown

VAL_FRACTION, MOST_VAL_TOKENS = 0.1, 2_000_000
"""Held out of files without a held-out part: this share of the tokens, but at most this number."""


def tokenizer_setting(found: Found, asked: str | None) -> str:
    """The setting ``tokenizer`` of tokens of another program: the one that the user named, or else that of the files.

    Args:
        found: the files.
        asked: the user's setting; None: the user gave none.

    Raises:
        InputError: neither the user nor the files say which tokenizer made the tokens.
    """
    if asked is not None:
        return asked
    if found.tokenizer is not None:
        return found.tokenizer
    says = (
        "do not say which tokenizer made them" if found.made_with is None else f"were made by {shown(found.made_with)}"
    )
    raise InputError(
        f"{one_line(found.path)} holds tokens of {found.format}, which {says}; give it with --tokenizer, such as the path of "
        "its tokenizer.json"
    )


def open_found(found: Found, tokenizer: Tokenizer, val_fraction: float | None = None) -> TokenSet:
    """Open the files of another program as training and held-out tokens.

    Where the files have no held-out part, the last tokens are held out, from the start of a document on where the files say
    where documents begin.

    Args:
        found: the files.
        tokenizer: the tokenizer that made the tokens.
        val_fraction: the share of tokens to hold out; None: :data:`VAL_FRACTION`, but at most :data:`MOST_VAL_TOKENS`.

    Raises:
        InputError: the tokens are too few to hold some out.
        UnreadableTokensError: a file cannot be read.
    """
    if found.held_out:
        train, val = ([each.part for each in files] for files in (found.files, found.held_out))
        how = f"{_files(len(val))} with val in the name held out"
    else:
        cut = _cut(found, val_fraction)
        train, val = _parts(found.files, 0, cut.first), _parts(found.files, cut.first, cut.total)
        at = (
            "from a document's start on"
            if cut.is_bound
            else "cut inside a document"
            if cut.knows
            else "by number of tokens"
        )
        how = f"the last {cut.total - cut.first:,} tokens held out, {at}"
    files = {"train": _opened(found.path, train), "val": _opened(found.path, val)}
    checks = tuple(each.check for each in (*found.files, *found.held_out) if each.check is not None)
    count = len(found.files) + len(found.held_out)
    origin = f"{found.format}'s {_files(count)} as {'they are' if count > 1 else 'it is'}, {how}"
    return TokenSet(found.path, files, tokenizer, {}, origin, checks)


def tokenizer_of(setting: str, end_of_text: str | None) -> Tokenizer:
    """The tokenizer of a setting.

    Raises:
        InputError: it is the one of characters, which only the text or the data know; or its file cannot be used.
    """
    return load_tokenizer(setting, end_of_text) if is_file(setting) else make_tokenizer(setting)


def _files(count: int) -> str:
    return f"{count:,} files" if count != 1 else "file"


def _opened(path: Path, parts: Sequence[Part]) -> TokenFile:
    return opened(parts[0].path if len({part.path for part in parts}) == 1 else path, parts)


@dataclass(frozen=True)
class _Cut:
    """Where the held-out tokens begin.

    Attributes:
        first: their first token's offset in all tokens.
        total: number of all tokens.
        is_bound: whether a document begins there.
        knows: whether the files say where documents begin.
    """

    first: int
    total: int
    is_bound: bool
    knows: bool


def _cut(found: Found, val_fraction: float | None) -> _Cut:
    """Choose where the held-out tokens begin: at the start of a document, unless that makes them half or twice as many."""
    total = sum(each.part.count for each in found.files)
    wanted = min(VAL_FRACTION * total, MOST_VAL_TOKENS) if val_fraction is None else val_fraction * total
    target = total - max(1, round(wanted))
    if target < 1:
        raise InputError(f"{one_line(found.path)} has {total:,} tokens, too few to hold some out; give more")
    before = 0
    for each in found.files:
        if target < before + each.part.count:
            break
        before += each.part.count
    if each.ends is None:
        return _Cut(target, total, is_bound=False, knows=False)
    number = bisect_left(each.ends, target - before)
    near = [before + each.ends[index] for index in (number - 1, number) if 0 <= index < len(each.ends)] + [before]
    best = min(near, key=lambda bound: abs(bound - target))
    if 0 < best < total and 0.5 <= (total - best) / (total - target) <= 2:
        return _Cut(best, total, is_bound=True, knows=True)
    return _Cut(target, total, is_bound=False, knows=True)


def _parts(files: Sequence[TokensOfFile], first: int, end: int) -> list[Part]:
    """The parts that hold the tokens from offset ``first`` to ``end`` of all files."""
    parts, before = [], 0
    for each in files:
        begin, stop = max(first - before, 0), min(end - before, each.part.count)
        if begin < stop:
            parts.append(each.part.cut(begin, stop - begin))
        before += each.part.count
    return parts
