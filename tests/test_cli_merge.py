"""`fastlora merge` on tiny models: what is written, how it is measured, what is said."""

import json
import math
import re
import shlex

import pytest
import torch
from cli_helpers import invoke, one_line, run, save_tiny_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

import fastlora
from fastlora.cli import drift, merging, runs
from fastlora.cli.settings import TrainSettings
from fastlora.integrations.transformers import save_nf4

OPTIONS = ("--lr", "1e-2", "--batch-size", "4", "--rank", "8", "--warmup", "0", "--steps", "10")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def model(folder):
    torch.manual_seed(0)
    target = save_tiny_model(folder / "tiny", tie_word_embeddings=True)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(target)
    return target


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(folder):
    return write(folder / "x.jsonl", [{"text": "one two three"}, {"text": "four five"}])


def trained(model, data, output, *words):
    result = invoke("train", model, data, "-o", output, *OPTIONS, "--dtype", "fp32", *words)
    assert result.exit_code == 0, result.stdout + result.stderr
    return output


@pytest.fixture(scope="module")
def adapter(model, data, folder):
    """Trained on NF4 in fp32."""
    return trained(model, data, folder / "run")


def merged(*words):
    result = invoke("merge", *words)
    assert result.exit_code == 0, result.stdout + result.stderr
    assert result.stderr == ""
    return result


def unmerged(adapter, labels=(), **given):
    settings = runs.settings_of(None, adapter, **given)
    return runs.load(settings, adapter, labels).model


