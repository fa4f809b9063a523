"""`fastlora train` and `fastlora generate` end to end, on a tiny model."""

import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import (
    invoke,
    one_line,
    records,
    save_tiny_classifier,
    save_tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora
from fastlora import causal_lm
from fastlora.cli import generation, models, training
from fastlora.cli.settings import TrainSettings

STEPS = 60
OPTIONS = ("--dtype", "fp32", "--lr", "1e-2", "--batch-size", "4", "--rank", "8", "--warmup", "0")
PAIRS = {"one": "two three", "four": "five six", "seven": "eight nine", "ten": "done"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [json.dumps({"prompt": p, "completion": c}) for p, c in PAIRS.items()]
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    """A run that learns four lines by heart."""
    output = tmp_path_factory.mktemp("run") / "adapter"
    result = invoke("train", model, data, "-o", output, "--steps", STEPS, *OPTIONS)
    assert result.exit_code == 0, result.stdout + result.stderr
    return output, result


def test_train_writes_adapter_metrics_and_settings(trained):
    output, result = trained
    assert {p.name for p in output.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        f"checkpoint-{STEPS}",
        "loss.png",
        "metrics.jsonl",
        "settings.yaml",
    }
    steps = records(output)
    assert [r["step"] for r in steps] == [*range(1, STEPS + 1)]
    assert steps[0]["loss"] > 4
    assert steps[-1]["loss"] < 0.1
    assert steps[0]["lr"] == pytest.approx(1e-2)
    assert all(a["lr"] > b["lr"] for a, b in itertools.pairwise(steps))
    assert all(r["tokens_per_second"] > 0 and r["memory_bytes"] > 0 for r in steps)
    assert all(r["skipped"] == 0 for r in steps)
    assert result.stderr == ""
    assert f"{steps[0]['loss']:.4f} → {steps[-1]['loss']:.4f}" in result.stdout
    assert f"{STEPS} steps in" in result.stdout


def test_metrics_count_the_tokens_that_are_not_padding(trained, model):
    output, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = sum(len(tokenizer(f"{p}\n{c}").input_ids) + 1 for p, c in PAIRS.items())
    # four examples, batches of four: every step sees all of them
    assert [r["tokens"] for r in records(output)[:3]] == [tokens, 2 * tokens, 3 * tokens]


def test_adapter_loads_and_answers(trained, model):
    output, _ = trained
    for prompt, completion in PAIRS.items():
        result = invoke("generate", model, "--adapter", output, "--prompt", prompt)
        assert result.exit_code == 0
        assert result.stdout == completion + "\n"
    empty = invoke("generate", model, "--prompt", "", "--template", "{prompt}")
    assert "prompt must have at least one token" in one_line(empty)
    base = invoke("generate", model, "--prompt", "one", "--max-new-tokens", "8")
    assert base.exit_code == 0
    assert base.stdout != PAIRS["one"] + "\n"


def test_batched_answers_are_those_of_one_at_a_time(trained, model, monkeypatch):
    """Prompts of different lengths are padded on the left; answers end with their line."""
    output, _ = trained
    base = models.load(models.find(str(model)), TrainSettings(dtype="fp32"))
    fastlora.load_adapter(base.model, output)
    for size in (1, 3):
        lines = generation.complete_lines(base, [*PAIRS], r"{prompt}\n", 16, size)
        assert lines == [*PAIRS.values()]
    # a token may hold a line break and more
    two_lines = base.tokenizer("two\nthree", return_tensors="pt").input_ids
    monkeypatch.setattr(generation, "_generate", lambda *args: two_lines)
    assert generation.complete_lines(base, ["one"], "{prompt}", 16, 1) == ["two"]


def test_loss_is_that_of_the_completions(trained, model):
    """The first logged loss is the base model's: B starts at zero."""
    output, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModelForCausalLM.from_pretrained(model)
    fastlora.quantize_model(dense)
    total, count = 0.0, 0
    for prompt, completion in PAIRS.items():
        before, after = (tokenizer(t).input_ids for t in (prompt + "\n", completion))
        after = [*after, tokenizer.eos_token_id]
        logits = dense(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits, torch.tensor(after), reduction="sum"
        ).item()
        count += len(after)
    assert records(output)[0]["loss"] == pytest.approx(total / count, rel=1e-4)
    # without held-out examples those of the training are scored
    before, after = records(output, "eval_loss")
    assert before["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert before["eval_perplexity"] == pytest.approx(math.exp(before["eval_loss"]))
    assert after["eval_loss"] < 0.1


def test_same_seed_same_losses_and_text_data(model, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"one two {i}"}) + "\n" for i in range(6)))
    words = ("--epochs", "2", "--batch-size", "2", "--accumulation", "2", "--dropout", "0.2")
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = invoke("train", model, path, "-o", tmp_path / name, *words, "--seed", seed)
        assert result.exit_code == 0, result.stderr
        losses.append([r["loss"] for r in records(tmp_path / name)])
    assert len(losses[0]) == 4  # six examples, four a step, two passes
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "words",
    [
        ("--quantize", "none", "--rslora", "--scheduler", "cosine"),
        ("--flat", "--blocksize", "32", "--target-modules", "q_proj, v_proj"),
        ("--target-modules", r".*layers\.1\.mlp\.(up|down)_proj", "--logging-steps", "3"),
        ("--gradient-checkpointing", "--dtype", "bf16", "--scheduler", "constant", "--clip", "0"),
        ("--clip", "1e-12", "--scheduler", "constant", "--warmup", "0.5"),
    ],
    ids=lambda words: words[0],
)
def test_options_reach_the_training(words, model, data, tmp_path):
    result = invoke("train", model, data, "-o", tmp_path, "--steps", "4", *OPTIONS, *words)
    assert result.exit_code == 0, result.stderr
    steps = records(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(model)
    if "--rslora" in words:
        assert config["use_rslora"]
        assert "dense" in result.stdout
        assert steps[1]["lr"] == pytest.approx(1e-2 * 0.5 * (1 + 0.5**0.5))  # cos(pi / 4)
    if "--flat" in words:
        assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    if "--logging-steps" in words:
        assert [r["step"] for r in steps] == [3, 4], "the last step is always logged"
        assert "2 layers" in result.stdout
    if "1e-12" in words:
        assert [r["lr"] for r in steps] == [0, 5e-3, 1e-2, 1e-2]
        # so small that Adam's epsilon swallows them
        assert steps[-1]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-3)
    if "--dtype" in words:
        assert "bfloat16" in result.stdout
        assert [r["lr"] for r in steps] == [1e-2] * 4


