"""Causal language models in training: the same loss and gradients, and no logits."""

import copy
import io
from functools import partial

import pytest
import torch
from helpers import DEVICE
from model_helpers import VOCAB, bert, gpt2, llama, plain, tokens
from torch import nn

from fastlora import causal_lm
from fastlora.causal_lm import NoLogits, why_not, without_logits
from fastlora.config import LoraConfig
from fastlora.model import add_lora, prepare_for_training, quantize_model
from fastlora.report import explain, explain_loss

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("fastlora.loss._CHUNK_BYTES", {"cpu": 20 * VOCAB, "cuda": 20 * VOCAB})


def labels():
    """Those of `model_helpers.tokens`, some of them ignored."""
    values = tokens().clone()
    values[0, :4] = -100
    return values


def small(name, **settings):
    """A tiny model by the name of its class, without dropout."""
    cls = getattr(transformers, name)
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return cls(cls.config_class(**sizes | settings)).to(DEVICE)


def quiet(model):
    """The model in training, without dropout, which every forward would draw anew."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def moe():
    return small("MixtralForCausalLM", num_local_experts=2, output_router_logits=True)


def tied():
    return llama(tied=True)


def qlora():
    model = quantize_model(llama())
    return add_lora(model, LoraConfig(r=4, init_lora_weights=False))


def lora_head():
    names = ["lm_head", "q_proj"]
    return add_lora(llama(), LoraConfig(r=4, init_lora_weights=False, target_modules=names))


def saved_head():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return add_lora(llama(), config)


def bf16():
    return llama().bfloat16()


MODELS = {f.__name__: f for f in (llama, tied, gpt2, moe, qlora, lora_head, saved_head, bf16)}


def step(model, **kwargs):
    """Loss and gradients of a step, and the output."""
    model.zero_grad()
    kwargs = {"input_ids": tokens(), "labels": labels()} | kwargs
    output = model(**kwargs)
    output.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.item(), grads, output


def assert_same_step(model, other, tolerance=1e-5, **kwargs):
    """The first model has chunks, the other has not."""
    got, grads, output = step(model, **kwargs)
    expected, expected_grads, full = step(other, **kwargs)
    assert output.logits is None
    assert full.logits is not None
    assert got == pytest.approx(expected, rel=tolerance)
    assert {*grads} == {*expected_grads}
    most = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() <= tolerance * most, name


def pair(make, **settings):
    """A prepared model with chunks, and one without."""
    model = quiet(make())
    other = prepare_for_training(copy.deepcopy(model), chunked_loss=False, **settings)
    return prepare_for_training(model, **settings), other


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients_without_logits(name, checkpointing):
    model, other = pair(MODELS[name], gradient_checkpointing=checkpointing)
    assert why_not(model) == ""
    tolerance = 2e-2 if name == "bf16" else 1e-5
    for more in ({}, {"num_items_in_batch": torch.tensor(29)}, {"shift_labels": labels()}):
        assert_same_step(model, other, tolerance, **more)


def test_without_labels_and_in_eval_mode_logits_are_untouched():
    model, other = pair(llama)
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)
    assert torch.equal(
        model.eval()(tokens(), labels=labels()).logits, other.eval()(tokens()).logits
    )
    with torch.no_grad():
        got = model.train()(tokens(), labels=labels())
    assert got.logits is None
    assert not got.loss.requires_grad


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_evaluation_without_logits(prepared, training):
    model = qlora().train(training)
    prepare_for_training(model, chunked_loss=prepared)
    names = {*vars(model)}
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(tokens(), labels=labels()).loss
        model.eval()
        with without_logits(model):
            with without_logits(model):
                inner = model(tokens(), labels=labels())
            output = model(tokens(), labels=labels())
            assert model(tokens()).logits is not None
        assert inner.logits is output.logits is None
        assert inner.loss == output.loss
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert model(tokens(), labels=labels()).logits is not None
        assert (model.train()(tokens(), labels=labels()).logits is None) == prepared
    assert {*vars(model)} == names
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == int(prepared)


def test_evaluation_without_logits_of_a_peft_model():
    peft = pytest.importorskip("peft")
    inner = prepare_for_training(llama())
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"])).eval()
    with without_logits(model), torch.no_grad():
        assert model(tokens(), labels=labels()).logits is None
    assert model(tokens(), labels=labels()).logits is not None
    assert len(inner._forward_hooks) == 1
    assert not model._forward_hooks


def test_labels_by_position_and_outputs_as_tuples():
    model, other = pair(llama)
    args = (tokens(), None, None, None, None, labels())
    (loss,) = model(*args, return_dict=False)
    assert loss.item() == pytest.approx(other(*args).loss.item(), rel=1e-5)


def test_prepared_twice_and_switched_off():
    model, other = pair(llama)
    prepare_for_training(model)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    assert_same_step(model, other)
    prepare_for_training(model, chunked_loss=False)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert explain_loss(model).endswith("because chunked_loss is off")
    assert torch.equal(step(model)[2].logits, step(other)[2].logits)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_prepared_and_can_be_switched_off_alone(copied):
    model, other = pair(qlora)
    step(model)  # nothing of a step is left in the model
    twin = copied(model)
    del model.lm_head
    assert_same_step(twin, other)
    prepare_for_training(twin, chunked_loss=False)
    assert step(twin)[2].logits is not None
    assert len(model._forward_hooks) == 1


def test_a_step_leaves_nothing_behind(tmp_path):
    model = prepare_for_training(quiet(tied()))
    before = {n: {*vars(m)} for n, m in model.named_modules()}
    step(model)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(labels=labels())
    assert {n: {*vars(m)} for n, m in model.named_modules()} == before
    assert model(tokens()).logits is not None
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)


def test_adapters_added_and_removed_after_preparing():
    from fastlora.model import merge_lora, unload_lora

    model, other = pair(llama)
    for m in (model, other):
        torch.manual_seed(0)
        add_lora(m, LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head", "q_proj"]))
    assert_same_step(model, other)
    for m in (model, other):
        unload_lora(m)
    assert_same_step(model, other)
    for m in (model, other):
        torch.manual_seed(0)
        add_lora(m, LoraConfig(r=4, init_lora_weights=False))
        merge_lora(m)
        m.requires_grad_(True)
    assert_same_step(model, other)


@pytest.mark.parametrize("first", ["prepare", "wrap"])
def test_peft_models(first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model, other = quiet(llama()), quiet(llama())
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        torch.manual_seed(0)
        wrapped = prepare_for_training(m, chunked_loss=m is model) if first == "prepare" else m
        wrapped = peft.get_peft_model(wrapped, config)
        if first == "wrap":
            prepare_for_training(wrapped, chunked_loss=m is model)
        if m is model:
            ours = wrapped
    assert explain_loss(ours) == "loss: in chunks"
    assert_same_step(ours, wrapped)
    prepare_for_training(ours, chunked_loss=False)
    assert step(ours)[2].logits is not None


def test_data_parallel_wrappers():
    """DDP itself needs processes; it calls the module as this wrapper does."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    model, other = pair(qlora)
    assert_same_step(Wrapper(model), Wrapper(other))
    if DEVICE == "cpu":
        assert_same_step(nn.DataParallel(model), nn.DataParallel(other))


