"""``scalegpt checkpoint``: what is whole and what is damaged, what a checkpoint says, and its weights as one file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manifests import rewrite
from replaced import replaced_at
from scalegpt.checkpoint.store import set_aside
from scalegpt.cli.main import main
from scalegpt.training.runs.find import checkpoints_of

WEIGHTS = "rank_00000.weights.safetensors"


@pytest.fixture
def run(tiny_run: Any) -> Path:
    """A run with the checkpoints of steps 10, 20 and 30, of which 20 is the best."""
    folder: Path = tiny_run(steps=(10, 20, 30))
    for path, loss in zip(checkpoints_of(folder), (3.0, 2.0, 2.5), strict=True):
        rewrite(path, lambda document: document["progress"].update(val_loss=loss))  # noqa: B023
    return folder


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an action; return what it prints."""

    def call(*words: Any, status: int = 0) -> str:
        assert main(["checkpoint", *map(str, words)]) == status
        seen = capsys.readouterr()
        return seen.out + seen.err

    return call


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_list_has_a_line_for_each(run: Path, say: Callable[..., str]) -> None:
    damage(run / "checkpoints" / "step_00000020" / WEIGHTS)
    (run / "checkpoints" / "step_00000010" / "checkpoint.json").write_text("{}")
    heading, _, *lines = say("list", run).splitlines()
    assert heading.split() == ["checkpoint", "step", "size", "held-out", "loss", "state"]
    assert [line.split()[0] for line in lines] == ["step_00000010", "step_00000020", "step_00000030"]
    assert "checkpoint.json is damaged" in lines[0]
    assert "2.0000" in lines[1]
    assert f"  {WEIGHTS} is damaged" in lines[1]
    assert lines[2].endswith("2.5000  whole, the best")
    found = json.loads(say("list", run, "--json"))
    assert [entry["whole"] for entry in found] == [False, False, True]
    assert [entry["step"] for entry in found] == [None, 20, 30]
    assert [entry["best"] for entry in found] == [False, False, True]


def test_verify_accepts_whole_checkpoints(run: Path, say: Callable[..., str]) -> None:
    lines = say("verify", run).splitlines()
    assert len(lines) == 3
    assert all("is whole: 1 files" in line for line in lines)
    assert "step_00000010" in say("verify", run / "checkpoints" / "step_00000010")


def test_verify_names_damage_with_status_1(run: Path, say: Callable[..., str]) -> None:
    file = run / "checkpoints" / "step_00000020" / WEIGHTS
    damage(file)
    lines = say("verify", run, status=1).splitlines()
    assert lines[1] == f"{file} is damaged: its SHA-256 is not the one in checkpoint.json"
    assert sum("is whole" in line for line in lines) == 2
    assert len(say("verify", file.parent, status=1).splitlines()) == 1
    found = json.loads(say("verify", run, "--json", status=1))
    assert found[1]["problems"] == [lines[1]]


@pytest.mark.parametrize("moment", ["read_manifest", "os.scandir", "_check"])
@pytest.mark.parametrize("action", ["list", "verify"])
def test_checkpoints_deleted_by_training_are_skipped(
    run: Path, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch, action: str, moment: str
) -> None:
    replaced_at(moment, run, monkeypatch)
    found = json.loads(say(action, run, "--json"))
    assert [(entry["step"], entry["whole"]) for entry in found] == [(20, True)]


def test_list_starts_over_when_all_checkpoints_are_deleted(
    run: Path, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "checkpoints" / "step_00000020").rename(run / "kept")
    replaced_at("_check", run, monkeypatch)
    assert "step_00000030 is whole" in say("verify", run)


