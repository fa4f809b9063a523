"""The same bits in every run, whatever else the device does, and as a graph or compiled."""

import pytest
import torch
from helpers import DEVICE
from torch import nn

import fastlora
from fastlora import ops, plan
from fastlora.benchmarks.graphs import as_graph
from fastlora.kernels.common import INTERPRET
from fastlora.nn import Linear4bit, LoraLinear

needs_gpu = pytest.mark.gpu
# the interpreter runs what needs no real device
pytestmark = [] if INTERPRET else needs_gpu
DTYPE = torch.float16 if INTERPRET else torch.bfloat16
WAYS = [("addmm", "tail"), ("augment", "tail"), ("gemm", "gemm")]
M, K, N, R = (65, 64, 48, 8) if INTERPRET else (1000, 1024, 2048, 16)


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")


@pytest.fixture(params=WAYS, ids="/".join)
def way(request, monkeypatch):
    monkeypatch.setattr(plan, "choose", lambda *_: plan.Path(*request.param, "forced"))


def layer_call(p, device=DEVICE):
    """Forward and backward of one layer: a call that returns y, dx, da and db."""
    make = {"device": device, "dtype": DTYPE}
    x, dy = torch.randn(M, K, **make).requires_grad_(), torch.randn(M, N, **make)
    q = fastlora.quantize_nf4(torch.randn(N, K, **make) * K**-0.5)
    a = (torch.randn(R, K, device=device) * K**-0.5).requires_grad_()
    b = torch.randn(N, R, device=device).requires_grad_()

    def call():
        y = ops.lora_linear(x, q, a, b, 0.5, dropout_p=p)
        grads = torch.autograd.grad(y, [x, a, b], dy)
        return dict(zip(("y", "dx", "da", "db"), (y.detach(), *grads), strict=True))

    return call


def seeded(call):
    torch.manual_seed(3)
    return {name: t.clone() for name, t in call().items()}


def assert_same_bits(got, expected):
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_two_runs_are_equal(way, p):
    call = layer_call(p)
    expected = seeded(call)
    for _ in range(1 if INTERPRET else 20):
        assert_same_bits(seeded(call), expected)


@needs_gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_another_busy_stream_changes_nothing(way, p):
    call = layer_call(p)
    expected = seeded(call)
    other, work = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(other):
            work @ work
        assert_same_bits(seeded(call), expected)


@needs_gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_call_runs_on_the_current_stream(way, p):
    call = layer_call(p)
    expected = seeded(call)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = seeded(call)
    stream.synchronize()  # nothing else is waited for
    assert_same_bits(got, expected)


@needs_gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_graph_gives_the_bits_of_eager_mode(way, p):
    call = layer_call(p)
    expected = seeded(call)
    replay = as_graph(call)
    assert_same_bits(seeded(replay), expected)
    assert_same_bits(seeded(replay), expected)


@needs_gpu
def test_every_replay_of_a_graph_has_its_own_mask(way):
    replay = as_graph(layer_call(0.5))
    torch.manual_seed(3)
    ys = [replay()["y"].clone() for _ in range(3)]
    assert not torch.equal(ys[0], ys[1])
    assert not torch.equal(ys[1], ys[2])
    torch.manual_seed(3)
    assert torch.equal(replay()["y"], ys[0])


@needs_gpu
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiled_without_a_graph_break(p):
    torch._dynamo.reset()
    base = Linear4bit.from_linear(nn.Linear(K, N, bias=False, device="cuda", dtype=DTYPE))
    net = LoraLinear(base, r=R, lora_dropout=p)
    nn.init.normal_(net.lora_B["default"].weight)
    x = torch.randn(M, K, device="cuda", dtype=DTYPE).requires_grad_()
    dy = torch.randn(M, N, device="cuda", dtype=DTYPE)
    wanted = [x, *(t for t in net.parameters() if t.requires_grad)]

    def step(run):
        def call():
            y = run(x)
            found = [y.detach(), *torch.autograd.grad(y, wanted, dy)]
            return {str(i): t for i, t in enumerate(found)}

        return seeded(call)

    # else inductor has random numbers of its own
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(net, fullgraph=True)
        assert_same_bits(step(compiled), step(net))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_tensors_of_another_device_than_the_current_one(way, p):
    call = layer_call(p, "cuda:1")
    with torch.cuda.device(1):
        expected = seeded(call)
    with torch.cuda.device(0):
        got = seeded(call)
    assert all(t.device.index == 1 for t in got.values())
    assert_same_bits(got, expected)
