"""Train a small model on a text of your own, on a GPU or a CPU.

python examples/train.py my_text.txt
"""

import json
import sys

import scalegpt

SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 2, "block_size": 64, "tokenizer": "byte", "vocab_size": "auto"}


def main(text: str) -> None:
    """Train for 20 steps; the same call again finds nothing left to do."""
    run = scalegpt.train(
        "tiny",
        input_file=text,
        model_name="example",
        max_iters=20,
        tokens_per_step=1024,
        warmup_steps=2,
        schedule="constant",
        **SMALL,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"{run}: {len(losses)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
