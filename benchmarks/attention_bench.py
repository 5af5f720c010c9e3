"""Times causal attention by batched matmuls beside torch's SDPA, forward and backward, in turn.

python benchmarks/attention_bench.py                    (from the repository's root: bf16, some shapes)
python benchmarks/attention_bench.py --dtype fp32

Times are medians of the rounds. The error is the gradient's distance from SDPA's, relative to it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from scalegpt.backends.base import DTYPES
from scalegpt.backends.host_memory import keep_freed_memory
from scalegpt.model.matmul_attention import matmul_attention

SHAPES = ((12, 4, 64, 32), (4, 6, 256, 32), (4, 6, 256, 64), (4, 12, 1024, 64), (1, 6, 2048, 64))
"""B, a, T, D."""


def sdpa(qkv: Tensor, n_head: int) -> Tensor:
    """[B, T, 3·H] → [B, T, H] as the model does it with SDPA."""
    B, T, width = qkv.shape
    q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, width // 3)


def timed(attend: Callable[[Tensor, int], Tensor], qkv: Tensor, n_head: int, grad: Tensor) -> tuple[float, Tensor]:
    """Seconds of one forward and backward, and the gradient of QKV."""
    begin = time.perf_counter()
    (found,) = torch.autograd.grad(attend(qkv, n_head), qkv, grad)
    return time.perf_counter() - begin, found


def main() -> None:
    """Print a line per shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds [15]")
    args = parser.parse_args()
    keep_freed_memory()
    for B, a, T, D in SHAPES:
        qkv = torch.randn(B, T, 3 * a * D).to(DTYPES[args.dtype]).requires_grad_()
        grad = torch.randn(B, T, a * D).to(qkv.dtype)
        rounds = [[timed(attend, qkv, a, grad) for attend in (sdpa, matmul_attention)] for _ in range(args.rounds + 2)]
        torchs, ours = (1e3 * statistics.median(each[i][0] for each in rounds[2:]) for i in (0, 1))
        exact, found = (each[1].double() for each in rounds[-1])
        error = ((found - exact).norm() / exact.norm()).item()
        print(
            f"B {B:2} a {a:2} T {T:4} D {D}: SDPA {torchs:7.2f} ms, by matmuls {ours:7.2f} ms, "
            f"{torchs / ours:.2f} times as fast, gradients differ by {error:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
