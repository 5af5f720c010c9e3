"""The task in examples/lm_eval, run by lm-evaluation-harness on an exported folder, measures what ``scalegpt eval`` does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import scalegpt
from scalegpt.cli.main import main

TASKS = Path(__file__).resolve().parents[2] / "examples" / "lm_eval"
BLOCK = 32
TEXT = "Città and all: the harness reads windows as we do. " * 40
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-evaluation-harness: pip install 'lm_eval[hf]'"
)
def test_the_harness_finds_the_same_bits_per_byte(
    tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tiny_run(block_size=BLOCK, activation="gelu_tanh", bias=True)
    # Whole windows: the harness lets a last window that is not full begin earlier.
    text = TEXT.encode()[: BLOCK * 40].decode()
    Path("my_text.txt").write_text(text, encoding="utf-8")
    assert main(["export", str(run), "--to", "hf", "--out", "exported"]) == 0
    words = ["--model", "hf", "--model_args", "pretrained=exported", "--device", "cpu", "--batch_size", "4"]
    words += ["--tasks", "my_text", "--include_path", str(TASKS), "--output_path", "results.json"]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-m", "lm_eval", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = tmp_path.glob("results*.json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]["my_text"]
    result = scalegpt.load(run, device="cpu").evaluate("my_text.txt")
    assert result.tokens == len(text.encode())
    assert found["bits_per_byte,none"] == pytest.approx(result.bits_per_byte, rel=1e-6)
