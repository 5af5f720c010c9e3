"""Tables on the fit of the time model to the published runs: the fitted numbers, errors, ranges, memory, rows left out."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median

from benchmarks import fit_throughput
from benchmarks.fit_throughput import INSIDE, PRIORS, WITHOUT, Fit, Range, held_by_ranges_of_others, range_of
from benchmarks.published import PublishedRun, read_others, read_published
from benchmarks.tables.markdown import gib, table
from benchmarks.trainers import LLM_FOUNDRY, TRAINERS
from scalegpt.hardware.gpus import GIB
from scalegpt.planner.time.rates import FITTED_ON, speed_range


class _Fitted:
    """The runs, the fit, and its errors; each is computed when a table needs it, once."""

    def __init__(self, foundry: Path, others: Path) -> None:
        self.foundry = read_published(foundry)
        found, self.left = read_others(others)
        self.runs = [*self.foundry, *found]

    @cached_property
    def fit(self) -> Fit:
        """The fit to all runs."""
        return fit_throughput.fit(self.runs)

    @cached_property
    def crossed(self) -> list[float]:
        """The errors in cross-validation."""
        return fit_throughput.cross_validate(self.runs)

    @cached_property
    def unseen(self) -> list[float]:
        """The errors of the runs of trainers that were left out."""
        return fit_throughput.leave_out(self.runs)


def tables_of(foundry: Path, others: Path) -> Mapping[str, Callable[[], str]]:
    """Name of a table → the function that makes it, from the two files of published runs."""
    all_of = _Fitted(foundry, others)
    return {
        "fitted numbers": lambda: numbers_table(all_of.fit),
        "fit": lambda: error_table(all_of.runs, all_of.crossed, by_trainer),
        "fit, llm-foundry": lambda: error_table(
            all_of.foundry, all_of.crossed[: len(all_of.foundry)], by_card_and_model
        ),
        "terms left out": lambda: terms_table(all_of.runs, all_of.crossed, all_of.unseen),
        "trainers left out": lambda: error_table(all_of.runs, all_of.unseen, by_trainer),
        "16 GPUs and more": lambda: large_table(all_of.runs, all_of.unseen),
        "scaling efficiency": lambda: scaling_table(all_of.runs, all_of.unseen),
        "range": lambda: range_words(all_of.runs, all_of.unseen),
        "our trainer in their place": lambda: in_their_place(all_of.foundry),
        "published memory": lambda: memory_table(all_of.runs),
        "rows left out": lambda: left_out(all_of.left),
        "trainers": trainers_list,
    }


def trainers_list() -> str:
    """How each trainer is described, as a list in Markdown."""
    return "\n".join(f"- **{each.name}** ({each.source}). {each.why}" for each in (LLM_FOUNDRY, *TRAINERS))


def error_table(
    runs: Sequence[PublishedRun], errors: Sequence[float], groups_of: Callable[[PublishedRun], Iterable[str]]
) -> str:
    """The table of mean, mean absolute, median absolute and largest errors by group, and of all runs, in Markdown."""
    groups: dict[str, list[float]] = defaultdict(list)
    for run, value in zip(runs, errors, strict=True):
        for name in (*groups_of(run), "all"):
            groups[name].append(value)
    rows = []
    for name, values in sorted(groups.items(), key=lambda item: _by_size(item[0])):
        absolute = list(map(abs, values))
        parts = fmean(values), fmean(absolute), median(absolute), max(values, key=abs)
        rows.append(
            (name, f"{len(values)}", f"{parts[0]:+.1%}", f"{parts[1]:.1%}", f"{parts[2]:.1%}", f"{parts[3]:+.1%}")
        )
    return table("runs | number | mean error | mean absolute | median absolute | largest", rows, right=set(range(1, 6)))


def by_card_and_model(run: PublishedRun) -> tuple[str, ...]:
    """The groups of a run of llm-foundry: its card, its model, and whether it ran on one machine."""
    assert run.machine.card is not None
    return run.machine.card.name, run.model, "one machine" if run.machine.nodes == 1 else "several machines"


def by_trainer(run: PublishedRun) -> tuple[str, ...]:
    """The group of a run: its trainer."""
    return (run.trainer.name,)


def numbers_table(found: Fit) -> str:
    """The table of the fitted numbers, and of the trainers' efficiencies, in Markdown."""
    rows = [
        (f"`{name}`", prior.why, f"{prior.value:g}", f"{found.numbers[name]:.3g}") for name, prior in PRIORS.items()
    ]
    rows += [(name, "speed relative to the model", "1", f"{value:.2f}") for name, value in found.efficiency.items()]
    return table("number | what it is | expected | fitted", rows, right={2, 3})


