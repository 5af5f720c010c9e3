"""The shapes of a model's parameters, grouped as the memory predictions need them."""

import math
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.architecture.decoder import Decoder, parameter_shapes
from scalegpt.architecture.parameters import Shape
from scalegpt.architecture.parts import POSITIONS
from scalegpt.config import ModelConfig


@lru_cache(maxsize=4096)
def numel(shape: Shape) -> int:
    """The number of elements of a shape."""
    return math.prod(shape)


@dataclass(frozen=True)
class ModelShapes:
    """The shapes of a model's parameters, grouped once and cached, since a search asks for the same models many times.

    Attributes:
        shapes: name → shape of every parameter.
        groups: the shapes of matrices, which get weight decay, and of vectors, which get none; in the model's order.
        block: the shapes in one block; all blocks are alike.
        vectors: the shapes of one block's norms and biases.
        root: the shapes outside the blocks.
        positions: the shape of the position embedding; None: positions are not learned.
        last_norm: the shapes of the final norm's vectors.
        largest: the number of elements of the largest parameter.
    """

    shapes: dict[str, Shape]
    groups: tuple[tuple[Shape, ...], tuple[Shape, ...]]
    block: tuple[Shape, ...]
    vectors: tuple[Shape, ...]
    root: tuple[Shape, ...]
    positions: Shape | None
    last_norm: tuple[Shape, ...]
    largest: int

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, model: ModelConfig) -> "ModelShapes":
        """The shapes of a model's parameters.

        Raises:
            InputError: the size of the model's vocabulary is not known.
        """
        decoder, shapes = Decoder(model), parameter_shapes(model)
        block = tuple(each.shape for each in decoder.inside())
        root = {each.name: each.shape for each in (*decoder.before(), *decoder.after())}
        return cls(
            shapes=shapes,
            groups=(
                tuple(shape for shape in shapes.values() if len(shape) > 1),
                tuple(shape for shape in shapes.values() if len(shape) == 1),
            ),
            block=block,
            vectors=tuple(shape for shape in block if len(shape) == 1),
            root=tuple(root.values()),
            positions=root.get(POSITIONS),
            last_norm=tuple(shape for shape in root.values() if len(shape) == 1),
            largest=max(map(numel, shapes.values())),
        )
