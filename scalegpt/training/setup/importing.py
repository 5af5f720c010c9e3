"""Makes a run from a model that was trained elsewhere.

Its weights become the checkpoint of step 0, which any command reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scalegpt import __version__
from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.backends import World
from scalegpt.backends.base import WEIGHT
from scalegpt.checkpoint import writer
from scalegpt.checkpoint.manifest import Header, Progress
from scalegpt.config.presets import as_file
from scalegpt.config.run import DataConfig
from scalegpt.config.tokenizer import is_file
from scalegpt.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from scalegpt.errors import InputError
from scalegpt.storage import check_space
from scalegpt.training.request import Request
from scalegpt.training.runs.directory import IMPORTED, RunDirectory
from scalegpt.training.runs.files import write_whole
from scalegpt.training.setup.origin import Opened, open_initial
from scalegpt.training.setup.resolve import check_name


def import_model(folder: Path, name: str, runs_dir: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Make the folder of a run from a Hugging Face folder, a run or a checkpoint, without training.

    Args:
        folder: the model.
        name: the name of the run.
        runs_dir: the folder of all runs.
        settings: settings of the run, for example ``block_size`` and ``tokenizer``.

    Returns:
        The run's folder.

    Raises:
        InputError: the model cannot be read, its tokenizer does not fit it, or the run exists. Nothing is left.
        RunError: the disk is full, or the run's folder cannot be written. Nothing is left.
    """
    check_name(name)
    request = Request.of(
        preset=None, config_file=None, name=name, settings={**(settings or {}), "init_from": str(folder)},
        runs_dir=runs_dir, fresh=True,
    )  # fmt: skip
    directory = RunDirectory(runs_dir / name)
    if directory.is_taken():
        raise InputError(f"{directory.path} exists already; choose another --model_name")
    opened = open_initial(request, World(0, 1, 0, 1, torch.device("cpu")))
    assert opened is not None
    tokenizer = opened.tokenizer or _tokenizer(request.run.data)
    if tokenizer.vocab_size > request.run.model.vocab_size:
        raise InputError(
            f"{folder}: its vocabulary has {request.run.model.vocab_size:,} rows, but the {tokenizer.kind} tokenizer has "
            f"{tokenizer.vocab_size:,} ids; give the --tokenizer of this model, or --vocab_size {tokenizer.vocab_size}"
        )
    shapes = parameter_shapes(request.run.model)
    check_space(runs_dir, sum(4 * torch.Size(shape).numel() for shape in shapes.values()))
    directory.lock()
    try:
        directory.create(request.run, None)
        _write(directory, request, opened, tokenizer)
    except BaseException:
        directory.abandon()
        raise
    finally:
        directory.unlock()
    return directory.path


def _tokenizer(data: DataConfig) -> Tokenizer:
    return (
        load_tokenizer(data.tokenizer, data.end_of_text) if is_file(data.tokenizer) else make_tokenizer(data.tokenizer)
    )


def _write(directory: RunDirectory, request: Request, opened: Opened, tokenizer: Tokenizer) -> None:
    run = request.run
    shapes = {f"{WEIGHT}/{name}": shape for name, shape in parameter_shapes(run.model).items()}
    size = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    written_by = {"imported_from": run.train.init_from, "scalegpt": __version__, "torch": torch.__version__}
    header = Header(
        Progress(step=0, tokens=0, seed=run.train.seed), as_file(run), tokenizer.as_dict(), None,
        directory.read_id() or "", written_by,
    )  # fmt: skip
    save = writer.begin(directory.checkpoints, 0, 1, size)
    writer.write_weights(save, shapes, lambda: opened.origin.weights(run.model))
    writer.commit(save, header, shapes)
    for name, content in {**tokenizer.files, **opened.kept}.items():
        write_whole(directory.path / name, content)
    directory.write_status(state=IMPORTED, step=0, cause=None)
