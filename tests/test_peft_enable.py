"""`enable`: PEFT's documented ways to an adapter, each with fast layers and PEFT's own numbers."""

import copy
import dataclasses
import functools
import json
import threading

import pytest
import torch
from helpers import DEVICE
from model_helpers import tokens
from peft_helpers import (
    BASES,
    EVERY,
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
)
from torch import nn

import fastlora
from fastlora.integrations.peft.layers import FastLora

pytestmark = MARKS

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def enabled():
    fastlora.enable()
    yield
    fastlora.disable()


@pytest.fixture
def saved(tmp_path):
    """Folders of a model and of an adapter for it, and the logits of both."""
    model = dense()
    model.save_pretrained(tmp_path / "model")
    model = peft.get_peft_model(model, config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter", output(model.eval())


def assert_fast(model):
    """Every LoRA layer is fast, without `patch_peft`."""
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 14
    assert all(isinstance(m, FastLora) for m in layers)


@EVERY
def test_get_peft_model(base, enabled):
    torch.manual_seed(0)
    fast = adapted(base)
    fastlora.disable()
    torch.manual_seed(0)
    plain = adapted(base)
    assert_fast(fast)
    assert_same(step(fast), step(plain))
    assert not any(isinstance(m, FastLora) for m in plain.modules())


def test_adapters_of_several_kinds_on_a_model(enabled):
    def mixed():
        torch.manual_seed(0)
        model = peft.get_peft_model(dense(), config(), mixed=True).train()
        loha = peft.LoHaConfig(target_modules=["q_proj"], init_weights=False)
        model.add_adapter("loha", loha)
        model.add_adapter("more", config(target_modules=["k_proj"]))
        model.set_adapter(["default", "loha", "more"])
        return model

    fast = mixed()
    fastlora.disable()
    plain = mixed()
    report = fastlora.patch_peft(fast)
    assert report.fast == 14, report
    assert_same(step(fast), step(plain))
    assert_same(output(fast.merge_and_unload()), output(plain.merge_and_unload()))
    assert not any(isinstance(m, FastLora) for m in plain.modules())


def test_a_saved_adapter_on_a_model(saved, enabled):
    from transformers import AutoModelForCausalLM

    folder, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(model.to(DEVICE), adapter)
    assert_fast(model)
    assert_same(output(model), expected)
    assert not any(p.requires_grad for p in model.parameters())
    trained = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder).to(DEVICE), adapter, is_trainable=True
    )
    assert len(step(trained)) == 29


def test_a_saved_adapter_alone(saved, enabled):
    folder, adapter, expected = saved
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base_model_name_or_path": str(folder)}))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).to(DEVICE)
    assert_fast(model)
    assert_same(output(model), expected)


def test_more_adapters_and_switching(saved, enabled):
    from transformers import AutoModelForCausalLM

    folder, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    model = peft.PeftModel.from_pretrained(model, adapter, adapter_name="sft")
    model.load_adapter(adapter, "dpo")
    model.add_adapter("new", config())
    model.set_adapter("dpo")
    assert_fast(model)
    assert_same(output(model), expected)
    with model.disable_adapter():
        assert (output(model) - expected).abs().max() > 1e-2
    model.delete_adapter("sft")
    merged = model.merge_and_unload()
    assert_same(output(merged.eval()), expected)
    assert type(merged.get_submodule(Q)) is nn.Linear


def test_adapters_of_transformers_own_models(saved, enabled, monkeypatch):
    from transformers import AutoModelForCausalLM
    from transformers.integrations import peft as integration

    # transformers 5.24 asks for a PEFT that is not released
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.18.0")
    folder, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    model.load_adapter(adapter, adapter_name="loaded")
    assert_fast(model)
    assert_same(output(model), expected)
    model.add_adapter(config(), adapter_name="added")
    model.set_adapter("added")
    assert (output(model) - expected).abs().max() > 1e-2
    model.set_adapter("loaded")
    model.disable_adapters()
    model.enable_adapters()
    assert_same(output(model), expected)
    report = fastlora.patch_peft(model)
    assert (report.fast, len(report.rows)) == (14, 14)


