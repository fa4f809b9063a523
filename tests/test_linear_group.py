"""Layers that share their input as one op, and every path that a plan may choose."""

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DEVICE, DTYPES, assert_as_accurate, crossed, quantized

import fastlora
from fastlora import ops, plan, reference
from fastlora.member import Member

GROUPS = [  # M, K, N of each member, R of each member
    (63, 130, (50, 33), (8, 8)),
    (7, 64, (48, 16, 16), (16, 8, 8)),  # q, k, v
    (33, 45, (24, 24, 8), (4, 0, 5)),  # a member without adapter, K odd
    (0, 64, (16, 8), (4, 4)),  # no tokens
    (40, 64, (32,), (8,)),  # one layer
]
PATHS = [
    plan.Path(forward, dx, "asked for")
    for forward, dx in (("addmm", "tail"), ("augment", "tail"), ("gemm", "gemm"))
]


@pytest.fixture(params=[name for name in BACKENDS if name != "cpu"])
def any_path_backend(request, monkeypatch):
    """Run on every backend that has all paths."""
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)


def make(M, K, Ns, Rs, dtype):
    """x, the members' tensors (NF4 weights as what they hold), one dy per member."""
    x = torch.randn(M, K, device=DEVICE).to(dtype)
    dys = [torch.randn(M, N, device=DEVICE).to(dtype) for N in Ns]
    parts = []
    for N, R in zip(Ns, Rs, strict=True):
        q, w = quantized(torch.randn(N, K, device=DEVICE).to(dtype))
        part = {"w": w, "bias": torch.randn(N, device=DEVICE).to(dtype)}
        if R:
            part |= {"a": torch.randn(R, K, device=DEVICE), "b": torch.randn(N, R, device=DEVICE)}
            part |= {"a": part["a"].to(dtype), "b": part["b"].to(dtype)}
        parts.append((q, part))
    return x, parts, dys


def leaves(x, parts, dtype):
    """Tensors that get a gradient: x, and of each member bias, a and b."""
    x = x.to(dtype).detach().requires_grad_()
    grown = [
        {n: t.to(dtype).detach().requires_grad_(n != "w") for n, t in part.items()}
        for _, part in parts
    ]
    return x, grown, [x, *(t for part in grown for n, t in part.items() if n != "w")]


def ours(x, parts, dys, p, scale=0.5):
    x, grown, wanted = leaves(x, parts, x.dtype)
    members = [
        Member(q, part["bias"], part.get("a"), part.get("b"), scale)
        for (q, _), part in zip(parts, grown, strict=True)
    ]
    ys = ops.linear_group(x, members, dropout_p=p)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, wanted, dys)]


def plain(x, parts, dys, keep, p, dtype, scale=0.5):
    x, grown, wanted = leaves(x, parts, dtype)
    dropped = x if keep is None else torch.where(keep, x / (1 - p), 0)
    ys = []
    for part in grown:
        y = F.linear(x, part["w"], part["bias"])
        if "a" in part:
            y = y + scale * F.linear(F.linear(dropped, part["a"]), part["b"])
        ys.append(y)
    return [
        *(y.detach() for y in ys),
        *torch.autograd.grad(ys, wanted, [dy.to(dtype) for dy in dys]),
    ]


def check(group, dtype, p=0.0):
    x, parts, dys = make(*group, dtype)
    keep = None
    if p and any(group[3]):
        torch.manual_seed(3)
        state = torch.randint(2**63 - 1, (2,), device=DEVICE)  # the one draw of the group
        keep = reference.dropout_halves(state, *x.shape) >= round(p * 65536)
        torch.manual_seed(3)
    share = round(p * 65536) / 65536
    got = ours(x, parts, dys, p)
    eager = plain(x, parts, dys, keep, share, dtype)
    for g, e, t in zip(got, eager, plain(x, parts, dys, keep, share, torch.float64), strict=True):
        assert_as_accurate(g, e, t)


