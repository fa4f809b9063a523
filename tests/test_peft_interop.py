"""What fastlora saves PEFT loads, and the other way round, with the same logits and settings."""

import json

import pytest
import torch
from helpers import DEVICE, FLOOR
from model_helpers import Plain, bert, clone, gpt2, llama, logits, plain, tokens
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora.adapters import AdapterError, load_adapter, save_adapter
from fastlora.config import LoraConfig
from fastlora.model import (
    add_lora,
    delete_adapter,
    disable_adapters,
    merge_lora,
    quantize_model,
    set_adapter,
    unload_lora,
)
from fastlora.nn import Linear4bit
from fastlora.report import print_trainable_parameters

peft = pytest.importorskip("peft")

pytestmark = [
    # PEFT reads a property of transformers that is about to be renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    # what PEFT says on purpose, about what these tests do on purpose
    pytest.mark.filterwarnings(
        "ignore:You are trying to modify a model with PEFT for a second time"
    ),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SETTINGS = {  # name -> model, settings
    "llama all-linear": (llama, {"target_modules": "all-linear"}),
    "llama patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {r"layers\.1\..*": 3, "up_proj": 5},
            "alpha_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 7, "q_proj": 2},
            "task_type": "CAUSAL_LM",
        },
    ),
    "llama rslora": (llama, {"target_modules": r".*\.(k|down)_proj", "use_rslora": True}),
    "llama head": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "llama layers": (
        llama,
        {
            "target_modules": ["q_proj", "o_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "layers",
            "exclude_modules": ["o_proj"],
        },
    ),
    "gpt2 all-linear": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
    "gpt2 patterns": (
        gpt2,
        {
            "target_modules": ["c_attn", "c_proj"],
            "rank_pattern": {"mlp.c_proj": 2},
            "modules_to_save": ["ln_f"],
            "use_rslora": True,
            "fan_in_fan_out": True,
        },
    ),
    "bert classifier": (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "plain": (plain, {"target_modules": ["up", "extra.0"], "modules_to_save": ["head"]}),
}
COMMON = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
EVERY = pytest.mark.parametrize("name", SETTINGS)


def close(a, b):
    """The same sums in another order, in fp32."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= FLOOR[torch.float32] * b.abs().max()


def shake(model):
    """Move what is trained, so that nothing is at a value that both libraries begin with."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def by_peft(base, name):
    return shake(peft.get_peft_model(clone(base), peft.LoraConfig(**COMMON, **SETTINGS[name][1])))


def by_us(base, name):
    return shake(add_lora(clone(base), LoraConfig(**COMMON, **SETTINGS[name][1])))


def peft_load(base, folder):
    return peft.PeftModel.from_pretrained(clone(base), folder)


def dequantised(model):
    """The same model with dense layers that hold the values of its 4-bit ones."""
    model = clone(model)
    # an adapter that adds nothing, merged
    return merge_lora(add_lora(model, LoraConfig(r=1)))


@EVERY
def test_peft_loads_what_we_save(name, tmp_path):
    base = SETTINGS[name][0]()
    ours = by_us(base, name)
    out = logits(ours)
    assert not torch.allclose(out, logits(base), atol=1e-3)
    save_adapter(ours, tmp_path)
    close(logits(peft_load(base, tmp_path)), out)


@EVERY
def test_we_load_what_peft_saves(name, tmp_path):
    base = SETTINGS[name][0]()
    theirs = by_peft(base, name)
    theirs.save_pretrained(tmp_path)
    close(logits(load_adapter(clone(base), tmp_path)), logits(theirs))
    # and what we save from it, PEFT loads again
    save_adapter(load_adapter(clone(base), tmp_path), tmp_path / "again")
    close(logits(peft_load(base, tmp_path / "again")), logits(theirs))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_over_nf4_peft_over_the_dequantised_weights(build, double_quant, tmp_path):
    base = quantize_model(build(), double_quant=double_quant)
    dense = dequantised(base)
    assert not any(isinstance(m, Linear4bit) for m in dense.modules())
    close(logits(base), logits(dense))
    conv = {"fan_in_fan_out": True} if build is gpt2 else {}
    theirs = shake(
        peft.get_peft_model(
            clone(dense), peft.LoraConfig(target_modules="all-linear", **COMMON, **conv)
        )
    )
    theirs.save_pretrained(tmp_path / "theirs")
    close(logits(load_adapter(clone(base), tmp_path / "theirs")), logits(theirs))
    ours = shake(add_lora(clone(base), LoraConfig(**COMMON)))
    save_adapter(ours, tmp_path / "ours")
    close(logits(peft_load(dense, tmp_path / "ours")), logits(ours))


@EVERY
def test_files_have_the_keys_and_settings_of_peft(name, tmp_path):
    base = SETTINGS[name][0]()
    by_peft(base, name).save_pretrained(tmp_path / "theirs")
    save_adapter(by_us(base, name), tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
        k: (t.shape, t.dtype) for k, t in theirs.items()
    }
    ours, theirs = (json.loads((tmp_path / who / CONFIG).read_text()) for who in ("ours", "theirs"))
    assert [*ours] == sorted(ours)
    assert ours.keys() <= theirs.keys()
    # what we leave out came after PEFT 0.18, and asks for nothing
    assert {k for k in theirs.keys() - ours.keys() if theirs[k]} == {"peft_version"}
    loose = {"auto_mapping"}  # the class of the base model, for AutoPeftModel
    if SETTINGS[name][1]["target_modules"] == "all-linear":
        loose.add("target_modules")  # whole names or suffixes
    for config in (ours, theirs):
        for field in ("target_modules", "modules_to_save", "exclude_modules"):
            if isinstance(config[field], list):
                config[field] = sorted(config[field])
    differ = {k for k in ours if ours[k] != theirs[k]}
    assert differ <= loose


@EVERY
def test_configs_of_peft_are_accepted_whole(name):
    settings = SETTINGS[name][1]
    theirs = peft.LoraConfig(**COMMON, **settings)
    ours = LoraConfig.from_dict(theirs.to_dict())
    assert ours == LoraConfig(**COMMON, **settings)
    assert (
        peft.LoraConfig(**ours.to_dict()).to_dict()
        == peft.LoraConfig(**COMMON, **settings).to_dict()
    )


def test_absent_fields_have_the_defaults_of_peft():
    ours = LoraConfig.from_dict({"target_modules": ["up"]})
    theirs = peft.LoraConfig(target_modules=["up"]).to_dict()
    for field, value in ours.to_dict().items():
        assert value == (["up"] if field == "target_modules" else theirs[field]), field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [(0, 1)]),
        ("target_parameters", ["up.weight"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("ensure_weight_tying", True),
    ],
)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_what_we_cannot_do_is_refused_by_name(field, value):
    config = peft.LoraConfig(target_modules=["up"], **{field: value}).to_dict()
    with pytest.raises(NotImplementedError, match=f"{field}="):
        LoraConfig.from_dict(config)


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="peft_type must be LORA, got"):
        LoraConfig.from_dict(
            peft.IA3Config(target_modules=["up"], feedforward_modules=[]).to_dict()
        )


