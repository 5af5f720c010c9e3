"""The model: its parameters, their start, causality, the cache, and that its variants compute what they say."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from scalegpt.architecture.counting import count_parameters
from scalegpt.architecture.decoder import parameter_shapes
from scalegpt.config import ModelConfig
from scalegpt.config.rope import RopeScaling
from scalegpt.errors import InputError
from scalegpt.model.attention import GenerationCache
from scalegpt.model.gpt import GPT
from scalegpt.model.rotary import frequencies

LONGER = RopeScaling(type="yarn", factor=4.0, original_block_size=8)

VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"tie_head": False},
    {"activation": "gelu_tanh"},
    {"bias": True, "tie_head": False, "activation": "gelu_tanh", "n_layer": 1, "n_head": 4},
    {"position": "none"},
    {"position": "rope"},
    {"position": "rope", "rotary_share": 0.25, "rope_theta": 500.0, "bias": "qkv"},
    {"n_head": 4, "n_kv_head": 2},
    {"qk_norm": True, "norm_eps": 1e-3},
    {"qk_norm": True, "position": "rope", "n_head": 4, "n_kv_head": 2, "head_size": 12, "norm": "rmsnorm"},
    {"n_head": 6, "n_kv_head": 1, "head_size": 10, "bias": True},
    {"position": "rope", "n_head": 6, "n_kv_head": 3, "head_size": 12, "rope_scaling": LONGER},
    {"norm": "rmsnorm", "norm_eps": 1e-3, "activation": "swiglu", "n_inner": 40},
    {"norm": "rmsnorm", "activation": "geglu", "bias": "qkv", "tie_head": False},
    {"activation": "swiglu", "bias": True, "norm_eps": 1e-2},
]


def tokens(batch: int, length: int, vocab: int = 61) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", VARIANTS)
def test_parameters_are_those_that_the_planner_counts(tiny_model: Any, shape: dict[str, Any]) -> None:
    model = tiny_model(**shape)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == dict(parameter_shapes(model.config))
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(model.config).total


def test_names_are_the_checkpoint_format(tiny_model: Any) -> None:
    model = tiny_model(n_layer=1, bias=True, tie_head=False)
    assert [name for name, _ in model.named_parameters()] == [
        "wte.weight", "wpe.weight",
        "blocks.0.ln1.weight", "blocks.0.ln1.bias", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias",
        "blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias", "blocks.0.ln2.weight", "blocks.0.ln2.bias",
        "blocks.0.mlp.fc.weight", "blocks.0.mlp.fc.bias", "blocks.0.mlp.proj.weight", "blocks.0.mlp.proj.bias",
        "ln_f.weight", "ln_f.bias", "head.weight",
    ]  # fmt: skip


def test_initial_weights_have_gpt2s_statistics(one_thread: None) -> None:
    config = ModelConfig(n_layer=8, n_embd=128, n_head=2, block_size=64, vocab_size=2000, bias=True, tie_head=False)
    with torch.device("meta"):
        model = GPT(config)
    for name, value in model.initial_weights(0):
        assert value.dtype == torch.float32
        assert value.device.type == "cpu"
        if value.dim() == 1:
            assert value.unique().tolist() == [1.0 if name.endswith("weight") else 0.0], name
            continue
        std = 0.02 / math.sqrt(2 * 8) if name.endswith("proj.weight") else 0.02
        error = 5 / math.sqrt(2 * value.numel())  # five standard errors of a standard deviation
        assert value.std().item() == pytest.approx(std, rel=error), name
        assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel()), name


def test_the_seed_alone_decides_the_initial_weights(tiny_model: Any) -> None:
    torch.manual_seed(1)
    first = dict(tiny_model(seed=3).initial_weights(3))
    torch.manual_seed(2)
    torch.rand(7)
    with torch.device("meta"):
        again = dict(GPT(tiny_model().config).initial_weights(3))
    other = dict(tiny_model().initial_weights(4))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_initial_weights_leave_the_global_random_state_alone(tiny_model: Any) -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    list(model.initial_weights(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_first_loss_is_that_of_a_uniform_guess(tiny_model: Any) -> None:
    x = tokens(8, 17)
    loss = tiny_model()(x[:, :-1], x[:, 1:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(61), abs=0.05)


@pytest.mark.parametrize("shape", VARIANTS)
def test_the_future_changes_no_earlier_loss(tiny_model: Any, shape: dict[str, Any]) -> None:
    model = tiny_model(**shape, loss=lambda hidden, head, targets: hidden)  # the hidden states are what losses are of
    x = tokens(2, 16)
    changed = x.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    with torch.no_grad():
        a, b = model(x, x), model(changed, x)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.isclose(a[:, 9:], b[:, 9:]).all(dim=-1).any(), "position 9 must reach every later one"


@pytest.mark.parametrize("shape", VARIANTS)
def test_model_is_the_textbook_formula(tiny_model: Any, shape: dict[str, Any]) -> None:
    model = tiny_model(**shape).double()
    model.set_precision(torch.float64)
    x = tokens(2, 16)
    assert torch.allclose(model(x).double(), textbook_logits(model, x)[:, -1], atol=1e-6)


def textbook_activation(config: ModelConfig, y: torch.Tensor) -> torch.Tensor:
    if config.activation in ("swiglu", "geglu"):
        gate, up = y[..., : config.inner_width], y[..., config.inner_width :]
        share = torch.sigmoid(gate) if config.activation == "swiglu" else 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
        return gate * share * up
    if config.activation == "gelu":
        return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def textbook_rotation(config: ModelConfig, y: torch.Tensor) -> torch.Tensor:
    """Heads [..., T, D], pairs of whose numbers are multiplied, as complex ones, by e^(i · angle)."""
    if config.position != "rope":
        return y
    turns, factor = frequencies(config)
    pairs = turns.numel()
    pair = torch.complex(y[..., :pairs], y[..., pairs : 2 * pairs])
    angles = torch.outer(torch.arange(y.shape[-2]).float(), turns).double()
    pair = pair * torch.polar(torch.full_like(angles, factor), angles)
    return torch.cat((pair.real, pair.imag, y[..., 2 * pairs :]), -1)


def textbook_logits(model: GPT, x: torch.Tensor) -> torch.Tensor:
    """The equations written out with plain matrix products, to check the module against."""
    weights: dict[str, Any] = {name: value.detach() for name, value in model.named_parameters()}
    config = model.config
    T, a, k, D = x.shape[1], config.n_head, config.kv_heads, config.head_width

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(name: str, y: torch.Tensor, *, rms: bool = config.norm == "rmsnorm") -> torch.Tensor:
        centred = y if rms else y - y.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    def attention(at: str, y: torch.Tensor) -> torch.Tensor:
        rows = linear(f"{at}.qkv", y).view(*x.shape, a + 2 * k, D).transpose(1, 2)
        q, keys, values = rows[:, :a], rows[:, a : a + k], rows[:, a + k :]
        if config.qk_norm:
            q, keys = norm(f"{at}.q_norm", q, rms=True), norm(f"{at}.k_norm", keys, rms=True)
        q, keys = textbook_rotation(config, q), textbook_rotation(config, keys)
        keys, values = (part.repeat_interleave(a // k, dim=1) for part in (keys, values))
        scores = (q @ keys.mT / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        return linear(f"{at}.proj", (scores.softmax(-1) @ values).transpose(1, 2).reshape(*x.shape, a * D))

    h = weights["wte.weight"][x]
    if config.position == "learned":
        h = h + weights["wpe.weight"][:T]
    for i in range(config.n_layer):
        at = f"blocks.{i}"
        h = h + attention(f"{at}.attn", norm(f"{at}.ln1", h))
        h = h + linear(f"{at}.mlp.proj", textbook_activation(config, linear(f"{at}.mlp.fc", norm(f"{at}.ln2", h))))
    return norm("ln_f", h) @ weights["head.weight" if model.head is not None else "wte.weight"].T


@pytest.mark.parametrize("shape", VARIANTS)
@pytest.mark.parametrize("steps", [[16], [1] * 16, [5, 1, 1, 9], [3, 4, 9]])
def test_cached_logits_equal_uncached(tiny_model: Any, shape: dict[str, Any], steps: list[int]) -> None:
    model = tiny_model(**shape).eval()
    x = tokens(3, 16)
    cache = GenerationCache(model.config.n_layer, 16)
    seen = 0
    with torch.no_grad():
        for new in steps:
            cached = model(x[:, seen : seen + new], None, cache)
            seen += new
            assert cache.length == seen
            assert torch.allclose(cached, model(x[:, :seen]), atol=1e-5)


def test_given_positions_replace_those_from_zero_on(tiny_model: Any) -> None:
    x = tokens(2, 8)
    for position in ("learned", "rope", "none"):
        model = tiny_model(position=position).double().eval()
        model.set_precision(torch.float64)
        plain, same = model(x), model(x, positions=torch.arange(8))
        later = model(x, positions=torch.arange(8, 16).expand(2, -1))
        assert torch.equal(plain, same)
        assert torch.allclose(plain, later, atol=1e-5) == (position != "learned"), "rotary positions are relative"
        stretched = model(x, positions=2 * torch.arange(8))
        assert torch.allclose(plain, stretched, atol=1e-5) == (position == "none")


def test_positions_may_start_anew_in_a_row_of_the_batch(tiny_model: Any) -> None:
    model = tiny_model(position="rope", loss=lambda hidden, head, targets: hidden)
    x = tokens(2, 8)
    anew = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        plain, found = model(x, x), model(x, x, positions=anew)
    assert torch.allclose(plain[0], found[0], atol=1e-6)
    assert torch.allclose(plain[1, :3], found[1, :3], atol=1e-6)
    assert not torch.isclose(plain[1, 3:], found[1, 3:], atol=1e-6).all(dim=-1).any()


def test_a_cleared_cache_starts_anew(tiny_model: Any) -> None:
    model = tiny_model().eval()
    cache = GenerationCache(2, 16)
    with torch.no_grad():
        model(tokens(2, 16), None, cache)
        cache.clear()
        assert cache.length == 0
        x = tokens(2, 7).flip(1)
        assert torch.allclose(model(x, None, cache), model(x), atol=1e-6)


def test_attention_backends_agree_with_math(tiny_model: Any) -> None:
    model = tiny_model()
    x = tokens(2, 17)
    losses = {}
    for name in ("math", "flash", "auto"):
        model.set_attention(name)
        model.zero_grad()
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        losses[name] = (loss.item(), model.wte.weight.grad.clone())
    for name in ("flash", "auto"):
        assert losses[name][0] == pytest.approx(losses["math"][0], rel=1e-6)
        assert torch.allclose(losses[name][1], losses["math"][1], atol=1e-6)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", VARIANTS)
def test_weights_cast_beforehand_compute_the_same(tiny_model: Any, shape: dict[str, Any], compute: torch.dtype) -> None:
    masters, cast = tiny_model(**shape), tiny_model(**shape).to(compute)
    x = tokens(2, 17)
    results = []
    for model in (masters, cast):
        model.set_precision(compute)
        results.append(model(x[:, :-1], x[:, 1:]))
    assert results[0].dtype == torch.float32
    assert torch.equal(results[0], results[1])


def test_an_fp32_residual_stream_stays_fp32_between_blocks(tiny_model: Any) -> None:
    model = tiny_model()
    model.set_precision(torch.bfloat16, torch.float32)
    seen: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
        block.attn.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    model(tokens(1, 8))
    assert seen == [torch.bfloat16, torch.float32] * 2


def test_bf16_is_near_fp32(tiny_model: Any) -> None:
    model = tiny_model()
    x = tokens(4, 17)
    exact = model(x[:, :-1], x[:, 1:]).item()
    model.set_precision(torch.bfloat16)
    assert model(x[:, :-1], x[:, 1:]).item() == pytest.approx(exact, rel=1e-2)


def test_dropout_acts_in_training_alone(tiny_model: Any) -> None:
    model = tiny_model(dropout=0.5)
    x = tokens(2, 16)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))
        assert torch.allclose(model(x), tiny_model()(x), atol=1e-6)


def test_a_tied_head_collects_both_gradients(tiny_model: Any) -> None:
    tied, untied = tiny_model(), tiny_model(tie_head=False)
    with torch.no_grad():
        for name, value in tied.named_parameters():
            untied.get_parameter(name).copy_(value)
        untied.head.weight.copy_(tied.wte.weight)
    x = tokens(2, 17)
    for model in (tied, untied):
        model(x[:, :-1], x[:, 1:]).backward()
    both = untied.wte.weight.grad + untied.head.weight.grad
    assert torch.allclose(tied.wte.weight.grad, both, atol=1e-7)


def test_last_position_logits_are_those_of_the_loss(tiny_model: Any) -> None:
    model = tiny_model()
    x = tokens(3, 16)
    targets = torch.full_like(x, -1)
    targets[:, -1] = 7
    by_hand = F.cross_entropy(model(x), torch.full((3,), 7))
    assert model(x, targets).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_an_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="--vocab_size N"):
        GPT(ModelConfig(vocab_size=0))
