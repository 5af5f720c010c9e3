"""Tables of how well the time model predicts the published runs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import fit_throughput
from benchmarks.published import PublishedRun, read_published
from benchmarks.tables.markdown import code, table


def tables_of(path: Path) -> Mapping[str, Callable[[], str]]:
    """The tables, from the table of published runs."""
    runs = [run for run in read_published(path) if not run.fp8]
    return {
        "fitted shares": lambda: fitted_shares(runs),
        "fit": lambda: fit_throughput.table(runs, fit_throughput.cross_validate(runs)),
        "our trainer in their place": lambda: fit_throughput.in_their_place(runs),
    }


def fitted_shares(runs: Sequence[PublishedRun]) -> str:
    """The fitted numbers, and where the fit began."""
    fitted = fit_throughput.fit(runs)
    rows = [(code(name), f"{fit_throughput.START[name]:g}", f"{value:.3f}") for name, value in fitted.items()]
    return table(("number", "start", "fitted"), rows, right={1, 2})
