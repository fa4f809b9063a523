"""FastLoraConfig: models quantised while transformers reads them, saved and read again."""

import json
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SIZES, bert, gpt2, llama
from torch import nn

import fastlora
from fastlora.model import quantize_model, state_of
from fastlora.nn import Linear4bit
from fastlora.report import explain_rows

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.quantizers.auto import (  # noqa: E402
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)

from fastlora.integrations.transformers import (  # noqa: E402
    FastLoraConfig,
    give_back_bitsandbytes,
    load_bnb_4bit,
    save_nf4,
    streaming,
    take_over_bitsandbytes,
)


def t5():
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=97, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def albert():
    """One block for all layers."""
    config = transformers.AlbertConfig(**SIZES, intermediate_size=128, embedding_size=64)
    return transformers.AlbertForSequenceClassification(config).eval()


def mixtral():
    sizes = {**SIZES, "intermediate_size": 64, "num_local_experts": 2, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(**sizes)
    return transformers.MixtralForCausalLM(config).eval()


CAUSAL, CLASSES = AutoModelForCausalLM, AutoModelForSequenceClassification
MODELS = {
    "llama": (llama, CAUSAL),
    "tied": (lambda: llama(tie_word_embeddings=True), CAUSAL),
    "odd": (lambda: llama(intermediate_size=33), CAUSAL),
    "gpt2": (gpt2, CAUSAL),
    "bert": (bert, CLASSES),
    "albert": (albert, CLASSES),
    "t5": (t5, AutoModelForSeq2SeqLM),
}


def layers_of(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, Linear4bit)}


def logits(model):
    tokens = torch.arange(9)[None]
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(tokens, **more).logits


def same(one, two):
    """Every byte is the same, and so is which layer is what."""
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key
    assert {n: type(m) for n, m in one.named_modules()} == {
        n: type(m) for n, m in two.named_modules()
    }
    assert state_of(one).dense.keys() == state_of(two).dense.keys()
    assert torch.equal(logits(one), logits(two))


