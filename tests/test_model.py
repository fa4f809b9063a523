"""Whole models: quantise, add, switch, disable, merge, unload; nothing changes by accident."""

import copy
import io
import pickle
import re
from functools import partial

import pytest
import torch
from helpers import DEVICE, FLOOR
from model_helpers import MODELS, Block, Tied, gpt2, llama, logits, plain, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastlora import backend, dequantize_nf4, plan, quantize_nf4
from fastlora.config import LoraConfig
from fastlora.model import (
    add_lora,
    delete_adapter,
    disable_adapters,
    merge_lora,
    prepare_for_training,
    quantize_model,
    set_adapter,
    state_of,
    unload_lora,
)
from fastlora.nn import Linear4bit, LoraLinear, SavedModule
from fastlora.report import count_parameters, explain, explain_rows, print_trainable_parameters


def random_lora(**settings):
    """A config whose adapters change the output from the start."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)


def layers_of(model, kind):
    return {n: m for n, m in model.named_modules() if isinstance(m, kind)}


def close(a, b):
    """The same sums in another order, in fp32."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= FLOOR[torch.float32] * b.abs().max()


def state(model):
    return {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def assert_same_state(model, before):
    after = dict(model.named_parameters())
    assert {*after} == {*before}
    for name, (number, value, requires_grad) in before.items():
        assert id(after[name]) == number, name
        assert torch.equal(after[name], value), name
        assert after[name].requires_grad == requires_grad, name


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_quantised_model_computes_with_the_dequantised_weights(kind, double_quant):
    model, dense = MODELS[kind](), MODELS[kind]()
    dense.load_state_dict(model.state_dict())
    names = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert quantize_model(model, blocksize=32, double_quant=double_quant) is model
    packed = layers_of(model, Linear4bit)
    heads = {"lm_head", "classifier"} & names
    assert {*packed} == names - heads - {"cls"}
    for path, layer in packed.items():
        original = dense.get_submodule(path)
        conv1d = type(original).__name__ == "Conv1D"
        w = original.weight.detach()
        w = w.T if conv1d else w
        q = quantize_nf4(w, 32, double_quant)
        assert torch.equal(layer.nf4.qweight, q.qweight)
        w = dequantize_nf4(q)
        original.weight.data.copy_(w.T if conv1d else w)
    close(logits(model), logits(dense))


def test_quantise_twice_changes_nothing():
    model = quantize_model(plain())
    before = state(model)
    quantize_model(model)
    assert_same_state(model, before)


def test_quantise_after_adapters_is_refused():
    with pytest.raises(ValueError, match="before adapters"):
        quantize_model(add_lora(plain(), LoraConfig()))


def test_quantise_nothing_is_refused():
    with pytest.raises(ValueError, match="linear layers to quantise"):
        quantize_model(nn.Sequential(nn.ReLU()))


def test_quantise_names_the_layer_with_nan():
    model = plain()
    model.extra[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"extra\.2: .* 1 NaN"):
        quantize_model(model)


def test_shared_modules_are_handled_once():
    model = Tied().to(DEVICE).eval()
    quantize_model(model)
    assert type(model.out) is nn.Linear
    assert model.out.weight is model.embed.weight
    assert type(model.first) is Linear4bit
    assert model.again is model.first
    before = logits(model)
    add_lora(model, random_lora(target_modules=["first", "up"]))
    assert type(model.first) is LoraLinear
    assert model.again is model.first
    assert model.blocks[0] is model.blocks[1]
    assert not torch.allclose(logits(model), before)
    adapted = logits(model)
    merge_lora(model)
    assert type(model.first) is nn.Linear
    assert model.again is model.first
    close(logits(model), adapted)


def test_a_quantised_model_is_not_quantised_otherwise():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    quantize_model(model, skip_modules=())
    quantize_model(model, skip_modules=())
    with pytest.raises(ValueError, match=r"must keep .* got \(64, True\) in 0 and \(128, True\)"):
        quantize_model(model, skip_modules=(), blocksize=128)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_add_then_unload_leaves_no_trace(kind, quantized):
    model = MODELS[kind]()
    if quantized:
        quantize_model(model)
    head = {"llama": "lm_head", "gpt2": "lm_head", "bert": "classifier", "plain": "embed"}[kind]
    next(p for p in model.parameters() if p.is_floating_point()).requires_grad_(False)
    before, out, modules = state(model), logits(model), dict(model.named_modules())
    add_lora(model, random_lora(modules_to_save=[head]))
    assert not torch.allclose(logits(model), out)
    assert unload_lora(model) is model
    assert_same_state(model, before)
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert torch.equal(logits(model), out)
    for refused in (unload_lora, disable_adapters):
        with pytest.raises(ValueError, match="must have adapters"):
            refused(model)


def test_add_lora_starts_as_the_base_and_trains_adapters_only():
    model = quantize_model(llama())
    before, base = logits(model), state(model)
    cfg = LoraConfig(r=4, modules_to_save=["lm_head"])
    assert add_lora(model, cfg) is model
    assert torch.equal(logits(model), before)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    wanted = {
        f"{n}.lora_{part}.default.weight" for n in layers_of(model, LoraLinear) for part in "AB"
    }
    assert names == wanted | {"lm_head.modules_to_save.default.weight"}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    losses = []
    for _ in range(20):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    unload_lora(model)
    assert_same_state(model, base)
    assert torch.equal(logits(model), before)
    assert cfg == LoraConfig(r=4, modules_to_save=["lm_head"])


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_merge_computes_what_the_adapter_does(kind, quantize):
    model = MODELS[kind]()
    types = {n: type(m) for n, m in model.named_modules()}
    quantize_model(model, blocksize=32, double_quant=False)
    head = {"llama": "lm_head", "gpt2": "lm_head", "bert": "classifier", "plain": "embed"}[kind]
    cfg = random_lora(modules_to_save=[head], exclude_modules=r".*\.1\..*", use_rslora=True)
    add_lora(model, cfg)
    with torch.no_grad():
        for module in layers_of(model, SavedModule).values():
            for parameter in module.modules_to_save["default"].parameters():
                parameter.add_(0.1)
    adapted = logits(model)
    merged = {n: m.merged_weight("default") for n, m in layers_of(model, LoraLinear).items()}
    packed = layers_of(copy.deepcopy(model), Linear4bit)
    assert merge_lora(model, quantize=quantize) is model
    assert not layers_of(model, LoraLinear)
    assert not layers_of(model, SavedModule)
    assert not state_of(model).configs
    if not quantize:
        assert {n: type(m) for n, m in model.named_modules()} == types
        close(logits(model), adapted)
        return
    after = layers_of(model, Linear4bit)
    assert {n.removesuffix(".base_layer") for n in packed} == {*after}
    for path, weight in merged.items():
        assert after[path].blocksize == 32
        assert not after[path].nf4.nested
        assert torch.equal(after[path].qweight, quantize_nf4(weight, 32, False).qweight)
    merge_lora(add_lora(model, LoraConfig(r=2)))
    assert {n: type(m) for n, m in model.named_modules()} == types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_merge_rounds_once_to_the_dtype_of_the_base(quantized, dtype):
    model = nn.Sequential(Block(), Block()).to(DEVICE, dtype)
    if quantized:
        quantize_model(model)
    add_lora(model, random_lora(target_modules=["up"]))
    base = [block.up.base_layer for block in model]
    dense = [b.dequantize(torch.float32) if quantized else b.weight.float() for b in base]
    deltas = [
        block.up.scaling["default"]
        * (block.up.lora_B["default"].weight @ block.up.lora_A["default"].weight)
        for block in model
    ]
    merge_lora(model)
    for block, w, delta in zip(model, dense, deltas, strict=True):
        assert type(block.up) is nn.Linear
        assert type(block.down) is nn.Linear
        assert block.up.weight.dtype == block.down.weight.dtype == dtype
        assert torch.equal(block.up.weight, (w + delta).to(dtype))


def test_merge_never_writes_into_the_base():
    model = plain()
    weight = model.head.weight
    before = weight.detach().clone()
    add_lora(model, random_lora())
    merge_lora(model)
    assert model.head.weight is not weight
    assert torch.equal(weight, before)
    assert not torch.equal(model.head.weight, before)


def test_merge_that_overflows_is_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8)).half().to(DEVICE)
    add_lora(model, random_lora(target_modules=["0"], lora_alpha=1e8))
    with pytest.raises(ValueError, match=r"weight of 0 must fit in torch\.float16"):
        merge_lora(model)


