"""Folders that ``save_to_disk`` of Hugging Face datasets wrote: which of their files hold the records."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from scalegpt.errors import InputError
from scalegpt.storage import read_text
from scalegpt.text import one_line

TRAIN = "train"
"""The split that is read of a data set with several, as other trainers do; the preparation holds out text of its own."""

_DICT, _STATE = "dataset_dict.json", "state.json"


def is_saved(names: Set[str]) -> bool:
    """Whether a folder holds a data set or its splits, by the names of its entries."""
    return _DICT in names or ("dataset_info.json" in names and _STATE in names)


def is_cache(names: Set[str]) -> bool:
    """Whether a folder is part of the cache of datasets, by the names of its entries. It may mix splits and old copies."""
    return "dataset_info.json" in names and _STATE not in names and any(name.endswith(".arrow") for name in names)


def parts_of(folder: Path, names: Set[str]) -> tuple[list[str], list[str]]:
    """The entries of a saved folder to read: a split's folder, or Arrow files in the order of their records.

    Args:
        folder: the folder, for which :func:`is_saved` holds.
        names: the names of its entries.

    Returns:
        The names to read, and those of the splits that are not read.

    Raises:
        InputError: its JSON files are damaged, a file is missing, or the split is not clear.
    """
    if _DICT in names:
        splits = _names(folder / _DICT, _object(folder / _DICT).get("splits"))
        if TRAIN not in splits and len(splits) != 1:
            raise InputError(
                f"{one_line(folder)} is a data set without a split {TRAIN}; name the folder of one of its splits: "
                f"{', '.join(map(one_line, splits))}"
            )
        chosen = [TRAIN] if TRAIN in splits else splits
        return _present(folder, chosen, names), [split for split in splits if split not in chosen]
    state = _object(folder / _STATE)
    if state.get("_indices_data_files"):
        raise InputError(
            f"{one_line(folder)} is a selection of a data set, in an old form of datasets; load it there and save it again"
        )
    files = state.get("_data_files")
    listed = (
        [each.get("filename") if isinstance(each, dict) else None for each in files]
        if isinstance(files, list)
        else None
    )
    return _present(folder, _names(folder / _STATE, listed), names), []


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be read: {error.strerror}; make it readable") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _names(path: Path, found: Any) -> list[str]:
    """The list of names in a JSON file: of entries of its folder, and of no others."""
    if not isinstance(found, list) or not found:
        raise _damaged(path)
    if not all(isinstance(name, str) and name == Path(name).name for name in found):
        raise _damaged(path)
    return found


def _present(folder: Path, chosen: list[str], names: Set[str]) -> list[str]:
    missing = next((name for name in chosen if name not in names), None)
    if missing is not None:
        raise InputError(f"{one_line(folder)} is a saved data set without its {one_line(missing)}; get a whole copy")
    return chosen


def _damaged(path: Path) -> InputError:
    return InputError(f"{one_line(path)} is damaged, so the data set beside it cannot be read; save it again")
