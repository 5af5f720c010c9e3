"""Times causal attention on the CPU: torch's SDPA, batched matmuls, and SDPA's forward with a backward by matmuls.

python benchmarks/attention_bench.py                    (from the repository's root: bf16, some shapes)
python benchmarks/attention_bench.py --dtype fp32

The three take turns. Times are medians over the rounds. The printed difference of gradients is the norm of the difference
from SDPA's gradient, relative to the norm of SDPA's.
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

SHAPES = ((12, 4, 64, 32), (4, 6, 256, 32), (4, 6, 256, 64), (4, 12, 1024, 64), (1, 6, 2048, 64))
"""Shapes (B, a, T, D): batch, heads, sequence length, head size."""


def sdpa(qkv: Tensor, n_head: int) -> Tensor:
    """Causal attention [B, T, 3·H] → [B, T, H] by SDPA, as in the model."""
    B, T, width = qkv.shape
    q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, width // 3)


WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "SDPA": sdpa,
    "by matmuls": matmul_attention,
    "backward by matmuls": partial(matmul_attention, torchs_forward=True),
}


def timed(
    attend: Callable[[Tensor, int], Tensor], qkv: Tensor, n_head: int, grad: Tensor
) -> tuple[float, float, Tensor]:
    """Seconds of one forward pass, seconds of its backward pass, and the gradient of QKV."""
    begin = time.perf_counter()
    y = attend(qkv, n_head)
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
    for B, a, T, D in SHAPES:
        qkv = torch.randn(B, T, 3 * a * D).to(DTYPES[args.dtype]).requires_grad_()
        grad = torch.randn(B, T, a * D).to(qkv.dtype)
        rounds = [{name: timed(way, qkv, a, grad) for name, way in WAYS.items()} for _ in range(args.rounds + 2)][2:]
        print(f"B {B}, heads {a} of {D}, T {T}", flush=True)
        exact = rounds[-1]["SDPA"][2].double()
        whole = statistics.median(each["SDPA"][0] + each["SDPA"][1] for each in rounds)
        for name in WAYS:
            forward = 1e3 * statistics.median(each[name][0] for each in rounds)
            backward = 1e3 * statistics.median(each[name][1] for each in rounds)
            ours = statistics.median(each[name][0] + each[name][1] for each in rounds)
            error = ((rounds[-1][name][2].double() - exact).norm() / exact.norm()).item()
            print(
                f"  {name:20s} forward {forward:7.2f} ms, backward {backward:7.2f} ms, "
                f"{whole / ours:.2f} times as fast as SDPA, gradients differ by {error:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
