"""Weights & Biases: online if there is a key, else offline in the run's folder. A run never asks for a key.

wandb's own variables apply, for example ``WANDB_MODE``, ``WANDB_PROJECT``, ``WANDB_ENTITY`` and ``WANDB_DIR``.

**Offline** a record cannot be continued. Each start writes a new record with all steps, and then deletes the old one.
If the old record was uploaded with ``wandb sync``, it stays, and the new record gets another id, since a server accepts
no step twice.

**Online** a run continues under its id. Where steps must be undone, the server is asked to rewind (``resume_from``). If
it refuses, a new record begins under another id, and the run prints a line about it.
"""

import netrc
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from scalegpt.errors import InputError
from scalegpt.text import brief
from scalegpt.training.trackers.base import PROJECT, Entry, Past, Position, Tracker

_HOST = "https://api.wandb.ai"
_LOGIN = "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"


class WandB(Tracker):
    """A run of Weights & Biases."""

    NAME: ClassVar[str] = "wandb"
    MODULE: ClassVar[str] = "wandb"

    @classmethod
    def check(cls, _folder: Path) -> None:
        """See the base class. For an online record, the server checks the key."""
        if not _is_online():
            return
        import wandb

        if not _has_key():
            raise InputError(
                f"log_to wandb: WANDB_MODE is {os.environ.get('WANDB_MODE')}, but there is no key; {_LOGIN}"
            )
        try:
            wandb.login(verify=True, timeout=20)
        except Exception as error:  # the network's, the server's, wandb's own
            raise InputError(f"log_to wandb: the login failed ({brief(error, 200)}); {_LOGIN}") from None

    @property
    def place(self) -> str:
        """See the base class."""
        if _is_online():
            return f"project {_project()} at {os.environ.get('WANDB_BASE_URL') or _HOST}"
        return f"offline in {self._folder}; wandb sync {self._folder}/offline-run-* uploads it"

    @property
    def _folder(self) -> Path:
        """The folder in which wandb makes a folder for each record."""
        return Path(os.environ.get("WANDB_DIR") or self.run.records.path) / "wandb"

    def open(self, position: Position, past: Past) -> tuple[str, int]:
        """See the base class. Rewinds an online record, or begins a new offline record."""
        self._old: list[Path] = []
        if _is_online():
            return self._open_online(position, past)
        name = position.run or secrets.token_hex(4)
        # A start that was killed while it opened its record left one of another id, which only the run's own folder tells.
        mine = f"offline-run-*-{name}" if os.environ.get("WANDB_DIR") else "offline-run-*"
        uploaded = {file.parent for file in self._folder.glob(f"{mine}/*.synced")}
        self._old = [folder for folder in self._folder.glob(mine) if folder not in uploaded]
        if any(folder.name.endswith(f"-{name}") for folder in uploaded):
            name = secrets.token_hex(4)
        self._start(name, mode=os.environ.get("WANDB_MODE", "offline"))
        return name, 0

    def _open_online(self, position: Position, past: Past) -> tuple[str, int]:
        import wandb

        start, step = past.resend_from(position.acked)
        if position.run is None or start == 0:
            name = secrets.token_hex(4)
            self._start(name)
            return name, 0
        if position.is_clean and position.acked == start:
            self._start(position.run, resume="must")
            return position.run, start
        try:
            self._start(None, resume_from=f"{position.run}?_step={step - 1}")
        except wandb.errors.Error as error:
            name = secrets.token_hex(4)
            print(
                f"wandb: run {position.run} cannot be rewound ({brief(error, 100)}); its record continues as {name}",
                flush=True,
            )
            self._start(name)
            return name, 0
        return position.run, start

    def _start(self, name: str | None, **how: Any) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb.init(
            project=_project(),
            name=os.environ.get("WANDB_NAME") or self.run.name,
            id=name,
            dir=str(self._folder.parent),
            settings=wandb.Settings(console="off", silent=True),
            **how,
        )
        facts = {**self.run.settings, **{f"plan.{key}": value for key, value in self.run.plan.items()}}
        self._wandb.config.update(facts, allow_val_change=True)

    def send(self, entries: Sequence[Entry]) -> None:
        """See the base class. When this returns, wandb's own process has the entries.

        Values of one step become one row.
        """
        import wandb

        for entry in entries:
            sample = {} if entry.text is None else {"sample": wandb.Html(_page(entry.text), inject=False)}
            self._wandb.log({**entry.values, **sample, "_timestamp": entry.time}, step=entry.step)

    def settle(self) -> None:
        """Delete the older records, since this one holds all of their entries."""
        for folder in self._old:
            shutil.rmtree(folder)
        self._old = []

    def close(self, state: str | None) -> None:
        """See the base class."""
        self._wandb.finish(exit_code=1 if state == "failed" else 0)


def _page(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<meta charset="utf-8"><pre style="white-space:pre-wrap">{escaped}</pre>'


def _project() -> str:
    return os.environ.get("WANDB_PROJECT") or PROJECT


def _is_online() -> bool:
    """Whether records go to a server: ``WANDB_MODE`` says so, or it is not set and there is a key."""
    return os.environ.get("WANDB_MODE", "online" if _has_key() else "offline") in ("online", "shared")


def _has_key() -> bool:
    """Whether there is a key for the server, in the environment or in the netrc file, where ``wandb login`` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _HOST).hostname or ""
    for path in (Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc")):
        try:
            if netrc.netrc(path.expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
