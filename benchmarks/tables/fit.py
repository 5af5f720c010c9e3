"""Tables on the fit of the time model to the published runs: the fitted shares and the errors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import fit_throughput
from benchmarks.published import PublishedRun, read_published
from benchmarks.tables.markdown import code, table


def tables_of(path: Path) -> Mapping[str, Callable[[], str]]:
    """Name of a table → the function that makes it, from the file of published runs."""
    runs = [run for run in read_published(path) if not run.fp8]
    return {
        "fitted shares": lambda: fitted_shares(runs),
        "fit": lambda: fit_throughput.table(runs, fit_throughput.cross_validate(runs)),
        "our trainer in their place": lambda: fit_throughput.in_their_place(runs),
    }


def fitted_shares(runs: Sequence[PublishedRun]) -> str:
    """The table of the fitted numbers, with the values at which the fit started."""
    fitted = fit_throughput.fit(runs)
    rows = [(code(name), f"{fit_throughput.START[name]:g}", f"{value:.3f}") for name, value in fitted.items()]
    return table(("number", "start", "fitted"), rows, right={1, 2})
