"""Under torch.compile: one graph, checked ops, and the gradients of eager mode."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint
from helpers import DEVICE
from torch import nn

import fastlora
from fastlora import ops
from fastlora.member import Member, flatten
from fastlora.nn import Linear4bit, LoraLinear, disabled

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning"),
    # torch 2.13's own inductor
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

N, K, R = 40, 96, 8


@pytest.fixture(autouse=True)
def no_graphs_yet():
    """What other tests compiled neither helps nor counts."""
    torch._dynamo.reset()


def lora_layer(base="nf4", dropout=0.0):
    linear = nn.Linear(K, N, device=DEVICE).requires_grad_(False)
    if base == "nf4":
        linear = Linear4bit.from_linear(linear)
    layer = LoraLinear(linear, r=R, lora_dropout=dropout)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def model(base, dropout):
    """Two layers, the second without adapter."""
    last = Linear4bit.from_linear(nn.Linear(N, N, device=DEVICE))
    last.bias.requires_grad_(False)
    return nn.Sequential(lora_layer(base, dropout), nn.GELU(), last)


def step(run, net, x, dy):
    """Output, dx and the gradients of all parameters, always with the same dropout."""
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = run(x)
    wanted = [x, *(p for p in net.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def members(base):
    w = torch.randn(N, K, device=DEVICE)
    weight = fastlora.quantize_nf4(w, double_quant=base == "nf4") if "nf4" in base else w
    lora = {"a": torch.randn(R, K, device=DEVICE), "b": torch.randn(N, R, device=DEVICE)}
    lora = {name: t.requires_grad_() for name, t in lora.items()}
    return [
        Member(weight, torch.randn(N, device=DEVICE, requires_grad=True), **lora, scale=0.5),
        Member(fastlora.quantize_nf4(torch.randn(16, K, device=DEVICE))),
        Member(torch.randn(24, K, device=DEVICE, requires_grad=True)),
    ]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", ["nf4", "nf4-flat", "dense"])
def test_opcheck(base, p):
    """torch's own check of schema, fakes, autograd and tracing."""
    flat = flatten(members(base))
    x = torch.randn(2, 5, K, device=DEVICE, requires_grad=True)
    state = torch.randint(2**63 - 1, (2,), device=DEVICE) if p else None
    args = x, flat.tensors, flat.facts, flat.scales, state, p
    torch.library.opcheck(torch.ops.fastlora.linear.default, args)


def test_opcheck_without_adapters():
    flat = flatten([Member(fastlora.quantize_nf4(torch.randn(N, K, device=DEVICE)))])
    x = torch.randn(5, K, device=DEVICE, requires_grad=True)
    args = x, flat.tensors, flat.facts, flat.scales, None, 0.0
    torch.library.opcheck(torch.ops.fastlora.linear.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_one_graph_with_the_gradients_of_eager_mode(base, dropout, backend):
    net = model(base, dropout)
    x, dy = torch.randn(2, 5, K, device=DEVICE), torch.randn(2, 5, N, device=DEVICE)
    expected = step(net, net, x, dy)
    # inductor has its own random numbers unless it is told to draw eager's
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        for got, value in zip(step(compiled, net, x, dy), expected, strict=True):
            torch.testing.assert_close(got, value)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_checkpointing_inside_a_graph_draws_the_same_mask(backend):
    net = model("nf4", 0.5)
    x, dy = torch.randn(4, K, device=DEVICE), torch.randn(4, N, device=DEVICE)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)

    expected = step(net, net, x, dy)
    for got, value in zip(step(checkpointed, net, x, dy), expected, strict=True):
        assert torch.equal(got, value)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(checkpointed, backend=backend, fullgraph=True)
        for got, value in zip(step(compiled, net, x, dy), expected, strict=True):
            torch.testing.assert_close(got, value)


def test_one_graph_for_any_number_of_tokens():
    net = model("nf4", 0.0)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (3, 17, 64):
            x, dy = torch.randn(M, K, device=DEVICE), torch.randn(M, N, device=DEVICE)
            expected = step(net, net, x, dy)
            for got, value in zip(step(compiled, net, x, dy), expected, strict=True):
                torch.testing.assert_close(got, value)


def test_switching_adapters_is_seen_by_a_graph():
    layer = lora_layer()
    x = torch.randn(5, K, device=DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with_adapter = layer(x)
    torch.testing.assert_close(compiled(x), with_adapter)
    with disabled([layer]):
        torch.testing.assert_close(compiled(x), layer.base_layer(x))
        with ThreadPoolExecutor(1) as pool:  # another thread asks for itself
            torch.testing.assert_close(pool.submit(compiled, x).result(), with_adapter)
    torch.testing.assert_close(compiled(x), with_adapter)
    layer.add_adapter("other", r=2, lora_alpha=4, init_lora_weights=False)
    layer.set_adapter("other")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.set_adapter(None)
    torch.testing.assert_close(compiled(x), layer.base_layer(x))


def test_a_group_in_a_graph():
    group = members("nf4")
    x = torch.randn(5, K, device=DEVICE, requires_grad=True)

    def run(x):
        return ops.linear_group(x, group, dropout_p=0.3)

    def outputs(fn):
        torch.manual_seed(3)
        ys = fn(x)
        wanted = [x, group[0].a, group[0].b, group[0].bias, group[2].weight]
        # the second output is not used
        return [*ys, *torch.autograd.grad([ys[0].sum() + ys[2].square().sum()], wanted)]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, value in zip(outputs(compiled), outputs(run), strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_in_a_graph(dtype):
    net = model("nf4", 0.0)
    x = torch.randn(5, K, device=DEVICE)

    def run(x):
        with torch.autocast(DEVICE, dtype):
            return net(x)

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, run(x))


def test_bad_input_is_refused_in_a_graph():
    layer = lora_layer()
    compiled = torch.compile(layer, backend="aot_eager")
    with pytest.raises(ValueError, match=r"x must be \[..., K\] and w \[N, K\]"):
        compiled(torch.zeros(2, K + 1, device=DEVICE))
