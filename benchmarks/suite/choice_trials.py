"""The trials of ``gpu_suite.py choice``, one after another, each decided on by the answers before it."""

from collections.abc import Generator, Iterable

from benchmarks.suite.bisection import Facts, largest
from benchmarks.suite.children import Values
from benchmarks.suite.choice_rows import (
    STEPS,
    Cell,
    at_micro_batch,
    configuration,
    key_of,
    shortened,
    shortest,
)
from scalegpt.planner.plan import Plan

SHORT_STEPS, TIMED_STEPS = 2, 10
"""Optimizer steps of a trial that is about memory alone, and of an alternative's, which is about time."""

BASE_SECONDS, COMPILE_SECONDS, DEEPSPEED_SECONDS, FIRST_SECONDS = 4.0, 12.0, 6.0, 25.0
"""What a trial takes beside its steps, generously; the first of a backend starts a process and rehearses."""

NOT_REACHED = {"outcome": "left out", "reason": "not reached"}

EARLY_ROUNDS = 2
"""Rounds of cells before the alternatives of the first."""

Trial = Generator[Values, None, None]
"""Jobs, each to be answered before the next."""


class Trials:
    """Makes jobs for the child processes, and rows of their answers.

    Args:
        cells: what the planner was asked and has answered, in order.
        dry: no figures are to be had: every set-up is taken through a few steps, and no limit is looked for.
    """

    def __init__(self, cells: Iterable[Cell], *, dry: bool) -> None:
        self.dry = dry
        self.cells = list(cells)
        self.rows: list[Values] = [_row(cell) for cell in self.cells]
        self._facts = Facts()
        self._outside: dict[tuple[str, bool], int] = {}
        self._answer: Values = {}

    def kinds(self) -> list[tuple[float, Trial]]:
        """The jobs of torch's own backends and those of DeepSpeed, which needs a process of its own; with their needs."""
        return [(self._need(with_deepspeed=kind), self.jobs(with_deepspeed=kind)) for kind in (False, True)]

    def jobs(self, *, with_deepspeed: bool) -> Trial:
        """Jobs, the most telling first.

        Two rounds of cells, the alternatives of the first, the other cells, then the limits to the single sequence.
        The answer to each must have been given to :meth:`take` before the next is asked for.
        """
        pairs = [
            (cell, row)
            for cell, row in zip(self.cells, self.rows, strict=True)
            if cell.found.best is not None and _is_deepspeed(cell.found.best) is with_deepspeed
        ]
        for cell, row in pairs:
            if cell.order < EARLY_ROUNDS:
                yield from self._cell(cell, row)
        for cell, row in zip(self.cells, self.rows, strict=True):
            if cell.order == 0:
                yield from self._alternatives(cell, row, with_deepspeed=with_deepspeed)
        for cell, row in pairs:
            if cell.order >= EARLY_ROUNDS:
                yield from self._cell(cell, row)
        for cell, row in pairs:
            yield from self._single_sequences(cell, row)

    def take(self, job: Values, answer: Values) -> None:
        """The answer to the job that was yielded last."""
        self._answer = answer
        if answer.get("outside_bytes") is not None:
            self._outside[job["backend"], job["compiled"]] = answer["outside_bytes"]

    # --- one cell ----------------------------------------------------------------------------------------------------

    def _cell(self, cell: Cell, row: Values) -> Trial:
        chosen = cell.found.best
        assert chosen is not None
        twin = self._twin(row)
        if twin is not None:
            row |= {key: twin[key] for key in ("outcome", "trained", "speed")}
            row["notes"] = [*row["notes"], f"as on {twin['gb']} GB, where the same plan ran with less memory"]
        else:
            plan = shortened(chosen, STEPS)
            yield from self._try(
                cell, shortest(plan) if self.dry else plan, SHORT_STEPS if self.dry else STEPS, "chosen"
            )
            row |= _outcome(self._answer)
            if row["outcome"] == "ran":
                row["trained"] = {"grad_accum": plan.batch.grad_accum, **_kept(self._answer)}
                row["speed"] = speed(chosen, plan, self._answer["measured"])
        if row["outcome"] in {"ran", "out of memory"}:
            yield from self._largest(cell, row, chosen)

    def _twin(self, row: Values) -> Values | None:
        """The row of the same plan that ran on a smaller card."""
        return next(
            (
                other
                for other in self.rows
                if other["outcome"] == "ran"
                and other["chosen"]["name"] == row["chosen"]["name"]
                and other["usable_bytes"] <= row["usable_bytes"]
            ),
            None,
        )

    def _largest(self, cell: Cell, row: Values, chosen: Plan) -> Trial:
        """The largest micro batch that divides the step and runs, all else as chosen."""
        found: Values = {"micro_batch": None, "ratio": None, "next": None, "trials": []}
        row["largest"] = found
        whole = cell.sizes[-1]
        sizes = [size for size in cell.sizes if size < whole]
        micro, ran = chosen.batch.micro_batch, row["outcome"] == "ran"
        if micro == whole and ran:
            found |= {"micro_batch": whole, "ratio": 1.0}
            return
        best = yield from self._bisect(cell, chosen, largest(sizes, micro, ran=ran), found["trials"])
        if best is None:
            return
        higher = [size for size in sizes if size > best]
        found["next"] = higher[0] if higher else whole
        if micro < whole and self._whole_may_run(chosen, whole, higher):
            yield from self._probe(cell, at_micro_batch(chosen, whole), found["trials"])
            verdict = found["trials"][-1]["outcome"]
            if verdict not in {"ran", "out of memory"}:
                return
            if verdict == "ran":
                best, found["next"] = whole, None
        found["micro_batch"] = best
        found["ratio"] = micro / best if best else None

    def _whole_may_run(self, chosen: Plan, whole: int, failed: list[int]) -> bool:
        """Whether the step as one micro batch is worth a trial.

        Without accumulation no gradients wait, so that it may take less than a smaller one that failed.
        """
        if not failed:
            return True
        return at_micro_batch(chosen, whole).total_bytes <= at_micro_batch(chosen, failed[0]).total_bytes

    def _bisect(
        self, cell: Cell, chosen: Plan, search: Generator[int, bool, int], trials: list[Values]
    ) -> Generator[Values, None, int | None]:
        """Go through a search of :func:`~benchmarks.suite.bisection.largest`.

        Returns:
            What it finds; None: a trial had no outcome.
        """
        try:
            micro = next(search)
            while True:
                yield from self._probe(cell, at_micro_batch(chosen, micro), trials)
                if trials[-1]["outcome"] not in {"ran", "out of memory"}:
                    return None
                micro = search.send(trials[-1]["outcome"] == "ran")
        except StopIteration as end:
            best: int = end.value
            return best

    def _probe(self, cell: Cell, plan: Plan, trials: list[Values]) -> Trial:
        """Enter what becomes of a plan, by a trial or by what follows from others."""
        micro = plan.batch.micro_batch
        known = self._facts.outcome(key_of(plan), micro, cell.usable)
        if known is not None:
            trials.append({"micro_batch": micro, "outcome": "ran" if known[0] else "out of memory", "by": known[1]})
            return
        yield from self._try(cell, shortest(plan), SHORT_STEPS, "is there room?")
        trials.append({"micro_batch": micro, **_outcome(self._answer), **_kept(self._answer)})

    def _single_sequences(self, cell: Cell, row: Values) -> Trial:
        """The largest micro batch of all, whether it divides the step or not."""
        chosen, found = cell.found.best, row.get("largest")
        if chosen is None or found is None or not found["micro_batch"] or found["next"] is None:
            return
        divisor = found["micro_batch"]
        sizes = range(divisor, found["next"])
        trials: list[Values] = []
        best = yield from self._bisect(cell, chosen, largest(sizes, divisor, ran=True), trials)
        row["single_sequences"] = {
            "micro_batch": best,
            "ratio": None if best is None else chosen.batch.micro_batch / best,
            "trials": trials,
        }

    def _alternatives(self, cell: Cell, row: Values, *, with_deepspeed: bool) -> Trial:
        """What the planner holds for the next best: is it slower?"""
        for other, entry in zip(cell.alternatives, row["alternatives"], strict=True):
            if _is_deepspeed(other) is not with_deepspeed:
                continue
            plan = shortened(other, TIMED_STEPS)
            yield from self._try(
                cell, shortest(plan) if self.dry else plan, SHORT_STEPS if self.dry else TIMED_STEPS, "alternative"
            )
            entry |= {**_outcome(self._answer), **_kept(self._answer)}
            if entry["outcome"] == "ran":
                entry["speed"] = speed(other, plan, self._answer["measured"])

    # --- one trial ---------------------------------------------------------------------------------------------------

    def _try(self, cell: Cell, plan: Plan, steps: int, what: str) -> Trial:
        """Have a plan trained, and keep what follows from it."""
        job = configuration(plan).as_dict()
        outside = self._outside.get((job["backend"], job["compiled"]))
        job |= {
            "usable_bytes": cell.usable,
            "outside_bytes": outside,
            "steps": steps,
            "cell": cell.name,
            "what": what,
            "usual_seconds": _usual_seconds(plan, steps, first=outside is None and not self.dry),
        }
        yield job
        if self._answer["outcome"] in {"ran", "out of memory"}:
            ran = self._answer["outcome"] == "ran"
            self._facts.add(key_of(plan), plan.batch.micro_batch, cell.usable, ran=ran, where=f"{cell.name}, {what}")

    def _need(self, *, with_deepspeed: bool) -> float:
        """Seconds that the jobs would take if each cell needed one trial beside its plan's own."""
        need = 0.0
        for cell in self.cells:
            chosen = cell.found.best
            if chosen is not None and _is_deepspeed(chosen) is with_deepspeed:
                for plan, steps in ((shortened(chosen, STEPS), STEPS), (shortest(chosen), SHORT_STEPS)):
                    need += _usual_seconds(plan, steps, first=False)
            if cell.order == 0:
                others = (plan for plan in cell.alternatives if _is_deepspeed(plan) is with_deepspeed)
                need += sum(_usual_seconds(shortened(plan, TIMED_STEPS), TIMED_STEPS, first=False) for plan in others)
        return need


