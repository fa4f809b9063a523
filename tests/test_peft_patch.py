"""`patch_peft`: the same numbers on our ops, and the reason wherever PEFT's own forward runs."""

import copy
import importlib
import io
import subprocess
import sys

import pytest
import torch
from helpers import DEVICE, assert_as_accurate
from model_helpers import gpt2, plain, replica, tokens
from peft_helpers import (
    BASES,
    EVERY,
    MARKS,
    adapted,
    assert_same,
    bnb,
    config,
    dense,
    output,
    patched,
    peft,
    step,
    twins,
    without_repacking,
)
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fastlora
from fastlora import ops, reference

pytestmark = MARKS

SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "bias": {"lora_bias": True},
    "trained biases": {"bias": "all"},
}


@pytest.fixture
def calls(monkeypatch):
    """Every call of our op: its arguments and its outputs."""
    seen, run = [], ops.linear_group

    def spy(*args):
        seen.append((args, run(*args)))
        return seen[-1][1]

    monkeypatch.setattr(ops, "linear_group", spy)
    return seen


@EVERY
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_those_of_peft(base, name, calls):
    plain, fast = twins(base, **SETTINGS[name])
    expected = step(plain)
    calls.clear()
    assert_same(step(fast), expected)
    assert len(calls) == 14
    assert [*fast.state_dict()] == [*plain.state_dict()]
    for a, b in zip(fast.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@EVERY
def test_several_adapters_are_one_op(base, calls):
    plain, fast = twins(base)
    for model in (plain, fast):
        torch.manual_seed(1)
        model.add_adapter("second", config(r=3, lora_alpha=7, lora_bias=True))
        model.base_model.set_adapter(["default", "second"])
    expected = step(plain)
    calls.clear()
    assert_same(step(fast), expected)
    assert len(calls) == 14
    assert not fastlora.patch_peft(fast).fallbacks


def test_conv1d_and_plain_modules():
    models = gpt2(), plain()
    settings = {"target_modules": "all-linear", "fan_in_fan_out": True}, {"target_modules": ["up"]}
    for model, given in zip(models, settings, strict=True):
        expected = peft.get_peft_model(model, config(**given))
        fast = patched(copy.deepcopy(expected))
        y, want = (m(tokens()) for m in (fast, expected))
        y, want = (t if isinstance(t, torch.Tensor) else t.logits for t in (y, want))
        assert_same(y, want)


def test_bytes_of_bitsandbytes_are_shared(calls):
    model = adapted("bnb")
    layers = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
    before = [layer.weight for layer in layers]
    output(patched(model))
    assert all(layer.weight is weight for layer, weight in zip(layers, before, strict=True))
    shared = {args[1][0].weight.qweight.data_ptr() for args, _ in calls}
    assert shared == {weight.data_ptr() for weight in before}


@pytest.mark.parametrize("adapters", [1, 2])
@EVERY
def test_dropout_is_the_formula_with_our_mask(base, adapters, calls, monkeypatch):
    states, draw = [], torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda *a, **k: states.append(draw(*a, **k)) or states[-1]
    )
    model = patched(adapted(base, lora_dropout=0.3))
    if adapters == 2:
        model.add_adapter("second", config(r=3, lora_alpha=1, lora_dropout=0.3))
        model.base_model.set_adapter(["default", "second"])
    ids = tokens()
    states.clear()
    model(input_ids=ids)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    (x, (member,), p), (y,) = calls[0]
    weight = member.weight
    weight = fastlora.dequantize_nf4(weight) if member.quantised else weight
    x, a, b, w = (t.detach().double() for t in (x, member.a, member.b, weight))
    rows = x.reshape(-1, x.shape[-1])
    mask = reference.dropout(torch.ones_like(rows), states[0], p)
    base_y = rows @ w.T + member.bias.detach().double()
    exact = base_y + member.scale * (rows * mask) @ a.T @ b.T
    assert 0 < (mask == 0).double().mean() < 0.5
    assert_as_accurate(y.view(exact.shape), exact.float(), exact)
    assert p == 0.3
    assert layer.lora_dropout["default"].p == 0.3


