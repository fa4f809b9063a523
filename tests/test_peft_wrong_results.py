"""What PEFT and bitsandbytes get wrong without a word, and what becomes of it here.

Each test shows first that they do; where the installed version does not, it skips.
"""

import copy
from contextlib import suppress

import pytest
import torch
from helpers import DEVICE
from peft_helpers import (
    MARKS,
    adapted,
    assert_same,
    bnb,
    config,
    dense,
    ours,
    output,
    patched,
    peft,
    step,
    twins,
)

import fastlora

pytestmark = MARKS


@pytest.fixture
def enabled():
    """Fast layers from PEFT by itself, for the time of a test."""
    fastlora.enable()
    yield
    fastlora.disable()


def first(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def evaluate(model):
    """One eval forward, as every evaluation during training has; skip where it is harmless."""
    model.eval()
    output(model)
    model.train()


def variant(name):
    """A setting of PEFT for what is more than LoRA."""
    module = peft.tuners.lora.config
    made = {
        "kasa_config": ("KasaConfig", {}),
        "monteclora_config": ("MontecloraConfig", {}),
        "use_bdlora": ("BdLoraConfig", {"target_modules_bd_a": ["q_proj"], "nblocks": 2}),
    }
    kind, settings = made[name]
    if not hasattr(module, kind):
        pytest.skip(f"the installed PEFT has no {kind}")
    return getattr(module, kind)(**settings)


@pytest.mark.parametrize("name", ["kasa_config", "monteclora_config", "use_bdlora"])
def test_variants_are_trained_as_plain_lora_in_4_bit(name, enabled):
    settings = {"target_modules": ["q_proj"], name: variant(name), "init_lora_weights": True}
    fastlora.disable()
    plain = peft.get_peft_model(bnb(), config(**settings))
    if first(plain).lora_variant:
        pytest.skip("the installed PEFT trains the variant")
    with pytest.raises(NotImplementedError, match=rf"q_proj: .* must be plain LoRA, got {name}"):
        fastlora.patch_peft(plain)
    assert type(first(plain)) is peft.tuners.lora.bnb.Linear4bit
    fastlora.enable()
    with pytest.raises(NotImplementedError, match=f"must be plain LoRA, got {name}"):
        peft.get_peft_model(bnb(), config(**settings))
    model = patched(adapted("bnb"))
    if name != "kasa_config":  # which PEFT does not take beside another adapter
        with pytest.raises(NotImplementedError, match=f"must be plain LoRA, got {name}"):
            model.add_adapter("second", config(**settings))


def test_layers_from_before_enable_get_no_plain_lora_for_a_variant_either(enabled):
    fastlora.disable()
    model = adapted("bnb", target_modules=["q_proj"])
    fastlora.enable()
    with pytest.raises(NotImplementedError, match="must be plain LoRA, got use_bdlora"):
        model.add_adapter(
            "second", config(target_modules=["q_proj"], use_bdlora=variant("use_bdlora"))
        )


@pytest.mark.parametrize("base", [bnb, ours])
def test_the_same_variants_are_refused_by_name(base, enabled):
    with pytest.raises(NotImplementedError, match="must be plain LoRA, got use_qalora"):
        peft.get_peft_model(base(), config(use_qalora=True))
    with pytest.raises(NotImplementedError, match="got init_lora_weights='mica'"):
        peft.get_peft_model(base(), config(init_lora_weights="mica"))
    with pytest.raises(NotImplementedError, match="got velora_config"):
        peft.get_peft_model(base(), config(velora_config=peft.tuners.lora.VeloraConfig()))


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=str,
)
def test_what_reads_weights_would_read_a_placeholder(settings, enabled):
    fastlora.disable()
    plain = peft.get_peft_model(ours(), config(target_modules=["q_proj"], use_dora=True))
    # attention in torch makes numbers of it again, so that the loss looks right
    if not torch.isnan(first(plain)(torch.randn(2, 64))).any():
        pytest.skip("the installed PEFT does not read the placeholder")
    with pytest.raises(NotImplementedError, match="got use_dora"):
        fastlora.patch_peft(plain)
    fastlora.enable()
    name, value = next(iter(settings.items()))
    for mixed in (False, True):
        with pytest.raises(NotImplementedError, match=f"{name}.*{value if name[0] == 'i' else ''}"):
            peft.get_peft_model(ours(), config(**settings), mixed=mixed)


