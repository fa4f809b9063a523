"""Checkpoints of bitsandbytes: read into our layers byte for byte, and written for it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, bert, gpt2, llama
from torch import nn

import fastlora
from fastlora.config import LoraConfig
from fastlora.integrations.transformers import (
    NF4Quantizer,
    check_quantization,
    load_bnb_4bit,
    save_nf4,
)
from fastlora.model import add_lora, quantize_model
from fastlora.nn import Linear4bit
from fastlora.report import explain_rows

transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # noqa: E402

BNB = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
META = "weight.quant_state.bitsandbytes__nf4"
WHOLE = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def auto_of(model):
    return (
        AutoModelForSequenceClassification
        if "Bert" in type(model).__name__
        else (AutoModelForCausalLM)
    )


def bnb_of(folder, auto=AutoModelForCausalLM, **settings):
    """A model as transformers and bitsandbytes load it, quantising what is dense."""
    arguments = {"device_map": {"": "cpu"}}
    if settings:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} | settings
        arguments["quantization_config"] = BitsAndBytesConfig(**settings)
    return auto.from_pretrained(folder, **arguments)


def written_by_bnb(model, folder, shard="5GB", auto=None, double_quant=True, **settings):
    """A folder that bitsandbytes wrote; the model stays dense."""
    model.save_pretrained(folder / "dense")
    settings = {"bnb_4bit_use_double_quant": double_quant} | settings
    if "Bert" in type(model).__name__:  # bitsandbytes would take this head as well
        settings = {"llm_int8_skip_modules": ["classifier"]} | settings
    loaded = bnb_of(folder / "dense", auto or auto_of(model), **settings)
    loaded.save_pretrained(folder / "bnb", max_shard_size=shard)
    return folder / "bnb"


def tensors_of(folder):
    return {k: t for file in Path(folder).glob("*.safetensors") for k, t in load_file(file).items()}


def rewrite(folder, change):
    """Change the tensors of a folder with one file, in place."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def layers_of(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, Linear4bit)}


def load(folder, auto=AutoModelForCausalLM, dtype=torch.float32, **kwargs):
    model, info = load_bnb_4bit(folder, auto, dtype, output_loading_info=True, **kwargs)
    return model, {name: set(info[name]) for name in WHOLE}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(9)[None]).logits


def assert_same_bytes(model, tensors):
    """All that a file says of its 4-bit weights is in the layers, and nothing else is 4-bit."""
    layers = layers_of(model)
    assert layers
    assert {f"{path}.{META}" for path in layers} == {k for k in tensors if k.endswith(META)}
    for path, layer in layers.items():
        for key, tensor in layer.nf4.state_dict(f"{path}.weight").items():
            assert tensor.dtype == tensors[key].dtype
            assert torch.equal(tensor, tensors[key]), key


def same_state(one, two):
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_bytes_and_logits_are_those_of_the_file(tmp_path, kind, double_quant):
    dense = MODELS[kind]()
    folder = written_by_bnb(dense, tmp_path, double_quant=double_quant)
    model, info = load(folder, auto_of(dense))
    assert info == WHOLE
    assert not model.training
    assert_same_bytes(model, tensors_of(folder))
    quantize_model(dense, double_quant=double_quant)
    assert layers_of(model).keys() == layers_of(dense).keys()
    assert torch.equal(logits(model), logits(dense))
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is BNB


def test_shards_are_read(tmp_path):
    folder = written_by_bnb(llama(), tmp_path, shard="20KB")
    assert len([*folder.glob("*.safetensors")]) > 2
    model, info = load(folder)
    assert info == WHOLE
    assert_same_bytes(model, tensors_of(folder))


