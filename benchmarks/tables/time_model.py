"""Tables of the time model: its parameters with values and sources."""

from collections import defaultdict

from benchmarks.tables.markdown import code, table
from scalegpt.hardware.gpus import catalogue
from scalegpt.hardware.networks import NETWORKS
from scalegpt.planner.memory.overheads import Figure
from scalegpt.planner.search.question import MARGIN
from scalegpt.planner.search.ranking import ERROR, TIE
from scalegpt.planner.time import rates
from scalegpt.planner.time.links import LL128, NETWORK_SHARE, SIMPLE, latency
from scalegpt.planner.time.rates import FITTED, NETWORK, SHARES


def shares() -> str:
    """The table of the shares of a card's figures that training reaches, by compute capability."""
    names = defaultdict(list)
    for card in catalogue():
        names[card.capability].append(card.name)
    rows = [
        (
            code(name),
            ", ".join(names[name]) or "a processor",
            _value(each.matmul),
            _value(each.attention),
            _value(each.memory),
        )
        for name, each in SHARES.items()
    ]
    return table("capability | cards | matmul | attention | memory", rows, right={2, 3, 4})


def _value(figure: Figure) -> str:
    """A figure's value, with ~ before it if it is an estimate."""
    return f"{'~' if figure.source.startswith('~') else ''}{figure.value:g}"


_OF_SHARES = {
    "link": "share of a link's bandwidth in one direction that collectives reach inside a machine",
    "interference": "share of the time of hidden collectives that still prolongs the pass",
    "straggling": "share of a step by which waiting for the slowest machine prolongs it, for each factor e in machines",
}

_OTHERS = {
    "THROUGH_HOST": (1.0, "", "the same as `link` for cards that reach each other only through host memory"),
    "KERNEL": (1e6, " µs", "fixed time of each kernel on the card, beyond its work"),
    "DISPATCH": (1e6, " µs", "the host's time to start a kernel: Python, dispatcher, autograd, driver"),
    "KERNEL_ON_CPU": (1e6, " µs", "Python's and autograd's time to start a kernel on a processor"),
    "FILL": (1.0, "", "elements added to a matmul's inner dimension for its fixed cost"),
    "HOST_COPY": (1.0, "", "share of the host link's bandwidth that copies of pinned memory reach"),
    "SLOWEST": (1.0, "", "lower end of the range of tokens/s, relative to the prediction"),
    "FASTEST": (1.0, "", "upper end of that range"),
    "RANGE_ELSEWHERE": (1.0, "", "further factor of both ends on cards whose shares are not fitted"),
    "RANGE_ON_CPU": (1.0, "", "upper end on a processor whose rates are not measured; the lower end is 1 / this"),
    "RANGE_MEASURED": (1.0, "", "upper end on a processor whose rates are measured; the lower end is 1 / this"),
    "HOST_UPDATE": (1e-9, " GB/s", "rate at which an offloaded update moves bytes in host memory"),
}


def figures() -> str:
    """The table of all other parameters: value, meaning, and whether the value is fitted or estimated."""
    rows = []
    for name, meaning in _OF_SHARES.items():
        figure: Figure = getattr(SHARES["8.0"], name)
        rows.append((code(name), f"{figure.value:g}", meaning, _kind(figure)))
    for name, (factor, unit, meaning) in _OTHERS.items():
        figure = getattr(rates, name)
        rows.append((code(name), f"{figure.value * factor:g}{unit}", meaning, _kind(figure)))
    return table(("parameter", "value", "what it is", "source"), rows, right={1})


def _kind(figure: Figure) -> str:
    """The kind of a figure's source: ``fitted``, ``estimated``, or the source itself."""
    if figure.source == FITTED:
        return "fitted"
    return "estimated" if figure.source.startswith("~") else figure.source


def networks() -> str:
    """The table of the networks that are assumed for a machine if none is given."""
    words = {"nvlink": "NVLink", "xgmi": "xGMI", "pcie": "PCIe", "host": "a processor's ranks"}
    rows = [(words[kind], f"{figure.value:g}", figure.source.removeprefix("~")) for kind, figure in NETWORK.items()]
    return table(("what links the cards of a machine", "Gbit/s for each card", "source"), rows, right={1})


def network_shares() -> str:
    """The table of the share of its bandwidth that each kind of network reaches, and of the latency of a step over it."""
    rows = [
        (
            kind or "not said",
            f"{share.value:g}",
            f"{latency('nvlink', kind).between[0] * 1e6:g}",
            share.source.removeprefix("~"),
        )
        for kind, share in NETWORK_SHARE.items()
    ]
    return table(("kind", "share", "µs of a step", "source of the share"), rows, right={1, 2})


def latencies() -> str:
    """The table of the latencies of a collective, in µs, from NCCL's model."""
    by_name = {
        "NVLink, and RDMA between machines": LL128,
        "NVLink, without RDMA": SIMPLE["nvlink"],
        "PCIe": SIMPLE["pcie"],
    }
    rows = [
        (name, *(f"{1e6 * each:g}" for pair in zip(*found, strict=True) for each in pair))
        for name, found in by_name.items()
    ]
    heads = ("link", "ring: start", "step inside", "between", "tree: start", "step inside", "between")
    return table(heads, rows, right=set(range(1, 7)))


def network_names() -> str:
    """The table of the names of networks, with the speed of one port and its source."""
    rows = [(code(name), str(gbps), source) for name, (_, gbps, source) in NETWORKS.items()]
    return table(("name", "Gbit/s of a port", "source"), rows, right={1})


def search_constants() -> str:
    """The table of the search's constants: the margins and the width of a tie."""
    ranking = "`scalegpt/planner/search/ranking.py`"
    rows = [
        ("safety margin", f"{MARGIN:.0%} of the card", "`--margin`"),
        ("what each kind of machinery must gain", f"more than {ERROR:.1%}", f"`ERROR` and `machinery` in {ranking}"),
        ("times that count as equal", f"within {TIE:.0%}", f"`TIE` in {ranking}"),
    ]
    return table(("what", "value", "where"), rows)