def test_merge_into_tied_embeddings_survives_transformers(tmp_path):
    model = llama(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.detach().clone()
    add_lora(model, random_lora(target_modules=["lm_head", "q_proj"]))
    adapted = logits(model)
    merge_lora(model)
    close(logits(model), adapted)
    model.tie_weights()  # transformers does this on many occasions
    close(logits(model), adapted)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    close(logits(type(model).from_pretrained(tmp_path).to(DEVICE)), adapted)


def test_merged_gpt2_is_a_gpt2_again(tmp_path):
    model = quantize_model(gpt2())
    add_lora(model, random_lora())
    adapted = logits(model)
    merge_lora(model).save_pretrained(tmp_path)
    close(logits(type(model).from_pretrained(tmp_path).to(DEVICE)), adapted)


def test_several_adapters_on_one_model():
    model = quantize_model(plain())
    base = copy.deepcopy(model)
    out = {"base": logits(model)}
    targets = {"a": ["up", "head"], "b": ["down", "head"], "c": ["down"]}
    save = {"a": None, "b": None, "c": ["embed"]}
    for name, names in targets.items():
        one = copy.deepcopy(base)
        with torch.random.fork_rng():
            add_lora(one, random_lora(target_modules=names, modules_to_save=save[name]), name)
            out[name] = logits(one)
        # the same random numbers again
        add_lora(model, random_lora(target_modules=names, modules_to_save=save[name]), name)
    assert state_of(model).active == "a"
    assert torch.equal(logits(model), out["a"])
    for name in ("c", "b", "a", "c"):
        set_adapter(model, name)
        torch.testing.assert_close(logits(model), out[name], rtol=0, atol=0)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(f".{name}." in n for n in trained)
        assert len(trained) == sum(f".{name}." in n for n, _ in model.named_parameters())
        with disable_adapters(model):
            assert torch.equal(logits(model), out["base"])
            with disable_adapters(model):
                pass
            assert torch.equal(logits(model), out["base"])
        assert torch.equal(logits(model), out[name])
    delete_adapter(model, "c")
    assert state_of(model).active == "a"
    assert torch.equal(logits(model), out["a"])
    assert isinstance(model.embed, nn.Embedding)
    set_adapter(model, "b")
    delete_adapter(model, "a")
    assert torch.equal(logits(model), out["b"])
    assert type(model.layers[0]["mlp"].up) is Linear4bit
    delete_adapter(model, "b")
    assert torch.equal(logits(model), out["base"])
    assert not layers_of(model, LoraLinear)


def test_merge_one_of_several():
    model = quantize_model(plain())
    add_lora(model, random_lora(target_modules=["up"]), "a")
    add_lora(model, random_lora(target_modules=["down"]), "b")
    set_adapter(model, "b")
    out = logits(model)
    set_adapter(model, "a")
    merge_lora(model, "b")
    close(logits(model), out)
    assert not layers_of(model, Linear4bit)


def test_names_are_checked():
    model = add_lora(plain(), LoraConfig())
    for name in ("default", "", "a.b", "keys", "training"):
        with pytest.raises(ValueError, match="adapter_name must be new"):
            add_lora(model, LoraConfig(), name)
    for function in (set_adapter, delete_adapter, merge_lora):
        with pytest.raises(ValueError, match=re.escape("one of ['default'], got 'other'")):
            function(model, "other")
    assert [*state_of(model).configs] == ["default"]


def test_configs_are_completed_as_they_are_saved():
    model = quantize_model(gpt2())
    for name in ("first", "second"):
        add_lora(model, LoraConfig(base_model_name_or_path="there"), name)
        config = state_of(model).configs[name]
        assert config.target_modules == ["c_attn", "c_fc", "c_proj"]
        assert config.fan_in_fan_out
        assert config.base_model_name_or_path == "there"
    add_lora(model := plain(), LoraConfig(fan_in_fan_out=True))
    assert not state_of(model).configs["default"].fan_in_fan_out


def test_inference_mode_adds_without_gradient():
    model = add_lora(plain(), LoraConfig(inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())
    set_adapter(model, "default")
    assert any(p.requires_grad for p in model.parameters())


def test_copies_and_pickles_carry_their_adapters():
    model = quantize_model(plain())
    add_lora(model, random_lora(), "a")
    out = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), out)
        unload_lora(other)
        assert not torch.equal(logits(other), out)
    assert torch.equal(logits(model), out)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    other = add_lora(quantize_model(plain()), LoraConfig(r=4, lora_alpha=8), "a")
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert torch.equal(logits(other), out)


