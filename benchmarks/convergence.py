"""Trains nanoGPT's public character-level recipe and prints the held-out loss.

python benchmarks/convergence.py ../shared/data/tinyshakespeare.txt
python benchmarks/convergence.py ../shared/data/tinyshakespeare.txt --optimizer muon --learning_rates 3e-3 --seeds 1,2,3

The recipe (preset ``shakespeare_char``): 4 layers, 4 heads, 128 wide, block 64, batch 12, 2,000 steps, 100 of warm-up,
cosine to a tenth, no dropout, the last tenth of the text held out. nanoGPT's README gives a loss of 1.88 for learning
rate 1e-3. With ``--optimizer muon`` it trains with AdamW too. Muon takes half as many steps, to show how many tokens it
saves.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import flag_words

ROOT = Path(__file__).resolve().parents[1]

STEPS = {"adamw": 2000, "muon": 1000}
"""Optimizer → steps of a run. The learning rate schedule is as long as the run."""


def main() -> None:
    """Train once for each optimizer, learning rate and seed, and print the held-out losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--learning_rates", default="1e-3,3e-3", help="one run for each, separated by commas")
    parser.add_argument("--seeds", default="1337", help="one run for each, separated by commas")
    parser.add_argument("--optimizer", default="adamw", choices=STEPS, help="muon: beside AdamW with half of the steps")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/convergence"))
    parser.add_argument("flags", nargs="*", help="further flags of the trainer, after --")
    arguments = parser.parse_args()
    optimizers = dict.fromkeys((arguments.optimizer, "adamw"))
    for rate in arguments.learning_rates.split(","):
        losses: dict[str, list[float]] = {optimizer: [] for optimizer in optimizers}
        for seed in arguments.seeds.split(","):
            for optimizer in optimizers:
                status = train(arguments.text, optimizer, rate, seed, arguments.runs_dir, arguments.flags)
                losses[optimizer].append(status["val_loss"])
                print(
                    f"{optimizer}, learning rate {rate}, seed {seed}, {STEPS[optimizer]:,} steps: "
                    f"held-out loss {status['val_loss']:.4f}",
                    flush=True,
                )
        for optimizer, found in losses.items():
            print(f"{optimizer}, learning rate {rate}: mean {statistics.mean(found):.4f} of {len(found)}", flush=True)


def train(text: Path, optimizer: str, rate: str, seed: str, runs: Path, flags: list[str]) -> dict[str, Any]:
    """Train one run in its own process, and return the content of its ``run_status.json``."""
    name = f"{text.stem}-{optimizer}-{rate}-{seed}"
    settings = {
        "preset": "shakespeare_char", "vocab_size": "auto", "input_file": text, "encoding": "auto", "learning_rate": rate,
        "seed": seed, "optimizer": optimizer, "max_iters": STEPS[optimizer], "runs_dir": runs, "model_name": name,
        "log_every": 500,
    }  # fmt: skip
    subprocess.run([sys.executable, str(ROOT / "launch" / "train.py"), *flag_words(settings), *flags], check=True)
    status: dict[str, Any] = json.loads((runs / name / "run_status.json").read_text(encoding="utf-8"))
    return status


if __name__ == "__main__":
    main()
