"""More than 2^31 elements: offsets that do not fit 32 bits, in all that can be so large."""

import pytest
import torch

import fastlora
from fastlora import ops, plan, reference
from fastlora.codebooks import dynamic_map

pytestmark = pytest.mark.gpu

BIG, SMALL, R = 4096, 64, 8
M = 2**31 // BIG + 129  # so that M * BIG is above 2^31
ROWS = [0, 1, M // 2, M - 130, M - 128, M - 1]  # the last two are beyond
LOW = 0xFFFFFFFF
GIB = 2**30


@pytest.fixture(autouse=True)
def room(monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    # NaN in all of that takes longer than the test
    torch.use_deterministic_algorithms(False)
    if torch.cuda.get_device_properties(0).total_memory < 60 * GIB:
        pytest.skip("needs 60 GiB")
    yield
    torch.cuda.empty_cache()


def test_decode():
    N, K = M + 3, BIG  # a multiple of four rows: they share a group of scales
    blocks = N * K // 64
    qweight = torch.randint(256, (N, K // 2), dtype=torch.uint8, device="cuda")
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device="cuda")
    absmax2 = torch.rand(blocks // 256, device="cuda")
    code2 = dynamic_map(torch.device("cuda")).clone()
    offset = torch.tensor(0.5, device="cuda")
    facts = (64, torch.bfloat16)
    q = fastlora.NF4Weight(qweight, absmax, (N, K), *facts, absmax2, code2, offset)
    w = fastlora.dequantize_nf4(q)
    assert w.numel() > 2**31
    for row in (0, 4 * (N // 8), N - 132, N - 4):
        four = slice(row, row + 4)
        stats = absmax[row * K // 64 : (row + 4) * K // 64], absmax2[row // 4 : row // 4 + 1]
        part = fastlora.NF4Weight(qweight[four], stats[0], (4, K), *facts, stats[1], code2, offset)
        expected = reference.dequantize_blocks(
            *part.tensors(), part.blocksize, part.numel, torch.bfloat16
        )
        assert torch.equal(w[four].reshape(-1), expected), f"rows from {row}"


def mask_of(state, rows, K, p):
    """What dropout multiplies these rows of x with, fp64; as `reference.dropout_halves`."""
    m = torch.tensor(rows, device=state.device)[:, None]
    group = torch.arange(K // 8, device=state.device)[None]
    counter = torch.broadcast_tensors(group, m & LOW, m >> 32, state[1] & LOW)
    words = torch.stack(
        reference.philox4x32(*counter, state[0] & LOW, state[0] >> 32 & LOW), dim=-1
    )
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)
    threshold = reference.dropout_threshold(p)
    return (halves >= threshold).double() * (65536 / (65536 - threshold))


def test_the_mask_of_rows_is_the_references():
    state = torch.tensor([5, 7], device="cuda")
    expected = reference.dropout(torch.ones(9, 64, device="cuda").double(), state, 0.3)
    assert torch.equal(mask_of(state, [2, 8], 64, 0.3), expected[[2, 8]])


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("way", [("addmm", "tail"), ("augment", "tail"), ("gemm", "gemm")])
@pytest.mark.parametrize(("K", "N"), [(BIG, SMALL), (SMALL, BIG)], ids=["x", "dy"])
def test_layer(monkeypatch, K, N, way, p):
    monkeypatch.setattr(plan, "choose", lambda *_: plan.Path(*way, "forced"))
    make = {"device": "cuda", "dtype": torch.bfloat16}
    x, dy = torch.randn(M, K, **make).requires_grad_(), torch.randn(M, N, **make)
    assert max(x.numel(), dy.numel()) > 2**31
    q = fastlora.quantize_nf4(torch.randn(N, K, **make) * K**-0.5)
    a = (torch.randn(R, K, **make) * K**-0.5).requires_grad_()
    b = torch.randn(N, R, **make).requires_grad_()
    torch.manual_seed(3)
    state = torch.randint(2**63 - 1, (2,), device="cuda")
    torch.manual_seed(3)
    y = ops.lora_linear(x, q, a, b, 0.5, dropout_p=p)
    dx, da, db = torch.autograd.grad(y, [x, a, b], dy)

    w, a64, b64 = fastlora.dequantize_nf4(q).double(), a.detach().double(), b.detach().double()
    keep = mask_of(state, ROWS, K, p) if p else 1.0
    rows, drows = x.detach()[ROWS].double(), dy[ROWS].double()
    close(y.detach()[ROWS], rows @ w.T + 0.5 * (rows * keep) @ a64.T @ b64.T)
    close(dx[ROWS], drows @ w + 0.5 * keep * (drows @ b64 @ a64))
    if p:
        return  # the sums over all rows are in the other case
    da_exact, db_exact = torch.zeros_like(a64), torch.zeros_like(b64)
    for some_x, some_dy in zip(x.detach().split(2**15), dy.split(2**15), strict=True):
        some_x, some_dy = some_x.double(), some_dy.double()
        da_exact += 0.5 * (some_dy @ b64).T @ some_x
        db_exact += 0.5 * some_dy.T @ (some_x @ a64.T)
    close(da, da_exact)
    close(db, db_exact)


def close(got, exact):
    error = (got.double() - exact).abs().max() / exact.abs().max()
    assert error < 0.02, f"relative error {error:.3g}"  # bf16: 8 bits