# dynamo looks at the .grad of what goes over a break in the graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models():
    model, other = pair(partial(llama, layers=1))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert_same_step(compiled, torch.compile(other, backend="eager"))
        assert compiled(tokens()).logits is not None
        assert compiled.eval()(tokens(), labels=labels()).logits is not None
        compiled.train()


def test_accumulated_steps():
    model, other = pair(qlora)
    for m in (model, other):
        m.zero_grad()
        for part in (slice(0, 1), slice(1, 2)):
            batch = {"input_ids": tokens()[part], "labels": labels()[part]}
            m(**batch, num_items_in_batch=torch.tensor(12)).loss.backward()
    expected = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    data = [{"input_ids": t, "labels": t} for t in tokens().cpu().repeat(4, 1)]
    curves = []
    for model in pair(qlora):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=DEVICE == "cpu",
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        assert trainer.predict(data).predictions.shape == (8, 9, VOCAB)
        logs = trainer.state.log_history
        curves.append([log.get("loss", log.get("eval_loss")) for log in logs[:4]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert curves[0][0] != curves[0][2]


# --- where it cannot be ------------------------------------------------------------------------


def softcapped():
    return small("Gemma2ForCausalLM")


def scaled():
    return small("GraniteForCausalLM")


def own_loss():
    model = llama()
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
    return model


def hooked_head():
    model = llama()
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def t5():
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).to(DEVICE)


PLAIN = {
    softcapped: "its logits depend on final_logit_softcapping=30.0",
    scaled: "its logits depend on logits_scaling=1.0",
    own_loss: "it has a loss function of its own",
    hooked_head: "its output head has hooks",
    t5: "T5ForConditionalGeneration computes its loss itself",
}


@pytest.mark.parametrize("make", PLAIN, ids=lambda make: make.__name__)
def test_models_that_do_more_with_their_logits_are_left_alone(make, capsys):
    model, other = pair(make)
    assert why_not(model) == PLAIN[make]
    explain(model)
    assert PLAIN[make] in " ".join(capsys.readouterr().out.split())
    torch.manual_seed(0)
    got, grads, output = step(model)
    torch.manual_seed(0)
    expected, expected_grads, _ = step(other)
    assert output.logits is not None
    assert got == expected
    assert all(torch.equal(grad, expected_grads[name]) for name, grad in grads.items())
    with without_logits(model.eval()):
        assert model(tokens(), labels=labels()).logits is not None


def test_a_loss_function_that_is_the_plain_one_stays_after_a_step():
    """A model of another kind of loss, which was given that of causal language models."""
    model, other = pair(llama)
    plain_loss = model.loss_function
    for m in (model, other):
        m.loss_type = "ForTokenClassification"
        m.loss_function = plain_loss
    for _ in range(2):
        assert_same_step(model, other)
        assert vars(model)["_loss_function"] is plain_loss
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(labels=labels())
    assert model.loss_function is plain_loss


def test_a_loss_function_given_later_gets_logits_and_stays():
    model = prepare_for_training(llama().train())
    step(model)
    seen = []

    def mean(weight, logits, **_):
        seen.append(logits)
        return weight * logits.mean()

    model.loss_function = partial(mean, 2.0)
    step(model)
    step(model)
    assert len(seen) == 2
    assert seen[0].shape == (*tokens().shape, VOCAB)


def without_a_head():
    return llama().model


@pytest.mark.parametrize("make", [bert, plain, without_a_head])
def test_models_without_a_language_models_head_have_nothing_to_do(make):
    model = prepare_for_training(make())
    assert not model._forward_hooks
    assert "output head" in explain_loss(model) or "no causal language model" in explain_loss(model)


CHANGES = {
    "scaled": lambda z: 2 * z,
    "divided": lambda z: z / 30.0,
    "function of torch": torch.tanh,
    "method": lambda z: z.logsumexp(-1),
    "part": lambda z: z[..., :5],
    "written": lambda z: z.__setitem__(0, 1.0),
    "no use at all": lambda z: torch.zeros(*z.shape, requires_grad=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_unknown_model_that_changes_its_logits_raises(change):
    from transformers.modeling_outputs import CausalLMOutput

    class Changing(type(llama())):
        def forward(self, input_ids, labels=None):
            z = self.lm_head(self.model(input_ids).last_hidden_state)
            changed = CHANGES[change](z)
            return CausalLMOutput(
                loss=self.loss_function(changed, labels, VOCAB) if labels is not None else None,
                logits=z,
            )

    model = Changing(llama().config).to(DEVICE).train()
    assert prepare_for_training(model) is model
    assert why_not(model) == ""
    with pytest.raises(NotImplementedError, match="chunked_loss=False"):
        model(tokens(), labels=tokens())
    assert not isinstance(model(tokens()).logits, NoLogits)


def test_another_vocabulary_raises():
    model = prepare_for_training(llama().train())
    model.config.vocab_size = VOCAB - 1
    with pytest.raises(ValueError, match=f"vocab_size={VOCAB - 1} columns, got {VOCAB}"):
        model(tokens(), labels=tokens())


def test_stand_in_has_the_facts_of_logits():
    z = NoLogits(torch.zeros(2, 3, 8, dtype=torch.bfloat16), nn.Linear(8, 5))
    assert (z.shape, z.dtype, z.device.type) == ((2, 3, 5), torch.bfloat16, "cpu")
    assert z.float() is z.to("cpu") is z.contiguous() is z
    assert not hasattr(z, "__array__")


def test_only_the_names_of_forward_count():
    """What is behind decorators of transformers is what is looked at."""
    assert "loss_function" in causal_lm._names(llama())
    assert "loss_function" not in causal_lm._names(t5())
