"""The files that the cases start from: a text, prepared tokens, a trained run, configurations, catalogues, and odd files."""

import json
import os
import pickle
from pathlib import Path

import numpy as np

from scalegpt.cli.main import main
from token_files import write_datatrove, write_llmc, write_megatron

SHAPE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 8}

TRAINING = {
    "micro_batch": 2, "tokens_per_step": 32, "max_iters": 4, "warmup_steps": 1, "checkpoint_every": 2, "eval_every": 2,
    "eval_tokens": 16, "sample_tokens": 4, "precision": "fp32", "compile": "off", "log_every": 1,
}  # fmt: skip

CONFIG = {
    "description": "a small model",
    "name": "mine",
    "model": {**SHAPE, "vocab_size": 257, "bias": True, "dropout": 0.1},
    "train": {**TRAINING, "learning_rate": 1e-3, "on_spike": "off", "schedule": "wsd", "optimizer": "adamw"},
    "data": {"input_file": "text.txt", "tokenizer": "byte"},
    "backend": "plain",
    "zero_stage": 0,
}

CATALOGUE = """\
- name: RTX 3080 Ti
  aliases: [3080ti]
  match: [rtx, "3080", ti]
  capability: 8.6
  gb: 12
  gib: [11.76, nvidia-smi]
  tflops: [68.2, ~a guess]
  gbps: 912
  host_gbps: 64
  link: pcie
  peer: false
- name: RTX 4090
  peer: true
"""

CALIBRATION = {
    "format": "scalegpt-calibration",
    "version": 1,
    "measurements": [
        {
            "card": "NVIDIA GeForce RTX 4090", "driver": "550.1", "torch": "2.11.0", "backend": "plain", "ranks": 1,
            "predicted_peak_bytes": 10**9, "allocated_bytes": 10**9, "reserved_bytes": 11 * 10**8, "driver_bytes": 15 * 10**8,
            "date": "2026-01-01T00:00:00+00:00",
        }
    ],
}  # fmt: skip


def flags(**values: object) -> list[str]:
    """The settings as words of a command line."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def make(folder: Path) -> None:
    """Fill a folder, which becomes the current one, with everything that the cases use.

    Raises:
        RuntimeError: a command failed that must not.
    """
    os.chdir(folder)
    Path("text.txt").write_text("".join(f"Line {n} of a text that is long enough to train on.\n" for n in range(60)))
    Path("conf.json").write_text(json.dumps(CONFIG))
    Path("conf.yaml").write_text(as_yaml(CONFIG))
    Path("gpus.yaml").write_text(CATALOGUE)
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}))
    Path("bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    Path("binary").write_bytes(bytes(range(256)) * 4)
    Path("empty").touch()
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    Path("nano").mkdir()
    tokens = np.arange(600, dtype=np.uint16) % 60
    for split in ("train", "val"):
        tokens.tofile(f"nano/{split}.bin")
    meta = {
        "vocab_size": 60,
        "stoi": {chr(200 + n): n for n in range(60)},
        "itos": {n: chr(200 + n) for n in range(60)},
    }
    Path("nano/meta.pkl").write_bytes(pickle.dumps(meta))
    for name in ("llmc", "meg", "trove"):
        Path(name).mkdir()
    documents = [[*range(number, number + 12), 256] for number in range(1, 40)]
    write_llmc(Path("llmc/x_train.bin"), [token for document in documents for token in document])
    write_llmc(Path("llmc/x_val.bin"), [token for document in documents for token in document])
    write_megatron(Path("meg/a_document"), [[document] for document in documents])
    write_datatrove(Path("trove/0.ds"), documents)
    _must("data", "prepare", "text.txt", "--out", "prep", "--tokenizer", "byte")
    _must("train", *flags(**SHAPE, **TRAINING), "--input_file", "prep", "--model_name", "tiny")
    Path("cache").mkdir(exist_ok=True)
    Path("cache/calibration.json").write_text(json.dumps(CALIBRATION))


def as_yaml(values: object) -> str:
    """The values as YAML."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False)


def _must(*words: str) -> None:
    status = main(words)
    if status:
        raise RuntimeError(f"{words[0]} has exit status {status}")
