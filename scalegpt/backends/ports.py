"""The TCP ports of a job: ScaleGPT's own, on one interface, and warnings about ports that are open on all interfaces.

Anyone who can reach a port of a job can end the job or change its results, since torch's stores and collectives have no
authentication. If all ranks are on one machine, ScaleGPT's ports are on the loopback interface. torchrun's agent
listens on all interfaces, and torch has no setting to change that. The agent opens no port if it keeps its store in a
file.
"""

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
from torch._C._distributed_c10d import TCPStore

from scalegpt.errors import InputError
from scalegpt.system.launchers import TORCHRUN, starter
from scalegpt.system.ranks import START, Ranks

LOOPBACK = "127.0.0.1"

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

FAMILIES = frozenset({socket.AF_INET, socket.AF_INET6})

ELSEWHERE = "192.0.2.1"
"""An address that belongs to no machine (RFC 5737), for which the system chooses the default route."""

WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - looked for, not listened at

UNSEEN = (psutil.Error, OSError, RuntimeError)
"""The errors of psutil if the system hides a process, or shows its sockets in a form that psutil cannot read."""

BACKLOG = 4096
"""Number of connections that may wait to be accepted, since all ranks connect at once."""

WITHOUT_PORTS = (
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --rdzv-conf store_type=file "
    "--rdzv-id NAME --rdzv-endpoint FILE"
)
"""How to start torchrun on one machine so that its agent opens no port."""


