"""Measures how the time of a step grows with depth, width, context, micro batch and ranks, compared with its FLOPs.

python benchmarks/scaling_bench.py                                       (from the repository's root)
python benchmarks/scaling_bench.py --parts ranks --rounds 3 --json scaling.json

Every part varies one setting of the preset tiny (L4 H192 V50304, T 256, micro batch 4), with one micro batch per step.
Only ``ranks`` uses the preset's own step of 32,768 tokens, in one process and on two ranks with each stage. Each row
runs ``step_bench.py`` in a new process. In each round every row of a part runs once. Rows are compared by the median,
over the rounds, of their median step times. FLOPs are those of the model, 6·P + 12·L·H·T per token. The bytes sent are
predicted by the planner; ``tests/oracle/test_communication.py`` compares them with real collectives. On two cores a
round of ``ranks`` takes two minutes, and a round of all other parts takes three. A part's table is printed when the
part is done.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arguments import at_least, flag_words, names_of, new_file, python_words, write_figures
from scalegpt.backends.capabilities import device_name
from scalegpt.backends.world import choose_device
from scalegpt.config.presets import resolve
from scalegpt.config.run import RunConfig
from scalegpt.planner.time.communication import sent_bytes
from scalegpt.planner.time.work import flops_per_token
from scalegpt.speed.precision import resolve_precision
from scalegpt.speed.rates import measure_if_needed

STEP_BENCH = Path(__file__).with_name("step_bench.py")
HEAD_SIZE = 32
BASE: dict[str, Any] = {
    "n_layer": 4, "n_embd": 192, "n_head": 6, "block_size": 256, "vocab_size": 50304, "micro_batch": 4,
    "tokens_per_step": 1024, "recompute": "none", "backend": "plain",
}  # fmt: skip
RANKS = 2


@dataclass
class Row:
    """One configuration to measure, a row of a table.

    Attributes:
        label: the setting that distinguishes it from the other rows of its part.
        flags: the settings that differ from :data:`BASE`.
        ranks: the number of processes.
        seconds: the median seconds of a step in each round.
    """

    label: str
    flags: dict[str, Any]
    ranks: int = 1
    seconds: list[float] = field(default_factory=list)

    def run(self, precision: str) -> RunConfig:
        """The run with the settings of this row."""
        return resolve(flags={**BASE, "precision": precision, **self.flags}, name="scaling")


def layers() -> Iterator[Row]:
    """Rows with different depths."""
    for count in (2, 4, 8, 16):
        yield Row(f"L {count}", {"n_layer": count})


def width() -> Iterator[Row]:
    """Rows with different widths and the same head size."""
    for each in (96, 192, 384, 768):
        yield Row(f"H {each}", {"n_embd": each, "n_head": each // HEAD_SIZE})


def context() -> Iterator[Row]:
    """Rows with different block sizes and the same number of tokens per step."""
    tokens = 2048
    for each in (128, 256, 512, 1024, 2048):
        flags = {"block_size": each, "micro_batch": tokens // each, "tokens_per_step": tokens}
        yield Row(f"T {each}, B {tokens // each}", flags)


def batch() -> Iterator[Row]:
    """Rows with different micro batches, and therefore different numbers of tokens per step."""
    for each in (1, 2, 4, 8, 16):
        yield Row(f"B {each}", {"micro_batch": each, "tokens_per_step": each * BASE["block_size"]})


def ranks() -> Iterator[Row]:
    """Rows with one process or two on the same cores, and the same number of tokens per step."""
    step = {"micro_batch": 8, "tokens_per_step": 32768}
    yield Row("one process", step)
    for stage in (0, 2, 3):
        yield Row(f"two ranks, FSDP2 stage {stage}", {**step, "backend": "fsdp", "zero_stage": stage}, RANKS)


PARTS = {each.__name__: each for each in (layers, width, context, batch, ranks)}


def main() -> int:
    """Measure the parts that are asked for, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=names_of(PARTS), default=",".join(PARTS), help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="processes of each row [3]")
    parser.add_argument("--steps", type=at_least(1), default=4, help="steps of each process that count [4]")
    parser.add_argument(
        "--precision", default="auto", help="precision of all rows; auto: the trainer's choice for the shape of tiny"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    device = choose_device("auto", 0, 1)
    base = Row("", {}).run(arguments.precision)
    if device.type == "cpu":
        measure_if_needed()
    precision = resolve_precision(base, device)
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, {precision}, torch {torch.__version__}", flush=True
    )
    results = {}
    for name in arguments.parts:
        rows = list(PARTS[name]())
        for _ in range(arguments.rounds):
            for row in rows:
                row.seconds.append(seconds_of(row, precision, arguments.steps))
        results[name] = [figures(row, precision) for row in rows]
        print(table(name, results[name]), flush=True)
    write_figures(arguments.json, results)
    return 0


def seconds_of(row: Row, precision: str, steps: int) -> float:
    """Median seconds of a row's steps, which run in new processes.

    Raises:
        SystemExit: the processes fail; the message contains what they printed.
    """
    words = flag_words({**BASE, "precision": precision, **row.flags})
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "step.json"
        command = [
            *python_words(row.ranks),
            str(STEP_BENCH),
            *words,
            "--steps",
            str(steps),
            "--warmup",
            "2",
            "--json",
            str(found),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{row.label}: {' '.join(command)} failed:\n{done.stderr}")
        return float(json.loads(found.read_text(encoding="utf-8"))["step_seconds"])


def figures(row: Row, precision: str) -> dict[str, Any]:
    """A row's results as plain values: step times, throughput, FLOPs of a step, and bytes that each rank sends."""
    run = row.run(precision)
    tokens = int(run.train.tokens_per_step or 0)
    accumulation = tokens // (run.train.micro_batch * run.model.block_size * row.ranks)
    seconds = statistics.median(row.seconds)
    return {
        "label": row.label,
        "ranks": row.ranks,
        "step_seconds": seconds,
        "least": min(row.seconds),
        "most": max(row.seconds),
        "tokens_per_second": tokens / seconds,
        "flops": flops_per_token(run.model) * tokens,
        "sent_bytes": sent_bytes(run, ranks=row.ranks, grad_accum=accumulation),
    }


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """The rows of a part as text, with ratios to its first row."""
    first = rows[0]
    lines = [f"{name}:"]
    for row in rows:
        rate, seconds = row["tokens_per_second"], row["step_seconds"]
        sent = f", {row['sent_bytes'] / 1e6:,.1f} MB sent by a rank" if row["sent_bytes"] else ""
        lines.append(
            f"  {row['label']:26s} {1e3 * seconds:9.1f} ms ({1e3 * row['least']:.1f} to {1e3 * row['most']:.1f}), "
            f"{rate:9,.0f} tokens/s ({rate / first['tokens_per_second']:.2f}), {row['flops'] / seconds / 1e9:6,.0f} GFLOP/s; "
            f"time × {seconds / first['step_seconds']:.2f}, FLOPs × {row['flops'] / first['flops']:.2f}{sent}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
