"""Trains the public character-level recipe and compares its held-out loss with a plain nanoGPT loop's.

python benchmarks/convergence.py ../shared/data/tinyshakespeare.txt

The recipe (preset ``shakespeare_char``): 4 layers, 4 heads, 128 wide, block 64, batch 12, 2,000 steps, 100 of warm-up, cosine
to a tenth, no dropout, the last tenth of the text held out. nanoGPT's README gives 1.88 for learning rate 1e-3.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Train once for each learning rate and print the held-out losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--learning_rates", default="1e-3,3e-3", help="one run for each, separated by commas")
    parser.add_argument("--seeds", default="1337", help="one run for each, separated by commas")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/convergence"))
    parser.add_argument("flags", nargs="*", help="further flags of the trainer, after --")
    arguments = parser.parse_args()
    for rate in arguments.learning_rates.split(","):
        for seed in arguments.seeds.split(","):
            status = train(arguments.text, rate, seed, arguments.runs_dir, arguments.flags)
            print(f"learning rate {rate}, seed {seed}: held-out loss {status['val_loss']:.4f}", flush=True)


def train(text: Path, rate: str, seed: str, runs: Path, flags: list[str]) -> dict[str, Any]:
    """One run in a process of its own; returns its ``run_status.json``."""
    name = f"{text.stem}-{rate}-{seed}"
    subprocess.run(
        [
            *(
                sys.executable,
                str(ROOT / "launch" / "train.py"),
                "--preset",
                "shakespeare_char",
                "--vocab_size",
                "auto",
            ),
            *("--input_file", str(text), "--encoding", "auto", "--learning_rate", rate, "--seed", seed),
            *("--runs_dir", str(runs), "--model_name", name, "--log_every", "500", *flags),
        ],
        check=True,
    )
    status: dict[str, Any] = json.loads((runs / name / "run_status.json").read_text(encoding="utf-8"))
    return status


if __name__ == "__main__":
    main()
