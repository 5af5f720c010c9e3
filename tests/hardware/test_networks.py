"""The network of each machine: by name, by several ports of it, or by a figure with its unit."""

import pytest

from scalegpt.config.machine import MachineConfig
from scalegpt.errors import InputError
from scalegpt.hardware.machine import Machine
from scalegpt.hardware.networks import NETWORKS, Network, read_network


@pytest.mark.parametrize("name", NETWORKS)
def test_a_name_ends_with_the_gigabits_of_one_port_and_has_a_source(name: str) -> None:
    kind, gbps, source = NETWORKS[name]
    assert name == f"{kind}-{gbps}g"
    assert source
    assert read_network(name) == Network(gbps, kind)
    assert read_network(f"8x{name.upper()}") == Network(8 * gbps, kind)


@pytest.mark.parametrize(
    ("text", "gbps"),
    [
        ("400Gb/s", 400), ("400 Gbit/s", 400), ("400gbps", 400), ("50GB/s", 400), ("50 GBps", 400), ("3.2Tb/s", 3200),
        ("800Mb/s", 0.8), ("8×400Gb/s", 3200), ("4 x 12.5GB/s", 400), ("2*roce_200g", 400), (" Ethernet 25g ", 25),
    ],
)  # fmt: skip
def test_a_figure_has_its_unit_in_bits_or_bytes(text: str, gbps: float) -> None:
    assert read_network(text).gbps == pytest.approx(gbps)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("400", "has no unit; write 400Gb/s for gigabits or 400GB/s for gigabytes a second"),
        ("8x400", "has no unit; write 400Gb/s"), ("400g", "has a unit that is not known; write 400Gb/s"),
        ("infiniband-300g", "did you mean infiniband-"), ("ib", "8xinfiniband-400g"), ("", "is not known: give NAME"),
        ("0Gb/s", "must be more than 0"), ("0xroce-100g", "must be more than 0"), ("9999xroce-400g", "at most 1,000,000"),
        ("-5Gb/s", "is not known"), ("1e400GB/s", "has a unit that is not known"), ("400Gb/s\n", "400Gb/s"),
    ],
)  # fmt: skip
def test_what_is_not_a_network_is_refused_in_one_line(text: str, said: str) -> None:
    if text.endswith("\n"):  # space around it is no part of it
        assert read_network(text).gbps == 400
        return
    with pytest.raises(InputError) as error:
        read_network(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_machine_has_the_network_of_its_settings() -> None:
    machine = Machine.of(MachineConfig(gpu="h100 sxm", gpus=8, nodes=2, network="8xinfiniband-400g"))
    assert (machine.network_gbps, machine.network_kind) == (3200, "infiniband")
    named = Machine.of(MachineConfig(gpu="h100 sxm", network_gbps=100))
    assert (named.network_gbps, named.network_kind) == (100, None)
    other = machine.with_other_card(Machine.of(MachineConfig(gpu="a100-80gb")).card)  # type: ignore[arg-type]
    assert (other.network_gbps, other.network_kind) == (3200, "infiniband")
    with pytest.raises(InputError, match="both describe"):
        Machine.of(MachineConfig(gpu="h100 sxm", network="roce-100g", network_gbps=100))
