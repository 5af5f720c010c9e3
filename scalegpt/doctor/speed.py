"""Checks the processor's speed. On a machine without GPUs the planner uses the rates measured here."""

from collections.abc import Iterator

from scalegpt.doctor.checks import OK, WARNING, Finding, Setting, check
from scalegpt.hardware.detect import find
from scalegpt.hardware.processor import Measured, Processor, kept


@check("processor")
def processor(setting: Setting) -> Iterator[Finding]:
    """Report the processor's rates, and measure them if none are stored. On a machine with GPUs nothing is reported."""
    if find().devices and not setting.measure:
        return
    import torch

    from scalegpt.speed.rates import measure_and_keep

    known = kept(Processor.here(torch.__version__))
    if known.measured is not None and not setting.measure:
        yield _finding(known.measured, "")
        return
    if known.warning:
        yield Finding(WARNING, known.warning, "nothing to do: they are measured again now")
    done = measure_and_keep()
    if done.problem:
        yield Finding(WARNING, done.line(), "make that folder writable, or name another with SCALEGPT_CACHE")
    yield _finding(done.measured, f"; measured in {done.seconds:.1f} s")


def _finding(measured: Measured, how: str) -> Finding:
    fp32, bf16 = measured.fp32.matmul / 1e9, measured.bf16.matmul / 1e9
    line = (
        f"matmuls {fp32:,.0f} GFLOP/s in fp32, {bf16:,.0f} in bf16; memory {measured.fp32.update / 1e9:.1f} GB/s{how}"
    )
    if measured.quiet:
        return Finding(OK, line)
    line += "; the machine was busy during the measurement"
    return Finding(WARNING, line, "run scalegpt doctor --measure when it is idle")
