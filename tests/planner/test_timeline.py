"""The ledger's running sum: what it holds, and the moments that it remembers."""

import random

import pytest

from scalegpt.planner.memory.timeline import Course, Moment, Timeline


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


KINDS = ("kept", "passing", "late")


@pytest.mark.parametrize("seed", range(40))
def test_a_course_is_followed_as_its_changes_one_by_one(seed: int) -> None:
    """Wherever it starts, whatever the highest moment was before, in whichever phase."""
    draw = random.Random(seed)
    courses = [[(draw.choice(KINDS), 512 * draw.randint(-4, 4)) for _ in range(draw.randint(0, 9))] for _ in range(3)]
    one_by_one, summed_up = Timeline(), Timeline()
    for timeline in (one_by_one, summed_up):
        for kind in KINDS:
            timeline.hold(kind, 512 * 1000)
    for _ in range(12):
        phase, changes = draw.choice(["first", "second"]), draw.choice(courses)
        one_by_one.enter(phase)
        summed_up.enter(phase)
        for kind, size in changes:
            one_by_one.hold(kind, size) if size > 0 else one_by_one.drop(kind, -size)
        summed_up.follow(Course.of(changes))
        assert (summed_up.live, summed_up.total) == (one_by_one.live, one_by_one.total)
    assert summed_up.peaks == one_by_one.peaks


def test_what_was_not_held_cannot_be_freed() -> None:
    timeline = Timeline()
    timeline.take("kept", 512)
    with pytest.raises(AssertionError, match="more kept freed than held in idle"):
        timeline.give("kept", 1024)
    with pytest.raises(AssertionError, match="more kept freed than held in idle"):
        timeline.follow(Course.of([("kept", -1024)]))
