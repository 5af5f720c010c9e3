"""``scalegpt train``, which ``launch/train.py`` is too: reads the flags, prepares, trains."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scalegpt.cli.parser import Parser, add_settings, given_settings
from scalegpt.config.machine import MachineConfig
from scalegpt.config.presets import load_config_file, load_preset, resolve
from scalegpt.config.run import DATA, SECTIONS, DataConfig, ParallelConfig
from scalegpt.config.shape import ModelConfig
from scalegpt.config.train import TrainConfig
from scalegpt.errors import InputError, nearest
from scalegpt.streams import outlast_standard_streams

EXAMPLE = """\
python launch/train.py --preset tiny --input_file my_text.txt
torchrun --nproc_per_node 8 launch/train.py --preset 350M_1024 --input_file data/
deepspeed launch/train.py --preset 500M_1024 --input_file data/"""


def make_parser() -> Parser:
    """The trainer's flags: the run's own, and every setting of a preset."""
    parser = Parser("train", "Train a GPT. The same command resumes an unfinished run.", EXAMPLE)
    run = parser.add_argument_group("run")
    run.add_argument("--preset", help="a named configuration, see `scalegpt presets`")
    run.add_argument("--config_file", metavar="FILE", help="a JSON or YAML file of the same form as a preset")
    run.add_argument("--model_name", metavar="NAME", help="the run's folder in --runs_dir [the preset's name]")
    run.add_argument("--runs_dir", default="runs", metavar="DIR", help="folder of all runs [runs]")
    run.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[auto: CUDA if there is any]")
    run.add_argument("--fresh", action="store_true", help="start anew, beside an earlier run of the same name")
    run.add_argument(
        "--trust_checkpoint", action="store_true", help="go on from a checkpoint that this run did not write itself"
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
    arguments = make_parser().parse(argv)
    outlast_standard_streams()
    flags = given_settings(arguments, *SECTIONS.values())
    margin = MachineConfig.from_mapping({"margin": arguments.margin} if arguments.margin else {}, "command line").margin
    values = load_config_file(arguments.config_file) if arguments.config_file and not arguments.preset else {}
    given = {*flags, *_keys(values)}
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and arguments.preset is None and "backend" not in {*flags, *values}:
        flags["backend"] = "fsdp"  # several ranks were started, and nobody said what for
    allowed = _allowed(arguments.allow_change)
    # Everything that needs no torch is checked before torch is imported.
    run = resolve(preset=arguments.preset, config_file=arguments.config_file, flags=flags, name=arguments.model_name)
    if arguments.model_name is not None:
        run = replace(run, name=arguments.model_name)  # an empty one too, which is refused with the other bad names
    from scalegpt.training.run import train
    from scalegpt.training.setup import Request

    request = Request(
        run=run,
        runs_dir=Path(arguments.runs_dir),
        fresh=arguments.fresh,
        given=frozenset(given),
        stated=_stated(arguments.preset),
        margin=margin,
        allow_change=allowed,
        trust_checkpoint=arguments.trust_checkpoint,
    )
    status = train(request, arguments.device)
    if run.train.max_iters == 0 and os.environ.get("RANK", "0") == "0":
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
            raise InputError(f"allow_change: unknown setting {key!r}{nearest(key, known, 'scalegpt train --help')}")
    return frozenset(keys)


def _keys(values: dict[str, Any]) -> set[str]:
    """The settings that a configuration file names."""
    return {key for part in values.values() if isinstance(part, dict) for key in part}


def _stated(preset: str | None) -> frozenset[str]:
    """The settings that a preset names."""
    return frozenset() if preset is None else frozenset(_keys(load_preset(preset)))