@pytest.mark.parametrize("action", ["list", "verify", "show"])
def test_a_named_checkpoint_that_is_deleted_is_an_error(
    run: Path, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    path = replaced_at("read_manifest", run, monkeypatch)
    assert f"error: {path} was deleted while it was being read; name another" in say(action, path, status=2)


@pytest.mark.parametrize("moment", ["read_manifest", "_check", "Checkpoint._slice"])
def test_show_and_convert_take_the_newest_when_theirs_is_deleted(
    run: Path, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    (run / "checkpoints" / "step_00000020").rename(run / "kept")
    replaced_at(moment, run, monkeypatch)
    words = ("show", run) if moment == "read_manifest" else ("convert", run, "--out", tmp_path / "out")
    assert json.loads(say(*words, "--json"))["checkpoint"].endswith("step_00000030")


def test_checkpoints_set_aside_are_listed_last(run: Path, say: Callable[..., str]) -> None:
    aside = set_aside(run / "checkpoints" / "step_00000020")
    lines = say("list", run).splitlines()
    assert len(lines) == 5
    assert (
        lines[-1] == f"set aside as damaged: {aside}; ScaleGPT does not read it: delete it when you no longer need it"
    )
    found = json.loads(say("list", run, "--json"))
    assert [(entry["step"], entry["whole"], entry["set_aside"]) for entry in found] == [
        (10, True, False),
        (30, True, False),
        (None, False, True),
    ]
    assert found[2]["checkpoint"] == str(aside)
    assert found[2].keys() == found[0].keys()
    assert say("list", run / "checkpoints") == say("list", run)
    assert len(say("list", run / "checkpoints" / "step_00000010").splitlines()) == 3


def test_small_sizes_are_not_shown_as_zero(run: Path, say: Callable[..., str], tmp_path: Path) -> None:
    for words in (("list", run), ("verify", run), ("show", run), ("convert", run, "--out", tmp_path / "out")):
        text = say(*words)
        assert " kB (" in text
        assert " GB" not in text


def test_config_and_status_files_are_not_needed(run: Path, say: Callable[..., str], tmp_path: Path) -> None:
    assert [path.name for path in run.iterdir()] == ["checkpoints"]
    for words in (("list", run), ("verify", run), ("show", run), ("convert", run, "--out", tmp_path / "out")):
        assert "step_00000030" in say(*words)


@pytest.mark.parametrize("action", ["list", "verify"])
def test_the_help_has_the_exit_status(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", action, "--help"])
    text = capsys.readouterr().out
    assert {"list": "The exit status is 0 even if some are damaged", "verify": "list then still exits with 0"}[
        action
    ] in text


def test_uncovered_tensors_are_damage(run: Path, say: Callable[..., str]) -> None:
    path = run / "checkpoints" / "step_00000030"
    rewrite(path, lambda document: document["tensors"]["weight/wte.weight"]["pieces"].clear())
    assert "weight/wte.weight ends at element 0 of" in say("verify", path, status=1)


def test_show_prints_the_manifest(run: Path, say: Callable[..., str]) -> None:
    text = say("show", run)
    assert "step_00000030" in text
    assert "n_layer 2" in text
    facts = json.loads(say("show", run / "checkpoints" / "step_00000010", "--json"))
    assert facts["progress"]["step"] == 10
    assert facts["tensors"] == {"weight": facts["pieces"]}
    assert facts["parameters"] == (257 + 16) * 32 + 2 * (12 * 32**2 + 2 * 32) + 32
    assert facts["files"].keys() == {WEIGHTS}


def test_an_earlier_checkpoint_is_offered_for_a_damaged_one(run: Path, say: Callable[..., str]) -> None:
    manifests = [path / "checkpoint.json" for path in checkpoints_of(run)]
    manifests[2].write_text("{}")
    assert say("show", run, status=2).endswith(f"; give an earlier checkpoint by its path: {manifests[1].parent}\n")
    manifests[0].write_text("{}")
    assert say("show", manifests[0].parent, status=2).endswith("; there is no earlier checkpoint\n")
    copied = manifests[2].parent.rename(manifests[2].parent.with_name("a copy"))  # a name without a step
    assert say("show", copied, status=2).endswith(f"; give another checkpoint by its path: {manifests[1].parent}\n")


def test_convert_writes_the_weights_as_one_file(
    run: Path, say: Callable[..., str], tiny_model: Any, tmp_path: Path
) -> None:
    expected = dict(tiny_model(seed=30, vocab_size=257).named_parameters())
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = tmp_path / f"{dtype}.safetensors"
        say("convert", run, "--out", out, "--dtype", dtype)
        found = load_file(out)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype == kind
            assert torch.equal(value, expected[name].to(kind))
    facts = json.loads(say("convert", run / "checkpoints" / "step_00000010", "--out", tmp_path / "x", "--json"))
    assert facts["bytes"] == (tmp_path / "x").stat().st_size
    assert [path.name for path in tmp_path.glob(".*.tmp")] == []


def test_convert_replaces_no_file_and_refuses_damage(run: Path, say: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert "exists already; choose another --out" in say("convert", run, "--out", tmp_path / "mine", status=2)
    assert (tmp_path / "mine").read_text() == "mine"
    damage(run / "checkpoints" / "step_00000030" / WEIGHTS)
    assert f"{WEIGHTS} is damaged" in say("convert", run, "--out", tmp_path / "new", status=2)
    assert not (tmp_path / "new").exists()
    older = run / "checkpoints" / "step_00000010"
    assert "cannot be written" in say("convert", older, "--out", older / WEIGHTS / "x", status=2)


@pytest.mark.parametrize("name", ["a.gguf", "a.GGUF", "model.bin", "model.pt", "model.onnx", "w.npz"])
def test_the_ending_of_another_format_is_refused(run: Path, say: Any, tmp_path: Path, name: str) -> None:
    line = say("convert", run, "--out", tmp_path / name, status=2)
    assert "--to safetensors writes safetensors, which converters for other formats read; use --out" in line
    assert f"{Path(name).stem}.safetensors" in line
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        ((), 2, "example:"),
        (("--help",), 0, "verify    read every byte"),
        (("lisst",), 2, "unknown action 'lisst'; did you mean list?"),
        (("list", "nowhere"), 2, "run nowhere does not exist"),
        (("verify", "nowhere/checkpoints/step_00000010"), 2, "run nowhere does not exist"),
        (("convert", "nowhere"), 2, "--out"),
        (("show", "nowhere", "--jsn"), 2, "did you mean --json?"),
    ],
)
def test_bad_command_lines_are_refused(
    say: Callable[..., str], words: tuple[str, ...], status: int, expected: str
) -> None:
    assert expected in say(*words, status=status)
