"""Linear ops of the CPU backend against fp64, in every instruction set that runs here."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_as_accurate
from torch import Tensor

from fastlora import cpu, reference
from fastlora.codebooks import dynamic_map
from fastlora.nf4 import NF4Weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # M, K, N, R, block size, nested scales
    (0, 64, 33, 4, 64, True),  # no tokens
    (1, 1, 1, 1, 32, False),
    (1, 480, 301, 3, 64, True),  # one token, an odd number of chunks
    (1, 512, 65, 16, 32, True),  # an even one, of several scales
    (2, 1088, 97, 8, 128, False),  # two tokens
    (5, 31, 31, 3, 32, True),  # below every unit, K odd: codes one by one
    (16, 96, 300, 16, 64, True),  # blocks straddle rows
    (57, 300, 96, 33, 128, False),  # K no multiple of 32; one row, one rank above a unit
    (13, 257, 129, 64, 64, True),  # one column above a panel and a block of columns
    (130, 576, 97, 130, 4096, True),  # panels of unequal depth; ranks in two passes
    (513, 97, 64, 8, 512, False),  # one row above a block of rows
    (1100, 160, 31, 16, 32, True),  # three blocks of rows
    (6, 2112, 65, 257, 1024, False),  # more columns than are packed at once; ranks in three passes
    (9, 64, 2085, 5, 2048, True),  # the same for dy
    (64, 512, 256, 16, 64, True),  # everything whole
]
P = 0.3
SCALE = 0.7

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random numbers whose rows are neither aligned nor neighbours."""
    return torch.randn(rows, columns + 5).to(dtype)[:, 3 : 3 + columns]


def weight(N: int, K: int, blocksize: int, nested: bool) -> NF4Weight:
    """A random weight, quantised by the reference."""
    packed, absmax, _ = reference.quantize_blocks(torch.randn(N, K), blocksize)
    second = (None, None, None)
    if nested:
        absmax, absmax2, offset = reference.quantize_stats(absmax)
        second = (absmax2, dynamic_map(), offset)
    return NF4Weight(packed, absmax, (N, K), blocksize, torch.float32, *second)


def dense(q: NF4Weight, dtype: torch.dtype) -> Tensor:
    """What q holds."""
    (w,) = reference.dequantize([q], dtype)
    return w


def check(got: Tensor, formula: Callable[..., Tensor], *operands: Tensor) -> None:
    """Compare with a formula in fp64 and with the same in fp32, rounded once."""
    exact, eager = (formula(*(t.to(d) for t in operands)) for d in (torch.float64, torch.float32))
    assert_as_accurate(got, eager.to(got.dtype), exact)


def dropout_state() -> Tensor:
    return torch.tensor([-(2**62) + 5, 2**33 + 1])


def masked(t: Tensor, state: Tensor, p: float) -> Tensor:
    """Dropout of t without rounding."""
    return reference.dropout(t.double(), state, p).to(t.dtype)


@each_dtype
@each_shape
@pytest.mark.parametrize("p", [0, P])
def test_lora_down(isa, p, shape, dtype):
    M, K, _, R, *_ = shape
    x, a, state = matrix(M, K, dtype), matrix(R, K, dtype), dropout_state()
    dropped = reference.dropout(x, state, p)
    check(cpu.lora_down(x, a, state, p), lambda x, a: x @ a.T, dropped, a)


@each_dtype
@each_shape
def test_linear_packed(isa, shape, dtype):
    M, K, N, R, *form = shape
    x, s, b, bias = (
        matrix(M, K, dtype),
        matrix(M, R, dtype),
        matrix(N, R, dtype),
        matrix(1, N, dtype),
    )
    q = weight(N, K, *form)
    w = dense(q, dtype)
    y = cpu.linear_packed(x, q, None, None, None, SCALE)
    check(y, lambda x, w: x @ w.T, x, w)
    y = cpu.linear_packed(x, q, bias[0], None, None, SCALE)
    check(y, lambda x, w, bias: x @ w.T + bias, x, w, bias)
    y = cpu.linear_packed(x, q, bias[0], s, b, SCALE)
    check(y, lambda x, w, bias, s, b: x @ w.T + bias + SCALE * (s @ b.T), x, w, bias, s, b)


