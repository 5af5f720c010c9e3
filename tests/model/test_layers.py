"""RMSNorm and gated feed-forward layers compute what plain operators do, in every dtype, and autograd keeps their inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scalegpt.architecture.layers import record_gated
from scalegpt.architecture.operations import Recorder, Value
from scalegpt.config import ModelConfig
from scalegpt.model.cpu.rms_norm import rms_norm
from scalegpt.model.feed_forward import GATES, FeedForward, gated
from scalegpt.model.layers import RMSNorm, norm_of
from traffic import Traffic

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS = 1e-3


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain_product(kind: str, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return {"swiglu": F.silu, "geglu": F.gelu}[kind](gate) * up


def far(found: Tensor, exact: Tensor) -> float:
    """The distance as a share of the exact tensor's length."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def agree(own: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Results and gradients are those that fp64 gives, but for the rounding of the inputs' dtype."""
    copies = [each.detach().double().requires_grad_() for each in inputs]
    y, expected = own(*inputs), exact(*copies)
    assert y.dtype == inputs[0].dtype
    grad = drawn(*y.shape, dtype=y.dtype, seed=9).detach()
    gradients = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, copies, grad.double())
    for found, wanted in zip((y, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert far(found, wanted) < ROUNDING[inputs[0].dtype]


@pytest.mark.parametrize("shape", [(7, 48), (2, 300, 64)])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_rms_norm_is_its_formula(one_thread: None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    agree(
        lambda x, w: rms_norm(x, w, EPS)[0],
        plain_norm,
        drawn(*shape, dtype=dtype),
        drawn(shape[-1], dtype=dtype, seed=1),
    )


def test_rms_norms_gradient_is_its_derivative(one_thread: None) -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, EPS)[0]

    assert torch.autograd.gradcheck(norm, (drawn(2, 3, 10), drawn(10, seed=1)))


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_the_module_agrees_with_torchs_operator_and_casts(one_thread: None, compute: torch.dtype) -> None:
    norm = RMSNorm(48, eps=EPS)
    torch.nn.init.normal_(norm.weight)
    x = drawn(5, 48, dtype=torch.float32)
    with_gradients, without = norm(x, compute), F.rms_norm(x, (48,), norm.weight, EPS).to(compute)
    assert with_gradients.dtype == compute
    assert far(with_gradients, without.double()) < ROUNDING[compute]
    with torch.no_grad():
        assert torch.equal(norm(x, compute), without)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_gated_layer_is_its_formula(one_thread: None, dtype: torch.dtype, kind: str) -> None:
    agree(lambda x: gated(kind, x), lambda x: plain_product(kind, x), drawn(2, 50, 24, dtype=dtype))


@pytest.mark.parametrize("kind", GATES)
def test_a_gates_gradient_is_its_derivative(one_thread: None, kind: str) -> None:
    assert torch.autograd.gradcheck(lambda x: gated(kind, x), (drawn(3, 4, 10),))


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the different storages that autograd keeps."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storages.values())


def test_autograd_keeps_the_inputs_alone(one_thread: None) -> None:
    x, weight = drawn(100, 64, dtype=torch.bfloat16), drawn(64, dtype=torch.bfloat16)
    assert saved_bytes(lambda: rms_norm(x, weight, EPS)[0]) == x.nbytes + weight.nbytes + 100 * 4
    assert saved_bytes(lambda: gated("swiglu", x)) == x.nbytes


@pytest.mark.parametrize("kind", GATES)
def test_a_gates_passes_move_what_the_planner_says(one_thread: None, kind: str) -> None:
    x, r = drawn(64, 128, dtype=torch.bfloat16), Recorder()
    record_gated(r, Value(), 64 * 64, 2)
    (described,) = r.operations
    with Traffic() as forward:
        y = gated(kind, x)
    grad = torch.ones_like(y)
    with Traffic() as backward:
        torch.autograd.grad(y, x, grad)
    assert (forward.moved, forward.kernels) == (described.forward.moved, described.forward.kernels)
    assert (backward.moved, backward.kernels) == (described.backward.moved, described.backward.kernels)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu", "geglu"])
def test_the_inner_width_is_as_asked(activation: str) -> None:
    layer = FeedForward(ModelConfig(n_embd=32, n_head=2, n_inner=40, activation=activation, bias=True))
    rows = 80 if activation in GATES else 40
    shapes: dict[str, Any] = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    assert shapes == {"fc.weight": (rows, 32), "fc.bias": (rows,), "proj.weight": (32, 40), "proj.bias": (32,)}


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_eps_reaches_the_norm(one_thread: None, norm: str) -> None:
    x = torch.tensor([[1e-3, -1e-3]])
    small, large = (norm_of(ModelConfig(n_embd=2, n_head=1, norm=norm, norm_eps=eps))(x) for eps in (1e-12, 1e-6))
    assert small.abs().max().item() == pytest.approx(1.0, rel=1e-3)
    assert large.abs().max().item() == pytest.approx(0.5**0.5, rel=1e-3)


def test_a_compiler_sees_plain_operators(one_thread: None) -> None:
    """Traced into one graph, with the same gradients."""
    layer, norm = FeedForward(ModelConfig(n_embd=16, n_head=1, n_inner=24, activation="swiglu")), RMSNorm(16, eps=EPS)
    x = drawn(4, 16, dtype=torch.float32)

    def both(x: Tensor) -> Tensor:
        return layer(norm(x))  # type: ignore[no-any-return]

    y, traced = both(x), torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    gradients = [
        torch.autograd.grad(each.square().sum(), [x, *layer.parameters(), norm.weight]) for each in (y, traced)
    ]
    for own, other in zip(*gradients, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-6)