def test_dora_over_bitsandbytes_is_that_of_peft():
    plain = adapted("bnb", use_dora=True)
    fast = copy.deepcopy(plain)
    report = fastlora.patch_peft(fast)
    assert len(report.fallbacks) == 14
    expected = step(plain)
    evaluate(fast)
    assert_same(step(fast), expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
def test_a_bias_is_merged_with_its_scale(safe):
    plain, fast = twins("bnb", lora_bias=True, lora_alpha=32, target_modules=["q_proj"])
    layer = first(plain)
    exact = layer.base_layer.bias.detach() + layer.scaling["default"] * layer.lora_B["default"].bias
    # with safe_merge PEFT asks a vector whether it is finite
    with suppress(RuntimeError):
        plain.merge_adapter(safe_merge=safe)
    if torch.allclose(layer.base_layer.bias, exact):
        pytest.skip("the installed PEFT scales the bias")
    before = output(fast)
    old = first(fast).base_layer.bias.detach().clone()
    fast.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(first(fast).base_layer.bias.detach(), exact.detach())
    # what is left is the rounding of the weights
    assert (output(fast) - before).abs().max() <= 0.2 * before.abs().max()
    fast.unmerge_adapter()
    torch.testing.assert_close(first(fast).base_layer.bias.detach(), old)


@pytest.mark.parametrize("base", ["bnb", "ours"])
def test_safe_merge_sees_the_bias(base):
    model = patched(adapted(base, lora_bias=True))
    first(model).lora_B["default"].bias.data[3] = torch.inf
    state = copy.deepcopy(first(model).state_dict())
    with pytest.raises(ValueError, match="must be finite, got NaN or Inf of adapter 'default'"):
        model.merge_adapter(safe_merge=True)
    assert not first(model).merged
    for name, value in first(model).state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("base", ["dense", "bnb", "ours"])
def test_a_bias_needs_a_bias_to_go_to(base):
    model = patched(adapted(base, lora_bias=True, target_modules=["up_proj"]))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"must have a bias .* got none for adapter 'default'"):
        model.merge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("way", ["patch", "enable"])
def test_replicated_layers_are_not_merged(way, enabled):
    settings = {"layer_replication": [[0, 2], [1, 2]]}
    fastlora.disable()
    plain = peft.get_peft_model(dense(), config(**settings))
    expected = output(plain)
    twin = copy.deepcopy(plain)
    if way == "patch":
        patched(twin)
    else:
        fastlora.enable()
        twin = peft.get_peft_model(dense(), config(**settings))
        expected = output(twin)
        assert not fastlora.patch_peft(twin).fallbacks
    plain_before = output(plain)
    plain.merge_adapter()
    if (output(plain) - plain_before).abs().max() < 1e-3:
        pytest.skip("the installed PEFT merges replicated layers right")
    shared = "without layer_replication or tied weights, got .*q_proj, which share theirs"
    for merge in (twin.merge_adapter, twin.merge_and_unload):
        with pytest.raises(ValueError, match=shared):
            merge()
    assert_same(output(twin), expected)
    # they share their weights also when another adapter is left
    twin.add_adapter("plain", config())
    twin.set_adapter("plain")
    twin.delete_adapter("default")
    with pytest.raises(ValueError, match=shared):
        twin.merge_adapter()


