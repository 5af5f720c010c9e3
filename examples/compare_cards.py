"""Plan one model on several cards, and compare what each can do. Needs no GPU and no torch.

python examples/compare_cards.py
"""

import scalegpt

CARDS = ("rtx4090", "a100-40gb", "a100-80gb", "h100-sxm")
GIB = 2**30


def main() -> None:
    """Print a row for each card, then the command for the last."""
    print(f"{'card':<12}{'fits':<6}{'GiB':>6}{'micro batch':>13}{'recompute':>11}{'tokens/s':>10}")
    for card in CARDS:
        answer = scalegpt.plan("500M_1024", gpu=card)
        choice = answer.choice
        print(
            f"{card:<12}{'yes' if choice.fits else 'no':<6}{choice.total_bytes / GIB:>6.1f}{choice.batch.micro_batch:>13}"
            f"{choice.run.train.recompute:>11}{choice.tokens_per_second:>10,.0f}"
        )
    print(f"\n{answer.command()}")


if __name__ == "__main__":
    main()
