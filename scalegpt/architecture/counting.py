"""How many parameters a model has, part by part, and the memory of its weights.

The counts come from the parts of :mod:`scalegpt.architecture`, which list every parameter by its name in the torch module.
Tests compare the counts with the torch module, with closed forms written in the tests, and with the published sizes of GPT-2
(Radford et al. 2019). docs/PARAMETER_CALCULATION.md derives the closed form.

Symbols: L = n_layer, P = the number of all parameters, and the symbols in
:data:`~scalegpt.architecture.parameters.SYMBOLS`.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from scalegpt.architecture.decoder import Decoder
from scalegpt.architecture.parameters import Parameter, formula
from scalegpt.config import ModelConfig
from scalegpt.units import BYTES

WEIGHT_DTYPES = ("fp32", "bf16")
"""The dtypes in which weights are trained and exported."""


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """The numbers of parameters of one transformer block, by part."""

    attention: int
    feed_forward: int
    norms: int

    @property
    def total(self) -> int:
        """The number of parameters of the whole block."""
        return self.attention + self.feed_forward + self.norms


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """The numbers of parameters of a model, by part. Made by :func:`count_parameters`."""

    token_embedding: int
    position_embedding: int
    layer: LayerParameters
    n_layer: int
    final_norm: int
    head: int
    """Parameters of the head's own matrix; 0 if the head uses the token embedding's matrix."""
    head_is_shared: bool

    @property
    def all_layers(self) -> int:
        """The number of parameters of all blocks together."""
        return self.n_layer * self.layer.total

    @property
    def total(self) -> int:
        """The number of parameters of the model; a matrix that head and token embedding share counts once."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Part → its number of parameters, in the model's order; the numbers add up to the total."""
        return {
            "token_embedding": self.token_embedding,
            "position_embedding": self.position_embedding,
            "all_layers": self.all_layers,
            "final_norm": self.final_norm,
            "head": self.head,
        }

    def share(self, parameters: int) -> float:
        """``parameters`` as a share of the total, from 0 to 1."""
        return parameters / self.total


@dataclass(frozen=True, kw_only=True)
class FormulaStep:
    """One line of the closed form: a part's name, its formula in symbols and in numbers, and its number of parameters."""

    part: str
    symbols: str
    numbers: str
    value: int


@lru_cache(maxsize=1024)
def count_parameters(model: ModelConfig) -> ParameterCount:
    """Count the parameters of a model, part by part; a matrix that head and token embedding share counts once.

    All blocks are alike, so one block is counted and multiplied, and the time does not grow with the depth.

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
    """Dtype → the bytes of ``parameters`` weights in this dtype."""
    return {dtype: BYTES[dtype] * parameters for dtype in WEIGHT_DTYPES}


def closed_form(model: ModelConfig) -> str:
    """The formula of P in symbols for this model's biases and head, for example ``P = V·H + T·H + L·(12·H² + 2·H) + H``."""
    decoder = Decoder(model)
    outer = [formula([each]) for each in decoder.before()]
    layer, norm = formula(decoder.inside()), formula(decoder.head.norm.parameters())
    head = [formula([each]) for each in decoder.after() if each.part == "head"]
    return "P = " + " + ".join([*outer, f"L·({layer})", norm, *head])


def formula_steps(model: ModelConfig) -> list[FormulaStep]:
    """The lines of the closed form, one for each part of the model, with the model's numbers filled in.

    The indented lines add up to "one layer". The embeddings, "all layers", the final norm and the head add up to the
    total.

    Raises:
        InputError: the vocabulary's size is not known yet (``vocab_size`` 0, "auto").
    """
    outer, layer = _by_part(model)
    whole = [parameter for some in layer.values() for parameter in some]
    size = sum(parameter.numel for parameter in whole)

    def outside(part: str) -> tuple[str, str, int]:
        return part, formula(outer.get(part, [])), _numel(outer, part)

    steps = [outside(part) for part in ("token embedding", "position embedding") if part in outer]
    for part, some in layer.items():
        title = "two norms" if part == "norms" else part
        steps.append((f"  {title}", formula(some), sum(each.numel for each in some)))
    steps += [("one layer", formula(whole), size), ("all layers", f"L·({formula(whole)})", model.n_layer * size)]
    steps += [outside("final norm"), outside("head")]
    sizes = sizes_of(model)
    return [
        FormulaStep(part=part, symbols=text, numbers="".join(str(sizes.get(c, c)) for c in text), value=value)
        for part, text, value in steps
    ]


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """Symbol → its size, for the symbols in the model's closed form."""
    decoder = Decoder(model)
    parameters = (*decoder.before(), *decoder.inside(), *decoder.after())
    used = {symbol for each in parameters for dim in each.dims for symbols, _ in dim.terms for symbol in symbols}
    sizes = {
        "V": model.vocab_size,
        "T": model.block_size,
        "H": model.n_embd,
        "F": model.inner_width,
        "a": model.n_head,
        "k": model.kv_heads,
        "D": model.head_width,
    }
    return {symbol: size for symbol, size in sizes.items() if symbol in used} | {"L": model.n_layer}


def _by_part(model: ModelConfig) -> tuple[dict[str, list[Parameter]], dict[str, list[Parameter]]]:
    """Two mappings, part → its parameters: one for the parts outside the blocks, one for a block's parts, norms last."""
    decoder = Decoder(model)
    outer, layer = defaultdict[str, list[Parameter]](list), defaultdict[str, list[Parameter]](list)
    for parameter in (*decoder.before(), *decoder.after()):
        outer[parameter.part].append(parameter)
    for parameter in sorted(decoder.inside(), key=lambda each: each.part == "norms"):
        layer[parameter.part].append(parameter)
    return dict(outer), dict(layer)


def _numel(parts: dict[str, list[Parameter]], prefix: str) -> int:
    """The number of parameter elements in all parts whose names begin with the prefix."""
    return sum(each.numel for part, some in parts.items() if part.startswith(prefix) for each in some)
