"""What a run that resumes has to make up for: the checkpoint is written before the evaluation and the sample of its step.

Where the process ended in between, ``metrics.jsonl`` and ``samples.txt`` lack what the step was due, and a resumed run does
it first. So a run that was interrupted ends with the same files as one that was not.
"""

from dataclasses import dataclass

from scalegpt.config import TrainConfig
from scalegpt.training.runs.directory import RunDirectory


@dataclass(frozen=True)
class Owed:
    """What is to be done for a step before the next.

    Attributes:
        evaluation: whether to find the held-out loss.
        sample: whether to write a sample.
        val_loss: the held-out loss of the step, where it was found; the checkpoint may not know it.
    """

    evaluation: bool = False
    sample: bool = False
    val_loss: float | None = None

    @property
    def anything(self) -> bool:
        """Whether something is to be done."""
        return self.evaluation or self.sample


def is_due(step: int, every: int) -> bool:
    """Whether something is due that happens every so many steps; never where that is 0."""
    return every > 0 and step % every == 0


def owed_for(directory: RunDirectory, train: TrainConfig, step: int, *, at_end: bool) -> Owed:
    """What the files of a run lack of a step that a checkpoint is of.

    Args:
        directory: the run's.
        train: what is due when.
        step: the checkpoint's.
        at_end: whether the run has no more steps: then both are due.
    """
    lines = [line for line in directory.read_metrics() if line["step"] == step]
    evaluated = [line["val_loss"] for line in lines if "val_loss" in line]
    val_loss = float(evaluated[-1]) if evaluated and type(evaluated[-1]) in {int, float} else None
    if not any("loss" in line for line in lines) or directory.read_state() == "finished":
        return Owed(val_loss=val_loss)  # of a step that the file does not know nothing can be said
    sampled = any(after == step for after, _ in directory.read_samples())
    evaluates = at_end or is_due(step, train.eval_every)
    samples = train.sample_tokens > 0 and (at_end or is_due(step, train.sample_every))
    return Owed(evaluates and not evaluated, samples and not sampled, val_loss)
