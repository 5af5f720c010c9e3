"""``scalegpt train``, also run by ``launch/train.py`` and ``python -m scalegpt.train``: reads the flags, prepares, trains."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scalegpt.cli.parser import Parser, add_settings, given_settings, path_argument
from scalegpt.config.aliases import hint
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import named_settings, resolve
from scalegpt.config.run import DATA, SECTIONS, DataConfig, ParallelConfig
from scalegpt.config.shape import ModelConfig
from scalegpt.config.train import TrainConfig
from scalegpt.errors import InputError
from scalegpt.system.invocation import train_command
from scalegpt.system.ranks import read_ranks
from scalegpt.system.streams import outlast_standard_streams
from scalegpt.text import brief, shown
from scalegpt.training.resilience.stopping import LauncherWatch, StopRequest

MOST_DIGITS = 18
"""Of a step that is given: what has more is none."""


def examples() -> str:
    """One command for each launcher, as they run in this installation."""
    return "\n".join(
        (
            f"{train_command()} --preset tiny --input_file my_text.txt",
            f"{train_command('torchrun', '--nproc_per_node', '8')} --preset 350M_1024 --input_file data/",
            f"{train_command('deepspeed')} --preset 500M_1024 --input_file data/",
        )
    )


def make_parser() -> Parser:
    """The trainer's flags: the run's own, and every setting of a preset."""
    parser = Parser("train", "Train a GPT. The same command resumes an unfinished run.", examples())
    run = parser.add_argument_group("run")
    run.add_argument("--preset", help="a named configuration, see `scalegpt presets`")
    run.add_argument(
        "--config_file", type=path_argument, metavar="FILE", help="a JSON or YAML file of the same form as a preset"
    )
    run.add_argument("--model_name", metavar="NAME", help="the run's folder in --runs_dir [the preset's name]")
    run.add_argument("--runs_dir", type=path_argument, default="runs", metavar="DIR", help="folder of all runs [runs]")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto: CUDA if there is any]")
    run.add_argument("--fresh", action="store_true", help="start anew, beside an earlier run of the same name")
    run.add_argument(
        "--trust_checkpoint", action="store_true", help="go on from a checkpoint that this run did not write itself"
    )
    run.add_argument(
        "--resume_step", metavar="N", help="go back: resume from the checkpoint of step N, and set later ones aside"
    )
    run.add_argument(
        "--margin", metavar="X", help="share of a GPU's memory that a chosen micro batch leaves free [0.03]"
    )
    run.add_argument(
        "--allow_change",
        metavar="KEY[,KEY…]",
        help=f"settings that the run may have otherwise when it goes on; {DATA} and tokenizer: the tokens too",
    )
    # The deepspeed launcher adds this flag; the ranks are read from the environment, which it sets too.
    run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    add_settings(parser, "data", DataConfig)
    add_settings(parser, "parallel layout", ParallelConfig)
    add_settings(parser, "training", TrainConfig)
    add_settings(parser, "model", ModelConfig)
    return parser


def main(argv: Sequence[str]) -> int:
    """Train to the end and return 0, or 128 and the number of the signal that stopped it."""
    stop = StopRequest()
    launcher = LauncherWatch(stop)  # first of all: a launcher that has ended by now leaves no other trace
    arguments = make_parser().parse(argv)
    outlast_standard_streams()
    flags = given_settings(arguments, *SECTIONS.values())
    margin = MachineConfig.from_mapping({"margin": arguments.margin} if arguments.margin else {}, "command line").margin
    given = frozenset(flags) | named_settings(config_file=None if arguments.preset else arguments.config_file)
    ranks = read_ranks()
    if ranks.size > 1 and arguments.preset is None and "backend" not in given:
        flags["backend"] = "fsdp"  # several ranks were started, and no backend is named
    allowed = _allowed(arguments.allow_change)
    resume_step = _resume_step(arguments.resume_step, fresh=arguments.fresh)
    # Everything that needs no torch is checked before torch is imported.
    run = resolve(preset=arguments.preset, config_file=arguments.config_file, flags=flags, name=arguments.model_name)
    if arguments.model_name is not None:
        run = replace(run, name=arguments.model_name)  # an empty one too, which is refused with the other bad names
    for path in (run.data.input_file, run.parallel.ds_config):
        if path is not None and any("\ud800" <= character <= "\udfff" for character in path):
            raise InputError(f"{shown(path)} is not UTF-8, and a run's files could not name it; rename it")
    with stop.listening():
        with stop.alone():  # importing torch takes seconds
            launcher.start()
            from scalegpt.training.run import train
            from scalegpt.training.setup.resolve import Request

        request = Request(
            run=run,
            runs_dir=Path(arguments.runs_dir),
            fresh=arguments.fresh,
            given=given,
            stated=named_settings(arguments.preset),
            margin=margin,
            allow_change=allowed,
            trust_checkpoint=arguments.trust_checkpoint,
            resume_step=resume_step,
        )
        try:
            status = train(request, arguments.device, stop)
        finally:
            launcher.stop()
    if run.train.max_iters == 0 and ranks.rank == 0:
        print("no step was taken: max_iters is 0; give a larger --max_iters to train", flush=True)
    return status


def _allowed(text: str | None) -> frozenset[str]:
    """The keys of ``--allow_change``.

    Raises:
        InputError: one of them is no setting.
    """
    keys = [key.strip().replace("-", "_") for key in (text or "").split(",") if key.strip()]
    known = {DATA, *(key for section in SECTIONS.values() for key in section.settings())}
    for key in keys:
        if key not in known:
            raise InputError(f"allow_change: unknown setting {shown(key)}{hint(key, known, 'scalegpt train --help')}")
    return frozenset(keys)


def _resume_step(text: str | None, *, fresh: bool) -> int | None:
    """The step of ``--resume_step``.

    Raises:
        InputError: it is no step, or the run is to start anew.
    """
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > MOST_DIGITS:
        raise InputError(f"resume_step: {brief(text, 40)} is not the step of a checkpoint; give a number such as 1000")
    if fresh:
        raise InputError("--resume_step resumes a run and --fresh begins one; give one of them")
    return int(text)
