"""Rates of this processor for all tests, so that the first run of each need not measure it."""

import atexit
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from scalegpt.hardware.processor import FORMAT, VERSION, Measured, Processor, ProcessorRates
from scalegpt.planner.time.calibration import installed_torch

FP32 = ProcessorRates(matmul=1e11, fill=0.0, attention=4e10, memory=3e9, loss=9e9, update=15e9, kernel=4e-5)
BF16 = replace(FP32, matmul=2e10, attention=1e10)
MEASURED = Measured(FP32, BF16)


def write(path: Path, measured: Measured = MEASURED) -> None:
    """Write rates for every number of threads that a test may use."""
    here = Processor.here(installed_torch() or "")
    entries = [
        {**asdict(replace(here, threads=threads)), "rates": asdict(measured)} for threads in {1, 2, 3, 4, here.threads}
    ]
    path.write_text(json.dumps({"format": FORMAT, "version": VERSION, "processors": entries}), encoding="utf-8")


def shared_file() -> str:
    """The path of a file of rates that lasts as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="scalegpt-processors-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write(folder / "processors.json")
    return str(folder / "processors.json")
