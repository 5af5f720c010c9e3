"""Runs whose checkpoints are outside their folder, at an address or on another disk, and that lose the folder."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import scalegpt
from object_store import ObjectStore, new_bucket, serving
from scalegpt.checkpoint.address import Address, Place, place_of
from scalegpt.checkpoint.reader import Checkpoint, read_manifest
from scalegpt.checkpoint.store import find_checkpoints, step_of
from scalegpt.cli.main import main
from scalegpt.errors import InputError

SETTINGS: dict[str, Any] = {
    "tokenizer": "byte", "vocab_size": 257, "n_layer": 1, "n_embd": 8, "n_head": 1, "block_size": 16, "micro_batch": 2,
    "tokens_per_step": 32, "warmup_steps": 0, "precision": "fp32", "device": "cpu", "sample_tokens": 4, "dropout": 0.1,
    "checkpoint_every": 3, "eval_every": 3, "eval_tokens": 64, "schedule": "constant", "input_file": "text.txt",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with serving() as found:
        yield found


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text("a text to learn from, line by line\n" * 100, encoding="utf-8")


@pytest.fixture(params=["address", "folder"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A value of ``checkpoint_dir``."""
    if request.param == "folder":
        return str(tmp_path / "disk")
    request.getfixturevalue("server")
    return f"{new_bucket()}/models"


def train(name: str, steps: int, **settings: Any) -> Path:
    return scalegpt.train("tiny", model_name=name, max_iters=steps, **{**SETTINGS, **settings})


def lines(run: Path) -> list[dict[str, Any]]:
    """What ``metrics.jsonl`` says, without what is measured."""
    kept = ("step", "loss", "val_loss", "lr", "grad_norm")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in kept if key in line} for line in found]


