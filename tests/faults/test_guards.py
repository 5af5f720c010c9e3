"""Rows 19, 20, 21, 24 and 25 of the fault matrix, on two ranks, with ZeRO-2 and with FSDP2."""

import json
from pathlib import Path
from typing import Any

import pytest

from ranks import run_ranks
from scalegpt.cli.main import main

WORKER = Path(__file__).with_name("guards_worker.py")
TEXT = "".join(f"{n} green bottles hanging on the wall, and if one should fall, {n - 1}.\n" for n in range(200, 0, -1))
RUN = {
    "tokenizer": "byte", "vocab_size": "auto", "device": "cpu", "n_layer": 1, "n_embd": 16, "n_head": 2,
    "block_size": 16, "precision": "bf16", "learning_rate": "1e-2", "micro_batch": 2, "tokens_per_step": 128,
    "max_iters": 14, "warmup_steps": 2, "eval_every": 0, "eval_tokens": 200, "checkpoint_every": 4,
    "keep_checkpoints": 9, "sample_tokens": 0, "log_every": 1, "spike_window": 4, "spike_factor": 3,
}  # fmt: skip
WINDOWS = 8
LAYOUTS = {
    "zero-2": {"backend": "deepspeed", "zero_stage": 2},
    "fsdp2": {"backend": "fsdp", "zero_stage": 2},
}


def command(name: str, **changes: Any) -> list[str]:
    flags = {**RUN, "model_name": name, "input_file": "tokens", **changes}
    return ["train", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]


def steps(folder: Path, name: str) -> list[Any]:
    every = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if "loss" in line]


def status(folder: Path, name: str) -> Any:
    return json.loads((folder / "runs" / name / "run_status.json").read_text())


def first_window(step: int) -> int:
    return (step - 1) * WINDOWS


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_steps_spikes_data_and_settings_on_two_ranks(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALEGPT_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)
    assert main(["data", "prepare", "text.txt", "--tokenizer", "byte", "--out", "tokens"]) == 0
    flags = LAYOUTS[layout]
    always = [first_window(step) for step in range(6, 15)]
    skip, back = {"on_spike": "skip"}, {"on_spike": "rollback"}
    commands: dict[str, dict[str, Any]] = {
        "row 19": {"words": command("nan", **flags), "spoil": "gradient", "windows": [first_window(6)]},
        "row 20": {
            "words": command("stays", max_skipped_in_a_row=3, **flags), "spoil": "loss", "windows": always,
        },
        "row 21, skip": {"words": command("skip", **skip, **flags), "garble": [first_window(10)]},
        "as if not": {"words": command("left", on_spike="off", **flags), "spoil": "loss", "windows": [first_window(10)]},
        "row 21, back": {"words": command("back", **back, **flags), "garble": [first_window(11)]},
        "row 25": {"words": command("nan", max_iters=16, learning_rate="5e-3", **flags)},
        "row 25, allowed": {
            "words": command("nan", max_iters=16, learning_rate="5e-3", allow_change="learning_rate", **flags)
        },
        "row 24, changed": {"words": command("nan", max_iters=18, **flags), "flip": [["tokens/train.bin", 2468]]},
        "row 24, cut": {"words": command("nan", max_iters=18, **flags), "truncate": ["tokens/train.bin", 6000]},
    }  # fmt: skip
    task = {"folder": str(tmp_path), "commands": list(commands.values())}
    gathered = run_ranks(WORKER, 2, task, tmp_path)
    first, second = (dict(zip(commands, results, strict=True)) for results in gathered)
    found = {name: result["status"] for name, result in first.items()}
    assert found == {name: result["status"] for name, result in second.items()}
    assert found == {
        **dict.fromkeys(commands, 0), "row 20": 1, "row 25": 2, "row 24, changed": 2, "row 24, cut": 2,
    }, first  # fmt: skip

    # 19: all ranks skip the step; it is counted and reported.
    assert "step 6 is skipped: gradient not finite" in first["row 19"]["out"]
    assert [line["step"] for line in steps(tmp_path, "nan") if line.get("skipped")] == [6]
    assert status(tmp_path, "nan")["skipped_steps"] == 1

    # 20: the run ends, and the samples of its last steps are written.
    assert "3 steps in a row up to step 8 were skipped (loss not finite" in first["row 20"]["err"]
    bad = [json.loads(line) for line in (tmp_path / "runs/stays/bad_steps.jsonl").read_text().splitlines()]
    assert [each["step"] for each in bad] == [6, 7, 8]
    numbers = [window["number"] for each in bad for window in each["windows"]]
    assert numbers == list(range(first_window(6), first_window(9)))
    assert status(tmp_path, "stays")["state"] == "failed"

    # 21: skipped data and data after the rollback target are not trained on.
    assert [line["step"] for line in steps(tmp_path, "skip") if line.get("skipped")] == [10]
    skipped, left = (steps(tmp_path, name) for name in ("skip", "left"))
    assert [line["loss"] for line in skipped if line["step"] != 10] == [
        line["loss"] for line in left if line["step"] != 10
    ]
    assert "rolled back to runs/back/checkpoints/step_00000004, rollback 1 of at most 3" in first["row 21, back"]["out"]
    assert status(tmp_path, "back")["windows_left_out"] == 7 * WINDOWS
    capsys.readouterr()
    assert main(["data", "ledger", "runs/back", "--steps", "4:5", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["windows"][0]["number"] for each in lines] == [first_window(4), first_window(12)]

    # 25: shown, refused, and with a word done.
    assert "holds another run: learning_rate: 0.01 → 0.005" in first["row 25"]["err"]
    assert "changed  learning_rate: 0.01 → 0.005" in first["row 25, allowed"]["out"]
    assert status(tmp_path, "nan")["step"] == 16

    # 24: the file and the place.
    changed, cut = first["row 24, changed"]["err"], first["row 24, cut"]["err"]
    assert "token file tokens/train.bin has changed since, first between token offsets 0 and " in changed
    assert "token file tokens/train.bin holds 6000 bytes" in cut
    assert "cut short at token offset 3000" in cut
