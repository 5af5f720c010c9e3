"""The scaling benchmark's rows are what their labels say, and its table sets each beside the first."""

import pytest

from benchmarks.scaling_bench import PARTS, RANKS, figures, table


@pytest.mark.parametrize("part", PARTS)
def test_rows_are_whole_steps_that_differ_in_one_thing(part: str) -> None:
    rows = list(PARTS[part]())
    for row in rows:
        run = row.run("fp32")
        tokens = run.train.micro_batch * run.model.block_size * row.ranks
        assert run.train.tokens_per_step is not None
        assert run.train.tokens_per_step % tokens == 0, row.label
    steps = {row.run("fp32").train.tokens_per_step for row in rows}
    assert (len(steps) == 1) == (part != "batch")


def test_the_table_has_growth_of_time_and_of_flops_and_what_ranks_send() -> None:
    rows = list(PARTS["ranks"]())
    for seconds, row in enumerate(rows, start=1):
        row.seconds = [9.0, float(seconds), 0.5]
    told = [figures(row, "fp32") for row in rows]
    assert [each["step_seconds"] for each in told] == [1, 2, 3, 4]
    assert [bool(each["sent_bytes"]) for each in told] == [row.ranks == RANKS for row in rows]
    lines = table("ranks", told).splitlines()
    assert "(0.50)" in lines[2]
    assert "time × 2.00, FLOPs × 1.00" in lines[2]
    assert "MB sent by a rank" in lines[2]
    assert "sent" not in lines[1]