def digests(folder: Place) -> dict[int, list[str]]:
    """The digests of the files of each checkpoint; the same state gives the same, wherever it is kept."""
    manifests = {step_of(path): read_manifest(path) for path in find_checkpoints(folder)}
    return {step: [file.sha256 for _, file in sorted(each.files.items())] for step, each in manifests.items()}


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main(list(words)) == status
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_lost_folder_comes_back_and_the_run_goes_on_exactly(
    elsewhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = train("run", 9)
    expected = lines(reference), digests(reference / "checkpoints")
    shutil.rmtree("runs")
    run, place = train("run", 6, checkpoint_dir=elsewhere), place_of(elsewhere) / "run"
    assert not (run / "checkpoints").exists() or list((run / "checkpoints").iterdir()) == []
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    shutil.rmtree("runs")
    capsys.readouterr()
    assert train("run", 9, checkpoint_dir=elsewhere) == run
    output = capsys.readouterr().out
    assert f"was fetched from {place}/run" in output
    assert f"resumed  from {place}/step_00000006, step 6 of 9" in output
    assert (lines(run), digests(place)) == expected
    for name in (".run_id", "data_ledger.jsonl"):
        assert (run / name).read_bytes().startswith(before[name]), name


@pytest.mark.slow
def test_an_older_state_of_the_folder_is_replaced(elsewhere: str) -> None:
    expected = lines(train("reference", 9))
    run = train("run", 3, checkpoint_dir=elsewhere)
    shutil.copytree(run, "older")
    train("run", 6, checkpoint_dir=elsewhere)
    shutil.rmtree(run)
    Path("older").rename(run)
    train("run", 9, checkpoint_dir=elsewhere)
    assert lines(run) == expected


def test_the_folder_of_another_run_stays(elsewhere: str) -> None:
    train("run", 3, checkpoint_dir=elsewhere)
    shutil.rmtree("runs")
    run = train("run", 1, seed=2)
    with pytest.raises(InputError, match=r"holds another run|was not written by this run"):
        train("run", 6, checkpoint_dir=elsewhere)
    with pytest.raises(InputError, match="was not written by this run"):
        train("run", 6, seed=2, checkpoint_dir=elsewhere)
    assert len(lines(run)) == 2


@pytest.mark.slow
def test_other_settings_are_refused_also_after_the_folder_is_lost(elsewhere: str) -> None:
    train("run", 3, checkpoint_dir=elsewhere)
    shutil.rmtree("runs")
    with pytest.raises(InputError, match="holds another run: learning_rate"):
        train("run", 6, checkpoint_dir=elsewhere, learning_rate=0.5)


def test_fresh_begins_beside_it(elsewhere: str) -> None:
    train("run", 3, checkpoint_dir=elsewhere)
    shutil.rmtree("runs")
    assert train("run", 3, checkpoint_dir=elsewhere, fresh=True).name == "run-2"
    assert [step_of(path) for path in find_checkpoints(place_of(elsewhere) / "run-2")] == [3]


def test_a_run_that_moves_its_checkpoints_must_find_them(elsewhere: str) -> None:
    train("run", 3)
    with pytest.raises(
        InputError,
        match=f"had a checkpoint of step 3, which is missing from {elsewhere}/run; the run kept its checkpoints in "
        "runs/run/checkpoints: omit --checkpoint_dir, or restore it",
    ):
        train("run", 6, checkpoint_dir=elsewhere)


def test_a_resume_without_the_place_names_it(elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    train("run", 3, checkpoint_dir=elsewhere)
    out = capsys.readouterr().out
    assert f"files    runs/run/; checkpoints in {elsewhere}/run\n" in out
    assert f"samples.txt; checkpoints in {elsewhere}/run\n" in out
    with pytest.raises(InputError, match=f": give --checkpoint_dir {elsewhere}, or restore it, or --fresh starts"):
        train("run", 6)


def test_a_folder_of_checkpoints_of_runs_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        train(name, 3, checkpoint_dir=str(tmp_path / "disk"))
    capsys.readouterr()
    assert main(["checkpoint", "list", str(tmp_path / "disk")]) == 2
    assert "; it contains these runs: one, two" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_not_offered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk" / "locked").mkdir(mode=0, parents=True)
    assert main(["checkpoint", "list", str(tmp_path / "disk")]) == 2
    assert "is neither a run nor a checkpoint; give a run's folder" in capsys.readouterr().err


def test_going_back_sets_later_ones_aside(elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("run", 6, checkpoint_dir=elsewhere, keep_checkpoints=5)
    expected = lines(run)
    train("run", 6, checkpoint_dir=elsewhere, keep_checkpoints=5, resume_step=3)
    assert lines(run) == expected
    place = f"{elsewhere}/run"
    listed = said(capsys, "checkpoint", "list", place)
    assert f"set aside by --resume_step: {place}/step_00000006.replaced" in listed


def test_the_commands_take_the_run_and_the_place(elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, place = train("run", 6, checkpoint_dir=elsewhere), f"{elsewhere}/run"
    for where in (str(run), place):
        found = json.loads(said(capsys, "checkpoint", "list", where, "--json"))
        assert [(each["checkpoint"], each["whole"]) for each in found] == [
            (f"{place}/step_{step:08d}", True) for step in (3, 6)
        ]
        assert "is whole" in said(capsys, "checkpoint", "verify", where)
        assert json.loads(said(capsys, "checkpoint", "show", where, "--json"))["checkpoint"] == f"{place}/step_00000006"
        for which in ("last", "best", "3"):
            assert said(capsys, "sample", where, "--max_new_tokens", "3", "--device", "cpu", "--checkpoint", which)
        assert "loss" in said(capsys, "eval", where, "--input_file", "text.txt", "--device", "cpu")
        out = f"out-{len(where)}.safetensors"
        said(capsys, "export", where, "--to", "safetensors", "--out", out)
        assert Path(out).stat().st_size > 0
        assert scalegpt.load(where, device="cpu").header.progress.step == 6
    (reading,) = [Checkpoint.open(place_of(f"{place}/step_00000006"))]
    reading.verify()
    assert said(capsys, "sample", f"{place}/step_00000003", "--max_new_tokens", "3", "--device", "cpu")
    assert main(["checkpoint", "list", f"{elsewhere}/nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing" in line


def test_bad_addresses_end_in_a_line_before_anything_is_made(
    server: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for address, reason in {
        "s3://no-such-bucket-here/x": "cannot be used: The specified bucket does not exist; check the bucket",
        "memory://x": "memory of one process",
        "nothing://x": "Protocol not known",
    }.items():
        with pytest.raises(InputError, match=reason) as caught:
            train("run", 3, checkpoint_dir=address)
        assert "\n" not in str(caught.value)
    assert not Path("runs/run").exists()
    with pytest.raises(InputError, match="init_from takes no address"):
        train("run", 3, init_from="s3://no-such-bucket-here/x")


def test_the_copy_holds_what_a_resume_reads(server: ObjectStore) -> None:
    bucket = new_bucket()
    run = train("run", 3, checkpoint_dir=f"{bucket}/models")
    place = place_of(f"{bucket}/models/run")
    assert isinstance(place, Address)
    copied = (place / "run").objects()
    there = {path.name for path in run.iterdir() if path.is_file()}
    assert copied.keys() == there - {".lock", "report.html", ".started_by"}
    assert copied == {name: os.path.getsize(run / name) for name in copied}  # noqa: PTH202
