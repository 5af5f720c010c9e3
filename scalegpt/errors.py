"""The two errors of a command, and the exit status of each.

Every message is one line that says what is wrong, where, and what to do. Invariants of ScaleGPT itself are ``assert``s, whose
traceback ``--debug`` shows.
"""

import difflib
import re
from collections.abc import Iterable

_MOST_OFFERED, _MOST_LISTED, _LONGEST_WORD = 3, 12, 100


class InputError(ValueError):
    """An option, a file or a combination of them cannot be used. Exit status 2; nothing was written."""

    exit_status = 2


class NoSpaceError(InputError):
    """No disk space is left."""


class RunError(RuntimeError):
    """The run failed though its input was valid: a full disk, a non-finite loss, a lost rank. Exit status 1."""

    exit_status = 1


def nearest(word: object, known: Iterable[str], listed: str | None = None) -> str:
    """A hint that names the closest known words, to append to a message.

    Args:
        word: the word given.
        known: the words allowed.
        listed: the command that lists the allowed words; the hint names it if there are too many words for a line.

    Returns:
        ``"; did you mean a, b?"``; if no word is close, ``"; known: …"`` or the command that lists the words.
    """
    candidates = sorted(known)
    word = str(word)[:_LONGEST_WORD]
    folded = {candidate.lower(): candidate for candidate in reversed(candidates)}
    text = word.lower()
    # If the word abbreviates known words, words that merely share letters with it (seed for wd) are not offered.
    close = sorted(each for each in folded if _abbreviates(text, each))[:_MOST_OFFERED]
    close = close or difflib.get_close_matches(text, folded, n=_MOST_OFFERED, cutoff=0.6)
    if close:
        return f"; did you mean {', '.join(folded[match] for match in close)}?"
    if listed is not None and len(candidates) > _MOST_LISTED:
        return f"; `{listed}` lists the valid names"
    return f"; known: {', '.join(candidates)}"


def _abbreviates(word: str, name: str) -> bool:
    """Whether a word consists of prefixes of a name's first parts, as ``lr`` or ``learn`` do for ``learning_rate``."""
    letters = "".join(_parts(word))
    return len(letters) > 1 and _begins(letters, _parts(name))


def _begins(letters: str, parts: list[str]) -> bool:
    if not letters or not parts:
        return not letters
    taken = range(1, len(parts[0]) + 1)
    return any(letters.startswith(parts[0][:n]) and _begins(letters[n:], parts[1:]) for n in taken)


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[^a-z0-9]+", name) if part]
