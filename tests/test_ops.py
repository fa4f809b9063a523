"""Linear ops: outputs and all gradients against fp64, dropout masks, what is kept for backward."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DEVICE, DTYPES, assert_as_accurate, crossed, quantized
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import native, ops, reference
from fastlora.member import Member
from fastlora.nf4 import NF4Weight

SHAPES = [  # M, K, N, R
    (1, 64, 64, 1),
    (7, 96, 33, 8),  # blocks straddle rows, N odd
    (63, 130, 50, 16),
    (129, 45, 64, 5),  # K odd: the flat layout
    (5, 64, 3, 64),  # R above N
    (0, 64, 32, 4),  # no tokens
    (33, 72, 40, 80),  # rank above `gpu.FUSED_RANK`: da and dx in passes of their own
]
BASES = ["nf4", "nf4-flat", "dense"]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend_name(request, monkeypatch):
    """Run on every backend that this machine has."""
    if request.param == "cpu" and not native.available():
        pytest.skip(native.unavailable_reason())
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)
    return request.param


def make(M, K, N, R, dtype, adapter_dtype=None):
    """x, w, a, b, bias, dy of one layer; a and b in `adapter_dtype`."""
    adapter_dtype = adapter_dtype or dtype
    sizes = {"x": (M, K), "w": (N, K), "a": (R, K), "b": (N, R), "bias": (N,), "dy": (M, N)}
    dtypes = {"a": adapter_dtype, "b": adapter_dtype}
    return {
        name: torch.randn(size, device=DEVICE).to(dtypes.get(name, dtype))
        for name, size in sizes.items()
    }


def plain(t, to, keep=None, p=0.0, scale=0.5):
    """The op in plain torch; under autocast where `to` is a 16-bit dtype."""
    x, w, a, b, bias, dy = (t[name].to(to if to == torch.float64 else t[name].dtype) for name in t)
    leaves = [v.detach().requires_grad_() for v in (x, w, a, b, bias)]
    x, w, a, b, bias = leaves
    with torch.autocast(DEVICE, to, enabled=to in (torch.float16, torch.bfloat16)):
        y = F.linear(x, w, bias)
        dropped = x if keep is None else torch.where(keep, x / (1 - p), 0)
        y = y + scale * F.linear(F.linear(dropped, a), b)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check(got, t, dtype, keep=None, p=0.0, names=("y", "dx", "dw", "da", "db", "dbias")):
    """Compare named results with the plain op in `dtype` and in fp64."""
    eager, exact = (plain(t, to, keep, p) for to in (dtype, torch.float64))
    for name, e, x in zip(("y", "dx", "dw", "da", "db", "dbias"), eager, exact, strict=True):
        if name in names:
            assert_as_accurate(got[name], e, x)


def mask_of(M, K, p):
    """What the next call keeps of x [M, K]: an op draws one state, and exactly one."""
    torch.manual_seed(3)
    state = torch.randint(2**63 - 1, (2,), device=DEVICE)
    torch.manual_seed(3)
    return reference.dropout_halves(state, M, K) >= round(p * 65536)


def run(t, base, p=0.0, **kwargs):
    """lora_linear on leaves made from `t`; `t["w"]` becomes what the base really holds."""
    q = None
    if base != "dense":
        q, t["w"] = quantized(t["w"], double_quant=base == "nf4")
    leaves = {k: v.detach().requires_grad_() for k, v in t.items() if k not in ("dy",)}
    w_or_q = leaves["w"] if q is None else q
    y = ops.lora_linear(
        leaves["x"], w_or_q, leaves["a"], leaves["b"], 0.5, leaves["bias"], dropout_p=p, **kwargs
    )
    names = ["x", "a", "b", "bias"] + (["w"] if q is None else [])
    grads = torch.autograd.grad(y, [leaves[n] for n in names], t["dy"].to(y.dtype))
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}


@pytest.mark.parametrize(("shape", "dtype", "base"), crossed(SHAPES, DTYPES, BASES), ids=str)
def test_lora_linear(shape, dtype, base):
    t = make(*shape, dtype)
    got = run(t, base)
    check(got, t, dtype, names=got.keys())


@pytest.mark.parametrize(
    ("shape", "dtype", "p"), crossed(SHAPES, DTYPES, [0.05, 0.5, 0.9]), ids=str
)
def test_lora_linear_with_dropout(shape, dtype, p):
    t = make(*shape, dtype)
    keep = mask_of(*shape[:2], p)
    got = run(t, "nf4", p)
    check(got, t, dtype, keep, round(p * 65536) / 65536, names=got.keys())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[-1]], ids=str)
def test_dropout_before_frozen_adapters(shape, dtype):
    """Only dx is asked for, and it has the mask all the same."""
    t, p = make(*shape, dtype), 0.3
    q, t["w"] = quantized(t["w"])
    keep = mask_of(*shape[:2], p)
    x = t["x"].detach().requires_grad_()
    y = ops.lora_linear(x, q, t["a"], t["b"], 0.5, t["bias"], dropout_p=p)
    (dx,) = torch.autograd.grad(y, x, t["dy"])
    got = {"y": y.detach(), "dx": dx}
    check(got, t, dtype, keep, round(p * 65536) / 65536, names=got.keys())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_fp32_adapters_over_16_bit(base, dtype):
    t = make(63, 130, 50, 16, dtype, adapter_dtype=torch.float32)
    got = run(t, base)
    assert got["y"].dtype == got["dx"].dtype == dtype
    assert got["da"].dtype == got["db"].dtype == torch.float32
    eager, exact = (plain(t, to) for to in (dtype, torch.float64))
    for name, e, x in zip(("y", "dx", "dw", "da", "db", "dbias"), eager, exact, strict=True):
        if name in got:  # fp32 gradients of 16-bit operands carry the error of 16 bits
            assert_as_accurate(got[name].to(dtype), e.to(dtype), x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_autocast(base, dtype):
    t = make(17, 64, 48, 4, torch.float32)
    with torch.autocast(DEVICE, dtype):
        got = run(t, base)
    assert got["y"].dtype == dtype
    assert got["dx"].dtype == got["da"].dtype == torch.float32
    eager, exact = (plain(t, to) for to in (dtype, torch.float64))
    for name, e, x in zip(("y", "dx", "dw", "da", "db", "dbias"), eager, exact, strict=True):
        if name in got:
            assert_as_accurate(got[name].to(dtype), e.to(dtype), x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K", "N"), [(5, 96, 33), (0, 64, 8), (40, 45, 7)])
def test_nf4_linear(M, K, N, dtype, bias):
    t = make(M, K, N, 1, dtype)
    q = fastlora.quantize_nf4(t["w"])
    t["w"] = fastlora.dequantize_nf4(q)
    t["b"].zero_()
    t["bias"] = t["bias"] if bias else torch.zeros_like(t["bias"])
    x, bias_ = (t[name].detach().requires_grad_() for name in ("x", "bias"))
    y = ops.nf4_linear(x, q, bias_ if bias else None)
    leaves = [x, bias_] if bias else [x]
    grads = torch.autograd.grad(y, leaves, t["dy"])
    got = {"y": y.detach()} | dict(zip(["dx", "dbias"], grads, strict=False))
    check(got, t, dtype, names=got.keys())


def strided(t):
    """The same values with other strides."""
    if t.ndim == 1:
        return torch.stack([t, t], dim=1)[:, 0]
    return torch.stack([t.T, t.T], dim=2)[:, :, 0].T


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", BASES)
def test_non_contiguous_inputs(base, p):
    t = make(24, 96, 40, 8, torch.float32)
    torch.manual_seed(1)
    expected = run(dict(t), base, p)
    if base == "dense":
        t["w"] = strided(t["w"])
    for name in ("x", "a", "b", "bias", "dy"):
        t[name] = strided(t[name])
        assert t[name].numel() == 1 or not t[name].is_contiguous()
    torch.manual_seed(1)
    got = run(t, base, p)
    for name, value in expected.items():
        # a GEMM may sum in another order over other strides, by the CPU's maker
        assert_as_accurate(got[name], value, value.double())


def test_expanded_gradient_and_many_leading_dimensions():
    t = make(24, 64, 32, 4, torch.float32)
    q = fastlora.quantize_nf4(t["w"])
    flat = t["x"].clone().requires_grad_()
    ops.lora_linear(flat, q, t["a"], t["b"], 2.0).sum().backward()  # dy is an expanded scalar
    deep = t["x"].view(2, 3, 4, 64).clone().requires_grad_()
    y = ops.lora_linear(deep, q, t["a"], t["b"], 2.0)
    y.sum().backward()
    assert y.shape == (2, 3, 4, 32)
    torch.testing.assert_close(deep.grad.view(24, 64), flat.grad)
    one = ops.lora_linear(t["x"][0], q, t["a"], t["b"], 2.0)
    torch.testing.assert_close(one, y[0, 0, 0])


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64)])
def test_outputs_may_be_changed_in_place(shape):
    t = make(10, 64, 32, 4, torch.float32)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    a = t["a"].requires_grad_()
    y = ops.lora_linear(x, fastlora.quantize_nf4(t["w"]), a, t["b"], 2.0)
    expected = torch.autograd.grad(y.relu().sum(), [x, a], retain_graph=True)
    for got, value in zip(torch.autograd.grad(y.relu_().sum(), [x, a]), expected, strict=True):
        assert torch.equal(got, value)


KNOWN_ANSWERS = [  # seed, offset, row, 16-bit numbers of elements 0..9
    (0, 0, 0, "b709 5f6f 3f64 0d89 1f81 4f12 0a48 4f73 586e 983a"),
    (0x1234567890ABCDEF, 5, 3, "e559 2a04 da2d 5a79 d683 d38c 9464 149c 93fe f8c0"),
]


@pytest.mark.parametrize(("seed", "offset", "row", "expected"), KNOWN_ANSWERS)
def test_dropout_known_answers(seed, offset, row, expected, backend_name):
    state = torch.tensor([seed, offset], device=DEVICE)
    halves = reference.dropout_halves(state, row + 1, 10)[row]
    assert [f"{h:04x}" for h in halves.tolist()] == expected.split()
    # the mask of the backend, element by element: dropped iff below the threshold
    if backend_name == "triton":
        pytest.skip("its masks are compared in tests/kernel/test_dropout.py")
    drop = {"cpu": native.dropout, "reference": reference.dropout}[backend_name]
    for k, half in enumerate(halves.tolist()):
        x = torch.ones(row + 1, 10, device=DEVICE)
        assert drop(x, state, half / 65536)[row, k] != 0 or half == 0
        assert drop(x, state, (half + 1) / 65536)[row, k] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_the_same_on_every_backend(dtype, p):
    if not native.available():
        pytest.skip(native.unavailable_reason())
    for M, K in ((1, 1), (3, 27), (64, 200)):
        x = torch.randn(M, K).to(dtype)
        state = torch.randint(-(2**63), 2**63 - 1, (2,))
        assert torch.equal(native.dropout(x, state, p), reference.dropout(x, state, p))


def test_dropout_drops_the_right_share():
    state = torch.tensor([7, 9])
    dropped = reference.dropout(torch.ones(1000, 1000), state, 0.25)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=2e-3)
    assert dropped.mean().item() == pytest.approx(1, abs=3e-3)
    assert not torch.equal(dropped, reference.dropout(torch.ones(1000, 1000), state + 1, 0.25))


def test_training_false_and_p_zero_draw_nothing():
    t = make(4, 64, 8, 2, torch.float32)
    before = torch.get_rng_state()
    y = ops.lora_linear(t["x"], t["w"], t["a"], t["b"], 1.0, dropout_p=0.5, training=False)
    assert torch.equal(y, ops.lora_linear(t["x"], t["w"], t["a"], t["b"], 1.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_and_s_are_kept_for_backward(p, dtype):
    M, K, N, R = 32, 64, 48, 8
    t = make(M, K, N, R, dtype, adapter_dtype=torch.float32)
    q = fastlora.quantize_nf4(t["w"])
    known = {v.untyped_storage().data_ptr() for v in (t["a"], t["b"], t["bias"], *q.tensors())}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    leaves = [t[name].requires_grad_() for name in ("x", "a", "b", "bias")]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ops.lora_linear(leaves[0], q, *leaves[1:3], 0.5, leaves[3], dropout_p=p)
    shapes = sorted([*tensor.shape] for tensor in kept)
    assert shapes == sorted([[M, K], [M, R]] + ([[2]] if p else []))
    assert sum(tensor.nbytes for tensor in kept) == (M * K + M * R) * dtype.itemsize + 16 * (p > 0)
    assert any(tensor.data_ptr() == leaves[0].data_ptr() for tensor in kept), "x was copied"
    y.sum().backward()


def test_nothing_but_bytes_is_kept_by_nf4_linear():
    t = make(8, 64, 48, 1, torch.float32)
    q = fastlora.quantize_nf4(t["w"])
    known = {v.untyped_storage().data_ptr() for v in q.tensors()}
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v)
    with hooks:
        ops.nf4_linear(t["x"].requires_grad_(), q)
    assert all(v.untyped_storage().data_ptr() in known for v in kept)


def test_only_what_needs_a_gradient_gets_one():
    t = make(8, 64, 48, 4, torch.float32)
    q = fastlora.quantize_nf4(t["w"])
    a, b = t["a"].requires_grad_(), t["b"].requires_grad_()
    ops.lora_linear(t["x"], q, a, b, 0.5, dropout_p=0.1).sum().backward()
    assert t["x"].grad is None
    assert a.grad is not None
    assert b.grad is not None
    frozen = ops.lora_linear(t["x"].requires_grad_(), q, a.detach(), b.detach(), 0.5)
    frozen.sum().backward()
    exact = torch.ones(8, 48, device=DEVICE) @ (fastlora.dequantize_nf4(q) + 0.5 * b @ a)
    torch.testing.assert_close(t["x"].grad, exact.detach())


def test_a_weight_changed_between_forward_and_backward_is_an_error():
    t = make(8, 64, 48, 4, torch.float32)
    a = t["a"].requires_grad_()
    y = ops.lora_linear(t["x"].requires_grad_(), t["w"], a, t["b"], 0.5)
    t["b"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(use_reentrant):
    t = make(16, 64, 48, 4, torch.float32)
    q = fastlora.quantize_nf4(t["w"])

    def gradients(checkpointed):
        leaves = [t[n].detach().clone().requires_grad_() for n in ("x", "a", "b")]

        def layer(x):
            return ops.lora_linear(x, q, leaves[1], leaves[2], 0.5, dropout_p=0.3)

        torch.manual_seed(5)
        if checkpointed:
            y = checkpoint(layer, leaves[0], use_reentrant=use_reentrant)
        else:
            y = layer(leaves[0])
        return torch.autograd.grad(y, leaves, t["dy"]) if not use_reentrant else backward(y, leaves)

    def backward(y, leaves):
        y.backward(t["dy"])
        return [leaf.grad for leaf in leaves]

    for g, e in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(g, e)


def weight(t, base):
    """The base weight of a layer, as the ops take it."""
    return t["w"] if base == "dense" else quantized(t["w"], double_quant=base == "nf4")[0]


def loss_and_gradients(t, base, around=lambda layer, x: layer(x), p=0.0):
    """A non-linear loss of a layer, and the gradients of x, a and b; `around` calls the layer."""
    w = weight(t, base)
    x, a, b = (t[n].detach().clone().requires_grad_() for n in ("x", "a", "b"))

    def layer(x):
        return ops.lora_linear(x, w, a, b, 0.5, t["bias"], dropout_p=p).tanh().square()

    torch.manual_seed(5)
    y = around(layer, x).sum()
    return [y.detach(), *torch.autograd.grad(y, (x, a, b))]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", BASES)
def test_selective_checkpointing_keeps_no_half_made_output(base, p):
    t = make(16, 64, 48, 4, torch.float32)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    around = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    expected = loss_and_gradients(t, base, p=p)
    for g, e in zip(loss_and_gradients(t, base, around, p), expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("base", BASES)
def test_fake_tensors_have_shapes_alone(base):
    t = make(16, 64, 48, 4, torch.float32)
    q = weight(t, base)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 64, device=DEVICE)
        y = ops.lora_linear(x, q, t["a"].requires_grad_(), t["b"], 0.5, dropout_p=0.5)
        (da,) = torch.autograd.grad(y.sum(), t["a"])
    assert isinstance(y, FakeTensor)
    assert y.shape == (2, 3, 48)
    assert da.shape == (4, 64)


def test_fake_weights_are_not_read():
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="memory of its own, got Fake"):
        fastlora.quantize_nf4(torch.empty(4, 64, device=DEVICE))
    q = fastlora.quantize_nf4(torch.ones(4, 64, device=DEVICE))
    parts = [None if t is None else mode.from_tensor(t) for t in q.tensors()]
    with pytest.raises(ValueError, match="q must be a tensor with memory of its own, got Fake"):
        fastlora.dequantize_nf4(NF4Weight.unchecked(q.facts, parts))


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
@pytest.mark.parametrize("base", BASES)
def test_a_traced_graph_has_the_whole_layer(base, tracing_mode):
    t = make(16, 64, 48, 4, torch.float32)
    w = weight(t, base)

    def layer(x):
        return ops.lora_linear(x, w, t["a"], t["b"], 0.5)

    mode = {"tracing_mode": tracing_mode, "_allow_non_fake_inputs": True}
    graph = make_fx(layer, **mode)(torch.randn(16, 64, device=DEVICE))
    assert torch.equal(graph(t["x"]), layer(t["x"]))


class Stored(torch.Tensor):
    """fp32 that is kept as bf16, as quantised tensors of other libraries are."""

    @staticmethod
    def __new__(cls, inner):
        of = {"dtype": torch.float32, "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **of)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda t: t.inner.float(), (args, kwargs or {}))
        return func(*args, **kwargs)


def test_tensors_that_wrap_others_compute_for_themselves():
    t = make(16, 64, 48, 4, torch.float32)
    expected = ops.lora_linear(t["x"], t["w"], t["a"].bfloat16().float(), t["b"], 0.5)
    got = ops.lora_linear(t["x"], t["w"], Stored(t["a"].bfloat16()), t["b"], 0.5)
    assert torch.equal(got, expected)


# what the backward gets from what comes after the layer
GRADIENTS = {
    "zeros that are not written": lambda y: y.sgn().sum(),
    "of a subclass": lambda y: (y * TwoTensor(torch.ones_like(y), torch.ones_like(y))).sum(),
    "sparse": lambda y: torch.gather(
        y, 1, torch.zeros(len(y), 1, dtype=torch.int64, device=DEVICE), sparse_grad=True
    ).sum(),
}


@pytest.mark.parametrize("after", GRADIENTS)
@pytest.mark.parametrize("base", BASES)
def test_gradients_that_are_no_plain_tensors(base, after):
    t = make(16, 64, 48, 4, torch.float32)
    w = weight(t, base)
    dense = t["w"] if base == "dense" else fastlora.dequantize_nf4(w)
    leaves = [t[n].requires_grad_() for n in ("x", "a", "b")]
    x, a, b = leaves
    got = torch.autograd.grad(GRADIENTS[after](ops.lora_linear(x, w, a, b, 0.5)), leaves)
    y = F.linear(x, dense) + 0.5 * F.linear(F.linear(x, a), b)
    for g, e in zip(got, torch.autograd.grad(GRADIENTS[after](y), leaves), strict=True):
        g, e = (v.a if isinstance(v, TwoTensor) else v for v in (g, e))
        torch.testing.assert_close(g, e, atol=1e-4, rtol=1e-4)


def test_negated_views_are_read_as_they_are():
    t = make(16, 64, 48, 4, torch.float32)
    q = fastlora.quantize_nf4(t["w"])
    assert torch.equal(ops.nf4_linear(torch._neg_view(t["x"]), q), ops.nf4_linear(-t["x"], q))
    negated = fastlora.quantize_nf4(torch._neg_view(t["w"]))
    assert torch.equal(negated.qweight, fastlora.quantize_nf4(-t["w"]).qweight)


@pytest.mark.parametrize("watched", [False, True])
def test_unused_members_get_no_gradient(watched):
    t = make(16, 64, 48, 4, torch.float32)
    leaves = [t["w"].clone().requires_grad_() for _ in range(2)]
    members = [Member(w, a=t["a"], b=t["b"], scale=0.5) for w in leaves]
    with FlopCounterMode(display=False) if watched else nullcontext():
        y, _ = ops.linear_group(t["x"], members)
    used, unused = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
    assert used is not None
    assert unused is None


@pytest.mark.parametrize("base", BASES)
def test_flops_are_those_of_the_products(base):
    M, K, N, R = 16, 64, 48, 4
    t = make(M, K, N, R, torch.float32)
    w = weight(t, base)
    with FlopCounterMode(display=False) as counter:
        ops.lora_linear(t["x"], w, t["a"], t["b"], 0.5)
    assert counter.get_total_flops() == 2 * M * (N * K + R * (N + K))
    leaves = [t[n].requires_grad_() for n in ("x", "a", "b")]
    with FlopCounterMode(display=False) as counter:
        y = ops.lora_linear(*leaves[:1], w, *leaves[1:], 0.5)
        y.sum().backward()
    # dx as well; of the adapter ds, db, da and its part of dx
    assert counter.get_total_flops() == 2 * M * (2 * N * K + R * 3 * (N + K))
    for of_forward in (FlopCounterMode(display=False), nullcontext()):
        with of_forward:
            y = ops.lora_linear(*leaves[:1], w, *leaves[1:], 0.5)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == 2 * M * (N * K + R * 2 * (N + K))


BAD_CALLS = {
    "x must be fp32, fp16 or bf16, got torch.float64": {"x": torch.zeros(2, 8).double()},
    r"x must be \[..., K\] and w \[N, K\], got \[2, 9\] and \[4, 8\]": {"x": torch.zeros(2, 9)},
    r"w must have the dtype of x \(torch.float32\), got torch.float16": {
        "w_or_q": torch.zeros(4, 8).half()
    },
    r"bias must be \[N\] = \[4\], got \[5\]": {"bias": torch.zeros(5)},
    r"a must be \[R, 8\] and b \[4, R\] with R >= 1, got \[2, 7\] and \[4, 2\]": {
        "a": torch.zeros(2, 7)
    },
    r"got \[3, 8\] and \[4, 2\]": {"a": torch.zeros(3, 8)},
    r"got \[0, 8\] and \[4, 0\]": {"a": torch.zeros(0, 8), "b": torch.zeros(4, 0)},
    "a and b must have a float dtype, got torch.int64": {"a": torch.zeros(2, 8).long()},
    r"dropout_p must be in \[0, 1\) and round below 1, got 1.0": {"dropout_p": 1.0},
    r"dropout_p must be in \[0, 1\) and round below 1, got -0.1": {"dropout_p": -0.1},
    r"round below 1, got 0.999999": {"dropout_p": 0.999999},
    r"a must be on the device of x \(cpu\), got meta": {"a": torch.zeros(2, 8, device="meta")},
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls(message):
    good = {"x": torch.zeros(2, 8), "w_or_q": torch.zeros(4, 8), "scale": 1.0}
    good |= {"a": torch.zeros(2, 8), "b": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=message):
        ops.lora_linear(**good | BAD_CALLS[message])


def test_a_forced_backend_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("FASTLORA_BACKEND")  # which one quantises does not matter
    x, q = torch.zeros(2, 8), fastlora.quantize_nf4(torch.ones(4, 8))
    monkeypatch.setenv("FASTLORA_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="FASTLORA_BACKEND=cuda cannot run on cpu"):
        ops.nf4_linear(x, q)
