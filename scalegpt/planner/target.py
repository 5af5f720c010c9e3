"""The target of plans: a machine, the share of its memory to leave free, and measurements of earlier runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from scalegpt.config.machine import CPU, MachineConfig
from scalegpt.errors import InputError
from scalegpt.hardware.machine import Machine, read_counts
from scalegpt.planner.search.question import MARGIN
from scalegpt.planner.time import calibration
from scalegpt.planner.time.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class Target:
    """The target for which plans are made.

    Attributes:
        machine: the machine: its cards and its host.
        calibration: measurements of earlier runs, which correct the overheads (memory outside the step's tensors).
        margin: share of a card's memory to leave free.
    """

    machine: Machine
    calibration: Calibration = field(default_factory=Calibration)
    margin: float = MARGIN

    @classmethod
    def of(
        cls, values: Mapping[str, Any], where: str, *, calibrated: bool = True, or_processor: bool = False
    ) -> "Target":
        """The target that settings describe; if they name neither a card nor a memory size, this machine's GPUs.

        Args:
            values: settings of :class:`~scalegpt.config.machine.MachineConfig`, by name.
            where: the name of the settings' source in error messages.
            calibrated: whether to read the measurements of earlier runs.
            or_processor: whether to plan for this machine's CPU if no GPU is found. If false, the memory is then
                unknown.

        Raises:
            InputError: a card is unknown, counts contradict each other, or several cards or machines have no GPU.
        """
        settings, remarks = read_counts(MachineConfig.from_mapping(dict(values), where), values)
        measured = calibration.load() if calibrated else Calibration()
        torch = calibration.installed_torch() if measured.measurements else None
        machine = _machine(settings, torch)
        if or_processor and machine.usable_bytes is None:
            machine = _processor(settings)
        machine = replace(machine, notes=(*remarks, *machine.notes))
        return cls(machine=machine, calibration=measured, margin=settings.margin)


def _machine(settings: MachineConfig, torch: str | None) -> Machine:
    """The machine that the settings describe, or this machine. Its CPU is used only if ``gpu`` asks for it."""
    if not settings.at_hand:
        return Machine.of(settings, torch=torch)
    from scalegpt.hardware import detect  # imported here: if a card is named, the machine at hand is not examined

    if settings.gpu == CPU:
        torch = calibration.installed_torch()  # the processor's rates were measured with it
    machine = detect.planned_machine(settings, torch=torch)
    if machine.is_gpu or settings.gpu is not None:
        return machine
    return replace(Machine.of(settings, torch=torch), notes=machine.notes)


def _processor(settings: MachineConfig) -> Machine:
    """This machine's CPU as a machine for which to plan.

    Raises:
        InputError: the settings ask for a number of GPUs or for several machines.
    """
    if settings.gpus is not None or settings.nodes > 1:
        raise InputError(
            "this machine has no GPU and none is named; give --gpu NAME, --memory_gb N, or --preset NAME for every GPU"
        )
    machine = _machine(settings.changed(gpu=CPU), None)
    remark = (
        "no GPU was found, so the plan is for the processor; --gpu NAME plans for a GPU, --preset NAME shows every GPU"
    )
    return replace(machine, notes=(remark, *machine.notes))