def test_checkpointing_that_was_on_before_leaves_no_layer_without_gradient():
    model = llama()
    for layer in model.model.layers:  # the reentrant kind, as older versions of transformers set it
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    add_lora(model, LoraConfig(r=4, init_lora_weights=False))
    prepare_for_training(model)
    model.train()(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("main_input", ["input_ids", "pixel_values"])
@pytest.mark.parametrize("reentrant_after", [False, True])
def test_checkpointing_leaves_no_layer_without_gradient(reentrant_after, main_input):
    model = quantize_model(llama())
    model.main_input_name = main_input  # transformers treats them in two ways
    add_lora(model, LoraConfig(r=4, init_lora_weights=False))
    grads = []
    for checkpointing in (False, True):
        assert prepare_for_training(model, gradient_checkpointing=checkpointing) is model
        if checkpointing:
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
            if reentrant_after:  # what transformers' Trainer may do by its own settings
                new = getattr(model, "activation_checkpointing_enable", None)
                (new or model.gradient_checkpointing_enable)({"use_reentrant": True})
        model.train()(tokens(), labels=tokens()).loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
        grads.append({n: p.grad.clone() for n, p in trained.items()})
        model.zero_grad()
    assert model.config.use_cache is False
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


def test_checkpointing_a_plain_module_is_refused():
    model = plain()
    prepare_for_training(model)
    with pytest.raises(ValueError, match="transformers model, got Plain"):
        prepare_for_training(model, gradient_checkpointing=True)


def test_parameter_counts_are_those_of_the_dense_model(capsys):
    dense = sum(p.numel() for p in llama().parameters())
    model = quantize_model(llama())
    assert count_parameters(model)[1] == dense
    add_lora(model, LoraConfig(r=4))
    lora = sum(4 * sum(m.weight.shape) for m in layers_of(model, LoraLinear).values())
    assert count_parameters(model) == (lora, dense + lora)
    print_trainable_parameters(model)
    line = capsys.readouterr().out
    share = f"trainable%: {100 * lora / (dense + lora):.4f}"
    assert line == f"trainable params: {lora:,d} || all params: {dense + lora:,d} || {share}\n"
    tied = Tied()
    assert count_parameters(tied)[1] == sum(p.numel() for p in tied.parameters())


def test_explain_says_what_runs_and_why_not(capsys, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    model = quantize_model(llama(layers=1), skip_modules=("up_proj",))
    add_lora(model, LoraConfig(exclude_modules=["k_proj"]), "first")
    add_lora(model, LoraConfig(target_modules=["q_proj"]), "second")
    prepare_for_training(model)
    rows = {row.layer: row for row in explain_rows(model)}
    q, k, up = (
        rows[f"model.layers.0.{n}"] for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    )
    slow = "not cpu: FASTLORA_BACKEND says so"
    assert (q.weight, q.adapters, q.backend) == ("nf4 64 nested", "first*, second", "reference")
    assert (q.group, q.path, q.reason) == ("q_proj, k_proj, v_proj", "addmm, tail", slow)
    assert (k.weight, k.adapters) == ("nf4 64 nested", "")
    assert k.reason == f"{slow}; no adapter: no target of any adapter"
    assert (up.weight, up.adapters, up.group) == ("float32", "first*", "gate_proj, up_proj")
    assert up.reason == f"{slow}; not quantised: named in skip_modules"
    head = rows["lm_head"]
    assert (head.weight, head.adapters, head.backend, head.path) == ("float32", "", "torch", "")
    assert head.reason == "not quantised: output embedding; no adapter: output embedding"
    explain(model, tokens=512)
    printed = capsys.readouterr().out
    assert "lm_head" in printed
    assert "512 tokens" in printed


def test_explain_says_what_a_gpu_would_do(monkeypatch):
    """The plan of an H200 for a model that lies here."""
    model = add_lora(quantize_model(llama(layers=1)), LoraConfig(r=8, lora_dropout=0.1))
    prepare_for_training(model)
    monkeypatch.setattr(backend, "name_for", lambda device: "triton")
    monkeypatch.setattr(plan, "device_kind", lambda device: "NVIDIA H200")
    for row in explain_rows(model):
        if row.backend == "triton":
            assert row.path
            assert "not measured on NVIDIA H200" in row.reason


def test_explain_of_layers_that_left_their_group():
    model = quantize_model(llama(layers=1))
    prepare_for_training(model)
    attention = model.model.layers[0].self_attn
    model.moved = copy.deepcopy(attention.q_proj)
    del attention.v_proj
    rows = {row.layer: row for row in explain_rows(model)}
    assert rows["moved"].group == ""
    assert rows["model.layers.0.self_attn.q_proj"].backend


def test_wrapped_models_are_unwrapped():
    model = add_lora(plain(), random_lora(), "a")
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        add_lora(wrapped, random_lora(), "b")
        set_adapter(wrapped, "b")
        assert state_of(model).active == "b"
        delete_adapter(wrapped, "b")
    assert [*state_of(model).configs] == ["a"]


def test_bitsandbytes_layers_are_adopted_without_a_copy():
    bnb = pytest.importorskip("bitsandbytes")
    # block 64 in rows of 64: bitsandbytes' CPU path is right only where a row is whole blocks
    head = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compress_statistics=True)
    head.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, quant_type="nf4")
    model = nn.Sequential(nn.Linear(16, 64), head).to(DEVICE).train()
    pointer, x = head.weight.data_ptr(), torch.randn(5, 16, device=DEVICE)
    out = model(x)  # in eval mode bitsandbytes may repack its bytes
    lora = add_lora(nn.Sequential(*model), LoraConfig(r=4, target_modules=["1"]))
    quantized = quantize_model(nn.Sequential(*model), skip_modules=("0",))
    for adopted, layer in ((lora, lora[1].base_layer), (quantized, quantized[1])):
        assert type(layer) is Linear4bit
        assert layer.qweight.data_ptr() == pointer
        close(adopted(x), out)
    assert type(unload_lora(lora)[1]) is Linear4bit
    assert lora[1].qweight.data_ptr() == pointer
