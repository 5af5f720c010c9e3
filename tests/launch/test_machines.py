"""Launchers on two machines: network namespaces with a name and an address each, of which the own name means loopback."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import namespaces
from launch_flags import SHAPE, TEXT
from namespaces import Machines
from scalegpt.backends.ports import INTERFACE_VARIABLES

REASON = namespaces.why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.xdist_group("machines"),
]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TRAIN = str(ROOT / "launch" / "train.py")
FLAGS = [
    *SHAPE, "--input_file", "bottles.txt", "--max_iters", "20", "--micro_batch", "4", "--model_name", "run",
]  # fmt: skip
SECONDS = 240


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    (tmp_path / "bottles.txt").write_text(TEXT, encoding="utf-8")
    made = Machines(2, tmp_path)
    yield made
    made.close()


def environment(folder: Path, **more: str) -> dict[str, str]:
    ours = {"DS_ACCELERATOR": "cpu", "SCALEGPT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if name not in INTERFACE_VARIABLES}
    return {**inherited, "PYTHONPATH": str(ROOT), **ours, **more}


def run_all(commands: list[list[str]], folders: list[Path], **more: str) -> list[subprocess.CompletedProcess[str]]:
    """Run commands at the same time, each in its folder, and return what they printed."""
    started = [
        subprocess.Popen(
            command, cwd=folder, env=environment(folder, **more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, folder in zip(commands, folders, strict=True)
    ]  # fmt: skip
    try:
        outputs = [each.communicate(timeout=SECONDS)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    return [
        subprocess.CompletedProcess(each.args, each.returncode, output, "")
        for each, output in zip(started, outputs, strict=True)
    ]


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines) if "loss" in entry}


def torchrun(machines: Machines, *flags: str) -> list[list[str]]:
    """On each machine: the documented command, with the first machine's name as the endpoint."""
    place = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{machines.names[0]}:29500"]
    options = ["--nnodes", "2", "--nproc_per_node", "1", *place]
    command = [sys.executable, "-m", "torch.distributed.run", *options, TRAIN, *FLAGS, "--backend", "fsdp", *flags]
    return [machines.on(name, command) for name in machines.names]


def two_here(folder: Path, *layout: str) -> dict[int, float]:
    """The losses of two ranks on one machine."""
    (folder / "bottles.txt").write_text(TEXT, encoding="utf-8")
    place = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_all([[sys.executable, *place, TRAIN, *FLAGS, *layout]], [folder])
    assert done[0].returncode == 0, done[0].stdout
    return losses(folder)


JOIN = """
import json, os, sys
from scalegpt.backends import World
world = World.join("cpu")
places = world.gather((os.environ["GLOO_SOCKET_IFNAME"], [str(machine) for machine in world.machines]))
from scalegpt.backends.machines import all_reduce_rate, silent
rate = all_reduce_rate(world.device)
print(json.dumps([places, rate > 0, [str(each) for each in silent(world.machines, world.rank)]]), flush=True)
world.barrier()
os._exit(0)
"""


def test_ranks_of_two_machines_meet_although_their_names_mean_loopback(machines: Machines, tmp_path: Path) -> None:
    """By itself gloo would listen at the address of the own name, 127.0.1.1, which the other machine cannot reach."""
    commands = []
    for rank, name in enumerate(machines.names):
        places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        values = {**places, "MASTER_ADDR": machines.addresses[0], "MASTER_PORT": 29500}
        words = [f"{key}={value}" for key, value in values.items()]
        commands.append(machines.on(name, ["env", *words, sys.executable, "-c", JOIN]))
    done = run_all(commands, [tmp_path, tmp_path])
    expected = [["eth0", ["alpha (10.77.0.1, rank 0)", "beta (10.77.0.2, rank 1)"]]] * 2
    for each in done:
        assert each.returncode == 0, each.stdout
        assert json.loads(each.stdout.splitlines()[-1]) == [expected, True, []]


@pytest.mark.faults
def test_torchrun_trains_on_two_machines_as_on_one(machines: Machines, tmp_path: Path) -> None:
    done = run_all(torchrun(machines, "--network", "1Mb/s"), [tmp_path, tmp_path])
    assert [each.returncode for each in done] == [0, 0], done
    assert "reached by an all-reduce over 2 machines" in done[0].stdout + done[1].stdout
    (tmp_path / "one").mkdir()
    assert losses(tmp_path) == two_here(tmp_path / "one", "--backend", "fsdp")


HOSTFILE = "hostfile"


