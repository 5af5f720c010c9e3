"""The machines of a job: what they must have in common, how fast they reach each other, and which of them answers.

The ranks compare their machines through the store by which they met, before the first collective, since a collective
may fail because of a difference. A job on one machine does none of this.
"""

import errno
import hashlib
import json
import os
import platform
import select
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import DistError

import scalegpt
from scalegpt.errors import InputError, RunError
from scalegpt.system.ranks import Ranks

MUST_AGREE = ("scalegpt", "torch")
"""Packages that must be the same on all machines: they decide what a rank sends, and what it takes from the others."""

CLOCK_SECONDS = 10.0
"""A difference of the machines' clocks that is reported. Ranks say the time at about the same moment, within seconds."""

ANSWER_SECONDS = 3.0
"""Seconds within which a machine must answer an attempt to connect."""

SMALL, LARGE = 2**18, 2**22
"""Bytes of the two all-reduces that are timed on a CPU. On GPUs they are :data:`GPU_FACTOR` times as large."""

GPU_FACTOR = 16

ROUNDS = 5
"""Times that each all-reduce is timed; the fastest counts."""

KEY = "scalegpt/machines"


@dataclass(frozen=True)
class Machine:
    """A machine of the job, as its first rank describes it.

    Attributes:
        name: its host name.
        address: its address on the interface that gloo uses; empty: not known.
        interface: the name of that interface; empty: not known.
        first: the first of its ranks, which are numbered consecutively.
        ranks: number of its ranks.
        clock: seconds since the epoch by its clock, when its ranks met the others.
        versions: package → installed version; for ScaleGPT with a digest of its sources.
    """

    name: str
    address: str
    interface: str
    first: int
    ranks: int
    clock: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The machine in words: ``beta (10.77.0.2, ranks 8–15)``."""
        last = self.first + self.ranks - 1
        which = f"rank {self.first}" if self.ranks == 1 else f"ranks {self.first}–{last}"
        return f"{self.name} ({self.address + ', ' if self.address else ''}{which})"


def exchange_machines(
    store: Store, ranks: Ranks, address: str, interface: str, timeout: timedelta
) -> tuple[Machine, ...]:
    """Tell all ranks about this machine, and return all machines in the order of their ranks; all ranks must call it.

    Args:
        store: the store that all ranks share.
        ranks: this process's place.
        address: this machine's address; empty: not known.
        interface: the interface of this address; empty: not known.
        timeout: how long to wait for the other ranks.

    Raises:
        RunError: a rank does not answer in time.
    """
    mine = None
    if ranks.local_rank == 0:
        mine = asdict(
            Machine(socket.gethostname(), address, interface, ranks.rank, ranks.local_size, time.time(), own_versions())
        )
    try:
        store.set(f"{KEY}/{ranks.rank}", json.dumps(mine))
        if ranks.rank == 0:
            keys = [f"{KEY}/{rank}" for rank in range(ranks.size)]
            store.wait(keys, timeout)
            store.set(KEY, json.dumps([each for key in keys if (each := json.loads(store.get(key))) is not None]))
        store.wait([KEY], timeout)
        return tuple(Machine(**each) for each in json.loads(store.get(KEY)))
    except DistError as error:
        raise RunError(f"the machines did not exchange their versions ({str(error).splitlines()[0][:160]})") from None


def own_versions() -> dict[str, str]:
    """The versions that this process runs: of Python, torch, DeepSpeed if it is installed, and ScaleGPT's sources."""
    found = {"scalegpt": f"{scalegpt.__version__} (sources {_digest(Path(scalegpt.__file__).parent)})"}
    found |= {"torch": torch.__version__, "python": platform.python_version()}
    try:
        found["deepspeed"] = version("deepspeed")
    except PackageNotFoundError:
        found["deepspeed"] = "not installed"
    return found