def test_the_parts_of_a_weight_may_be_in_different_files(tmp_path):
    folder = written_by_bnb(llama(), tmp_path)
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    files = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for name in {*files.values()}:
        part = {key: tensors[key] for key in files if files[key] == name}
        save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, info = load(folder)
    assert info == WHOLE
    assert_same_bytes(model, tensors)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_bytes_kept_in_another_dtype_are_read(tmp_path, storage):
    folder = written_by_bnb(llama(), tmp_path, bnb_4bit_quant_storage=storage)
    tensors = tensors_of(folder)
    packed = [k for k in tensors if f"{k}.quant_map" in tensors]
    for key in packed:
        assert tensors[key].dtype == getattr(torch, storage)
        tensors[key] = tensors[key].view(torch.uint8).view(-1, 1)
    assert packed
    assert_same_bytes(load(folder)[0], tensors)


def test_bitsandbytes_is_not_needed(tmp_path, monkeypatch):
    folder = written_by_bnb(llama(), tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        bnb_of(folder)
    model, _ = load(folder)
    save_nf4(model, tmp_path / "again")
    assert_same_bytes(load(tmp_path / "again")[0], tensors_of(folder))


def test_nothing_is_decoded_or_quantised(tmp_path, monkeypatch):
    folder = written_by_bnb(llama(), tmp_path)

    def refuse(device):
        raise AssertionError("the bytes must be taken as they are")

    monkeypatch.setattr("fastlora.backend.implementation", refuse)
    model, _ = load(folder)
    save_nf4(model, tmp_path / "again")
    assert_same_bytes(load(tmp_path / "again")[0], tensors_of(folder))


def test_tied_embeddings_stay_tied_and_dense(tmp_path):
    folder = written_by_bnb(llama(tie_word_embeddings=True), tmp_path)
    model, info = load(folder)
    assert "lm_head.weight" not in tensors_of(folder)
    assert info == WHOLE
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save_nf4(model, tmp_path / "again")
    assert {*tensors_of(tmp_path / "again")} == {*tensors_of(folder)}
    model, info = load(tmp_path / "again")
    assert info == WHOLE
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_the_file_holds_dense_stays_dense(tmp_path):
    dense = llama()
    folder = written_by_bnb(dense, tmp_path, llm_int8_skip_modules=["lm_head", "q_proj"])
    model, info = load(folder)
    assert info == WHOLE
    assert len(layers_of(model)) == 12
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        assert type(new.self_attn.q_proj) is nn.Linear
        assert torch.equal(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight)
        assert torch.equal(new.self_attn.k_proj.bias, old.self_attn.k_proj.bias)
    reasons = {row.layer: row.reason for row in explain_rows(model)}
    assert reasons["model.layers.0.self_attn.q_proj"] == "not quantised: dense in the checkpoint"


def test_everything_else_is_cast_and_the_layers_compute_in_its_dtype(tmp_path):
    folder = written_by_bnb(llama().bfloat16(), tmp_path)
    model, _ = load(folder, dtype=torch.float32)
    floats = [p for n, p in model.named_parameters() if p.dtype != torch.uint8]
    assert {p.dtype for p in floats} == {torch.float32}
    assert {m.compute_dtype for m in layers_of(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.float32
    auto, _ = load(folder, dtype="auto")
    assert_same_bytes(auto, tensors_of(folder))
    assert auto.dtype == logits(auto).dtype == torch.bfloat16


def test_keys_of_the_base_model_get_their_prefix(tmp_path):
    folder = written_by_bnb(llama().model, tmp_path, auto=AutoModel)
    model, info = load(folder)
    assert info == WHOLE | {"missing_keys": {"lm_head.weight"}}
    assert_same_bytes(model.model, tensors_of(folder))


def test_a_new_head_is_dense_initialised_and_reported(tmp_path):
    folder = written_by_bnb(llama(), tmp_path)
    auto = AutoModelForSequenceClassification
    model, info = load(folder, auto, num_labels=5, pad_token_id=0)
    assert info == WHOLE | {
        "missing_keys": {"score.weight"},
        "unexpected_keys": {"lm_head.weight"},
    }
    assert type(model.score) is nn.Linear
    assert logits(model).shape == (1, 5)
    assert logits(model).isfinite().all()


class FromElsewhere(transformers.LlamaForCausalLM):
    """Not a class of transformers itself."""


def test_models_from_elsewhere_initialise_no_4_bit_layer(tmp_path, monkeypatch):
    """They may do it past the functions that transformers guards."""

    def init(self, module):
        for parameter in module.parameters(recurse=False):
            parameter.data.normal_()

    folder = written_by_bnb(llama(), tmp_path)
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", init)
    model, info = load(folder, FromElsewhere)
    assert info == WHOLE
    assert_same_bytes(model, tensors_of(folder))


def test_a_missing_weight_is_reported(tmp_path):
    folder = written_by_bnb(bert(), tmp_path)
    path = "bert.encoder.layer.1.output.dense"

    def drop(tensors):
        for key in [k for k in tensors if k.startswith(path)]:
            del tensors[key]

    rewrite(folder, drop)
    _, info = load(folder, AutoModelForSequenceClassification)
    assert info == WHOLE | {"missing_keys": {f"{path}.weight", f"{path}.bias"}}


PATH = "model.layers.1.mlp.up_proj"


def drop_bytes(tensors):
    del tensors[f"{PATH}.weight"]


def drop_statistics(tensors):
    del tensors[f"{PATH}.weight.absmax"]


def drop_all_statistics(tensors):
    for key in [k for k in tensors if k.startswith(f"{PATH}.weight.")]:
        del tensors[key]


def cut_bytes(tensors):
    tensors[f"{PATH}.weight"] = tensors[f"{PATH}.weight"][:-1].clone()


def another_shape(tensors):
    tensors |= fastlora.quantize_nf4(torch.randn(64, 128)).state_dict(f"{PATH}.weight")


def an_embedding(tensors):
    q = fastlora.quantize_nf4(tensors["model.embed_tokens.weight"])
    tensors |= q.state_dict("model.embed_tokens.weight")


def fp4(tensors):
    tensors[f"{PATH}.weight.quant_state.bitsandbytes__fp4"] = tensors.pop(f"{PATH}.{META}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (drop_bytes, KeyError, rf"must have {PATH}.weight, got none"),
        (drop_statistics, KeyError, rf"must have {PATH}.weight.absmax, got none"),
        (drop_all_statistics, KeyError, rf"must have {PATH}.{META}, got none"),
        (cut_bytes, ValueError, rf"{PATH}.weight: qweight must hold 4096 bytes"),
        (another_shape, RuntimeError, r"ignore_mismatched_sizes"),
        (an_embedding, ValueError, r"embed_tokens.weight must be dense in Embedding, got 4 bits"),
        (fp4, ValueError, rf"{PATH}.weight must be NF4, got FP4"),
    ],
)
def test_a_damaged_weight_is_named(tmp_path, change, error, message):
    folder = written_by_bnb(llama(), tmp_path)
    rewrite(folder, change)
    with pytest.raises(error, match=message):
        load(folder, ignore_mismatched_sizes=change is not another_shape)
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is BNB


def test_a_tied_weight_must_be_dense(tmp_path):
    folder = written_by_bnb(llama(tie_word_embeddings=True), tmp_path)
    q = fastlora.quantize_nf4(torch.randn(97, 64))
    rewrite(folder, lambda tensors: tensors.update(q.state_dict("lm_head.weight")))
    with pytest.raises(ValueError, match=r"lm_head.weight must be dense as it is tied"):
        load(folder)


def test_merged_experts_must_not_be_4_bit(tmp_path):
    config = transformers.MixtralConfig(**SIZES, intermediate_size=64, num_local_experts=2)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)

    def quantise(tensors):
        for key in [k for k in tensors if ".experts." in k]:
            tensors |= fastlora.quantize_nf4(tensors[key]).state_dict(key)

    rewrite(tmp_path, quantise)
    mark(tmp_path, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    with pytest.raises(
        NotImplementedError, match=r"must be a linear layer of its own, got \['.*w1"
    ):
        load(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("kind", [nn.Linear, Linear4bit])
def test_a_head_for_other_classes_is_made_anew_only_if_asked_for(tmp_path, kind):
    skip = ["classifier" if kind is nn.Linear else "nothing"]
    folder = written_by_bnb(bert(), tmp_path, llm_int8_skip_modules=skip)
    auto = AutoModelForSequenceClassification
    assert type(load(folder, auto)[0].classifier) is kind
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder, auto, num_labels=5)
    model, info = load(folder, auto, num_labels=5, ignore_mismatched_sizes=True)
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert not info["missing_keys"]
    assert type(model.classifier) is nn.Linear
    assert logits(model).shape == (1, 5)
    assert logits(model).isfinite().all()


def test_trainer_takes_the_model_and_adapters_train(tmp_path):
    model, _ = load(written_by_bnb(llama(), tmp_path))
    for mark_ in ("is_quantized", "quantization_method", "is_loaded_in_4bit"):
        assert not hasattr(model, mark_)
    transformers.trainer_utils.validate_quantization_for_training(model)
    add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers_of(model))
    optimizer, losses = torch.optim.SGD(trained, lr=1.0), []
    tokens = torch.arange(12)[None]
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def mark(folder, quantization_config):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": quantization_config}
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", MODELS)
def test_a_loaded_model_merges_into_a_dense_one(tmp_path, kind):
    dense = MODELS[kind]()
    model, _ = load(written_by_bnb(dense, tmp_path), auto_of(dense))
    add_lora(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fastlora.merge_lora(model)
    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    again = auto_of(dense).from_pretrained(tmp_path / "merged")
    same_state(again, model)
    assert torch.equal(logits(again), logits(model))


UNSUPPORTED = [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes int8 \(load_in_8bit"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, r"bitsandbytes FP4"),
    # bitsandbytes' default
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes FP4"),
    ({"quant_method": "bitsandbytes"}, r"quant_method 'bitsandbytes' without load_in_4bit"),
    ({"quant_method": "gptq", "bits": 4}, r"quant_method 'gptq'$"),
    ({"quant_method": "fp8"}, r"quant_method 'fp8'$"),
    ({}, r"quant_method None$"),
]


@pytest.mark.parametrize(("config", "found"), UNSUPPORTED)
def test_other_formats_are_refused_by_name(tmp_path, config, found):
    message = rf"^the weights of a model must be dense, bitsandbytes NF4 or fastlora's, got {found}"
    with pytest.raises(NotImplementedError, match=message):
        check_quantization(config)
    (tmp_path / "config.json").write_text("{}")
    mark(tmp_path, config)
    with pytest.raises(NotImplementedError, match=message):
        load(tmp_path)


def test_nf4_is_supported_also_in_the_text_part_of_a_config(tmp_path):
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    check_quantization(config)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}}))
    with pytest.raises(ValueError, match=r"must have quantization_config, got none in "):
        load(tmp_path)
    config["load_in_8bit"] = True
    inner = {"text_config": {"quantization_config": config}}
    (tmp_path / "config.json").write_text(json.dumps(inner))
    with pytest.raises(NotImplementedError, match="int8"):
        load(tmp_path)


