"""A profile of some steps by ``torch.profiler``, as a short table: which kernels take the time, and how long none runs."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.suite.children import Values

KERNELS = 25
"""So many are told one by one."""

NAME_LENGTH = 160
"""Names of C++ templates have no end."""


@dataclass(frozen=True)
class Span:
    """A kernel or a copy at work: its name, and from when to when, in microseconds."""

    name: str
    start: float
    end: float


def profiled(take: Callable[[], object], steps: int, device: torch.device, trace: str | None) -> Values:
    """Profile some steps.

    Args:
        take: takes one; everything has been warmed up.
        steps: how many.
        device: where; on the CPU its operators stand for kernels.
        trace: a file for the whole trace, in Chrome's format; None: none.

    Returns:
        What :func:`summary` says.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            take()
        if on_cuda:
            torch.cuda.synchronize(device)
    if trace is not None:
        Path(trace).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(trace)
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    events = profiler.events() or []
    # An annotation on the card spans the kernels below it, and an operator on the CPU those that it calls.
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == wanted and not event.is_user_annotation and event.cpu_parent is None
    ]
    return summary(spans, steps)


def summary(spans: Iterable[Span], steps: int) -> Values:
    """The kernels by time, and the share of the time from the first to the last in which none ran.

    Kernels of several streams may run at once: then their times add up to more than the time in which any ran.
    """
    spans = list(spans)
    if not spans:
        raise RuntimeError("the profiler has seen no kernel")
    times: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        times[span.name].append(span.end - span.start)
    whole = sum(map(sum, times.values()))
    window = max(span.end for span in spans) - min(span.start for span in spans)
    first = sorted(times, key=lambda name: -sum(times[name]))[:KERNELS]
    shown = [
        {
            "name": name[:NAME_LENGTH],
            "seconds_of_step": sum(times[name]) / steps / 1e6,
            "share": sum(times[name]) / whole,
            "calls_of_step": len(times[name]) / steps,
        }
        for name in first
    ]
    return {
        "steps": steps,
        "step_seconds": window / steps / 1e6,
        "idle_share": 1 - busy(spans) / window,
        "kernels_of_step": len(spans) / steps,
        "kinds_of_kernels": len(times),
        "kernels": shown,
    }


def busy(spans: Iterable[Span]) -> float:
    """Microseconds in which at least one of the spans runs."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total
