"""Where a text can be cut into pieces whose token ids, joined, are those of the whole text."""

import re

HARD_LIMIT_CHARACTERS = 2 << 20
"""Text without a safe place is cut at this many characters; one or two tokens may then differ.

tiktoken takes about 40 bytes of memory for each byte of a single word, so this many emoji take 0.3 GiB.
"""

_AROUND = 2
"""The characters before and after a place that decide on it."""

_PLACES = (re.compile(r"(?<=\S)(?= \S)"), re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?=[ \n]\S)"))


def cut_place(text: str, searched: int = 0) -> int:
    r"""The last position at which text can be cut without changing its ids; 0 if there is none yet.

    ``searched`` characters of the text are known to have none: they were searched in vain when the text was shorter. So the
    time for a long text without a place grows with its length, not with the square of it.

    The first choice is before a single space between two characters that are no white space, and the second is after such a
    newline. There the patterns by which GPT-2, Llama 3, Qwen and GPT-4o split text before they merge bytes have a boundary,
    with or without the text on the other side. SentencePiece's tokens do not span a space after a word either.

    The third choice is before any space or newline that a non-space follows. That is safe for GPT-2's pattern, which splits
    text into words, numbers and signs, each with at most one space in front, and runs of white space. In a run before a
    non-space, ``\s+(?!\S)`` matches all characters but the last, which is matched alone or with the word after it. Without
    the text after the position, ``\s++$`` matches the same characters of the run. The pattern has no lookbehind, so text
    after the position is matched as before. Python's ``\S`` excludes a few control characters that are non-spaces for
    tiktoken's engine, which only makes cuts rarer.

    Without such a position, text of :data:`HARD_LIMIT_CHARACTERS` or more is cut at its end.
    """
    begin = max(1, searched - _AROUND)
    if text.find(" ", begin) >= 0 or text.find("\n", begin) >= 0:  # far faster than the patterns
        for pattern in _PLACES:
            for window in (4096, len(text)):
                places = [match.start() for match in pattern.finditer(text, max(begin, len(text) - window))]
                if places:
                    return places[-1]
    return len(text) if len(text) >= HARD_LIMIT_CHARACTERS else 0
