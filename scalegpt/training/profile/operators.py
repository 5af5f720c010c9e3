"""Adds up the operators of a profile, and compares them with the parts of a step whose time the planner predicts.

The names of an operator and of the operators that called it decide to which part it belongs: a matmul inside the loss
belongs to the loss. If no name decides, it is elementwise work: a norm, an activation, a residual sum or a copy. On a
card the time is that of the kernels, else that of the processor. The time of an operator does not include the operators
that it calls.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scalegpt.architecture.operations import ATTENTION, ELEMENTWISE, MATMULS
from scalegpt.planner.time.step_time import COMMUNICATION, HOST, LAUNCHES
from scalegpt.planner.time.work import LOSS, OPTIMIZER, RECOMPUTE, WEIGHTS
from scalegpt.units import human_count

MOST_OPERATORS = 10

_AROUND = {
    OPTIMIZER: r"optimizer|adamw?\b|_adam|lion|muon|clip_grad|_foreach_norm",
    LOSS: r"cross_?entropy|nll_loss|log_softmax|logsumexp",
    ATTENTION: r"attention|_flash|fmha|sdpa|softmax",
    COMMUNICATION: r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|backward_reduce|broadcast_",
}
"""Part → a pattern for the names of its operators, or of operators that call them.

The first part that matches counts.
"""

_MATMUL = r"::(add|b|badd)?mm\b|::(add|ba?dd)?bmm\b|::linear\b|::matmul\b|gemm|mkldnn_linear"

_PREDICTED = {
    MATMULS: (MATMULS, RECOMPUTE),
    ATTENTION: (ATTENTION,),
    LOSS: (LOSS,),
    ELEMENTWISE: (ELEMENTWISE, WEIGHTS),
    OPTIMIZER: (OPTIMIZER,),
    COMMUNICATION: (COMMUNICATION, HOST),
}
"""Part of the profile → the parts of the plan that it corresponds to."""

_NAMES = {
    MATMULS: "matmuls, recompute",
    ELEMENTWISE: "norms and other elementwise",
    COMMUNICATION: "communication, offload",
}
"""Part → its name in the printed table, if that differs."""


@dataclass
class Operator:
    """An operator in one part of a step, with its calls and seconds in all recorded steps."""

    name: str
    part: str
    calls: int = 0
    seconds: float = 0.0


def operators(events: Iterable[Any], *, on_card: bool) -> list[Operator]:
    """The operators of a profile, those with the most time first.

    Args:
        events: ``torch.profiler.profile.events()``.
        on_card: whether to count the time of kernels on the card, instead of the processor's.
    """
    found: dict[tuple[str, str], Operator] = {}
    parts: dict[int, str | None] = {}
    for event in events:
        if on_card and event.device_type.name != "CPU":  # a kernel, whose time its operator has too
            continue
        seconds = (event.self_device_time_total if on_card else event.self_cpu_time_total) / 1e6
        if seconds <= 0:
            continue
        part = _around(event, parts) or (MATMULS if re.search(_MATMUL, event.name) else ELEMENTWISE)
        operator = found.setdefault((event.name, part), Operator(event.name, part))
        operator.calls += 1
        operator.seconds += seconds
    return sorted(found.values(), key=lambda each: -each.seconds)


def _around(event: Any, parts: dict[int, str | None]) -> str | None:
    """The part of a step to which an event belongs, by its name and those of its callers.

    ``parts`` caches the results.
    """
    if event.id not in parts:
        own = next((part for part, pattern in _AROUND.items() if re.search(pattern, event.name, re.IGNORECASE)), None)
        outer = None if event.cpu_parent is None else _around(event.cpu_parent, parts)
        parts[event.id] = own if own == COMMUNICATION else outer or own  # a collective may start inside of the loss
    return parts[event.id]


def table(found: list[Operator], steps: int, seconds: float, predicted: Mapping[str, float] | None) -> str:
    """A table of the operators that take the most time, and of measured and predicted parts, in milliseconds per step.

    Args:
        found: the operators of all recorded steps.
        steps: number of recorded steps.
        seconds: duration of one recorded step.
        predicted: the planner's part → its seconds in a step; None: the planner knows no times for this device.
    """
    whole = sum(each.seconds for each in found) / steps or 1.0
    lines = [f"{'operator':<44} {'calls':>7} {'ms a step':>10} {'share':>6}  part"]
    for each in found[:MOST_OPERATORS]:
        took = each.seconds / steps
        name = each.name if len(each.name) <= 44 else f"{each.name[:43]}…"
        calls = human_count(each.calls / steps)
        lines.append(
            f"{name:<44} {calls:>7} {1000 * took:>10.3f} {took / whole:>6.1%}  {_NAMES.get(each.part, each.part)}"
        )
    lines += ["", f"{'part of a step':<44} {'measured ms':>18} {'predicted ms':>14}"]
    for part, planned in _PREDICTED.items():
        took = sum(each.seconds for each in found if each.part == part) / steps
        expected = None if predicted is None else sum(predicted.get(each, 0.0) for each in planned)
        if took or expected:
            lines.append(_row(_NAMES.get(part, part), took, expected))
    lines.append(_row("waiting, and time outside of operators", max(0.0, seconds - whole), _get(predicted, LAUNCHES)))
    lines.append(_row("whole step, with the recorder", seconds, None if predicted is None else sum(predicted.values())))
    if predicted is None:
        lines.append("the planner predicts no times, since it has no rates of this device")
    return "\n".join(lines)


def _get(predicted: Mapping[str, float] | None, part: str) -> float | None:
    return None if predicted is None else predicted.get(part, 0.0)


def _row(name: str, measured: float, predicted: float | None) -> str:
    expected = "-" if predicted is None else f"{1000 * predicted:.3f}"
    return f"{name:<44} {1000 * measured:>18.3f} {expected:>14}"
