"""Layers: drop-in behaviour, bytes that nothing changes, adapters, eval that leaves no trace."""

import copy
import io
import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import DEVICE, DTYPES
from torch import nn

import fastlora
from fastlora.nn import Linear4bit, LoraLinear, SavedModule, disabled


def linear(K=96, N=40, bias=True, dtype=torch.float32):
    return nn.Linear(K, N, bias=bias, device=DEVICE, dtype=dtype)


def packed_bytes(module):
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.dtype == torch.uint8}


def assert_same_bytes(module, expected):
    got = packed_bytes(module)
    assert {*got} == {*expected}
    for name, value in expected.items():
        assert torch.equal(got[name].cpu(), value.cpu()), name


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
def test_linear4bit_takes_other_values(double_quant):
    layer = Linear4bit.from_linear(linear(), blocksize=128, double_quant=double_quant)
    layer.to(torch.bfloat16)
    other = linear()
    layer.requantize(other.weight.detach())
    expected = Linear4bit.from_linear(other, blocksize=128, double_quant=double_quant)
    assert layer.compute_dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(torch.float32), expected.dequantize(torch.float32))
    wrong = other.weight.detach().T
    with pytest.raises(ValueError, match=r"w must be \[40, 96\], got \[96, 40\]"):
        layer.requantize(wrong)


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("K", [96, 45], ids=["even", "odd"])
def test_linear4bit_is_the_quantised_layer(K, double_quant):
    dense = linear(K)
    layer = Linear4bit.from_linear(dense, blocksize=128, double_quant=double_quant)
    assert isinstance(layer, nn.Linear)
    q = fastlora.quantize_nf4(dense.weight, 128, double_quant)
    for ours, theirs in zip(layer.nf4.tensors(), q.tensors(), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert layer.qweight.shape == ((40, K // 2) if K % 2 == 0 else (40 * K // 2, 1))
    assert all(
        p.dtype == torch.uint8 and not p.requires_grad
        for n, p in layer.named_parameters()
        if n != "bias"
    )
    x = torch.randn(3, K, device=DEVICE)
    expected = nn.functional.linear(x, fastlora.dequantize_nf4(q), dense.bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer.nf4.qweight.data_ptr() == layer.qweight.data_ptr()


def test_weight_is_a_placeholder_that_never_looks_right():
    layer = Linear4bit.from_linear(linear(dtype=torch.bfloat16))
    assert layer.weight.shape == (40, 96)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.device.type == DEVICE
    assert layer.weight.isnan().all()
    assert layer.weight.untyped_storage().nbytes() == 2
    assert "weight" not in layer.state_dict()
    with pytest.raises(RuntimeError):
        layer.weight.add_(1)
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(40, 96)
    assert (layer.weight @ torch.ones(96, 1, dtype=torch.bfloat16)).isnan().all()


CASTS = {
    "to bf16": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "to device": lambda m: m.to(DEVICE),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "eval": lambda m: m.eval(),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
def test_nothing_changes_the_bytes(name, double_quant):
    model = nn.Sequential(
        Linear4bit.from_linear(linear(), double_quant=double_quant), linear(40, 3)
    )
    model = nn.Sequential(LoraLinear(model[0], r=2), model[1])
    expected, dense = packed_bytes(model), model[0].base_layer.dequantize(torch.float32)
    moved = CASTS[name](model)
    assert_same_bytes(moved, expected)
    assert torch.equal(moved[0].base_layer.dequantize(torch.float32), dense)
    dtype = {"to bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "half": torch.float16}
    wanted = dtype.get(name, torch.float32)
    assert moved[0].weight.dtype == moved[0].bias.dtype == wanted
    assert moved[0](torch.randn(2, 96, dtype=wanted, device=DEVICE)).dtype == wanted


def test_a_cast_of_the_bytes_is_an_error_before_anything_changes():
    layer = Linear4bit.from_linear(linear())
    expected = packed_bytes(layer)
    with pytest.raises(TypeError, match=r"got a cast of its packed bytes to torch.float16"):
        layer.type(torch.float16)
    assert_same_bytes(layer, expected)
    assert layer.bias.dtype == torch.float32


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("assign", [True, False])
def test_meta_init_then_load(double_quant, assign):
    source = LoraLinear(Linear4bit.from_linear(linear(45), double_quant=double_quant), r=2)
    with torch.device("meta"):
        target = LoraLinear(Linear4bit(45, 40, double_quant=double_quant), r=2)
    assert target.weight.is_meta
    assert all(p.is_meta for p in target.parameters())
    if not assign:
        target.to_empty(device=DEVICE)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True), strict=True, assign=assign)
    assert_same_bytes(target, packed_bytes(source))
    x = torch.randn(2, 45, device=DEVICE)
    assert torch.equal(target(x), source(x))


def test_a_state_dict_of_other_statistics_does_not_load():
    nested, flat = (Linear4bit.from_linear(linear(), double_quant=d) for d in (True, False))
    with pytest.raises(RuntimeError, match=r"Missing key.*absmax2"):
        nested.load_state_dict(flat.state_dict())
    other_block = Linear4bit.from_linear(linear(), blocksize=32)
    with pytest.raises(RuntimeError, match="size mismatch for absmax"):
        nested.load_state_dict(other_block.state_dict())


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "flat"])
def test_loads_a_bitsandbytes_state_dict(double_quant):
    q = fastlora.quantize_nf4(torch.randn(40, 96), 128, double_quant)
    bias = torch.randn(40)
    model = nn.Sequential(Linear4bit(96, 40))
    given = q.state_dict("0.weight") | {"0.bias": bias}
    keys = {*given}
    model.load_state_dict(given, strict=True)
    assert {*given} == keys, "the caller's dict was changed"
    assert torch.equal(model[0].dequantize(torch.float32), fastlora.dequantize_nf4(q))
    assert model[0].blocksize == 128
    assert torch.equal(model[0].bias, bias)
    with pytest.raises(ValueError, match=r"weight must be \[41, 96\], got \[40, 96\]"):
        nn.Sequential(Linear4bit(96, 41)).load_state_dict(given)


def test_a_new_layer_is_initialised_like_nn_linear():
    layer = Linear4bit(256, 64, device=DEVICE)
    bound = 1 / math.sqrt(256)
    w = layer.dequantize()
    assert w.abs().max() <= 1.01 * bound  # the scales are rounded to 8 bits
    assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert 0 < layer.bias.abs().max() <= bound


def test_a_quantised_layer_is_not_quantised_again():
    with pytest.raises(TypeError, match="linear must have a dense weight, got Linear4bit"):
        Linear4bit.from_linear(Linear4bit.from_linear(linear()))


def test_from_bnb_shares_memory_and_agrees():
    bnb = pytest.importorskip("bitsandbytes")
    theirs = bnb.nn.Linear4bit(96, 40, quant_type="nf4", compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="not quantised yet"):
        Linear4bit.from_bnb(theirs)
    theirs = theirs.to(DEVICE)
    ours = Linear4bit.from_bnb(theirs)
    assert ours.qweight.data_ptr() == theirs.weight.data_ptr()
    assert ours.absmax.data_ptr() == theirs.weight.quant_state.absmax.data_ptr()
    assert ours.bias is theirs.bias
    q = ours.nf4
    assert torch.equal(ours.dequantize(torch.float32), fastlora.dequantize_nf4(q, torch.float32))
    with pytest.raises(TypeError, match="linear must have a dense weight"):
        Linear4bit.from_linear(theirs)


def lora_layer(base="nf4", dropout=0.0, dtype=torch.float32, **kwargs):
    dense = linear(dtype=dtype)
    layer = Linear4bit.from_linear(dense) if base == "nf4" else dense
    layer = LoraLinear(layer, r=4, lora_alpha=8, lora_dropout=dropout, **kwargs)
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def step(layer, x, dy):
    """y and the gradients of x, a and b, from the same seed."""
    torch.manual_seed(11)
    leaves = [x.detach().requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(leaves[0])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_an_eval_forward_leaves_no_trace(base, dtype):
    """bitsandbytes 0.50.2 repacks its bytes in an eval forward, and loses gradients ever after."""
    layer = lora_layer(base, dropout=0.1, dtype=dtype).train()
    layer.base_layer.requires_grad_(False)
    x, dy = (torch.randn(2, 5, n, device=DEVICE).to(dtype) for n in (96, 40))
    before, bytes_before = step(layer, x, dy), packed_bytes(layer)
    merged, dense = layer.merged_weight("default"), layer.base_layer
    dense = dense.dequantize() if base == "nf4" else dense.weight.clone()
    layer.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            layer(x)
            with disabled([layer]):
                layer(x)
    layer.train()
    assert_same_bytes(layer, bytes_before)
    for got, expected in zip(step(layer, x, dy), before, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(layer.merged_weight("default"), merged)
    assert torch.equal(layer.base_layer.dequantize() if base == "nf4" else layer.weight, dense)


@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_the_merged_weight_gives_the_same_output(base):
    layer = lora_layer(base, use_rslora=True)
    x = torch.randn(7, 96, device=DEVICE)
    w = layer.merged_weight("default")
    assert w.dtype == torch.float32
    torch.testing.assert_close(nn.functional.linear(x, w, layer.bias), layer(x))
    assert layer.scaling["default"] == 8 / math.sqrt(4)


def test_conv1d_is_read_transposed():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(40, 96)
    layer = LoraLinear(conv1d, r=4)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 3, 96)
    delta = x @ layer.delta_weight("default").T
    assert (layer.in_features, layer.out_features) == (96, 40)
    torch.testing.assert_close(layer(x), conv1d(x) + delta)


def test_adapters_are_added_switched_and_removed():
    layer = lora_layer()
    x = torch.randn(3, 96, device=DEVICE)
    base, first = layer.base_layer(x), layer(x)
    layer.add_adapter("other", r=2, lora_alpha=2, init_lora_weights=False)
    assert torch.equal(layer(x), first)
    trained = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight", "base_layer.bias"}
    layer.set_adapter("other")
    assert not torch.equal(layer(x), first)
    assert not layer.lora_A["default"].weight.requires_grad
    layer.set_adapter(None)
    assert torch.equal(layer(x), base)
    layer.set_adapter("default")
    assert torch.equal(layer(x), first)
    layer.delete_adapter("default")
    assert torch.equal(layer(x), base)
    assert {*layer.lora_A, *layer.lora_B, *layer.r, *layer.scaling} == {"other"}
    with pytest.raises(KeyError, match="adapter must be one of"):
        layer.set_adapter("default")


def test_initial_weights():
    kaiming = 1 / math.sqrt(96)
    default, gaussian, random = (
        LoraLinear(linear(), r=8, init_lora_weights=init) for init in (True, "gaussian", False)
    )
    a, b = default.lora_A["default"].weight, default.lora_B["default"].weight
    assert 0 < a.abs().max() <= kaiming
    assert (b == 0).all()
    assert gaussian.lora_A["default"].weight.std().item() == pytest.approx(1 / 8, rel=0.2)
    assert (gaussian.lora_B["default"].weight == 0).all()
    assert random.lora_B["default"].weight.abs().max() > 0
    assert LoraLinear(linear(dtype=torch.bfloat16)).lora_A["default"].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"use_dora": True}, NotImplementedError, "use_dora=True is not supported"),
        ({"r": 0}, ValueError, "r must be >= 1"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout in \[0, 1\)"),
        ({"init_lora_weights": "pissa"}, ValueError, "got 'pissa'"),
        ({"adapter_name": "a.b"}, ValueError, "without dots, got 'a.b'"),
        ({"base": nn.Embedding(3, 4)}, TypeError, "base must be nn.Linear"),
    ],
)
def test_bad_settings(kwargs, error, message):
    with pytest.raises(error, match=message):
        LoraLinear(**{"base": linear()} | kwargs)