def terms_table(runs: Sequence[PublishedRun], crossed: Sequence[float], unseen: Sequence[float]) -> str:
    """The table of mean absolute errors if terms are left out of the model, in Markdown."""
    rows = [("nothing", f"{fmean(map(abs, crossed)):.1%}", f"{fmean(map(abs, unseen)):.1%}")]
    for name, priors in WITHOUT.items():
        errors = fit_throughput.cross_validate(runs, priors), fit_throughput.leave_out(runs, priors)
        first, second = (f"{fmean(map(abs, each)):.1%}" for each in errors)
        rows.append((name, first, second))
    again = [
        replace(run, run=replace(run.run, train=run.run.train.changed(recompute="full"))) if run.trainer.scores else run
        for run in runs
    ]
    errors = fit_throughput.cross_validate(again), fit_throughput.leave_out(again)
    first, second = (f"{fmean(map(abs, each)):.1%}" for each in errors)
    rows.append(("nothing, but Megatron-DeepSpeed's runs recompute", first, second))
    return table("left out | in cross-validation | trainers left out", rows, right={1, 2})


LARGE = 16
"""The least number of GPUs of a large run."""


def large_table(runs: Sequence[PublishedRun], errors: Sequence[float]) -> str:
    """The table of the errors of runs on at least :data:`LARGE` GPUs, whose trainers were left out, in Markdown."""
    large = [(run, error) for run, error in zip(runs, errors, strict=True) if run.batch.ranks >= LARGE]
    return error_table([run for run, _ in large], [error for _, error in large], by_trainer)


def scaling_table(runs: Sequence[PublishedRun], errors: Sequence[float]) -> str:
    """The table of measured and predicted scaling efficiencies, in Markdown.

    The efficiency is the tokens/s of each GPU on the most GPUs that a trainer published for a model and a card, divided
    by those on the fewest. ``errors`` are those of fits without the run's trainer, whose numbers are the same for all of a
    trainer's runs, so that its own efficiency cancels.
    """
    series: dict[tuple[str, ...], list[tuple[PublishedRun, float]]] = defaultdict(list)
    for run, error in zip(runs, errors, strict=True):
        assert run.machine.card is not None
        series[run.trainer.name, run.machine.card.name, run.model, str(run.run.model.block_size)].append((run, error))
    rows, off = [], []
    for name, found in series.items():
        (few, first), (many, last) = (pick(found, key=lambda each: each[0].batch.ranks) for pick in (min, max))
        if many.batch.ranks < LARGE or many.batch.ranks == few.batch.ranks:
            continue
        measured = many.tokens_per_second / few.tokens_per_second
        predicted = measured * (1 + last) / (1 + first)
        off.append(predicted - measured)
        rows.append(
            (
                *name[:3], f"{few.batch.ranks} to {many.batch.ranks}", "yes" if _divided(few) == _divided(many) else "no",
                f"{measured:.1%}", f"{predicted:.1%}", f"{100 * off[-1]:+.1f}",
            )
        )  # fmt: skip
    said = (
        f"Predicted efficiencies are off by {100 * fmean(map(abs, off)):.1f} points on average, and by "
        f"{100 * max(map(abs, off)):.1f} at most."
    )
    heads = "trainer | card | model | GPUs | same settings | measured | predicted | points"
    return f"{said}\n\n{table(heads, rows, right={5, 6, 7})}"