def meeting_place(ranks: Ranks, known: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of the ranks' store, from ``MASTER_ADDR`` and ``MASTER_PORT`` in ``known``.

    If all ranks are on this machine, and the variable has the machine's name or does not resolve, the address is
    127.0.0.1.

    Raises:
        InputError: a variable is missing or invalid, or ``MASTER_ADDR`` does not resolve.
    """
    given = known.get("MASTER_ADDR", "")
    if not given:
        raise InputError(
            f"WORLD_SIZE is {ranks.size}, but MASTER_ADDR is not set; unset WORLD_SIZE to train in one process, or {START}"
        )
    text = known.get("MASTER_PORT", "")
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) < 2**16):
        said = repr(text[:20]) if text else "not set"
        raise InputError(f"MASTER_PORT is {said}; give a port from 1 to 65535, or {START}")
    return _resolved(given, ranks), int(text)


def _resolved(given: str, ranks: Ranks) -> str:
    own_name = socket.gethostname().partition(".")[0]
    if ranks.on_one_machine and given.partition(".")[0] in {"localhost", own_name}:
        return LOOPBACK
    try:
        socket.getaddrinfo(given, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        if ranks.on_one_machine:
            return LOOPBACK
        raise InputError(f"MASTER_ADDR {given!r} does not resolve; give the first machine's address") from None
    return given


def listening(address: str, port: int, size: int, timeout: timedelta, *, here: bool) -> TCPStore:
    """Open a store that listens at one address only, without waiting for the other ranks.

    Args:
        address: the address to listen at.
        port: the port to listen at; 0: any free port.
        size: number of ranks.
        timeout: timeout of the store's operations.
        here: whether all ranks are on this machine. If they are not, and the address is not one of this machine, the
            store listens on all interfaces, since the network may translate the address.

    Raises:
        TakenError: the port is taken.
        InputError: the address is not of this machine although ``here`` is True, or other machines cannot reach it although
            ``here`` is False, or the system refuses to listen there.
    """
    bound = _bound(address, port, here=here)
    host = bound.getsockname()[0]
    if not here and is_loopback(host):  # the machine's own name, which has another address for the other machines
        bound.close()
        mine = _address_towards(address)
        if mine is None:
            raise InputError(
                f"MASTER_ADDR {address} is {host} on this machine (see /etc/hosts), which other machines cannot reach; give "
                "the address that they reach"
            )
        bound = _bound(mine, port, here=here)
        host = mine
    return TCPStore(
        LOOPBACK if host in WILDCARDS else host, bound.getsockname()[1], size,
        is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=bound.detach(),
    )  # fmt: skip


def _bound(address: str, port: int, *, here: bool) -> socket.socket:
    for family, _, _, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        try:
            return _listen(family, place)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise TakenError(
                    f"port {port} is taken by another program; give the launcher another master port"
                ) from None
            if error.errno != errno.EADDRNOTAVAIL:
                raise InputError(f"cannot listen at {address}:{port}: {error.strerror}") from None
    if here:
        raise InputError(
            f"MASTER_ADDR {address} is not an address of this machine, where rank 0 is; use MASTER_ADDR=127.0.0.1"
        )
    return _listen(socket.AF_INET, ("0.0.0.0", port))  # noqa: S104 - nothing else is possible; reported as public


def _listen(family: int, place: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound


class TakenError(InputError):
    """Another program listens at the port."""


def use_loopback() -> None:
    """Make the collectives of a job on one machine use the loopback interface, unless the user names another one.

    Raises:
        InputError: no loopback interface is up.
    """
    if all(name in os.environ for name in INTERFACE_VARIABLES):
        return
    name = loopback_interface()
    if name is None and "GLOO_SOCKET_IFNAME" not in os.environ:
        raise InputError(
            "no loopback interface (127.0.0.1) is up here, and torch's process groups need one; "
            "run `ip link set lo up`, or train in one process with --backend plain"
        )
    if name is not None:
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, name)


def use_interface_to(first: str) -> tuple[str, str]:
    """Make gloo use the interface through which this machine reaches the first machine, unless the user names another.

    By itself, gloo takes the interface of the address that the machine's own name has. Many systems give the name a
    loopback address (127.0.1.1), which other machines cannot reach. NCCL leaves out loopback interfaces by itself.

    Args:
        first: name or address of the first machine.

    Returns:
        This machine's address on that interface, and the interface's name; both empty if they are not known.

    Raises:
        InputError: the user names an interface that this machine does not have, or a loopback interface.
    """
    addresses = [(name, each.address) for name, each in _addresses_up() if each.family in FAMILIES]
    outer = [(name, address) for name, address in addresses if not is_loopback(address)]
    chosen = os.environ.get(INTERFACE_VARIABLES[0])
    if chosen is not None:
        names = chosen.split(",")
        for name in names:
            if name not in {known for known, _ in outer}:
                has = ", ".join(dict.fromkeys(known for known, _ in outer)) or "none"
                raise InputError(
                    f"GLOO_SOCKET_IFNAME names {name}, but {socket.gethostname()} has no such interface that is up and "
                    f"reaches other machines; it has {has}"
                )
        return next((address, name) for name, address in outer if name == names[0])
    mine = _address_towards(first)
    found = next(((address, name) for name, address in addresses if address == mine), ("", ""))
    if found[1]:
        os.environ[INTERFACE_VARIABLES[0]] = found[1]
    return found


def _address_towards(first: str) -> str | None:
    """This machine's address for connections to the first machine; None if it is not known.

    On the first machine its own name may mean a loopback address. Then the address for the default route counts.
    """
    for target in (first, ELSEWHERE):
        for family, kind, _, _, place in socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe, suppress(OSError):
                probe.connect(place)  # chooses the route, and sends nothing
                mine = str(probe.getsockname()[0])
                if not is_loopback(mine):
                    return mine
    others = {each.address for _, each in _addresses_up() if each.family in FAMILIES and not is_loopback(each.address)}
    others = {address for address in others if not address.startswith("fe80:")}
    return others.pop() if len(others) == 1 else None


def is_loopback(address: str) -> bool:
    """Whether an address in digits reaches only the machine itself."""
    return address.startswith("127.") or address == "::1"


def loopback_interface() -> str | None:
    """The name of the interface with the address 127.0.0.1; None if no such interface is up."""
    return next((name for name, address in _addresses_up() if address.address == LOOPBACK), None)


def _addresses_up() -> Iterator[tuple[str, Any]]:
    """Yield the interface's name and the address, for all addresses of interfaces that are up."""
    up = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if name in up and up[name].isup:
            yield from ((name, address) for address in addresses)


def public_ports(ranks: Ranks) -> list[str]:
    """A warning for each process of this job that listens on all interfaces of a machine with a network.

    Called on rank 0 only. Examines the processes of rank 0 and of its torchrun agent. A process whose sockets the
    system does not show gets no warning.

    Args:
        ranks: this process's rank and the number of ranks, in the job and on this machine.
    """
    try:
        return _public_ports(ranks)
    except UNSEEN:
        return []


def _public_ports(ranks: Ranks) -> list[str]:
    if not _has_network():
        return []
    found = [("rank 0", psutil.Process(), "name an address of this machine as MASTER_ADDR")]
    if TORCHRUN in os.environ:
        advice = (
            f"start with {WITHOUT_PORTS}"
            if ranks.on_one_machine
            else "let only the job's machines through the firewall"
        )
        found.append(("torchrun", starter(), advice))
    return [
        f"{who} listens on all network interfaces (port {', '.join(map(str, ports))}), so other machines can disturb "
        f"the run; to avoid this, {advice}"
        for who, process, advice in found
        if (ports := _wildcard_ports(process))
    ]


def _wildcard_ports(process: psutil.Process) -> list[int]:
    """The TCP ports at which a process listens on all interfaces; empty if its sockets are not visible to us."""
    try:
        connections = process.net_connections(kind="tcp")
    except UNSEEN:
        return []
    ports = set()
    for each in connections:
        if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.ip in WILDCARDS:
            ports.add(each.laddr.port)
    return sorted(ports)


def _has_network() -> bool:
    """Whether an interface other than loopback is up and has an address."""
    return any(each.family in FAMILIES and not is_loopback(each.address) for _, each in _addresses_up())
