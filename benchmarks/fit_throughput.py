"""Fits the planner's time model to published runs, and measures how well it predicts trainers that it has not seen.

``python benchmarks/fit_throughput.py published_runs.csv published_runs_other_trainers.csv`` prints every figure: the
fitted numbers, which ``scalegpt/planner/time/rates.py`` contains; the errors for each trainer's runs, predicted with
numbers that were fitted without them, also for runs on 16 GPUs and more, and of scaling efficiencies; the range that
follows from these errors; and the rows that were left out, with the rule for each.

Nine numbers are fitted, each with a unit and a meaning, and one efficiency for each trainer: its speed relative to the
model. A prior keeps efficiencies near 1 (:data:`TRAINERS_SPREAD`), so that the numbers describe the typical trainer. A
trainer that is left out has the efficiency 1, and so has our own trainer, which nobody has measured. The fit is least
squares on the logarithm of tokens per second (Gauss-Newton with Levenberg's damping), with a prior for each number.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist, fmean, pvariance, variance
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.published import PublishedRun
from scalegpt.planner.memory.overheads import Figure
from scalegpt.planner.time.rates import SHARES, Rates, Shares


class Prior(NamedTuple):
    """What is known about a number before the fit: its value, and the spread of its logarithm.

    Attributes:
        value: the expected value.
        spread: standard deviation of the logarithm.
        why: where the value comes from.
    """

    value: float
    spread: float
    why: str


PRIORS: Mapping[str, Prior] = {
    "matmul 8.0": Prior(0.85, 0.2, "share of the peak"),
    "matmul 9.0": Prior(0.75, 0.2, "share of the peak"),
    "attention 8.0": Prior(0.4, 0.4, "share of the peak"),
    "attention 9.0": Prior(0.3, 0.4, "share of the peak"),
    "memory": Prior(0.7, 0.3, "share of the bandwidth"),
    "interference": Prior(0.1, 0.7, "share of hidden communication"),
    "straggling": Prior(0.01, 0.7, "share of a step, for each factor e in machines"),
    "fill": Prior(300, 0.5, "elements of depth"),
    "dispatch": Prior(35e-6, 0.4, "seconds for a kernel"),
}
WITHOUT = {
    "shallow matmuls (FILL)": {**PRIORS, "fill": Prior(1e-6, 1e-3, "no fill")},
    "host time (DISPATCH)": {**PRIORS, "dispatch": Prior(1e-12, 1e-3, "no host time")},
    "interference": {**PRIORS, "interference": Prior(1e-6, 1e-3, "no interference")},
    "slowest machine": {**PRIORS, "straggling": Prior(1e-6, 1e-3, "no waiting")},
}
"""A term of the model → the priors with which it is left out."""

ROW_SPREAD = 0.07
"""Standard deviation that the fit assumes for the logarithm of a run's error, which covers all that the model does not
know."""

OUTLIER = 2.0
"""Errors of more than this many standard deviations count linearly, not squared (the pseudo-Huber loss)."""

TRAINERS_SPREAD = 0.2
"""Standard deviation that the fit assumes for the logarithm of a trainer's efficiency."""

FOLDS, SEED = 10, 0
INSIDE = 0.90
"""The share of a new trainer's runs that a range is meant to contain."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """The fitted numbers by name, and the efficiency of each trainer that was fitted."""

    numbers: Mapping[str, float]
    efficiency: Mapping[str, float] = field(default_factory=dict)

    def predicted(self, run: PublishedRun) -> float:
        """Predicted tokens per second of each card. A trainer that was not fitted has the efficiency 1."""
        card, numbers = run.machine.card, self.numbers
        assert card is not None
        shares = shares_of(numbers, card.capability)
        known = Rates.of(card, run.machine, run.run.train.precision, shares)
        rates = replace(known, fill=numbers["fill"], dispatch=numbers["dispatch"])
        return run.predicted(rates) * self.efficiency.get(run.trainer.name, 1.0)

    def error(self, run: PublishedRun) -> float:
        """The relative error of a run's tokens per second: predicted ÷ measured − 1."""
        return self.predicted(run) / run.tokens_per_second - 1


def shares_of(numbers: Mapping[str, float], capability: str) -> Shares:
    """The shares for a compute capability with these numbers; shares that are not fitted are the planner's own."""
    known = SHARES[capability]
    return replace(
        known,
        matmul=Figure(numbers.get(f"matmul {capability}", known.matmul.value), ""),
        attention=Figure(numbers.get(f"attention {capability}", known.attention.value), ""),
        memory=Figure(numbers["memory"], ""),
        interference=Figure(numbers["interference"], ""),
        straggling=Figure(numbers["straggling"], ""),
    )