def test_old_transformers_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr("transformers.quantizers.HfQuantizer.get_new_dtype")
    with pytest.raises(RuntimeError, match=r"transformers must be 5.21 or newer"):
        load(tmp_path)


def test_a_dense_model_is_not_quantised_while_it_loads():
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(NotImplementedError, match="must be loaded with FastLoraConfig"):
        NF4Quantizer(config, pre_quantized=False)


def test_memory_is_planned_for_4_bits():
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantizer, model = NF4Quantizer(config), llama()
    quantizer.preprocess_model(model)
    sizes = {n: quantizer.param_element_size(model, n, p) for n, p in model.named_parameters()}
    quantize_model(model)
    four = {f"{path}.weight" for path in layers_of(model)}
    assert {n for n, size in sizes.items() if size == 0.5} == four
    assert {size for n, size in sizes.items() if n not in four} == {4}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_is_what_bitsandbytes_would_write(tmp_path, kind, double_quant):
    dense = MODELS[kind]()
    theirs = written_by_bnb(dense, tmp_path, double_quant=double_quant)
    quantize_model(dense, double_quant=double_quant)
    assert save_nf4(dense, tmp_path / "ours") == tmp_path / "ours"
    assert {f.name for f in theirs.iterdir()} == {f.name for f in (tmp_path / "ours").iterdir()}
    a, b = tensors_of(theirs), tensors_of(tmp_path / "ours")
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
    model, info = load(tmp_path / "ours", auto_of(dense))
    assert info == WHOLE
    same_state(model, dense)
    assert torch.equal(logits(model), logits(dense))


