"""Times each loss by itself, forward and backward: full logits, chunked, and torch's fused loss if torch has one.

python benchmarks/loss_bench.py                                 (B 4, T 1,024, V 50,304, H 192; from the repository's root)
python benchmarks/loss_bench.py --hidden 768 --tokens 8192 --chunks 512,2048 --device cuda --dtype bf16

It prints median times and their ratios to the loss with full logits. For the memory of the losses see
``tests/model/test_loss.py`` and, on a GPU, ``benchmarks/gpu_suite.py speed``.
"""

import argparse
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least, counts
from benchmarks.steps.losses import gradients, inputs, loss_of
from scalegpt.backends.base import DTYPES
from scalegpt.errors import InputError
from scalegpt.model.loss import Loss


def main() -> int:
    """Measure the losses and print a table of their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(1), default=4096, help="tokens of a micro batch [4096]")
    parser.add_argument("--hidden", type=at_least(1), default=192, help="width [192]")
    parser.add_argument("--vocabulary", type=at_least(1), default=50304, help="[50304]")
    parser.add_argument(
        "--chunks", type=counts, default="256,512,1024,4096", help="tokens of a chunk [256,512,1024,4096]"
    )
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=at_least(1), default=7, help="counted rounds [7]")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    losses = {"full": loss_of("full")} | {
        f"chunked {chunk}": loss_of("chunked", chunk=chunk) for chunk in arguments.chunks
    }
    with suppress(InputError):  # an older torch
        losses["torch's"] = loss_of("torch")
    shape = arguments.tokens, arguments.hidden, arguments.vocabulary
    tensors = inputs(*shape, DTYPES[arguments.dtype], torch.device(arguments.device))
    seconds = race(losses, tensors, arguments.rounds)
    full = statistics.median(seconds["full"])
    for name, each in seconds.items():
        median = statistics.median(each)
        spread = f"({1e3 * min(each):.1f} to {1e3 * max(each):.1f})"
        print(f"{name:14s} {1e3 * median:9.1f} ms {spread}  {median / full:.2f} of full")
    return 0


def race(losses: dict[str, Loss], tensors: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds of each loss in each counted round, after one round that does not count.

    Args:
        losses: name → loss; every round takes each of them once.
        tensors: hidden states [n, H], head [V, H] and targets [n].
        rounds: the number of counted rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds + 1):
        for name, loss in losses.items():
            begin = time.perf_counter()
            gradients(loss, *tensors)
            if tensors[0].is_cuda:
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
