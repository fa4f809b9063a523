"""The command line: registration, options, settings; data and training have their own files."""

import json
import subprocess
import sys

import pytest
import torch
import typer
from cli_helpers import invoke, one_line

from fastlora.cli import COMMANDS, app
from fastlora.cli.console import UserError, duration, size
from fastlora.cli.settings import TrainSettings

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