@EVERY
def test_an_eval_forward_changes_nothing(base):
    model = patched(adapted(base, lora_dropout=0.3))
    torch.manual_seed(3)
    expected = step(model)
    model.eval()
    assert torch.equal(output(model), output(model))
    model.train()
    torch.manual_seed(3)
    got = step(model)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@EVERY
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing(base, reentrant):
    model = patched(adapted(base, lora_dropout=0.2))
    torch.manual_seed(3)
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    assert_same(step(model), expected)


@pytest.mark.parametrize(
    ("base", "backend"), [("dense", "eager"), *((base, "aot_eager") for base in BASES)]
)
def test_one_graph_under_compile(base, backend):
    model = BASES[base](num_hidden_layers=1)
    model = patched(peft.get_peft_model(model, config(lora_bias=True)))
    expected = step(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    model.zero_grad()
    loss = compiled(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same({"loss": loss.detach(), **grads}, expected)


@EVERY
@pytest.mark.parametrize("strict", [False, True])
def test_exported_layers(base, strict):
    layer, x = first(patched(adapted(base))), torch.randn(4, 64, device=DEVICE)
    graph = torch.export.export(layer, (torch.zeros_like(x),), strict=strict).module()
    assert_same(graph(x).detach(), layer(x).detach())


@EVERY
def test_adapters_in_fp32_under_autocast(base):
    plain, fast = twins(base)
    seen = []
    for model in (plain, fast):
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        x = torch.randn(5, 64, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
        with torch.autocast(DEVICE, torch.bfloat16):
            seen.append(layer(x.requires_grad_()))
        seen[-1].float().sum().backward()
        assert layer.lora_A["default"].weight.grad.dtype == torch.float32
    theirs, own = seen
    assert own.dtype == theirs.dtype
    assert (own - theirs).abs().max() <= 0.02 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_bitsandbytes_computes_in_the_dtype_it_was_told(dtype, calls):
    plain, fast = twins("bnb")
    for model in (plain, fast):
        for layer in model.modules():
            if hasattr(layer, "compute_dtype"):
                layer.compute_dtype = dtype
    with torch.autocast(DEVICE, torch.bfloat16):
        expected, got = output(plain), output(fast)
    assert got.dtype == expected.dtype
    # rounded to 16 bits at other places
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    assert {args[0].dtype for args, _ in calls} == {dtype or torch.bfloat16}


def dora(model):
    model.add_adapter("dora", config(use_dora=True))
    model.set_adapter("dora")


def several_dropouts(model):
    model.add_adapter("second", config(lora_dropout=0.5))
    model.base_model.set_adapter(["default", "second"])


def other_dropout(model):
    first(model).lora_dropout["default"] = nn.AlphaDropout(0.0)


def other_adapter(model):
    class Custom(nn.Linear):
        pass

    first(model).lora_A["default"].__class__ = Custom


def adapter_with_a_bias(model):
    first(model).lora_A["default"] = nn.Linear(64, 4, device=DEVICE)


def adapter_that_wraps(model):
    weight = first(model).lora_A["default"].weight.detach()
    first(model).lora_A["default"].weight = nn.Parameter(TwoTensor(weight, weight.clone()))


def sharded(model):
    first(model).lora_B["default"].weight.ds_id = 3  # as DeepSpeed marks it


def double_adapter(model):
    for part in (first(model).lora_A, first(model).lora_B):
        part["default"].double()


def double(model):
    first(model).double()


def first(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def hook(*_):
    """Does nothing, but others may."""


# what is done to a model -> the reason in the report
REASONS = {
    "adapters are disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(),
    "no active adapter": lambda m: m.base_model.set_adapter([]),
    "no plain LoRA: DoraLinearVariant": dora,
    "active adapters have different dropout": several_dropouts,
    "hooks on lora_A": lambda m: first(m).lora_A["default"].register_forward_hook(hook),
    "hooks on lora_B": lambda m: first(m).lora_B["default"].register_forward_pre_hook(hook),
    "hooks on lora_dropout": lambda m: first(m).lora_dropout["default"].register_forward_hook(hook),
    "hooks on the base layer": lambda m: first(m).base_layer.register_full_backward_hook(hook),
    "its forward was replaced": lambda m: setattr(first(m), "forward", first(m).forward),
    "dropout is AlphaDropout": other_dropout,
    "an adapter of Custom": other_adapter,
    "the base weight is torch.float64": double,
    "an adapter of torch.float64": double_adapter,
    "an adapter whose weight is TwoTensor": adapter_that_wraps,
    "lora_A has a bias": adapter_with_a_bias,
    "sharded parameters": sharded,
    "tensor parallel": lambda m: setattr(first(m).base_layer, "_hf_tp_plan", "colwise"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_peft_runs_visibly_what_we_do_not(reason):
    model = patched(adapted("dense"))
    REASONS[reason](model)
    rows = {row.layer: row for row in fastlora.patch_peft(model).rows}
    row = rows["base_model.model.model.layers.0.self_attn.q_proj"]
    assert row.path == "peft"
    assert reason in row.reason
    assert reason in str(fastlora.patch_peft(model))
    x = torch.randn(3, 64, dtype=first(model).base_layer.weight.dtype)
    torch.manual_seed(1)
    same = first(model)(x)
    fastlora.unpatch_peft(model)
    torch.manual_seed(1)
    same, again = (y.a if isinstance(y, TwoTensor) else y for y in (same, first(model)(x)))
    assert_same(again.detach(), same.detach())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_left_to_peft():
    plain, fast = twins("dense")
    x = torch.nested.nested_tensor([torch.randn(2, 64), torch.randn(3, 64)], device=DEVICE)
    for got, expected in zip(first(fast)(x).unbind(), first(plain)(x).unbind(), strict=True):
        assert_same(got.detach(), expected.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_small_gradients_of_fp32_activations_are_those_of_peft(dtype, calls):
    plain, fast = (first(model) for model in twins("bnb"))
    x, dy = torch.randn(9, 64, device=DEVICE), 1e-8 * torch.randn(9, 64, device=DEVICE)
    grads = []
    for layer in (plain, fast):
        layer.base_layer.compute_dtype = dtype
        layer(x).backward(dy)
        grads.append(layer.lora_A["default"].weight.grad)
    # in bf16 rounded to its digits, but nothing is too small for fp16 only
    error = (grads[1] - grads[0]).norm() / grads[0].norm()
    assert error < (1e-6 if dtype == torch.float16 else 0.02)
    assert len(calls) == 1


def test_hooks_on_all_modules_are_called():
    model = patched(adapted("dense"))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    output(model)
    assert "hooks on all modules" in fastlora.patch_peft(model).fallbacks.popitem()[1]
    handle.remove()
    assert first(model).lora_A["default"] in seen
    assert not fastlora.patch_peft(model).fallbacks


def test_other_layers_are_left_alone():
    model = peft.get_peft_model(dense(), config(target_modules=["embed_tokens", "q_proj"]))
    report = fastlora.patch_peft(model)
    assert report.fast == 2
    assert [*report.fallbacks.values()] == ["Embedding is left alone"]

    class Custom(peft.tuners.lora.Linear):
        pass

    first(model).__class__ = Custom
    assert "Custom is left alone" in fastlora.patch_peft(model).fallbacks.values()


def test_mixed_models_are_patched():
    model = peft.get_peft_model(dense(), config(), mixed=True).train()
    model.add_adapter("loha", peft.LoHaConfig(target_modules=["q_proj"]))
    model.set_adapter(["default", "loha"])
    expected = step(model)
    report = fastlora.patch_peft(model)
    assert report.fast == 14
    assert {*report.fallbacks.values()} == {"peft.tuners.loha.layer.Linear is left alone"}
    assert_same(step(model), expected)


@EVERY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_chunked_loss_goes_with_patched_models(base, checkpointing):
    plain, fast = twins(base)
    fastlora.prepare_for_training(fast, gradient_checkpointing=checkpointing)
    patched(fast)
    assert_same(step(fast), step(plain))
    assert fast(input_ids=tokens(), labels=tokens()).logits is None
    assert [*fast.state_dict()] == [*plain.state_dict()]


def test_convolutions_and_experts_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.experts = nn.Module()
            self.experts.up = nn.Parameter(torch.randn(2, 4, 4))

    settings = config(target_modules=["conv"], target_parameters=["experts.up"])
    report = fastlora.patch_peft(peft.inject_adapter_in_model(settings, Model()))
    assert [*report.fallbacks.values()] == ["Conv2d is left alone", "ParamWrapper is left alone"]


def test_attention_of_torch_is_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = peft.inject_adapter_in_model(config(target_modules=["attention"]), Model())
    x = torch.randn(3, 2, 8)
    expected = model(x)
    report = fastlora.patch_peft(model)
    assert torch.equal(model(x), expected)
    assert len(report.fallbacks) == len(report.rows) == 2


def test_a_layer_of_bitsandbytes_that_peft_takes_for_dense():
    """Without transformers' mark on the model; PEFT cannot merge into it."""
    model = bnb()
    del model.is_loaded_in_4bit
    model = peft.get_peft_model(model, config()).train()
    assert type(first(model)) is peft.tuners.lora.Linear
    expected, plain = step(model), copy.deepcopy(model)
    assert_same(step(patched(model)), expected)
    with pytest.raises(RuntimeError):
        plain.merge_adapter()
    before = output(model)
    model.merge_adapter()
    assert (output(model) - before).norm() < before.norm()


def test_hooks_of_accelerate_run_as_before():
    accelerate = pytest.importorskip("accelerate")
    model = adapted("dense")
    accelerate.hooks.add_hook_to_module(first(model), accelerate.hooks.ModelHook())
    expected = output(model)
    report = fastlora.patch_peft(model)
    assert [*report.fallbacks.values()] == ["its forward was replaced"]
    assert_same(output(model), expected)


@EVERY
def test_hooks_of_accelerate_outlive_the_patch(base):
    """They keep the forward that they found."""
    accelerate = pytest.importorskip("accelerate")
    plain, fast = twins(base)
    for layer in (first(fast), first(fast).base_layer):
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    fastlora.unpatch_peft(fast)
    without_repacking(fast)
    assert_same(step(fast), step(plain))


@EVERY
def test_replicas_of_data_parallel(base):
    model = patched(adapted(base))
    expected = step(model)
    model.zero_grad()
    loss = replica(model)(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same({"loss": loss.detach(), **grads}, expected)


@pytest.mark.parametrize("name", ["LinearNF4", "LinearFP4"])
def test_other_names_of_bitsandbytes_layers(name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    cls = getattr(bitsandbytes.nn, name)
    model = nn.Sequential(cls(64, 32, compute_dtype=torch.float32)).to(DEVICE).train()
    model.is_loaded_in_4bit = True
    plain = without_repacking(peft.inject_adapter_in_model(config(target_modules=["0"]), model))
    fast = copy.deepcopy(plain)
    report = fastlora.patch_peft(fast)
    assert [*report.fallbacks.values()] == (
        [] if name == "LinearNF4" else ["fp4 weights of bitsandbytes"]
    )
    fast.eval()(torch.randn(2, 64, device=DEVICE))  # must not repack
    fast.train()
    x = torch.randn(5, 64, device=DEVICE)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = fast(inputs[0] * 1), plain(inputs[1] * 1)
    assert_same(got.detach(), expected.detach())
    got.sum().backward()
    expected.sum().backward()
    assert_same(inputs[0].grad, inputs[1].grad)
    fastlora.unpatch_peft(fast)
    assert type(fast[0].base_layer) is cls


def test_dropout_of_everything_is_left_to_peft():
    plain = adapted("dense", lora_dropout=1.0)
    fast = copy.deepcopy(plain)
    reasons = fastlora.patch_peft(fast).fallbacks.values()
    assert {*reasons} == {"dropout leaves nothing"}
    assert_same(step(fast), step(plain))
    fast.eval()
    assert not fastlora.patch_peft(fast).fallbacks


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_tensors_are_seen(process_group):
    from torch.distributed import device_mesh, tensor

    mesh = device_mesh.init_device_mesh("cpu", (1,))
    model = patched(adapted("dense"))
    part = first(model).lora_A["default"]
    part.weight = nn.Parameter(tensor.distribute_tensor(part.weight.detach(), mesh))
    reason = "sharded parameters, unless gathered in a forward"
    assert [*fastlora.patch_peft(model).fallbacks.values()] == [reason]


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo gathers tensors on CPUs")
@pytest.mark.parametrize("late", [False, True], ids=["patched, sharded", "sharded, patched"])
@EVERY
def test_what_fsdp_gathers_is_fast(base, late, calls, process_group):
    from torch.distributed import device_mesh, fsdp

    plain = without_repacking(adapted(base))
    fast = copy.deepcopy(plain)
    if not late:
        patched(fast)
    mesh = device_mesh.init_device_mesh("cpu", (1,))
    for layer in fast.base_model.model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(fast, mesh=mesh)
    reasons = fastlora.patch_peft(fast).fallbacks.values()
    assert {*reasons} == {"sharded parameters, unless gathered in a forward"}
    calls.clear()
    grads = {n: g.full_tensor() if n != "loss" else g for n, g in step(fast).items()}
    assert len(calls) == 14
    assert_same(grads, step(plain))


def test_repacked_bytes_are_refused():
    model = adapted("bnb")
    layer = first(model).base_layer
    # as an eval forward of bitsandbytes leaves it on a CPU with AVX-512 BF16
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.base_layer: .* eval forward"):
        fastlora.patch_peft(model)
    assert type(first(model)) is peft.tuners.lora.bnb.Linear4bit
    layer.weight.quant_state.packing_format_for_cpu = False
    layer.weight.quant_state.code[3] += 1
    with pytest.raises(ValueError, match="standard code table"):
        fastlora.patch_peft(model)


def test_fp4_runs_in_peft():
    plain = peft.get_peft_model(bnb("fp4"), config())
    fast = copy.deepcopy(plain)
    report = fastlora.patch_peft(fast)
    assert {*report.fallbacks.values()} == {"fp4 weights of bitsandbytes"}
    assert_same(step(fast), step(without_repacking(plain)))


@EVERY
def test_unpatch_gives_every_class_back(base):
    model = adapted(base)
    before = [type(m) for m in model.modules()]
    patched(model)
    assert [type(m) for m in model.modules()] != before
    assert all("Linear" in type(m).__name__ for m in model.modules() if hasattr(m, "base_layer"))
    patched(model)
    fastlora.unpatch_peft(model)
    fastlora.unpatch_peft(model)
    assert [type(m) for m in model.modules()] == before


@EVERY
def test_copies_and_pickles(base):
    model = patched(adapted(base))
    expected = step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same(step(twin), expected)
        assert not fastlora.patch_peft(twin).fallbacks


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="must have LoRA layers of PEFT, got none in Linear"):
        fastlora.patch_peft(nn.Linear(2, 2))


def test_fastlora_does_not_import_peft():
    code = (
        "import sys, fastlora\n"
        "assert 'patch_peft' in dir(fastlora)\n"
        "print({'peft', 'transformers', 'bitsandbytes'} & {*sys.modules})\n"
        "fastlora.patch_peft\n"
        "print('peft' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "True"]
    with pytest.raises(AttributeError, match="no attribute 'patch_pefft'"):
        fastlora.patch_pefft  # noqa: B018


def test_an_old_peft_is_refused(monkeypatch):
    from fastlora.integrations import peft as integration

    monkeypatch.setattr(peft, "__version__", "0.19.1")
    with pytest.raises(RuntimeError, match=r"needs version 0\.20 or newer, got 0\.19\.1"):
        importlib.reload(integration)
