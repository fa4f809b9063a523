"""NF4 bytes: against bitsandbytes, against the flat formula, in and out of its formats."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import BACKENDS, DEVICE

import fastlora
from fastlora import NF4Weight, codebooks, native, reference
from fastlora.codebooks import BLOCKSIZES

bnb = pytest.importorskip("bitsandbytes")
bnb_f = bnb.functional

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # N, K
    (64, 256),  # whole blocks in every row
    (8, 96),  # blocks of 64 straddle rows
    (33, 130),  # and the last is partial
    (7, 45),  # odd K, odd count
    (5, 64),  # one block a row
    (1, 2),  # one byte
]


@pytest.fixture(params=BACKENDS)
def backend_name(request, monkeypatch):
    """Run on every backend that this machine has."""
    if request.param == "cpu" and not native.available():
        pytest.skip(native.unavailable_reason())
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)
    return request.param


def weights(shape, dtype):
    """Random weights with a zero block and an outlier."""
    w = torch.randn(shape, device=DEVICE) * 0.02
    flat = w.view(-1)
    flat[: min(64, flat.numel() // 2)] = 0
    flat[flat.numel() // 2] = 3.0
    return w.to(dtype)


def assert_same_bytes(q, theirs, w):
    """The bytes of bitsandbytes' CPU kernels; its CUDA kernels make others in two places.

    In a block of zeros x / absmax is NaN, for which they end at code 0, which is -1, and not at 7,
    which is 0. And of the 8-bit codes they take the one nearest to a scale, where the CPU takes the
    one nearest to the scale rounded to a multiple of 1 / 32767.5.
    """
    absmax = F.pad(w.float().view(-1), (0, -w.numel() % q.blocksize)).view(-1, q.blocksize)
    absmax = absmax.abs().amax(dim=1)
    packed = q.qweight.view(-1)
    if DEVICE == "cuda":
        of_block = torch.arange(packed.numel(), device=packed.device) * 2 // q.blocksize
        packed = torch.where(absmax[of_block] == 0, 0, packed)
    assert torch.equal(packed, theirs.qweight.view(-1))
    for ours, expected in zip(q.tensors()[2:], theirs.tensors()[2:], strict=True):
        assert ours is expected is None or torch.equal(ours, expected)
    if DEVICE == "cuda" and q.nested:
        group = torch.arange(absmax.numel(), device=absmax.device) // 256
        scale = ((absmax - q.offset) / q.absmax2[group]).nan_to_num()
        ours, nearest = ((q.code2[weight.absmax.int()] - scale).abs() for weight in (q, theirs))
        assert (nearest <= ours + 1e-6).all()  # the scale is computed in another order
        assert (ours < nearest + 1 / 32767.5).all()
    else:
        assert torch.equal(q.absmax, theirs.absmax)


def flat_formula(q, dtype):
    """The format's definition, element by element, in NumPy-free plain torch."""
    index = torch.arange(q.numel, device=q.device)
    byte = q.qweight.reshape(-1)[index // 2].int()
    code = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    block = index // q.blocksize
    scale = q.absmax
    if q.nested:
        group = torch.arange(q.absmax.numel(), device=q.device) // 256
        scale = q.code2[q.absmax.int()] * q.absmax2[group]
        scale = scale + q.offset
    return (codebooks.nf4_code(q.device)[code] * scale[block]).to(dtype).view(q.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_and_values_are_bitsandbytes(shape, blocksize, double_quant, dtype, backend_name):
    w = weights(shape, dtype)
    q = fastlora.quantize_nf4(w, blocksize, double_quant)
    packed, state = bnb_f.quantize_4bit(
        w, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    theirs = NF4Weight.from_bnb(packed, state)
    assert_same_bytes(q, theirs, w)
    for out in DTYPES:
        got = fastlora.dequantize_nf4(q, out)
        assert got.dtype == out
        assert torch.equal(got, flat_formula(q, out))
    # bitsandbytes' CPU kernel is only right where blocks do not straddle rows, see below
    if shape[1] % 2 or shape[1] % blocksize == 0:
        assert torch.equal(fastlora.dequantize_nf4(theirs), bnb_f.dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    ("shape", "blocksize"), [((8, 96), 64), ((512, 1536), 1024), ((16, 192), 128)]
)
def test_bitsandbytes_dequantises_straddling_blocks_wrongly_on_the_cpu(shape, blocksize):
    """Why the flat formula is the truth there: bitsandbytes 0.50.2 takes blocks per row."""
    w = torch.randn(shape)
    q = fastlora.quantize_nf4(w, blocksize, double_quant=False)
    theirs = bnb_f.dequantize_4bit(*bnb_f.quantize_4bit(w, blocksize=blocksize, quant_type="nf4"))
    ours = fastlora.dequantize_nf4(q)
    assert torch.equal(ours, flat_formula(q, w.dtype))
    our_error, their_error = ((t - w).norm() for t in (ours, theirs))
    assert their_error > 1.5 * our_error


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_tiny_blocks_give_zeros(dtype, double_quant, backend_name):
    w = torch.randn(4, 64, device=DEVICE)
    w[1] = 0
    w[2] = -0.0
    if dtype == torch.float32:
        w[3] = 1e-39  # 1 / absmax overflows
    zeros = slice(1, 4) if dtype == torch.float32 else slice(1, 3)
    q = fastlora.quantize_nf4(w.to(dtype), 64, double_quant)
    assert (q.qweight[zeros] == 0x77).all()
    assert (fastlora.dequantize_nf4(q)[zeros] == 0).all()
    zeros = torch.zeros(3, 50, dtype=dtype, device=DEVICE)
    all_zero = fastlora.quantize_nf4(zeros, 64, double_quant)
    assert torch.equal(fastlora.dequantize_nf4(all_zero), zeros)


def test_thresholds_are_strict(backend_name):
    thresholds = codebooks.nf4_thresholds()
    w = torch.zeros(1, 64)
    w[0, 0], w[0, 1:16], w[0, 16:31] = 1, thresholds, thresholds.nextafter(torch.tensor(2.0))
    w = w.to(DEVICE)
    codes = fastlora.quantize_nf4(w, double_quant=False).qweight.view(-1, 1)
    codes = torch.cat([codes >> 4, codes & 15], dim=1).view(-1)
    assert codes[1:16].tolist() == [*range(15)]
    assert codes[16:31].tolist() == [*range(1, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_weights_are_counted(dtype, backend_name):
    w = torch.randn(9, 70, device=DEVICE).to(dtype)
    w[0, 3], w[5, 69], w[8, 1] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(ValueError, match="must be finite, got 3 NaN or Inf of 630 weights"):
        fastlora.quantize_nf4(w)


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
def test_non_contiguous_weights(double_quant, backend_name):
    w = torch.randn(64, 96, device=DEVICE)
    got = fastlora.quantize_nf4(w.T, double_quant=double_quant)
    expected = fastlora.quantize_nf4(w.T.contiguous(), double_quant=double_quant)
    assert got.shape == (96, 64)
    for g, e in zip(got.tensors(), expected.tensors(), strict=True):
        assert g is e is None or torch.equal(g, e)


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.zeros(4), r"w must be \[N, K\] and not empty, got \[4\]"),
        (torch.zeros(0, 4), r"w must be \[N, K\] and not empty, got \[0, 4\]"),
        (torch.zeros(4, 4, dtype=torch.float64), "w must be fp32, fp16 or bf16, got torch.float64"),
    ],
    ids=["1-D", "empty", "fp64"],
)
def test_quantize_rejects(w, message):
    with pytest.raises(ValueError, match=message):
        fastlora.quantize_nf4(w)


def test_parts_that_do_not_fit_are_rejected():
    q = fastlora.quantize_nf4(torch.randn(4, 64))
    parts = {k: getattr(q, k) for k in ("qweight", "absmax", "absmax2", "code2", "offset")}
    facts = {"shape": (4, 64), "blocksize": 64, "dtype": torch.float32}
    with pytest.raises(ValueError, match="qweight must have 128 elements"):
        NF4Weight(**parts | {"qweight": q.qweight[:3]}, **facts)
    with pytest.raises(ValueError, match="absmax must have 4 elements"):
        NF4Weight(**parts | {"absmax": q.absmax[:3]}, **facts)
    with pytest.raises(ValueError, match="offset must be given exactly when"):
        NF4Weight(**parts | {"offset": None}, **facts)
    with pytest.raises(ValueError, match="blocksize must be one of"):
        fastlora.quantize_nf4(torch.randn(4, 64), blocksize=48)


def test_bits_per_weight():
    nested = fastlora.quantize_nf4(torch.randn(1024, 4096))
    assert 8 * (nested.nbytes - nested.code2.nbytes) / nested.numel == pytest.approx(
        4.127, abs=1e-3
    )
    flat = fastlora.quantize_nf4(torch.randn(64, 64), double_quant=False)
    assert 8 * flat.nbytes / flat.numel == 4.5


def bnb_layer(N=48, K=96, double_quant=True, storage=torch.uint8, dtype=torch.bfloat16, bias=True):
    layer = bnb.nn.Linear4bit(
        K, N, bias=bias, compress_statistics=double_quant, quant_type="nf4", quant_storage=storage
    )
    layer.weight = bnb.nn.Params4bit(
        (torch.randn(N, K) * 0.02).to(dtype),
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type="nf4",
        quant_storage=storage,
        module=layer,
    )
    return layer.to(DEVICE)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
def test_adopting_a_live_layer_shares_its_bytes(double_quant, storage):
    layer = bnb_layer(double_quant=double_quant, storage=storage)
    state = layer.weight.quant_state
    q = NF4Weight.from_bnb(layer.weight, state)
    assert q.qweight.data_ptr() == layer.weight.data_ptr()
    assert q.absmax.data_ptr() == state.absmax.data_ptr()
    assert q.nested == double_quant
    assert q.shape == (48, 96)
    assert torch.equal(fastlora.dequantize_nf4(q), flat_formula(q, torch.bfloat16))
    packed, state2 = q.to_bnb()
    assert packed.data_ptr() == q.qweight.data_ptr()
    assert torch.equal(
        bnb_f.dequantize_4bit(packed, state2),
        bnb_f.dequantize_4bit(layer.weight.data.view(torch.uint8).view(-1, 1), state),
    )


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
def test_checkpoint_keys_are_those_of_bitsandbytes(double_quant):
    layer = bnb_layer(double_quant=double_quant, bias=False)
    theirs = layer.state_dict(prefix="up.")
    q = NF4Weight.from_state_dict(theirs, "up.weight")
    ours = q.state_dict("up.weight")
    assert {*ours} == {*theirs}
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert ours[key].shape == tensor.shape
        assert torch.equal(ours[key], tensor), key
    # and bitsandbytes reads what we write
    stats = {k.removeprefix("up.weight."): v for k, v in ours.items() if k != "up.weight"}
    param = bnb.nn.Params4bit.from_prequantized(
        ours["up.weight"], {f"weight.{k}": v for k, v in stats.items()}, device=DEVICE
    )
    assert torch.equal(param.data, layer.weight.data)
    assert torch.equal(param.quant_state.absmax, layer.weight.quant_state.absmax)


def test_checkpoints_that_are_refused():
    sd = fastlora.quantize_nf4(torch.randn(4, 64)).state_dict("w")
    for key in sd:
        with pytest.raises(KeyError, match=f"must have {key}, got none"):
            NF4Weight.from_state_dict({k: v for k, v in sd.items() if k != key}, "w")
    with pytest.raises(ValueError, match="w must be NF4, got FP4"):
        NF4Weight.from_state_dict(
            sd | {"w.quant_state.bitsandbytes__fp4": torch.zeros(1, dtype=torch.uint8)}, "w"
        )
    meta_key = "w.quant_state.bitsandbytes__nf4"
    meta = json.loads(bytes(sd[meta_key].tolist()))
    for change, message in [
        ({"shape": [5, 64]}, "qweight must hold 160 bytes"),
        ({"blocksize": 32}, "absmax must have 8 elements"),
        ({"nested_blocksize": 128}, "groups of 256, got 128"),
        (
            {"dtype": "bogus"},
            r"dtype in w.quant_state.bitsandbytes__nf4 must be one of \['float32'",
        ),
        ({"shape": None}, r"shape in w\..* must be list, got None"),
        ({"shape": [-4, -64]}, r"positive sizes, got \[-4, -64\]"),
        ({"shape": [4.5, 64]}, r"positive sizes, got \[4.5, 64\]"),
        ({"nested_offset": "x"}, "nested_offset in .* must be float, got 'x'"),
    ]:
        changed = torch.tensor(list(json.dumps(meta | change).encode()), dtype=torch.uint8)
        with pytest.raises(ValueError, match=message):
            NF4Weight.from_state_dict(sd | {meta_key: changed}, "w")


def test_metadata_that_is_no_json_is_named():
    sd = fastlora.quantize_nf4(torch.randn(4, 64)).state_dict("w")
    sd["w.quant_state.bitsandbytes__nf4"] = torch.tensor([1, 2, 255], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"w\.quant_state\.bitsandbytes__nf4 must hold JSON"):
        NF4Weight.from_state_dict(sd, "w")


def test_default_device_and_dtype_do_not_matter(backend_name):
    """Tables are made, and cached, in their own dtype on the CPU; buffers go where the data is."""
    w = torch.randn(8, 64, device=DEVICE)
    expected = fastlora.quantize_nf4(w)
    for table in (codebooks.dynamic_map, codebooks.dynamic_lut, codebooks.nf4_code):
        table.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = fastlora.quantize_nf4(w)
            decoded = fastlora.dequantize_nf4(got)
    finally:
        torch.set_default_dtype(torch.float32)
    for g, e in zip(got.tensors(), expected.tensors(), strict=True):
        assert torch.equal(g, e)
    assert torch.equal(decoded, fastlora.dequantize_nf4(expected))


def test_other_bitsandbytes_weights_are_refused():
    packed, state = bnb_f.quantize_4bit(torch.randn(4, 64), quant_type="fp4")
    with pytest.raises(ValueError, match="must be NF4 with its standard code table, got fp4"):
        NF4Weight.from_bnb(packed, state)
    layer = bnb_layer()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"repacked for its CPU kernel.*state_dict"):
        NF4Weight.from_bnb(layer.weight, layer.weight.quant_state)


def test_a_tensor_that_is_not_aligned_is_still_read():
    """Sharding may hand out bytes at any offset."""
    layer = fastlora.nn.Linear4bit.from_linear(torch.nn.Linear(64, 32), double_quant=False)
    expected = layer.dequantize()
    shifted = torch.empty(layer.absmax.numel() + 1, dtype=torch.uint8)
    shifted[1:] = layer.absmax.data
    layer.absmax.data = shifted[1:]
    assert torch.equal(layer.dequantize(), expected)


def test_dynamic_map_is_that_of_bitsandbytes():
    assert torch.equal(codebooks.dynamic_map(), bnb_f.create_dynamic_map())


def test_reference_dequantize_equals_the_flat_formula():
    q = fastlora.quantize_nf4(torch.randn(9, 70))
    got = reference.dequantize_blocks(*q.tensors(), q.blocksize, q.numel, torch.float32)
    assert torch.equal(got.view(9, 70), flat_formula(q, torch.float32))
