"""The two ways in which a command ends badly, and the exit status of each.

Every message is one line that says what is wrong, where, and what to do. Invariants of our own are ``assert``s; they are
never the user's fault and are shown with a traceback under ``--debug``.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot work: an option, a file, a combination. Exit status 2, nothing written."""

    exit_status = 2


class RunError(RuntimeError):
    """A run that began properly failed: a full disk, a non-finite loss, a lost rank. Exit status 1."""

    exit_status = 1


def nearest(word: object, known: Iterable[str]) -> str:
    """A hint that names the closest known words, ready to append to a message.

    Returns ``"; did you mean a, b?"``, or ``"; known: …"`` when nothing is close.
    """
    candidates = sorted(known)
    folded = {candidate.lower(): candidate for candidate in reversed(candidates)}
    close = [folded[match] for match in difflib.get_close_matches(str(word).lower(), folded, n=3, cutoff=0.6)]
    if close:
        return f"; did you mean {', '.join(close)}?"
    return f"; known: {', '.join(candidates)}"