def test_injected_into_any_module(enabled):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model = peft.inject_adapter_in_model(config(target_modules=["0"]), model)
    assert isinstance(model[0], FastLora)
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].lora_A["default"].weight.grad is not None


def test_modules_to_save_and_initialisations(enabled):
    for init in (True, "gaussian", "pissa", "olora", "orthogonal"):
        torch.manual_seed(0)
        base = dense()
        fast = peft.get_peft_model(
            copy.deepcopy(base), config(init_lora_weights=init, modules_to_save=["lm_head"])
        )
        if init in (True, "gaussian", "pissa", "olora"):  # they leave the function as it was
            assert (output(fast) - output(base)).abs().max() < 1e-4
        assert any("modules_to_save" in name for name in step(fast))
        assert_fast(fast)


def test_orthogonal_initialisation_over_our_layers(enabled):
    model = peft.get_peft_model(ours(), config(init_lora_weights="orthogonal")).train()
    assert_fast(model)
    a = model.get_submodule(f"base_model.model.{Q}").lora_A["default"].weight
    assert a.isfinite().all()
    assert all(grad.isfinite().all() for grad in step(model).values())


def test_lora_with_other_tuners_is_left_alone(enabled):
    settings = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2)
    model = peft.get_peft_model(dense(), settings)
    assert type(model.base_model) is peft.AdaLoraModel
    assert not any(isinstance(m, FastLora) for m in model.modules())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_4_bit_as_documented(tmp_path, enabled):
    """Quantised, prepared for k-bit training, checkpointed, evaluated on the way."""
    bnb()  # skips without bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dense(attention_bias=False).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32
    )
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = peft.get_peft_model(model, config(lora_dropout=0.05)).train()
    assert_fast(model)
    torch.manual_seed(1)
    expected = step(model)
    model.eval()
    assert model.generate(tokens(), max_new_tokens=3, do_sample=False).shape == (2, 12)
    model.train()
    torch.manual_seed(1)
    assert_same(step(model), expected)


def test_switching_on_and_off():
    before = peft.LoraModel.inject_adapter
    assert "inject_adapter" not in vars(peft.LoraModel)
    fastlora.disable()
    fastlora.enable()
    once = peft.LoraModel.inject_adapter
    fastlora.enable()
    assert peft.LoraModel.inject_adapter is once is not before
    fast = adapted("dense")
    fastlora.disable()
    fastlora.disable()
    assert peft.LoraModel.inject_adapter is before
    assert "inject_adapter" not in vars(peft.LoraModel)
    assert_fast(fast)
    assert not any(isinstance(m, FastLora) for m in adapted("dense").modules())
    fast.add_adapter("more", config(target_modules=["lm_head"]))
    assert isinstance(fast.base_model.model.lm_head, FastLora)


def test_what_exists_is_left_alone():
    model = adapted("dense", target_modules=["q_proj"])
    fastlora.enable()
    try:
        model.add_adapter("more", config(target_modules=["q_proj", "v_proj"]))
    finally:
        fastlora.disable()
    attention = model.base_model.model.model.layers[0].self_attn
    assert type(attention.q_proj) is peft.tuners.lora.Linear
    assert isinstance(attention.v_proj, FastLora)


def test_another_patch_of_peft_is_kept(monkeypatch):
    seen, before = [], peft.LoraModel.inject_adapter

    def other(self, *args, **kwargs):
        seen.append(self)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(peft.LoraModel, "inject_adapter", other, raising=False)
    fastlora.enable()
    assert_fast(adapted("dense"))
    assert len(seen) == 1
    fastlora.disable()
    assert peft.LoraModel.inject_adapter is other


