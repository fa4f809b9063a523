"""The command line: registration, options, data, encoding; training is in test_cli_train."""

import json
import subprocess
import sys

import pytest
import torch
import typer
from cli_helpers import invoke, one_line, tiny_tokenizer

from fastlora.cli import COMMANDS, app, encoding
from fastlora.cli.console import UserError, duration, size
from fastlora.cli.data import Example, read_jsonl, write_jsonl
from fastlora.cli.settings import TrainSettings

IGNORED = encoding.IGNORED


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


# --- registration ----------------------------------------------------------------------------


def test_help_lists_every_command_without_transformers():
    code = (
        "import sys\n"
        "from fastlora.cli import app\n"
        "try:\n"
        "    app(['--help'], prog_name='fastlora')\n"
        "finally:\n"
        "    print('loaded', 'transformers' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "loaded False" in run.stdout
    assert all(f" {name} " in run.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert f"fastlora {name}" in result.stdout


def test_commands_are_looked_up_by_name():
    commands = typer.main.get_command(app).commands
    assert [*commands] == [*COMMANDS]
    assert commands.get("trian") is None
    assert {p.name for p in commands["train"].params} >= {"model", "data", "output", "rank", "lr"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["--wat"], "No such option: --wat"),
        (["train"], "Missing argument"),
        (["train", "m", "d", "-o", "out", "--rank", "0"], "Invalid value for '--rank'"),
        (["train", "m", "d", "-o", "out", "--lr", "-1"], "Invalid value for '--lr'"),
        (["train", "m", "d", "-o", "out", "--seed", "4294967296"], "Invalid value for '--seed'"),
        (["train", "m", "d", "-o", "out", "--quantize", "int8"], "'int8' is not one of"),
        (["train", "m", "d", "-o", "out", "--epochs", "1", "--steps", "1"], "epochs and steps"),
        (["train", "m", "d", "-o", "out", "--epochs", "0"], "epochs must be above 0"),
        (["train", "m", "d", "-o", "out", "--template", "x"], "template must contain {prompt}"),
        (["train", "m", "d", "-o", "out", "--blocksize", "65"], "blocksize must be one of"),
        (["train", "m", "d", "-o", "out", "--template", "{prompt}\udcff"], "template must be text"),
        (["generate", "m", "--prompt", "x\udcff"], "prompt must be text that UTF-8 can encode"),
        (["generate", "m"], "Missing option"),
        (["generate", "m", "--prompt", "x", "--adapter", "none"], "adapter_config.json, got none"),
    ],
    ids=lambda value: ascii(" ".join(value)) if isinstance(value, list) else "",
)
def test_bad_option_is_one_line(words, message):
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in one_line(result)


