"""What a job listens on: one interface; and what a launcher opens is reported where a network can reach it."""

import os
import socket
from collections import namedtuple
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest

from scalegpt.backends import ports as module
from scalegpt.backends.ports import (
    INTERFACE_VARIABLES,
    TakenError,
    listening,
    loopback_interface,
    meeting_place,
    public_ports,
    use_loopback,
)
from scalegpt.errors import InputError
from scalegpt.system.ranks import Ranks

HERE, AFAR = Ranks(0, 2, 0, 2, True), Ranks(0, 2, 0, 1, False)
SOON = timedelta(seconds=10)
Address = namedtuple("Address", "family address")
State = namedtuple("State", "isup")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*INTERFACE_VARIABLES, "TORCHELASTIC_RUN_ID", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Pretended interfaces and their addresses, all up."""
    known: dict[str, str] = {}
    addresses = {True: socket.AF_INET6, False: socket.AF_INET}
    monkeypatch.setattr(
        psutil, "net_if_addrs", lambda: {name: [Address(addresses[":" in at], at)] for name, at in known.items()}
    )
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: State(True) for name in known})
    return known


# --- where to meet ---------------------------------------------------------------------------------------------------


def place(ranks: Ranks, address: str, port: str = "29500") -> tuple[str, int]:
    return meeting_place(ranks, {"MASTER_ADDR": address, "MASTER_PORT": port})


def test_on_one_machine_its_own_name_is_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node7.cluster")
    for name in ("localhost", "node7", "node7.cluster", "no.such.host.invalid"):
        assert place(HERE, name) == ("127.0.0.1", 29500)
    assert place(HERE, "10.1.2.3") == ("10.1.2.3", 29500)  # the interface that was asked for


def test_on_several_machines_a_name_must_resolve() -> None:
    assert place(AFAR, "10.1.2.3") == ("10.1.2.3", 29500)
    for name in ("no.such.host.invalid", "x" * 300):
        with pytest.raises(InputError, match="does not resolve; give the first machine's address"):
            place(AFAR, name)


@pytest.mark.parametrize("port", ["", "x", "0", "65536", "-1", "9" * 400, "²"])
def test_a_port_is_a_number(port: str) -> None:
    with pytest.raises(InputError, match=r"MASTER_PORT is .*; give a port from 1 to 65535, or start"):
        place(HERE, "127.0.0.1", port)


def test_an_address_is_needed() -> None:
    with pytest.raises(InputError, match="MASTER_ADDR is not set; unset WORLD_SIZE to train in one process"):
        place(HERE, "")


# --- our own ports ---------------------------------------------------------------------------------------------------


def places_listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections("tcp")
    return {tuple(each.laddr) for each in found if each.status == psutil.CONN_LISTEN}


def test_a_store_listens_at_one_address() -> None:
    before = places_listening()
    store = listening("127.0.0.1", 0, 2, SOON, here=True)
    assert places_listening() - before == {("127.0.0.1", store.port)}
    assert public_ports(HERE) == []
    with pytest.raises(TakenError, match=f"port {store.port} is taken by another program"):
        listening("127.0.0.1", store.port, 2, SOON, here=True)


def test_an_address_of_another_machine(interfaces: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"192.0.2.77 is not an address of this machine.*use MASTER_ADDR=127.0.0.1"):
        listening("192.0.2.77", 0, 2, SOON, here=True)
    store = listening("192.0.2.77", 0, 2, SOON, here=False)  # as behind a service's address
    try:
        interfaces["lo"] = "127.0.0.1"
        assert public_ports(AFAR) == []
        interfaces["eth0"] = "192.0.2.2"
        (line,) = public_ports(AFAR)
        assert line.startswith(f"rank 0 listens on all network interfaces (port {store.port})")
    finally:
        del store


def test_torchruns_public_port_is_reported(monkeypatch: pytest.MonkeyPatch, interfaces: dict[str, str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(module, "starter", lambda: psutil.Process())
    interfaces.update(lo="127.0.0.1", eth0="fd00::2")
    with socket.create_server(("", 0)) as open_to_all:
        port = open_to_all.getsockname()[1]
        lines = [line for line in public_ports(HERE) if line.startswith("torchrun")]
        assert len(lines) == 1
        assert f"(port {port})" in lines[0]
        assert module.WITHOUT_PORTS in lines[0]
        assert "firewall" in public_ports(AFAR)[-1]
        interfaces.pop("eth0")
        assert public_ports(HERE) == []


def listens_at(ip: str, port: int, status: str = psutil.CONN_LISTEN) -> SimpleNamespace:
    return SimpleNamespace(status=status, laddr=SimpleNamespace(ip=ip, port=port))


def test_each_socket_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch, interfaces: dict[str, str]) -> None:
    interfaces["eth0"] = "192.0.2.2"
    sockets = [
        SimpleNamespace(status=psutil.CONN_LISTEN, laddr=()),
        listens_at("127.0.0.1", 1),
        listens_at("0.0.0.0", 2, psutil.CONN_ESTABLISHED),
        listens_at("::", 4),
        listens_at("0.0.0.0", 3),
        listens_at("192.0.2.2", 5),
    ]
    monkeypatch.setattr(psutil.Process, "net_connections", lambda self, kind: sockets)
    (line,) = public_ports(HERE)
    assert "rank 0 listens on all network interfaces (port 3, 4)" in line


@pytest.mark.parametrize(
    "error", [psutil.AccessDenied(1), psutil.NoSuchProcess(1), OSError(5, "EIO"), RuntimeError("?")]
)
@pytest.mark.parametrize("asked", ["net_if_stats", "net_if_addrs", "starter", "net_connections"])
def test_what_cannot_be_seen_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, interfaces: dict[str, str], asked: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    interfaces["eth0"] = "192.0.2.2"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    owner = {"starter": module, "net_connections": psutil.Process}.get(asked, psutil)
    monkeypatch.setattr(owner, asked, fail)
    assert public_ports(HERE) == []


# --- the collectives' interface --------------------------------------------------------------------------------------


def test_collectives_use_loopback_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    use_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback_interface()
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_without_loopback_one_line_names_what_is_lacking(
    monkeypatch: pytest.MonkeyPatch, interfaces: dict[str, str]
) -> None:
    interfaces["eth0"] = "192.0.2.2"
    with pytest.raises(InputError, match=r"no loopback interface.*`ip link set lo up`.*--backend plain"):
        use_loopback()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    use_loopback()
