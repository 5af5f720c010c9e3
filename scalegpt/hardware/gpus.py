"""Which card of the catalogue a user means, and the error for a name that means none.

The cards are in ``gpus.yaml``, which :mod:`scalegpt.hardware.catalogue` reads.
"""

import difflib
import re

from scalegpt.errors import InputError
from scalegpt.hardware.card import CPU_CAPABILITY, Card, Link, has_bf16
from scalegpt.hardware.catalogue import card_keys, catalogue, known_card, namesakes, user_file
from scalegpt.hardware.gpu_words import FORMS, form_in, name_key, name_words, size_in, with_gb
from scalegpt.hardware.unsupported_gpus import unsupported
from scalegpt.units import GB, GIB

__all__ = [
    "CPU_CAPABILITY",
    "GB",
    "GIB",
    "Card",
    "Link",
    "catalogue",
    "find_card",
    "find_card_and_note",
    "has_bf16",
    "is_known",
    "known_card",
    "namesakes",
    "peak_flops",
    "user_file",
]

_GENERATIONS = ("quadro", "ada", "pro", "blackwell")
"""Words that distinguish cards of one number: Quadro RTX 6000, RTX 6000 Ada, RTX PRO 6000 Blackwell."""

_HARMLESS = re.compile(
    "nvidia|geforce|tesla|quadro|amd|instinct|radeon|rtx|gtx|gpus?|cards?|graphics|generation|edition|workstation|server|"
    r"founders|fe|oem|oam|pci|pcie|e|x16|sxm\d?|hbm\d?e?|gddr\d?x?|\d+gb"
)
"""Words in a user's name for a card that make no difference."""

_MOST_NEAR = 5

BY_MEMORY = "; or give --memory_gb N instead of --gpu, to plan by memory alone"
"""Advice for a card that is not in the catalogue."""


def find_card(name: str, advice: str = BY_MEMORY) -> Card:
    """The card that a user means: ``a100-40gb``, ``A100-SXM4-40GB``, ``rtx4090``, ``4090`` or ``RTX 4090``.

    Args:
        name: the user's.
        advice: what else the user can do where there is no such card.

    Raises:
        InputError: no such card, or several; the message offers the nearest.
    """
    return find_card_and_note(name, advice)[0]


def find_card_and_note(name: str, advice: str = BY_MEMORY) -> tuple[Card, str | None]:
    """:func:`find_card`, and a note where the name fits other cards too."""
    cards = _candidates(name)
    if not cards:
        raise InputError(_unknown_card(name, advice))
    if len(cards) > 1:
        names = ", ".join(card.name for card in cards)
        raise InputError(f"gpu {name!r} could be {names}; say which, such as --gpu '{cards[0].name}'")
    card = cards[0]
    _check_size(name, card)
    others = [other.name for other in _same_kind(name) if other.name != card.name]
    if not others:
        return card, None
    return card, f"gpu {name!r} was taken as {_full_name(card)}; name {' or '.join(others)} if you mean that"


def _full_name(card: Card) -> str:
    """The name of a card with its form or size, where that distinguishes it from others of its kind."""
    form, said = _form(card), form_in(card.name)
    if form is not None:
        return card.name if said else f"{card.name} with {form.upper()}"
    return card.name if size_in(card.name) else f"{card.name} of {card.gb} GB"


def is_known(name: str) -> bool:
    """Whether a name means a card of the catalogue, or several that it does not distinguish."""
    return bool(_candidates(name))


def _candidates(name: str) -> list[Card]:
    """The cards that a user's name may mean: one, several that it does not distinguish, or none."""
    words = with_gb(name)
    key, cards = name_key(words), catalogue()
    if not key:
        return []
    exact = [card for card in cards if key in card_keys(card)]
    alike = [card for card in cards if _numbered(card.name) == _numbered(words)]
    if len(alike) > 1 and len({_generation(card.name) for card in alike}) > 1:
        alike = [card for card in alike if _generation(words) <= _generation(card.name)]
        if len(alike) > 1 or not exact:
            return alike
    if exact:
        return exact[:1]
    driver = known_card(words)
    if driver is not None and not _unknown_words(words, driver):
        return [driver]
    fitting = _same_kind(name)
    if fitting:
        return fitting
    bare = re.sub(r"\d+gb\b", "", words)
    return [card for card in cards if bare != words and name_key(bare) in card_keys(card)][:1]


def _same_kind(name: str) -> list[Card]:
    """The cards that a name fits, which may leave memory size and form open."""
    kind, size, form = _kind(name), size_in(name), form_in(name)
    return [
        card
        for card in catalogue()
        if _kind(card.name) == kind and size in {None, card.gb} and form in {None, _form(card)}
    ]


