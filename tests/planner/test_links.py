"""How fast ranks exchange, inside a machine and between machines."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from scalegpt.hardware.gpus import Card, find_card
from scalegpt.hardware.machine import Machine
from scalegpt.hardware.networks import NETWORKS
from scalegpt.planner.memory.overheads import Figure
from scalegpt.planner.time.links import (
    ALL_REDUCE,
    EXCHANGE,
    LL128,
    NETWORK_SHARE,
    RING,
    SIMPLE,
    TREE_SHARE,
    Latency,
    Links,
    Way,
    latency,
)
from scalegpt.planner.time.rates import SHARES, THROUGH_HOST, Rates

A100 = find_card("a100-80gb")
INSIDE, NETWORK = 300e9, 40e9
KINDS = (RING, ALL_REDUCE, EXCHANGE)


def links(gpus: int = 8, nodes: int = 4, **others: Any) -> Links:
    given = {"inside": INSIDE, "network": NETWORK, "latency": LL128, **others}
    return Links(gpus=gpus, nodes=nodes, **given)


def of(card: Card, *, gpus: int = 1, nodes: int = 1, share: float = 1.0, **machine: Any) -> Links:
    """The links of cards that reach a share of their bandwidth."""
    shares = replace(SHARES[card.capability], link=Figure(share, ""))
    return Rates.of(card, replace(Machine.with_card(card, gpus=gpus, nodes=nodes), **machine), "bf16", shares).links


def speed(found: Links, way: Way) -> float:
    """Bytes/s of a ring, without the time that every collective takes."""
    return found.routes(way)[0].link


# --- inside a machine ------------------------------------------------------------------------------------------------


def test_a_rank_sends_at_half_of_what_its_link_carries_both_ways() -> None:
    """NVLink of the A100: 600 GB/s both directions together."""
    for kind in KINDS:
        assert speed(of(A100, gpus=8), Way(kind, 8)) == 300e9
    assert speed(of(A100, gpus=8, share=0.8), Way(RING, 8)) == pytest.approx(240e9)


def test_cards_that_cannot_reach_each_other_send_through_the_host() -> None:
    card = find_card("4090")
    link = Machine.with_card(card, gpus=2).link
    assert link is not None
    assert not link.peer
    direct = speed(of(card, gpus=2, link=replace(link, peer=True)), Way(RING, 2))
    assert speed(of(card, gpus=2), Way(RING, 2)) == pytest.approx(direct * THROUGH_HOST.value)


def test_a_bridge_joins_two_cards_and_more_use_pcie() -> None:
    card = find_card("rtx a6000")
    assert card.link_cards == 2
    two, four = of(card, gpus=2).inside, of(card, gpus=4).inside
    assert four < two
    assert four <= card.host_gbps * 1e9 / 2


# --- between machines ------------------------------------------------------------------------------------------------


def test_a_ring_over_machines_is_as_fast_as_its_narrowest_part() -> None:
    """Each machine's whole network carries what one rank sends: a ring enters and leaves it once."""
    for network in (1e9, 40e9, 1200e9):
        assert speed(links(network=network), Way(RING, 32)) == min(INSIDE, network)
    assert speed(links(gpus=1, network=1200e9), Way(RING, 4)) == 1200e9  # nothing to pass inside


