"""What ranks know of each other without a collective: a heartbeat file of each rank, and one file that ends all of them.

Every rank writes ``runs/NAME/.heartbeats/START/rank_N.json``: that it lives, and where it is. A collective cannot be used for
this: a rank that waits in one does nothing else. A rank that must end, and would leave the others waiting, writes
``halt.json`` beside them; the others look for it as often as they write.
"""

import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from scalegpt.backends import World
from scalegpt.errors import InputError, RunError
from scalegpt.storage import give_name, write_atomic
from scalegpt.structured import read_object
from scalegpt.system.processes import has_ended, own_birth

FOLDER = ".heartbeats"

BEAT_SECONDS = 1.0
"""Seconds between two heartbeats of a rank; more with more than :data:`RANKS_PER_SECOND` ranks, to spare the file server."""

RANKS_PER_SECOND = 64


@dataclass(frozen=True)
class Beat:
    """Where a rank is.

    Attributes:
        step: the step it works on.
        place: such as ``loader``, ``forward and backward``.
        moves: the number of places it has been at; all ranks pass the same ones, so fewer means behind.
        count: the number of its heartbeats.
        pid: its process.
        host: its machine.
        born: when the process began: numbers are used again (:func:`scalegpt.system.processes.birth_of`).
    """

    rank: int
    step: int
    place: str
    moves: int
    count: int
    pid: int
    host: str
    born: str

    def is_known_dead(self) -> bool:
        """Whether its process has ended, as far as this machine can see."""
        return self.host == socket.gethostname() and has_ended(self.pid, self.born)

    @property
    def name(self) -> str:
        """The rank and where it runs."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def __str__(self) -> str:
        return f"{self.name}: step {self.step}, {self.place}"


@dataclass(frozen=True)
class Halt:
    """Why all ranks must end.

    Attributes:
        rank: the one that wrote it.
        status: the exit status of all.
        state: for ``run_status.json``, ``failed`` or ``stopped``.
        cause: in words.
    """

    rank: int
    status: int
    state: str
    cause: str


Note = TypeVar("Note", Beat, Halt)


def _read(kind: type[Note], path: Path) -> Note | None:
    """A file that a rank has written; None where it is missing or cannot be read, is not whole or holds something else."""
    try:
        values = read_object(path)
    except (OSError, InputError):
        return None
    types = {field.name: field.type for field in fields(kind)}
    if values.keys() != types.keys() or any(type(values[name]) is not kind for name, kind in types.items()):
        return None
    return kind(**values)


class Heartbeats:
    """The heartbeat files of all ranks, as one rank sees them."""

    def __init__(self, folder: Path, world: World) -> None:
        self.parent, self.world = folder / FOLDER, world
        self.folder: Path | None = None
        self.seconds = max(BEAT_SECONDS, world.size / RANKS_PER_SECOND)
        self._count = 0
        self._born = own_birth()
        self._host = socket.gethostname()

    def open(self) -> None:
        """Make a new folder for this start; all ranks must call it together.

        Raises:
            RunError: the folder cannot be made.
        """
        self.folder = self.world.on_first(self._make)

    def _make(self) -> Path:
        """Make the folder, and delete those of earlier starts. First rank only."""
        shutil.rmtree(self.parent, ignore_errors=True)
        folder = self.parent / secrets.token_hex(8)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise RunError(
                f"{folder} cannot be made: {error.strerror}; free disk space or make the folder writable"
            ) from None
        return folder

    def remove(self) -> None:
        """Delete everything, after all ranks have ended. First rank only."""
        shutil.rmtree(self.parent, ignore_errors=True)

    def beat(self, step: int, place: str, moves: int) -> None:
        """Write this rank's heartbeat.

        A disk error is ignored: it must not end the run. The other ranks take this rank for stopped, and only if they
        look for a rank to blame.
        """
        if self.folder is None:
            return
        self._count += 1
        rank = self.world.rank
        mine = Beat(rank, step, place, moves, self._count, os.getpid(), self._host, self._born)
        try:
            write_atomic(self.folder / f"rank_{rank}.json", json.dumps(asdict(mine)))
        except OSError:
            return

    def read(self) -> dict[int, Beat]:
        """The last heartbeat of each rank; a rank without one is absent."""
        if self.folder is None:
            return {}
        found = {rank: _read(Beat, self.folder / f"rank_{rank}.json") for rank in range(self.world.size)}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    # --- ending together ---------------------------------------------------------------------------------------------

    def halt(self, halt: Halt) -> Halt:
        """Make all ranks end.

        Returns:
            The halt that counts: this one, or that of another rank that was first.
        """
        if self.folder is None:
            return halt
        path = self.folder / "halt.json"
        mine = self.folder / f".halt.{self.world.rank}"
        try:
            mine.write_text(json.dumps(asdict(halt)), encoding="utf-8")
            give_name(mine, path)  # only one can be the first
        except FileExistsError:
            return self.read_halt() or halt
        except OSError:  # the others end by the launcher, or by their time-out
            return halt
        return halt

    def read_halt(self) -> Halt | None:
        """The halt for all ranks, if there is one."""
        return None if self.folder is None else _read(Halt, self.folder / "halt.json")

    # --- who is to blame ---------------------------------------------------------------------------------------------

    def blame(self, wait: Callable[[float], object] = time.sleep) -> str:
        """Which rank the others wait for, and where it is; takes three heartbeats.

        It is a rank whose heartbeat has stopped, else the one that is furthest behind, else they wait for each other.
        """
        before = self.read()
        wait(3 * self.seconds)
        after = self.read()
        missing = [rank for rank in range(self.world.size) if rank not in after]
        if missing:
            return f"rank {missing[0]} has written no heartbeat in {self.folder}"
        still = [beat for rank, beat in after.items() if rank in before and before[rank].count == beat.count]
        dead = [beat for beat in still if beat.is_known_dead()]
        if dead:
            return f"{dead[0]}: the process has ended"
        if still:
            return f"{still[0]}: the process is stopped"
        behind = min(after.values(), key=lambda beat: beat.moves)
        if all(beat.moves == behind.moves for beat in after.values()):
            whole = (
                "the only rank is at this point"
                if self.world.size == 1
                else f"all {self.world.size} ranks are at this point"
            )
            return f"{behind}: {whole}"
        return f"{behind}: the others wait for it"

    def is_gone(self, rank: int) -> bool:
        """Whether a rank ran on this machine, and its process has ended."""
        beat = self.read().get(rank)
        return beat is not None and beat.is_known_dead()

    def lost(self) -> Beat | None:
        """A rank of this machine whose process has ended."""
        return next((beat for beat in self.read().values() if beat.is_known_dead()), None)