@pytest.mark.parametrize("named", [False, True])
def test_another_patch_of_peft_that_came_later_is_kept(named, monkeypatch):
    fastlora.enable()
    seen, before = [], peft.LoraModel.inject_adapter

    def other(self, *args, **kwargs):
        seen.append(self)
        return before(self, *args, **kwargs)

    other = functools.wraps(before)(other) if named else other
    monkeypatch.setattr(peft.LoraModel, "inject_adapter", other)
    assert_fast(adapted("dense"))
    for _ in range(2):
        fastlora.disable()
        assert peft.LoraModel.inject_adapter is other
        seen.clear()
        assert not any(isinstance(m, FastLora) for m in adapted("dense").modules())
        assert len(seen) == 1
        fastlora.enable()
        assert_fast(adapted("dense"))
    fastlora.disable()


def test_a_patch_of_what_tuners_inherit_is_kept(monkeypatch):
    base = peft.LoraModel.__base__
    seen, before = [], base.inject_adapter

    def other(self, *args, **kwargs):
        seen.append(self)
        return before(self, *args, **kwargs)

    fastlora.enable()
    monkeypatch.setattr(base, "inject_adapter", other)
    assert_fast(adapted("dense"))
    fastlora.disable()
    adapted("dense")
    assert len(seen) == 2
    fastlora.enable()
    monkeypatch.undo()
    fastlora.disable()
    adapted("dense")
    assert len(seen) == 2


def test_many_threads_switch(enabled):
    def work():
        for _ in range(50):
            fastlora.enable()
            fastlora.disable()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fastlora.disable()
    assert "inject_adapter" not in vars(peft.LoraModel)


def test_unpatching_what_was_made_fast(enabled):
    model = adapted("bnb")
    report = fastlora.patch_peft(model)
    fastlora.unpatch_peft(model)
    assert report.fast == 14
    assert not any("fastlora" in type(m).__module__ for m in model.modules())
    assert patched(model) is model


# Trainer's default, of which torch warns where there is no GPU
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.parametrize("base", ["dense", "bnb"])
def test_trainer_evaluates_on_the_way(base, tmp_path, enabled):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in tokens().tolist()] * 2

    def losses(evaluate):
        torch.manual_seed(0)
        model = adapted(base)
        args = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            eval_strategy="steps" if evaluate else "no",
            eval_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            learning_rate=1e-2,
        )
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        return [record["loss"] for record in trainer.state.log_history if "loss" in record]

    without = losses(evaluate=False)
    assert losses(evaluate=True) == without
    assert without[-1] < without[0]
    fastlora.disable()
    if base == "dense":
        assert losses(evaluate=True) == pytest.approx(without, rel=1e-5)


def test_what_peft_says_of_a_model(enabled):
    fast = adapted("dense")
    fastlora.disable()
    plain = adapted("dense")
    assert fast.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    status, expected = fast.get_model_status(), plain.get_model_status()
    assert status.adapter_model_type == "FastLoraModel"
    assert dataclasses.replace(status, adapter_model_type="LoraModel") == expected
    assert status.num_adapter_layers == 14
    for mine, theirs in zip(fast.get_layer_status(), plain.get_layer_status(), strict=True):
        assert mine.name == theirs.name
        assert mine.active_adapters == theirs.active_adapters


@EVERY
def test_initialisation_from_data(base, enabled):
    """EVA computes ranks and A from activations, through the layers it finds."""
    settings = config(
        target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    model = peft.get_peft_model(BASES[base](), settings)
    batches = [{"input_ids": tokens().roll(i, 1)} for i in range(4)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    assert fastlora.patch_peft(model).fast == 4
    rows = [m.lora_A["default"].weight for m in model.modules() if hasattr(m, "lora_A")]
    # directions of the largest variance
    assert all(torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-4) for a in rows)
    assert len(step(model.train())) == 9
