"""gemm_lora and gemm_lora_dx: parity with the reference in every form, masks bit for bit."""

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_as_accurate, crossed
from triton_helpers import needs_triton

from fastlora import reference
from fastlora.kernels.common import arch
from fastlora.kernels.gemm_lora import configs, gemm_lora, gemm_lora_dx

pytestmark = needs_triton

P = 0.3
THRESHOLD = reference.dropout_threshold(P)

# M, N, K, R
SHAPES = [
    (1, 8, 8, 1),  # one element of every block
    (63, 72, 40, 8),  # tails in every direction
    (129, 32, 16, 64),  # more tiles of rows than run together
    (7, 16, 24, 256),  # more ranks than columns
]
# rows that do not begin at multiples of 16 bytes
ODD_SHAPES = [
    (1, 1, 1, 1),
    (7, 13, 3, 8),
    (33, 65, 37, 17),
]
FORMS = ("tma", "pointers", "pointers, four parts")


def config_of(form, R, dtype):
    """The configuration of a form in the interpreter, as many as there are on a GPU."""
    found = configs(arch(), R, dtype.itemsize)
    index = FORMS.index(form)
    if index >= len(found):
        pytest.skip(f"{arch()} has {len(found)} configurations")
    return found[index]


def inputs(M, N, K, R, dtype):
    """x, dy, w, s, b, a, bias, state."""
    made = [
        torch.randn(shape, device=DEVICE).to(dtype)
        for shape in ((M, K), (M, N), (N, K), (M, R), (N, R), (R, K))
    ]
    bias = torch.randn(N, device=DEVICE)
    return *made, bias, torch.tensor([0x1234567890ABCDEF, 5], device=DEVICE)


def forward(x, w, s, b, scale, bias):
    return reference.lora_up(reference.linear(x, w, bias), s, b, scale)


def check(x, w, s, b, scale, bias, config=None):
    got = gemm_lora(x, w, s, b, scale, bias, config)
    low = None if bias is None else bias.to(x.dtype)
    exact = [None if t is None else t.double() for t in (x, w, s, b)]
    truth = forward(*exact, scale, None if bias is None else bias.double())
    assert_as_accurate(got, forward(x, w, s, b, scale, low), truth)


def check_dx(dy, w, ds, a, state, threshold, config=None):
    p = threshold / 65536
    got = gemm_lora_dx(dy, w, ds, a, state, threshold, config)
    eager = reference.lora_bwd_dx(reference.linear_dx(dy, w), ds, a, state, p)
    exact = reference.linear_dx(dy.double(), w.double())
    exact = reference.lora_bwd_dx(exact, ds.double(), a.double(), state, p)
    assert_as_accurate(got, eager, exact)


@pytest.mark.parametrize(("shape", "form", "dtype"), crossed(SHAPES, FORMS, DTYPES), ids=str)
def test_parity(shape, form, dtype):
    x, dy, w, s, b, a, bias, state = inputs(*shape, dtype)
    config = config_of(form, shape[3], dtype)
    check(x, w, s, b, 0.3, bias, config)
    check_dx(dy, w, s, a, state, THRESHOLD, config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_unaligned_rows(shape, dtype):
    x, dy, w, s, b, a, bias, state = inputs(*shape, dtype)
    check(x, w, s, b, 0.3, bias)
    check_dx(dy, w, s, a, state, THRESHOLD)


@pytest.mark.parametrize("form", FORMS)
def test_no_bias_no_dropout(form):
    x, dy, w, s, b, a, *_ = inputs(33, 16, 40, 16, torch.float32)
    config = config_of(form, 16, torch.float32)
    check(x, w, s, b, 2.0, None, config)
    check_dx(dy, w, s, a, None, 0, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_of_another_dtype(dtype):
    x, _, w, s, b, _, bias, _ = inputs(9, 16, 16, 8, torch.float32)
    if dtype == torch.bfloat16 and dtype not in DTYPES:
        pytest.skip("the interpreter cannot read bf16")
    check(x, w, s, b, 0.3, bias.to(dtype))


def test_scale_of_zero():
    x, _, w, s, b, _, bias, _ = inputs(9, 16, 16, 8, torch.float32)
    check(x, w, s, b, 0.0, bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gap", [8, 3])  # elements between rows: these still begin aligned, or not
def test_rows_apart(form, gap):
    M, N, K, R = 33, 16, 40, 8
    x, dy, w, s, b, a, bias, state = inputs(M, N, K, R, torch.float16)
    config = config_of(form, R, torch.float16)
    if gap == 3 and config.kwargs["FORM"] == "tma":
        pytest.skip("TMA reads aligned rows only")
    x, dy, s = (torch.cat([t, t.new_full((M, gap), torch.nan)], dim=1) for t in (x, dy, s))
    check(x[:, :K], w, s[:, :R], b, 0.3, bias, config)
    check_dx(dy[:, :N], w, s[:, :R], a, state, THRESHOLD, config)


def test_unaligned_start():
    """x and s as columns of wider tensors."""
    x, dy, w, s, b, a, bias, state = inputs(17, 16, 16, 8, torch.float16)
    x, dy, s = (torch.cat([t.new_full((17, 8), torch.nan), t], 1) for t in (x, dy, s))
    x, dy, s = (torch.cat([t[:, 7:], t[:, :7]], 1) for t in (x, dy, s))
    check(x[:, 1:17], w, s[:, 1:9], b, 0.3, bias)
    check_dx(dy[:, 1:17], w, s[:, 1:9], a, state, THRESHOLD)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("threshold", [1, THRESHOLD, 65535])
def test_mask_is_the_reference_bit_for_bit(form, threshold):
    M, N, K = 33, 16, 40
    dy, w = torch.zeros(M, N, device=DEVICE), torch.zeros(N, K, device=DEVICE)
    ds, a = torch.ones(M, 1, device=DEVICE), torch.ones(1, K, device=DEVICE)
    state = torch.tensor([-3, 2**33 + 7], device=DEVICE)
    config = config_of(form, 1, torch.float32)
    dx = gemm_lora_dx(dy, w, ds, a, state, threshold, config)
    assert torch.equal(dx != 0, reference.dropout_halves(state, M, K) >= threshold)


def test_no_tokens():
    x, dy, w, s, b, a, bias, state = inputs(0, 8, 16, 4, torch.float32)
    assert gemm_lora(x, w, s, b, 0.3, bias).shape == (0, 8)
    assert gemm_lora_dx(dy, w, s, a, state, THRESHOLD).shape == (0, 16)
