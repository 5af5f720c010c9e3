"""Load a trained model and let it write, at several temperatures. Run train.py first.

python examples/generate.py runs/example "Once upon a time"
"""

import sys

import scalegpt


def main(run: str, prompt: str) -> None:
    """Print one continuation for each temperature; 0 always takes the likeliest token."""
    model = scalegpt.load(run)
    print(f"step {model.header.progress.step}, {model.model.config.n_layer} layers")
    for temperature in (0.0, 0.7, 1.0):
        text = model.generate(prompt, max_new_tokens=40, temperature=temperature, top_k=50, seed=1)
        print(f"\n--- temperature {temperature}\n{prompt}{text}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
