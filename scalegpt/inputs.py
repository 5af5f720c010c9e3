"""What the setting ``input_file`` names: one corpus, of one or several files and folders, or a mixture of weighted sources.

As text, paths are separated by commas (``a.txt,b.txt``), and a source's weight follows it (``a.txt=0.7,b.txt=0.3``). The
command line may have several words, a file a list or a mapping, Python any of these. A path that contains a comma or an
equals sign is taken whole if it exists.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from scalegpt.errors import InputError
from scalegpt.storage import user_path
from scalegpt.structured import parse_json
from scalegpt.text import shown

MIXTURE_BLOCK = 10_000
"""The windows of a mixture come in blocks of this many; in each block every source has a fixed number of them."""

LARGEST_WEIGHT = 1e12

_EXAMPLE = "such as a.txt=0.7 b.txt=0.3"


Inputs = str | PurePath | Sequence[str | PurePath] | Mapping[str | PurePath, float]
"""What Python code may give as ``input_file``: see :func:`as_text`."""


class WeightedInput(NamedTuple):
    """A source of a run's data.

    Attributes:
        text: a file, a folder, or a corpus of several (:func:`paths_of`).
        weight: its share of the windows, relative to the weights of the other sources.
    """

    text: str
    weight: float


class _Item(NamedTuple):
    path: str
    weight: float | None


def sources_of(text: str) -> tuple[WeightedInput, ...]:
    """The sources that ``input_file`` names: one corpus with weight 1, or the sources of a mixture in the order given.

    Raises:
        InputError: a source has no weight and another has one; a weight is not a positive number, or too small to be exact;
            or a source is named twice.
    """
    items = _items([text])
    if all(item.weight is None for item in items):
        return (WeightedInput(text, 1.0),)
    sources = tuple(WeightedInput(item.path, _checked(item)) for item in items)
    seen = set[str]()
    for path in (os.path.normpath(source.text) for source in sources):
        if path in seen:
            raise InputError(f"input_file names {shown(path)} twice; name it once, with the sum of its weights")
        seen.add(path)
    total = math.fsum(source.weight for source in sources)
    for path, weight in sources:
        if weight < total / MIXTURE_BLOCK:
            raise InputError(
                f"input_file: the weight of {shown(path)} is less than 1/{MIXTURE_BLOCK:,} of the sum of the weights, and it "
                "would hardly be read; raise it, or leave the source out"
            )
    return sources


def paths_of(text: str) -> list[str]:
    """The files and folders of one corpus.

    Raises:
        InputError: the text names a mixture.
    """
    items = _items([text])
    weighted = next((item for item in items if item.weight is not None), None)
    if weighted is not None:
        raise InputError(f"{shown(weighted.path)} has a weight, but here all inputs are one text; omit the weights")
    return [item.path for item in items]


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """The number of windows that each source has in a block of :data:`MIXTURE_BLOCK`, by the method of largest remainders."""
    total = math.fsum(weights)
    exact = [weight / total * MIXTURE_BLOCK for weight in weights]
    shares = [int(each) for each in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: MIXTURE_BLOCK - sum(shares)]:
        shares[index] += 1
    return tuple(shares)


def share_of(count: int, share: int) -> int:
    """The part of ``count`` that falls to a source with ``share`` windows in a block, rounded up."""
    return -(-count * share // MIXTURE_BLOCK)


def as_text(value: Any) -> Any:
    """The text of a value of ``input_file`` from the command line, a file or Python.

    Args:
        value: a text or a path; a list of them; or a mapping of source → weight. Any other value is returned as it is.

    Raises:
        InputError: a path cannot be one, or a list or a mapping holds something else.
    """
    if isinstance(value, Mapping):
        items = [_weighted(path, weight) for path, weight in value.items()]
    elif isinstance(value, str | PurePath | list | tuple):
        items = _items(value if isinstance(value, list | tuple) else [value])
    else:
        return value
    items = [item._replace(path=_expanded(item.path)) for item in items]
    if len(items) == 1 and items[0].weight is None and (_exists(items[0].path) or not items[0].path.startswith("[")):
        return items[0].path
    words = [
        each.path if each.weight is None else f"{each.path}={repr(each.weight).removesuffix('.0')}" for each in items
    ]
    text = ",".join(words)
    if all(_is_plain(item.path) for item in items) and _items([text]) == items:
        return text
    values = [item.path if item.weight is None else {item.path: item.weight} for item in items]
    return json.dumps(values, ensure_ascii=False)


def _items(words: Sequence[Any]) -> list[_Item]:
    """The paths that words name, each with its weight if it has one."""
    items = [item for word in words for item in _of_word(word)]
    if not items:
        raise InputError("input_file has no input; give a text file, a folder, or a folder of prepared tokens")
    if len(items) == len(words) == 1 and items[0].weight is not None and not _exists(items[0].path):
        word = str(words[0])  # one weight alone says nothing: what looks like it is a part of an address
        return items if word.strip().startswith("[") else [_Item(word, None)]
    return items


def _of_word(word: Any) -> list[_Item]:
    if isinstance(word, PurePath):
        return [_Item(str(word), None)]
    if not isinstance(word, str):
        raise InputError(f"input_file: a list holds paths, with or without =WEIGHT, not {shown(word)}")
    if _exists(word):
        return [_Item(word, None)]
    if word.strip().startswith("["):
        read = _of_json(word)
        if read is not None:
            return read
    path, _, number = word.rpartition("=")
    weight = _number(number)
    if weight is not None and _exists(path):
        return [_Item(path, weight)]
    return [_item(part.strip()) for part in word.split(",") if part.strip()]


def _item(word: str) -> _Item:
    path, equals, number = word.rpartition("=")
    if not (path and equals) or _exists(word):
        return _Item(word, None)
    weight = _number(number)
    if weight is None and _exists(path):
        raise InputError(f"input_file: the weight of {shown(path)} must be a number, not {shown(number)}; {_EXAMPLE}")
    return _Item(word, None) if weight is None else _Item(path, weight)


def _of_json(text: str) -> list[_Item] | None:
    """The items of a list as :func:`as_text` writes it; None if the text is none."""
    try:
        values = parse_json(text, "input_file")
    except InputError:
        return None
    items: list[_Item] = []
    for value in values if isinstance(values, list) else ():
        if isinstance(value, dict):
            items += [_weighted(path, weight) for path, weight in value.items()]
        elif isinstance(value, str):
            items.append(_Item(value, None))
        else:
            return None
    return items or None


def _weighted(path: Any, weight: Any) -> _Item:
    if not isinstance(path, str | PurePath) or isinstance(weight, bool) or not isinstance(weight, int | float | str):
        raise InputError(f"input_file: a mapping holds sources and their weights, not {shown(path)}: {shown(weight)}")
    number = _number(weight)
    if number is None:
        raise InputError(f"input_file: the weight of {shown(path)} must be a number, not {shown(weight)}")
    return _Item(str(path), number)


def _is_plain(path: str) -> bool:
    """Whether a path among others is read as it is."""
    _, equals, number = path.rpartition("=")
    has_weight = equals and _number(number) is not None
    return path == path.strip() and not path.startswith("[") and "," not in path and not has_weight


def _expanded(path: str) -> str:
    try:
        return user_path(path)
    except InputError as error:
        raise InputError(f"input_file {error}") from None


def _checked(item: _Item) -> float:
    if item.weight is None:
        raise InputError(
            f"input_file: {shown(item.path)} has no weight, and another source has one; give one to each, {_EXAMPLE}"
        )
    if not 0 < item.weight <= LARGEST_WEIGHT:
        raise InputError(
            f"input_file: the weight of {shown(item.path)} must be more than 0 and at most {LARGEST_WEIGHT:.0e}, not "
            f"{item.weight:g}"
        )
    return item.weight


def _number(value: str | float) -> float | None:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _exists(path: str) -> bool:
    """Whether there is a file or folder; False where a folder of its path is closed, for which pathlib raises."""
    try:
        return os.path.exists(user_path(path))  # noqa: PTH110
    except InputError:
        return False
