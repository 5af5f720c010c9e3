"""Measurements of the memory that real runs took, in a small file in the user's cache; they correct later plans.

The trainer adds a measurement at the end of every run on a GPU. Plans for the same card, torch, driver and number of
ranks take their *overheads* from these measurements: the memory outside the step's tensors, that is, fragmentation,
CUDA context and NCCL. The peak of the tensors is computed and never corrected: if a run measures another peak, the
planner has an error.

The file is ``$SCALEGPT_CACHE/calibration.json``, else ``~/.cache/scalegpt/calibration.json``. It may be deleted at any
time. If two runs end at the same moment, one measurement may be lost, but the file stays valid.
"""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scalegpt.config import RunConfig
from scalegpt.config.backends import BACKENDS
from scalegpt.hardware.gpus import Card, known_card
from scalegpt.hardware.processor import cache_folder
from scalegpt.planner.memory.overheads import Overheads
from scalegpt.structured import read_object
from scalegpt.text import shown

FORMAT, VERSION = "scalegpt-calibration", 1

MOST_MEASUREMENTS = 200
"""The largest number of measurements in the file; the oldest ones are dropped."""

NEWEST = 8
"""At most this many matching measurements correct a plan. They are the newest, since older ones may be outdated."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The memory of rank 0 in one run on a GPU.

    Attributes:
        card: the driver's name for the card.
        driver: version of the driver.
        torch: version of torch.
        predicted_peak_bytes: the peak of the allocated bytes as the planner predicted it.
        allocated_bytes: the measured peak of the allocated bytes, ``max_memory_allocated``.
        reserved_bytes: the measured peak of the reserved bytes, ``max_memory_reserved``.
        driver_bytes: bytes that the driver counted for the process at the end of the run.
        date: date and time of the measurement, ISO 8601, UTC.
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
            ValueError: a value is missing, has another type, or is impossible.
        """
        if not isinstance(values, dict):
            raise ValueError("a measurement must be an object")
        known = {field.name: field.type for field in fields(cls)}
        for name, kind in known.items():
            if type(values.get(name)) is not kind:
                raise ValueError(f"{name} must be of type {kind}, not {shown(values.get(name))}")
        made = cls(**{name: values[name] for name in known})
        if not 0 < made.allocated_bytes <= made.reserved_bytes <= made.driver_bytes < 2**50 or made.ranks < 1:
            raise ValueError(
                "a measurement needs 0 < allocated_bytes <= reserved_bytes <= driver_bytes, and ranks >= 1"
            )
        return made

    @property
    def waste(self) -> float:
        """Bytes that the allocator reserved but did not allocate, as a share of the allocated bytes."""
        return (self.reserved_bytes - self.allocated_bytes) / self.allocated_bytes

    @property
    def outside(self) -> int:
        """Bytes outside the allocator: the driver's count for the process, less what the allocator reserved."""
        return self.driver_bytes - self.reserved_bytes


@dataclass(frozen=True)
class Calibration:
    """The measurements that were read from the file.

    Attributes:
        measurements: the measurements, oldest first.
        warning: why the file, which exists, cannot be used; None if it can, or if there is none.
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
        """Overheads (memory outside the step's tensors) corrected by the measurements of similar runs.

        Similar runs have the same card, number of ranks, torch (major.minor) and driver. The largest values of the
        newest of them count.

        Args:
            overheads: the overheads from the planner's tables.
            run: the run that is planned.
            card: the card of the plan; None: it is not in the catalogue, and nothing is corrected.
            ranks: data-parallel ranks W.
            torch: version of torch that will run; None: not known, and nothing is corrected.
            driver: version of the driver; None (on a machine without a GPU): runs with any driver count.
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
    """The path of the file with the measurements.

    Raises:
        InputError: there is no home folder.
    """
    return cache_folder() / "calibration.json"


def load(path: Path | None = None) -> Calibration:
    """Read the measurements from the file. A broken file gives no measurements, but a warning. Never raises."""
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
    """Add a measurement to the file; a broken file is left unchanged.

    It never raises, since a run must not fail because its measurement cannot be saved.

    Returns:
        One line that says why the measurement was not saved; None if it was saved.
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
    """The version of the installed torch, found without importing torch; None if torch is not installed."""
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
    """Whether the backend makes a process group, which takes memory. True for names of former backends."""
    return backend not in BACKENDS or not BACKENDS[backend].one_process


def _minor(version: str) -> tuple[str, ...]:
    """The pair (major, minor) of a torch version. Runs with the same pair are comparable, whatever the patch level."""
    return tuple(version.split("+")[0].split(".")[:2])
