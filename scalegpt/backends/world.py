"""The ranks of a run and the device of each.

``python`` starts one process without ranks; ``torchrun`` and ``deepspeed`` set ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import _get_default_store

from scalegpt.backends.host_memory import keep_freed_memory
from scalegpt.backends.machines import Machine, check_machines, exchange_machines
from scalegpt.backends.meeting import meeting_store
from scalegpt.backends.ports import use_interface_to, use_loopback
from scalegpt.backends.waiting import finish_together, next_work, reporting
from scalegpt.errors import InputError, RunError
from scalegpt.system.cores import usable_cores
from scalegpt.system.ranks import Ranks, read_ranks

Result = TypeVar("Result")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of a collective. It is long enough for ranks of different speed, and for rank 0's own work between steps."""


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, its device, and communication between the ranks.

    Attributes:
        rank: this process's rank, from 0.
        size: W, the number of data-parallel ranks; 1 for a single process, which needs no collectives.
        local_rank: this process's rank among the ranks of its machine, from 0.
        local_size: number of ranks on this machine.
        device: this process's device.
        machines: the machines of the job, in the order of their ranks; empty for a job on one machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    machines: tuple[Machine, ...] = ()

    @classmethod
    def join(cls, device: str = "auto", timeout: timedelta = COLLECTIVE_TIMEOUT) -> "World":
        """Read the rank from the launcher's environment, choose the device, and connect to the other ranks.

        On a CPU the process then keeps the memory that it frees (:mod:`scalegpt.backends.host_memory`).

        Args:
            device: ``auto`` (CUDA if it is available), ``cpu`` or ``cuda``.
            timeout: how long a collective may take before torch ends it.

        Raises:
            InputError: CUDA is wanted but absent, there are more ranks than devices, the launcher's variables disagree, or
                the machines differ in what must be the same.
            RunError: a rank does not connect in time.
        """
        ranks = read_ranks()
        rank, size, local_rank, local_size = ranks.rank, ranks.size, ranks.local_rank, ranks.local_size
        chosen = choose_device(device, local_rank, local_size)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        else:
            _share_cores(local_size)
            keep_freed_memory()
        machines: tuple[Machine, ...] = ()
        if size > 1:
            # CPU tensors are sent too: offloaded gradients.
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            machines = _meet(backend, ranks, timeout)
        return cls(rank, size, local_rank, local_size, chosen, machines)

    def ensure_group(self) -> None:
        """Make a process group even for a single process, since FSDP2 and DeepSpeed require one. It uses only loopback.

        Raises:
            InputError: there is no loopback interface.
        """
        if not dist.is_initialized():
            use_loopback()
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)

    def leave(self) -> None:
        """End the process group; safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` on rank 0 only, and return its result, or raise its error, on every rank."""
        if self.size == 1:
            return work()
        message: list[Any] = [None]
        if self.is_first:
            try:
                message = [(True, work())]
            except (InputError, RunError, OSError) as error:
                message = [(False, error)]
        dist.broadcast_object_list(message, src=0)
        succeeded, outcome = message[0]
        if not succeeded:
            raise outcome
        result: Result = outcome
        return result

    def on_each_machine(self, work: Callable[[], Result]) -> Result:
        """Call ``work`` on the first rank of each machine, and return its result on all ranks of the machine.

        ``work`` may take hours: the other ranks wait as long as there is progress (:mod:`scalegpt.backends.waiting`). An
        error on one machine is raised on all ranks.

        Raises:
            RunError: a rank makes no progress.
        """
        if self.size == 1:
            return work()
        store, name = _get_default_store(), next_work()
        outcome: tuple[bool, Any] | None = None
        if self.local_rank == 0:
            with reporting(store, name):
                try:
                    outcome = (True, work())
                except (InputError, RunError, OSError) as error:
                    outcome = (False, error)
        finish_together(store, name, self.rank, self.size)
        outcomes = self.gather(outcome)
        for known in outcomes:
            if known is not None and not known[0]:
                raise known[1]
        mine: Any = outcomes[self.rank - self.local_rank]
        result: Result = mine[1]
        return result

    def gather(self, value: Result) -> list[Result]:
        """Gather every rank's value, and return all values on every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def numbers(self, values: Sequence[float]) -> Tensor:
        """Copy a few numbers into an fp32 tensor on the device, without waiting for the device."""
        tensor = torch.tensor(values)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum a small tensor over all ranks, in place, and return it on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, returned on every rank."""
        if self.size == 1:
            return value
        values = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, returned on every rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)


def _meet(backend: str, ranks: Ranks, timeout: timedelta) -> tuple[Machine, ...]:
    """Connect to the other ranks, and make the process group of all ranks.

    Returns:
        The machines of the job; empty for a job on one machine.

    Raises:
        InputError: the machines differ in what must be the same.
    """
    machines: tuple[Machine, ...] = ()
    if ranks.on_one_machine:
        use_loopback()
    store = meeting_store(ranks, timeout)
    if not ranks.on_one_machine:
        address, interface = use_interface_to(os.environ["MASTER_ADDR"])
        machines = exchange_machines(store, ranks, address, interface, timeout)
        check_machines(machines)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=ranks.rank, world_size=ranks.size)
    return machines


def choose_device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    """The device of this rank.

    Raises:
        InputError: CUDA is wanted but absent, or this machine has fewer devices or cores than ranks.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise InputError(
            "device cuda: torch finds no CUDA device here; use --device cpu, or install torch's CUDA build"
        )
    if wanted != "cpu" and has_cuda:
        devices = torch.cuda.device_count()
        if local_size > devices:
            raise InputError(
                f"{local_size} ranks on this machine, but only {devices} CUDA devices; start at most {devices}"
            )
        return torch.device("cuda", local_rank)
    cores = usable_cores()
    if local_size > cores:
        raise InputError(f"{local_size} ranks on this machine, but only {cores} CPU cores; start at most {cores}")
    return torch.device("cpu")


def _share_cores(local_size: int) -> None:
    """Set torch's number of threads to this rank's share of the machine's cores, unless the user has set the number.

    A single process keeps torch's default, unless that exceeds the cores that a container's quota grants. Under
    torchrun the value ``OMP_NUM_THREADS=1`` is ignored, since torchrun sets it if the user sets nothing.
    """
    is_users = "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    threads = max(1, usable_cores() // local_size)
    if not is_users and (local_size > 1 or threads < torch.get_num_threads()):
        torch.set_num_threads(threads)