def _kind(name: str) -> str:
    """The key of a name without memory size and form."""
    words = re.sub(rf"\d+gb\b|(?:{'|'.join(FORMS)})\d?|hbm\d?e?", "", with_gb(name))
    return name_key(words)


def _form(card: Card) -> str | None:
    """The form of a card; None: its kind has one form."""
    named = form_in(card.name)
    return named or ("sxm" if card.link == "nvlink" and card.link_cards is None else None)


def _numbered(name: str) -> str:
    """The key of a name without the words of a generation: 6000 of the RTX 6000 Ada."""
    return re.sub("|".join(_GENERATIONS), "", name_key(name))


def _generation(name: str) -> frozenset[str]:
    return frozenset(word for word in _GENERATIONS if word in name.lower())


def _unknown_words(name: str, card: Card) -> set[str]:
    """The words of a user's name that are neither in the card's name nor harmless."""
    known = set(card.match) | name_words(card.name)
    return {word for word in name_words(name) - known if not _HARMLESS.fullmatch(word)}


def peak_flops(card: str, precision: str) -> float | None:
    """A card's dense peak in FLOP/s; None for a card or dtype that is not in ``gpus.yaml``: no MFU is shown then.

    ``card`` is the driver's name, such as ``NVIDIA A100-SXM4-40GB``; ``precision`` the compute dtype, ``bf16`` or ``fp16``.
    """
    known = known_card(card)
    if known is None or precision not in {"bf16", "fp16"} or (precision == "bf16" and not known.has_bf16):
        return None
    return known.tflops * 1e12


def _check_size(name: str, card: Card) -> None:
    """Refuse a size that is not the card's: an RTX 3080 of 12 GB is another card than that of 10.

    Raises:
        InputError: the name has another size.
    """
    said = size_in(name)
    if said is not None and said != card.gb and f"{said}gb" not in card.match:  # a GH200 is named by its host's memory
        sizes = sorted({other.gb for other in catalogue() if _kind(other.name) == _kind(card.name)})
        raise InputError(
            f"gpu {name!r}: the {card.name} of the catalogue has {' or '.join(map(str, sizes))} GB; "
            f"give --memory_gb {said} for one of {said} GB"
        )


def _unknown_card(name: str, advice: str) -> str:
    """The message for a name that means no card: why, the nearest names, and the closest card."""
    kind = unsupported(name)
    if kind is not None:
        closest = kind.closest or (_closest(name, []) if size_in(name) else None)
        instead = f"; the closest card that can be planned is {closest}" if closest else ""
        return f"gpu {name!r}: {kind.why}{instead}{advice}"
    driver = known_card(with_gb(name))
    if driver is not None:
        odd = ", ".join(map(repr, sorted(_unknown_words(with_gb(name), driver))))
        return (
            f"gpu {name!r}: {driver.name} is known, but not the meaning of {odd}; give the card's name alone, and the number "
            "of cards as --gpus N"
        )
    near = _near(name)
    closest = _closest(name, near)
    asked = f"did you mean {', '.join(near)}?" if near else "`scalegpt gpus` lists the known GPUs" + "." * bool(closest)
    stand_in = f" The closest card is {closest} ({find_card(closest).gb} GB)" if closest else ""
    return f"gpu {name!r} is not in the catalogue; {asked}{stand_in}{advice}"


def _near(name: str) -> list[str]:
    """The cards with similar names, the nearest first."""
    names: dict[str, str] = {}
    for card in catalogue():
        for key in (*map(name_key, (card.name, *card.aliases)), _kind(card.name)):
            names.setdefault(key, card.name)
    wanted = name_key(with_gb(name))
    found = difflib.get_close_matches(wanted, names, n=4 * _MOST_NEAR, cutoff=0.6)
    likeness = {key: difflib.SequenceMatcher(None, key, wanted).ratio() for key in found}
    found.sort(key=lambda key: (-round(likeness[key], 2), abs(_number_in(key) - _number_in(wanted))))
    return list(dict.fromkeys(names[key] for key in found))[:_MOST_NEAR]


def _number_in(key: str) -> int:
    """The first number of a key: 4090 of an RTX 4090; 0 without one."""
    found = re.search(r"\d{1,6}", key)
    return int(found[0]) if found else 0


def _closest(name: str, near: list[str]) -> str | None:
    """The closest card: the largest with no more memory than the name says, and of those the nearest in name."""
    said = size_in(name)
    if said is None:
        return near[0] if near else None
    holding = [card for card in catalogue() if card.gb <= said]
    alike = [card for card in holding if card.name in near and card.gb == said]
    most = max((card.gb for card in holding), default=0)

    def likeness(card: Card) -> float:
        return difflib.SequenceMatcher(None, name_key(name), name_key(card.name)).ratio()

    return max(alike or [card for card in holding if card.gb == most], key=likeness).name if holding else None