def test_disabled_is_reentrant():
    layer, other = lora_layer(), lora_layer()
    x = torch.randn(3, 96, device=DEVICE)
    on, off = layer(x), layer.base_layer(x)
    with disabled([layer]):
        with disabled([layer, other]):
            assert torch.equal(layer(x), off)
        assert torch.equal(layer(x), off)
        assert not torch.equal(other(x), other.base_layer(x))
    assert torch.equal(layer(x), on)
    with pytest.raises(RuntimeError, match="stop"), disabled([layer]):
        raise RuntimeError("stop")
    assert torch.equal(layer(x), on)


def in_another_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_disabled_is_for_one_thread():
    layer, saved = lora_layer(), SavedModule(nn.LayerNorm(96, device=DEVICE))
    saved.modules_to_save.default.weight.data.mul_(2)
    x = torch.randn(3, 96, device=DEVICE)
    for module, off in ((layer, layer.base_layer), (saved, saved.original_module)):
        on = module(x)
        with disabled([module]):
            assert torch.equal(module(x), off(x))
            assert torch.equal(in_another_thread(lambda m=module: m(x)), on)
            # but not where torch runs a copy in a thread of its own, nor where a copy is kept
            replica = module._replicate_for_data_parallel()
            replica._parameters = module._parameters
            assert torch.equal(in_another_thread(lambda m=replica: m(x)), off(x))
            assert torch.equal(copy.deepcopy(module)(x), on)
        assert not torch.equal(on, off(x))
        assert torch.equal(module(x), on)


