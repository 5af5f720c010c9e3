"""A decoder as parts in order: embeddings, blocks that are all alike, the final norm and the head."""

from scalegpt.architecture.parameters import Parameter, Shape
from scalegpt.architecture.parts import Block, Embedding, Head
from scalegpt.config import ModelConfig
from scalegpt.config.optimizers import EMBEDDING, MATRIX, VECTOR
from scalegpt.config.shape import AUTO_VOCAB
from scalegpt.errors import InputError

BLOCKS = "blocks."
"""Prefix of the names of all blocks' parameters; the block's number follows it."""


def kind_of(name: str, shape: Shape) -> str:
    """The kind of a parameter, for optimizers: ``VECTOR``, ``MATRIX`` (in a block) or ``EMBEDDING`` (embeddings and head)."""
    if len(shape) == 1:
        return VECTOR
    return MATRIX if name.startswith(BLOCKS) else EMBEDDING


class Decoder:
    """The parts of a model: the embeddings, one block that stands for all ``n_layer``, and the head."""

    def __init__(self, model: ModelConfig) -> None:
        self.model, self.embedding, self.block, self.head = model, Embedding(model), Block(model), Head(model)

    def before(self) -> list[Parameter]:
        """The parameters before the blocks: token and position embedding.

        Raises:
            InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").
        """
        if self.model.vocab_size == AUTO_VOCAB:
            raise InputError(
                "vocab_size is auto, but the number of parameters depends on it; give a size, for example 50304 for gpt2"
            )
        return list(self.embedding.parameters())

    def inside(self) -> list[Parameter]:
        """The parameters of one block, with their names inside the block."""
        return list(self.block.parameters())

    def after(self) -> list[Parameter]:
        """The parameters after the blocks: the final norm, and the head's matrix unless it is shared with the embedding."""
        return list(self.head.parameters())


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Name → shape of every parameter, with the names and in the order of the torch module.

    Raises:
        InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").
    """
    decoder = Decoder(model)
    before, after = ({each.name: each.shape for each in some} for some in (decoder.before(), decoder.after()))
    inside = [(each.name, each.shape) for each in decoder.inside()]
    blocks = {f"{BLOCKS}{i}.{name}": shape for i in range(model.n_layer) for name, shape in inside}
    return {**before, **blocks, **after}