@each_dtype
@pytest.mark.parametrize("shape", [s for s in SHAPES if max(s[1], s[2]) < 1000], ids=str)
def test_products_with_an_identity_are_the_weight(isa, shape, dtype):
    _, K, N, _, *form = shape
    q = weight(N, K, *form)
    w = dense(q, dtype)
    y = cpu.linear_packed(torch.eye(K, dtype=dtype), q, None, None, None, SCALE)
    assert torch.equal(y, w.T)
    dx = cpu.linear_dx_packed([torch.eye(N, dtype=dtype)], [q], None, None, None, None, 0)
    assert torch.equal(dx, w)


@each_dtype
@each_shape
def test_lora_up(isa, shape, dtype):
    M, _, N, R, *_ = shape
    y, s, b = torch.randn(M, N).to(dtype), matrix(M, R, dtype), matrix(N, R, dtype)
    before = y.clone()
    got = cpu.lora_up(y, s, b, SCALE)
    assert got.data_ptr() == y.data_ptr()
    check(got, lambda y, s, b: y + SCALE * (s @ b.T), before, s, b)


@each_dtype
@each_shape
def test_lora_bwd_ds_db(isa, shape, dtype):
    M, _, N, R, *_ = shape
    dy, b, s = matrix(M, N, dtype), matrix(N, R, dtype), matrix(M, R, dtype)
    # the group's ds is one matrix, of which each member writes some columns
    group = torch.full((M, R + 7), 3.0, dtype=dtype)
    ds = group[:, 5 : 5 + R]
    db = cpu.lora_bwd_ds_db(dy, b, s, SCALE, ds)
    check(ds, lambda dy, b: SCALE * (dy @ b), dy, b)
    check(db, lambda dy, s: SCALE * (dy.T @ s), dy, s)
    assert torch.all(group[:, :5] == 3)
    assert torch.all(group[:, 5 + R :] == 3)


@each_dtype
@each_shape
@pytest.mark.parametrize("p", [0, P])
def test_lora_bwd_da(isa, p, shape, dtype):
    M, K, _, R, *_ = shape
    x, ds, state = matrix(M, K, dtype), matrix(M, R, dtype), dropout_state()
    dropped = reference.dropout(x, state, p)
    check(cpu.lora_bwd_da(x, ds, state, p), lambda x, ds: ds.T @ x, dropped, ds)


@each_dtype
@each_shape
@pytest.mark.parametrize("p", [0, P])
def test_lora_bwd_dx(isa, p, shape, dtype):
    M, K, _, R, *_ = shape
    dx, ds, a = torch.randn(M, K).to(dtype), matrix(M, R, dtype), matrix(R, K, dtype)
    state, before = dropout_state(), dx.clone()
    got = cpu.lora_bwd_dx(dx, ds, a, state, p)
    assert got.data_ptr() == dx.data_ptr()
    check(got, lambda dx, ds, a: dx + masked(ds @ a, state, p), before, ds, a)


