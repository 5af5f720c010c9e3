"""A configuration that a suite's child process can train."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One row of the suite.

    Attributes:
        preset: where it starts from.
        backend: ``plain``, ``fsdp`` or ``deepspeed``.
        zero_stage: its stage.
        ranks: data-parallel ranks W; more than one: a fake process group.
        grad_accum: micro batches per step.
        compiled: compile the blocks.
        apart: why it is summed up apart; empty: it is not.
        flags: what differs from the preset otherwise.
    """

    preset: str
    backend: str = "plain"
    zero_stage: int = 0
    ranks: int = 1
    grad_accum: int = 1
    compiled: bool = False
    apart: str = ""
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """All that sets it apart from the others, in words."""
        stage = "" if self.backend == "plain" else f" stage {self.zero_stage}"
        words = [f"{self.preset} {self.backend}{stage}"]
        words += [f"W={self.ranks}"] if self.ranks > 1 else []
        words += [f"{key}={str(value).lower()}" for key, value in self.flags.items()]
        words += [f"grad_accum={self.grad_accum}"] if self.grad_accum > 1 else []
        words += ["compiled"] if self.compiled else []
        return " ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the name included."""
        return {"name": self.name, **asdict(self)}
