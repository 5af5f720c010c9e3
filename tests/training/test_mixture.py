"""Training on several sources: exact after a kill, each source's own loss, and what is said, kept and refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import scalegpt
from scalegpt.cli.main import main
from scalegpt.training.runs.report.page import report_page
from scalegpt.training.runs.report.read import find_run, read_run
from scalegpt.training.trackers.base import numbers

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16, "micro_batch": 4, "tokens_per_step": 128, "max_iters": 12,
    "warmup_steps": 1, "device": "cpu", "precision": "fp32", "eval_every": 4, "eval_tokens": 400, "sample_tokens": 0,
    "tokenizer": "byte", "vocab_size": "auto", "backend": "plain", "checkpoint_every": 2,
}  # fmt: skip

MIXED = {"prose": 0.7, "code": 0.3}

KILLED = """
import os, signal, json, sys
import torch
torch.set_num_threads(1)
import scalegpt
from scalegpt.training.trainer import Trainer
take = Trainer._take_step
def until_killed(self):
    if self.step == 7:
        self.saving.saver.finish()
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self)
Trainer._take_step = until_killed
scalegpt.train(**json.loads(sys.argv[1]))
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def train(name: str = "mixed", input_file: Any = MIXED, **settings: Any) -> Path:
    return scalegpt.train(input_file=input_file, model_name=name, **{**SMALL, **settings})


def lines(run: Path, key: str) -> list[dict[str, Any]]:
    return [entry for entry in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in entry]