@pytest.mark.parametrize(("words", "chunked"), [((), True), (("--full-logits",), False)])
def test_the_loss_is_chunked_unless_full_logits_are_asked_for(
    words, chunked, model, data, tmp_path, monkeypatch
):
    losses, loss = [], causal_lm._loss

    def counted(*args, **kwargs):
        if torch.is_grad_enabled():
            losses.append(1)
        return loss(*args, **kwargs)

    monkeypatch.setattr(causal_lm, "_loss", counted)
    assert invoke("train", model, data, "-o", tmp_path, "--steps", "2", *words).exit_code == 0
    assert len(losses) == (2 if chunked else 0)
    assert TrainSettings.load(tmp_path).chunked_loss is chunked


def test_the_adapter_is_saved_as_trained(model, data, tmp_path):
    """Dense weights, so that PEFT's own model gives the same logits."""
    peft = pytest.importorskip("peft")
    words = ("--steps", "5", "--quantize", "none", *OPTIONS)
    assert invoke("train", model, data, "-o", tmp_path, *words).exit_code == 0
    ids = torch.tensor([[5, 6, 7]])
    ours = fastlora.load_adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path).eval()
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    assert (ours(ids).logits - base(ids).logits).abs().max() > 0.01


# --- what is refused -------------------------------------------------------------------------


def refused(*words):
    """The error line of a training, which must leave no new folder behind."""
    output = Path(words[words.index("-o") + 1])
    before = output.exists()
    result = invoke("train", *words)
    assert result.exit_code == 2, result.stdout
    assert output.exists() == before
    return one_line(result)


def test_output_with_files_is_kept(model, data, tmp_path):
    (tmp_path / "precious").touch()
    assert "output must be a new or empty folder" in refused(model, data, "-o", tmp_path)
    result = invoke("train", model, data, "-o", tmp_path, "--overwrite", "--steps", "1", *OPTIONS)
    assert result.exit_code == 0
    assert (tmp_path / "precious").exists()
    (tmp_path / "file").touch()
    file = tmp_path / "file"
    assert f"output must be a folder, got the file {file}" in refused(model, data, "-o", file)
    below = refused(model, data, "-o", file / "deep" / "out")
    assert "output must be in a folder that can be written to" in below