@pytest.mark.parametrize("kind", MODELS)
def test_bitsandbytes_reads_what_is_saved(tmp_path, kind):
    model = quantize_model(MODELS[kind]())
    save_nf4(model, tmp_path / "ours")
    theirs = bnb_of(tmp_path / "ours", auto_of(model))
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert layers.keys() == layers_of(model).keys()
    for path, layer in layers.items():
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(weight, model.get_submodule(path).dequantize()), path
    rest = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(parameter, rest[name]), name
    # the model is left as it was
    assert not hasattr(model.config, "quantization_config")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    check_quantization(written)
    assert written["bnb_4bit_use_double_quant"]
    assert written["bnb_4bit_compute_dtype"] == "float32"


def test_layers_may_differ_in_blocks_and_statistics(tmp_path):
    model = llama().bfloat16()
    blocks = [(32, True), (64, False), (128, True), (4096, False)]
    for i, path in enumerate([n for n, m in model.named_modules() if "proj" in n]):
        layer = Linear4bit.from_linear(model.get_submodule(path), *blocks[i % 4])
        model.set_submodule(path, layer)
    save_nf4(model, tmp_path / "ours")
    again, info = load(tmp_path / "ours", dtype=torch.bfloat16)
    assert info == WHOLE
    same_state(again, model)
    for path, layer in layers_of(again).items():
        assert layer.blocksize == model.get_submodule(path).blocksize
    layers = {
        n: m
        for n, m in bnb_of(tmp_path / "ours").named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }
    assert len(layers) == 14
    for path, layer in layers.items():
        ours, state = model.get_submodule(path).nf4, layer.weight.quant_state
        assert (state.blocksize, state.nested) == (ours.blocksize, ours.nested)
        assert torch.equal(layer.weight.data, ours.qweight.view(-1, 1))


