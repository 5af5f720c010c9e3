"""Opens the model that ``init_from`` names. Every rank reads its tensors one at a time, so none holds them all."""

from dataclasses import dataclass
from pathlib import Path

from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.backends import World
from scalegpt.checkpoint.reader import Checkpoint
from scalegpt.config import ModelConfig, RunConfig
from scalegpt.data.tokenizers import Tokenizer
from scalegpt.errors import InputError
from scalegpt.interop.families import read_config
from scalegpt.interop.families.reading import is_hugging_face
from scalegpt.training.initial import check_exists
from scalegpt.training.request import Request
from scalegpt.training.runs.directory import RunDirectory
from scalegpt.training.runs.find import open_weights, with_newest
from scalegpt.weights.origin import Origin, open_folder, tokenizer_of
from scalegpt.weights.taken_over import ORIGIN, TakenOver


@dataclass(frozen=True)
class Opened:
    """The model from which a run starts, and its tokenizer; the tokenizer is None if the folder names none.

    ``taken_over`` holds the original model's settings that an export of the run copies.
    """

    origin: Origin
    tokenizer: Tokenizer | None
    taken_over: TakenOver

    @property
    def kept(self) -> dict[str, bytes]:
        """The file to store in the run's folder, as name → content; empty if there is nothing to take over."""
        return {ORIGIN: self.taken_over.as_file()} if self.taken_over != TakenOver() else {}

    def check_tokenizer(self, run: RunConfig, made_by: Tokenizer) -> None:
        """Refuse tokens that were not made by the model's tokenizer.

        Raises:
            InputError: another tokenizer made the tokens.
        """
        if self.tokenizer is not None and self.tokenizer.text_digest != made_by.text_digest:
            raise InputError(
                f"the tokens of {run.data.input_file} are not those of init_from {run.train.init_from}: they were made by "
                f"another tokenizer ({made_by.kind}, not {self.tokenizer.kind}); give the text itself, or name the tokenizer "
                "with --tokenizer to train with it all the same"
            )


def open_initial(request: Request, world: World) -> Opened | None:
    """Open and check the model that ``init_from`` names; all ranks must call it together.

    Returns None if the run starts from random weights or resumes from a checkpoint. In both cases no folder is read.

    Raises:
        InputError: the folder is missing, damaged, or of another shape than its configuration says.
    """
    named = request.run.train.init_from
    if named is None or world.on_first(lambda: not request.fresh and _has_checkpoint(request)):
        return None
    path = Path(named)
    is_given = "tokenizer" in request.given
    if is_hugging_face(path):
        read = read_config(path)
        tokenizer = None if is_given else tokenizer_of(read)
        digest = None if tokenizer is None else tokenizer.text_digest
        return Opened(open_folder(read), tokenizer, TakenOver.of(read, digest))
    check_exists(path)
    found = world.on_first(lambda: with_newest(path, lambda checkpoint: open_weights(checkpoint).path))
    stored = Checkpoint.open(found)
    stored.accept()  # rank 0 has verified the weights
    tokenizer = None if is_given else Tokenizer.from_dict(stored.manifest.header.tokenizer)
    return Opened(_of_checkpoint(stored), tokenizer, TakenOver.beside(found))


def _of_checkpoint(stored: Checkpoint) -> Origin:
    model = stored.section("model", ModelConfig)
    shapes = parameter_shapes(model)
    for name, shape in shapes.items():
        if stored.shape(name) != shape:
            raise InputError(
                f"{stored.path}: weight {name} has shape {stored.shape(name)}, but its configuration describes {shape}; use "
                "another checkpoint"
            )
    return Origin(model, lambda: ((name, stored.weight(name)) for name in shapes))


def _has_checkpoint(request: Request) -> bool:
    return RunDirectory.of(request.runs_dir, request.run).newest_checkpoint() is not None
