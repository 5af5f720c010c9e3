"""``scalegpt checkpoint``: look at a run's checkpoints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scalegpt.checkpoint.address import Place, place_of
from scalegpt.cli.output import aligned, show, show_json, show_row
from scalegpt.cli.parser import Parser, add_json, path_argument, run_action
from scalegpt.units import format_bytes

if TYPE_CHECKING:  # importing torch takes seconds; --help must not wait for it
    from scalegpt.checkpoint.inspection import Verdict

OVERVIEW = """\
scalegpt checkpoint: look at a run's checkpoints

example:
  scalegpt checkpoint list runs/tiny
  scalegpt checkpoint verify runs/tiny
  scalegpt checkpoint show runs/tiny/checkpoints/step_00001000

actions (each has --help):
  list      a run's checkpoints: step, size, held-out loss, whole or damaged
  verify    read every byte; name what is damaged (exit status 1)
  show      the contents of a checkpoint's manifest
  convert   the weights as one safetensors file: scalegpt export --to safetensors
"""


def main(argv: Sequence[str]) -> int:
    """Run ``list``, ``verify``, ``show`` or ``convert``; return the exit status.

    Raises:
        InputError: an action or a flag is unknown, or there is no checkpoint that can be used.
    """
    return run_action(argv, OVERVIEW, {"list": _list, "verify": _verify, "show": _show, "convert": _convert})


def _parser(action: str, summary: str, example: str) -> Parser:
    parser = Parser(f"checkpoint {action}", summary, example)
    parser.add_argument(
        "run", type=path_argument, metavar="RUN", help="a run's folder, or a checkpoint's; also at an address"
    )
    add_json(parser)
    return parser


def _list(words: list[str]) -> int:
    parser = _parser(
        "list",
        "List a run's checkpoints, reading every byte of each.\n"
        "The exit status is 0 even if some are damaged; verify then exits with 1.",
        "scalegpt checkpoint list runs/tiny",
    )
    arguments = parser.parse(words)
    from scalegpt.checkpoint.store import best_checkpoint
    from scalegpt.training.runs.find import examine_all, set_aside_in

    verdicts = examine_all(place_of(arguments.run))
    best = best_checkpoint([verdict.path for verdict in verdicts if verdict.is_whole])
    aside = [_set_aside(path) for path in set_aside_in(place_of(arguments.run))]
    if arguments.json:
        entries = [{**_entry(verdict), "best": verdict.path == best, "set_aside": False} for verdict in verdicts]
        show_json(entries + [{**_entry(each), "best": False, "set_aside": True} for each in aside])
        return 0
    rows: list[tuple[str, ...]] = [("checkpoint", "step", "size", "held-out loss", "state")]
    rows += [_row(verdict, is_best=verdict.path == best) for verdict in verdicts]
    show(aligned(rows, right={1, 2, 3}))
    for verdict in aside:
        show(*verdict.problems)
    return 0


def _set_aside(path: Place) -> "Verdict":
    """The line that says why training renamed (set aside) a checkpoint. The checkpoint is not examined."""
    from scalegpt.checkpoint.inspection import Verdict
    from scalegpt.checkpoint.store import REPLACED

    what, advice = "set aside as damaged", "delete it when you no longer need it"
    if f".{REPLACED}" in path.name:
        name = path.name.partition(".")[0]
        what, advice = "set aside by --resume_step", f"delete it, or rename it to {name} to use it"
    return Verdict(path, None, (f"{what}: {path}; ScaleGPT does not read it: {advice}",))


def _row(verdict: "Verdict", *, is_best: bool) -> tuple[str, ...]:
    entry = _entry(verdict)
    step = "-" if entry["step"] is None else f"{entry['step']:,}"
    size = "-" if entry["bytes"] is None else format_bytes(entry["bytes"])
    loss = "-" if entry["val_loss"] is None else f"{entry['val_loss']:.4f}"
    state = "; ".join(problem.replace(f"{verdict.path}/", "") for problem in verdict.problems)
    return verdict.path.name, step, size, loss, state or ("whole, the best" if is_best else "whole")


def _entry(verdict: "Verdict") -> dict[str, Any]:
    manifest = verdict.manifest
    progress = None if manifest is None else manifest.header.progress
    return {
        "checkpoint": str(verdict.path),
        **{key: getattr(progress, key, None) for key in ("step", "tokens", "val_loss")},
        "bytes": None if manifest is None else manifest.size,
        "files": None if manifest is None else len(manifest.files),
        "whole": verdict.is_whole,
        "problems": list(verdict.problems),
    }


def _verify(words: list[str]) -> int:
    parser = _parser(
        "verify",
        "Read every byte of a checkpoint, or of all checkpoints of a run; check the digests, and that every tensor is "
        "complete.\nThe exit status is 1 if something is damaged or cannot be read; list then still exits with 0.",
        "scalegpt checkpoint verify runs/tiny\nscalegpt checkpoint verify runs/tiny/checkpoints/step_00001000",
    )
    arguments = parser.parse(words)
    from scalegpt.training.runs.find import examine_all

    verdicts = examine_all(place_of(arguments.run))
    if arguments.json:
        show_json([_entry(verdict) for verdict in verdicts])
    else:
        for verdict in verdicts:
            for problem in verdict.problems:
                show(problem)
            if verdict.manifest is not None and verdict.is_whole:
                manifest = verdict.manifest
                files, size, tensors = len(manifest.files), format_bytes(manifest.size), len(manifest.tensors)
                show(f"{verdict.path} is whole: {files} files, {size}, {tensors} tensors")
    return 0 if all(verdict.is_whole for verdict in verdicts) else 1


def _show(words: list[str]) -> int:
    parser = _parser(
        "show",
        "Show the manifest of a checkpoint, or of a run's newest checkpoint; the other files are not read.",
        "scalegpt checkpoint show runs/tiny --json",
    )
    arguments = parser.parse(words)
    from scalegpt.checkpoint.inspection import summary
    from scalegpt.checkpoint.reader import read_manifest
    from scalegpt.training.runs.find import naming_earlier, with_newest

    def read(path: Place) -> dict[str, Any]:
        with naming_earlier(path):
            return summary(path, read_manifest(path))

    facts = with_newest(place_of(arguments.run), read)
    if arguments.json:
        show_json(facts)
        return 0
    model = facts["config"].get("model")
    rows = {
        "checkpoint": facts["checkpoint"],
        "run": facts["run"],
        "written by": _words(facts["written_by"]),
        "model": f"{facts['parameters']:,} parameters: {_words(model if isinstance(model, dict) else {})}",
        **{key.replace("_", " "): value for key, value in facts["progress"].items() if value is not None},
        "tokenizer": facts["tokenizer"],
        "data": facts["data"],
        "size": f"{format_bytes(facts['bytes'])} in {len(facts['files'])} files, {facts['pieces']:,} pieces",
    }
    for name, value in rows.items():
        show_row(f"{name:<15}", f"{value:,}" if isinstance(value, int) else value)
    return 0


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _convert(words: list[str]) -> int:
    """Do what ``scalegpt export --to safetensors`` does. This is its earlier name."""
    from scalegpt.cli.exchange.export import main as export

    return export([*words, "--to", "safetensors"])
