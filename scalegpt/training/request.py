"""A user's request for a training run, read and checked without torch, whose import takes seconds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
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
from scalegpt.system.ranks import ranks_or_alone, read_ranks
from scalegpt.text import shown
from scalegpt.training.initial import name_after, with_initial

PROGRESS = ("auto", "plain")


@dataclass(frozen=True)
class Request:
    """A user's request for a training run.

    Attributes:
        run: the configuration, with ``auto`` where the machine or the data decide.
        runs_dir: the folder of all runs.
        fresh: whether to start a new run beside an earlier one of the same name.
        given: names of the settings that the user gave, as flags or in a file. All others have a preset's values or defaults.
        stated: names of the settings that the preset gives.
        margin: share of a card's memory that the planner leaves free.
        allow_change: names of settings that a resumed run may change, and ``data`` for its tokens.
        trust_checkpoint: whether to resume even from a checkpoint that another run has written.
        resume_step: resume from the checkpoint of this step, and set later checkpoints aside; None: resume from the newest.
        progress: ``auto``: a live line where the output is a terminal; ``plain``: plain lines everywhere.
        network: the network of each machine, as for ``scalegpt plan``; a run on several machines is refused if it is far
            from it. None: it is only measured.
        allow_slow_network: whether to train although the network is far slower than ``network``.
        notes: lines to print.
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
    progress: str = "auto"
    network: str | None = None
    allow_slow_network: bool = False
    notes: tuple[str, ...] = ()

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
        allow_change: str | Iterable[str] = (),
        trust_checkpoint: bool = False,
        resume_step: int | None = None,
        progress: str = "auto",
        given_in: str = "command line",
    ) -> "Request":
        """Make a request from a user's input, and check it. Arguments not described here are attributes of the same name.

        At most one of ``preset`` (a name) and ``config_file`` (the path of a JSON or YAML file) is given. ``settings``
        (name → value) override the values of the preset or the file. ``name`` is the run's name; None takes the name in the
        preset or the file, or that of ``init_from``'s folder. ``given_in`` says where the settings come from, in errors.

        Raises:
            InputError: a name, a key or a value is not valid, or the backend is not installed.
        """
        if resume_step is not None and fresh:
            raise InputError("--resume_step resumes a run and --fresh begins one; give one of them")
        if progress not in PROGRESS:
            raise InputError(f"progress: {shown(progress)} is not one of {', '.join(PROGRESS)}")
        settings = dict(settings)
        given = frozenset(settings) | named_settings(config_file=None if preset else config_file)
        if read_ranks().size > 1 and preset is None and "backend" not in given:
            settings["backend"] = FSDP.name  # several ranks were started, and neither user nor preset names a backend
        if name is preset is config_file is None:
            name = name_after(settings.get("init_from"), runs_dir)
        folder = None if fresh else runs_dir / resolve(preset=preset, config_file=config_file, name=name).name
        settings, notes = with_initial(settings, preset=preset, config_file=config_file, folder=folder)
        if "init_from" in settings:
            given |= {"vocab_size"}  # its rows are the model's, whatever the data's tokenizer needs
        run = resolve(preset=preset, config_file=config_file, flags=settings, name=name, given_in=given_in)
        if name is not None:
            run = replace(run, name=name)  # an empty name too: check_name refuses it later, with the other bad names
        _check_paths(run)
        if "backend" not in run.auto:
            check_installed(run.parallel.backend)
        _check_trackers(run)
        return cls(
            run=run,
            runs_dir=runs_dir,
            fresh=fresh,
            given=given,
            stated=named_settings(preset),
            margin=MachineConfig.from_mapping({} if margin is None else {"margin": margin}, given_in).margin,
            allow_change=_known(allow_change),
            trust_checkpoint=trust_checkpoint,
            resume_step=resume_step,
            progress=progress,
            notes=notes,
        )

    @property
    def open(self) -> frozenset[str]:
        """Names of the settings that the planner chooses.

        These are every setting that is ``auto``; ``micro_batch`` unless the user gives it; and ``recompute`` unless the
        user or the preset gives it. If the backend is ``auto``, the planner also chooses the ZeRO stage and the shard size
        unless the user gives them, since those of a preset belong to the preset's backend.
        """
        by_default = PLANNED_BY_DEFAULT - self.given - (self.stated - {"micro_batch"})
        stage = {"zero_stage", "shard_size"} - self.given if "backend" in self.run.auto else frozenset()
        return self.run.auto | by_default | stage


def _check_paths(run: RunConfig) -> None:
    """Refuse paths that are not UTF-8, since the run's files are UTF-8 and could not name them.

    Raises:
        InputError: a path of the configuration is not UTF-8.
    """
    for path in (run.data.input_file, run.parallel.ds_config, run.train.init_from):
        if path is not None and any("\ud800" <= character <= "\udfff" for character in path):
            raise InputError(f"{shown(path)} is not UTF-8, and a run's files could not name it; rename it")


def _check_trackers(run: RunConfig) -> None:
    """Refuse trackers whose packages are missing. Only the first rank logs, so only it needs them.

    Raises:
        InputError: a package is not installed.
    """
    for name in run.train.trackers if ranks_or_alone().rank == 0 else ():
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name has no origin
            raise InputError(f"log_to {name}: the package is not installed here; run pip install 'scalegpt[{name}]'")


def _known(keys: str | Iterable[str]) -> frozenset[str]:
    """Return the names given to ``--allow_change``, trimmed and with underscores.

    Raises:
        InputError: a name is not that of a setting.
    """
    keys = keys.split(",") if isinstance(keys, str) else keys
    named = [key.strip().replace("-", "_") for key in keys if key.strip()]
    known = {DATA, *(key for section in SECTIONS.values() for key in section.settings())}
    for key in named:
        if key not in known:
            raise InputError(f"allow_change: unknown setting {shown(key)}{hint(key, known, 'scalegpt train --help')}")
    return frozenset(named)
