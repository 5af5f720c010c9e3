"""Times the losses alone, forward and backward, in turn: full logits, chunked, and torch's own fused one where it has it.

python benchmarks/loss_bench.py                                 (B 4, T 1,024, V 50,304, H 192; from the repository's root)
python benchmarks/loss_bench.py --hidden 768 --tokens 8192 --chunks 512,2048 --device cuda --dtype bf16

Medians, and the ratio to full logits. Memory is told by ``tests/model/test_loss.py`` and on a GPU by ``gpu_suite.py speed``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least, counts
from scalegpt.model.loss import chunked_cross_entropy, full_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=at_least(1), default=4096, help="of a micro batch [4096]")
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
    dtype = torch.float32 if arguments.dtype == "fp32" else torch.bfloat16
    losses: dict[str, Loss] = {"full": full_cross_entropy}
    losses |= {f"chunked {chunk}": chunked_cross_entropy(chunk) for chunk in arguments.chunks}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch's"] = lambda x, w, t: F.linear_cross_entropy(x, w.to(x.dtype), t)
    shape = (arguments.tokens, arguments.hidden, arguments.vocabulary)
    seconds = race(losses, shape, dtype, arguments.device, arguments.rounds)
    full = statistics.median(seconds["full"])
    for name, each in seconds.items():
        median = statistics.median(each)
        spread = f"({1e3 * min(each):.1f} to {1e3 * max(each):.1f})"
        print(f"{name:14s} {1e3 * median:9.1f} ms {spread}  {median / full:.2f} of full")
    return 0


def race(
    losses: dict[str, Loss], shape: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each loss in each round, after one that does not count; ``shape`` is tokens, width, vocabulary."""
    n, width, vocabulary = shape
    hidden = torch.randn(n, width, device=device).to(dtype).requires_grad_()
    head = (0.02 * torch.randn(vocabulary, width, device=device)).requires_grad_()
    targets = torch.randint(vocabulary, (n,), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for number in range(rounds + 1):
        for name, loss in losses.items():
            hidden.grad = head.grad = None
            begin = time.perf_counter()
            loss(hidden, head, targets).backward()  # type: ignore[no-untyped-call]
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
