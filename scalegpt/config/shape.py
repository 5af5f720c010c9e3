"""The shape of the model: everything that decides which parameters exist."""

from dataclasses import dataclass

from scalegpt.config.settings import Section, setting
from scalegpt.errors import InputError

AUTO_VOCAB = 0

TOKENS = {"gpt2": 50257, "byte": 257}
"""Tokenizer → the size of its vocabulary; for the char tokenizer the text decides it."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A GPT-2 style decoder: pre-norm blocks, learned positions, a feed-forward layer four times as wide.

    Raises:
        InputError: a value is outside its bounds, or ``n_head`` does not divide ``n_embd``.
    """

    n_layer: int = setting(4, "number of transformer blocks", minimum=1, maximum=2000)
    n_embd: int = setting(192, "width of the residual stream", minimum=1, maximum=1_000_000)
    n_head: int = setting(3, "attention heads; must divide n_embd", minimum=1, maximum=100_000)
    block_size: int = setting(
        256, "longest context in tokens, and the training sequence length T", minimum=1, maximum=100_000_000
    )
    vocab_size: int = setting(
        50304,
        "size of the vocabulary; 50304 is GPT-2's 50257 padded to a multiple of 64; 0 or auto takes the tokenizer's",
        minimum=0,
        maximum=10_000_000,
    )
    bias: bool = setting(False, "biases in the linear layers and layer norms, as GPT-2 has them")
    tie_head: bool = setting(True, "the LM head shares the token embedding's matrix")
    dropout: float = setting(0.0, "dropout after embeddings, attention and feed-forward", minimum=0.0, below=1.0)
    activation: str = setting(
        "gelu",
        "gelu: exact; gelu_tanh: GPT-2's form, which llama.cpp reads; relu2: the square of ReLU",
        choices=("gelu", "gelu_tanh", "relu2"),
    )
    parallel_block: bool = setting(
        False, "attention and feed-forward read the same input, as in GPT-NeoX; false: one after the other"
    )
    logit_softcap: float | None = setting(
        None,
        "bound the logits by X · tanh(logit / X), as Gemma 2 does with X = 30; none: no bound",
        above=0,
        maximum=1_000_000,
    )

    def check(self) -> None:
        """Refuse an ``n_embd`` that ``n_head`` does not divide."""
        if self.n_embd % self.n_head:
            near = heads_near(self.n_embd, self.n_head)
            raise InputError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; n_head {near} would work")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head


def heads_near(width: int, heads: int) -> int:
    """The divisor of ``width``, at most 4096, that is nearest to ``heads``."""
    # No model has more than 4096 heads, and the search must end soon for a mistyped, huge width.
    return min((n for n in range(1, min(width, 4096) + 1) if width % n == 0), key=lambda n: abs(n - heads))
