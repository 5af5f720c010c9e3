"""Where a text can be cut into pieces whose token ids, joined, are those of the whole text."""

import re

HARD_LIMIT_CHARACTERS = 8 << 20
"""Text without a safe place is cut at this many characters, to bound memory; one or two tokens may then differ."""

_SAFEST = re.compile(r"(?<=\S)[ \n](?=\S)")
_SAFE_FOR_GPT2 = re.compile(r"[ \n](?=\S)")


def cut_place(text: str) -> int:
    r"""The last position at which text can be cut without changing its ids; 0 if there is none yet.

    The first choice is before a single space, or after a single newline, between two characters that are no white space.
    There the patterns by which GPT-2, Llama 3, Qwen and GPT-4o split text before they merge bytes have a boundary, with or
    without the text on the other side. SentencePiece's tokens do not span a space after a word either.

    The second choice is before any space or newline that a non-space follows. That is safe for GPT-2's pattern, which splits
    text into words, numbers and signs, each with at most one space in front, and runs of white space. In a run before a
    non-space, ``\s+(?!\S)`` matches all characters but the last, which is matched alone or with the word after it. Without
    the text after the position, ``\s++$`` matches the same characters of the run. The pattern has no lookbehind, so text
    after the position is matched as before. Python's ``\S`` excludes a few control characters that are non-spaces for
    tiktoken's engine, which only makes cuts rarer.

    Without such a position, text of :data:`HARD_LIMIT_CHARACTERS` or more is cut at its end.
    """
    for pattern in (_SAFEST, _SAFE_FOR_GPT2):
        for window in (4096, len(text)):
            found = list(pattern.finditer(text, max(1, len(text) - window)))
            if found and pattern is _SAFEST:
                return found[-1].start() + (found[-1][0] == "\n")
            if found:
                return found[-1].start()
    return len(text) if len(text) >= HARD_LIMIT_CHARACTERS else 0
