"""What the ranks of a run know of each other without talking: a small file of each, and one that ends them all.

Every rank writes ``runs/NAME/.heartbeats/START/rank_N.json``, where it is and that it lives. Collectives cannot tell this: a
rank that waits in one hears nothing. The first rank that must end, and would leave the others waiting, writes ``halt.json``
beside them; the others look for it as often as they write.
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
"""How often a rank writes; of more than :data:`RANKS_PER_SECOND` ranks each writes less often, for the file server's sake."""

RANKS_PER_SECOND = 64


@dataclass(frozen=True)
class Beat:
    """Where a rank is.

    Attributes:
        step: the step it works on.
        place: such as ``loader``, ``forward and backward``.
        moves: how many places it has been at; all ranks go through the same ones, so fewer means behind.
        count: how often it has written.
        pid: its process.
        host: its machine.
        born: tells its process from others that had its number (:func:`scalegpt.system.processes.birth_of`).
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
        """Whether its process has ended, as far as can be seen from here."""
        return self.host == socket.gethostname() and has_ended(self.pid, self.born)

    @property
    def name(self) -> str:
        """Which rank it is of, and where that runs."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def __str__(self) -> str:
        return f"{self.name}: step {self.step}, {self.place}"


@dataclass(frozen=True)
class Halt:
    """Why all ranks must end.

    Attributes:
        rank: who says so.
        status: the exit status for all.
        state: for ``run_status.json``, ``failed`` or ``stopped``.
        cause: in words.
    """

    rank: int
    status: int
    state: str
    cause: str


Note = TypeVar("Note", Beat, Halt)


def _made(kind: type[Note], path: Path) -> Note:
    """What a rank has written to a file.

    Raises:
        InputError: it is not whole, as on a disk that is full, or holds something else.
        OSError: it is missing or cannot be read.
    """
    values = read_object(path)
    types = {field.name: field.type for field in fields(kind)}
    if values.keys() != types.keys() or any(type(values[name]) is not kind for name, kind in types.items()):
        raise InputError(f"{path} holds something else")
    return kind(**values)


class Heartbeats:
    """The files of all ranks, seen from one.

    Args:
        folder: the run's directory, which all ranks see.
        world: the ranks.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.parent, self.world = folder / FOLDER, world
        self.folder: Path | None = None
        self.seconds = max(BEAT_SECONDS, world.size / RANKS_PER_SECOND)
        self._count = 0
        self._born = own_birth()
        self._host = socket.gethostname()

    def open(self) -> None:
        """Begin anew, in a folder that no earlier start has used; all ranks must call it together.

        Raises:
            RunError: the folder cannot be made.
        """
        self.folder = self.world.on_first(self._make)

    def _make(self) -> Path:
        """Make a folder, and take away what earlier starts left. First rank only."""
        shutil.rmtree(self.parent, ignore_errors=True)
        folder = self.parent / secrets.token_hex(8)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{folder} cannot be made: {error.strerror}; make room, or the folder writable") from None
        return folder

    def remove(self) -> None:
        """Take everything away, once no rank looks any more. First rank only."""
        shutil.rmtree(self.parent, ignore_errors=True)

    def beat(self, step: int, place: str, moves: int) -> None:
        """Say where this rank is.

        A disk that cannot be written must not end a run by way of its heartbeat: the others will think that this rank stands
        still, and only when they look for one that does.
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
        """What each rank last said; a rank that never said anything is absent."""
        found: dict[int, Beat] = {}
        if self.folder is None:
            return found
        for rank in range(self.world.size):
            try:
                found[rank] = _made(Beat, self.folder / f"rank_{rank}.json")
            except (OSError, InputError):  # not there, or half there on a disk that is full
                continue
        return found

    # --- ending together ---------------------------------------------------------------------------------------------

    def halt(self, halt: Halt) -> Halt:
        """Tell all ranks to end.

        Returns:
            What they are told: ours, or what another rank has said before.
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
        except OSError:  # nobody can be told this way: they will learn from the launcher, or from their time-out
            return halt
        return halt

    def read_halt(self) -> Halt | None:
        """What all ranks are told; None: nothing."""
        if self.folder is None:
            return None
        try:
            return _made(Halt, self.folder / "halt.json")
        except (OSError, InputError):
            return None

    # --- who is to blame ---------------------------------------------------------------------------------------------

    def blame(self, wait: Callable[[float], object] = time.sleep) -> str:
        """Which rank keeps the others waiting, and where it is; takes three beats.

        A rank that says nothing more is stopped or dead; else the one that has come least far; else all wait for each other.
        """
        before = self.read()
        wait(3 * self.seconds)
        after = self.read()
        missing = [rank for rank in range(self.world.size) if rank not in after]
        if missing:
            return f"rank {missing[0]} has never said anything in {self.folder}"
        still = [beat for rank, beat in after.items() if rank in before and before[rank].count == beat.count]
        dead = [beat for beat in still if beat.is_known_dead()]
        if dead:
            return f"{dead[0]}: the process has ended"
        if still:
            return f"{still[0]}: the process stands still"
        behind = min(after.values(), key=lambda beat: beat.moves)
        if all(beat.moves == behind.moves for beat in after.values()):
            whole = "it is there" if self.world.size == 1 else f"all {self.world.size} ranks are there"
            return f"{behind}: {whole}"
        return f"{behind}: it keeps the others waiting"

    def is_gone(self, rank: int) -> bool:
        """Whether a rank is of this machine, and its process has ended."""
        beat = self.read().get(rank)
        return beat is not None and beat.is_known_dead()

    def lost(self) -> Beat | None:
        """A rank of this machine whose process has ended."""
        return next((beat for beat in self.read().values() if beat.is_known_dead()), None)
