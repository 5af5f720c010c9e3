"""What is compared between the machines of a job, which interface gloo uses, and which machines answer."""

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from scalegpt.backends import machines as module
from scalegpt.backends import ports
from scalegpt.backends.machines import Machine, check_machines, exchange_machines, named_in, own_versions, silent
from scalegpt.errors import InputError
from scalegpt.system.ranks import Ranks

VERSIONS = {"scalegpt": "0.1.0 (sources 1a2b)", "torch": "2.13.0", "python": "3.11.7", "deepspeed": "0.19.8"}
ALPHA = Machine("alpha", "10.0.0.1", "eth0", 0, 8, 1000.0, VERSIONS)
BETA = Machine("beta", "10.0.0.10", "eth0", 8, 8, 1001.0, VERSIONS)


def test_equal_machines_give_no_line() -> None:
    assert check_machines([ALPHA, BETA]) == ()
    assert check_machines([]) == ()
    assert str(BETA) == "beta (10.0.0.10, ranks 8–15)"


@pytest.mark.parametrize("package", ["scalegpt", "torch"])
def test_other_packages_are_refused_by_the_names_of_the_machines(package: str) -> None:
    other = replace(BETA, versions={**VERSIONS, package: "9.9"})
    words = f"{package} differs between the machines: {VERSIONS[package]} on alpha and gamma, 9.9 on beta; install"
    with pytest.raises(InputError) as caught:
        check_machines([ALPHA, other, replace(ALPHA, name="gamma", first=16)])
    assert str(caught.value).startswith(words)


def test_other_pythons_and_clocks_and_equal_names_are_warned_of() -> None:
    other = replace(BETA, versions={**VERSIONS, "python": "3.12.1"}, clock=1060.0)
    python, clock = check_machines([ALPHA, other])
    assert python == "python differs between the machines: 3.11.7 on alpha, 3.12.1 on beta; the run continues"
    assert clock.startswith("the clock of beta is 60 s ahead of that of alpha: times in logs")
    (name,) = check_machines([ALPHA, replace(BETA, name="alpha")])
    assert name.startswith("several machines have the name alpha")


def test_unequal_numbers_of_ranks_are_refused() -> None:
    with pytest.raises(InputError, match="different numbers of ranks: 8 on alpha, 4 on beta; start the same number"):
        check_machines([ALPHA, replace(BETA, ranks=4)])


def test_machines_are_exchanged_through_the_store_in_the_order_of_ranks() -> None:
    store, found = HashStore(), {}
    places = [Ranks(rank, 4, rank % 2, 2, on_one_machine=False) for rank in range(4)]

    def join(ranks: Ranks) -> None:
        found[ranks.rank] = exchange_machines(store, ranks, f"10.0.0.{ranks.rank}", "eth0", timedelta(seconds=30))

    threads = [threading.Thread(target=join, args=(each,)) for each in reversed(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2] == found[3]
    assert [(each.first, each.ranks, each.address) for each in found[0]] == [(0, 2, "10.0.0.0"), (2, 2, "10.0.0.2")]
    assert found[0][0].versions == own_versions()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Connection closed by peer [10.0.0.10]:4312", "beta"),
        ("Connection closed by peer [10.0.0.1]:4312", None),  # that is ourselves
        ("Connection closed by peer [10.0.0.101]:4312", None),
        ("something else", None),
    ],
)
def test_the_machine_that_an_error_names(text: str, name: str | None) -> None:
    found = named_in([ALPHA, BETA], text, own_rank=3)
    assert (found.name if found else None) == name


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen(1)
        port = bound.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        yield port


def test_a_machine_that_answers_or_refuses_is_not_silent(listener: int) -> None:
    there = replace(BETA, address="127.0.0.1")
    refusing = replace(BETA, address="127.0.0.2", first=16)
    assert silent([ALPHA, there, refusing], own_rank=0) == []


def test_the_interface_is_that_towards_the_first_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(ports, "_address_towards", lambda _first: "127.0.0.1")
    name = ports.loopback_interface()
    assert ports.use_interface_to("alpha") == ("127.0.0.1", name)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    with pytest.raises(InputError, match=r"GLOO_SOCKET_IFNAME names eth99, but .* has no such interface that is up"):
        ports.use_interface_to("alpha")


def test_a_store_for_several_machines_does_not_listen_at_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens at the machine's address for the others; the machine here has none."""
    monkeypatch.setattr(ports, "_address_towards", lambda _first: None)
    with pytest.raises(
        InputError, match=r"MASTER_ADDR 127\.0\.0\.1 is 127\.0\.0\.1 on this machine \(see /etc/hosts\)"
    ):
        ports.listening("127.0.0.1", 0, 2, timedelta(seconds=5), here=False)


def test_the_digest_of_the_sources_has_their_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = module._digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    changed = module._digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({before, changed, module._digest(tmp_path)}) == 3