def fit(runs: Sequence[PublishedRun], priors: Mapping[str, Prior] = PRIORS) -> Fit:
    """The numbers and the efficiencies that predict these runs best."""
    trainers = sorted({run.trainer.name for run in runs})
    expected = np.array([math.log(prior.value) for prior in priors.values()] + [0.0] * len(trainers))
    spreads = np.array([prior.spread for prior in priors.values()] + [TRAINERS_SPREAD] * len(trainers))

    def fit_of(x: Vector) -> Fit:
        values = np.exp(x).tolist()
        return Fit(dict(zip(priors, values, strict=False)), dict(zip(trainers, values[len(priors) :], strict=True)))

    def residuals(x: Vector) -> Vector:
        found = fit_of(x)
        errors = np.array([math.log1p(found.error(run)) / ROW_SPREAD for run in runs])
        return np.concatenate([_softened(errors), (x - expected) / spreads])

    return fit_of(_least_squares(residuals, expected))


def _softened(errors: Vector) -> Vector:
    """Residuals for the fit.

    Beyond :data:`OUTLIER` their squares grow linearly with the error, so that no run dominates.
    """
    softened: Vector = OUTLIER * np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + (errors / OUTLIER) ** 2) - 1))
    return softened


def _least_squares(residuals: Callable[[Vector], Vector], x: Vector, rounds: int = 40) -> Vector:
    damping, now = 1e-2, residuals(x)
    for _ in range(rounds):
        slopes = np.array([(residuals(x + 1e-5 * unit) - now) / 1e-5 for unit in np.eye(len(x))]).T
        square = slopes.T @ slopes
        step = np.linalg.solve(square + damping * np.diag(np.diag(square)), -slopes.T @ now)
        tried = residuals(x + step)
        if tried @ tried < now @ now:
            gained = now @ now - tried @ tried
            x, now, damping = x + step, tried, damping / 3
            if gained < 1e-6 * (now @ now):
                break
        else:
            damping *= 4
    return x


def cross_validate(runs: Sequence[PublishedRun], priors: Mapping[str, Prior] = PRIORS) -> list[float]:
    """The error of each run, predicted by a fit without the runs of its fold."""
    order = np.random.default_rng(SEED).permutation(len(runs))
    errors = [0.0] * len(runs)
    for fold in range(FOLDS):
        out = set(order[fold::FOLDS].tolist())
        found = fit([run for i, run in enumerate(runs) if i not in out], priors)
        for i in out:
            errors[i] = found.error(runs[i])
    return errors


def leave_out(runs: Sequence[PublishedRun], priors: Mapping[str, Prior] = PRIORS) -> list[float]:
    """The error of each run, predicted by a fit without any run of its trainer."""
    errors = [0.0] * len(runs)
    for name in {run.trainer.name for run in runs}:
        found = fit([run for run in runs if run.trainer.name != name], priors)
        for i, run in enumerate(runs):
            if run.trainer.name == name:
                errors[i] = found.error(run)
    return errors


class Range(NamedTuple):
    """The slowest and the fastest speed of a range, relative to the prediction."""

    slowest: float
    fastest: float

    def holds(self, error: float) -> bool:
        """Whether the measured speed of a run, predicted with this relative error, lies in the range."""
        return self.slowest <= 1 / (1 + error) <= self.fastest


def range_of(runs: Sequence[PublishedRun], errors: Sequence[float]) -> Range:
    """The range for the speeds of a new trainer, from the errors of trainers that were left out of the fit.

    It is the prediction interval of a normal distribution of log(measured ÷ predicted). The variance is that between
    the trainers' means plus that within the trainers. Each trainer has the same weight, however many runs it published.
    """
    logs: dict[str, list[float]] = defaultdict(list)
    for run, error in zip(runs, errors, strict=True):
        logs[run.trainer.name].append(-math.log1p(error))
    means = [fmean(values) for values in logs.values()]
    within = fmean(pvariance(values) for values in logs.values())
    further = math.sqrt((variance(means) + within) * (1 + 1 / len(means)))
    half = NormalDist().inv_cdf((1 + INSIDE) / 2) * further
    return Range(math.exp(fmean(means) - half), math.exp(fmean(means) + half))


def held_by_ranges_of_others(runs: Sequence[PublishedRun], errors: Sequence[float]) -> float:
    """The share of runs whose error lies in the range of the other trainers' runs."""
    held = 0
    for name in {run.trainer.name for run in runs}:
        others = [(run, error) for run, error in zip(runs, errors, strict=True) if run.trainer.name != name]
        found = range_of(*zip(*others, strict=True))
        held += sum(found.holds(error) for run, error in zip(runs, errors, strict=True) if run.trainer.name == name)
    return held / len(runs)


def main() -> None:
    """Fit the numbers, leave out each trainer in turn, and print all figures."""
    from benchmarks.tables import fit as tables

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("foundry", type=Path, help="the table of llm-foundry's runs")
    parser.add_argument("others", type=Path, help="the table of the other trainers' runs")
    given = parser.parse_args()
    for name, make in tables.tables_of(given.foundry, given.others).items():
        print(f"{name}\n\n{make()}\n")


if __name__ == "__main__":
    main()
