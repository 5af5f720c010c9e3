"""``scalegpt gpus``: the list, one card with its sources, and what is refused; and the machine in ``scalegpt plan``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvml_fake import Fake, Gpu, a100
from scalegpt.cli.main import main
from scalegpt.hardware.gpus import catalogue

GIB = 2**30


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command; its standard output."""

    def run(words: str, status: int = 0) -> str:
        capsys.readouterr()
        assert main(words.split()) == status
        return capsys.readouterr().out

    return run


def test_the_table_has_every_card_and_marks_estimates(printed: Any) -> None:
    text = printed("gpus")
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert {card.name for card in catalogue()} <= set(rows)
    for card in catalogue():
        assert ("~" in rows[card.name]) == bool(set(card.estimated) - {"host_gbps"})
        assert f"{card.gbps:g}" in rows[card.name]
    assert "nvlink, pairs" in rows["RTX 3090"]
    assert max(map(len, text.splitlines())) <= 120
    assert "is read too" not in text


def test_the_json_has_every_source(printed: Any) -> None:
    found = json.loads(printed("gpus --json"))
    assert [each["name"] for each in found] == [card.name for card in catalogue()]
    for each in found:
        assert {"gib", "tflops", "gbps", "host_gbps", "link_gbps", "peer"} == set(each["sources"])
        assert each["estimated"] == [key for key, source in each["sources"].items() if source.startswith("~")]
    (one,) = [each for each in found if each["name"] == "A100 40GB"]
    assert (one["usable_bytes"], one["gbps"], one["link"]) == (int(39.5 * GIB), 1555, "nvlink")
    assert json.loads(printed("gpus a100-40gb --json")) == one


def test_one_card_with_its_names_and_sources(printed: Any) -> None:
    text = printed("gpus v100-16gb")
    assert "V100 16GB SXM" in text
    assert "also called" in text
    assert "fp16 only, no flash attention" in text
    assert "estimated: 16 GiB less about 0.2 GiB" in text
    assert "estimated: estimated" not in printed("gpus t1000-4gb") + text
    assert "note: gpu 'h100' was taken as H100 SXM; name H100 PCIe" in printed("gpus h100")
    assert "V100 data sheet" in text
    assert "nvlink for 2 cards, else pcie" in printed("gpus 3090")


def test_a_user_file_is_listed(printed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- {name: Mine, capability: 8.6, gib: 11.5, tflops: 20, gbps: 300, host_gbps: 32}\n")
    monkeypatch.setenv("SCALEGPT_GPUS", str(path))
    assert f"Your own file is read too: {path}." in printed("gpus")
    assert f"{path}:1" in printed("gpus mine")
    assert '"name": "Mine"' in printed("plan --preset tiny --backend plain --gpu mine --json")


def test_the_example_in_the_help_is_a_valid_file(printed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        main(["gpus", "--help"])
    from scalegpt.cli.gpus import EXAMPLE

    path = tmp_path / "example.yaml"
    path.write_text(EXAMPLE[EXAMPLE.index("  - name") :])
    monkeypatch.setenv("SCALEGPT_GPUS", str(path))
    assert "nvidia-smi on my machine" in printed("gpus 5090d")
    assert json.loads(printed("gpus 4090 --json"))["peer"] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gpus rtx4091", "did you mean RTX 4090, RTX 4090 D?"), ("gpus a100", "could be A100 40GB, A100 80GB"),
        ("gpus 4090 3090", "unexpected argument"), ("gpus --jsno", "did you mean --json"),
        ("plan --preset tiny --gpu rtx4091", "did you mean RTX 4090, RTX 4090 D?"),
        ("plan --preset tinny --gpu 4090", "did you mean tiny"), ("plan --network_gbps 0", "network_gbps must be"),
        ("plan --preset tiny --gpu cpu --memory_gb 1e6", "ranks on the cpu has"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("words", ["gpus", "gpus 4090", "plan --preset tiny --gpu 4090"])
def test_a_broken_user_file_is_one_line_with_its_place(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("- name: RTX 4090\n  gbps: 1000\n- name: T4\n  gbps: fast\n")
    monkeypatch.setenv("SCALEGPT_GPUS", str(path))
    assert main(words.split()) == 2
    assert f"error: {path}:4: gbps must be a number" in capsys.readouterr().err


# --- the machine at hand, in a plan ----------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Put cards behind NVML."""
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)

    def put(gpus: list[Gpu], **others: Any) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", Fake(gpus, **others))

    return put


def test_a_plan_uses_the_detected_gpus(machine: Any, printed: Any) -> None:
    machine([a100(0), a100(1)], nvlink="all")
    found = json.loads(printed("plan --preset tiny --backend fsdp --json"))
    assert found["gpu"].pop("host_bytes") > 0
    assert found["gpu"].pop("host_source") == "found"
    assert found["gpu"] == {
        "name": "NVIDIA A100-SXM4-40GB", "usable_bytes": (40960 - 512) * 2**20, "count": 2, "nodes": 1,
        "network_gbps": None, "network_kind": None,
    }  # fmt: skip
    assert found["notes"] == []
    assert "planned for 8 GPUs, but this machine has 2" in printed("plan --preset tiny --backend fsdp --gpus 8")


def test_a_plan_notes_memory_in_use_and_mixed_cards(machine: Any, printed: Any) -> None:
    machine([Gpu(), Gpu(name="NVIDIA GeForce RTX 3080", total_mib=10240, held=9 * GIB)])
    text = printed("plan --preset 150M_1024 --backend fsdp", status=3)
    assert "note: other processes hold 9.00 GiB of GPU 1; planned for the " in text
    assert (
        "note: the GPUs differ (NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 3080); planned for the smallest, GPU 1"
        in text
    )
    assert "does not fit" in text


def test_a_plan_for_an_unknown_old_card_is_in_fp16(machine: Any, printed: Any) -> None:
    machine([Gpu(name="NVIDIA TITAN V", capability=(7, 0), total_mib=12288)])
    text = printed("plan --preset tiny --backend plain")
    assert "1 × NVIDIA TITAN V, plain, fp16" in text
    assert "NVIDIA TITAN V is not in the catalogue" in text


def test_a_plan_for_the_processor(machine: Any, printed: Any) -> None:
    machine([a100(0)])
    text = printed("plan --preset tiny --backend plain --gpu cpu")
    assert "1 × cpu, " in text
    assert "plain, fp32" in text
    assert "CUDA context" not in text
