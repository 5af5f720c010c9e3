"""Checks of the network: the loopback interface, the default port, ports that are open to others, and several ranks."""

import errno
import os
import socket
from collections.abc import Iterator

import psutil

from scalegpt.doctor.checks import FAILURE, OK, WARNING, Finding, Setting, check
from scalegpt.errors import InputError, RunError
from scalegpt.system.ranks import ranks_or_alone

PORTS = {29500: "torchrun and DeepSpeed"}
"""The default port of each launcher → the launcher's name."""

WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - looked for, not listened at


@check("ports")
def ports(_: Setting) -> Iterator[Finding]:
    """Check that the launchers' default ports are free, and whether a program that uses one is open to the network."""
    listening = _listening()
    chosen = os.environ.get("MASTER_PORT", "")
    wanted = {**PORTS, **({int(chosen): "MASTER_PORT"} if chosen.isdecimal() and 0 < int(chosen) < 2**16 else {})}
    for port, whose in wanted.items():
        taken = _is_taken(port)
        if not taken:
            yield Finding(OK, f"port {port} ({whose}) is free")
            continue
        if whose == "MASTER_PORT" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            yield Finding(OK, f"port {port} (MASTER_PORT) is that of torchrun's own store")
            continue
        addresses = listening.get(port, set())
        reach = " on all interfaces, so other machines reach it" if addresses & WILDCARDS else ""
        yield Finding(
            WARNING,
            f"a program listens at port {port}{reach}; {whose} cannot use it",
            "end it if it is an earlier run's, or start with another --master_port (torchrun --standalone finds a free one)",
        )


def _is_taken(port: int) -> bool:
    """Whether a program listens at a port on any address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT counts as free, as for torch
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return True
    return False


def _listening() -> dict[int, set[str]]:
    """Map each port to the addresses at which programs listen; sockets that the system does not show are left out."""
    found: dict[int, set[str]] = {}
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError, RuntimeError):
        return found
    for each in connections:
        if each.status == psutil.CONN_LISTEN and each.laddr:
            found.setdefault(each.laddr.port, set()).add(each.laddr.ip)
    return found


@check("loopback")
def loopback(_: Setting) -> Iterator[Finding]:
    """Check that the loopback interface is up: ranks on one machine meet there."""
    from scalegpt.backends.ports import loopback_interface

    name = loopback_interface()
    if name is None:
        yield Finding(FAILURE, "no interface with 127.0.0.1 is up: ranks cannot meet", "ip link set lo up")
    else:
        yield Finding(OK, f"loopback interface {name}")


@check("ranks")
def ranks(_: Setting) -> Iterator[Finding]:
    """Under a launcher: check that the ranks meet, compare their machines, and time an all-reduce over all ranks."""
    from scalegpt.backends import World
    from scalegpt.backends.machines import all_reduce_rate, check_machines

    if ranks_or_alone().size == 1:
        yield Finding(OK, "one process; torchrun -m scalegpt doctor checks several ranks and machines")
        return
    try:
        world = World.join()
    except (InputError, RunError) as error:
        yield Finding(FAILURE, str(error), "start the same command on all machines")
        return
    for line in check_machines(world.machines):
        yield Finding(WARNING, line, "make the machines alike")
    reached = all_reduce_rate(world.device) / 1e9
    where = f" on {len(world.machines)} machines" if world.machines else ""
    world.leave()
    yield Finding(OK, f"{world.size} ranks{where} meet, and an all-reduce reaches {reached:.3g} GB/s")