def test_shards_inside_a_machine_do_not_use_the_network() -> None:
    for size in (2, 4, 8):
        for kind in KINDS:
            assert links().routes(Way(kind, size)) == links(nodes=1).routes(Way(kind, size))


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
def test_the_replicas_of_all_shards_share_their_machines_network(shards: int) -> None:
    """Each of a machine's eight cards, or of its shards, exchanges in a group of its own at the same time."""
    groups = min(8, shards)
    assert speed(links(), Way(RING, 32 // shards, shards)) == min(INSIDE, NETWORK / groups)
    assert speed(links(network=1e15), Way(RING, 32 // shards, shards)) == (INSIDE if shards < 8 else 1e15 / 8)


def test_a_gradient_of_shards_takes_the_network_as_long_as_a_whole_one() -> None:
    """HSDP: a rank all-reduces 1/S of the gradients, at 1/S of its machine's network, but few ranks take part."""
    whole = links().seconds(Way(ALL_REDUCE, 32), 2e9, 0)
    parts = links().seconds(Way(ALL_REDUCE, 4, 8), 2e9 / 8, 0)
    assert parts == pytest.approx(whole)


def test_a_group_that_does_not_fill_machines_is_never_faster_than_one_that_does() -> None:
    for size in range(9, 32):
        if size % 8:
            assert speed(links(), Way(RING, size)) <= speed(links(), Way(RING, 32))
    assert speed(links(), Way(RING, 6)) < speed(links(), Way(RING, 4))


def test_an_exchange_sends_most_bytes_over_the_network_from_all_cards_at_once() -> None:
    """Of 31 others, 24 are elsewhere: each card has an eighth of the network for 24/31 of what it sends."""
    assert speed(links(), Way(EXCHANGE, 32)) == pytest.approx(NETWORK / 8 / (24 / 31))
    assert speed(links(network=1e15), Way(EXCHANGE, 32)) == pytest.approx(INSIDE / (7 / 31))


# --- latency ---------------------------------------------------------------------------------------------------------


def test_a_ring_takes_a_step_for_each_rank_and_an_all_reduce_two() -> None:
    """NCCL's formula by hand: 14 µs, 28 steps inside machines of 1.9 µs, 3 between them of 4 µs."""
    assert links().seconds(Way(RING, 32), 0, 1) == pytest.approx(14e-6 + 28 * 1.9e-6 + 3 * 4e-6)
    assert links(nodes=1).seconds(Way(RING, 8), 0, 1) == pytest.approx(14e-6 + 7 * 1.9e-6)
    assert links(nodes=1).seconds(Way(ALL_REDUCE, 8), 0, 5) == pytest.approx(5 * (14e-6 + 14 * 1.9e-6))


def test_a_small_all_reduce_takes_a_tree_and_a_large_one_the_ring() -> None:
    cluster, way = links(nodes=64), Way(ALL_REDUCE, 512)
    tree = 14e-6 + 2 * (7 * 1.25e-6 + 6 * 8.5e-6)
    assert cluster.seconds(way, 1e3, 1) == pytest.approx(tree, rel=1e-3)
    assert cluster.seconds(way, 1e12, 1) == pytest.approx(1e12 / NETWORK, rel=1e-3)
    for sent in (1e3, 1e6, 1e8, 1e10):
        ring, tree_of = (sent / link + message for link, message in cluster.routes(way))
        assert cluster.seconds(way, sent, 1) == min(ring, tree_of)
    assert cluster.routes(way)[1].link == pytest.approx(TREE_SHARE.value * NETWORK)


def test_more_ranks_take_longer_rings_in_proportion_and_longer_trees_by_their_logarithm() -> None:
    def taken(nodes: int, kind: str) -> float:
        return links(nodes=nodes).seconds(Way(kind, 8 * nodes), 0, 1)

    rings = [taken(nodes, RING) for nodes in (16, 32, 64)]
    assert rings[2] - rings[1] == pytest.approx(2 * (rings[1] - rings[0]))
    trees = [taken(nodes, ALL_REDUCE) for nodes in (16, 32, 64)]
    assert trees[2] - trees[1] == pytest.approx(trees[1] - trees[0])


def test_a_slower_link_or_network_has_no_less_latency() -> None:
    def total(found: Latency) -> float:
        return found.start[0] + 7 * found.inside[0] + 7 * found.between[0]

    best = latency("nvlink", "infiniband")
    assert best == LL128
    assert latency("nvlink", None) == latency("xgmi", "roce") == LL128
    assert latency("pcie", "infiniband") == SIMPLE["pcie"]
    assert total(best) < total(latency("pcie", "infiniband")) < total(latency("pcie", "ethernet"))
    assert latency("nvlink", "ethernet").between[0] > best.between[0]
    assert math.isclose(latency("host", None, on_gpu=False).start[0], 15e-6)


# --- by name ---------------------------------------------------------------------------------------------------------


def test_each_kind_of_network_reaches_its_own_share() -> None:
    assert {kind for kind, _, _ in NETWORKS.values()} <= NETWORK_SHARE.keys()
    for kind, share in NETWORK_SHARE.items():
        found = of(A100, gpus=8, nodes=2, network_gbps=800, network_kind=kind)
        assert found.network == pytest.approx(100e9 * share.value)
        assert 0 < share.value < 1


def test_a_faster_link_or_network_is_never_slower() -> None:
    ways = [
        Way(kind, ranks, stride)
        for kind in KINDS
        for ranks, stride in ((32, 1), (8, 1), (12, 1), (4, 8), (8, 4), (2, 16))
    ]
    for way, sent, name in itertools.product(ways, (0.0, 1e3, 1e6, 1e9), ("inside", "network")):
        slow, fast = links(), links(**{name: 3 * getattr(links(), name)})
        assert fast.seconds(way, sent, 2) <= slow.seconds(way, sent, 2)