def speed(plan: Plan, trained: Plan, measured: Values) -> Values:
    """Predicted against measured tokens per second.

    Args:
        plan: the plan in full.
        trained: the same with less accumulation, as it was trained.
        measured: the seconds of such a step, and of a micro step that is not the last.

    Returns:
        The plan's figures, where what was not trained of a step's accumulation is made up by as many micro steps; and, as
        ``short``, those of the step as it was trained.
    """
    more = plan.batch.grad_accum - trained.batch.grad_accum
    seconds = measured["step_seconds"] + (more * measured["micro_seconds"] if more else 0.0)
    return {
        **_compared(plan, seconds),
        "short": {"grad_accum": trained.batch.grad_accum, **_compared(trained, measured["step_seconds"])},
    }


def _compared(plan: Plan, seconds: float) -> Values:
    measured = plan.batch.tokens / seconds
    return {
        "predicted_step_seconds": plan.seconds,
        "measured_step_seconds": seconds,
        "predicted_tokens_per_second": plan.tokens_per_second,
        "measured_tokens_per_second": measured,
        "error": plan.tokens_per_second / measured - 1,
    }


def _row(cell: Cell) -> Values:
    """A cell before any trial."""
    chosen, closest = cell.found.best, cell.found.closest
    row: Values = {
        "name": cell.name,
        "preset": cell.preset,
        "gb": cell.gb,
        "usable_bytes": cell.usable,
        "limit_bytes": int(cell.question.limit),
        "notes": [],
        "alternatives": [],
    }
    if chosen is None:
        least = None if closest is None else {"total_bytes": closest.total_bytes}
        return {**row, "outcome": "does not fit", "reason": "by the planner", "chosen": None, "closest": least}
    if cell.order == 0:
        row["alternatives"] = [{**_described(plan), **NOT_REACHED} for plan in cell.alternatives]
    return {**row, **NOT_REACHED, "chosen": _described(chosen)}