def ledger(run: Path, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    capsys.readouterr()
    assert main(["data", "ledger", str(run), "--steps", "1:12", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_killed_run_of_a_mixture_ends_as_an_undisturbed_one(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("whole")
    task = json.dumps({**SMALL, "input_file": ["prose=0.7", "code=0.3"], "model_name": "killed"})
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, task], capture_output=True, text=True, env=known, check=False)
    assert done.returncode == -9, done.stderr
    killed = train("killed")
    said = capsys.readouterr().out
    assert "resumed  from" in said
    assert "step 6 of 12" in said
    for key in ("loss", "grad_norm", "val_loss", "val_loss_by_source"):
        assert [each[key] for each in lines(killed, key)] == [each[key] for each in lines(whole, key)], key
    assert ledger(killed, capsys) == ledger(whole, capsys)


def test_the_ledger_names_the_source_and_file_of_every_window(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tokens_per_step=1024, eval_every=0)
    windows = [window for step in ledger(run, capsys) for window in step["windows"]]
    assert len(windows) == 12 * 64
    assert 0.6 < sum(window["source"] == "prose" for window in windows) / len(windows) < 0.8
    text = {"prose": b"Tomorrow, and tomorrow", "code": b"def f(x):"}
    for name in ("prose", "code"):
        (path,) = {window["file"] for window in windows if window["source"] == name}
        assert Path(path).read_bytes()[::2].startswith(text[name])
    assert main(["data", "ledger", str(run), "--steps", "1"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["step", "order", "window", "offset", "length", "source", "file"]
    assert {line.split()[5] for line in table[2:]} == {"prose", "code"}


def test_the_held_out_loss_is_the_mean_by_weight_and_every_source_has_its_own(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train()
    evaluations = lines(run, "val_loss")
    assert [each["step"] for each in evaluations] == [4, 8, 12]
    for each in evaluations:
        own = each["val_loss_by_source"]
        assert own.keys() == {"prose", "code"}
        assert each["val_loss"] == pytest.approx(0.7 * own["prose"] + 0.3 * own["code"])
        assert numbers(each)["val_loss_by_source/prose"] == own["prose"]
    said = capsys.readouterr().out
    assert f"), prose {evaluations[-1]['val_loss_by_source']['prose']:.4f}, code " in said
    report = read_run(find_run(run))
    assert [value for _, value in report.by_source["code"]] == [e["val_loss_by_source"]["code"] for e in evaluations]
    assert "Held-out loss by source" in report_page([report])
    result = scalegpt.load(run, device="cpu").evaluate()
    assert result.loss == pytest.approx(sum(part.weight * part.loss for part in result.sources))
    assert [(part.name, part.weight) for part in result.sources] == [("prose", 0.7), ("code", 0.3)]
    assert main(["eval", str(run), "--input_file", "prose=1,code=1", "--device", "cpu", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [source["weight"] for source in shown["sources"]] == [0.5, 0.5]
    assert shown["loss"] == pytest.approx(sum(source["loss"] for source in shown["sources"]) / 2)
    assert shown["tokens"] == sum(source["tokens"] for source in shown["sources"])
    assert main(["eval", str(run), "--input_file", "prose=1,code=1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("weight 0.5: ") == 2


def test_epochs_of_each_source_are_said_and_many_are_warned_of(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("code/text.txt").write_text("def f(x):\n    return x\n" * 30)
    run = train(max_iters=120, eval_every=0, checkpoint_every=0)
    said = capsys.readouterr().out
    plan = json.loads((run / "plan.json").read_text())["sources"]
    assert plan["prose"]["weight"] == 0.7
    for label, source in plan.items():
        assert source["epochs"] == pytest.approx(120 * 128 * source["weight"] / source["train_tokens"])
        assert f"{source['weight']} {label} ({source['epochs']:.2f} epochs of {source['train_tokens']:,})" in said
    assert plan["prose"]["epochs"] < 4 < plan["code"]["epochs"]
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    repeated, small = (line for line in warnings if "code" in line)
    assert f"code is read {plan['code']['epochs']:.1f} times: after about 4 epochs repeated tokens" in repeated
    assert "code has 64 held-out tokens in whole windows, fewer than its 120 of eval_tokens" in small
    assert not any("prose" in line for line in warnings)


def test_other_weights_and_other_sources_are_other_data(
    sources: Path, call: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_iters=4)
    train(input_file="code=3,prose=7", max_iters=6)  # the same mixture, written otherwise
    for other in ({"prose": 0.6, "code": 0.4}, "prose", "prose,code"):
        with pytest.raises(
            scalegpt.InputError, match=r"was trained on other tokens than .*--allow_change data"
        ) as refused:
            train(input_file=other, max_iters=8)
    assert "0.7 prose (4,105 tokens) + 0.3 code" in str(refused.value)
    capsys.readouterr()
    run = train(input_file={"prose": 0.6, "code": 0.4}, max_iters=8, allow_change="data")
    assert "changed  data: " in capsys.readouterr().out
    stretches = [json.loads(line) for line in (run / "data_ledger.jsonl").read_text().splitlines()]
    assert [stretch["first_step"] for stretch in stretches] == [1, 7]
    assert [[source["share"] for source in stretch["sources"]] for stretch in stretches] == [[7000, 3000], [6000, 4000]]


def test_a_run_keeps_the_tokens_of_a_source_whose_text_has_changed(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_iters=4)
    Path("code/more.txt").write_text("another file " * 50)
    capsys.readouterr()
    train(max_iters=8, workers=1)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "has changed since" in line]
    assert warning.startswith("warning: code has changed since this run began; the run resumes with the tokens that it")


def test_text_is_prepared_with_the_tokenizer_of_the_prepared_source(sources: Path) -> None:
    assert main(["data", "prepare", "prose", "--out", "tokens", "--tokenizer", "byte"]) == 0
    given = {key: value for key, value in SMALL.items() if key not in {"tokenizer", "max_iters"}}
    run = scalegpt.train(input_file="tokens=1,code=1", model_name="both", max_iters=1, **given)
    assert "tokenizer: byte" in (run / "config.yaml").read_text()
    result = scalegpt.load(run, device="cpu").evaluate("tokens=1,code=1")
    assert [part.split for part in result.sources] == ["val", None]
    assert result.split is None  # the code is scored whole
