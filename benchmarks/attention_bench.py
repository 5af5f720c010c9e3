"""Times causal attention on the CPU: torch's SDPA, batched matmuls, and SDPA's forward with a backward by matmuls.

python benchmarks/attention_bench.py                    (from the repository's root: bf16, some shapes)
python benchmarks/attention_bench.py --dtype fp32

The three take turns. Times are medians over the rounds. The printed difference of gradients is the norm of the
difference from SDPA's gradient, divided by the norm of SDPA's gradient.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least
from scalegpt.backends.base import DTYPES
from scalegpt.backends.host_memory import keep_freed_memory
from scalegpt.model.cpu.matmul_attention import matmul_attention

SHAPES = (
    (12, 4, 4, 64, 32), (4, 6, 6, 256, 32), (4, 6, 6, 256, 64), (4, 12, 12, 1024, 64), (1, 6, 6, 2048, 64),
    (4, 9, 3, 512, 64), (1, 16, 8, 1024, 128),
)  # fmt: skip
"""Shapes (B, a, k, T, D): batch, heads of queries, heads of keys and values, sequence length, head size."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(*parts: Tensor) -> Tensor:
    """Causal attention of queries [B, T, a, D], keys and values [B, T, k, D] → [B, T, a·D] by SDPA, as in the model."""
    q, k, v = (part.transpose(1, 2) for part in parts)
    grouped = k.shape[1] < q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2).flatten(2)


WAYS: dict[str, Attend] = {
    "SDPA": sdpa,
    "by matmuls": matmul_attention,
    "backward by matmuls": partial(matmul_attention, torchs_forward=True),
}


def timed(attend: Attend, qkv: Tensor, heads: list[int], grad: Tensor) -> tuple[float, float, Tensor]:
    """Seconds of one forward pass, seconds of its backward pass, and the gradient of QKV."""
    begin = time.perf_counter()
    y = attend(*torch.split(qkv, heads, dim=2))
    between = time.perf_counter()
    (found,) = torch.autograd.grad(y, qkv, grad)
    return between - begin, time.perf_counter() - between, found


def main() -> None:
    """Measure, and print for each shape one line for each kind of attention."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=at_least(1), default=15, help="counted rounds [15]")
    args = parser.parse_args()
    keep_freed_memory()
    for B, a, k, T, D in SHAPES:
        qkv = torch.randn(B, T, a + 2 * k, D).to(DTYPES[args.dtype]).requires_grad_()
        grad = torch.randn(B, T, a * D).to(qkv.dtype)
        rounds = [
            {name: timed(way, qkv, [a, k, k], grad) for name, way in WAYS.items()} for _ in range(args.rounds + 2)
        ][2:]
        print(f"B {B}, heads {a} and {k} of {D}, T {T}", flush=True)
        exact = rounds[-1]["SDPA"][2].double()
        whole = statistics.median(each["SDPA"][0] + each["SDPA"][1] for each in rounds)
        for name in WAYS:
            forward = 1e3 * statistics.median(each[name][0] for each in rounds)
            backward = 1e3 * statistics.median(each[name][1] for each in rounds)
            ours = statistics.median(each[name][0] + each[name][1] for each in rounds)
            error = ((rounds[-1][name][2].double() - exact).norm() / exact.norm()).item()
            print(
                f"  {name:20s} forward {forward:7.2f} ms, backward {backward:7.2f} ms, "
                f"{whole / ours:.2f} times SDPA's speed, gradients differ by {error:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
