"""Reads the user's words for GPUs, for example ``2x 3090``: numbers of cards and machines, memory size, form factor.

This module does not know the catalogue of cards.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from scalegpt.errors import InputError

_NUMBERS = {
    "one": 1, "single": 1, "two": 2, "dual": 2, "double": 2, "three": 3, "triple": 3, "four": 4, "quad": 4, "five": 5,
    "six": 6, "seven": 7, "eight": 8, "octa": 8, "ten": 10, "twelve": 12, "sixteen": 16,
}  # fmt: skip

_N = rf"(\d{{1,9}}|(?:{'|'.join(_NUMBERS)})\b)"
_MACHINES = r"(?:nodes?|machines?|hosts?|servers?|boxes|box|instances?)\b"
_EACH = re.compile(rf"\b(?:(?:per|for each|in each|in every|each|every|a)\s+|/\s*){_MACHINES}|\beach\b", re.IGNORECASE)
_PLACES = re.compile(
    rf"(?P<before>\b(?:across|over|on|in|of|with|x)\b|[,;@(*])?\s*"
    rf"{_N}\s*(?:x\s*)?{_MACHINES}\s*(?P<after>(?:of|with)\b)?[\s,;:)]*",
    re.IGNORECASE,
)
_MOST_LETTERS = 80
"""The largest number of characters in a text that is read; a longer text is taken as a name."""

_SEVERAL = re.compile(r"[,;+&|]|\b(?:and|or|plus)\b", re.IGNORECASE)
_FILLERS = re.compile(r"^(?:an?|my|our|the)\b|\b(?:gpus?|cards?|graphics)\b", re.IGNORECASE)

FORMS = ("pcie", "sxm", "nvl")
"""The form factors that one kind of card may have."""


@dataclass(frozen=True)
class NamedGpus:
    """What a user's text for GPUs says.

    Attributes:
        name: the name of the card.
        gpus: the number of cards in each machine; None: not given.
        nodes: the number of machines; None: not given.
    """

    name: str
    gpus: int | None = None
    nodes: int | None = None


def named_gpus(text: str, is_card: Callable[[str], bool]) -> NamedGpus:
    """Read the card, the number of cards and the number of machines from a user's text.

    Args:
        text: the text, for example ``2x 3090``, ``A100:8``, ``dual 4090``, ``4x L40S across 2 nodes``.
        is_card: a function that says whether a text alone is the name of one or several cards.

    Raises:
        InputError: the text names several kinds of cards, or its numbers can be read in more than one way.
    """
    if len(text) > _MOST_LETTERS or is_card(text):
        return NamedGpus(text)
    rest, nodes, how = _machines(" ".join(text.replace("×", "x").split()))
    if _SEVERAL.search(rest):
        raise InputError(f"gpu {text!r} names several cards; give one, or the smallest of mixed cards")
    read = _read(rest, is_card)
    if len(read) > 1 or any(_read(name, is_card) for name, _ in read if not is_card(name)):
        raise InputError(f"gpu {text!r} can be read in several ways; give --gpus N and the card's name alone")
    name, gpus = next(iter(read), (_spellings(rest)[1] if nodes is not None else text, None))
    if nodes is None or gpus is None:
        return NamedGpus(name, gpus, nodes)
    return NamedGpus(name, _in_each(text, gpus, nodes, how), nodes)


def _machines(words: str) -> tuple[str, int | None, str]:
    """Return three values: the text without the words on machines, the number of machines (None: not given), and ``how``.

    ``how`` says how the user counts cards: in ``each`` machine or in ``total``. It is empty if the text does not say.
    """
    each = _EACH.search(words)
    if each:
        words = f"{words[: each.start()]} {words[each.end() :]}"
    place = _PLACES.search(words)
    if place is None:
        return words.strip(), None, "each"
    rest = f"{words[: place.start()]} {words[place.end() :]}".strip(" ,;:()@")
    total = (place["before"] or "").lower() in {"across", "over"}
    how = "each" if each or place["after"] else "total" if total else ""
    return " ".join(rest.split()), _number(place[2]), how


def _in_each(text: str, gpus: int, nodes: int, how: str) -> int:
    """The number of cards in each machine; ``how`` is the last value of :func:`_machines`.

    Raises:
        InputError: the text does not say whether ``gpus`` is per machine, or the cards do not divide among the machines.
    """
    if how == "each" or nodes == 1:
        return gpus
    if not how:
        raise InputError(
            f"gpu {text!r}: {gpus} cards in each of {nodes} machines, or in all? Give the card's name alone, "
            f"--nodes {nodes}, and with --gpus the cards in each machine"
        )
    if nodes == 0 or gpus % nodes:
        raise InputError(
            f"gpu {text!r}: {gpus} cards do not divide into {nodes} machines; give --gpus N, in each machine, and --nodes N"
        )
    return gpus // nodes


_PATTERNS = (
    (re.compile(rf"(?:an? )?(?:pair|set) of {_N} (.+)", re.IGNORECASE), 2, 1),
    (re.compile(r"(?:an? )?(pair) of (.+)", re.IGNORECASE), 2, 1),
    (re.compile(rf"{_N}\s*[x*]\s*(?:of )?(.+)", re.IGNORECASE), 2, 1),
    (re.compile(rf"(.+?)\s*(?:(?<![a-z])x|[*:])\s*{_N}", re.IGNORECASE), 1, 2),
    (re.compile(rf"(.+?)\s*\(\s*[x*]?\s*{_N}\s*[x*]?\s*\)", re.IGNORECASE), 1, 2),
    (re.compile(rf"(.+?)\s+{_N}\s*[x*]", re.IGNORECASE), 1, 2),
    (re.compile(rf"{_N}\s+(?:gpus?\s+|cards?\s+)?(?:of )?(.+)", re.IGNORECASE), 2, 1),
)
"""(pattern, group of the card's name, group of the number of cards). Only the last pattern may be wrong: it also
matches a card's name that begins with a number, for example ``7900 XTX``."""

_PLAIN = 999
"""The largest number that is read as a count of cards if the rest of the text is not a known card."""


def _read(words: str, is_card: Callable[[str], bool]) -> set[tuple[str, int]]:
    """All ways to read a text as (known card, number of cards); if there is none, the first way with an unknown card."""
    known, unknown = set[tuple[str, int]](), list[tuple[str, int]]()
    for place, (pattern, name_group, number_group) in enumerate(_PATTERNS):
        found = pattern.fullmatch(_FILLERS.sub("", words).strip() if place else words)
        if not found:
            continue
        number, names = _number(found[number_group]), _spellings(found[name_group])
        name = next((name for name in names if is_card(name)), None)
        if name is not None:
            known.add((name, number))
        elif place < len(_PATTERNS) - 1 and number <= _PLAIN:
            unknown.append((names[-1], number))
    return known or set(unknown[:1])


def _number(word: str) -> int:
    word = word.lower()
    return 2 if word == "pair" else _NUMBERS[word] if word in _NUMBERS else int(word)


def _spellings(name: str) -> tuple[str, ...]:
    """The spellings to try for a name: as written, without words such as ``GPUs``, and also in the singular."""
    bare = " ".join(_FILLERS.sub(" ", name.strip()).split())
    return name.strip(), bare, re.sub(r"(?<=[0-9a-zA-Z])s\b", "", bare)


def with_gb(name: str) -> str:
    """The name in lower case, with its memory size (``80G`` or ``80 GB``) rewritten as ``80gb``."""
    return re.sub(r"(?<![a-z0-9])(\d+)\s?g(?:i?b)?\b", r"\1gb", name.lower())


def size_in(name: str) -> int | None:
    """The memory size in a name, in GB: 80 for ``a100-80gb``; None if the name has none."""
    said = re.search(r"(?<![a-z0-9])(\d{1,6})gb\b", with_gb(name))
    return int(said[1]) if said else None


def form_in(name: str) -> str | None:
    """The form factor in a name, one of :data:`FORMS`; None if the name has none."""
    squeezed = re.sub("[^a-z0-9]", "", name.lower())
    if "hbm3" in squeezed and "h100" in squeezed:
        return "sxm"  # in the driver's names only the H100 SXM has HBM3
    return next((form for form in FORMS if form in squeezed), None)


_DECORATION = re.compile("nvidia|geforce|tesla|quadro|amd|instinct|rtx|gtx|generation|gpu|graphics")
"""Parts of a card's name that do not distinguish cards."""


@cache
def name_key(name: str) -> str:
    """A key for comparing names: the letters and digits in lower case, without words such as ``NVIDIA`` and ``RTX``."""
    return _DECORATION.sub("", re.sub("[^a-z0-9]", "", name.lower()))


def name_words(name: str) -> set[str]:
    """The words of a name in lower case. Names are compared by whole words: an RTX A4000 is not an A40."""
    return set(re.findall("[a-z0-9]+", name.lower()))
