"""One training run: join the ranks, prepare the job, train it, report, and leave the ranks."""

import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from scalegpt.backends import World
from scalegpt.backends.ports import public_ports
from scalegpt.backends.world import COLLECTIVE_TIMEOUT
from scalegpt.config import TrainConfig
from scalegpt.errors import InputError, RunError
from scalegpt.system.ranks import read_ranks
from scalegpt.text import visible
from scalegpt.training.job import Job
from scalegpt.training.output.ending import contents, next_lines
from scalegpt.training.request import Request
from scalegpt.training.resilience.stopping import Stopped, StopRequest
from scalegpt.training.runs.report.page import write_report
from scalegpt.training.setup.machines import machine_lines
from scalegpt.training.setup.prepare import prepare
from scalegpt.training.trainer import Trainer

ROOM = timedelta(minutes=5)
"""Added to the time-out of torch's collectives, so that the watchdog acts first.

The watchdog can name the slow rank; torch names only the collective.
"""

ENDLESS = timedelta(days=30)
"""Stands for "no time-out", which torch's collectives do not offer."""


@dataclass(frozen=True)
class Ending:
    """The end of a run that did not fail.

    Attributes:
        status: the exit status: 0, or 128 plus the number of the signal that stopped the run.
        folder: the run's folder; None where the run was stopped before its first step.
    """

    status: int
    folder: Path | None


def train(request: Request, device: str, stop: StopRequest) -> Ending:
    """Prepare and train, and report where the run's files are.

    Raises:
        InputError: the request cannot be met. Nothing was changed.
        RunError: the run failed. ``run_status.json`` says why.
    """
    with stop.alone():
        world = World.join(device, collective_timeout(request.run.train))
    try:
        ending = _run(request, world, stop)
    except BaseException:
        if world.size == 1:  # with more ranks, leave() waits for all of them, and some may never call it
            world.leave()
        raise
    world.leave()
    return ending


def collective_timeout(train: TrainConfig) -> timedelta:
    """The time-out of torch's collectives: longer than the watchdog's time-out of any step."""
    longest = max(limit or math.inf for limit in (train.first_step_timeout, train.step_timeout))
    return ENDLESS if math.isinf(longest) else max(COLLECTIVE_TIMEOUT, timedelta(seconds=longest)) + ROOM


def _run(request: Request, world: World, stop: StopRequest) -> Ending:
    lines = machine_lines(world, request.network, allow_slow=request.allow_slow_network)
    try:
        job = prepare(request, world, stop)
    except Stopped as stopped:
        if world.is_first:
            print(visible(stopped), flush=True)
        return Ending(stopped.exit_status, None)
    for line in lines:
        job.logger.say(line)
    if world.is_first and not job.resumed:  # once for each run: also a restart by the launcher resumes
        for line in public_ports(read_ranks()):
            job.logger.say(f"warning: {line}")
    try:
        return _train(Trainer(job), job, world)
    finally:
        job.directory.unlock()  # the process may live on: Python code may train again


def _train(trainer: Trainer, job: Job, world: World) -> Ending:
    try:
        trainer.fit()
    except BaseException as error:
        failure = trainer.fail(error)
        if failure is error:
            raise
        raise failure from error
    finally:
        trainer.close()
    if world.is_first:
        try:
            write_report(job.directory)
        except (InputError, RunError, OSError) as error:  # the run itself has succeeded
            job.logger.say(f"warning: report.html was not written: {error}")
        try:
            trainer.saving.mirror.update()
        except RunError as error:
            job.logger.say(f"warning: {error}")
        elsewhere = f"; checkpoints in {job.directory.checkpoints}" if job.directory.is_kept_elsewhere() else ""
        job.logger.say(f"{trainer.outcome()}: {job.directory.path}/ holds {contents(job.directory.path)}{elsewhere}")
        if trainer.all_taken:
            for line in next_lines(job.directory.path):
                job.logger.say(line)
    world.barrier()  # after this no rank needs another one
    if world.local_rank == 0:
        trainer.watchdog.beats.remove()
    return Ending(trainer.exit_status, job.directory.path)
