"""Plan one model with longer and longer blocks, and compare parameters, memory and speed. Needs no GPU and no torch.

python examples/long_context.py
"""

import scalegpt

GIB = 2**30


def main() -> None:
    """Print a row for each block size; the number of tokens per step is always the same."""
    print(f"{'block':>6}{'parameters':>13}{'micro batch':>13}{'recompute':>11}{'GiB':>7}{'tokens/s':>10}")
    for block in (256, 1024, 4096, 16384):
        answer = scalegpt.plan("350M_1024", gpu="a100-40gb", block_size=block, tokens_per_step=524_288)
        choice = answer.choice
        parameters = answer.as_dict()["model"]["parameters"]
        print(
            f"{block:>6}{parameters:>13,}{choice.batch.micro_batch:>13}{choice.run.train.recompute:>11}"
            f"{choice.total_bytes / GIB:>7.1f}{choice.tokens_per_second:>10,.0f}"
        )


if __name__ == "__main__":
    main()
