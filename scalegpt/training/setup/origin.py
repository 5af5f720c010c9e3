"""Open the model that a run starts from, ``init_from``. Every rank reads its tensors one at a time; none holds them all."""

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
    """The model that a run starts from, and its tokenizer; None where a folder does not say it.

    ``taken_over`` is what an export of the run takes over from where the model came from.
    """

    origin: Origin
    tokenizer: Tokenizer | None
    taken_over: TakenOver

    @property
    def kept(self) -> dict[str, bytes]:
        """The file that is kept in the run's folder: name → content; none if there is nothing to take over."""
        return {ORIGIN: self.taken_over.as_file()} if self.taken_over != TakenOver() else {}

    def check_tokenizer(self, run: RunConfig, made_by: Tokenizer) -> None:
        """Refuse tokens that another tokenizer has made than the model's.

        Raises:
            InputError: it is another one.
        """
        if self.tokenizer is not None and self.tokenizer.text_digest != made_by.text_digest:
            raise InputError(
                f"the tokens of {run.data.input_file} are not those of init_from {run.train.init_from}: they were made by "
                f"another tokenizer ({made_by.kind}, not {self.tokenizer.kind}); give the text itself, or name the tokenizer "
                "with --tokenizer to train with it all the same"
            )


def open_initial(request: Request, world: World) -> Opened | None:
    """Open and check what ``init_from`` names; all ranks must call it together.

    None if the run starts from random weights, or has a checkpoint to resume from: the folder is not read again then.

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
    return Opened(_of_checkpoint(stored), tokenizer, TakenOver.beside(found.parent.parent))


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
    return RunDirectory(request.runs_dir / request.run.name).newest_checkpoint() is not None