def loaded(folder, auto=CAUSAL, dtype=torch.float32, config=None, **kwargs):
    config = FastLoraConfig() if config is None else config
    return auto.from_pretrained(folder, quantization_config=config, dtype=dtype, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_what_quantize_model_makes_of_it(tmp_path, kind, dtype):
    make, auto = MODELS[kind]
    make().save_pretrained(tmp_path)
    wanted = quantize_model(auto.from_pretrained(tmp_path, dtype=dtype))
    model = loaded(tmp_path, auto, dtype)
    assert not model.training
    assert layers_of(model)
    same(model, wanted)
    assert state_of(model).dense == state_of(wanted).dense
    assert {m.compute_dtype for m in layers_of(model).values()} <= {dtype, torch.float32}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_is_read_again_to_the_byte(tmp_path, kind):
    make, auto = MODELS[kind]
    make().save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense", auto, torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert written == {
        "quant_method": "fastlora",
        "blocksize": 64,
        "double_quant": True,
        "skip_modules": ["lm_head"],
    }
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    same(again, model)
    again.save_pretrained(tmp_path / "twice")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "twice")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_settings_are_those_of_the_config(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    settings = {"blocksize": 128, "double_quant": False, "skip_modules": ("mlp", "lm_head")}
    model = loaded(tmp_path / "dense", config=FastLoraConfig(**settings))
    same(model, quantize_model(CAUSAL.from_pretrained(tmp_path / "dense"), **settings))
    assert {(m.blocksize, m.nf4.nested) for m in layers_of(model).values()} == {(128, False)}
    reasons = {row.layer: row.reason for row in explain_rows(model)}
    assert reasons["model.layers.0.mlp.up_proj"] == "not quantised: named in skip_modules"
    assert reasons["lm_head"] == "not quantised: output embedding"
    model.save_pretrained(tmp_path / "ours")
    same(CAUSAL.from_pretrained(tmp_path / "ours"), model)


def test_shards_are_read_and_written(tmp_path):
    llama().save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len([*(tmp_path / "dense").glob("*.safetensors")]) > 3
    model = loaded(tmp_path / "dense", device_map={"": "cpu"}, low_cpu_mem_usage=True)
    same(model, quantize_model(CAUSAL.from_pretrained(tmp_path / "dense")))
    model.save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    assert len([*(tmp_path / "ours").glob("*.safetensors")]) > 2
    same(CAUSAL.from_pretrained(tmp_path / "ours"), model)


def test_one_dense_weight_is_held_at_a_time(tmp_path, monkeypatch):
    """Also where the dtype is another one, so that each weight is a copy."""
    llama(num_hidden_layers=4).save_pretrained(tmp_path, max_shard_size="60KB")
    alive, most = weakref.WeakSet(), []
    quantize = streaming.quantize_layer

    def watched(layer, *args):
        alive.add(layer.weight)
        most.append(len(alive))
        return quantize(layer, *args)

    monkeypatch.setattr(streaming, "quantize_layer", watched)
    model = loaded(tmp_path, dtype=torch.bfloat16)
    assert len(most) == len(layers_of(model)) == 28
    assert max(most) == 1


PEAK = """
import sys, threading, torch, transformers
from fastlora.integrations.transformers import FastLoraConfig

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.0005):
        seen.append(anonymous())

auto = transformers.AutoModelForCausalLM
arguments = {"dtype": torch.bfloat16, "quantization_config": FastLoraConfig()}
auto.from_pretrained(sys.argv[1] + "/small", **arguments)  # what is loaded once
seen, done, before = [], threading.Event(), anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = auto.from_pretrained(sys.argv[1] + "/large", **arguments)
done.set()
thread.join()
print(max(seen) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc for memory")
def test_the_peak_on_the_host_is_far_below_the_dense_model(tmp_path):
    llama().save_pretrained(tmp_path / "small")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    # a cast while reading leaves holes in the heap, by chance more or fewer
    dense = llama(**sizes).bfloat16()
    dense.save_pretrained(tmp_path / "large", max_shard_size="10MB")
    assert len([*(tmp_path / "large").glob("*.safetensors")]) == 8
    size = sum(p.numel() for p in dense.parameters()) * 2 / 1024  # KiB in bf16
    del dense
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # 4-bit weights are 0.26 of it; what is read and quantised at a time is a weight. Files that are
    # mapped are the system's to drop
    assert 0.2 * size < int(run.stdout) < 0.26 * size + 10 * 1024


@pytest.mark.parametrize("dtype", ["auto", None, torch.float16])
def test_dtypes_are_those_of_from_pretrained(tmp_path, dtype):
    llama().bfloat16().save_pretrained(tmp_path)
    model = loaded(tmp_path, dtype=dtype)
    dense = CAUSAL.from_pretrained(tmp_path, dtype=dtype)
    assert model.dtype == dense.dtype
    assert logits(model).dtype == dense.dtype
    same(model, quantize_model(dense))


def test_a_new_head_is_made_and_a_new_layer_is_quantised(tmp_path):
    """As quantize_model would: what the files lack is new, and reported."""
    llama().save_pretrained(tmp_path)
    model, info = loaded(
        tmp_path, CLASSES, num_labels=5, num_hidden_layers=3, output_loading_info=True
    )
    assert "score.weight" in info["missing_keys"]
    assert "model.layers.2.mlp.up_proj.weight" in info["missing_keys"]
    assert type(model.score) is nn.Linear
    assert len(layers_of(model)) == 21
    assert layers_of(model)["model.layers.2.mlp.up_proj"].dequantize().std() > 0
    assert logits(model).isfinite().all()


def test_weights_of_another_shape_are_made_anew_only_if_asked_for(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        loaded(tmp_path, intermediate_size=96)
    model, info = loaded(
        tmp_path, intermediate_size=96, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 6
    assert len(layers_of(model)) == 14
    assert logits(model).isfinite().all()


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    message = r"model.layers.1.mlp.up_proj: w must be finite, got 1 NaN or Inf"
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path)


def test_experts_stay_dense_and_that_is_said(tmp_path):
    mixtral().save_pretrained(tmp_path / "dense")
    with pytest.warns(UserWarning, match=r"4 weights of experts, \d\d% of the model, stay dense"):
        model = loaded(tmp_path / "dense")
    stacks = {n for n, p in model.named_parameters() if p.ndim == 3}
    assert len(stacks) == 4
    assert stacks < {*state_of(model).dense}
    assert {row.layer for row in explain_rows(model) if "stack of matrices" in row.reason} == stacks
    assert len(layers_of(model)) == 8
    model.save_pretrained(tmp_path / "ours")
    again = CAUSAL.from_pretrained(tmp_path / "ours")
    same(again, model)


def test_what_is_not_supported_is_refused(tmp_path):
    for bad, message in (
        ({"blocksize": 48}, r"blocksize must be one of .*, got 48"),
        ({"blocksize": 64.0}, r"blocksize must be one of .*, got 64\.0"),
        ({"blocksize": "64"}, r"blocksize must be one of .*, got '64'"),
        ({"double_quant": "no"}, r"double_quant must be True or False, got 'no'"),
        ({"skip_modules": None}, r"skip_modules must be names of modules, got None"),
        ({"skip_modules": (1,)}, r"skip_modules must be names of modules, got \(1,\)"),
        ({"quant_method": "awq"}, r"quant_method must be 'fastlora', got 'awq'"),
    ):
        with pytest.raises(ValueError, match=message):
            FastLoraConfig(**bad)
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"skip_modules must name modules .*, got \['nothing'\]"):
        loaded(tmp_path, config=FastLoraConfig(skip_modules=("nothing",)))
    with pytest.raises(ValueError, match="must have linear layers to quantise"):
        loaded(tmp_path, config=FastLoraConfig(skip_modules=("layers",)))
    with pytest.raises(NotImplementedError, match="device_map must keep 4-bit layers in memory"):
        loaded(tmp_path, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path)


def test_the_name_is_there_beside_those_of_the_core():
    assert fastlora.FastLoraConfig is FastLoraConfig
    assert "FastLoraConfig" in dir(fastlora)
    with pytest.raises(AttributeError, match="no attribute 'FastConfig'"):
        fastlora.FastConfig  # noqa: B018


def test_without_fastlora_nothing_is_read_as_something_else(tmp_path, monkeypatch):
    """transformers passes over a method it does not know, and then refuses the packed weights."""
    llama().save_pretrained(tmp_path / "dense")
    loaded(tmp_path / "dense").save_pretrained(tmp_path / "ours")
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "fastlora")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "fastlora")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CAUSAL.from_pretrained(tmp_path / "ours")


def test_a_merged_model_is_saved_dense(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense")
    fastlora.add_lora(model, fastlora.LoraConfig(r=4, init_lora_weights=False))
    fastlora.merge_lora(model)
    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert torch.equal(logits(CAUSAL.from_pretrained(tmp_path / "merged")), logits(model))


@pytest.mark.parametrize("kind", ["tied", "gpt2"])
def test_a_model_is_dequantised_also_after_a_forward(tmp_path, kind):
    make, auto = MODELS[kind]
    make().save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense", auto)
    wanted = logits(model)
    dense = model.dequantize()
    assert not layers_of(dense)
    torch.testing.assert_close(logits(dense), wanted, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    same(auto.from_pretrained(tmp_path / "again"), dense)


def test_a_checkpoint_with_adapters_is_not_read_as_a_model(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense")
    fastlora.add_lora(model, fastlora.LoraConfig(r=4))
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="must hold packed weights under the names"):
        CAUSAL.from_pretrained(tmp_path / "both")


def test_it_is_written_for_bitsandbytes_too(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense")
    save_nf4(model, tmp_path / "bnb")
    written = json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "bitsandbytes"
    same(load_bnb_4bit(tmp_path / "bnb", CAUSAL, torch.float32), model)
    model.save_pretrained(tmp_path / "ours")
    same(load_bnb_4bit(tmp_path / "ours", CAUSAL, torch.float32), model)


@pytest.fixture
def taken_over():
    take_over_bitsandbytes()
    yield
    give_back_bitsandbytes()


def test_taking_over_is_undone_whole():
    before = dict(AUTO_QUANTIZER_MAPPING)
    take_over_bitsandbytes()
    taken = dict(AUTO_QUANTIZER_MAPPING)
    take_over_bitsandbytes()
    assert taken == AUTO_QUANTIZER_MAPPING != before
    give_back_bitsandbytes()
    give_back_bitsandbytes()
    assert before == AUTO_QUANTIZER_MAPPING


@pytest.mark.usefixtures("taken_over")
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_checkpoints_of_bitsandbytes_become_our_layers(tmp_path, shard):
    wanted = quantize_model(llama())
    save_nf4(wanted, tmp_path / "bnb", max_shard_size=shard)
    model = CAUSAL.from_pretrained(tmp_path / "bnb")
    same(model, wanted)
    # what was read is what is written
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("bnb", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    same(CAUSAL.from_pretrained(tmp_path / "again"), wanted)
    # loading by name does not give them back
    load_bnb_4bit(tmp_path / "bnb", CAUSAL, torch.float32)
    same(CAUSAL.from_pretrained(tmp_path / "bnb"), wanted)


@pytest.mark.usefixtures("taken_over")
@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, r"FP4 \(bnb_4bit_quant_type\)"),
        ({"load_in_8bit": True}, r"int8 \(load_in_8bit\)"),
    ],
)
def test_other_formats_of_bitsandbytes_are_refused(tmp_path, settings, found):
    llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    mark = {"quantization_config": BitsAndBytesConfig(**settings).to_dict()}
    config = json.loads(file.read_text()) | json.loads(json.dumps(mark, default=str))
    file.write_text(json.dumps(config))
    message = rf"must be dense, bitsandbytes NF4 or fastlora's, got bitsandbytes {found}"
    with pytest.raises(NotImplementedError, match=message):
        CAUSAL.from_pretrained(tmp_path)


@pytest.mark.usefixtures("taken_over")
def test_a_dense_model_is_quantised_by_our_config_only(tmp_path):
    llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(NotImplementedError, match="must be loaded with FastLoraConfig"):
        loaded(tmp_path, config=config)


def test_a_base_model_is_loaded_alone(tmp_path):
    llama().save_pretrained(tmp_path)
    model = loaded(tmp_path, AutoModel)
    assert len(layers_of(model)) == 14
    assert layers_of(model).keys() == {
        n.removeprefix("model.") for n in layers_of(loaded(tmp_path))
    }


def test_parts_of_a_larger_tensor_are_quantised_and_not_saved_as_something_else(tmp_path):
    """A model whose files hold gate and up, and q, k and v, as one tensor each."""
    config = pytest.importorskip("transformers.models.hrm_text").HrmTextConfig
    sizes = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32}
    AutoModelForCausalLM.from_config(config(**sizes)).save_pretrained(tmp_path / "dense")
    assert any("gate_up_proj" in key for key in load_file(tmp_path / "dense/model.safetensors"))
    model = loaded(tmp_path / "dense")
    wanted = quantize_model(CAUSAL.from_pretrained(tmp_path / "dense"))
    a, b = model.state_dict(), wanted.state_dict()
    assert layers_of(model).keys() == layers_of(wanted).keys()
    assert all(torch.equal(a[key], b[key]) for key in b)
    with pytest.raises(NotImplementedError, match=r"a name of its own in the files, got .*_proj"):
        model.save_pretrained(tmp_path / "ours")


def test_memory_is_planned_for_what_becomes_4_bit(tmp_path):
    quantizer, model = streaming.FastLoraQuantizer(FastLoraConfig(), pre_quantized=False), llama()
    quantizer.preprocess_model(model)
    sizes = {n: quantizer.param_element_size(model, n, p) for n, p in model.named_parameters()}
    quantize_model(model)
    assert {n for n, size in sizes.items() if size == 0.5} == {
        f"{p}.weight" for p in layers_of(model)
    }