def _divided(run: PublishedRun) -> tuple[object, ...]:
    return run.batch.micro_batch, run.batch.grad_accum, run.run.train.recompute, run.run.parallel.stage


def range_words(runs: Sequence[PublishedRun], errors: Sequence[float]) -> str:
    """The range of the speeds of trainers that were left out, and the share of the runs within ranges, in words."""
    fitted = [(run, error) for run, error in zip(runs, errors, strict=True) if _is_fitted(run)]
    found = range_of(*zip(*fitted, strict=True))
    stated = []
    for run, error in zip(runs, errors, strict=True):
        assert run.machine.card is not None
        stated.append(Range(*speed_range(run.machine.card)).holds(error))
    return (
        f"Measured ÷ predicted is from {found.slowest:.2f} to {found.fastest:.2f}, with {INSIDE:.0%} confidence, for one "
        f"more trainer on cards whose shares are fitted. Ranges made in the same way without a trainer's runs hold "
        f"{held_by_ranges_of_others(*zip(*fitted, strict=True)):.0%} of the {len(fitted)} runs there. The range that a plan "
        f"states holds {fmean(stated):.0%} of all {len(runs)} runs."
    )


def _is_fitted(run: PublishedRun) -> bool:
    return run.machine.card is not None and run.machine.card.capability in FITTED_ON


def in_their_place(runs: Sequence[PublishedRun]) -> str:
    """How many of the runs fit in our trainer, and its predicted tokens per second relative to the published, in Markdown."""
    plans = [run.plan for run in runs]
    fitting = sum(plan.fits is True for plan in plans)
    fullest = max(plan.total_bytes / plan.machine.usable_bytes for plan in plans if plan.machine.usable_bytes)
    pairs = zip(plans, runs, strict=True)
    errors = [plan.tokens_per_second / run.batch.ranks / run.tokens_per_second - 1 for plan, run in pairs]
    said = f"{fitting} of the {len(runs)} runs fit with `--loss chunked`, the fullest at {fullest:.1%} of its card."
    return f"{said}\n\n{error_table(runs, errors, by_card_and_model)}"


def memory_table(runs: Sequence[PublishedRun]) -> str:
    """How many runs fit with their own trainer's loss and states, which do not, and predicted and measured peaks."""
    fitting = sum(run.fits for run in runs)
    lines = [f"{fitting} of the {len(runs)} runs are said to fit with their own trainer's loss and states."]
    lines += [
        f"- {run.trainer.name}, {run.model}, micro batch {run.batch.micro_batch}: {gib(run.total_bytes)} of "
        f"{gib(run.machine.usable_bytes or 0)}"
        for run in runs
        if not run.fits
    ]
    rows = [
        (f"{run.trainer.name}, {run.model}", f"{run.peak_gib:.1f}", f"{run.peak_bytes / GIB:.1f}", run.peak_kind)
        for run in runs
        if run.peak_gib is not None
    ]
    return "\n".join((*lines, "", table("run | measured, GiB | predicted peak, GiB | measured as", rows, right={1, 2})))


def left_out(left: Mapping[str, Sequence[str]]) -> str:
    """The rows that are left out, by the rule that leaves them out, in Markdown."""
    return "\n".join(
        f"- {reason}: {len(rows)}\n" + "\n".join(f"  - {row}" for row in rows) for reason, rows in left.items()
    )


def _by_size(name: str) -> tuple[int, float, str]:
    """A sort key for the rows of a table: cards first, then models by size, then other groups, and "all runs" last."""
    if name.startswith("mpt-"):
        size = name.removeprefix("mpt-")
        return 1, float(size[:-1]) * (1000 if size[-1] == "b" else 1), name
    return 0 if name[:4] in {"A100", "H100"} else 3 if name == "all" else 2, 0.0, name
