"""What a user asks of the trainer, read and checked without torch, whose import takes seconds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scalegpt.config.aliases import hint
from scalegpt.config.backends import FSDP
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import named_settings, resolve
from scalegpt.config.run import DATA, PLANNED_BY_DEFAULT, SECTIONS, RunConfig
from scalegpt.errors import InputError
from scalegpt.planner.checks import check_installed
from scalegpt.planner.search.question import MARGIN
from scalegpt.system.ranks import read_ranks
from scalegpt.text import shown


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        run: the configuration, with ``auto`` where the machine or the data decide.
        runs_dir: the folder of all runs.
        fresh: start a new run beside an earlier one of this name.
        given: the settings that the user named, as flags or in a file; the others are a preset's or defaults.
        stated: those that the preset names.
        margin: share of a card's memory that the planner leaves free.
        allow_change: settings, or ``data``, that a resumed run may change.
        trust_checkpoint: resume from a checkpoint that another run has written.
        resume_step: resume from the checkpoint of this step, and set later ones aside; None: from the newest.
    """

    run: RunConfig
    runs_dir: Path
    fresh: bool
    given: frozenset[str] = frozenset()
    stated: frozenset[str] = frozenset()
    margin: float = MARGIN
    allow_change: frozenset[str] = frozenset()
    trust_checkpoint: bool = False
    resume_step: int | None = None

    @classmethod
    def of(
        cls,
        *,
        preset: str | None,
        config_file: str | None,
        name: str | None,
        settings: Mapping[str, Any],
        runs_dir: Path,
        fresh: bool = False,
        margin: float | str | None = None,
        allow_change: Iterable[str] = (),
        trust_checkpoint: bool = False,
        resume_step: int | None = None,
        given_in: str = "command line",
    ) -> "Request":
        """Read and check what a user gave; what is not explained here is an attribute of the same name.

        Settings (name → value) override those of a preset or of a JSON or YAML file, of which one may be given. Without a
        name the run has the file's or the preset's. ``given_in`` says where the settings come from, for error messages.

        Raises:
            InputError: a name, a key or a value that cannot work, or a backend that is not installed.
        """
        if resume_step is not None and fresh:
            raise InputError("--resume_step resumes a run and --fresh begins one; give one of them")
        settings = dict(settings)
        given = frozenset(settings) | named_settings(config_file=None if preset else config_file)
        if read_ranks().size > 1 and preset is None and "backend" not in given:
            settings["backend"] = FSDP.name  # several ranks were started, and no backend is named
        run = resolve(preset=preset, config_file=config_file, flags=settings, name=name, given_in=given_in)
        if name is not None:
            run = replace(run, name=name)  # an empty one too, which is refused with the other bad names
        _check_paths(run)
        if "backend" not in run.auto:
            check_installed(run.parallel.backend)
        margins = {} if margin is None else {"margin": margin}
        return cls(
            run=run,
            runs_dir=runs_dir,
            fresh=fresh,
            given=given,
            stated=named_settings(preset),
            margin=MachineConfig.from_mapping(margins, given_in).margin,
            allow_change=_known(allow_change),
            trust_checkpoint=trust_checkpoint,
            resume_step=resume_step,
        )

    @property
    def open(self) -> frozenset[str]:
        """The settings that the planner chooses: what is ``auto``, and by default the micro batch and what to recompute.

        A preset's stage belongs to its backend: where the backend is open, so is the stage.
        """
        by_default = PLANNED_BY_DEFAULT - self.given - (self.stated - {"micro_batch"})
        stage = {"zero_stage"} - self.given if "backend" in self.run.auto else frozenset()
        return self.run.auto | by_default | stage


def _check_paths(run: RunConfig) -> None:
    """Refuse paths that a run's files, which are UTF-8, could not name.

    Raises:
        InputError: there is one.
    """
    for path in (run.data.input_file, run.parallel.ds_config):
        if path is not None and any("\ud800" <= character <= "\udfff" for character in path):
            raise InputError(f"{shown(path)} is not UTF-8, and a run's files could not name it; rename it")


def _known(keys: Iterable[str]) -> frozenset[str]:
    """The settings that may change at a resume, spelled as they are known.

    Raises:
        InputError: one of them is no setting.
    """
    named = [key.strip().replace("-", "_") for key in keys if key.strip()]
    known = {DATA, *(key for section in SECTIONS.values() for key in section.settings())}
    for key in named:
        if key not in known:
            raise InputError(f"allow_change: unknown setting {shown(key)}{hint(key, known, 'scalegpt train --help')}")
    return frozenset(named)
