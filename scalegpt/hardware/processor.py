"""The rates of this machine's processor in training. They are measured once and stored in the user's cache. No torch.

:mod:`scalegpt.speed` measures them. ``scalegpt plan`` and the trainer read them here, so both choose the same precision
and predict the same time. A measurement is valid for one model of processor, one number of threads and one version of
torch.

The file is ``$SCALEGPT_PROCESSORS``, else ``processors.json`` in :func:`cache_folder`. It may be deleted at any time.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

from scalegpt.errors import InputError
from scalegpt.storage import user_path, write_atomic
from scalegpt.structured import read_object
from scalegpt.system.cores import usable_cores
from scalegpt.text import shown

FORMAT, VERSION = "scalegpt-processors", 1

MEASURED = ("fp32", "bf16")
"""The compute dtypes whose rates are measured."""

_remembered: "dict[Processor, Measured]" = {}
"""The measurements of this process. They are used even if the file cannot be written."""


@dataclass(frozen=True)
class Processor:
    """The processor, threads and torch for which a measurement is valid.

    Attributes:
        model: the processor's name, with family, model and stepping if the kernel reports them.
        threads: the number of threads of a process that trains alone on the machine.
        torch: version of torch.
    """

    model: str
    threads: int
    torch: str

    @classmethod
    def here(cls, torch: str) -> "Processor":
        """This machine's processor, together with a version of torch."""
        return cls(_model(), threads_alone(), torch)


@dataclass(frozen=True, kw_only=True)
class ProcessorRates:
    """The rates of a processor in one compute dtype, for all threads together.

    Attributes:
        matmul: FLOP/s in deep matmuls.
        fill: elements that are added to the depth of every matmul; see :data:`scalegpt.planner.time.rates.FILL`.
        attention: FLOP/s in attention kernels.
        memory: bytes/s in kernels of blocks that only move data.
        loss: bytes/s in the passes over logits.
        update: bytes/s in the optimizer update.
        kernel: seconds that Python, the dispatcher and autograd need to start a kernel.
    """

    matmul: float
    fill: float
    attention: float
    memory: float
    loss: float
    update: float
    kernel: float

    @classmethod
    def parse(cls, values: Any) -> "ProcessorRates":
        """Rates from parsed JSON.

        Raises:
            ValueError: a value is missing, or is not a positive number (``fill`` may be 0).
        """
        if not isinstance(values, dict):
            raise ValueError("rates must be an object")
        read = {}
        for name in (field.name for field in fields(cls)):
            value = values.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
                raise ValueError(f"{name} must be a number, not {shown(value)}")
            if value < 0 or (value == 0 and name != "fill"):
                raise ValueError(f"{name} must be positive, not {value}")
            read[name] = float(value)
        return cls(**read)


@dataclass(frozen=True)
class Measured:
    """The measured rates of a processor.

    Attributes:
        fp32: its rates in fp32.
        bf16: its rates in bf16.
        quiet: whether the machine was idle while it was measured; if not, the next run measures again.
    """

    fp32: ProcessorRates
    bf16: ProcessorRates
    quiet: bool = True

    def rates(self, precision: str) -> ProcessorRates | None:
        """The rates in a compute dtype; None if they were not measured. fp16 never is."""
        return {"fp32": self.fp32, "bf16": self.bf16}.get(precision)

    @classmethod
    def parse(cls, values: Any) -> "Measured":
        """Measured rates from parsed JSON.

        Raises:
            ValueError: a value is missing or impossible.
        """
        if not isinstance(values, dict) or not isinstance(values.get("quiet"), bool):
            raise ValueError("measured rates must be an object with fp32, bf16 and quiet")
        fp32, bf16 = (ProcessorRates.parse(values.get(name)) for name in MEASURED)
        return cls(fp32, bf16, values["quiet"])


@dataclass(frozen=True)
class Kept:
    """The stored rates of a processor.

    Attributes:
        measured: its rates; None if they were not measured yet, or cannot be read.
        warning: why the file, which exists, cannot be used; None if it can, or if there is none.
    """

    measured: Measured | None = None
    warning: str | None = None


def cache_folder() -> Path:
    """The folder for measurements of this machine: ``$SCALEGPT_CACHE``, else ``scalegpt`` in the user's cache folder.

    Raises:
        InputError: there is no home folder.
    """
    return Path(user_path(os.environ.get("SCALEGPT_CACHE") or "~/.cache/scalegpt"))


def processors_path() -> Path:
    """The path of the file with the rates.

    Raises:
        InputError: there is no home folder.
    """
    chosen = os.environ.get("SCALEGPT_PROCESSORS")
    return Path(user_path(chosen)) if chosen else cache_folder() / "processors.json"


def kept(processor: Processor) -> Kept:
    """The stored rates of a processor. A damaged file gives a warning and no rates."""
    if processor in _remembered:
        return Kept(_remembered[processor])
    place = ""
    try:
        path = processors_path()
        place = f"{path}: "
        return Kept(_read(path).get(processor))
    except (FileNotFoundError, NotADirectoryError):
        return Kept()
    except (OSError, ValueError) as error:  # also an InputError, where there is no home folder
        reason = getattr(error, "strerror", None) or str(error)
        place = "" if reason.startswith(place.removesuffix(": ")) else place
        return Kept(warning=f"the stored rates of processors cannot be used ({place}{reason})")


def keep(processor: Processor, measured: Measured) -> str | None:
    """Store the rates of a processor for later plans and runs. A damaged file is replaced.

    Returns:
        Why the file could not be written; None if it was written. If not, only this process uses the rates.
    """
    _remembered[processor] = measured
    try:
        path = processors_path()
    except InputError as error:
        return str(error)
    try:
        known = _read(path)
    except (OSError, ValueError):
        known = {}
    entries = [{**asdict(one), "rates": asdict(rates)} for one, rates in {**known, processor: measured}.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"format": FORMAT, "version": VERSION, "processors": entries}, indent=1) + "\n")
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return None


def threads_alone() -> int:
    """The number of threads of a run in one process on this machine: the user's ``OMP_NUM_THREADS``, else all cores.

    Under torchrun that variable is ignored, since torchrun sets it itself.
    """
    given = "" if "TORCHELASTIC_RUN_ID" in os.environ else os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isascii() and given.isdecimal() and int(given) > 0 else usable_cores()


def _read(path: Path) -> Mapping[Processor, Measured]:
    values = read_object(path)
    if (values.get("format"), values.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"its format is not {FORMAT} {VERSION}")
    entries = values.get("processors")
    if not isinstance(entries, list):
        raise ValueError("it has no list of processors")
    return dict(map(_entry, entries))


def _entry(values: Any) -> tuple[Processor, Measured]:
    if not isinstance(values, dict):
        raise ValueError("a processor must be an object")
    model, threads, torch = values.get("model"), values.get("threads"), values.get("torch")
    if not (isinstance(model, str) and type(threads) is int and isinstance(torch, str)):
        raise ValueError("a processor must have model, threads and torch")
    return Processor(model, threads, torch), Measured.parse(values.get("rates"))


@lru_cache(maxsize=1)
def _model() -> str:
    """The processor's name, with family, model and stepping, since virtual machines often hide the name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in text.splitlines())
    known = {key.strip(): value.strip() for key, _, value in pairs}
    name = known.get("model name") or known.get("Processor") or known.get("CPU part") or platform.machine()
    numbers = [f"{key} {known[key]}" for key in ("cpu family", "model", "stepping") if key in known]
    return f"{name} ({', '.join(numbers)})" if numbers else name
