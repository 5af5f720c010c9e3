"""The shape of the model: everything that decides which parameters exist."""

from dataclasses import dataclass

from scalegpt.config.rope import RopeScaling
from scalegpt.config.settings import Section, setting
from scalegpt.errors import InputError

AUTO_VOCAB = 0

GATED = ("swiglu", "geglu")
"""The activations with a gate (Shazeer 2020, arXiv 2002.05202)."""

RESOLVED = {"n_kv_head": "kv_heads", "head_size": "head_width", "n_inner": "inner_width"}
"""Setting that may be none → the property of :class:`ModelConfig` with the size that then applies."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A decoder of pre-norm blocks; the defaults are GPT-2's shape.

    Raises:
        InputError: a value is outside its bounds, head counts and widths do not divide each other, or a setting of
            rotary positions contradicts another setting.
    """

    n_layer: int = setting(4, "number of transformer blocks", minimum=1, maximum=2000)
    n_embd: int = setting(192, "width of the residual stream", minimum=1, maximum=1_000_000)
    n_head: int = setting(
        3, "attention heads; must divide n_embd, unless head_size is given", minimum=1, maximum=100_000
    )
    n_kv_head: int | None = setting(
        None,
        "heads of keys and values; must divide n_head; fewer than n_head give grouped-query attention; none: n_head",
        minimum=1,
        maximum=100_000,
    )
    head_size: int | None = setting(
        None, "width of one attention head; none: n_embd / n_head", minimum=1, maximum=1_000_000
    )
    n_inner: int | None = setting(
        None,
        "width of the feed-forward layer; none: 4 · n_embd, or with a gated activation 8/3 · n_embd rounded up to a "
        "multiple of 256",
        minimum=1,
        maximum=10_000_000,
    )
    block_size: int = setting(
        256, "longest context in tokens, and the training sequence length T", minimum=1, maximum=100_000_000
    )
    vocab_size: int = setting(
        50304,
        "size of the vocabulary; 50304 is GPT-2's 50257 padded to a multiple of 128; 0 or auto takes the tokenizer's",
        minimum=0,
        maximum=10_000_000,
    )
    bias: bool | str = setting(
        False,
        "biases: true: in linear layers and layer norms, as in GPT-2; qkv: only for queries, keys and values",
        choices=("qkv",),
    )
    tie_head: bool = setting(True, "the LM head shares the token embedding's matrix")
    dropout: float = setting(0.0, "dropout after embeddings, attention and feed-forward", minimum=0.0, below=1.0)
    norm: str = setting(
        "layernorm", "layernorm, or rmsnorm, which does not subtract the mean", choices=("layernorm", "rmsnorm")
    )
    norm_eps: float = setting(1e-5, "added to the variance in a norm", above=0, maximum=1)
    position: str = setting(
        "learned",
        "learned: an embedding for each position; rope: rotary positions in queries and keys; none: no positions",
        choices=("learned", "rope", "none"),
    )
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies", minimum=1, maximum=1e15)
    rope_scaling: RopeScaling | None = setting(  # noqa: RUF009 - setting() makes a dataclass field
        None, "scaling of rotary positions to a longer context, for example {type: linear, factor: 2}; none: no scaling"
    )
    rotary_share: float = setting(
        1.0, "share of each head's width that is rotated; GPT-NeoX rotates 0.25", above=0, maximum=1
    )
    qk_norm: bool = setting(False, "an RMSNorm over each head's queries and keys, before the rotation, as in Qwen3")
    activation: str = setting(
        "gelu",
        "gelu: exact; gelu_tanh: GPT-2's form, which llama.cpp reads; relu2: the square of ReLU; "
        "swiglu, geglu: gated by SiLU or exact GELU",
        choices=("gelu", "gelu_tanh", "relu2", "swiglu", "geglu"),
    )
    parallel_block: bool = setting(
        False, "attention and feed-forward read the same input, as in GPT-NeoX; false: one after the other"
    )
    logit_softcap: float | None = setting(
        None,
        "replace each logit by X · tanh(logit / X), as Gemma 2 does with X = 30; none: keep the logits",
        above=0,
        maximum=1_000_000,
    )

    def check(self) -> None:
        """Refuse head counts and widths that do not divide each other, and settings for another kind of positions."""
        if self.head_size is None and self.n_embd % self.n_head:
            near = heads_near(self.n_embd, self.n_head)
            raise InputError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; n_head {near} would work")
        if self.n_head % self.kv_heads:
            near = heads_near(self.n_head, self.kv_heads)
            raise InputError(
                f"n_head {self.n_head} is not divisible by n_kv_head {self.kv_heads}; n_kv_head {near} would work"
            )
        if self.position == "rope":
            self._check_rotation()
        elif self.rope_scaling is not None:
            raise InputError(f"rope_scaling needs position rope; position is {self.position}")

    def _check_rotation(self) -> None:
        if self.rotary_width < 2 or self.rotary_width % 2:
            raise InputError(
                f"rotary positions turn pairs of numbers, but {self.rotary_share:g} of a head's {self.head_width} "
                "numbers "
                f"are {self.rotary_width}; choose n_head, head_size or rotary_share so that they are even and at "
                "least 2"
            )

    @property
    def head_width(self) -> int:
        """D, the width of one attention head."""
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def kv_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    def heads_in_words(self, of: str = "") -> str:
        """The number of attention heads, the text ``of``, and the number of key and value heads if there are fewer."""
        fewer = f" ({self.kv_heads} of keys and values)" if self.kv_heads != self.n_head else ""
        return f"{self.n_head} heads{of}{fewer}"

    @property
    def rotary_width(self) -> int:
        """How many numbers of each head are rotated."""
        return int(self.head_width * self.rotary_share)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer is gated: it multiplies the activation of one matmul by the result of another."""
        return self.activation in GATED

    @property
    def inner_width(self) -> int:
        """F, the width of the feed-forward layer."""
        if self.n_inner is not None:
            return self.n_inner
        return -(-8 * self.n_embd // (3 * 256)) * 256 if self.is_gated else 4 * self.n_embd

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the matmul of queries, keys and values has a bias."""
        return self.bias in (True, "qkv")

    @property
    def has_bias(self) -> bool:
        """Whether all layer norms and all linear layers except the head have biases. An RMSNorm never has one."""
        return self.bias is True


def heads_near(width: int, heads: int) -> int:
    """The divisor of ``width``, at most 4096, that is nearest to ``heads``."""
    # No model has more than 4096 heads, and the search must end soon for a mistyped, huge width.
    return min((n for n in range(1, min(width, 4096) + 1) if width % n == 0), key=lambda n: abs(n - heads))
