"""What a run says at its end: the figures of its own files, errors of predictions, and commands that there are."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from scalegpt.backends import World
from scalegpt.cli.main import COMMANDS
from scalegpt.training import metrics as module
from scalegpt.training.metrics import EnergyMeter
from scalegpt.training.output.ending import Review, Work, contents, next_lines, progress_lines, speed_lines


def write(path: Path, *entries: dict[str, float | None]) -> Path:
    path.write_text("".join(json.dumps({"tokens": 0, **entry}) + "\n" for entry in entries))
    return path


def step(number: int, speed: float) -> dict[str, float | None]:
    return {"step": number, "loss": 3.0, "tokens_per_second": speed}


def test_the_best_evaluation_and_the_median_of_this_processs_steps(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        step(1, 1.0), step(2, 1.0), {"step": 2, "val_loss": 2.5},
        step(3, 5.0), step(4, 100.0), step(5, 300.0), {"step": 5, "val_loss": 2.75}, step(6, 200.0),
    )  # fmt: skip
    review = Review.of(path, since=2)  # step 3 warms up
    assert review == Review(last=(5, 2.75), best=(2, 2.5), tokens_per_second=200.0)
    assert list(progress_lines(review, Work(steps=4, tokens=4096, seconds=200.4))) == [
        "loss     held-out 2.7500, best held-out 2.5000 at step 2",
        "time     3 min 20 s for 4 steps and 4,096 tokens",
    ]


def test_a_loss_that_is_not_finite_is_not_the_last(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 1, "val_loss": 2.5}, {"step": 2, "val_loss": None})
    assert Review.of(path, since=0) == Review(last=None, best=(1, 2.5))
    assert Review.of(tmp_path / "none.jsonl", since=0) == Review()
    assert list(progress_lines(Review(), Work(steps=0, tokens=0, seconds=1.0))) == []


def test_predictions_are_compared_and_energy_is_per_token() -> None:
    review = Review(tokens_per_second=16_000.0)
    work = Work(steps=10, tokens=1_000_000, seconds=100.0, predicted=20_000.0, joules=72_000.0, gpus=2)
    assert list(speed_lines(review, work)) == [
        "speed    20.0k tokens/s predicted, 16.0k measured (median of the steps, prediction +25.0%)",
        "energy   0.02 kWh by the 2 GPUs, 0.072 J a token, 360 W each",
    ]
    assert list(speed_lines(review, Work(steps=10, tokens=10, seconds=1.0))) == [
        "speed    16.0k tokens/s measured (median of the steps)"
    ]
    assert next(iter(speed_lines(Review(), work))).startswith("energy")


def test_energy_is_known_of_all_gpus_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    counters: dict[str, list[float | None]] = {
        "GPU-0": [1000.0, 1500.0, 1500.0], "GPU-1": [7.0, 17.0], "GPU-old": [None, None],
    }  # fmt: skip
    monkeypatch.setattr(module, "energy_joules", lambda uuid: counters[uuid].pop(0))

    def taken(*uuids: str | None) -> dict[str, float]:
        meters = []
        for uuid in uuids:
            monkeypatch.setattr(module, "card_uuid", lambda _, uuid=uuid: uuid)
            meters.append(EnergyMeter(World(0, 1, 0, 1, torch.device("cpu"))))
        answers = [meter.mine() for meter in meters]
        monkeypatch.setattr(World, "gather", lambda self, value: answers)
        return meters[0].taken()

    assert taken("GPU-0", "GPU-1") == {"GPU-0": 500.0, "GPU-1": 10.0}
    counters |= {"GPU-0": [1.0, 2.0, 3.0]}
    assert taken("GPU-0", "GPU-old") == {}
    assert taken(None) == {}


def test_the_next_commands_are_there() -> None:
    for line in next_lines(Path("runs/my run")):
        words = shlex.split(line.removeprefix("next"))
        place = next(index for index, word in enumerate(words) if word.endswith("scalegpt"))
        assert words[place + 1] in COMMANDS
        assert words[place + 2] == "runs/my run"


def test_contents_are_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b", ".lock", "a"):
        (tmp_path / name).touch()
    assert contents(tmp_path) == "a, b"