def _described(plan: Plan) -> Values:
    return {
        **configuration(plan).as_dict(),
        "offload": plan.run.parallel.offload,
        "recompute": plan.run.train.recompute,
        "loss": plan.run.train.loss,
        "micro_batch": plan.batch.micro_batch,
        "predicted_peak_bytes": plan.peak_bytes,
        "predicted_reserved_bytes": plan.reserved_bytes,
        "predicted_total_bytes": plan.total_bytes,
        "predicted_step_seconds": plan.seconds,
        "predicted_tokens_per_second": plan.tokens_per_second,
    }


def _outcome(answer: Values) -> Values:
    return {"outcome": answer["outcome"], "reason": answer.get("reason", "")}


def _kept(answer: Values) -> Values:
    """What is kept of an answer beside its outcome."""
    return {
        key: answer[key] for key in ("measured", "cap_bytes", "outside_bytes", "seconds", "notes") if answer.get(key)
    }


def _is_deepspeed(plan: Plan) -> bool:
    return plan.run.parallel.backend == "deepspeed"


def _usual_seconds(plan: Plan, steps: int, *, first: bool) -> float:
    seconds = BASE_SECONDS + (FIRST_SECONDS if first else 0.0) + 1.5 * steps * plan.seconds
    seconds += COMPILE_SECONDS if plan.run.train.compile != "off" else 0.0
    return seconds + (DEEPSPEED_SECONDS if _is_deepspeed(plan) else 0.0)
