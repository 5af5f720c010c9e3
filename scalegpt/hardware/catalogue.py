"""The catalogue of GPUs: ``gpus.yaml``, and a user's own file of the same form, which adds cards and overrides figures.

The user's file is ``$SCALEGPT_GPUS``, else ``~/.config/scalegpt/gpus.yaml``.
"""

import math
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from scalegpt.errors import InputError
from scalegpt.hardware.card import Card
from scalegpt.hardware.catalogue_file import FIGURES, PRICE, CardEntry, read_entries
from scalegpt.hardware.gpu_words import name_key, name_words
from scalegpt.storage import user_path

_VARIANTS = frozenset({"ti", "super", "laptop", "max", "mobile", "nvl", "d", "mig"})
"""Words that turn a name into that of another card: an RTX 3080 Ti is not an RTX 3080, and a MIG device is not a whole
card."""

_SIZE = re.compile(r"\d+gb")

_NEEDED = ("gib", "capability", "tflops", "gbps", "host_gbps")
"""The keys that the entry of a new card must have."""


def user_file() -> Path | None:
    """The path of the user's own catalogue: ``$SCALEGPT_GPUS``, else ``~/.config/scalegpt/gpus.yaml``; None: there is none.

    An empty variable means that there is no file. A file that the variable names may be missing; then reading it fails.
    """
    chosen = os.environ.get("SCALEGPT_GPUS")
    if chosen is not None:
        return Path(user_path(chosen)) if chosen else None
    try:
        path = Path("~/.config/scalegpt/gpus.yaml").expanduser()
    except RuntimeError:  # there is no home folder
        return None
    return path if path.is_file() else None


def catalogue() -> tuple[Card, ...]:
    """Every known card: the cards of ScaleGPT's file in its order, then the cards that only the user's file has.

    Raises:
        InputError: the user's file is not valid; the message names file and line.
    """
    return _read(user_file())


@cache
def _read(own: Path | None) -> tuple[Card, ...]:
    cards = [_new_card(entry) for entry in read_entries(Path(__file__).with_name("gpus.yaml"))]
    for entry in read_entries(own) if own else ():
        place = next((index for index, card in enumerate(cards) if name_key(entry.name) in card_keys(card)), None)
        if place is None:
            cards.append(_new_card(entry))
        else:
            cards[place] = _overridden(cards[place], entry)
        _check_names(cards, len(cards) - 1 if place is None else place, entry)
    return tuple(cards)


def _sources(entry: CardEntry) -> dict[str, str]:
    """Name of a figure → its source, for an entry's figures; if no source is given, the entry's file and line."""
    return {key: entry.sources.get(key, entry.where) for key in (*FIGURES, "peer", PRICE) if key in entry.values}


def _new_card(entry: CardEntry) -> Card:
    """The card that an entry describes.

    Raises:
        InputError: a key that a new card needs is missing.
    """
    given = entry.values
    needed = _NEEDED if given.get("link", "pcie") == "pcie" else (*_NEEDED, "link_gbps")
    lacks = [key for key in needed if key not in given]
    if lacks:
        raise InputError(f"{entry.where}: {entry.name} is a new card and lacks {', '.join(lacks)}; add them")
    sources = _sources(entry)
    defaults = {
        "match": tuple(sorted(name_words(entry.name) - {"nvidia", "geforce", "amd", "rtx"}) or name_words(entry.name)),
        "gb": math.ceil(given["gib"]),
        "link": "pcie",
        "link_gbps": given["host_gbps"],
        "peer": False,
    }
    if "link_gbps" not in given:
        sources["link_gbps"] = sources["host_gbps"]
    sources.setdefault("peer", "~assumed")
    return Card(**{**defaults, **given}, sources=sources)


def _overridden(card: Card, entry: CardEntry) -> Card:
    """A known card with the entry's values in place of the card's own. Its name does not change."""
    given = {key: value for key, value in entry.values.items() if key != "name"}
    if "gb" not in given and given.get("gib", 0) > card.gb:
        given["gb"] = math.ceil(given["gib"])
    if "link_gbps" not in given and given.get("link", card.link) == "pcie" and {"link", "host_gbps"} & set(given):
        given["link_gbps"] = given.get("host_gbps", card.host_gbps)
    return replace(card, **given, sources={**card.sources, **_sources(entry)})


def _check_names(cards: list[Card], place: int, entry: CardEntry) -> None:
    """Refuse the card at index ``place``, made from ``entry``, if another card has its name or one of its aliases.

    Raises:
        InputError: two cards share a name; the message names both.
    """
    for index, card in enumerate(cards):
        if index != place and card_keys(cards[place]) & card_keys(card):
            raise InputError(f"{entry.where}: a name of {entry.name} already belongs to {card.name}; choose another")


def known_card(name: str) -> Card | None:
    """The card that a driver's name, for example ``NVIDIA A100-SXM4-40GB``, stands for; None if no card is certain."""
    words = name_words(name)
    fitting = [card for card in catalogue() if words.issuperset(card.match)]
    best = max(fitting, key=lambda card: len(card.match), default=None)
    if best is None or (words & _VARIANTS) - set(best.match):
        return None
    return best


def namesakes(name: str, card: Card) -> list[Card]:
    """All cards that a driver's name fits: ``card``, and others if the name has no memory size.

    For example, an RTX 4060 Ti has 8 GB or 16 GB, and the driver's name does not say which.
    """
    if re.search(r"\d+ ?gb", name.lower()):
        return [card]
    bare = [word for word in card.match if not _SIZE.fullmatch(word)]
    return [other for other in catalogue() if [word for word in other.match if not _SIZE.fullmatch(word)] == bare]


def card_keys(card: Card) -> set[str]:
    """The keys (:func:`name_key`) of a card's name and aliases."""
    return {name_key(word) for word in (card.name, *card.aliases)}