@pytest.mark.parametrize(
    ("group", "backend", "dtype", "p"), crossed(GROUPS, BACKENDS, DTYPES, [0.0, 0.3]), ids=str
)
def test_a_group_computes_what_its_members_do(group, backend, dtype, p, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    check(group, dtype, p)


@pytest.mark.usefixtures("any_path_backend")
@pytest.mark.parametrize(
    ("group", "path", "dtype", "p"),
    crossed([(63, 64, (48, 16), (16, 8)), (40, 64, (32,), (8,))], PATHS, DTYPES, [0.0, 0.3]),
    ids=lambda value: f"{value.forward}-{value.dx}" if isinstance(value, plan.Path) else str(value),
)
def test_every_path_computes_the_same(group, path, dtype, p, monkeypatch):
    monkeypatch.setattr(plan, "choose", lambda *_: path)
    check(group, dtype, p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_members_of_different_kinds(backend, monkeypatch):
    """Dense beside 4-bit, flat beside nested, two block sizes: each is decoded as what it is."""
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    x = torch.randn(9, 64, device=DEVICE, requires_grad=True)
    dense = [torch.randn(n, 64, device=DEVICE) for n in (8, 16, 24, 32)]
    weights = [
        dense[0].requires_grad_(),
        fastlora.quantize_nf4(dense[1]),
        fastlora.quantize_nf4(dense[2], double_quant=False),
        fastlora.quantize_nf4(dense[3], blocksize=128),
    ]
    decoded = [dense[0], *(fastlora.dequantize_nf4(q) for q in weights[1:])]
    ys = ops.linear_group(x, [Member(w) for w in weights])
    for y, w in zip(ys, decoded, strict=True):
        torch.testing.assert_close(y, x @ w.T)
    sum(y.sum() for y in ys).backward()
    torch.testing.assert_close(x.grad, sum(w.detach().sum(0) for w in decoded).expand(9, -1))
    torch.testing.assert_close(dense[0].grad, x.detach().sum(0).expand(8, -1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_output_that_is_not_used(backend, p, monkeypatch):
    """Its layer gets no gradient, and the others the same as without it."""
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    x, parts, dys = make(17, 64, (32, 16), (8, 8), torch.float32)
    x, grown, wanted = leaves(x, parts, torch.float32)
    members = [
        Member(q, t["bias"], t["a"], t["b"], 0.5) for (q, _), t in zip(parts, grown, strict=True)
    ]
    torch.manual_seed(3)
    y, _ = ops.linear_group(x, members, p)
    both = torch.autograd.grad(y, wanted, dys[0], allow_unused=True)
    torch.manual_seed(3)
    alone = torch.autograd.grad(ops.linear_group(x, members[:1], p), wanted[:4], dys[:1])
    for got, expected in zip(both, alone, strict=False):
        torch.testing.assert_close(got, expected)
    assert all(g is None for g in both[4:])


@pytest.mark.usefixtures("any_path_backend")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.forward}-{path.dx}")
def test_operands_whose_rows_are_not_neighbours(path, monkeypatch):
    """A Conv1D's transposed weight, transposed adapters, strided and expanded bias."""
    monkeypatch.setattr(plan, "choose", lambda *_: path)
    M, K, N, R = 24, 64, 32, 8
    x, w = torch.randn(M, K, device=DEVICE), torch.randn(K, N, device=DEVICE).T
    a, b = torch.randn(K, R, device=DEVICE).T, torch.randn(R, N, device=DEVICE).T
    biases = torch.randn(N, 2, device=DEVICE)[:, 0], torch.randn(1, device=DEVICE).expand(N)
    if path.forward == "augment":  # has no dense weights
        w = fastlora.quantize_nf4(w)
    dense = fastlora.dequantize_nf4(w) if path.forward == "augment" else w
    for bias in biases:
        leaf = x.clone().requires_grad_()
        (y,) = ops.linear_group(leaf, [Member(w, bias, a, b, 0.5)])
        torch.testing.assert_close(y, x @ dense.T + bias + 0.5 * (x @ a.T) @ b.T)
        y.sum(0).sum().backward()  # dy is expanded
        expected = (dense + 0.5 * b @ a).sum(0).expand(M, K)
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)


class NoGradient(torch.autograd.Function):
    """Gives no gradient, which autograd hands on."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_without_any_gradient(compiled):
    x = torch.randn(4, 64, device=DEVICE, requires_grad=True)
    q = fastlora.quantize_nf4(torch.randn(8, 64, device=DEVICE))
    run = torch.compile(ops.nf4_linear, backend="aot_eager") if compiled else ops.nf4_linear
    NoGradient.apply(run(x, q)).sum().backward()
    assert x.grad is None or not x.grad.any()


def test_bad_groups():
    x, w, a = torch.zeros(2, 8), torch.zeros(4, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"at least one Member and nothing else, got \[\]"):
        ops.linear_group(x, [])
    with pytest.raises(ValueError, match=r"nothing else, got \['Tensor'\]"):
        ops.linear_group(x, [w])
    with pytest.raises(ValueError, match=r"w \[N, K\], got \[2, 8\] and \[4, 9\]"):
        ops.linear_group(x, [Member(w), Member(torch.zeros(4, 9))])
    with pytest.raises(ValueError, match=r"given together, got a \[2, 8\] and b missing"):
        ops.linear_group(x, [Member(w, a=a)])
    with pytest.raises(ValueError, match="a must be on the device of x"):
        ops.linear_group(x, [Member(w, a=a.to("meta"), b=torch.zeros(4, 2))])
