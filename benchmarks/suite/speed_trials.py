"""The rows of ``gpu_suite.py speed``, one after another; some depend on the answers before them."""

from collections.abc import Callable, Generator, Iterable

from benchmarks.suite.children import Values
from benchmarks.suite.speed_rows import (
    ATTENTION,
    BACKENDS_AND_RECOMPUTE,
    CHOSEN,
    DEEPSPEED,
    LOSS_AND_COMPILE,
    MICRO_BATCHES,
    PROFILE,
    TRAIN,
    WHERE_TIME_IS_LEFT,
    Round,
    Subject,
    changed,
    does_not_fit,
    loop_job,
    loop_plan,
    loss_jobs,
    profile_job,
    profile_seconds,
    training_job,
)

START_SECONDS = 15.0
"""~ what a kind of jobs takes to begin: the process imports, the card is woken, the compiler's workers start."""

Jobs = Generator[Values, None, None]
"""Jobs, each to be answered before the next."""


class Trials:
    """Makes jobs for the child processes, and rows of their answers.

    Args:
        subjects: presets on the machine at hand.
        wanted: whether a row of this name is asked for.
        trace: a file for the profile's whole trace; None: none.

    Attributes:
        rows: all rows that have an answer, in order.
    """

    def __init__(
        self, subjects: Iterable[Subject], wanted: Callable[[str], bool] = bool, trace: str | None = None
    ) -> None:
        self.subjects = list(subjects)
        self.rows: list[Values] = []
        self._wanted, self._trace = wanted, trace
        self._micro = {subject.preset: subject.plan.batch.micro_batch for subject in self.subjects}
        self._loop_micro: dict[str, int] = {}
        self._names: set[str] = set()
        self._asked: Values | None = None
        self._reserve = 0.0

    def kinds(self) -> list[Jobs]:
        """The jobs of torch's own backends and of other loops; then those of DeepSpeed, which needs a process of its own."""
        return [self._torch(), self._deepspeed()]

    def take(self, job: Values, answer: Values) -> None:
        """The answer to the job that was yielded last."""
        assert job is self._asked
        self._asked = None
        self.rows.append({**job, **answer})

    def give_up(self, jobs: Iterable[Values], answer: Values) -> None:
        """Answer what is left of some jobs without asking anybody."""
        if self._asked is not None:
            self.take(self._asked, answer)
        for job in jobs:
            self.take(job, answer)

    # --- in order ----------------------------------------------------------------------------------------------------

    def _torch(self) -> Jobs:
        """What the limits speak of first; the profile of the best last, for which time is kept."""
        self._reserve = max(
            (profile_seconds(training_job(each.plan)["usual_seconds"]) for each in self.subjects), default=0
        )
        for subject in self.subjects:
            yield from self._chosen(subject)
            yield from self._loop(subject, compiled=True)
        yield from self._round(BACKENDS_AND_RECOMPUTE)
        for subject in self.subjects:
            for job in loss_jobs(subject, self._micro[subject.preset]):
                yield from self._try(job)
        for each in (*LOSS_AND_COMPILE, ATTENTION, MICRO_BATCHES, *WHERE_TIME_IS_LEFT):
            yield from self._round(each)
        for subject in self.subjects:
            yield from self._other_loops(subject)
        yield from self._profile()

    def _deepspeed(self) -> Jobs:
        self._reserve = 0.0
        for each in DEEPSPEED:
            yield from self._round(each)

    def _chosen(self, subject: Subject) -> Jobs:
        """What the planner chooses; where it runs out of memory, half the micro batch, also for the rows that follow."""
        micro = self._micro[subject.preset]
        while True:
            plan = changed(subject, CHOSEN, micro)
            assert plan is not None
            outcome = yield from self._try(training_job(plan))
            self._micro[subject.preset] = micro
            if outcome != "out of memory" or micro == 1:
                return
            micro //= 2

    def _loop(self, subject: Subject, *, compiled: bool, core: bool = True) -> Jobs:
        """The plain loop, with half the micro batch where it runs out of memory."""
        plan = loop_plan(subject, self._loop_micro.get(subject.preset))
        while plan is not None:
            micro = plan.batch.micro_batch
            outcome = yield from self._try(loop_job(plan, compiled=compiled), core=core)
            self._loop_micro[subject.preset] = micro
            if outcome != "out of memory" or micro == 1:
                return
            plan = loop_plan(subject, micro // 2)

    def _other_loops(self, subject: Subject) -> Jobs:
        """The plain loop uncompiled; and compiled with half the micro batch: was ours unfair to it?"""
        yield from self._loop(subject, compiled=False, core=False)
        micro = self._loop_micro.get(subject.preset, 1)
        plan = loop_plan(subject, micro // 2) if micro > 1 else None
        if plan is not None:
            yield from self._try(loop_job(plan, compiled=True), core=False)

    def _round(self, each: Round) -> Jobs:
        for subject in self.subjects:
            for change in each.changes if subject.preset in each.presets else ():
                plan = changed(subject, change, self._micro[subject.preset])
                if plan is None:
                    continue
                reason = does_not_fit(plan)
                yield from self._try(training_job(plan), core=each.core, reason=reason)

    def _profile(self) -> Jobs:
        """The row that makes most of the card, where a plain step may be looked at in this process."""
        timed = [row for row in self.rows if row["kind"] == TRAIN and row["outcome"] in {"ran", "stepped"}]
        best = max(timed, key=rate, default=None)
        self._reserve = 0.0
        if best is not None:
            yield from self._try(profile_job(best, self._trace))

    def _try(self, job: Values, *, core: bool = True, reason: str | None = None) -> Generator[Values, None, str]:
        """Have a job done unless that is not wanted, was done before, or is not worth it.

        Returns:
            The outcome; empty: there is none.
        """
        name = job["name"]
        if name in self._names or not self._wanted(name):
            return ""
        self._names.add(name)
        job |= {"core": core, "reserve": 0.0 if job["kind"] == PROFILE else self._reserve}
        if reason is not None:
            self.rows.append({**job, "outcome": "left out", "reason": reason, "notes": []})
            return ""
        self._asked = job
        yield job
        outcome: str = self.rows[-1]["outcome"]
        return outcome


def rate(row: Values) -> float:
    """The model's own operations a second of a row; 0 where nothing was measured, as in a dry run."""
    found: float = row.get("measured", {}).get("model_flops_per_second", 0.0)
    return found


def foreseen(subjects: Iterable[Subject], wanted: Callable[[str], bool] = bool) -> tuple[list[Values], list[Values]]:
    """The jobs of both kinds if every one of them runs."""
    trials = Trials(subjects, wanted)

    def all_of(kind: Jobs) -> Iterable[Values]:
        for job in kind:
            yield job
            trials.take(job, {"outcome": "ran"})

    in_torch, in_deepspeed = (list(all_of(kind)) for kind in trials.kinds())
    return in_torch, in_deepspeed


def need(jobs: Iterable[Values]) -> float:
    """Seconds that the core of some jobs takes, by estimate; where nothing of it is asked for, all of them."""
    jobs = list(jobs)
    seconds = [job["usual_seconds"] for job in jobs if job["core"]] or [job["usual_seconds"] for job in jobs]
    return sum(seconds) + START_SECONDS if seconds else 0.0
