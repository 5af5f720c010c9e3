"""What real runs held, kept in a small file of this machine's user, and what later plans learn from it.

The trainer adds a line at the end of every run on a GPU. A plan for the same card, torch and driver takes the parts *outside*
the step's tensors from there: fragmentation, context, NCCL. The peak of the tensors themselves is arithmetic and is never
corrected: where a run shows another one, that is an error to be found.

The file is ``$SCALEGPT_CACHE/calibration.json``, else ``~/.cache/scalegpt/calibration.json``. It may be deleted at any
time. Of two runs that end at the same moment one measurement may be lost; the file is never broken by it.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scalegpt.config import RunConfig
from scalegpt.config.backends import BACKENDS
from scalegpt.hardware.gpus import Card, known_card
from scalegpt.planner.memory.overheads import Overheads
from scalegpt.storage import user_path
from scalegpt.structured import read_object
from scalegpt.text import shown

FORMAT, VERSION = "scalegpt-calibration", 1

MOST_MEASUREMENTS = 200
"""Older ones are dropped."""

NEWEST = 8
"""How many of the fitting measurements count: what has changed since is forgotten."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run on a GPU, rank 0.

    Attributes:
        card: the driver's name of the card.
        driver: version of the driver.
        torch: version of torch.
        predicted_peak_bytes: the planner's peak.
        allocated_bytes: the allocator's peak, ``max_memory_allocated``.
        reserved_bytes: ``max_memory_reserved``.
        driver_bytes: what the driver counted for the process at the end.
        date: ISO 8601, UTC.
    """

    card: str
    driver: str
    torch: str
    backend: str
    ranks: int
    predicted_peak_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    driver_bytes: int
    date: str

    @classmethod
    def parse(cls, values: Any) -> "Measurement":
        """A measurement from parsed JSON.

        Raises:
            ValueError: something is missing, of another type, or cannot be.
        """
        if not isinstance(values, dict):
            raise ValueError("a measurement must be an object")
        known = {field.name: field.type for field in fields(cls)}
        for name, kind in known.items():
            if type(values.get(name)) is not kind:
                raise ValueError(f"{name} must be of type {kind}, not {shown(values.get(name))}")
        made = cls(**{name: values[name] for name in known})
        if not 0 < made.allocated_bytes <= made.reserved_bytes <= made.driver_bytes < 2**50 or made.ranks < 1:
            raise ValueError("a measurement needs 0 < allocated_bytes <= reserved_bytes <= driver_bytes, and ranks >= 1")
        return made

    @property
    def waste(self) -> float:
        """What was reserved and not allocated, as a share of what was."""
        return (self.reserved_bytes - self.allocated_bytes) / self.allocated_bytes

    @property
    def outside(self) -> int:
        """What the driver counted beyond what the allocator reserved."""
        return self.driver_bytes - self.reserved_bytes


@dataclass(frozen=True)
class Calibration:
    """The measurements at hand, oldest first.

    Attributes:
        warning: why there are none, where a file is there but cannot be used.
    """

    measurements: tuple[Measurement, ...] = ()
    warning: str | None = None

    def corrected(
        self,
        overheads: Overheads,
        run: RunConfig,
        card: Card | None,
        ranks: int,
        *,
        torch: str | None,
        driver: str | None,
    ) -> Overheads:
        """The overheads with what runs of the same card, versions and kind have shown; of several the largest.

        Args:
            overheads: by the tables.
            run: what is planned.
            card: for which card; an unknown one has no measurements.
            ranks: data-parallel ranks W.
            torch: version of torch that will run; None: not known, and nothing is corrected.
            driver: version of the driver; None, as on a machine without a GPU, takes any.
        """
        if card is None or torch is None:
            return overheads
        fitting = [
            each
            for each in self.measurements
            if known_card(each.card) == card
            and _minor(each.torch) == _minor(torch)
            and driver in {None, each.driver}
            and _has_group(each.backend) == _has_group(run.parallel.backend)
            and each.ranks == ranks
        ][-NEWEST:]
        if not fitting:
            return overheads
        return overheads.corrected(
            fragmentation_share=max(
                max(0.0, (each.waste * each.allocated_bytes - overheads.segment) / each.allocated_bytes)
                for each in fitting
            ),
            outside=max(each.outside for each in fitting),
            measured=len(fitting),
        )


def calibration_path() -> Path:
    """Where measurements are kept.

    Raises:
        InputError: there is no home folder.
    """
    chosen = os.environ.get("SCALEGPT_CACHE")
    return Path(user_path(chosen or "~/.cache/scalegpt")) / "calibration.json"


def load(path: Path | None = None) -> Calibration:
    """The measurements in the file; none, with a warning, where it is there but broken. Never raises."""
    try:
        path = calibration_path() if path is None else path
        values = read_object(path)
        if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"its format is not {FORMAT} {VERSION}")
        if not isinstance(values.get("measurements"), list):
            raise ValueError("it has no list of measurements")
        return Calibration(tuple(map(Measurement.parse, values["measurements"])))
    except (FileNotFoundError, NotADirectoryError):
        return Calibration()
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).removeprefix(f"{path}: ").removeprefix(f"{path} ")
        return Calibration(warning=f"{path or 'file'} is ignored ({reason}); delete it to start a new one")


def record(measurement: Measurement, path: Path | None = None) -> str | None:
    """Add a measurement to the file; what is broken there is left as it is.

    Returns:
        Why the measurement was not kept, in a line; None where it was. Never raises: a run must not fail over it.
    """
    known = load(path)
    if known.warning:
        return known.warning
    try:
        path = path or calibration_path()
        Measurement.parse(asdict(measurement))
        kept = [asdict(each) for each in (*known.measurements, measurement)][-MOST_MEASUREMENTS:]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "version": VERSION, "measurements": kept}, indent=1)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        return f"of this run was not saved for later plans: {' '.join(str(error).split())}"
    return None


def installed_torch() -> str | None:
    """The version of the torch that would be imported, without importing it; None where there is none."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = [line.split("=")[1].strip().strip("'\"") for line in text.splitlines() if line.startswith("__version__ =")]
    return found[0] if found else None


def _has_group(backend: str) -> bool:
    """Whether its process has a process group, whose memory counts; a measurement may name a backend that is gone."""
    return backend not in BACKENDS or not BACKENDS[backend].one_process


def _minor(version: str) -> tuple[str, ...]:
    """The part of torch's version that decides what its allocator and kernels are."""
    return tuple(version.split("+")[0].split(".")[:2])
