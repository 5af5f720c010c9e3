"""Who we are among the ranks, and our device; collectives of a single process are the identity."""

import socket
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist

from scalegpt.backends import world as module
from scalegpt.backends.deepspeed.engine import _initialize
from scalegpt.backends.machines import Machine
from scalegpt.backends.world import World, choose_device
from scalegpt.errors import InputError
from scalegpt.system.cores import usable_cores
from scalegpt.system.ranks import Ranks

RANK_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS",
    "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there are this many CUDA devices."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_without_a_launcher_we_are_alone() -> None:
    world = World.join("cpu")
    assert world == World(0, 1, 0, 1, torch.device("cpu"))
    assert world.is_first
    assert not dist.is_initialized()
    world.barrier()
    assert world.on_first(lambda: 3) == world.on_each_machine(lambda: 3) == 3
    assert (world.any(True), world.any(False)) == (True, False)
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(world.sum(values), torch.tensor([1.0, 2.0]))
    world.leave()


def test_an_error_of_the_only_process_is_its_own() -> None:
    def fail() -> None:
        raise KeyError("any kind")

    world = World.join("cpu")
    for run in (world.on_first, world.on_each_machine):
        with pytest.raises(KeyError):
            run(fail)


def test_a_group_of_one_opens_no_port_and_ends() -> None:
    world = World.join("cpu")
    world.ensure_group()
    try:
        assert dist.get_world_size() == 1
        world.ensure_group()  # once is enough
    finally:
        world.leave()
        world.leave()
    assert not dist.is_initialized()


MACHINES = tuple(Machine(f"node{each}", "", "", 2 * each, 2) for each in range(4))


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_the_launchers_word_is_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    met = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: met.append(args))
    monkeypatch.setattr(module, "meeting_store", lambda ranks, timeout: met.append(ranks.on_one_machine))
    monkeypatch.setattr(module, "_share_cores", lambda local_size: met.append(local_size))
    monkeypatch.setattr(module, "use_interface_to", lambda address: (address, "eth0"))
    monkeypatch.setattr(module, "exchange_machines", lambda store, ranks, address, interface, timeout: MACHINES)
    for key, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "MASTER_ADDR": "10.0.0.1", name: 2}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(module, "usable_cores", lambda: 2)
    assert World.join("cpu") == World(5, 8, 1, 2, torch.device("cpu"), MACHINES)
    assert met == [2, False, ("gloo",)]


def test_cuda_is_taken_where_it_is(cards: Any) -> None:
    cards(2)
    assert choose_device("auto", 1, 2) == choose_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert choose_device("cpu", 1, 2 if usable_cores() > 1 else 1) == torch.device("cpu")
    cards(0)
    assert choose_device("auto", 0, 1) == torch.device("cpu")
    with pytest.raises(InputError, match="use --device cpu"):
        choose_device("cuda", 0, 1)


def test_more_ranks_than_devices_are_refused(cards: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(2)
    with pytest.raises(InputError, match="3 ranks on this machine, but only 2 CUDA devices; start at most 2"):
        choose_device("auto", 0, 3)
    monkeypatch.setattr(module, "usable_cores", lambda: 4)
    with pytest.raises(InputError, match="5 ranks on this machine, but only 4 CPU cores; start at most 4"):
        choose_device("cpu", 0, 5)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 2),
        ({"OMP_NUM_THREADS": "7"}, None),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2),  # torchrun's word, not the user's
    ],
)
def test_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threads: int | None
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(module, "usable_cores", lambda: 8)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    module._share_cores(4)
    module._share_cores(1)  # alone, torch knows best
    assert chosen == ([] if threads is None else [threads])


@pytest.mark.parametrize(("cores", "threads"), [(2, [2]), (6, []), (16, [])])
def test_a_single_process_takes_no_more_threads_than_its_quota(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: list[int]
) -> None:
    chosen: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    module._share_cores(1)
    assert chosen == threads


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks that no launcher of this machine has started, none can tell the others of another port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(key, str(value))
        with pytest.raises(InputError, match=f"port {port} is taken by another program; give the launcher another"):
            module._meet("gloo", Ranks(0, 2, 0, 2), timedelta(seconds=5))


def test_deepspeeds_refusals_become_one_line() -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("bad config\nin two lines \x1b[31m")

    deepspeed = SimpleNamespace(initialize=refuse, utils=SimpleNamespace(groups=SimpleNamespace()))
    with pytest.raises(InputError, match=r"DeepSpeed rejects these settings: bad config in two lines \\x1b\[31m; give"):
        _initialize(deepspeed, None, None, {"zero_optimization": {"stage": 1}})  # type: ignore[arg-type]
