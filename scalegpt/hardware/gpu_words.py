"""Reading what a user writes for a GPU: the numbers of cards and machines, a memory size, a form. Knows no cards."""

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
"""Letters of the longest text that may name a card."""

_SEVERAL = re.compile(r"[,;+&|]|\b(?:and|or|plus)\b", re.IGNORECASE)
_FILLERS = re.compile(r"^(?:an?|my|our|the)\b|\b(?:gpus?|cards?|graphics)\b", re.IGNORECASE)

FORMS = ("pcie", "sxm", "nvl")
"""The forms that one kind of card may come in."""


@dataclass(frozen=True)
class NamedGpus:
    """The card that a text names, and the numbers of cards in each machine and of machines; None where they are not given."""

    name: str
    gpus: int | None = None
    nodes: int | None = None


def named_gpus(text: str, is_card: Callable[[str], bool]) -> NamedGpus:
    """The card, the number of cards, and the number of machines that a text names.

    Args:
        text: such as ``2x 3090``, ``A100:8``, ``dual 4090``, ``4x L40S across 2 nodes``.
        is_card: whether a text names a card, or several that it does not distinguish.

    Raises:
        InputError: it names several kinds of cards, or its numbers can be read in more than one way.
    """
    if len(text) > _MOST_LETTERS or is_card(text):
        return NamedGpus(text)
    rest, nodes, how = _machines(" ".join(text.replace("×", "x").split()))
    if _SEVERAL.search(rest):
        raise InputError(f"gpu {text!r} names several cards; give one, of mixed cards the smallest")
    read = _read(rest, is_card)
    if len(read) > 1 or any(_read(name, is_card) for name, _ in read if not is_card(name)):
        raise InputError(f"gpu {text!r} can be read in several ways; give --gpus N and the card's name alone")
    name, gpus = next(iter(read), (_spellings(rest)[1] if nodes is not None else text, None))
    if nodes is None or gpus is None:
        return NamedGpus(name, gpus, nodes)
    return NamedGpus(name, _in_each(text, gpus, nodes, how), nodes)


def _machines(words: str) -> tuple[str, int | None, str]:
    """The text without its machines, their number, and whether cards are counted in ``each``, in ``total``, or not said."""
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
    """The cards in each machine.

    Raises:
        InputError: it is not clear whether they are counted in each machine, or they do not divide evenly.
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
"""Pattern, group of the card, and group of the number; only the last may match a name without a number."""

_PLAIN = 999
"""A larger number is read as one only where the rest is the name of a card: 7900 XTX is not a number of cards."""


def _read(words: str, is_card: Callable[[str], bool]) -> set[tuple[str, int]]:
    """The ways to read a text as a card and a number; where no card is known, the first way that its form allows."""
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
    """A name as written, without words such as ``GPUs``, and the singular of a plural."""
    bare = " ".join(_FILLERS.sub(" ", name.strip()).split())
    return name.strip(), bare, re.sub(r"(?<=[0-9a-zA-Z])s\b", "", bare)


def with_gb(name: str) -> str:
    """The name in lower case, with a size such as ``80G`` or ``80 GB`` written ``80gb``."""
    return re.sub(r"(?<![a-z0-9])(\d+)\s?g(?:i?b)?\b", r"\1gb", name.lower())


def size_in(name: str) -> int | None:
    """The memory in GB in a name, such as 80 of ``a100-80gb``."""
    said = re.search(r"(?<![a-z0-9])(\d{1,6})gb\b", with_gb(name))
    return int(said[1]) if said else None


def form_in(name: str) -> str | None:
    """The form in a name: one of :data:`FORMS`, or None."""
    squeezed = re.sub("[^a-z0-9]", "", name.lower())
    if "hbm3" in squeezed and "h100" in squeezed:
        return "sxm"  # the driver's name of an H100 with SXM, and of no other
    return next((form for form in FORMS if form in squeezed), None)


_DECORATION = re.compile("nvidia|geforce|tesla|quadro|amd|instinct|rtx|gtx|generation|gpu|graphics")
"""Parts of a card's name that make no difference."""


@cache
def name_key(name: str) -> str:
    """A name without spaces, case, and the words that all cards of a maker have."""
    return _DECORATION.sub("", re.sub("[^a-z0-9]", "", name.lower()))


def name_words(name: str) -> set[str]:
    """The whole words of a name, in lower case: an RTX A4000 is not an A40."""
    return set(re.findall("[a-z0-9]+", name.lower()))
