"""Checks of a run on several machines: the network between them, and the folder of its checkpoints, which all must share."""

import secrets
from pathlib import Path

from scalegpt.backends import World
from scalegpt.backends.machines import all_reduce_rate, check_machines
from scalegpt.errors import InputError
from scalegpt.hardware.networks import read_network
from scalegpt.storage import temporary_name
from scalegpt.training.resilience.heartbeat import is_seen
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.files import writing

LEAST_SHARE = 0.25
"""The least share of the stated network that an all-reduce must reach. TCP and congestion cost less than this."""


def machine_lines(world: World, network: str | None, *, allow_slow: bool) -> tuple[str, ...]:
    """Measure the network between the machines of a job; all ranks must call it together.

    Args:
        world: the ranks.
        network: the network of each machine, in a form of :mod:`scalegpt.hardware.networks`; None: not stated.
        allow_slow: whether to accept a network that is much slower than stated.

    Returns:
        The lines to print: warnings about the machines, and the measured network. Empty on one machine.

    Raises:
        InputError: the network reaches less than :data:`LEAST_SHARE` of what is stated.
    """
    if len(world.machines) < 2:
        return ()
    warnings = tuple(f"warning: {each}" for each in check_machines(world.machines))
    reached = all_reduce_rate(world.device)
    measured = f"network  {reached / 1e9:.3g} GB/s reached by an all-reduce over {len(world.machines)} machines"
    if network is None:
        return (*warnings, measured)
    stated = (read_network(network).gbps or 0.0) * 1e9 / 8
    line = f"{measured}, {reached / stated:.0%} of the {stated / 1e9:.3g} GB/s stated"
    if reached >= LEAST_SHARE * stated:
        return (*warnings, line)
    problem = f"{line[len('network  ') :]}: {_interface_advice(world)}"
    if allow_slow:
        return (*warnings, f"warning: {problem}")
    raise InputError(f"{problem}; --allow_slow_network trains all the same")


def _interface_advice(world: World) -> str:
    """What carries the collectives, and the variable that chooses it."""
    if world.device.type == "cuda":
        return (
            "NCCL may use a slow interface; name the fast one in NCCL_SOCKET_IFNAME (or its card in NCCL_IB_HCA); "
            "NCCL_DEBUG=INFO shows the choice"
        )
    used = ", ".join(dict.fromkeys(machine.interface or "an unknown interface" for machine in world.machines))
    return f"gloo uses {used}; name the fast interface in GLOO_SOCKET_IFNAME"


def check_shared(directory: RunDirectory, world: World) -> None:
    """Check that all machines see the folder of the checkpoints, unless it is at an address; all ranks must call it together.

    Raises:
        InputError: a machine does not see it.
        RunError: the folder cannot be written.
    """
    checkpoints = directory.checkpoints
    if len(world.machines) < 2 or not isinstance(checkpoints, Path):
        return
    folder = checkpoints if directory.is_kept_elsewhere() else directory.path
    sign = world.on_first(lambda: _make_sign(folder))
    seen = world.gather(world.local_rank > 0 or is_seen(sign))
    world.on_first(lambda: sign.unlink(missing_ok=True))
    blind = [machine.name for machine in world.machines if not seen[machine.first]]
    if blind:
        flag = "checkpoint_dir" if directory.is_kept_elsewhere() else "runs_dir"
        raise InputError(
            f"{folder.absolute()} of {world.machines[0].name} is not there on {blind[0]}: all machines need the same "
            f"folder, on a shared disk; give it as --{flag}, or give an address such as s3://BUCKET/FOLDER as "
            "--checkpoint_dir"
        )


def _make_sign(folder: Path) -> Path:
    sign = temporary_name(
        folder / f"here-{secrets.token_hex(8)}"
    )  # the next start removes it, should this one be killed
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sign.touch()
    return sign
