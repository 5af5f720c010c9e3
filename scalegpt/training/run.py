"""One run from joining the ranks to leaving them."""

from scalegpt.backends import World
from scalegpt.training.report import write_report
from scalegpt.training.setup import Request, prepare
from scalegpt.training.trainer import Trainer


def train(request: Request, device: str) -> None:
    """Prepare and train; afterwards say where the run's files are.

    Args:
        request: what to train.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: the request cannot be met; nothing was changed.
        RunError: the run failed; its status says why.
    """
    world = World.join(device)
    try:
        job = prepare(request, world)
        trainer = Trainer(job)
        try:
            trainer.fit()
        except BaseException as error:
            trainer.fail(error)
            raise
        finally:
            trainer.close()
        if world.is_first:
            write_report(job.directory)
            job.logger.say(f"{trainer.outcome()}: {job.directory.path}/ holds {trainer.files()}")
            job.directory.unlock()
        world.barrier()  # part together: nobody waits for a rank that has gone
    finally:
        world.leave()
