"""Reads a catalogue of cards: ``gpus.yaml``, or a user's own file of the same form.

The file is parsed to YAML nodes, which have line numbers, so that an error names the line. Then only the values of known
keys are converted to Python, which takes a third of the time that YAML's own conversion of the whole file takes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalegpt.errors import InputError, nearest
from scalegpt.storage import read_text
from scalegpt.structured import CONFIG_LIMIT, yaml_node
from scalegpt.text import shown

FIGURES = ("gib", "tflops", "gbps", "host_gbps", "link_gbps")
"""Keys whose value is a number above zero, and which may have a source."""

COUNTS = ("gb", "link_cards")
LISTS = ("match", "aliases")
LINKS = ("nvlink", "xgmi", "pcie")
PRICE = "price_per_gpu_hour"
"""The key of a card's price, which only a user's own file has."""
KEYS = ("name", *LISTS, "capability", *COUNTS, *FIGURES, "link", "peer", PRICE)

MOST_CHARACTERS = 500
"""The largest number of characters in a value, for example a name or a source."""

MOST = 1e6
"""Figures must be smaller than this, since a larger one is certainly in a wrong unit."""


@dataclass
class CardEntry:
    """One entry of a catalogue file: a new card, or values that override those of a known card.

    Attributes:
        name: the card's name.
        where: file and line, for example ``gpus.yaml:7``.
        values: key of the entry → its value, converted to Python.
        sources: name of a figure → its source. Figures without a source are left out.
    """

    name: str
    where: str
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def read_entries(path: Path) -> list[CardEntry]:
    """The entries of a catalogue file, in the file's order.

    Raises:
        InputError: the file cannot be read, is not YAML, or has an invalid value; the message names file and line.
    """
    entries = [_entry(path, node) for node in _items(path, _compose(path), "the file", "of cards")]
    seen: dict[str, CardEntry] = {}
    for entry in entries:
        first = seen.setdefault(entry.name.lower(), entry)
        if first is not entry:
            raise InputError(f"{entry.where}: {entry.name} is already defined at {first.where}; keep one of them")
    return entries


def _compose(path: Path) -> Any:
    """The root node of the file's YAML; None if the file is empty."""
    try:
        return yaml_node(read_text(path, CONFIG_LIMIT), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(
            f"{path}: cannot be read ({reason}); correct it, or set `SCALEGPT_GPUS=` to ignore it"
        ) from None


def _where(path: Path, node: Any) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _items(path: Path, node: Any, what: str, of: str) -> list[Any]:
    if node is None:
        return []
    if node.id != "sequence":
        raise InputError(f"{_where(path, node)}: {what} must be a list {of}, as in `scalegpt gpus --help`")
    items: list[Any] = node.value
    return items


def _text(path: Path, node: Any, what: str) -> str:
    if node.id != "scalar" or not node.value.strip():
        raise InputError(
            f"{_where(path, node)}: {what} must be one value, not {'nothing' if node.id == 'scalar' else 'several'}"
        )
    text = str(node.value).strip()
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{_where(path, node)}: {what} has more than {MOST_CHARACTERS} characters")
    return text


def _entry(path: Path, node: Any) -> CardEntry:
    where = _where(path, node)
    if node.id != "mapping":
        raise InputError(f"{where}: a card must be a mapping such as `name: RTX 4090`, then its figures")
    pairs = list(_pairs(path, node))
    name = next((_text(path, value, "name") for key, value in pairs if key == "name"), None)
    if name is None:
        raise InputError(f"{where}: a card without a name; add `name: …`")
    entry = CardEntry(name, where)
    for key, value in pairs:
        entry.values[key] = _value(path, entry, key, value)
    return entry


def _pairs(path: Path, node: Any) -> Iterator[tuple[str, Any]]:
    """The keys of an entry, each with the YAML node of its value."""
    seen = set()
    for key_node, value in node.value:
        key = _text(path, key_node, "a key")
        if key not in KEYS:
            raise InputError(f"{_where(path, key_node)}: unknown key {shown(key)}{nearest(key, KEYS)}")
        if key in seen:
            raise InputError(f"{_where(path, key_node)}: {key} appears twice; keep one of them")
        seen.add(key)
        yield key, value


def _value(path: Path, entry: CardEntry, key: str, node: Any) -> Any:
    """The value of a key, converted to Python; if it is written as [value, source], ``entry.sources`` gets the source."""
    if key in LISTS:
        return tuple(_text(path, item, key) for item in _items(path, node, key, "of words"))
    if key in (*FIGURES, "peer", PRICE) and node.id == "sequence":
        if len(node.value) != 2:
            raise InputError(f"{_where(path, node)}: {key} must be a value, or [value, source]")
        node, source = node.value
        entry.sources[key] = _text(path, source, f"the source of {key}")
    text = _text(path, node, key)
    if key in (*FIGURES, PRICE):
        return _number(path, node, key, text)
    if key in COUNTS:
        is_count = re.fullmatch("[0-9]{1,6}", text) is not None and int(text) > 0
        return int(_checked(path, node, key, text, is_count, f"a whole number above 0 and below {MOST:,.0f}"))
    if key == "peer":
        return _checked(path, node, key, text, text in {"true", "false"}, "true or false") == "true"
    if key == "link":
        return _checked(path, node, key, text, text in LINKS, f"one of {', '.join(LINKS)}")
    if key == "capability":
        known = re.fullmatch(r"\d{1,2}\.\d|gfx[0-9a-f]{3,4}", text) is not None
        return _checked(
            path, node, key, text, known, "a compute capability (8.6), or for AMD's cards an architecture (gfx942)"
        )
    return text


def _number(path: Path, node: Any, key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    _checked(path, node, key, text, 0 < number < MOST, f"a number above 0 and below {MOST:,.0f}")
    return number


def _checked(path: Path, node: Any, key: str, text: str, holds: bool, must: str) -> str:
    if not holds:
        raise InputError(f"{_where(path, node)}: {key} must be {must}, not {shown(text)}")
    return text