def test_module_is_the_command_line():
    run = subprocess.run(
        [sys.executable, "-m", "fastlora", "trian"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr == "fastlora: No such command 'trian'. Did you mean 'train'?\n"


def test_doctor_passes_here_and_fails_on_a_wrong_kernel(monkeypatch):
    from fastlora import reference

    good = invoke("doctor")
    assert good.exit_code == 0, good.stdout
    assert "pass" in good.stdout
    assert torch.__version__ in good.stdout
    right = reference.dequantize_blocks
    monkeypatch.setattr(reference, "dequantize_blocks", lambda *args: right(*args) * 1.0001)
    bad = invoke("doctor")
    assert bad.exit_code == 1
    assert "fail: decoded weights differ" in bad.stdout
    monkeypatch.undo()
    monkeypatch.setenv("FASTLORA_BACKEND", "wat")
    forced = invoke("doctor")
    assert forced.exit_code == 1
    assert "fail: FASTLORA_BACKEND=wat cannot run" in forced.stdout


# --- data ------------------------------------------------------------------------------------


def test_jsonl_round_trip(tmp_path):
    examples = [Example("a b", "c"), Example("", 'd "e"\n\u2028 é')]
    write_jsonl(tmp_path / "x.jsonl", examples)
    assert read_jsonl(tmp_path / "x.jsonl") == examples


def test_jsonl_fields_and_blank_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"text": "t"}\r\n\n{"id": 1, "prompt": "p", "completion": "\u2028"}')
    assert read_jsonl(path) == [Example(None, "t"), Example("p", "\u2028")]


GOOD = '{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold at least one example"),
        ("\n \n", "must hold at least one example"),
        (GOOD + "{", "line 2: must be JSON"),
        (GOOD + "prompt,completion\n", "line 2: must be JSON"),
        (GOOD + "\n[1]\n", "line 3: must be a JSON object, got list"),
        ('{"prompt": "p"}', "line 1: must have the fields prompt and completion, or text, got"),
        ('{"question": "q", "answer": "a"}', "got ['answer', 'question']"),
        ('{"prompt": "p", "completion": "c", "text": "t"}', "line 1: must have the fields"),
        ('{"prompt": "p", "completion": 3}', "line 1: completion must be a string, got int"),
        ('{"prompt": null, "completion": "c"}', "line 1: prompt must be a string, got NoneType"),
        ('{"prompt": "p", "completion": ""}', "line 1: completion must not be empty"),
        ('{"text": ""}', "line 1: text must not be empty"),
        (GOOD + '{"text": "\\ud800 x"}', "line 2: text must be text that UTF-8 can encode, got"),
        ('{"prompt": "\\udc00", "completion": "c"}', "line 1: prompt must be text that UTF-8"),
        ('{"prompt": "p", "completion": "c\\udfff"}', "line 1: completion must be text that UTF-8"),
        (GOOD + "[" * 100_000, "line 2: must be JSON, got maximum recursion depth"),
        (GOOD + '{"text": ' + "1" * 5000 + "}", "line 2: must be JSON, got Exceeds the limit"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_unreadable_data(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="readable JSONL file"):
        read_jsonl(tmp_path / "x.jsonl")


# --- what is trained on ----------------------------------------------------------------------


def test_labels_cover_the_completion_and_its_end(tokenizer):
    data = encoding.encode([Example("one two", "three")], tokenizer, r"{prompt}\n", 64)
    (example,) = data.examples
    prompt = tokenizer("one two\n").input_ids
    completion = [*tokenizer("three").input_ids, tokenizer.eos_token_id]
    assert example["input_ids"] == prompt + completion
    assert example["labels"] == [IGNORED] * len(prompt) + completion
    assert (data.cut, data.dropped, data.tokens) == (0, 0, len(prompt + completion))


def test_labels_of_plain_text_start_at_the_second_token(tokenizer):
    (example,) = encoding.encode([Example(None, "one two")], tokenizer, "{prompt}", 64).examples
    ids = [*tokenizer("one two").input_ids, tokenizer.eos_token_id]
    assert example["input_ids"] == ids
    assert example["labels"] == [IGNORED, *ids[1:]]


def test_padding_is_masked_by_position_where_it_is_the_end_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    eos = tokenizer.eos_token_id
    # an end token inside a completion is trained on like any other
    rows = [Example("one", "two" + tokenizer.eos_token + "three"), Example("one", "two")]
    data = encoding.encode(rows, tokenizer, "{prompt} ", 64)
    batch = encoding.Collator(eos)(data.examples)
    for row, example in enumerate(data.examples):
        length = len(example["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
        assert batch["labels"][row, :length].tolist() == example["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["labels"].shape[1] - length
        )
        assert (batch["labels"][row, length:] == IGNORED).all()
        assert (batch["input_ids"][row, length:] == eos).all()
    assert [(batch["labels"][row] == eos).sum().item() for row in (0, 1)] == [2, 1]


def test_what_is_too_long_is_counted_and_never_empty(tokenizer):
    rows = [Example("one", "two " * 9), Example("one " * 9, "two"), Example("one", "two")]
    prompt = len(encoding.prompt_ids(tokenizer, r"{prompt}\n", "one"))
    data = encoding.encode(rows, tokenizer, r"{prompt}\n", prompt + 4)
    assert (data.cut, data.dropped, len(data.examples)) == (1, 1, 2)
    assert all(len(e["input_ids"]) <= prompt + 4 for e in data.examples)
    assert all(any(label != IGNORED for label in e["labels"]) for e in data.examples)
    # what is cut does not end
    assert data.examples[0]["labels"][-1] != tokenizer.eos_token_id
    with pytest.raises(
        UserError, match=f"max-length must leave room for completions, got {prompt}"
    ):
        encoding.encode(rows, tokenizer, r"{prompt}\n", prompt)


def test_prompts_are_closed_by_no_end_token(tokenizer):
    class Closing:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens=True):
            ids = tokenizer(text)
            if add_special_tokens:
                ids["input_ids"].append(self.eos_token_id)
            return ids

    for example in (Example("one", "two"), Example(None, "one two")):
        got = encoding.encode([example], Closing(), "{prompt} ", 64).examples
        assert got == encoding.encode([example], tokenizer, "{prompt} ", 64).examples


# --- settings --------------------------------------------------------------------------------


def test_settings_round_trip_and_override(tmp_path):
    TrainSettings(rank=4, steps=3, template="<{prompt}>", quantize="none").save(tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["rank"] == 4
    loaded = TrainSettings.load(tmp_path, quantize="nf4", dtype=None)
    assert loaded == TrainSettings(rank=4, steps=3, template="<{prompt}>", quantize="nf4")
    assert TrainSettings.load(tmp_path / "none") == TrainSettings()
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json must be readable JSON"):
        TrainSettings.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be readable JSON"),
        ("[" * 100_000, "must be readable JSON, got maximum recursion depth"),
        ("[]", "must hold a JSON object, got list"),
        ('{"template": 5}', "template must be str, got 5"),
        ('{"template": "\\ud800{prompt}"}', "template must be text that UTF-8 can encode"),
        ('{"quantize": "int8"}', "quantize must be 'nf4' or 'none', got 'int8'"),
        ('{"dtype": ["fp32"]}', "dtype must be 'auto' or 'fp32' or 'bf16' or 'fp16', got ['fp32']"),
        ('{"blocksize": 64.0}', "blocksize must be int, got 64.0"),
        ('{"blocksize": true}', "blocksize must be int, got True"),
        ('{"blocksize": 65}', "blocksize must be one of"),
        ('{"double_quant": 1}', "double_quant must be bool, got 1"),
        ('{"epochs": "2"}', "epochs must be float or NoneType, got '2'"),
        ('{"lr": null}', "lr must be float, got None"),
    ],
    ids=lambda text: text[:30],
)
def test_bad_settings_files(tmp_path, text, message):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "settings.json").write_text(text)
    result = invoke("generate", "m", "--adapter", tmp_path, "--prompt", "x")
    assert result.exit_code == 2
    assert message in one_line(result)


def test_settings_files_of_other_versions_and_hands(tmp_path):
    text = '{"later": [1], "lr": 1, "epochs": null, "steps": 3, "dtype": "bf16"}'
    (tmp_path / "settings.json").write_text(text)
    assert TrainSettings.load(tmp_path) == TrainSettings(lr=1.0, steps=3, dtype="bf16")


def test_numbers_for_reading():
    assert [size(n) for n in (0, 999, 1234, 98_362_432, 2_500_000_000)] == [
        "0 B",
        "999 B",
        "1.2 kB",
        "98 MB",
        "2.5 GB",
    ]
    assert [duration(s) for s in (8.24, 200.4, 7500)] == ["8.2 s", "3 min 20 s", "2 h 05 min"]
