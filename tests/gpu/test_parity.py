"""The Triton backend in 16 bit against fp64: every shape and every way of the plan."""

import pytest
import torch
from helpers import DEVICE
from test_ops import SHAPES, check, make, mask_of, run

import fastlora
from fastlora import ops, plan, reference
from fastlora.benchmarks.nf4 import WeightProblem
from fastlora.kernels.common import INTERPRET

# the interpreter runs the ways too, in fp16: it has no bf16; the rest it runs in test_ops, test_nf4
needs_gpu = pytest.mark.gpu
pytestmark = [] if INTERPRET else needs_gpu
DTYPE = torch.float16 if INTERPRET else torch.bfloat16

SHAPES = [
    *SHAPES,
    (4096, 4096, 1024, 16),  # k of an 8B model: reductions of many parts
    (300, 1024, 14336, 64),  # up: rows that fill no block
    (8192, 1536, 576, 256),  # the largest rank of one block
    (2049, 320, 2048, 300),  # above it
]

WAYS = [("addmm", "tail"), ("augment", "tail"), ("gemm", "gemm")]
WAY_SHAPES = [
    (1, 64, 64, 8),
    (63, 136, 48, 16),
    (129, 64, 96, 64),
    *([] if INTERPRET else [(512, 4096, 1024, 16), (1000, 1024, 4096, 128)]),
]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")


@pytest.fixture
def take(monkeypatch):
    """Every call takes one way, and says so."""

    def take(way):
        taken = []

        def choose(name, device, problem):
            taken.append(name)
            return plan.Path(*way, "forced")

        monkeypatch.setattr(plan, "choose", choose)
        return taken

    return take


@needs_gpu
@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, base):
    t = make(*shape, DTYPE)
    got = run(t, base)
    check(got, t, DTYPE, names=got.keys())


@needs_gpu
@pytest.mark.parametrize("p", [0.05, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_with_dropout(shape, p):
    t = make(*shape, DTYPE)
    keep = mask_of(*shape[:2], p)
    got = run(t, "nf4", p)
    check(got, t, DTYPE, keep, round(p * 65536) / 65536, names=got.keys())


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("way", WAYS, ids="/".join)
@pytest.mark.parametrize("shape", WAY_SHAPES, ids=str)
def test_every_way(take, shape, way, p):
    t = make(*shape, DTYPE)
    keep = mask_of(*shape[:2], p) if p else None
    taken = take(way)
    got = run(t, "nf4", p)
    assert taken == ["triton"] * 2  # forward and backward
    check(got, t, DTYPE, keep, p, names=got.keys())


@pytest.mark.parametrize("way", WAYS[:2], ids="/".join)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_every_way_of_a_group(take, way, p):
    M, K, R, sizes = 65, 128, 8, (48, 32, 16)
    make_one = [make(M, K, N, R, DTYPE) for N in sizes]
    x = make_one[0]["x"]
    keep = mask_of(M, K, p) if p else None
    members, leaves = [], [x.detach().requires_grad_()]
    for t in make_one:
        q = fastlora.quantize_nf4(t["w"])
        t["x"], t["w"] = x, fastlora.dequantize_nf4(q)
        mine = [t[name].detach().requires_grad_() for name in ("a", "b", "bias")]
        members.append(ops.Member(q, mine[2], mine[0], mine[1], 0.5))
        leaves += mine
    take(way)
    ys = ops.linear_group(leaves[0], members, p)
    grads = torch.autograd.grad(ys, leaves, [t["dy"] for t in make_one])
    for i, t in enumerate(make_one):
        da, db, dbias = grads[1 + 3 * i : 4 + 3 * i]
        got = {"y": ys[i].detach(), "da": da, "db": db, "dbias": dbias}
        check(got, t, DTYPE, keep, p, names=got.keys())
    # dx of the group is that of one layer with all weights and adapters stacked
    stacked = {"x": x} | {n: torch.cat([t[n] for t in make_one]) for n in ("w", "a")}
    stacked["b"] = torch.block_diag(*(t["b"] for t in make_one))
    stacked["bias"] = torch.cat([t["bias"] for t in make_one])
    stacked["dy"] = torch.cat([t["dy"] for t in make_one], dim=1)
    check({"dx": grads[0]}, stacked, DTYPE, keep, p, names=["dx"])


@needs_gpu
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("N", "K"), [(64, 128), (33, 96), (7, 45), (48, 100)])
def test_bytes(N, K, double_quant, blocksize):
    w = torch.randn(N, K, device=DEVICE).to(DTYPE)
    q = fastlora.quantize_nf4(w, blocksize, double_quant)
    packed, absmax, _ = reference.quantize_blocks(w, blocksize)
    assert torch.equal(q.qweight.view(-1), packed)
    if not double_quant:
        assert torch.equal(q.absmax, absmax)
    for dtype in {torch.float32, torch.float16, DTYPE}:
        expected = reference.dequantize_blocks(*q.tensors(), q.blocksize, q.numel, dtype)
        assert torch.equal(fastlora.dequantize_nf4(q, dtype).view(-1), expected)


@needs_gpu
def test_bytes_of_a_real_size():
    problem = WeightProblem((torch.randn(14336, 4096, device=DEVICE) * 0.02).to(DTYPE))
    q = fastlora.quantize_nf4(problem.w)
    for got, expected in zip(q.tensors(), problem.quantized.tensors(), strict=True):
        assert torch.equal(got, expected.view_as(got))
    assert torch.equal(fastlora.dequantize_nf4(q), problem.decoded)
