"""The command line: registration, options, settings; data and training have their own files."""

import subprocess
import sys

import pytest
import torch
import typer
from cli_helpers import invoke, one_line

from fastlora.cli import COMMANDS, app
from fastlora.cli.console import duration, size

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
        (["train"], "output must be given, got none"),
        (["train", "-o", "out"], "model must be given, got none"),
        (["train", "m", "-o", "out"], "data must be given, got none"),
        (["train", "m", "d", "-o", "out", "--rank", "0"], "Invalid value for '--rank'"),
        (["train", "m", "d", "-o", "out", "--lr", "-1"], "Invalid value for '--lr'"),
        (["train", "m", "d", "-o", "out", "--seed", "4294967296"], "Invalid value for '--seed'"),
        (["train", "m", "d", "-o", "out", "--quantize", "int8"], "'int8' is not one of"),
        (["train", "m", "d", "-o", "out", "--epochs", "1", "--steps", "1"], "epochs and steps"),
        (["train", "m", "d", "-o", "out", "--epochs", "0"], "epochs must be above 0"),
        (
            ["train", "m", "d", "-o", "out", "--template", "x"],
            "template must be chat or contain {prompt}",
        ),
        (["train", "m", "d", "-o", "out", "--lr", "inf"], "lr must be finite, got inf"),
        (["train", "m", "d", "-o", "out", "--eval-share", "1"], "eval-share must be below 1"),
        (["train", "m", "d", "-o", "out", "--eval-steps", "1"], "eval-steps must have eval-data"),
        (
            ["train", "m", "d", "-o", "out", "--early-stopping", "1"],
            "early-stopping must have eval-steps, got none",
        ),
        (
            ["train", "m", "d", "-o", "out", "--packing", "--group-by-length"],
            "packing and group-by-length must not both be given",
        ),
        (["train", "m", "d", "-o", "out", "--labels", "a"], "labels must be two or more"),
        (["train", "m", "d", "-o", "out", "--labels", "a,a"], "labels must be two or more"),
        (["train", "m", "d", "-o", "out", "--fields", "prompt"], "fields"),
        (["train", "m", "d", "-o", "out", "--blocksize", "65"], "blocksize must be one of"),
        (["train", "m", "d", "-o", "out", "--template", "{prompt}\udcff"], "template must be text"),
        (["generate", "m", "--prompt", "x\udcff"], "prompt must be text that UTF-8 can encode"),
        (["generate", "m"], "either --prompt or --prompts must be given"),
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


def test_numbers_for_reading():
    assert [size(n) for n in (0, 999, 1234, 98_362_432, 2_500_000_000)] == [
        "0 B",
        "999 B",
        "1.2 kB",
        "98 MB",
        "2.5 GB",
    ]
    assert [duration(s) for s in (8.24, 200.4, 7500)] == ["8.2 s", "3 min 20 s", "2 h 05 min"]
