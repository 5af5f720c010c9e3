"""A decoder as parts in order: embeddings, blocks that are all alike, the final norm and the head."""

from scalegpt.architecture.parameters import Parameter, Shape
from scalegpt.architecture.parts import Block, Embedding, Head
from scalegpt.config import ModelConfig
from scalegpt.config.optimizers import EMBEDDING, MATRIX, VECTOR
from scalegpt.config.shape import AUTO_VOCAB
from scalegpt.errors import InputError

BLOCKS = "blocks."
"""What the names of the blocks' parameters begin with; the block's number follows."""


def kind_of(name: str, shape: Shape) -> str:
    """The kind of a parameter, by its name and shape."""
    if len(shape) == 1:
        return VECTOR
    return MATRIX if name.startswith(BLOCKS) else EMBEDDING


class Decoder:
    """The parts of a model, from ids to the loss: the embeddings, one of ``n_layer`` blocks, and the head."""

    def __init__(self, model: ModelConfig) -> None:
        self.model, self.embedding, self.block, self.head = model, Embedding(model), Block(model), Head(model)

    def before(self) -> list[Parameter]:
        """The parameters before the blocks.

        Raises:
            InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").
        """
        if self.model.vocab_size == AUTO_VOCAB:
            raise InputError(
                "vocab_size is auto, but the number of parameters depends on it; give a size, such as 50304 for gpt2"
            )
        return list(self.embedding.parameters())

    def inside(self) -> list[Parameter]:
        """The parameters of one block, by their names inside it."""
        return list(self.block.parameters())

    def after(self) -> list[Parameter]:
        """The parameters behind the blocks."""
        return list(self.head.parameters())


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The shape of every parameter by the module's own names, in the module's order.

    Raises:
        InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").
    """
    decoder = Decoder(model)
    before, after = ({each.name: each.shape for each in some} for some in (decoder.before(), decoder.after()))
    inside = [(each.name, each.shape) for each in decoder.inside()]
    blocks = {f"{BLOCKS}{i}.{name}": shape for i in range(model.n_layer) for name, shape in inside}
    return {**before, **blocks, **after}
