"""Lets ranks watch each other without a collective, by heartbeat files and a halt file that ends all ranks.

Every rank writes ``runs/NAME/.heartbeats/START/rank_N.json`` again and again (START is a random name for each start of
the run). The file says that the rank lives and what it is doing. A collective cannot do this, since a rank that waits
in a collective does nothing else. A rank that must end writes ``halt.json`` in the same folder, so that the others do
not wait for it. Every rank looks for that file whenever it writes its heartbeat.

On a machine that does not see the run's folder, ranks use a temporary folder of that machine. They then watch only each
other. That a rank of another machine has ended they learn from its broken connections, or by their time-out.
"""

import json
import os
import secrets
import shutil
import socket
import tempfile
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
"""Seconds between two heartbeats of a rank, in a run of at most :data:`RANKS_PER_SECOND` ranks."""

SEE_SECONDS = 10.0
"""Seconds within which a machine must see a new file of another one; NFS may keep an old listing for some seconds."""

RANKS_PER_SECOND = 64
"""The most heartbeats per second of all ranks together.

In a larger run each rank writes less often, to spare the file server.
"""


@dataclass(frozen=True)
class Beat:
    """A heartbeat: what a rank is doing, and in which process.

    Attributes:
        step: number of the step that the rank works on.
        place: what the rank does, such as ``loader`` or ``forward and backward``.
        moves: how many places the rank has entered. All ranks enter the same places, so the rank with the fewest is behind.
        count: how many heartbeats the rank has written.
        pid: the process's number.
        host: the machine's name.
        born: when the process began, since process numbers are reused (:func:`scalegpt.system.processes.birth_of`).
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
        """Whether the rank's process is known to have ended; False for a rank on another machine."""
        return self.host == socket.gethostname() and has_ended(self.pid, self.born)

    @property
    def name(self) -> str:
        """The rank, its process and its machine, in words."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def __str__(self) -> str:
        return f"{self.name}: step {self.step}, {self.place}"


@dataclass(frozen=True)
class Halt:
    """The content of ``halt.json``: why and how all ranks must end.

    Attributes:
        rank: the rank that wrote the halt.
        status: the exit status of all ranks.
        state: the state for ``run_status.json``: ``failed`` or ``stopped``.
        cause: the cause in words.
    """

    rank: int
    status: int
    state: str
    cause: str


Note = TypeVar("Note", Beat, Halt)


def _read(kind: type[Note], path: Path) -> Note | None:
    """Read a rank's heartbeat or a halt; None if the file is missing, cannot be read or lacks an entry."""
    try:
        values = read_object(path)
    except (OSError, InputError):
        return None
    types = {field.name: field.type for field in fields(kind)}
    if values.keys() != types.keys() or any(type(values[name]) is not kind for name, kind in types.items()):
        return None
    return kind(**values)


