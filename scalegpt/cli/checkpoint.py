"""``scalegpt checkpoint``: look at a run's checkpoints, and write their weights to one file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalegpt.cli.output import aligned, show, show_json, show_row
from scalegpt.cli.parser import Parser, add_json, path_argument, run_action
from scalegpt.errors import InputError
from scalegpt.units import format_bytes

if TYPE_CHECKING:  # importing torch takes seconds; --help must not wait for it
    from scalegpt.checkpoint.inspection import Verdict

OVERVIEW = """\
scalegpt checkpoint: look at a run's checkpoints, and write their weights to one file

example:
  scalegpt checkpoint list runs/tiny
  scalegpt checkpoint verify runs/tiny
  scalegpt checkpoint show runs/tiny/checkpoints/step_00001000
  scalegpt checkpoint convert runs/tiny --out tiny.safetensors --dtype bf16

actions (each has --help):
  list      a run's checkpoints: step, size, held-out loss, whole or damaged
  verify    read every byte; name what is damaged (exit status 1)
  show      the contents of a checkpoint's manifest
  convert   the weights as one safetensors file
"""

OTHER_FORMATS = {
    "llama.cpp's format": ".gguf .ggml",
    "a pickle": ".bin .pt .pth .ckpt .pkl .pickle",
    "ONNX": ".onnx",
    "TensorFlow Lite": ".tflite",
    "HDF5": ".h5 .hdf5",
    "Keras": ".keras",
    "a format of NumPy": ".npz .npy",
    "Flax's msgpack": ".msgpack",
    "Core ML": ".mlmodel",
    "a ZIP archive": ".zip",
    "JSON": ".json",
}
"""File format of another program → the file name endings that mean it."""


def main(argv: Sequence[str]) -> int:
    """Run ``list``, ``verify``, ``show`` or ``convert``; return the exit status.

    Raises:
        InputError: an action or a flag is unknown, or there is no checkpoint that can be used.
    """
    return run_action(argv, OVERVIEW, {"list": _list, "verify": _verify, "show": _show, "convert": _convert})


def _parser(action: str, summary: str, example: str) -> Parser:
    parser = Parser(f"checkpoint {action}", summary, example)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run's folder, or a checkpoint's")
    add_json(parser)
    return parser


def _list(words: list[str]) -> int:
    parser = _parser(
        "list",
        "List a run's checkpoints, reading every byte of each.\n"
        "The exit status is 0 even if some are damaged; use verify for an exit status of 1.",
        "scalegpt checkpoint list runs/tiny",
    )
    arguments = parser.parse(words)
    from scalegpt.checkpoint.store import best_checkpoint
    from scalegpt.training.runs.find import examine_all, set_aside_in

    verdicts = examine_all(Path(arguments.run))
    best = best_checkpoint([verdict.path for verdict in verdicts if verdict.is_whole])
    aside = [_set_aside(path) for path in set_aside_in(Path(arguments.run))]
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


def _set_aside(path: Path) -> "Verdict":
    """The verdict on a checkpoint that training renamed (set aside): why it was renamed; the checkpoint is not examined."""
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
        "complete.\nThe exit status is 1 if something is damaged or cannot be read; that of list is 0 even then.",
        "scalegpt checkpoint verify runs/tiny\nscalegpt checkpoint verify runs/tiny/checkpoints/step_00001000",
    )
    arguments = parser.parse(words)
    from scalegpt.training.runs.find import examine_all

    verdicts = examine_all(Path(arguments.run))
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
    from scalegpt.inference.load import naming_earlier
    from scalegpt.training.runs.find import with_newest

    def read(path: Path) -> dict[str, Any]:
        with naming_earlier(path):
            return summary(path, read_manifest(path))

    facts = with_newest(Path(arguments.run), read)
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
    parser = _parser(
        "convert",
        "Write the weights of a checkpoint, or of a run's newest checkpoint, as one safetensors file under canonical names.",
        "scalegpt checkpoint convert runs/tiny --out tiny.safetensors\n"
        "scalegpt checkpoint convert runs/tiny --out tiny.safetensors --dtype bf16",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="the file to make")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="dtype of the weights [fp32]")
    arguments = parser.parse(words)
    run, out = Path(arguments.run), Path(arguments.out)
    _check_ending(out)
    from scalegpt.checkpoint.inspection import convert
    from scalegpt.inference.load import open_weights
    from scalegpt.training.runs.find import with_newest

    path, written = with_newest(run, lambda path: (path, convert(open_weights(path), out, arguments.dtype)))
    if arguments.json:
        facts = {"checkpoint": str(path), "out": arguments.out, "dtype": arguments.dtype}
        show_json({**facts, "bytes": written.bytes, "sha256": written.sha256})
    else:
        show(f"{arguments.out}: {arguments.dtype} weights of {path}, {format_bytes(written.bytes)}")
    return 0


def _check_ending(out: Path) -> None:
    """Refuse an output file whose ending, such as ``.pt``, means another format than safetensors.

    Raises:
        InputError: the ending means another format; the message proposes another name for ``--out``.
    """
    for meaning, endings in OTHER_FORMATS.items():
        if out.suffix.lower() in endings.split():
            raise InputError(
                f"out {out}: {out.suffix} means {meaning}, and convert writes safetensors; use "
                f"--out {out.with_suffix('.safetensors')}, which converters for other formats read"
            )
