"""Fuzzes the commands: ``python tests/fuzz/run.py --cases 20000 --seed 1``.

Each case is a command with a hostile command line or file, in a folder of its own. It must end with exit status 0, 2 or 3 (1
where a run fails), say at most one line of error without control characters, write nothing that it was not asked to, and take
bounded time and memory. ``--only N`` runs one case again and leaves its folder.
"""

import argparse
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fuzz.cases import kind_of

TESTS = Path(__file__).resolve().parents[1]
HANGS = 120
"""Seconds after which a worker that does not answer is ended: longer than its own alarm."""

RENEWED = 500
"""Cases after which a worker is replaced: in some thousands, libraries fill its limited address space."""


class Worker:
    """A process that runs cases."""

    def __init__(self, base: Path, scratch: Path, seed: int) -> None:
        self.number: int | None = None
        self.given = 0
        words = [sys.executable, "-m", "fuzz.worker", str(base), str(scratch), str(seed)]
        self.log = (scratch / f"worker_{os.urandom(4).hex()}.log").open("w+")
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment(),
            cwd=scratch,
        )

    def give(self, number: int) -> None:
        """Start a case."""
        assert self.process.stdin is not None
        self.number = number
        self.given += 1
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The result of the case; a worker that has ended is a fault."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        return self.lost(f"the process ended with {self.process.wait()}")

    def lost(self, why: str) -> dict[str, Any]:
        """The result for a worker that gives none."""
        self.end()
        self.log.seek(0)
        return {
            "number": self.number,
            "words": [],
            "status": None,
            "faults": [why],
            "err": self.log.read()[-2000:],
            "out": "",
        }

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.wait()


def environment() -> dict[str, str]:
    """The variables of a worker: one thread, no GPU, our modules."""
    ours = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SCALEGPT_GPUS": "",
    }
    ranks = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {**{key: value for key, value in os.environ.items() if key not in ranks}, **ours}


def build(base: Path) -> None:
    """Make the files that the cases start from."""
    base.mkdir()
    program = "import sys; from pathlib import Path; from fuzz.material import make; make(Path(sys.argv[1]))"
    made = {**environment(), "SCALEGPT_CACHE": str(base / "cache"), "HOME": str(base)}
    subprocess.run(
        [sys.executable, "-c", program, str(base)], check=True, env=made, cwd=base, stdout=subprocess.DEVNULL
    )


def run(numbers: list[int], seed: int, workers: int, scratch: Path, *, show_all: bool) -> list[dict[str, Any]]:
    """Run cases and return the answers of those with faults, printing each as it comes."""
    base = scratch / "base"
    build(base)
    left, bad = iter(numbers), []
    selector = selectors.DefaultSelector()

    def start(worker: Worker | None) -> None:
        number = next(left, None)
        if number is None:
            if worker is not None:
                worker.end()
            return
        worker = worker or Worker(base, scratch, seed)
        worker.give(number)
        assert worker.process.stdout is not None
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    for _ in range(min(workers, len(numbers))):
        start(None)
    while selector.get_map():
        ready = [(key.data, key.fileobj) for key, _ in selector.select(HANGS)]
        hung = [] if ready else [(key.data, key.fileobj) for key in list(selector.get_map().values())]
        for worker, stream in ready or hung:
            selector.unregister(stream)
            answer = worker.lost(f"no answer for {HANGS} s") if hung else worker.answer()
            if answer["faults"]:
                bad.append(answer)
            if answer["faults"] or show_all:
                report(answer)
            if worker.given >= RENEWED:
                worker.end()
            start(None if worker.process.poll() is not None else worker)
    return bad


def report(answer: dict[str, Any]) -> None:
    """Print a case with faults."""
    said = "; ".join(answer["faults"]) or f"exit status {answer['status']}"
    print(f"case {answer['number']}: {said}\n  {answer['words']}\n  {answer['err'].strip()[-1500:]!r}", flush=True)


def main() -> int:
    """Run the cases; 1 where some have faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="run this case alone, and leave its folder")
    parser.add_argument("--kinds", nargs="+", help="only cases of these functions of cases.py")
    parser.add_argument("--show_all", action="store_true", help="print cases without faults too")
    parser.add_argument("--scratch", help="folder to work in [a new one]")
    arguments = parser.parse_args()
    numbers = (
        [arguments.only]
        if arguments.only is not None
        else list(range(arguments.first, arguments.first + arguments.cases))
    )
    if arguments.kinds:
        numbers = [number for number in numbers if kind_of(arguments.seed, number) in arguments.kinds]
    scratch = Path(tempfile.mkdtemp(prefix="scalegpt-fuzz-", dir=arguments.scratch))
    bad = run(numbers, arguments.seed, arguments.workers, scratch, show_all=arguments.show_all)
    print(f"{len(numbers)} cases, {len(bad)} with faults" + (f"; their folders are in {scratch}" if bad else ""))
    if not bad:
        shutil.rmtree(scratch, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
