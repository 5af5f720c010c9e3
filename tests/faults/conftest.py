"""Jobs for faults, and undisturbed jobs to compare them with."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.jobs import LAYOUTS, Job


@pytest.fixture
def start_job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A factory of jobs; what is left of them is killed in the end."""
    made = []

    def make(layout: str, launcher: str = "torchrun") -> Job:
        made.append(Job(tmp_path, layout, launcher))
        return made[-1]

    yield make
    for job in made:
        job.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """A factory of finished runs that nothing happened to; one for each layout and flags."""
    done: dict[tuple[str, ...], Job] = {}

    def get(layout: str, *flags: str) -> Job:
        if (layout, *flags) not in done:
            job = Job(tmp_path_factory.mktemp(layout), layout)
            try:
                job.finish(*flags)
            finally:
                job.end()
            done[layout, *flags] = job
        return done[layout, *flags]

    return get


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """ZeRO-2 and FSDP2."""
    return str(request.param)
