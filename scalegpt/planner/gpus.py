"""What is known of each GPU: its memory, what it can compute with, and its peak. All of it stands in ``gpus.yaml``."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scalegpt.errors import InputError, nearest

GIB = 2**30
GB = 10**9

_VARIANTS = frozenset({"ti", "super", "laptop", "max", "mobile", "nvl", "d", "mig"})
"""Words that make another card of a name: an RTX 3080 Ti is no RTX 3080, a MIG slice no whole card."""

_DECORATION = re.compile("nvidia|geforce|tesla|quadro|amd|instinct|rtx|generation|gpu|graphics")
"""What may be left out of a card's name, or be there, without meaning another card."""

_FP16_ONLY = frozenset({"7.0", "7.5"})
"""Volta and Turing have neither bf16 matmuls nor a flash kernel in torch's attention (``sdp_utils.cpp``: from 8.0 on)."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One entry of the catalogue; ``gpus.yaml`` explains its figures."""

    name: str
    match: tuple[str, ...]
    gb: int
    gib: float
    gib_source: str
    capability: str
    tflops: float
    source: str
    aliases: tuple[str, ...] = ()

    @property
    def usable_bytes(self) -> int:
        """The memory that torch reports."""
        return int(self.gib * GIB)

    @property
    def is_estimated(self) -> bool:
        """Whether the memory is a figure that nobody has read."""
        return self.gib_source.startswith("~")

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bf16."""
        return self.capability not in _FP16_ONLY

    @property
    def has_flash(self) -> bool:
        """Whether torch has a flash attention kernel for it."""
        return self.capability not in _FP16_ONLY

    @property
    def is_amd(self) -> bool:
        """Whether torch drives it through ROCm."""
        return self.capability.startswith("gfx")


@cache
def catalogue() -> tuple[Card, ...]:
    """Every card that is known, in the file's order."""
    import yaml  # imported here: commands that ask for no card need not pay for it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 20 times as fast as the pure Python one
    text = Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = yaml.load(text, loader)  # noqa: S506  # both loaders are safe ones
    return tuple(_card(entry) for entry in entries)


def _card(entry: dict[str, Any]) -> Card:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Card(**values)


def known_card(name: str) -> Card | None:
    """The card that a driver's name means, such as ``NVIDIA A100-SXM4-40GB``; None where that is not certain."""
    words = _words(name)
    fitting = [card for card in catalogue() if words.issuperset(card.match)]
    best = max(fitting, key=lambda card: len(card.match), default=None)
    if best is None or (words & _VARIANTS) - set(best.match):
        return None
    return best


def find_card(name: str) -> Card:
    """The card that a user means: ``a100-40gb``, ``A100-SXM4-40GB``, ``rtx4090``, ``4090`` or ``RTX 4090``.

    Raises:
        InputError: no such card, or several; the message offers the nearest.
    """
    key = _key(name)
    called = [card for card in catalogue() if key in _keys(card)]
    if called:
        return called[0]
    card = known_card(name) or _of_size(name)
    if card is None:
        meant = [card.name for card in catalogue() if key and key == _key(card.match[0])]
        if len(meant) > 1:
            raise InputError(f"gpu {name!r} could be {', '.join(meant)}; say which, such as --gpu '{meant[0]}'")
        raise InputError(f"gpu {name!r} is not in the catalogue{_near(name)} (or give --memory_gb)")
    _check_size(name, card)
    return card


def peak_flops(card: str, precision: str) -> float | None:
    """The card's dense peak in FLOP/s.

    Args:
        card: the driver's name of the card, such as ``NVIDIA A100-SXM4-40GB``.
        precision: the compute dtype, ``bf16`` or ``fp16``.

    Returns:
        The peak, or None for a card or dtype that is not in ``gpus.yaml``: MFU is then not shown rather than wrong.
    """
    known = known_card(card)
    if known is None or precision not in {"bf16", "fp16"} or (precision == "bf16" and not known.has_bf16):
        return None
    return known.tflops * 1e12


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z0-9]+", name.lower()))  # whole words: an RTX A4000 is no A40


def _key(name: str) -> str:
    """A name without spaces, case, and words that all cards of a maker bear."""
    return _DECORATION.sub("", re.sub("[^a-z0-9]", "", name.lower()))


def _keys(card: Card) -> Collection[str]:
    return {_key(word) for word in (card.name, *card.aliases)}


def _of_size(name: str) -> Card | None:
    """The card of ``rtx4090-24gb``: a known name, and a size that it may have or not."""
    bare = re.sub(r"\d+ ?gi?b\b", "", name.lower())
    key = _key(bare)
    called = [card for card in catalogue() if bare != name.lower() and key in _keys(card)]
    return called[0] if called else None


def _check_size(name: str, card: Card) -> None:
    """Refuse a size that is not the card's: an RTX 3080 of 12 GB is another card than that of 10.

    Raises:
        InputError: the name says another size.
    """
    said = re.search(r"(\d+) ?gi?b\b", name.lower())
    if said and int(said[1]) != card.gb:
        raise InputError(
            f"gpu {name!r}: the {card.name} of the catalogue has {card.gb} GB; "
            f"give --memory_gb {said[1]} for one of {said[1]} GB"
        )


def _near(name: str) -> str:
    """A hint of the cards that are called alike."""
    names: dict[str, str] = {}
    for card in catalogue():
        for word in (card.name, *card.aliases):
            names[_key(word)] = card.name
    hint = nearest(_key(name), names)
    if "did you mean" not in hint:
        return f"; known: {', '.join(card.name for card in catalogue())}"
    keys = hint.removeprefix("; did you mean ").removesuffix("?").split(", ")
    return f"; did you mean {', '.join(dict.fromkeys(names[key] for key in keys))}?"