@pytest.mark.parametrize("quantized", [False, True])
def test_merge_and_unload_as_peft(quantized, tmp_path):
    base = llama()
    if quantized:
        quantize_model(base)
    dense = dequantised(base) if quantized else base
    ours = by_us(base, "llama patterns")
    save_adapter(ours, tmp_path)
    theirs = peft_load(dense, tmp_path).merge_and_unload()
    merged = merge_lora(clone(ours))
    for path, parameter in theirs.named_parameters():
        torch.testing.assert_close(merged.get_parameter(path), parameter, rtol=1e-6, atol=1e-6)
    close(logits(merged), logits(theirs))
    assert torch.equal(logits(unload_lora(ours)), logits(base))
    close(logits(peft_load(dense, tmp_path).unload()), logits(base))


def test_several_adapters_as_peft(tmp_path):
    base = llama()
    names = {"a": "llama patterns", "b": "llama rslora", "c": "llama head"}
    for adapter, name in names.items():
        save_adapter(by_us(base, name), tmp_path / adapter)
    theirs = peft.PeftModel.from_pretrained(clone(base), tmp_path / "a", adapter_name="a")
    ours = load_adapter(clone(base), tmp_path / "a", "a")
    for adapter in ("b", "c"):
        theirs.load_adapter(tmp_path / adapter, adapter)
        load_adapter(ours, tmp_path / adapter, adapter)
    close(logits(ours), logits(theirs))  # the first is active
    for adapter in ("c", "a", "b", "a"):
        theirs.set_adapter(adapter)
        set_adapter(ours, adapter)
        close(logits(ours), logits(theirs))
    with disable_adapters(ours), theirs.disable_adapter():
        close(logits(ours), logits(theirs))
    theirs.set_adapter("c")  # else PEFT warns that it has to choose another one
    set_adapter(ours, "c")
    theirs.delete_adapter("a")
    delete_adapter(ours, "a")
    for adapter in ("c", "b"):
        theirs.set_adapter(adapter)
        set_adapter(ours, adapter)
        close(logits(ours), logits(theirs))