@pytest.mark.faults
@pytest.mark.parametrize("way", ["pdsh", "no_ssh"])
def test_deepspeed_trains_on_two_machines_as_on_one(machines: Machines, tmp_path: Path, way: str) -> None:
    """``ssh`` is a stand-in: a script that runs the command on the machine of that name, without a server."""
    names = machines.names if way == "pdsh" else machines.addresses
    (tmp_path / HOSTFILE).write_text("".join(f"{name} slots=1\n" for name in names))
    layout = ["--backend", "deepspeed", "--zero_stage", "2"]
    command = [str(BIN / "deepspeed"), "--hostfile", HOSTFILE]
    path = os.environ["PATH"]
    if way == "pdsh":
        if shutil.which("pdsh") is None:
            pytest.skip("deepspeed starts ranks on other machines with pdsh, which is not here")
        path = f"{stand_in_for_ssh(machines, tmp_path)}:{path}"
        commands = [machines.on(machines.names[0], [*command, TRAIN, *FLAGS, *layout])]
    else:
        options = [["--no_ssh", "--node_rank", str(rank), "--master_addr", machines.addresses[0]] for rank in (0, 1)]
        commands = [
            machines.on(name, [*command, *option, TRAIN, *FLAGS, *layout])
            for name, option in zip(machines.names, options, strict=True)
        ]
    done = run_all(commands, [tmp_path] * len(commands), PATH=path)
    assert all(each.returncode == 0 for each in done), done
    (tmp_path / "one").mkdir()
    assert losses(tmp_path) == two_here(tmp_path / "one", *layout)


def stand_in_for_ssh(machines: Machines, folder: Path) -> Path:
    """A folder with a program ``ssh [OPTION …] HOST COMMAND`` that runs the command on a machine."""
    cases = [f'{name}) exec {shlex.join(machines.on(name, ["sh", "-c"]))} "$*";;' for name in machines.names]
    options = 'while :; do case "$1" in -o|-l|-p) shift 2;; -*) shift;; *) break;; esac; done'
    script = folder / "bin" / "ssh"
    script.parent.mkdir()
    script.write_text("\n".join(["#!/bin/sh", options, "host=$1; shift", 'case "$host" in', *cases, "esac", ""]))
    script.chmod(0o755)
    return script.parent


def own_folders(machines: Machines, parent: Path) -> list[Path]:
    """A folder with the text for each machine, as on disks of their own."""
    folders = [parent / name for name in machines.names]
    for folder in folders:
        folder.mkdir()
        (folder / "bottles.txt").write_text(TEXT, encoding="utf-8")
    return folders


@pytest.mark.faults
def test_machines_without_a_common_folder_are_refused(machines: Machines, tmp_path: Path) -> None:
    folders = own_folders(machines, tmp_path)
    done = run_all(torchrun(machines), folders)
    for each, name in zip(done, machines.names, strict=True):
        assert each.returncode != 0
        assert "runs/run of alpha is not there on beta: all machines need the same folder" in each.stdout, name


@pytest.mark.faults
def test_machines_that_share_only_the_checkpoints_train_and_resume_as_one(machines: Machines, tmp_path: Path) -> None:
    """Each machine has a disk of its own for the run's folder. For the second half they exchange their disks."""
    folders = own_folders(machines, tmp_path)
    flags = ["--schedule", "constant", "--checkpoint_dir", str(tmp_path / "store")]
    for steps, places in (("10", folders), ("20", folders[::-1])):
        done = run_all(torchrun(machines, *flags, "--max_iters", steps), places)
        assert [each.returncode for each in done] == [0, 0], done
    (tmp_path / "one").mkdir()
    expected = two_here(tmp_path / "one", "--backend", "fsdp", "--schedule", "constant")
    assert any(
        losses(folder) == expected for folder in folders if (folder / "runs" / "run" / "metrics.jsonl").is_file()
    )


@pytest.mark.faults
def test_other_sources_on_a_machine_are_refused(machines: Machines, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scalegpt", tmp_path / "other" / "scalegpt")
    shutil.copytree(ROOT / "launch", tmp_path / "other" / "launch")
    shutil.copytree(ROOT / "configs", tmp_path / "other" / "configs")
    with (tmp_path / "other" / "scalegpt" / "units.py").open("a") as file:
        file.write("# changed\n")
    first, second = torchrun(machines)
    second = [word.replace(str(ROOT), str(tmp_path / "other")) for word in second]
    done = run_all([first, second], [tmp_path, tmp_path])
    for each in done:
        assert each.returncode != 0
        assert "scalegpt differs between the machines: " in each.stdout
        assert "on alpha, " in each.stdout
        assert "on beta; install the same on all machines" in each.stdout


@pytest.mark.faults
def test_a_network_far_below_the_stated_one_is_refused(machines: Machines, tmp_path: Path) -> None:
    done = run_all(torchrun(machines, "--network", "8xinfiniband-800g"), [tmp_path, tmp_path])
    for each in done:
        assert each.returncode != 0
        assert "of the 800 GB/s stated: gloo uses eth0; name the fast interface in GLOO_SOCKET_IFNAME" in each.stdout
        assert "--allow_slow_network trains all the same" in each.stdout
    assert not (tmp_path / "runs").exists()


@pytest.mark.faults
def test_doctor_times_an_all_reduce_over_all_machines(machines: Machines, tmp_path: Path) -> None:
    commands = [[*command[: command.index(TRAIN)], "-m", "scalegpt", "doctor"] for command in torchrun(machines)]
    done = run_all(commands, [tmp_path, tmp_path])
    (report,) = [each.stdout for each in done if "loopback interface" in each.stdout]
    assert "2 ranks on 2 machines meet, and an all-reduce reaches" in report
