"""`fastlora eval` and the scores behind it, on tiny models."""

import json
import math

import pytest
import torch
from cli_helpers import CORPUS, invoke, one_line, run, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

import fastlora
from fastlora import LoraConfig, causal_lm
from fastlora.cli import encoding, evaluation, generation, runs
from fastlora.cli.data import read
from fastlora.cli.evaluation import Classified
from fastlora.cli.settings import TrainSettings

OPTIONS = ("--lr", "1e-2", "--batch-size", "4", "--rank", "8", "--warmup", "0", "--dtype", "fp32")
PAIRS = {"one": "two three", "four": "five six", "seven": "eight nine ten done", "ten": "done"}
CLASSES = {"one two three": "low", "two": "low", "nine ten": "high", "done done ten nine": "high"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eval")


@pytest.fixture(scope="module")
def model(folder):
    torch.manual_seed(0)
    return save_tiny_model(folder / "tiny")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(folder):
    rows = [{"prompt": p, "completion": c} for p, c in PAIRS.items()]
    return write(folder / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def labelled(folder):
    rows = [{"text": text, "label": label} for text, label in CLASSES.items()]
    return write(folder / "labelled.jsonl", rows)


def trained(model, data, output, *words):
    result = invoke("train", model, data, "-o", output, *OPTIONS, *words)
    assert result.exit_code == 0, result.stdout + result.stderr
    return output


@pytest.fixture(scope="module")
def adapter(model, pairs, folder):
    """A run that learns four lines by heart."""
    return trained(model, pairs, folder / "adapter", "--steps", "50")


@pytest.fixture(scope="module")
def classifier(model, labelled, folder):
    """One that tells four texts apart; the base has no head."""
    words = ("--steps", "20", "--labels", "low,high", "--target-modules", "q_proj,v_proj")
    return trained(model, labelled, folder / "classifier", *words)


def loaded(model, labels=()):
    settings = TrainSettings(model=str(model), dtype="fp32", quantize="none")
    return runs.load(settings, None, labels)


def report(*words):
    """What `fastlora eval --json -` prints."""
    result = invoke("eval", *words, "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


# --- scores ----------------------------------------------------------------------------------


def true_loss(model, dataset):
    """Each example alone, whole logits, in fp64: sum of nats and number of tokens."""
    total, count = 0.0, 0
    for example in dataset.examples:
        ids, labels = (torch.tensor([example[name]]) for name in ("input_ids", "labels"))
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        for row, label in zip(log_p, labels[0, 1:].tolist(), strict=True):
            if label != encoding.IGNORED:
                total, count = total - row[label].item(), count + 1
    return total, count


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_loss_is_the_mean_over_all_labelled_tokens(batch_size, model, pairs):
    base = loaded(model)
    dataset = encoding.encode(read(pairs), base.tokenizer, r"{prompt}\n", 64)
    total, count = true_loss(base.model, dataset)
    scores = evaluation.score(base, dataset, batch_size)
    # the mean of the batches' means is another number, as the completions differ in length
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (scores["tokens"], scores["examples"]) == (count, len(PAIRS))
    turned = encoding.Dataset(dataset.examples[::-1], 0, 0)
    assert evaluation.score(base, turned, batch_size)["loss"] == pytest.approx(scores["loss"])


def test_scoring_changes_nothing_and_makes_no_logits(model, pairs, monkeypatch):
    base = loaded(model)
    dataset = encoding.encode(read(pairs), base.tokenizer, r"{prompt}\n", 64)
    config = LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False)
    fastlora.add_lora(base.model, config)
    expected = evaluation.score(base, dataset, 3)
    losses, loss = [], causal_lm._loss
    monkeypatch.setattr(
        causal_lm, "_loss", lambda *args, **kw: losses.append(kw["logits"]) or loss(*args, **kw)
    )
    base.model.train()
    base.model.model.layers[1].eval()
    modes = [module.training for module in base.model.modules()]
    before = torch.get_rng_state()
    done = []
    assert evaluation.score(base, dataset, 3, done.append) == expected
    assert done == [3, 1]
    assert torch.equal(before, torch.get_rng_state())
    assert [module.training for module in base.model.modules()] == modes
    assert len(losses) == 2
    assert all(isinstance(logits, causal_lm.NoLogits) for logits in losses)
    assert base.model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).logits is not None


def test_models_that_need_whole_logits_are_scored_from_them(model, pairs, folder, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16)
    config = Gemma2Config(
        **sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=len(tokenizer)
    )
    Gemma2ForCausalLM(config).save_pretrained(folder / "gemma")
    tokenizer.save_pretrained(folder / "gemma")
    base = loaded(folder / "gemma")
    dataset = encoding.encode(read(pairs), base.tokenizer, r"{prompt}\n", 64)
    assert "softcapping" in causal_lm.why_not(base.model)
    total, count = true_loss(base.model, dataset)
    assert evaluation.score(base, dataset, 3)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_examples_without_labelled_tokens_count_for_nothing(model, pairs):
    base = loaded(model)
    dataset = encoding.encode(read(pairs), base.tokenizer, r"{prompt}\n", 64)
    expected = evaluation.score(base, dataset, 1)
    silent = {"input_ids": [5, 6], "labels": [encoding.IGNORED] * 2}
    more = encoding.Dataset([*dataset.examples, silent], 0, 0)
    assert evaluation.score(base, more, 1) == expected | {"examples": len(PAIRS) + 1}
    nothing = evaluation.score(base, encoding.Dataset([silent], 0, 0), 1)
    assert math.isnan(nothing["loss"])


def test_figures_of_a_classifier():
    """Right: two of class 0, one of class 2; class 1 is never seen, class 3 only predicted."""
    classified = Classified(0.5, [0, 0, 0, 2, 2], [0, 0, 2, 2, 3])
    means = evaluation.totals(classified)
    assert means["accuracy"] == 3 / 5
    assert means["precision"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert means["recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert means["f1"] == pytest.approx((0.8 + 0.5 + 0) / 3)
    assert (means["loss"], means["examples"]) == (0.5, 5)
    rows = evaluation.by_class(classified, ("a", "b", "c", "d"))
    assert [*rows] == ["a", "c", "d"]
    assert rows["a"] == pytest.approx({"precision": 1, "recall": 2 / 3, "f1": 0.8, "examples": 3})
    assert rows["d"] == {"precision": 0, "recall": 0, "f1": 0, "examples": 0}


def test_predictions_are_in_the_order_of_the_examples(model, labelled, classifier):
    settings = TrainSettings.load(classifier)
    base = runs.load(settings, classifier, settings.classes)
    dataset = encoding.encode_labelled(read(labelled), base.tokenizer, ("low", "high"), 64)
    lengths = [len(example["input_ids"]) for example in dataset.examples]
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))
    expected, losses = [], []
    with torch.no_grad():
        for example in dataset.examples:
            log_p = base.model(torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
            expected.append(log_p.argmax().item())
            losses.append(-log_p[example["labels"]].item())
    for batch_size in (1, 3):
        got = evaluation.classify(base, dataset, batch_size)
        assert got.predicted == expected
        assert got.truth == [0, 0, 1, 1]
        assert got.loss == pytest.approx(sum(losses) / 4, rel=1e-4)


# --- the command -----------------------------------------------------------------------------


def test_prompts_and_completions(adapter, pairs, model, tmp_path):
    result = invoke("eval", pairs, "--adapter", adapter, "--json", tmp_path / "x.json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    figures = json.loads((tmp_path / "x.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert figures["exact_match"] == 1
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert (figures["examples"], figures["answers"], figures["form"]) == (4, 4, "prompt")
    words = " ".join(result.stdout.split())
    assert "examples tokens loss perplexity exact match" in words
    assert f" {figures['tokens']} {figures['loss']:.4f} " in words
    assert "100.0%" in words
    # the base model, with what is not the adapter's default
    other = report(model, pairs, "--template", "{prompt} ", "--quantize", "none", "--dtype", "fp32")
    assert other["exact_match"] < 0.5
    assert other["loss"] > 2
    assert (other["adapter"], other["quantize"], other["dtype"]) == (None, "none", "float32")
    base = AutoModelForCausalLM.from_pretrained(model)
    dataset = encoding.encode(read(pairs), AutoTokenizer.from_pretrained(model), "{prompt} ", 64)
    total, count = true_loss(base, dataset)
    assert other["loss"] == pytest.approx(total / count, rel=1e-5)


def test_plain_texts(model, tmp_path):
    data = write(tmp_path / "x.jsonl", [{"text": text} for text in CORPUS])
    figures = report(model, data, "--max-length", "6")
    assert "exact_match" not in figures
    assert (figures["form"], figures["cut"], figures["max_length"]) == ("text", 2, 6)
    # the first token of a text is given, the rest is predicted
    assert figures["tokens"] <= 3 * 5
    table = invoke("eval", model, data).stdout
    assert "perplexity" in table
    assert "exact" not in table


def test_right_answers_are_right_to_the_letter_but_for_space_around(adapter, tmp_path, monkeypatch):
    rows = [("one", " two three\n"), ("four", "five  six"), ("seven", "Eight nine ten done")]
    rows = [{"prompt": p, "completion": c} for p, c in rows]
    figures = report(write(tmp_path / "x.jsonl", rows), "--adapter", adapter)
    assert figures["exact_match"] == pytest.approx(1 / 3)
    answers = [" two three ", "five  six\n", "eight nine ten done"]
    monkeypatch.setattr(generation, "complete", lambda *args: answers)
    figures = report(tmp_path / "x.jsonl", "--adapter", adapter)
    assert figures["exact_match"] == pytest.approx(2 / 3)


def test_long_completions_are_not_answered_unless_asked_for(model, pairs, tmp_path):
    data = write(tmp_path / "x.jsonl", [{"prompt": "one", "completion": "two " * 80}])
    result = invoke("eval", model, data)
    words = " ".join(result.stdout.split())
    assert "answers left out, as the longest completion has " in words
    assert "--exact-match asks for them" in words
    assert "exact match" not in words
    assert report(model, data, "--exact-match", "--max-new-tokens", "4")["exact_match"] == 0
    assert "exact_match" not in report(model, pairs, "--no-exact-match")


def test_the_last_turn_of_a_conversation_is_answered(model, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chatty = tmp_path / "chatty"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(chatty)
    tokenizer.save_pretrained(chatty)
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four five")]
    turns = [{"role": role, "content": content} for role, content in turns]
    data = write(tmp_path / "x.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    output = trained(chatty, data, tmp_path / "run", "--steps", "40")
    figures = report(data, "--adapter", output)
    assert (figures["form"], figures["exact_match"], figures["answers"]) == ("messages", 1, 2)
    turns[-1]["content"] = "four six"
    other = write(tmp_path / "y.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    assert report(other, "--adapter", output)["exact_match"] == 0.5


def test_classes(classifier, labelled, tmp_path):
    figures = report(labelled, "--adapter", classifier)
    assert figures["labels"] == ["low", "high"]
    assert [figures[name] for name in ("accuracy", "precision", "recall", "f1")] == [1] * 4
    assert figures["classes"]["high"] == {"precision": 1, "recall": 1, "f1": 1, "examples": 2}
    rows = [{"text": text, "label": "low"} for text in CLASSES]
    result = invoke("eval", write(tmp_path / "x.jsonl", rows), "--adapter", classifier)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["class", "precision", "recall", "F1", "examples"] in lines
    assert ["low", "1.0000", "0.5000", "0.6667", "4"] in lines
    assert ["high", "0.0000", "0.0000", "0.0000", "0"] in lines
    assert ["mean", "over", "classes", "0.5000", "0.2500", "0.3333", "4"] in lines
    assert any(line[0:1] == ["4"] and line[-1] == "50.0%" for line in lines)


def test_fields_are_those_of_the_run_or_given(model, tmp_path):
    rows = [{"question": p, "answer": c} for p, c in PAIRS.items()]
    data = write(tmp_path / "x.jsonl", rows)
    fields = "prompt=question,completion=answer"
    output = trained(model, data, tmp_path / "run", "--steps", "1", "--fields", fields)
    assert report(data, "--adapter", output)["examples"] == 4
    assert report(model, data, "--fields", fields)["examples"] == 4


# --- what is refused -------------------------------------------------------------------------


def refused(*words):
    result = invoke("eval", *words)
    assert result.exit_code == 2, result.stdout
    return one_line(result)


def test_what_is_missing_or_does_not_fit(model, adapter, classifier, pairs, labelled, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(pairs.read_text() + "{]\n")
    outside = tmp_path / "outside.jsonl"
    outside.write_text(labelled.read_text() + '{"text": "one", "label": "middle"}\n')
    text = write(tmp_path / "text.jsonl", [{"text": "one"}])
    with_adapter = ("--adapter", adapter)
    classifies = ("--adapter", classifier)
    for words, message in (
        ((), "data must be given"),
        ((pairs,), "model and data must be given where there is no adapter"),
        (("none", pairs), "model must be a folder with config.json"),
        ((model, "none.jsonl"), "got none.jsonl (No such file or directory)"),
        ((model, bad), "bad.jsonl, line 5: must be JSON"),
        ((pairs, "--adapter", "none"), "adapter must be a folder with adapter_config.json"),
        ((pairs, *with_adapter, "--json", tmp_path / "no" / "x"), "--json must name a file in"),
        ((pairs, *with_adapter, "--json", tmp_path), "--json must name a file in a folder"),
        ((pairs, *with_adapter, "--max-length", "2"), "max-length must leave room"),
        ((pairs, *with_adapter, "--template", "x"), "template must be chat or contain {prompt}"),
        ((text, *with_adapter, "--exact-match"), "--exact-match must have data with prompt"),
        ((outside, *classifies), "outside.jsonl, line 5: label must be one of low, high, got"),
        ((pairs, *classifies), "data must have text and label for a classifier, got prompt"),
        ((labelled, *with_adapter), "adapter must be one of a classifier"),
        ((labelled, *with_adapter, "--labels", "low,high"), "must be one of a classifier (SEQ"),
        ((model, labelled), "model must be a classifier for text and label, got a language"),
        ((model, labelled, "--labels", "low,high"), "must be a classifier for 2 classes, got a"),
    ):
        assert message in refused(*words), words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "got bitsandbytes FP4"),
        ({"load_in_8bit": True}, "got bitsandbytes int8"),
    ],
)
def test_checkpoints_of_other_formats_are_named(change, message, model, pairs, tmp_path):
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in refused(tmp_path, pairs)


def test_adapters_without_settings_name_no_model(adapter, pairs, model, tmp_path):
    for file in adapter.glob("adapter_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    message = refused(pairs, "--adapter", tmp_path)
    assert "model must be given for an adapter without a model in settings.yaml" in message
    assert report(model, pairs, "--adapter", tmp_path, "--dtype", "fp32")["exact_match"] == 1


def test_the_installed_command(adapter, pairs, model, tmp_path):
    good = run("eval", pairs, "--adapter", adapter, "--json", "-", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""
    assert json.loads(good.stdout)["exact_match"] == 1
    missing = run("eval", model, "none.jsonl", cwd=tmp_path)
    assert missing.returncode == 2
    assert "none.jsonl" in one_line(missing)
    nowhere = run("eval", pairs, "--adapter", adapter, "--json", "no/x.json", cwd=tmp_path)
    assert nowhere.returncode == 2
    assert "--json must name a file in a folder that exists" in one_line(nowhere)


def test_the_loss_of_training_is_that_of_eval(adapter, pairs):
    """Both are `evaluation.score`, of the same examples."""
    lines = map(json.loads, (adapter / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "eval_loss" in line][-1]
    assert report(pairs, "--adapter", adapter)["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)
