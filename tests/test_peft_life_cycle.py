"""What PEFT does to a model in its life, patched and unpatched: the same numbers and files."""

import copy
import json
import warnings

import pytest
import torch
from helpers import DEVICE
from model_helpers import tokens
from peft_helpers import (
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

import fastlora
from fastlora.nn import Linear4bit

pytestmark = MARKS

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def with_second(model, **settings):
    """The same second adapter in every model."""
    torch.manual_seed(7)
    model.add_adapter("second", config(**settings))
    return model


def loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    with_second(model)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    yield step(model)
    model.set_adapter("second")
    yield step(model)


def disabled(model, tmp_path):
    with model.disable_adapter():
        yield output(model)
    yield output(model)
    model.base_model.disable_adapter_layers()
    yield output(model)
    model.base_model.enable_adapter_layers()
    yield step(model)


def frozen(model, tmp_path):
    with_second(model)
    model.set_adapter("second", inference_mode=True)
    yield output(model)
    assert not any(p.requires_grad for p in model.parameters())


def several(model, tmp_path):
    with_second(model, r=3, use_rslora=True)
    model.base_model.set_adapter(["default", "second"])
    yield step(model)
    model.base_model.set_adapter("second")
    yield step(model)


def weighted(model, tmp_path):
    with_second(model)
    for how in ("linear", "cat", "svd", "ties_svd"):
        settings = {"density": 0.5} if "ties" in how else {}
        model.add_weighted_adapter(["default", "second"], [0.5, -0.3], how, how, **settings)
        model.set_adapter(how)
        yield output(model)


def mixed_batch(model, tmp_path):
    with_second(model)
    model.eval()
    yield output(model, adapter_names=["__base__", "second"])
    yield output(model, adapter_names=["default", "second"])
    yield output(model.train())


def hotswapped(model, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    with_second(model, lora_alpha=9).save_pretrained(tmp_path, selected_adapters=["second"])
    model.delete_adapter("second")
    hotswap_adapter(model, tmp_path / "second", "default", torch_device="cpu")
    yield step(model)


def hotswapped_to_another_rank(model, tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    with_second(model, r=6).save_pretrained(tmp_path, selected_adapters=["second"])
    model.delete_adapter("second")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    yield output(model)
    hotswap_adapter(model, tmp_path / "second", "default", torch_device="cpu")
    yield output(model)


def deleted(model, tmp_path):
    with_second(model)
    model.delete_adapter("default")
    yield step(model)


def scaled(model, tmp_path):
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, 0.5):
        yield output(model)
    yield output(model)


def unloaded(model, tmp_path):
    yield output(model.unload())


def in_trainers_hands(model, tmp_path):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        yield step(model)
        optimizer.step()


LIVES = [
    loaded,
    disabled,
    frozen,
    several,
    weighted,
    mixed_batch,
    hotswapped,
    hotswapped_to_another_rank,
    deleted,
    scaled,
    unloaded,
    in_trainers_hands,
]


@pytest.mark.parametrize("live", LIVES, ids=lambda f: f.__name__)
@EVERY
def test_lives_are_the_same(base, live, tmp_path):
    plain, fast = twins(base)
    expected = [copy.deepcopy(value) for value in live(plain, tmp_path / "plain")]
    got = [*live(fast, tmp_path / "fast")]
    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert_same(ours, theirs)


def merging(model, safe):
    """Outputs of a model along the ways in which PEFT merges."""
    with_second(model)
    model.merge_adapter(safe_merge=safe)
    yield output(model)
    model.unmerge_adapter()
    yield output(model)
    model.merge_adapter(["default", "second"], safe_merge=safe)
    yield output(model)
    with model.disable_adapter():  # unmerges
        yield output(model)
    model.base_model.set_adapter(["default", "second"])
    yield output(model.merge_and_unload(safe_merge=safe))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
@pytest.mark.parametrize("base", ["dense", "bnb"])
def test_merging_is_the_same(base, safe, settings):
    plain = without_repacking(adapted(base, **settings))
    fast = copy.deepcopy(plain)
    fastlora.patch_peft(fast)
    for ours, theirs in zip(merging(fast, safe), merging(plain, safe), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
def test_our_4bit_layers_are_merged_as_those_of_bitsandbytes(safe):
    """PEFT itself cannot merge into them at all."""
    plain = peft.get_peft_model(fastlora.quantize_model(dense()), config())
    theirs = peft.get_peft_model(bnb(), config())
    weights = {n: p for n, p in plain.named_parameters() if p.dtype == torch.float32}
    own = peft.get_peft_model(fastlora.quantize_model(dense()), config())
    for model in (theirs, own):
        for name, p in model.named_parameters():
            if name in weights:
                p.data.copy_(weights[name].data)
    # the 4-bit bytes, which the loop leaves out
    torch.manual_seed(5)
    for path, layer in own.named_modules():
        if isinstance(layer, Linear4bit):
            w = torch.randn(layer.out_features, layer.in_features) / 8
            layer.requantize(w)
            other = theirs.get_submodule(path)
            new = type(other.weight)(w, requires_grad=False, quant_type="nf4", module=other)
            other.weight = new.to(w.device)
    with pytest.raises(RuntimeError):
        plain.merge_adapter()
    patched(own)
    for got, expected in zip(
        merging(own, safe), merging(without_repacking(theirs), safe), strict=True
    ):
        assert_same(got, expected)


@EVERY
def test_what_merging_leaves_behind(base):
    model = with_second(patched(adapted(base)))
    kinds = {type(m.base_layer) for m in model.modules() if hasattr(m, "base_layer")}
    state = [*model.state_dict()]
    model.merge_adapter()
    assert [*model.state_dict()] == state
    assert {*fastlora.patch_peft(model).fallbacks.values()} == {"merged"}
    model.unmerge_adapter()
    assert not fastlora.patch_peft(model).fallbacks
    merged = model.merge_and_unload()
    assert {type(merged.get_submodule("model.layers.0.mlp.up_proj"))} == kinds
    assert not any("lora" in name for name in merged.state_dict())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_weights_stored_as_other_types_are_merged(storage):
    """As FSDP wants them, which shards floats."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def made(kind):
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(
            64, 32, quant_type="nf4", compute_dtype=torch.float32, quant_storage=kind
        )
        model = nn.Sequential(layer).to(DEVICE)
        model.is_loaded_in_4bit = True
        return patched(peft.inject_adapter_in_model(config(target_modules=["0"]), model))

    model, expected = made(storage), made(torch.uint8)
    x = torch.randn(3, 64, device=DEVICE)
    for act in ("merge", "unmerge"):
        for each in (model, expected):
            getattr(each[0], act)()
        weight = model[0].base_layer.weight
        assert weight.dtype == storage
        assert weight.shape[1] == 1
        assert torch.equal(model(x), expected(x))


def test_merging_keeps_what_bitsandbytes_knows_of_a_weight():
    model = patched(adapted("bnb", target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer
    layer.weight.quant_state.dtype = torch.bfloat16
    old = layer.weight
    model.merge_adapter()
    new = layer.weight
    assert not torch.equal(new, old)
    assert layer.quant_state is new.quant_state
    assert new.quant_state.dtype == torch.bfloat16
    for name in ("quant_type", "quant_storage", "compress_statistics", "blocksize", "module"):
        assert getattr(new, name) is getattr(old, name) or getattr(new, name) == getattr(old, name)
    assert new.bnb_quantized
    assert not new.requires_grad


@pytest.mark.parametrize("base", ["bnb", "ours"])
def test_merging_twice_and_unmerging_nothing(base):
    model = patched(adapted(base))
    with pytest.warns(UserWarning, match="no adapter is merged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.merge_adapter()
    assert "already merged" in str(seen[0].message)


@pytest.mark.parametrize("settings", [{}, {"lora_bias": True, "use_rslora": True}])
@EVERY
def test_files_are_the_same(base, settings, tmp_path):
    plain, fast = twins(base, **settings)
    plain.save_pretrained(tmp_path / "plain")
    fast.save_pretrained(tmp_path / "fast")
    files = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("plain", "fast")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("plain", "fast")]
    for found in configs:  # written in the order of a set
        found["target_modules"] = {*found["target_modules"]}
    assert configs[0] == configs[1]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(plain).unload(), tmp_path / "fast")
    assert_same(output(without_repacking(again).train()), output(plain))


def test_later_layers_of_a_patched_model_are_fast(tmp_path):
    model = patched(peft.get_peft_model(dense(), config(target_modules=["q_proj"])))
    model.add_adapter("more", config(target_modules=["v_proj", "up_proj"]))
    report = fastlora.patch_peft(model)
    assert len(report.rows) == 6
    assert {*report.fallbacks.values()} == {"no active adapter"}
    model.set_adapter("more")
    assert fastlora.patch_peft(model).fast == 4


@EVERY
def test_switching_is_seen_by_the_next_forward(base, monkeypatch):
    model = with_second(patched(adapted(base)), use_dora=base == "dense")
    seen = []
    run = fastlora.ops.linear_group
    monkeypatch.setattr(
        fastlora.ops, "linear_group", lambda *args: seen.append(args[1][0].R) or run(*args)
    )

    def ranks():
        seen.clear()
        model(input_ids=tokens())
        return {*seen}

    assert ranks() == {4}
    with model.disable_adapter():
        assert 4 not in ranks()
    model.set_adapter("second")
    assert 4 not in ranks() or base != "dense"
    model.set_adapter("default")
    assert ranks() == {4}
    model.merge_adapter()
    assert 4 not in ranks()
    model.unmerge_adapter()
    assert ranks() == {4}


def test_hot_swapping_under_compile(tmp_path):
    """The scale is a tensor then, and another adapter is no reason to compile again."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    settings = {"target_modules": ["q_proj", "v_proj"]}
    plain = adapted("dense", **settings)
    with_second(plain, r=6, **settings).save_pretrained(tmp_path, selected_adapters=["second"])
    fast = copy.deepcopy(plain)
    plain.set_adapter("second")
    fast.delete_adapter("second")
    prepare_model_for_compiled_hotswap(fast, target_rank=8)
    patched(fast)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        output(compiled)
        hotswap_adapter(fast, tmp_path / "second", "default", torch_device="cpu")
        assert_same(output(compiled), output(plain))