def test_bad_models(data, tmp_path):
    out = ("-o", tmp_path / "out")
    assert "model must be a folder with config.json, a .gguf file" in refused("no", data, *out)
    assert "got none.gguf" in refused("none.gguf", data, *out)
    folder = tmp_path / "model"
    folder.mkdir()
    for config, message in (
        ("{", "config.json must be JSON"),
        ("[" * 100_000, "config.json must be JSON"),
        ("[]", "config.json must be a JSON object, got list"),
        ('{"model_type": []}', "model_type must be a causal language model, got []"),
        ('{"model_type": "llama", "quantization_config": "x"}', "must be an object, got 'x'"),
        ('{"model_type": "llama", "hidden_size": "x"}', f"{folder} cannot be loaded: "),
        ('{"model_type": "llama", "num_attention_heads": 0}', f"{folder} cannot be loaded: "),
        ('{"model_type": "wat"}', "model_type must be a causal language model, got 'wat'"),
        ('{"model_type": "t5"}', "model_type must be a causal language model, got 't5'"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}',
            "fp8",
        ),
    ):
        (folder / "config.json").write_text(config)
        assert message in refused(folder, data, *out)
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    assert "x.gguf cannot be loaded: " in refused(tmp_path / "x.gguf", data, *out)


@pytest.fixture
def editable(model, tmp_path):
    """A copy of the model whose JSON files a test may change: by values, or whole by a text."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)

    def edit(name, change):
        if isinstance(change, dict):
            change = json.dumps(json.loads((folder / name).read_text()) | change)
        (folder / name).write_text(change)
        return folder

    return edit


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"hidden_act": "wat"}, "cannot be loaded: no 'wat'"),
        ("config.json", {"hidden_size": 32}, "cannot be loaded: "),
        ("config.json", {"dtype": "wat"}, "cannot be loaded: "),
        ("tokenizer.json", "{", "tokenizer.json must be JSON"),
        ("tokenizer.json", "[]", "tokenizer.json must be a JSON object, got list"),
        ("tokenizer.json", '{"a": 1}', "tokenizer.json must be a tokenizer, with an object model"),
        ("tokenizer.json", '{"model": {}}', "cannot be loaded: no 'added_tokens'"),
        ("tokenizer.json", {"added_tokens": 3}, "cannot be loaded: "),
        ("tokenizer.json", {"model": {"type": "wat"}}, "cannot be loaded: data did not match"),
        ("tokenizer_config.json", "[]", "cannot be loaded: "),
        ("generation_config.json", "[]", "cannot be loaded: "),
    ],
)
def test_bad_files_of_a_model(name, change, message, editable, data, tmp_path):
    folder = editable(name, change)
    error = refused(folder, data, "-o", tmp_path / "out")
    assert message in error
    assert str(folder) in error


def test_quantization_config_null_is_none(editable):
    folder = editable("config.json", {"quantization_config": None})
    source = models.find(str(folder))
    assert not source.nf4
    assert models.load(source, TrainSettings(dtype="fp32")).source == source


def test_model_without_all_weights(data, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(folder, data, "-o", tmp_path / "out")
    assert "got none for model.layers.1.mlp.up_proj.weight" in message
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    refused(folder, data, "-o", tmp_path / "out")
    (folder / "model.safetensors").unlink()
    refused(folder, data, "-o", tmp_path / "out")


def test_bad_data_and_settings(model, data, tmp_path):
    out = ("-o", tmp_path / "out")
    assert "none.jsonl" in refused(model, "none.jsonl", *out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text() + "\n{]")
    assert "bad.jsonl, line 5: must be JSON" in refused(model, bad, *out)
    assert "wat_proj" in refused(model, data, *out, "--target-modules", "wat_proj")
    assert "blocksize must be one of" in refused(model, data, *out, "--blocksize", "48")
    surrogate = tmp_path / "surrogate.jsonl"
    surrogate.write_text('{"text": "\\ud800 x"}')
    assert "surrogate.jsonl, line 1: text must be text" in refused(model, surrogate, *out)
    assert "lora_dropout" in refused(model, data, *out, "--dropout", "1")
    assert "max-length must leave room" in refused(model, data, *out, "--max-length", "2")
    if not torch.cuda.is_available():
        assert "fp16 must run on a GPU" in refused(model, data, *out, "--dtype", "fp16")


def test_a_backend_that_does_not_run_is_named(model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", "wat")
    message = refused(model, data, "-o", tmp_path / "out")
    assert "FASTLORA_BACKEND=wat cannot run on cpu" in message


def test_several_processes_are_refused(model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "got WORLD_SIZE=2" in refused(model, data, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(model, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers must be installed" in refused(model, data, "-o", tmp_path / "out")


def test_bad_adapters(trained, model, tmp_path):
    output, _ = trained
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((output / name).read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    result = invoke("generate", model, "--adapter", tmp_path, "--prompt", "one")
    assert result.exit_code == 2
    one_line(result)


def test_options_without_a_meaning_are_refused(model, data, tmp_path):
    out = ("-o", tmp_path / "out")
    labelled, chat = tmp_path / "l.jsonl", tmp_path / "c.jsonl"
    labelled.write_text("".join(f'{{"text": "one", "label": "{x}"}}\n' for x in "ab"))
    chat.write_text('{"messages": [{"role": "assistant", "content": "one"}]}')
    for path, words, message in (
        (labelled, ("--packing",), "packing must be for other data, got label in"),
        (labelled, ("--template", "chat"), "template must be for other data, got label in"),
        (labelled, ("--full-logits",), "chunked-loss must be for other data, got label in"),
        (chat, ("--template", "{prompt}"), "template must be for other data, got messages in"),
        (chat, ("--labels", "a,b"), "labels must be for other data, got messages in"),
        (data, ("--labels", "a,b"), "labels must be for other data, got prompt in"),
        (data, ("--quantize", "none", "--flat"), "double-quant must be for quantize nf4, got none"),
        (data, ("--report-to", "none,none"), "report-to must name trackers that are installed"),
    ):
        assert message in refused(model, path, *out, *words)


def test_arguments_of_the_optimizer_and_the_trackers_reach_trainer(tmp_path):
    settings = TrainSettings(
        output=tmp_path, optim="sgd", weight_decay=0.25, clip=3.0, accumulation=5, report_to="a,b"
    )
    arguments = training._arguments(settings, torch.float32)
    assert arguments.optim == "sgd"
    assert arguments.weight_decay == 0.25
    assert arguments.max_grad_norm == 3.0
    assert arguments.gradient_accumulation_steps == 5
    assert arguments.report_to == ["a", "b"]
    assert training._arguments(TrainSettings(output=tmp_path), torch.float16).fp16


def test_lora_plus_trains_b_faster(trained, model, data, tmp_path):
    """From the second step on, as the first changes only B."""
    output, _ = trained
    words = ("--steps", "1", "--lora-plus-ratio", "2", *OPTIONS, "--scheduler", "constant")
    assert invoke("train", model, data, "-o", tmp_path, *words).exit_code == 0
    (plain,) = (r for r in records(output) if r["step"] == 1)
    (plus,) = records(tmp_path)
    assert plus["loss"] == plain["loss"]
    groups = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    rates = {name: g["lr"] for g in groups["param_groups"] for name in g["param_names"]}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-2}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {2e-2}


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_optimizers_of_trainer_train_too(name, model, data, tmp_path):
    words = ("--steps", "2", "--optim", name, *OPTIONS)
    result = invoke("train", model, data, "-o", tmp_path, *words)
    assert result.exit_code == 0, result.stderr
    assert "moments" not in result.stdout


@pytest.mark.parametrize("pad", [0, 7])
def test_a_decoder_classifies_by_the_last_token_that_is_no_padding(pad, tmp_path):
    """Whatever pads: its loss is the same one by one and in a batch."""
    folder = save_tiny_model(tmp_path / "model", pad_token_id=3)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(folder)
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": "one " * (i + 1), "label": i % 2} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = []
    for size in ("1", "6"):
        words = ("--batch-size", size, "--steps", "1", "--dtype", "fp32", "--rank", "4")
        result = invoke("train", folder, path, "-o", tmp_path / size, *words)
        assert result.exit_code == 0, result.stderr
        losses.append(records(tmp_path / size, "eval_loss")[0]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_are_cut_to_the_positions_of_the_model(tmp_path):
    folder = save_tiny_classifier(tmp_path / "model")
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": "one two three " * 40, "label": i % 2} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("train", folder, path, "-o", tmp_path / "out", "--steps", "1", "--rank", "4")
    assert result.exit_code == 0, result.stderr
    assert "64 tokens at most, as many as the model has positions" in result.stdout
    assert TrainSettings.load(tmp_path / "out").max_length == 64


def test_classes_are_those_of_all_the_data(tmp_path):
    """Also one that is held out whole."""
    folder = save_tiny_classifier(tmp_path / "model")
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": f"one {i}", "label": "ab"[i % 2]} for i in range(9)]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"text": "x", "label": " c "}])
    )
    for seed in range(3):
        words = ("--steps", "1", "--rank", "4", "--eval-share", "0.5", "--seed", seed)
        result = invoke("train", folder, path, "-o", tmp_path / str(seed), *words)
        assert result.exit_code == 0, result.stderr
        assert TrainSettings.load(tmp_path / str(seed)).labels == "a,b,c"
