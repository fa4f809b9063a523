"""TRL's trainers on models that FastLoraConfig quantised; `make test-stacks` installs TRL."""

import pytest
import torch

import fastlora
from fastlora.nn import Linear4bit

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from fastlora.integrations.transformers import FastLoraConfig  # noqa: E402

pytestmark = [
    # Trainer's default, of which torch warns where there is no GPU
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
    # TRL calls transformers by its old names
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*able` is dep:FutureWarning"),
]
COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "max_length": 32,
}


@pytest.fixture
def folder(tmp_path):
    """A model and its tokenizer, as the trainers take them by name."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: n for n, word in enumerate(["<pad>", "<eos>", "<unk>", *map(str, range(90))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(
        tmp_path / "model"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(words),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(params=[False, True], ids=["peft", "enabled"])
def enabled(request):
    if request.param:
        fastlora.enable()
    yield request.param
    if request.param:
        fastlora.disable()


def lora():
    return peft.LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear")


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def check(trainer, losses):
    assert len([m for m in trainer.model.modules() if isinstance(m, Linear4bit)]) == 14
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trained(trainer.model).values()} == {torch.float32}
    assert all(p.abs().sum() > 0 for p in trained(trainer.model).values())


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_sft_trains_evaluates_and_goes_on(folder, tmp_path, reentrant):
    text = [{"text": " ".join(str((7 * n + k) % 90) for k in range(12))} for n in range(8)]
    data = datasets.Dataset.from_list(text)
    settings = {"activation_checkpointing": reentrant is not None}
    if reentrant is not None:
        settings["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}

    def make(output):
        args = SFTConfig(
            str(output),
            max_steps=6,
            eval_strategy="steps",
            eval_steps=2,
            **COMMON | settings | {"save_strategy": "steps", "save_steps": 3},
        )
        torch.manual_seed(3)
        return SFTTrainer(
            folder,
            args,
            train_dataset=data,
            eval_dataset=data,
            peft_config=lora(),
            quantization_config=FastLoraConfig(),
        )

    trainer = make(tmp_path / "run")
    trainer.train()
    check(trainer, losses_of(trainer))
    again = make(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name, parameter in trained(trainer.model).items():
        assert torch.equal(parameter, trained(again.model)[name]), name


def preferences():
    return datasets.Dataset.from_list(
        [
            {"prompt": f"{n} 5 9", "chosen": f" {20 + n} 30", "rejected": f" {40 + n} 50"}
            for n in range(8)
        ]
    )


@pytest.mark.usefixtures("enabled")
def test_dpo_has_the_model_without_adapters_as_its_reference(folder, tmp_path):
    args = DPOConfig(str(tmp_path / "run"), max_steps=6, activation_checkpointing=True, **COMMON)
    trainer = DPOTrainer(
        folder,
        args=args,
        train_dataset=preferences(),
        peft_config=lora(),
        quantization_config=FastLoraConfig(),
    )
    assert trainer.ref_model is None
    trainer.train()
    losses = losses_of(trainer)
    # equal at first, as new adapters change nothing, and ever after if they were not switched off
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    check(trainer, losses)


def test_dpo_with_adapters_of_add_lora_needs_no_second_model(folder, tmp_path):
    """TRL takes them for weights: it asks the model itself, before it is trained."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FastLoraConfig()
    )
    fastlora.prepare_for_training(fastlora.add_lora(model, fastlora.LoraConfig(r=4)))
    args = DPOConfig(
        str(tmp_path / "run"),
        max_steps=6,
        activation_checkpointing=True,
        precompute_ref_log_probs=True,
        **COMMON,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trainer = DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer)
    assert trainer.ref_model is None
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    check(trainer, losses)
