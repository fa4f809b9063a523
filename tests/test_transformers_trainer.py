"""transformers' Trainer on models that FastLoraConfig quantised, with PEFT's adapters and ours."""

import pytest
import torch

import fastlora
from fastlora.nn import Linear4bit

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402
from transformers.trainer_utils import validate_quantization_for_training  # noqa: E402

from fastlora.integrations.transformers import (  # noqa: E402
    FastLoraConfig,
    give_back_bitsandbytes,
    save_nf4,
    take_over_bitsandbytes,
)

# Trainer's default, of which torch warns where there is no GPU
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=97,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantised(folder, dtype=torch.float32):
    config = FastLoraConfig()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def with_adapters(model, kind, dropout=0.1):
    torch.manual_seed(1)
    if kind == "ours":
        return fastlora.add_lora(model, fastlora.LoraConfig(r=4, lora_dropout=dropout))
    config = peft.LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    if kind == "patched":
        fastlora.patch_peft(model)
    return model


def rows():
    tokens = torch.randint(97, (16, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in tokens.tolist()]


def trainer_of(model, folder, steps=4, **settings):
    arguments = {
        "max_steps": steps,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(folder, **arguments | settings)
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:4])


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def frozen(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


KINDS = ["ours", "peft", "patched"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_evaluation_changes_nothing(dense, tmp_path, kind):
    runs = []
    for evaluates in ("no", "steps"):
        # a loader of data for evaluation draws a seed, after which dropout is another
        model = with_adapters(quantised(dense), kind, dropout=0.0)
        validate_quantization_for_training(model)
        before, base = trained(model), frozen(model)
        trainer = trainer_of(model, tmp_path, steps=8, eval_strategy=evaluates, eval_steps=3)
        trainer.train()
        runs.append(trained(model))
        same(frozen(model), base)
        assert all(not torch.equal(before[name], runs[-1][name]) for name in before)
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert losses[-1] < losses[0]
        evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
        assert len(evaluated) == {"no": 0, "steps": 3}[evaluates]
    same(*runs)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_of_either_kind_changes_nothing(dense, tmp_path, kind):
    runs = []
    for reentrant in (None, True, False):
        settings = {}
        if reentrant is not None:
            settings["activation_checkpointing"] = True
            settings["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        model = with_adapters(quantised(dense), kind)
        if kind == "ours":
            fastlora.prepare_for_training(model, gradient_checkpointing=reentrant is not None)
        before = trained(model)
        trainer_of(model, tmp_path, **settings).train()
        runs.append(trained(model))
        assert all(not torch.equal(before[name], runs[-1][name]) for name in before)
    same(runs[0], runs[1])
    same(runs[0], runs[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(dense, tmp_path, kind):
    whole = with_adapters(quantised(dense), kind)
    trainer_of(whole, tmp_path, save_strategy="steps", save_steps=2).train()
    again = with_adapters(quantised(dense), kind)
    torch.manual_seed(7)  # the checkpoint brings its own
    trainer = trainer_of(again, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(trained(again), trained(whole))
    same(frozen(again), frozen(whole))


@pytest.mark.parametrize("kind", ["ours", "patched"])
def test_what_was_trained_is_merged(dense, tmp_path, kind):
    model = with_adapters(quantised(dense), kind, dropout=0.0)
    trainer_of(model, tmp_path).train()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        wanted = model.eval()(tokens).logits
        if kind == "ours":
            merged = fastlora.merge_lora(model)
            assert not any(isinstance(m, Linear4bit) for m in merged.modules())
            torch.testing.assert_close(merged(tokens).logits, wanted, rtol=1e-4, atol=1e-5)
        else:
            with pytest.warns(UserWarning, match="merged into, or taken out of, a 4-bit weight"):
                merged = model.merge_and_unload()
            assert any(isinstance(m, Linear4bit) for m in merged.modules())
            # once more rounded to 4 bits
            assert (merged(tokens).logits - wanted).norm() < 0.3 * wanted.norm()
        wanted = merged(tokens).logits
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    assert torch.equal(again, wanted)


def test_a_checkpoint_of_bitsandbytes_is_trained_like_any(dense, tmp_path):
    runs = [quantised(dense)]
    save_nf4(runs[0], tmp_path / "bnb")
    take_over_bitsandbytes()
    runs.append(AutoModelForCausalLM.from_pretrained(tmp_path / "bnb"))
    give_back_bitsandbytes()
    for model in runs:
        trainer_of(with_adapters(model, "ours"), tmp_path).train()
    same(trained(runs[0]), trained(runs[1]))