def is_seen(path: Path, seconds: float = SEE_SECONDS) -> bool:
    """Whether this machine sees a new file or folder of another one; waits ``seconds`` for it."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


class Heartbeats:
    """Writes this rank's heartbeat and halt files, and reads those of all ranks.

    Args:
        folder: the run's folder.
        world: the ranks.

    Attributes:
        folder: the folder of this start's heartbeats; None before :meth:`open`.
        watched: the ranks whose heartbeats are in it.
        seconds: seconds between two heartbeats of a rank.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.parent, self.world = folder / FOLDER, world
        self.folder: Path | None = None
        self.watched: tuple[int, ...] = tuple(range(world.size))
        self.seconds = max(BEAT_SECONDS, world.size / RANKS_PER_SECOND)
        self._count = 0
        self._born = own_birth()
        self._host = socket.gethostname()

    def open(self) -> None:
        """Make a new folder for the heartbeats of this start; all ranks must call it together.

        Raises:
            RunError: the folder cannot be made.
        """
        common = self.world.on_first(self._make)
        if len(self.world.machines) < 2:
            self.folder = common
            return
        self.folder = self.world.on_each_machine(lambda: common if is_seen(common) else Path(tempfile.mkdtemp()))
        places = self.world.gather((self.folder, socket.gethostname()))
        mine = places[self.world.rank]
        self.watched = tuple(
            rank for rank, place in enumerate(places) if place[0] == common == mine[0] or place == mine
        )

    def _make(self) -> Path:
        """Delete the heartbeat folders of earlier starts, and make a new one. Rank 0 only."""
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
        """Delete the heartbeat files that this machine has made, when no rank needs them any more.

        Called on the first rank of each machine.
        """
        if self.world.is_first:
            shutil.rmtree(self.parent, ignore_errors=True)
        elif self.folder is not None and self.folder.parent != self.parent:
            shutil.rmtree(self.folder, ignore_errors=True)

    def beat(self, step: int, place: str, moves: int) -> None:
        """Write this rank's heartbeat.

        A disk error is ignored, since it must not end the run. Its only effect is that this rank looks stopped when the
        other ranks look for a rank to blame.
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
        """The last heartbeat of each watched rank, by rank; ranks without a readable heartbeat are missing."""
        if self.folder is None:
            return {}
        found = {rank: _read(Beat, self.folder / f"rank_{rank}.json") for rank in self.watched}
        return {rank: beat for rank, beat in found.items() if beat is not None}

    # --- ending together ---------------------------------------------------------------------------------------------

    def halt(self, halt: Halt) -> Halt:
        """Make all ranks end: write ``halt.json``, unless a rank has already written it.

        Returns:
            The halt that counts: the given one, or the one that was written before it.
        """
        if self.folder is None:
            return halt
        path = self.folder / "halt.json"
        mine = self.folder / f".halt.{self.world.rank}"
        try:
            mine.write_text(json.dumps(asdict(halt)), encoding="utf-8")
            give_name(mine, path)  # fails where another rank's halt.json exists: only one halt counts
        except FileExistsError:
            return self.read_halt() or halt
        except OSError:  # without the file the other ranks end by the launcher, or by their time-out
            return halt
        return halt

    def read_halt(self) -> Halt | None:
        """Return the halt for all ranks; None where no rank has written one."""
        return None if self.folder is None else _read(Halt, self.folder / "halt.json")

    # --- who is to blame ---------------------------------------------------------------------------------------------

    def blame(self, wait: Callable[[float], object] = time.sleep) -> str:
        """Find the rank that the other ranks wait for, and say in words what it is doing. Takes three heartbeat intervals.

        The rank to blame is one without a heartbeat, else one whose heartbeat has stopped, else the one furthest
        behind. If no rank is behind, the answer says that all ranks are at the same place.

        Args:
            wait: function that waits for a number of seconds.
        """
        before = self.read()
        wait(3 * self.seconds)
        after = self.read()
        missing = [rank for rank in self.watched if rank not in after]
        if missing:
            return f"rank {missing[0]} has written no heartbeat in {self.folder}"
        still = [beat for rank, beat in after.items() if rank in before and before[rank].count == beat.count]
        dead = [beat for beat in still if beat.is_known_dead()]
        if dead:
            return f"{dead[0]}: the process has ended"
        if still:
            return f"{still[0]}: the process writes no heartbeats any more"
        behind = min(after.values(), key=lambda beat: beat.moves)
        if all(beat.moves == behind.moves for beat in after.values()):
            return f"{behind}: {self._whole()}"
        return f"{behind}: the others wait for it"

    def _whole(self) -> str:
        if self.world.size == 1:
            return "the only rank is at this point"
        if len(self.watched) < self.world.size:
            return f"so are all ranks on {self._host}"
        return f"all {self.world.size} ranks are at this point"

    def is_gone(self, rank: int) -> bool:
        """Whether a rank's process ran on this machine and has ended; False where that is not known."""
        beat = self.read().get(rank)
        return beat is not None and beat.is_known_dead()

    def lost(self) -> Beat | None:
        """Return the last heartbeat of a rank of this machine whose process has ended; None where there is no such rank."""
        return next((beat for beat in self.read().values() if beat.is_known_dead()), None)
