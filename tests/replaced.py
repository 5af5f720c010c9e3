"""A checkpoint that training replaces at a chosen moment of its being read."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from scalegpt.checkpoint import reader


def replaced_at(moment: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let a run seem to have its oldest checkpoint alone, until a function of the reader is about to look at that.

    Then the newest appears, and the oldest is deleted as training does. Returns the path of the oldest.
    """
    old, *_, new = sorted((run / "checkpoints").iterdir())
    hidden = new.rename(new.with_name(f".{new.name}.0.tmp"))
    owner, _, name = moment.rpartition(".")
    holder = getattr(reader, owner) if owner else reader
    real = getattr(holder, name)

    def late(*arguments: Any, **options: Any) -> Any:
        subject = getattr(arguments[0], "path", arguments[0])
        if old.is_dir() and old.name in str(subject):
            hidden.rename(new)
            aside = old.rename(old.with_name(f".{old.name}.deleted.tmp"))
            shutil.rmtree(aside)
        return real(*arguments, **options)

    monkeypatch.setattr(holder, name, late)
    return old