def test_rows_of_odd_length_come_back(tmp_path):
    model = quantize_model(llama(intermediate_size=33))
    assert model.model.layers[0].mlp.down_proj.qweight.shape == (64 * 33 // 2, 1)
    save_nf4(model, tmp_path / "ours")
    again, info = load(tmp_path / "ours")
    assert info == WHOLE
    same_state(again, model)
    assert torch.equal(logits(again), logits(model))


def test_large_models_are_saved_in_shards(tmp_path):
    model = quantize_model(llama())
    save_nf4(model, tmp_path / "ours", max_shard_size="40KB")
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {
        f.name for f in (tmp_path / "ours").glob("*.safetensors")
    }
    assert {*index["weight_map"]} == {*tensors_of(tmp_path / "ours")}
    same_state(load(tmp_path / "ours")[0], model)
    assert len(bnb_of(tmp_path / "ours").state_dict()) == len(index["weight_map"])


@pytest.mark.parametrize("loaded", ["dense", "bnb"])
def test_an_adopted_model_is_saved(tmp_path, loaded):
    folder = written_by_bnb(llama(), tmp_path)
    settings = {"bnb_4bit_use_double_quant": True} if loaded == "dense" else {}
    model = quantize_model(bnb_of(tmp_path / loaded, **settings))
    quantizer = model.hf_quantizer
    save_nf4(model, tmp_path / "ours")
    assert model.hf_quantizer is quantizer
    a, b = tensors_of(folder), tensors_of(tmp_path / "ours")
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_names_that_end_alike_are_told_apart(tmp_path):
    """A dense `classifier` beside a 4-bit `sub_classifier`: a plain name would stand for both."""
    model = bert()
    model.bert.sub_classifier = nn.Linear(64, 64)
    quantize_model(model)
    save_nf4(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["^classifier$"]
    skipped = bnb_of(tmp_path / "ours", AutoModelForSequenceClassification).classifier
    assert type(skipped) is nn.Linear


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_blocks_keep_their_names(tmp_path):
    model = quantize_model(llama())
    before = model.state_dict()
    model.model.layers[0] = torch.compile(model.model.layers[0])
    save_nf4(model, tmp_path / "ours")
    again = load(tmp_path / "ours")[0].state_dict()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_a_merged_model_is_saved(tmp_path):
    model = quantize_model(llama())
    add_lora(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with pytest.raises(ValueError, match=r"must have no adapters, got some on model.layers.0"):
        save_nf4(model, tmp_path / "ours")
    fastlora.merge_lora(model, quantize=True)
    save_nf4(model, tmp_path / "ours")
    same_state(load(tmp_path / "ours")[0], model)


def test_what_cannot_be_saved_is_refused(tmp_path):
    target = tmp_path / "ours"
    with pytest.raises(ValueError, match="must be one of transformers, got Sequential"):
        save_nf4(nn.Sequential(Linear4bit(64, 64)), target)
    with pytest.raises(ValueError, match="must have 4-bit layers, got none in LlamaFor"):
        save_nf4(llama(), target)
    model = quantize_model(llama())
    with pytest.raises(ValueError, match=r"embed_tokens.weight must have values, got .* meta"):
        save_nf4(model.to("meta"), target)
    config = transformers.T5Config(
        d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, vocab_size=97
    )
    t5 = quantize_model(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(NotImplementedError, match=r"\['wo'\].*got 4 bits in encoder.block.0.*wo"):
        save_nf4(t5, target)
    assert not [*tmp_path.iterdir()]


def test_layers_kept_in_fp32_are_saved_dense(tmp_path):
    config = transformers.T5Config(
        d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, vocab_size=97
    )
    t5 = quantize_model(transformers.T5ForConditionalGeneration(config), skip_modules=("wo",))
    save_nf4(t5, tmp_path / "ours")
    model, info = load(tmp_path / "ours", AutoModelForSeq2SeqLM)
    assert info == WHOLE
    same_state(model, t5)
    bnb_of(tmp_path / "ours", AutoModelForSeq2SeqLM)


def test_a_table_that_layers_share_is_written_for_each(tmp_path):
    model = quantize_model(llama())
    first, *others = layers_of(model).values()
    for layer in others:
        layer.code2 = first.code2
    save_nf4(model, tmp_path / "ours")
    same_state(load(tmp_path / "ours")[0], model)


def test_shared_layers_are_refused(tmp_path):
    """transformers leaves out a name only where the model says which."""
    model = quantize_model(llama())
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(RuntimeError, match="shared tensors"):
        save_nf4(model, tmp_path / "ours")
    assert not [*tmp_path.iterdir()]


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "ours").mkdir()
    with pytest.raises(FileExistsError, match="must be new"):
        save_nf4(quantize_model(llama()), tmp_path / "ours")


@pytest.mark.parametrize("at", ["first", "last"])
def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch, at):
    model = quantize_model(llama())

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    names = {"first": "transformers.modeling_utils.safe_save_file", "last": "os.fsync"}
    monkeypatch.setattr(names[at], full)
    with pytest.raises(OSError, match="no space"):
        save_nf4(model, tmp_path / "ours")
    assert not [*tmp_path.iterdir()]
    monkeypatch.undo()
    save_nf4(model, tmp_path / "ours")
    same_state(load(tmp_path / "ours")[0], model)