@each_dtype
@each_shape
@pytest.mark.parametrize("members", [1, 3])
def test_linear_dx_packed(isa, members, shape, dtype):
    M, K, N, R, *form = shape
    qs = [weight(n, K, *form) for n in (N, max(1, N // 3), 40)[:members]]
    dys = [matrix(M, q.shape[0], dtype) for q in qs]
    ds, a, state = matrix(M, R, dtype), matrix(R, K, dtype), dropout_state()
    before = torch.randn(M, K).to(dtype)
    dy, w = torch.cat(dys, dim=1), torch.cat([dense(q, dtype) for q in qs])
    dx = cpu.linear_dx_packed(dys, qs, None, None, None, None, 0)
    check(dx, lambda dy, w: dy @ w, dy, w)
    dx = cpu.linear_dx_packed(dys, qs, before.clone(), None, None, None, 0)
    check(dx, lambda dy, w, dx: dx + dy @ w, dy, w, before)
    dx = cpu.linear_dx_packed(dys, qs, None, ds, a, None, 0)
    check(dx, lambda dy, w, ds, a: dy @ w + ds @ a, dy, w, ds, a)
    dx = cpu.linear_dx_packed(dys, qs, before.clone(), ds, a, state, P)
    check(
        dx,
        lambda dy, w, dx, ds, a: dx + dy @ w + masked(ds @ a, state, P),
        *(dy, w, before, ds, a),
    )


# --- layouts and threads ---------------------------------------------------------------------


def every_op(t: dict[str, Tensor], q: NF4Weight) -> dict[str, Tensor]:
    """The results of all ops on one layer."""
    state, ds = dropout_state(), torch.empty(t["s"].shape, dtype=t["s"].dtype)
    x, a, b, dy = t["x"], t["a"], t["b"], t["dy"]
    db = cpu.lora_bwd_ds_db(dy, b, t["s"], SCALE, ds)
    return {
        "s": cpu.lora_down(x, a, state, P),
        "y": cpu.linear_packed(x, q, t["bias"], t["s"], b, SCALE),
        "ds": ds,
        "db": db,
        "da": cpu.lora_bwd_da(x, t["s"], state, P),
        "dx": cpu.linear_dx_packed([dy, dy], [q, q], None, t["s"], a, state, P),
    }


def layer(M: int, K: int, N: int, R: int, dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {"x": (M, K), "a": (R, K), "b": (N, R), "s": (M, R), "dy": (M, N)}
    tensors = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}
    return tensors | {"bias": torch.randn(N).to(dtype)}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """The names of what is equal."""
    return [name for name in expected if torch.equal(got[name], expected[name])]


@each_dtype
def test_layouts_change_nothing(isa, dtype):
    t, q = layer(30, 70, 45, 9, dtype), weight(45, 70, 64, True)
    expected = every_op(t, q)
    for change in (
        lambda v: torch.cat([v, v], dim=-1)[..., : v.shape[-1]],
        lambda v: torch.stack([v, v], dim=-1)[..., 0],
        lambda v: torch.cat([v[:1], v])[1:],
    ):
        moved = {name: change(v) for name, v in t.items()}
        assert same(every_op(moved, q), expected) == [*expected]
    rows = {name: v[:1].expand_as(v) if name in ("x", "dy", "s") else v for name, v in t.items()}
    copies = {name: v.contiguous() for name, v in rows.items()}
    assert same(every_op(rows, q), every_op(copies, q)) == [*expected]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((600, 576, 160, 16), torch.bfloat16),  # two blocks of rows, more threads than columns
        ((5, 2112, 577, 130), torch.float16),  # more threads than rows
        ((130, 301, 95, 3), torch.float32),
    ],
    ids=str,
)
def test_threads_change_nothing_but_db(isa, shape, dtype, threads):
    t, q = layer(*shape, dtype), weight(shape[2], shape[1], 64, True)
    threads(1)
    expected = every_op(t, q)
    for n in range(2, 9):
        threads(n)
        got, again = every_op(t, q), every_op(t, q)
        assert set(same(got, expected)) >= expected.keys() - {"db"}, n
        assert torch.equal(again["db"], got["db"]), n
        check(got["db"], lambda dy, s: SCALE * (dy.T @ s), t["dy"], t["s"])


def test_callers_on_several_python_threads(isa, threads):
    threads(2)
    layers = []
    for shape in ((200, 320, 160, 16), (70, 577, 301, 33)):
        layers.append((layer(*shape, torch.bfloat16), weight(shape[2], shape[1], 64, True)))
    expected = [every_op(*arguments) for arguments in layers]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(every_op, *layers[i % 2]) for i in range(10)]
        for i, call in enumerate(calls):
            assert same(call.result(), expected[i % 2]) == [*expected[0]]


@each_dtype
def test_nothing_is_written_past_an_output(isa, dtype, guards):
    shapes = [shape for shape in SHAPES if shape[0] < 100]
    for M, K, N, R, *form in shapes:
        t, q = layer(M, K, N, R, dtype), weight(N, K, *form)
        results = every_op(t, q)
        cpu.linear_packed(t["x"], q, None, None, None, SCALE)
        cpu.linear_dx_packed([t["dy"]], [q], results["dx"], None, None, None, 0)
        cpu.lora_up(results["y"], t["s"], t["b"], SCALE)
        cpu.lora_bwd_dx(results["dx"], t["s"], t["a"], dropout_state(), P)
        check(results["ds"], lambda dy, b: SCALE * (dy @ b), t["dy"], t["b"])
    assert guards() == 7 * len(shapes)