def _digest(package: Path) -> str:
    """The first digits of the SHA-256 of a package's modules and tables, by name; checkouts often have equal versions."""
    digest = hashlib.sha256()
    for path in sorted(each for each in package.rglob("*") if each.suffix in {".py", ".yaml"}):
        digest.update(f"{path.relative_to(package)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def check_machines(machines: Sequence[Machine]) -> tuple[str, ...]:
    """Compare the machines of a job. All ranks get the same result.

    Returns:
        Warnings, one line each.

    Raises:
        InputError: the machines start different numbers of ranks, or a package of :data:`MUST_AGREE` differs.
    """
    counts = _different((str(machine.ranks), machine.name) for machine in machines)
    if counts:
        raise InputError(
            f"the machines start different numbers of ranks: {counts}; start the same number on each, for example with "
            "--nproc_per_node or slots="
        )
    warnings = []
    for package in machines[0].versions if machines else ():
        found = _different((machine.versions.get(package, "unknown"), machine.name) for machine in machines)
        if found and package in MUST_AGREE:
            raise InputError(f"{package} differs between the machines: {found}; install the same on all machines")
        if found:
            warnings.append(f"{package} differs between the machines: {found}; the run continues")
    return (*warnings, *_clock_warning(machines), *_name_warning(machines))


def _clock_warning(machines: Sequence[Machine]) -> list[str]:
    if not machines:
        return []
    ahead, behind = max(machines, key=lambda each: each.clock), min(machines, key=lambda each: each.clock)
    apart = ahead.clock - behind.clock
    if apart <= CLOCK_SECONDS:
        return []
    return [
        f"the clock of {ahead.name} is {apart:,.0f} s ahead of that of {behind.name}: times in logs and trackers, and the "
        "dates of files, do not compare; set the clocks by NTP"
    ]


def _name_warning(machines: Sequence[Machine]) -> list[str]:
    names = [machine.name for machine in machines]
    twice = sorted({name for name in names if names.count(name) > 1})
    return [f"several machines have the name {twice[0]}, so messages cannot tell them apart"] if twice else []


def _different(values: Iterable[tuple[str, str]]) -> str:
    """From pairs (value, machine): the values and whose they are, such as ``2.11 on alpha, 2.12 on beta and gamma``.

    Empty if all values are equal.
    """
    whose: dict[str, list[str]] = {}
    for value, machine in values:
        whose.setdefault(value, []).append(machine)
    if len(whose) < 2:
        return ""
    return ", ".join(f"{value} on {_few(names)}" for value, names in whose.items())


def _few(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    first, more = names[:4], len(names) - 4
    if more > 0:
        return f"{', '.join(first)} and {more} more"
    return " and ".join(filter(None, [", ".join(first[:-1]), first[-1]]))


# --- the network between them ----------------------------------------------------------------------------------------


def all_reduce_rate(device: torch.device) -> float:
    """Time all-reduces of two sizes over all ranks, and return bytes per second into each machine; all ranks call it.

    A ring all-reduce of N bytes over W ranks takes 2 (W − 1) / W × N bytes into each rank, and so over each machine's
    network if its ranks are neighbours in the ring. The difference of two sizes takes out the latency.

    Returns:
        The rate of the slowest rank, the same on all ranks.
    """
    size, factor = dist.get_world_size(), GPU_FACTOR if device.type == "cuda" else 1
    times = []
    for count in (SMALL * factor, LARGE * factor):
        values = torch.ones(count // 4, device=device)
        times.append(min(_timed(values) for _ in range(1 + ROUNDS)))  # the first connects the ranks
    moved = 2 * (size - 1) / size * (LARGE - SMALL) * factor
    slowest = torch.tensor([max(times[1] - times[0], 1e-6)], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return moved / float(slowest.item())


def _timed(values: Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(values)
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - start


def silent(machines: Sequence[Machine], own_rank: int, seconds: float = ANSWER_SECONDS) -> list[Machine]:
    """The other machines that do not answer an attempt to connect to them, whether or not a program listens there.

    A machine that lives and is connected refuses the connection. One that is down, or whose link is cut, says nothing,
    as does a firewall; but a job's machines must let each other's connections to any port pass.
    """
    waiting: dict[socket.socket, Machine] = {}
    poll, quiet = select.poll(), []
    numbers: dict[int, socket.socket] = {}
    for machine in machines:
        if machine.first <= own_rank < machine.first + machine.ranks or not machine.address:
            continue
        family = socket.AF_INET6 if ":" in machine.address else socket.AF_INET
        probe = socket.socket(family, socket.SOCK_STREAM)
        probe.setblocking(False)
        if probe.connect_ex((machine.address, int(os.environ.get("MASTER_PORT", "29500")))) == errno.EINPROGRESS:
            waiting[probe], numbers[probe.fileno()] = machine, probe
            poll.register(probe, select.POLLOUT)
        else:
            probe.close()
    until = time.monotonic() + seconds
    while numbers and (left := until - time.monotonic()) > 0:
        for number, _ in poll.poll(1000 * left):
            probe = numbers.pop(number)
            poll.unregister(probe)
            outcome = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if outcome in {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT}:
                quiet.append(waiting[probe])
    quiet += [waiting[probe] for probe in numbers.values()]
    for probe in waiting:
        probe.close()
    return sorted(quiet, key=lambda machine: machine.first)


def named_in(machines: Sequence[Machine], text: str, own_rank: int) -> Machine | None:
    """The other machine whose address an error's text has, as those of gloo and NCCL do; None: there is none."""
    for machine in machines:
        if machine.first <= own_rank < machine.first + machine.ranks or not machine.address:
            continue
        before, found, after = text.partition(machine.address)
        if found and not after[:1].isdigit() and not before[-1:].isdigit():
            return machine
    return None
