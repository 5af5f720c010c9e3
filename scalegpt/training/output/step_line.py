"""The values that are shown for a step, and the plain line that shows them."""

from dataclasses import dataclass

from scalegpt.units import human_count, human_time


@dataclass(frozen=True)
class StepLine:
    """The values that are shown for a step.

    Attributes:
        mfu: model FLOPs utilization; None: the device's peak is not known.
        seconds_left: seconds until the end of the run; NaN: not known.
        skipped: number of skipped steps so far.
        val_loss: held-out loss of the last evaluation; None: there was none.
        used_bytes: peak memory of this rank so far; 0: not measured.
        seconds_to_save: seconds until the next checkpoint is due; None: only at the end.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    mfu: float | None
    seconds_left: float
    skipped: int = 0
    val_loss: float | None = None
    used_bytes: int = 0
    seconds_to_save: float | None = None

    def text(self) -> str:
        """The plain line, without the step's number."""
        parts = [f"loss {self.loss:.4f}", f"{human_count(self.tokens_per_second)} tok/s"]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        parts += [f"lr {self.learning_rate:.2e}", f"norm {self.grad_norm:.2f}"]
        if self.skipped:
            parts.append(f"{self.skipped} skipped")
        return "  ".join([*parts, f"{human_time(self.seconds_left)} left"])
