"""What is known of each GPU: its memory, what it can compute with, its peak, how it is joined to others.

All of it stands in ``gpus.yaml``, and in a user's own file of the same form, ``$SCALEGPT_GPUS``, else
``~/.config/scalegpt/gpus.yaml``: it adds cards, and overrides figures of known ones by name.
"""

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from scalegpt.errors import InputError, nearest
from scalegpt.planner.catalogue_file import FIGURES, Entry, missing, read_entries
from scalegpt.storage import user_path

GIB = 2**30
GB = 10**9

_VARIANTS = frozenset({"ti", "super", "laptop", "max", "mobile", "nvl", "d", "mig"})
"""Words that make another card of a name: an RTX 3080 Ti is no RTX 3080, a MIG slice no whole card."""

_DECORATION = re.compile("nvidia|geforce|tesla|quadro|amd|instinct|rtx|generation|gpu|graphics")
"""What may be left out of a card's name, or be there, without meaning another card."""

_FIRST_WITH_BF16 = 8.0
"""Before it, Volta and Turing have neither bf16 matmuls nor a flash kernel in torch's attention (``sdp_utils.cpp``)."""

_NEEDED = ("gib", "capability", "tflops", "gbps", "host_gbps")
"""What a new card cannot do without."""

CPU_CAPABILITY = "cpu"


@dataclass(frozen=True, kw_only=True)
class Link:
    """How the cards of one machine are joined.

    Attributes:
        kind: ``nvlink``, ``xgmi``, ``pcie``, or ``host`` for the ranks of a processor.
        gbps: of each card to all others, GB/s of 10⁹, both directions together, as vendors print it.
        peer: whether the cards copy directly to each other; false: everything goes through the host's memory.
    """

    kind: str
    gbps: float
    peer: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """One entry of the catalogue; ``gpus.yaml`` explains its figures.

    Attributes:
        name: what to call it.
        match: the words of its driver's name.
        aliases: other names.
        gb: the size in its name, GB.
        gib: the memory that torch reports, GiB.
        capability: NVIDIA's compute capability, AMD's architecture, or ``cpu``.
        tflops: dense half-precision peak with fp32 accumulation, TFLOP/s; of a processor, that of fp32.
        gbps: bandwidth of its memory, GB/s of 10⁹.
        host_gbps: between the card and the host's memory, GB/s of 10⁹, both directions together.
        link: what joins it to other cards: ``nvlink``, ``xgmi``, ``pcie``, or ``host``.
        link_gbps: of that link, GB/s of 10⁹, all links and both directions together.
        link_cards: how many cards it joins, 2 for a bridge; None: all in a machine. More cards use PCIe.
        peer: whether cards of this kind copy directly to each other over PCIe.
        sources: figure → where it comes from; one that begins with ~ makes it an estimate.
    """

    name: str
    match: tuple[str, ...]
    gb: int
    gib: float
    capability: str
    tflops: float
    gbps: float
    host_gbps: float
    link: str
    link_gbps: float
    peer: bool
    link_cards: int | None = None
    aliases: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def usable_bytes(self) -> int:
        """The memory that torch reports."""
        return int(self.gib * GIB)

    @property
    def estimated(self) -> tuple[str, ...]:
        """The figures that nobody has read."""
        return tuple(figure for figure, source in self.sources.items() if source.startswith("~"))

    @property
    def is_estimated(self) -> bool:
        """Whether the memory is a figure that nobody has read."""
        return "gib" in self.estimated

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies in bf16."""
        return has_bf16(self.capability)

    @property
    def has_flash(self) -> bool:
        """Whether torch has a flash attention kernel for it."""
        return has_bf16(self.capability)

    @property
    def is_amd(self) -> bool:
        """Whether torch drives it through ROCm."""
        return self.capability.startswith("gfx")

    @property
    def is_cpu(self) -> bool:
        """Whether it stands for a processor."""
        return self.capability == CPU_CAPABILITY

    def link_of(self, gpus: int) -> Link:
        """What joins so many of these cards in a machine that is built for it."""
        if self.link == "pcie":
            return Link(kind="pcie", gbps=self.link_gbps, peer=self.peer)
        if self.link_cards is not None and gpus > self.link_cards:
            return Link(kind="pcie", gbps=self.host_gbps, peer=self.peer)
        return Link(kind=self.link, gbps=self.link_gbps, peer=True)


def has_bf16(capability: str) -> bool:
    """Whether cards of a capability multiply in bf16."""
    return not capability[:1].isdecimal() or float(capability) >= _FIRST_WITH_BF16


def user_file() -> Path | None:
    """The user's own catalogue: ``$SCALEGPT_GPUS``, else ``~/.config/scalegpt/gpus.yaml``; None where there is none.

    A file that the variable names must be there, reading it says so where it is not; an empty variable means no file.
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
    """Every card that is known, in the file's order, and then those that only the user's file has.

    Raises:
        InputError: the user's file is broken; file and line are named.
    """
    return _read(user_file())


