"""Finds the card of the catalogue that the user means, and writes the error for a name without a card.

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
"""Words that distinguish cards with the same number: Quadro RTX 6000, RTX 6000 Ada, RTX PRO 6000 Blackwell."""

_HARMLESS = re.compile(
    "nvidia|geforce|tesla|quadro|amd|instinct|radeon|rtx|gtx|gpus?|cards?|graphics|generation|edition|workstation|server|"
    r"founders|fe|oem|oam|pci|pcie|e|x16|sxm\d?|hbm\d?e?|gddr\d?x?|\d+gb"
)
"""Words in a user's name for a card that do not change which card it means."""

_MOST_NEAR = 5

BY_MEMORY = "; or give --memory_gb N instead of --gpu, to plan by memory alone"
"""Advice for a card that is not in the catalogue."""


def find_card(name: str, advice: str = BY_MEMORY) -> Card:
    """The card that the user means.

    Args:
        name: the user's name for the card, for example ``a100-40gb``, ``A100-SXM4-40GB``, ``rtx4090``, ``4090`` or
            ``RTX 4090``.
        advice: the end of the error message if there is no such card, which says what else the user can do.

    Raises:
        InputError: no card or several cards have this name; the message lists similar names.
    """
    return find_card_and_note(name, advice)[0]


def find_card_and_note(name: str, advice: str = BY_MEMORY) -> tuple[Card, str | None]:
    """Like :func:`find_card`, but return a pair: the card, and a note if the name fits other cards too, else None."""
    cards = _candidates(name)
    if not cards:
        raise InputError(_unknown_card(name, advice))
    if len(cards) > 1:
        names = ", ".join(card.name for card in cards)
        raise InputError(f"gpu {name!r} could be {names}; say which, for example --gpu '{cards[0].name}'")
    card = cards[0]
    _check_size(name, card)
    others = [other.name for other in _same_kind(name) if other.name != card.name]
    if not others:
        return card, None
    return card, f"gpu {name!r} was taken as {_full_name(card)}; name {' or '.join(others)} if you mean that"


def _full_name(card: Card) -> str:
    """A card's name with its form factor, or with its memory size if all cards of its kind have one form factor."""
    form, said = _form(card), form_in(card.name)
    if form is not None:
        return card.name if said else f"{card.name} with {form.upper()}"
    return card.name if size_in(card.name) else f"{card.name} of {card.gb} GB"


def is_known(name: str) -> bool:
    """Whether a user's name fits one or several cards of the catalogue."""
    return bool(_candidates(name))


def _candidates(name: str) -> list[Card]:
    """The cards that a user may mean by a name: none, one, or several if the name is ambiguous."""
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
    """The cards of a name's kind, for example A100, with the memory size and form factor that the name may give."""
    kind, size, form = _kind(name), size_in(name), form_in(name)
    return [
        card
        for card in catalogue()
        if _kind(card.name) == kind and size in {None, card.gb} and form in {None, _form(card)}
    ]


def _kind(name: str) -> str:
    """The kind of card in a name, for example A100: the :func:`name_key` without memory size and form factor."""
    words = re.sub(rf"\d+gb\b|(?:{'|'.join(FORMS)})\d?|hbm\d?e?", "", with_gb(name))
    return name_key(words)


def _form(card: Card) -> str | None:
    """The form factor of a card, one of :data:`FORMS`; None if neither its name nor its link gives one."""
    named = form_in(card.name)
    return named or ("sxm" if card.link == "nvlink" and card.link_cards is None else None)


def _numbered(name: str) -> str:
    """The :func:`name_key` of a name without words of :data:`_GENERATIONS`: ``6000`` for the RTX 6000 Ada."""
    return re.sub("|".join(_GENERATIONS), "", name_key(name))


def _generation(name: str) -> frozenset[str]:
    return frozenset(word for word in _GENERATIONS if word in name.lower())


def _unknown_words(name: str, card: Card) -> set[str]:
    """The words of a user's name that are neither in the card's name nor in :data:`_HARMLESS`."""
    known = set(card.match) | name_words(card.name)
    return {word for word in name_words(name) - known if not _HARMLESS.fullmatch(word)}


def peak_flops(card: str, precision: str) -> float | None:
    """A card's dense peak in FLOP/s; None if ``gpus.yaml`` lacks the card or the dtype. Then no MFU is shown.

    Args:
        card: the driver's name of the card, for example ``NVIDIA A100-SXM4-40GB``.
        precision: the compute dtype; there are peaks for ``bf16`` and ``fp16``.
    """
    known = known_card(card)
    if known is None or precision not in {"bf16", "fp16"} or (precision == "bf16" and not known.has_bf16):
        return None
    return known.tflops * 1e12


def _check_size(name: str, card: Card) -> None:
    """Refuse a name with a memory size that the card does not have: ``RTX 3080 12GB`` for a card with 10 GB.

    Raises:
        InputError: the name gives another memory size than the card's.
    """
    said = size_in(name)
    if said is not None and said != card.gb and f"{said}gb" not in card.match:  # a GH200's name has its host's memory
        sizes = sorted({other.gb for other in catalogue() if _kind(other.name) == _kind(card.name)})
        raise InputError(
            f"gpu {name!r}: the {card.name} of the catalogue has {' or '.join(map(str, sizes))} GB; "
            f"give --memory_gb {said} for one of {said} GB"
        )


def _unknown_card(name: str, advice: str) -> str:
    """The error message for a name without a card: the reason, similar names, and the closest card."""
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
    """The names of cards that are similar to a user's name, the most similar first."""
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
    """The first number in a key: 4090 for an RTX 4090; 0 without a number."""
    found = re.search(r"\d{1,6}", key)
    return int(found[0]) if found else 0


def _closest(name: str, near: list[str]) -> str | None:
    """The name of the catalogue's card that is closest to an unknown card; None if there is none.

    If the user's name has a memory size, it is the card with the most memory up to this size, and among several such
    cards the one with the most similar name. Without a memory size, it is the first of ``near``, the names of similar
    cards.
    """
    said = size_in(name)
    if said is None:
        return near[0] if near else None
    holding = [card for card in catalogue() if card.gb <= said]
    alike = [card for card in holding if card.name in near and card.gb == said]
    most = max((card.gb for card in holding), default=0)

    def likeness(card: Card) -> float:
        return difflib.SequenceMatcher(None, name_key(name), name_key(card.name)).ratio()

    return max(alike or [card for card in holding if card.gb == most], key=likeness).name if holding else None
