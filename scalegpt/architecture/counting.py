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

Everything is counted from the parts of :mod:`scalegpt.architecture`, which list the tensors by the module's own names;
the closed forms and the module itself are what the tests hold the counts to.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.architecture.decoder import Decoder
from scalegpt.architecture.parameters import Parameter, formula
from scalegpt.config import ModelConfig
from scalegpt.units import BYTES

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


@lru_cache(maxsize=1024)
def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model exactly, part by part; a shared matrix counts once.

    All blocks are alike, so that one is counted and multiplied: the time does not grow with the depth.

    Raises:
        InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").

    """
    outer, layer = _by_part(model)
    return ParameterCount(
        token_embedding=_numel(outer, "token embedding"),
        position_embedding=_numel(outer, "position embedding"),
        layer=LayerParameters(
            attention=_numel(layer, "attention"),
            feed_forward=_numel(layer, "feed-forward"),
            norms=_numel(layer, "norms"),
        ),
        n_layer=model.n_layer,
        final_norm=_numel(outer, "final norm"),
        head=_numel(outer, "head"),
        head_is_shared=model.tie_head,
    )


def weight_bytes(parameters: int) -> dict[str, int]:
    """Return the bytes that so many weights take, by dtype."""
    return {dtype: BYTES[dtype] * parameters for dtype in WEIGHT_DTYPES}


def closed_form(model: ModelConfig) -> str:
    """Return the formula for a model of this kind in symbols."""
    decoder = Decoder(model)
    outer = [formula([each]) for each in decoder.before()]
    layer, norm = formula(decoder.inside()), formula(decoder.head.norm.parameters())
    head = [formula([each]) for each in decoder.after() if each.part == "head"]
    return "P = " + " + ".join([*outer, f"L·({layer})", norm, *head])


def formula_steps(model: ModelConfig) -> list[FormulaStep]:
    """Return the closed form one part at a time, with the model's numbers put in.

    The indented parts add up to "one layer"; the embeddings, all layers, the final norm and the head to the total.

    Raises:
        InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").

    """
    outer, layer = _by_part(model)
    whole = [parameter for some in layer.values() for parameter in some]
    size = sum(parameter.numel for parameter in whole)
    before = [part for part in outer if part.endswith("embedding")]
    symbols = {**{part: formula(some) for part, some in outer.items()}, "head": formula(outer.get("head", []))}
    steps = [(part, symbols[part], _numel(outer, part)) for part in before]
    steps += [(f"  {_title(part)}", formula(some), sum(each.numel for each in some)) for part, some in layer.items()]
    steps += [("one layer", formula(whole), size), ("all layers", f"L·({formula(whole)})", model.n_layer * size)]
    steps += [(part, symbols[part], _numel(outer, part)) for part in ("final norm", "head")]
    sizes = {"V": model.vocab_size, "T": model.block_size, "H": model.n_embd, "L": model.n_layer}
    return [
        FormulaStep(part=part, symbols=text, numbers="".join(str(sizes.get(c, c)) for c in text), value=value)
        for part, text, value in steps
    ]


def _title(part: str) -> str:
    return "two norms" if part == "norms" else part


def _by_part(model: ModelConfig) -> tuple[dict[str, list[Parameter]], dict[str, list[Parameter]]]:
    """The parameters outside of the blocks and those of one block, by the part that they belong to, in order."""
    decoder = Decoder(model)
    outer, layer = defaultdict[str, list[Parameter]](list), defaultdict[str, list[Parameter]](list)
    for parameter in (*decoder.before(), *decoder.after()):
        outer[parameter.part].append(parameter)
    for parameter in sorted(decoder.inside(), key=lambda each: each.part == "norms"):
        layer[parameter.part].append(parameter)
    return dict(outer), dict(layer)


def _numel(parts: dict[str, list[Parameter]], prefix: str) -> int:
    """The elements of all parts whose names begin with the prefix."""
    return sum(each.numel for part, some in parts.items() if part.startswith(prefix) for each in some)