@cache
def _read(own: Path | None) -> tuple[Card, ...]:
    cards = [_new_card(entry) for entry in read_entries(Path(__file__).with_name("gpus.yaml"))]
    for entry in read_entries(own) if own else ():
        place = next((index for index, card in enumerate(cards) if _key(entry.name) in _keys(card)), None)
        if place is None:
            cards.append(_new_card(entry))
        else:
            cards[place] = _overridden(cards[place], entry)
        _check_names(cards, len(cards) - 1 if place is None else place, entry)
    return tuple(cards)


def _sources(entry: Entry) -> dict[str, str]:
    """Figure → source of all figures that the entry has; the file itself where it tells none."""
    return {key: entry.sources.get(key, entry.where) for key in (*FIGURES, "peer") if key in entry.values}


def _new_card(entry: Entry) -> Card:
    """A card from an entry that has all that is needed.

    Raises:
        InputError: something is missing.
    """
    given = entry.values
    lacks = missing(entry, _NEEDED)
    if given.get("link", "pcie") != "pcie":
        lacks += missing(entry, ["link_gbps"])
    if lacks:
        raise InputError(f"{entry.where}: {entry.name} is a new card and lacks {', '.join(lacks)}; add them")
    sources = _sources(entry)
    defaults = {
        "match": tuple(sorted(_words(entry.name) - {"nvidia", "geforce", "amd", "rtx"}) or _words(entry.name)),
        "gb": math.ceil(given["gib"]),
        "link": "pcie",
        "link_gbps": given["host_gbps"],
        "peer": False,
    }
    if "link_gbps" not in given:
        sources["link_gbps"] = sources["host_gbps"]
    sources.setdefault("peer", "~assumed")
    return Card(**{**defaults, **given}, sources=sources)


def _overridden(card: Card, entry: Entry) -> Card:
    """The card with the figures of the entry, and its own name."""
    given = {key: value for key, value in entry.values.items() if key != "name"}
    if "gb" not in given and given.get("gib", 0) > card.gb:
        given["gb"] = math.ceil(given["gib"])
    if "link_gbps" not in given and given.get("link", card.link) == "pcie" and {"link", "host_gbps"} & set(given):
        given["link_gbps"] = given.get("host_gbps", card.host_gbps)
    return replace(card, **given, sources={**card.sources, **_sources(entry)})


def _check_names(cards: list[Card], place: int, entry: Entry) -> None:
    """Refuse a name that another card has.

    Raises:
        InputError: it does; both are named.
    """
    ours = set(_keys(cards[place]))
    for index, card in enumerate(cards):
        if index != place and ours & set(_keys(card)):
            raise InputError(f"{entry.where}: {entry.name} is given a name that {card.name} has; take another")


def known_card(name: str) -> Card | None:
    """The card that a driver's name means, such as ``NVIDIA A100-SXM4-40GB``; None where that is not certain."""
    words = _words(name)
    fitting = [card for card in catalogue() if words.issuperset(card.match)]
    best = max(fitting, key=lambda card: len(card.match), default=None)
    if best is None or (words & _VARIANTS) - set(best.match):
        return None
    return best


def find_card(name: str, advice: str = " (or give --memory_gb)") -> Card:
    """The card that a user means: ``a100-40gb``, ``A100-SXM4-40GB``, ``rtx4090``, ``4090`` or ``RTX 4090``.

    Args:
        name: what he calls it.
        advice: what else he can do where there is no such card.

    Raises:
        InputError: no such card, or several; the message offers the nearest.
    """
    if "," in name:
        raise InputError(f"gpu {name!r} names several cards; give one, of mixed cards the smallest")
    key = _key(name)
    called = [card for card in catalogue() if key in _keys(card)]
    if called:
        return called[0]
    card = known_card(name) or _of_size(name)
    if card is None:
        meant = [card.name for card in catalogue() if key and key == _key(card.match[0])]
        if len(meant) > 1:
            raise InputError(f"gpu {name!r} could be {', '.join(meant)}; say which, such as --gpu '{meant[0]}'")
        raise InputError(f"gpu {name!r} is not in the catalogue{_near(name)}{advice}")
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
    if said and int(said[1]) != card.gb and f"{said[1]}gb" not in card.match:  # a GH200 bears its processor's memory
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
