"""Names of flags and keys in other trainers (``aliases.yaml``), each with ScaleGPT's name or a sentence of advice.

Errors about unknown flags, keys and settings get their hints from :func:`hint`.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from scalegpt.errors import nearest
from scalegpt.structured import parse_yaml

_ONLY_TRAIN = {
    "runs_dir",
    "model_name",
    "fresh",
    "device",
    "progress",
    "trust_checkpoint",
    "allow_change",
    "resume_step",
}
_ONLY_PLAN = {
    "gpu",
    "memory_gb",
    "host_memory_gb",
    "network",
    "network_gbps",
    "price_per_gpu_hour",
    "sweep_gpus",
    "html",
    "trace",
    "no_calibration",
    "ui",
    "port",
}
_ONLY_LAUNCHER = {"gpus", "nodes"}
"""Flags that only ``train`` has; flags that only ``plan`` has; flags of ``plan`` that belong to the launcher in training."""


@cache
def words_of_others() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Two tables: setting or flag → its names in other trainers; sentence of advice → the names that it is for.

    ``{name}`` in a sentence stands for a setting; :func:`hint` writes it as a flag or as a key.
    """
    path = Path(__file__).with_suffix(".yaml")
    read = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    settings = {setting: words.split() for setting, words in read["settings"].items()}
    return settings, {entry["answer"]: entry["words"].split() for entry in read["answers"]}


@cache
def _meaning() -> tuple[dict[str, str], dict[str, str]]:
    """Two tables, with another trainer's :func:`_squeezed` name as key: ScaleGPT's setting, and the sentence of advice."""
    settings, answers = (
        {_squeezed(word): meaning for meaning, words in table.items() for word in words} for table in words_of_others()
    )
    return settings, answers


def hint(word: object, known: Iterable[str], listed: str | None = None) -> str:
    """A hint for an unknown word: ScaleGPT's name for it, a sentence of advice, or else the nearest known words.

    Args:
        word: the unknown word: a flag such as ``--batch-size``, or a key.
        known: the words that are valid in its place: either all flags or all keys.
        listed: the command that lists the known words; the hint names it if they are too many for a line.

    Returns:
        Text that begins with ``;`` or ``:``, ready to append to a message.
    """
    names = {_plain(name): name for name in known}
    mark = "--" if all(name.startswith("--") for name in names.values()) else ""
    plain, found = _plain(word), ""
    last = plain.rsplit(".", 1)[-1]
    for own in dict.fromkeys((plain, last, last.removeprefix("no_").removeprefix("use_"))):
        setting = own if own in names else _meaning()[0].get(_squeezed(own))
        if setting in names:
            return f"; did you mean {names[setting]}?"
        found = found or _elsewhere(own)
    near = nearest(plain, names, listed)
    if "did you mean" in near:
        near = near.replace(" mean ", f" mean {mark}").replace(", ", f", {mark}")
        # If the command has no run settings, its own flag is a better hint than a flag of another command.
        found = found if "micro_batch" in names else ""
    return re.sub(r"\{(\w+)\}", rf"{mark}\1", found) or near


def _elsewhere(word: str) -> str:
    """A hint for an unknown word: the command that has such a flag, or a sentence of advice; empty if there is neither."""
    settings, answers = _meaning()
    setting = settings.get(_squeezed(word), word)
    if setting in _ONLY_LAUNCHER:
        return f": {answers['worldsize']}"
    if setting != word or setting in _ONLY_TRAIN | _ONLY_PLAN:
        command = "scalegpt plan" if setting in _ONLY_PLAN else "scalegpt train"
        return f": it is a flag of `{command}`" if setting == word else f": here it is --{setting} of `{command}`"
    sentence = answers.get(_squeezed(word))
    return f": {sentence}" if sentence else ""


def _plain(word: object) -> str:
    """A flag or key as the tables spell it: in lower case, with ``_`` for ``-``, without leading hyphens."""
    return str(word).strip().lstrip("-").lower().replace("-", "_")


def _squeezed(word: str) -> str:
    """A word without underscores and dots, so that ``seqlen`` and ``seq_len`` are the same word."""
    return word.replace("_", "").replace(".", "")
