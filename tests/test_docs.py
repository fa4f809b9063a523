"""README: every Python block runs, every command and option in it exists."""

import contextlib
import io
import shlex
import subprocess

import pytest
import torch
import typer
from helpers import ROOT
from readme import blocks

from fastlora import cli


def commands(program):
    """Words after `program` in every shell line that runs it."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w[1:] for w in words if w and w[0] == program]


@pytest.fixture
def tiny_model(tmp_path, monkeypatch):
    """A folder `my-model` in the current folder: a two-layer model such as a user would have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    monkeypatch.chdir(tmp_path)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("my-model")


# Trainer's default, of which torch warns where there is no GPU
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.usefixtures("tiny_model")
def test_python_blocks_run_in_order():
    found = blocks("python")
    assert len(found) >= 4
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for source in found:
            exec(compile(source, "README.md", "exec"), namespace)


def test_fastlora_commands_parse(tmp_path, monkeypatch):
    """With the config that is shown, as the file that a command names."""
    monkeypatch.chdir(tmp_path)
    (config,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(config)
    found = commands("fastlora")
    assert {words[0] for words in found} == set(cli.COMMANDS), "README shows every command"
    group = typer.main.get_command(cli.app)
    for name, *words in found:
        command = group.get_command(None, name)
        command.make_context(name, list(words))  # raises what a user would be told


def test_make_targets_exist():
    found = commands("make")
    assert {"demo", "test"} <= {words[0] for words in found}
    for words in found:
        run = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
