"""The ledger's running sum: what it holds, and the moments that it remembers."""

import pytest

from scalegpt.planner.memory.timeline import Moment, Timeline


def play(timeline: Timeline) -> None:
    timeline.take("kept", 1000)
    timeline.take("passing", 5000)
    timeline.touch("passing", 300)
    timeline.give("passing", 5000)


def test_sizes_are_rounded_one_by_one() -> None:
    timeline = Timeline()
    timeline.take("kept", 1, 512, 513)
    assert timeline.total == 512 + 512 + 1024
    timeline.give("kept", 513)
    assert timeline.live["kept"] == 1024


def test_the_fullest_moment_of_each_phase_is_remembered_with_what_it_is_made_of() -> None:
    timeline = Timeline()
    timeline.enter("first")
    play(timeline)
    timeline.enter("second")
    timeline.take("late", 2048)
    timeline.enter("first")
    timeline.enter("third")
    assert timeline.peaks["first"] == Moment(6656, {"kept": 1024, "passing": 5632})
    assert timeline.peaks["second"] == Moment(3072, {"kept": 1024, "late": 2048})
    assert timeline.peaks["third"] == timeline.peaks["second"]
    assert timeline.peak() == ("first", timeline.peaks["first"])


def test_what_was_not_held_cannot_be_freed() -> None:
    timeline = Timeline()
    timeline.take("kept", 512)
    with pytest.raises(AssertionError, match="more kept freed than held in idle"):
        timeline.give("kept", 1024)
