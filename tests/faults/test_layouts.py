"""Row 23 of the fault matrix: a run that resumes with another number of ranks and under another backend."""

import json
from collections.abc import Callable

import pytest

from faults.jobs import Job
from scalegpt.cli.main import main

Start = Callable[..., Job]
Undisturbed = Callable[..., Job]

STEPS = 20
OTHER = {"zero2": "fsdp2", "fsdp2": "zero2"}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""How far a loss may be from that of the run that stayed on two ranks, relatively: sums are added up in another order."""


@pytest.mark.faults
@pytest.mark.parametrize("precision", TOLERANCE)
def test_row_23_two_ranks_one_rank_two_ranks(
    start_job: Start, undisturbed: Undisturbed, layout: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seven steps each, the middle ones alone and under the other backend; dropout is drawn by rank, so there is none."""
    flags = ["--dropout", "0", "--max_iters", str(STEPS), "--precision", precision]
    job = start_job(layout)
    job.start(*flags, signal={"rank": 1, "step": 7})
    assert job.wait() != 0
    assert job.status()["step"] == job.checkpoints()[-1] == 7
    job.start(*flags, ranks=1, layout=OTHER[layout], signal={"rank": 0, "step": 14})
    assert job.wait() != 0
    assert job.status()["step"] == job.checkpoints()[-1] == 14
    job.finish(*flags)
    reference = undisturbed(layout, *flags)
    assert windows(job, capsys) == windows(reference, capsys)
    losses, expected = job.losses(), reference.losses()
    assert list(losses) == list(expected) == list(range(1, STEPS + 1))
    assert max(abs(losses[step] - expected[step]) / expected[step] for step in losses) <= TOLERANCE[precision]
    assert [losses[step] for step in range(1, 8)] == [expected[step] for step in range(1, 8)]


def windows(job: Job, capsys: pytest.CaptureFixture[str]) -> list[list[int]]:
    """The numbers of the windows of each step's global batch, as ``scalegpt data ledger`` tells."""
    capsys.readouterr()
    assert main(["data", "ledger", str(job.run), "--steps", f"1:{STEPS}", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["step"] for each in lines] == list(range(1, STEPS + 1))
    return [[window["number"] for window in each["windows"]] for each in lines]