def repacked(model):
    """The model after an eval forward by bitsandbytes; skip where that is harmless."""
    evaluate(model)
    if not getattr(first(model).base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks only on CPUs with AVX-512 BF16, or not any more")
    return model


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_training_after_an_eval_forward(quant_type):
    # only some layers have adapters, and gradients have to pass through the others
    settings = config(target_modules=["q_proj", "v_proj"])
    model = bnb(quant_type, attention_bias=False)  # with biases it raises
    plain = peft.get_peft_model(model, settings).train()
    fast = copy.deepcopy(plain)
    fastlora.patch_peft(fast)
    expected = step(plain)
    wrong = step(repacked(plain))
    errors = [
        (wrong[name] - value).norm() / value.norm() if name in wrong else torch.tensor(1.0)
        for name, value in expected.items()
        if name != "loss"
    ]
    assert max(errors) > 0.5
    evaluate(fast)
    assert_same(step(fast), expected)


def of_others(model):
    """The model with a subclass that somebody made of bitsandbytes' layer."""
    theirs = pytest.importorskip("bitsandbytes").nn.Linear4bit
    for layer in model.modules():
        if type(layer) is theirs:
            layer.__class__ = type("Others", (theirs,), {})
    return model


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("way", ["patch", "enable"])
@pytest.mark.parametrize("kind", ["a subclass", "another tuner"])
def test_training_after_an_eval_forward_of_others(kind, way, enabled):
    def made():
        torch.manual_seed(0)
        model = bnb(attention_bias=False)
        settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        if kind == "another tuner":
            return peft.get_peft_model(model, peft.AdaLoraConfig(total_step=9, **settings)).train()
        return peft.get_peft_model(of_others(model), config(**settings)).train()

    if way == "patch":
        fastlora.disable()
    fast = made()
    if way == "patch":
        fastlora.patch_peft(fast)
    expected = step(fast)
    fastlora.disable()
    wrong = step(repacked(made()))
    assert any(name not in wrong or not wrong[name].any() for name in expected)
    evaluate(fast)
    assert_same(step(fast), expected)


def test_a_bias_is_not_merged_into_a_subclass_without_its_scale():
    model = of_others(adapted("bnb", lora_bias=True, target_modules=["q_proj"]))
    fastlora.patch_peft(model)
    with pytest.raises(NotImplementedError, match="needs bitsandbytes' own 4-bit layer, got Oth"):
        model.merge_adapter()


def test_merging_after_an_eval_forward():
    plain = adapted("bnb")
    fast = patched(copy.deepcopy(plain))
    exact, before = copy.deepcopy(fast), output(plain)
    exact.merge_adapter()
    repacked(plain).merge_adapter()
    evaluate(fast)
    fast.merge_adapter()
    assert torch.equal(output(fast), output(exact))
    # B is random, so that rounding the merged weights alone shows
    wrong, rounded = ((output(model) - before).norm() for model in (plain, fast))
    assert wrong > 2 * rounded


def test_dequantize_after_an_eval_forward(tmp_path, enabled):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bnb()  # skips without bitsandbytes
    dense().save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def decoded(fast):
        (fastlora.enable if fast else fastlora.disable)()
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=settings, dtype=torch.float32
        )
        model = peft.get_peft_model(model, config(target_modules=["q_proj"])).train()
        before = output(model) if fast else None
        evaluate(model) if fast else repacked(model)
        base = model.unload()
        return before, output(model.eval().train()), output(base.dequantize().train())

    _, _, wrong = decoded(fast=False)
    _, exact, right = decoded(fast=True)
    assert_same(right, exact)
    assert (wrong - right).norm() > 0.5 * right.norm()


def test_rows_that_are_no_whole_blocks():
    """bitsandbytes 0.50 takes blocks per row on CPUs, though bytes are laid out flat."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(2)
    layer = bitsandbytes.nn.Linear4bit(
        96, 8, bias=False, quant_type="nf4", compute_dtype=torch.float32
    )
    layer.to("cpu").train()
    x = torch.randn(3, 96)
    values = fastlora.dequantize_nf4(
        fastlora.NF4Weight.from_bnb(layer.weight, layer.weight.quant_state), torch.float32
    )
    exact = x @ values.T
    model = torch.nn.Sequential(layer)
    model = peft.inject_adapter_in_model(
        config(target_modules=["0"], init_lora_weights=True), model
    )
    if torch.allclose(layer(x), exact, atol=1e-5):
        pytest.skip("the installed bitsandbytes is right here")
    fastlora.patch_peft(model)
    torch.testing.assert_close(model(x), exact)


def test_rows_that_end_within_a_block_are_decoded_wrongly_on_cpus():
    """bitsandbytes decodes each row as if a block began with it, but blocks run on over rows."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = torch.nn.Linear(96, 16, bias=False)
    layer = bitsandbytes.nn.Linear4bit(96, 16, bias=False, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    plain = peft.get_peft_model(
        torch.nn.Sequential(layer).to(DEVICE), config(target_modules=["0"], init_lora_weights=True)
    )
    x = torch.randn(5, 96, device=DEVICE)
    exact = x @ fastlora.dequantize_nf4(fastlora.quantize_nf4(linear.weight.to(DEVICE))).T
    got = patched(copy.deepcopy(plain))(x)
    assert_same(got.detach(), exact)
    if torch.allclose(plain(x), exact, atol=1e-4):
        pytest.skip("the installed bitsandbytes decodes them rightly")
