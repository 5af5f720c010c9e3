"""Fits the planner's shares of a card's figures to published runs, and measures how well they predict other runs.

``python benchmarks/fit_throughput.py published_runs.csv`` prints the fitted shares; ``scalegpt/planner/time/rates.py`` has
their values. It also prints the errors of predicted tokens per second in ten-fold cross-validation, by card and by model:
each run is predicted with shares that were fitted without it.

Six numbers are fitted, by least squares on the logarithm of tokens per second (Gauss-Newton with Levenberg's damping): the
shares of the dense peak that matmuls and attention reach, each on Ampere and on Hopper; the share of the memory bandwidth;
and the share of hidden communication that still makes a pass longer (interference). A weak prior keeps a number near its
start value where the runs do not determine it.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published import PublishedRun, read_published
from scalegpt.planner.memory.overheads import Figure
from scalegpt.planner.time.rates import SHARES, Shares

START = {
    "matmul 8.0": 0.8, "matmul 9.0": 0.65, "attention 8.0": 0.35, "attention 9.0": 0.25, "memory": 0.6, "interference": 0.1,
}  # fmt: skip
PRIOR = 0.02
"""Weight of the distance of a number's logarithm from its start value, relative to the error of one run."""

FOLDS, SEED = 10, 0
Vector = npt.NDArray[np.float64]


def shares_of(numbers: dict[str, float], capability: str) -> Shares:
    """The shares for a compute capability, with these fitted numbers."""
    return replace(
        SHARES[capability],
        matmul=Figure(numbers[f"matmul {capability}"], ""),
        attention=Figure(numbers[f"attention {capability}"], ""),
        memory=Figure(numbers["memory"], ""),
        interference=Figure(numbers["interference"], ""),
    )


def error(run: PublishedRun, numbers: dict[str, float]) -> float:
    """The relative error of a run's tokens per second with these numbers: predicted ÷ measured − 1."""
    assert run.machine.card is not None
    return run.predicted(shares_of(numbers, run.machine.card.capability)) / run.tokens_per_second - 1


def fit(runs: Sequence[PublishedRun]) -> dict[str, float]:
    """The numbers, by name, that predict the tokens per second of these runs best."""
    names, start = list(START), np.log(list(START.values()))

    def residuals(x: Vector) -> Vector:
        numbers = dict(zip(names, np.exp(x).tolist(), strict=True))
        errors = [math.log1p(error(run, numbers)) for run in runs]
        return np.concatenate([errors, PRIOR * math.sqrt(len(runs)) * (x - start)])

    return dict(zip(names, np.exp(_least_squares(residuals, start)).tolist(), strict=True))


def _least_squares(residuals: Callable[[Vector], Vector], x: Vector, rounds: int = 40) -> Vector:
    damping, now = 1e-2, residuals(x)
    for _ in range(rounds):
        slopes = np.array([(residuals(x + 1e-5 * unit) - now) / 1e-5 for unit in np.eye(len(x))]).T
        step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), -slopes.T @ now)
        tried = residuals(x + step)
        if tried @ tried < now @ now:
            gained = now @ now - tried @ tried
            x, now, damping = x + step, tried, damping / 3
            if gained < 1e-10:
                break
        else:
            damping *= 4
    return x


def cross_validate(runs: Sequence[PublishedRun]) -> list[float]:
    """The error of each run, predicted with numbers that were fitted without the runs of its fold."""
    order = np.random.default_rng(SEED).permutation(len(runs))
    errors = [0.0] * len(runs)
    for fold in range(FOLDS):
        out = set(order[fold::FOLDS].tolist())
        numbers = fit([run for i, run in enumerate(runs) if i not in out])
        for i in out:
            errors[i] = error(runs[i], numbers)
    return errors


def table(runs: Sequence[PublishedRun], errors: Sequence[float]) -> str:
    """The table of mean, mean absolute and largest errors by card and by model, in Markdown."""
    groups: dict[str, list[float]] = defaultdict(list)
    for run, value in zip(runs, errors, strict=True):
        assert run.machine.card is not None
        groups[run.machine.card.name].append(value)
        groups[run.model].append(value)
        groups["one machine" if run.machine.nodes == 1 else "several machines"].append(value)
        groups["all"].append(value)
    lines = ["| runs | number | mean error | mean absolute error | largest |", "|---|--:|--:|--:|--:|"]
    for name, values in sorted(groups.items(), key=lambda item: _by_size(item[0])):
        worst = max(values, key=abs)
        mean, absolute = sum(values) / len(values), sum(map(abs, values)) / len(values)
        lines.append(f"| {name} | {len(values)} | {mean:+.1%} | {absolute:.1%} | {worst:+.1%} |")
    return "\n".join(lines)


def in_their_place(runs: Sequence[PublishedRun]) -> str:
    """How many of the runs fit in our trainer, and its predicted tokens per second relative to the published, in Markdown."""
    plans = [run.plan() for run in runs]
    fitting = sum(plan.fits is True for plan in plans)
    fullest = max(plan.total_bytes / plan.machine.usable_bytes for plan in plans if plan.machine.usable_bytes)
    pairs = zip(plans, runs, strict=True)
    errors = [plan.tokens_per_second / run.batch.ranks / run.tokens_per_second - 1 for plan, run in pairs]
    said = f"{fitting} of the {len(runs)} runs fit with `--loss chunked`, the fullest at {fullest:.1%} of its card."
    return f"{said}\n\n{table(runs, errors)}"


def _by_size(name: str) -> tuple[int, float, str]:
    """A sort key for the rows of the table: cards first, then models by size, then all others."""
    if not name.startswith("mpt-"):
        return (0 if name[:4] in {"A100", "H100"} else 2), 0.0, name
    size = name.removeprefix("mpt-")
    return 1, float(size[:-1]) * (1000 if size[-1] == "b" else 1), name


def main() -> None:
    """Fit the numbers, cross-validate them, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the table of published runs")
    runs = [run for run in read_published(parser.parse_args().file) if not run.fp8]
    for name, value in fit(runs).items():
        print(f"{name:<16} {value:.3f}")
    print(f"\nten-fold cross-validation over {len(runs)} runs\n\n{table(runs, cross_validate(runs))}")
    print(f"\nour trainer in their place\n\n{in_their_place(runs)}")


if __name__ == "__main__":
    main()