def test_disabled_counts_right_in_many_threads():
    layers = [lora_layer() for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work():
        for _ in range(200):
            with disabled(layers), disabled(layers[:1]):
                pass
        return [layer.switch.depth for layer in layers]

    try:
        with ThreadPoolExecutor(4) as pool:
            found = [future.result() for future in [pool.submit(work) for _ in range(4)]]
    finally:
        sys.setswitchinterval(interval)
    assert found == [[0, 0, 0]] * 4


def test_saved_module():
    original = nn.LayerNorm(8)
    saved = SavedModule(original, "first")
    saved.add_adapter("second")
    x = torch.randn(2, 8)
    with torch.no_grad():
        saved.modules_to_save["first"].weight.fill_(3)
    assert torch.equal(saved(x), 3 * original(x))
    assert torch.equal(saved.weight, saved.modules_to_save["first"].weight)
    assert saved.modules_to_save["first"].weight.requires_grad
    assert not saved.modules_to_save["second"].weight.requires_grad
    for context_or_name in ("second", None):
        saved.set_adapter(context_or_name)
        assert torch.equal(saved(x), original(x))
    saved.set_adapter("first")
    with disabled([saved]):
        assert torch.equal(saved(x), original(x))
    again = pickle.loads(pickle.dumps(copy.deepcopy(saved)))
    assert torch.equal(again(x), saved(x))
    with pytest.raises(AttributeError, match="no_such"):
        _ = saved.no_such


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_a_compiled_layer_computes_the_same(base, dropout):
    layer = nn.Sequential(lora_layer(base, dropout), Linear4bit.from_linear(linear(40, 40)))
    layer[0].base_layer.requires_grad_(False)
    layer[1].bias.requires_grad_(False)
    x, dy = (torch.randn(2, 5, n, device=DEVICE) for n in (96, 40))
    compiled = torch.compile(layer, backend="aot_eager")
    for got, expected in zip(step(compiled, x, dy), step(layer, x, dy), strict=True):
        torch.testing.assert_close(got, expected)
    with disabled([layer[0]]):
        torch.testing.assert_close(compiled(x), layer(x))


def test_fp64_is_refused_before_anything_changes():
    layer = Linear4bit.from_linear(linear())
    with pytest.raises(
        TypeError, match=r"can compute in fp32, fp16 or bf16, got a cast to torch\.float64"
    ):
        layer.double()
    assert layer.bias.dtype == torch.float32


def test_training_lowers_the_loss():
    layer = lora_layer(dropout=0.05)
    layer.base_layer.requires_grad_(False)
    x, target = torch.randn(64, 96, device=DEVICE), torch.randn(64, 40, device=DEVICE)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