def test_gradients_as_peft(tmp_path):
    base = llama()
    ours = by_us(base, "llama patterns")
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(clone(base), tmp_path, is_trainable=True)
    for model in (ours, theirs):
        model.train()(tokens(), labels=tokens()).loss.backward()
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    other = {
        n.removeprefix("base_model.model."): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert mine.keys() == other.keys()
    for name, grad in mine.items():
        torch.testing.assert_close(grad, other[name], rtol=1e-4, atol=1e-6)


def test_the_line_of_trainable_parameters(capsys):
    base = llama()
    by_peft(base, "llama head").print_trainable_parameters()
    print_trainable_parameters(by_us(base, "llama head"))
    theirs, ours = capsys.readouterr().out.splitlines()
    assert ours == theirs


def test_adapters_over_16_bit_are_fp32_as_in_peft(tmp_path):
    base = llama().to(torch.bfloat16)
    save_adapter(by_us(base, "llama all-linear"), tmp_path)
    by_peft(base, "llama all-linear").save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        assert {t.dtype for t in load_file(folder / WEIGHTS).values()} == {torch.float32}


def test_a_file_of_peft_may_name_modules_that_are_not_there(tmp_path):
    base = plain()
    config = peft.LoraConfig(**COMMON, target_modules=["up", "q_proj"])
    theirs = shake(peft.get_peft_model(clone(base), config))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="q_proj"):
        add_lora(clone(base), LoraConfig(target_modules=["up", "q_proj"]))
    close(logits(load_adapter(clone(base), tmp_path)), logits(theirs))


def test_what_peft_loads_silently_is_refused(tmp_path):
    """PEFT 0.21 gives no error for any of these."""
    base = plain()
    by_peft(base, "plain").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.extra.0.lora_B.weight"
    damages = {
        "missing": {k: t for k, t in tensors.items() if k != key},
        "unexpected": tensors | {"base_model.model.more.lora_A.weight": tensors[key] * 1},
        "finite": tensors | {key: tensors[key] * torch.nan},
        "fp32, fp16 or bf16": tensors | {key: tensors[key].to(torch.int8)},
    }
    for message, damaged in damages.items():
        save_file(damaged, tmp_path / WEIGHTS, {"format": "pt"})
        with pytest.raises(AdapterError, match=message):
            load_adapter(clone(base), tmp_path)


def test_bytes_of_the_base_are_not_touched_by_any_of_it(tmp_path):
    base = quantize_model(Plain().to(DEVICE))
    before = {n: p.clone() for n, p in base.state_dict().items()}
    save_adapter(add_lora(base, LoraConfig(r=2)), tmp_path)
    load_adapter(base, tmp_path)
    save_adapter(base, tmp_path)
    unload_lora(base)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert isinstance(base, nn.Module)


def test_what_is_done_to_adapters_of_peft_is_left_to_peft(tmp_path):
    """Nothing would happen to them, or other adapters would be put inside."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear"))
    keys = [*model.state_dict()]
    for refused in (
        disable_adapters,
        merge_lora,
        unload_lora,
        quantize_model,
        lambda m: set_adapter(m, "default"),
        lambda m: save_adapter(m, tmp_path / "out"),
        lambda m: add_lora(m, LoraConfig()),
    ):
        with pytest.raises(
            ValueError, match=r"without adapters of PEFT, got a PeftModel.*patch_peft"
        ):
            refused(model)
    assert [*model.state_dict()] == keys
