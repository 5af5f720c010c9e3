"""How many parameters a model has, tensor by tensor, and the memory of its weights.

Symbols: L = n_layer, H = n_embd, T = block_size, V = vocab_size, P = all parameters.

A linear layer from m to n features has m·n weights and, with biases, n more; a layer norm has H weights and, with
biases, H more. The parts of the model, weights first, then what biases add::

    token embedding        V·H
    position embedding     T·H
    per layer
      attention, qkv       3·H²    + 3·H       H features to 3H: queries, keys and values of all heads
      attention, proj      H²      + H
      feed-forward, fc     4·H²    + 4·H
      feed-forward, proj   4·H²    + H
      two norms            2·H     + 2·H
    final norm             H       + H
    head                   0 when it shares the token embedding, else V·H; never a bias

One layer adds up to (3 + 1 + 4 + 4)·H² = 12·H² in matrices, 2·H in norm weights and, with biases,
(3 + 1 + 4 + 1 + 2)·H = 11·H more. Hence the closed forms::

    without biases   P = V·H + T·H + L·(12·H² +  2·H) +   H   (+ V·H when the head is untied)
    with biases      P = V·H + T·H + L·(12·H² + 13·H) + 2·H   (+ V·H when the head is untied)

The heads do not appear: they divide the width and add nothing. The second form gives the published sizes of GPT-2
(Radford et al. 2019): 124,439,808, 354,823,168, 774,030,080 and 1,557,611,200. An often-copied breakdown counts 6,144
norm parameters in a layer 768 wide without biases; two norms of 768 weights are 1,536.

Everything is counted from :func:`parameter_shapes`, which lists the tensors by the module's own names; the closed forms
and the module itself are what the tests hold the counts to.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.config import ModelConfig
from scalegpt.config.shape import AUTO_VOCAB
from scalegpt.errors import InputError
from scalegpt.planner.sizes import BYTES

Shape = tuple[int, ...]

_DECIMAL_UNITS = ("kB", "MB", "GB", "TB")
_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB")

WEIGHT_DTYPES = ("fp32", "bf16")
"""The dtypes that weights are trained and handed on in."""


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """The parameters of one transformer block."""

    attention: int
    feed_forward: int
    norms: int

    @property
    def total(self) -> int:
        """Return the parameters of the whole block."""
        return self.attention + self.feed_forward + self.norms


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """The parameters of a model by part. Made by :func:`count_parameters`."""

    token_embedding: int
    position_embedding: int
    layer: LayerParameters
    n_layer: int
    final_norm: int
    head: int
    """What the head adds: 0 where it shares the token embedding's matrix."""
    head_is_shared: bool

    @property
    def all_layers(self) -> int:
        """Return the parameters of all blocks together."""
        return self.n_layer * self.layer.total

    @property
    def total(self) -> int:
        """Return the parameters of the model; a shared matrix counts once."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the parts that add up to the total, in the order in which tokens meet them."""
        return {
            "token_embedding": self.token_embedding,
            "position_embedding": self.position_embedding,
            "all_layers": self.all_layers,
            "final_norm": self.final_norm,
            "head": self.head,
        }

    def share(self, parameters: int) -> float:
        """Return a part's share of the total, from 0 to 1."""
        return parameters / self.total


@dataclass(frozen=True, kw_only=True)
class FormulaStep:
    """One line of the closed form: a part in symbols, with the numbers put in, and what it comes to."""

    part: str
    symbols: str
    numbers: str
    value: int


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every parameter by the module's own names, in the module's order.

    Raises:
        InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").

    """
    before, after = _outer_shapes(model)
    layer = _layer_shapes(model)
    blocks = {f"blocks.{i}.{name}": shape for i in range(model.n_layer) for name, shape in layer.items()}
    return {**before, **blocks, **after}


@lru_cache(maxsize=1024)
def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model exactly, part by part; a shared matrix counts once.

    All blocks are alike, so that one is counted and multiplied: the time does not grow with the depth.

    Raises:
        InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").

    """
    before, after = _outer_shapes(model)
    outer = {**before, **after}
    layer = _layer_shapes(model)
    return ParameterCount(
        token_embedding=_numel(outer, "wte."),
        position_embedding=_numel(outer, "wpe."),
        layer=LayerParameters(
            attention=_numel(layer, "attn."), feed_forward=_numel(layer, "mlp."), norms=_numel(layer, "ln")
        ),
        n_layer=model.n_layer,
        final_norm=_numel(outer, "ln_f."),
        head=_numel(outer, "head."),
        head_is_shared=model.tie_head,
    )


def weight_bytes(parameters: int) -> dict[str, int]:
    """Return the bytes that so many weights take, by dtype."""
    return {dtype: BYTES[dtype] * parameters for dtype in WEIGHT_DTYPES}