# into the weights that the adapter was trained over
AS_TRAINED = ("--quantize", "nf4")


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def dtypes(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118


# --- what is written -------------------------------------------------------------------------


def test_fp32_gives_the_unmerged_logits_in_plain_transformers(adapter, model, tmp_path):
    output = tmp_path / "out"
    result = merged("--adapter", adapter, "-o", output, "--format", "fp32", *AS_TRAINED)
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = logits(unmerged(adapter))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert (logits(AutoModelForCausalLM.from_pretrained(model)) - expected).abs().max() > 1
    assert "everywhere; both computed in float32." in " ".join(result.stdout.split())
    tokenizer, ours = (AutoTokenizer.from_pretrained(f) for f in (model, output))
    assert ours("one two").input_ids == tokenizer("one two").input_ids
    assert ours.chat_template == tokenizer.chat_template
    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert "local" not in (output / "tokenizer_config.json").read_text()
    assert (output / "generation_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("words", "dtype"), [((), "bf16"), (("--format", "fp16"), "fp16")])
def test_sixteen_bits_are_the_fp32_sum_rounded_once(words, dtype, adapter, tmp_path):
    merged("--adapter", adapter, "-o", tmp_path / "out", *AS_TRAINED, *words)
    assert dtypes(tmp_path / "out") == {dtype.upper().replace("FP", "F")}
    model = unmerged(adapter)
    fastlora.merge_lora(model)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in model.state_dict().items():
        assert torch.equal(got.state_dict()[name], weight.to(kind)), name


ORIGINALS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", ORIGINALS)
def test_by_default_originals_are_summed_in_fp32_and_rounded_once(
    stored, dtype, adapter, model, tmp_path
):
    """Whatever dtype training computed in, and also what no adapter is on."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=ORIGINALS[stored])
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "base")
    exact = fastlora.merge_lora(fastlora.load_adapter(base.float(), adapter)).state_dict()
    found = {}
    for format in (None, *ORIGINALS):
        output = tmp_path / f"out-{format}"
        words = ("--adapter", adapter, "-o", output, "--dtype", dtype, "--no-report")
        merged(tmp_path / "base", *words, *(["--format", format] if format else []))
        (kind,) = dtypes(output)
        found[format] = kind.replace("BF", "bf").replace("F", "fp")
        got = AutoModelForCausalLM.from_pretrained(output).state_dict()
        for name, weight in exact.items():
            assert torch.equal(got[name], weight.to(ORIGINALS[found[format]])), (format, name)
    assert found == {**{k: k for k in ORIGINALS}, None: "bf16" if stored == "fp32" else stored}


def test_heads_that_were_trained_whole_are_rounded_once(model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "base")
    cfg = fastlora.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    fastlora.add_lora(base.float(), cfg)
    with torch.no_grad():
        base.model.norm.modules_to_save["default"].weight.fill_(1 + 2**-20)
    fastlora.save_adapter(base, tmp_path / "adapter")
    words = (tmp_path / "base", "--adapter", tmp_path / "adapter", "--no-report", "-o")
    merged(*words, tmp_path / "out", "--format", "fp32")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (got.model.norm.weight == 1 + 2**-20).all()


def test_what_an_adapter_was_trained_over_is_named_where_it_is_merged_into_more(adapter, tmp_path):
    said = " ".join(merged("--adapter", adapter, "-o", tmp_path / "own").stdout.split())
    assert "weights, dense in float32" in said
    assert "merged into the weights themselves" in said
    # the drift is measured from the model that was trained
    assert float(said.split("largest difference of logits ")[1].split()[0]) > 0.1
    words = ("--adapter", adapter, "-o", tmp_path / "kept", "--format", "fp32", *AS_TRAINED)
    said = " ".join(merged(*words).stdout.split())
    assert "weights, NF4 in float32" in said
    assert "merged into the weights" not in said


def test_a_run_in_bf16_is_not_rounded_on_the_way_to_another_format(adapter, tmp_path):
    """The weights are decoded and summed in fp32; those that are dense were bf16 in training."""
    words = ("--dtype", "bf16", *AS_TRAINED, "--format")
    merged("--adapter", adapter, "-o", tmp_path / "fp32", *words, "fp32")
    merged("--adapter", adapter, "-o", tmp_path / "bf16", *words, "bf16")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32").state_dict()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    exact = unmerged(adapter, dtype="bf16").get_submodule(name.removesuffix(".weight"))
    assert torch.equal(whole[name], exact.merged_weight("default"))
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in whole.items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_nf4_loads_in_bitsandbytes_and_here(quantize, adapter, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    output = tmp_path / "out"
    words = ("--format", "nf4", "--quantize", quantize)
    result = merged("--adapter", adapter, "-o", output, *words)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
    assert (output / "tokenizer.json").exists()
    assert not (output / "model").exists()
    assert "merge to 16 bits: llama.cpp does not read NF4" in " ".join(result.stdout.split())
    assert "convert_hf_to_gguf" not in result.stdout
    ours = runs.load(TrainSettings(model=str(output), dtype="bf16"), None).model
    theirs = AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16)
    layer = "model.layers.1.self_attn.q_proj"
    assert isinstance(theirs.get_submodule(layer), bnb.nn.Linear4bit)
    assert isinstance(ours.get_submodule(layer), fastlora.nn.Linear4bit)
    stored = theirs.get_submodule(layer).weight
    assert torch.equal(ours.get_submodule(layer).qweight.reshape(-1), stored.data.reshape(-1))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.05, atol=0.5)
    # each merged weight is quantised from its fp32 sum
    base = unmerged(adapter, quantize=quantize)
    exact = base.get_submodule(layer).merged_weight("default")
    expected = fastlora.quantize_nf4(exact).qweight
    assert torch.equal(ours.get_submodule(layer).nf4.qweight, expected)


def test_checkpoints_in_nf4_merge_to_dense_ones(model, data, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model)
    save_nf4(fastlora.quantize_model(base), tmp_path / "nf4")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "nf4")
    adapter = trained(tmp_path / "nf4", data, tmp_path / "run")
    merged("--adapter", adapter, "-o", tmp_path / "out", "--format", "fp32")
    text = (tmp_path / "out" / "config.json").read_text()
    assert "quant" not in text
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(got, logits(unmerged(adapter)), rtol=1e-4, atol=1e-4)


def test_a_trained_head_is_untied(model, data, tmp_path):
    words = ("--target-modules", "q_proj,lm_head")
    adapter = trained(model, data, tmp_path / "run", *words)
    merged("--adapter", adapter, "-o", tmp_path / "out", "--format", "fp32", *AS_TRAINED)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(loaded), logits(unmerged(adapter)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_classifiers(kind, model, tmp_path):
    if kind == "encoder":
        tokenizer = AutoTokenizer.from_pretrained(model)
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        # fewer positions than the built-in sentences have tokens
        sizes |= dict(max_position_embeddings=32)
        config = BertConfig(**sizes, num_attention_heads=2, vocab_size=len(tokenizer))
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
        tokenizer.save_pretrained(tmp_path / "bert")
        model = tmp_path / "bert"
    rows = [{"text": "one two", "label": "low"}, {"text": "nine ten", "label": "high"}]
    data = write(tmp_path / "labelled.jsonl", rows)
    adapter = trained(model, data, tmp_path / "run", "--labels", "low,high")
    output = tmp_path / "out"
    words = ("--format", "fp32", "--check-data", data, *AS_TRAINED)
    result = merged("--adapter", adapter, "-o", output, *words)
    assert "same likeliest class 100.00% " in " ".join(result.stdout.split())
    assert "vllm" not in result.stdout
    assert "gguf" not in result.stdout
    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert loaded.config.id2label == {0: "low", 1: "high"}
    expected = logits(unmerged(adapter, ("low", "high")))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    # by its own classes, as it is stored
    alone = invoke("eval", output, data, "--json", tmp_path / "alone.json")
    assert alone.exit_code == 0, alone.stderr
    assert "dense" in alone.stdout
    assert json.loads((tmp_path / "alone.json").read_text())["quantize"] == "none"


# --- what is measured ------------------------------------------------------------------------


def test_drift_of_known_logits():
    before = [torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0]])]
    after = [torch.tensor([[0.0, 1.5], [2.0, 3.0]]), torch.tensor([[0.0, 3.0]])]
    rows = [[0, 1], [1]]
    found = drift.compare(before, after, rows)
    p, q = (torch.cat(x).double().softmax(-1) for x in (before, after))
    kl = (p * (p / q).log()).sum(-1).mean().item()
    assert found.kl == pytest.approx(kl)
    assert (found.positions, found.largest) == (3, 3)
    assert found.mean == pytest.approx(3.5 / 6)
    assert found.same == 2
    # one text has a next token, which the first row of logits predicts
    assert found.perplexity == pytest.approx(1 + math.exp(-1.5))
    same = drift.compare(before, before, rows)
    assert (same.largest, same.kl, same.same) == (0, 0, 3)
    assert same.perplexity == pytest.approx(1 + math.exp(-1))
    assert math.isnan(drift.compare([torch.ones(1, 2)], [torch.ones(1, 2)], [[3, 4]]).loss)


def test_perplexity_is_that_of_transformers_and_a_report_can_be_left_out(adapter, tmp_path):
    words = ("--format", "fp32", *AS_TRAINED)
    result = merged("--adapter", adapter, "-o", tmp_path / "out", *words)
    words = " ".join(result.stdout.split())
    said = re.search(r"Perplexity of the texts: (\S+) unmerged, (\S+) merged, (\S+) without", words)
    base = runs.load(TrainSettings.load(adapter), adapter)
    rows = drift._rows(base, TrainSettings.load(adapter), None)
    loss = tokens = 0
    for row in rows:
        ids = torch.tensor([row])
        loss += base.model.eval()(ids, labels=ids).loss.item() * (len(row) - 1)
        tokens += len(row) - 1
    unmerged, after, without = map(float, said.groups())
    assert unmerged == pytest.approx(math.exp(loss / tokens), rel=1e-3, abs=0.01)
    assert after == pytest.approx(unmerged, rel=1e-3)
    assert without != pytest.approx(unmerged, rel=1e-2)
    quick = merged("--adapter", adapter, "-o", tmp_path / "quick", "--no-report")
    assert "Perplexity" not in quick.stdout
    assert "largest difference" not in quick.stdout
    assert (tmp_path / "quick" / "model.safetensors").exists()


def test_what_is_said_is_measured_on_what_was_written(adapter, tmp_path, monkeypatch):
    """A weight that is damaged on the way to the disk shows."""
    right = merging._write

    def damaged(base, *args):
        base.model.model.layers[0].mlp.down_proj.weight.data.mul_(-3)
        right(base, *args)

    monkeypatch.setattr(merging, "_write", damaged)
    fp32 = ("--format", "fp32", *AS_TRAINED)
    result = merged("--adapter", adapter, "-o", tmp_path / "out", *fp32)
    words = " ".join(result.stdout.split())
    assert "the merged model chooses another token than the unmerged one at" in words
    monkeypatch.undo()
    whole = merged("--adapter", adapter, "-o", tmp_path / "whole", *fp32)
    row = next(line for line in whole.stdout.splitlines() if "largest difference" in line)
    off, untrained = map(float, row.split()[-2:])
    assert off < 1e-3
    assert untrained > 1
    rounded = merged("--adapter", adapter, "-o", tmp_path / "bf16", "--format", "bf16")
    assert "largest difference of logits" in rounded.stdout


def test_a_merge_that_loses_what_was_trained_is_warned_of(capsys):
    untrained = drift.Drift(positions=10, largest=3.0, mean=0.5, kl=0.4, same=7, loss=1.0)
    nothing = drift.Drift(positions=10, largest=0.0, mean=0.0, kl=0.0, same=10, loss=0.5)
    for kl, kind, warned in ((0.3, "nf4", True), (0.1, "nf4", False), (0.3, "bf16", False)):
        merged = drift.Drift(positions=10, largest=2.0, mean=0.4, kl=kl, same=8, loss=0.7)
        drift._show(merged, untrained, nothing, kind, torch.bfloat16, classifies=False)
        words = " ".join(capsys.readouterr().out.split())
        assert "another token than the unmerged one at 2 of 10 positions" in words
        assert ("75% as far off as the one without adapter" in words) == warned
    for found in (nothing, untrained):
        drift._show(found, nothing, nothing, "nf4", torch.float32, classifies=True)
        assert "Much" not in capsys.readouterr().out


def test_data_to_measure_on_and_the_room_for_logits(adapter, data, tmp_path, monkeypatch):
    base = runs.load(TrainSettings.load(adapter), adapter)
    settings = TrainSettings.load(adapter)
    few = drift._rows(base, settings, None)
    assert len(few) == len(drift.SENTENCES)
    from fastlora.cli.data import read

    more = drift._rows(base, settings, read(data))
    assert more[: len(few)] == few
    assert len(more) == len(few) + 2
    vocabulary = base.model.config.vocab_size
    monkeypatch.setattr(drift, "_MOST_LOGITS", vocabulary * (len(few[0]) + 3))
    assert drift._rows(base, settings, read(data)) == [few[0], few[1][:3]]


# --- what comes next -------------------------------------------------------------------------


def test_commands_can_be_pasted(adapter, tmp_path):
    output = tmp_path / "my model"
    lines = merged("--adapter", adapter, "-o", output, "--format", "fp16").stdout.splitlines()
    convert, shrink, serve = (
        shlex.split(next(line for line in lines if line.startswith(word)))
        for word in ("python", "llama-quantize", "vllm")
    )
    whole = f"{output}.gguf"
    kind = ["--outfile", whole, "--outtype", "f16"]
    assert convert == ["python", "convert_hf_to_gguf.py", str(output), *kind]
    assert shrink == ["llama-quantize", whole, f"{output}-Q4_K_M.gguf", "Q4_K_M"]
    assert serve == ["vllm", "serve", str(output)]


# --- what is refused -------------------------------------------------------------------------


def refused(*words):
    result = invoke("merge", *words)
    assert result.exit_code == 2, result.stdout
    return one_line(result)


def test_what_is_missing_or_does_not_fit(adapter, data, tmp_path):
    full, file, out = tmp_path / "full", tmp_path / "file", tmp_path / "out"
    full.mkdir()
    (full / "precious").touch()
    file.touch()
    ours = ("--adapter", adapter)
    for words, message in (
        (ours, "Missing option '--output'"),
        (("m", "-o", out), "Missing option '--adapter'"),
        ((*ours, "-o", full), "output must be a new or empty folder, got"),
        ((*ours, "-o", file), f"output must be a folder, got the file {file}"),
        (("--adapter", "none", "-o", out), "adapter must be a folder with adapter_config.json"),
        (("none", *ours, "-o", out), "model must be a folder with config.json"),
        ((*ours, "-o", out, "--format", "int8"), "'int8' is not one of"),
        ((*ours, "-o", out, "--check-data", "none.jsonl"), "got none.jsonl (No such file"),
        ((*ours, "-o", file / "deep" / "x"), f"be written to, got {file} (Not a directory)"),
    ):
        assert message in refused(*words), words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    out.mkdir()
    merged(*ours, "-o", out)


def test_what_does_not_fit_in_fp16_is_named(adapter, model, tmp_path):
    big = AutoModelForCausalLM.from_pretrained(model)
    big.model.norm.weight.data.fill_(1e5)
    big.save_pretrained(tmp_path / "big")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "big")
    words = (tmp_path / "big", "--adapter", adapter, "-o", tmp_path / "out")
    message = refused(*words, "--format", "fp16")
    assert "every merged weight must fit in fp16, got Inf or NaN in model.norm.weight" in message
    assert not (tmp_path / "out").exists()


def test_the_installed_command(adapter, data, tmp_path):
    good = run("merge", "--adapter", adapter, "-o", "out", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""
    assert f"vllm serve {tmp_path / 'out'}\n" in good.stdout
    again = run("merge", "--adapter", adapter, "-o", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "output must be a new or empty folder, got out" in one_line(again)
    nothing = run("merge", "--adapter", "none", "-o", "other", cwd=tmp_path)
    assert nothing.returncode == 2
    assert "adapter must be a folder" in one_line(nothing)
    both = ("--check-data", data, "--no-report")
    unread = invoke("merge", "--adapter", adapter, "-o", tmp_path / "new", *both)
    assert "check-data must come with a report, got --no-report" in one_line(unread)