def closed_form(model: ModelConfig) -> str:
    """Return the formula for a model of this kind in symbols, as the module's docstring derives it."""
    layer, final = _layer_and_norm_symbols(model)
    untied = "" if model.tie_head else " + V·H"
    return f"P = V·H + T·H + L·({layer}) + {final}{untied}"


def formula_steps(model: ModelConfig) -> list[FormulaStep]:
    """Return the closed form one part at a time, with the model's numbers put in.

    The indented parts add up to "one layer"; the embeddings, all layers, the final norm and the head to the total.

    Raises:
        InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").

    """
    count, tensors, bias = count_parameters(model), _layer_shapes(model), model.bias
    layer, final = _layer_and_norm_symbols(model)
    parts = [
        ("token embedding", "V·H", count.token_embedding),
        ("position embedding", "T·H", count.position_embedding),
        ("  attention, qkv", "3·H² + 3·H" if bias else "3·H²", _numel(tensors, "attn.qkv.")),
        ("  attention, proj", "H² + H" if bias else "H²", _numel(tensors, "attn.proj.")),
        ("  feed-forward, fc", "4·H² + 4·H" if bias else "4·H²", _numel(tensors, "mlp.fc.")),
        ("  feed-forward, proj", "4·H² + H" if bias else "4·H²", _numel(tensors, "mlp.proj.")),
        ("  two norms", "4·H" if bias else "2·H", count.layer.norms),
        ("one layer", layer, count.layer.total),
        ("all layers", f"L·({layer})", count.all_layers),
        ("final norm", final, count.final_norm),
        ("head", "0" if model.tie_head else "V·H", count.head),
    ]
    sizes = {"V": model.vocab_size, "T": model.block_size, "H": model.n_embd, "L": model.n_layer}
    return [
        FormulaStep(part=part, symbols=symbols, numbers="".join(str(sizes.get(c, c)) for c in symbols), value=value)
        for part, symbols, value in parts
    ]


def _layer_and_norm_symbols(model: ModelConfig) -> tuple[str, str]:
    """Return the symbols of one layer and of the final norm."""
    return ("12·H² + 13·H", "2·H") if model.bias else ("12·H² + 2·H", "H")


def format_bytes(count: int) -> str:
    """Write a size in decimal and in binary units: GB is 10⁹ bytes, GiB is 2³⁰.

    >>> format_bytes(610_765_824)
    '610.77 MB (582.47 MiB)'
    """
    return f"{_scaled(count, 1000, _DECIMAL_UNITS)} ({_scaled(count, 1024, _BINARY_UNITS)})"


def _scaled(count: int, base: int, units: tuple[str, ...]) -> str:
    if count < base:
        return f"{count} B"
    power = 1
    # Compared as it will be printed: 999.999 MB would read 1000.00 MB, so it is 1.00 GB.
    while power < len(units) and round(count / base**power, 2) >= base:
        power += 1
    return f"{count / base**power:.2f} {units[power - 1]}"


def _outer_shapes(model: ModelConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return the tensors before the blocks and those after them."""
    if model.vocab_size == AUTO_VOCAB:
        raise InputError(
            "vocab_size is auto: the parameters depend on it; give the tokenizer's, such as 50304 for gpt2"
        )
    width = model.n_embd
    before: dict[str, Shape] = {"wte.weight": (model.vocab_size, width), "wpe.weight": (model.block_size, width)}
    after = _norm_shapes("ln_f", model)
    if not model.tie_head:
        after["head.weight"] = (model.vocab_size, width)
    return before, after


def _layer_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Return the tensors of one block, by their names inside it."""
    width = model.n_embd
    return {
        **_norm_shapes("ln1", model),
        **_linear_shapes("attn.qkv", width, 3 * width, model.bias),
        **_linear_shapes("attn.proj", width, width, model.bias),
        **_norm_shapes("ln2", model),
        **_linear_shapes("mlp.fc", width, 4 * width, model.bias),
        **_linear_shapes("mlp.proj", 4 * width, width, model.bias),
    }


def _linear_shapes(name: str, inputs: int, outputs: int, bias: bool) -> dict[str, Shape]:
    """Return a linear layer's tensors; torch stores the matrix as outputs by inputs."""
    weight: dict[str, Shape] = {f"{name}.weight": (outputs, inputs)}
    return {**weight, f"{name}.bias": (outputs,)} if bias else weight


def _norm_shapes(name: str, model: ModelConfig) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (model.n_embd,)}
    return {**weight, f"{name}.bias": (model.n_embd,)} if model.bias else weight


def _numel(shapes: dict[str, Shape], prefix: str) -> int:
    """Return the numbers in all tensors whose names begin with the prefix."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
