"""Kill `fastlora train` with each of our optimizers, go on, and compare with a run that was not.

Run by test_cli_resume.py in a process of its own, as it forks.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cli_helpers import invoke, records, save_tiny_model
from safetensors.torch import load_file

from fastlora.integrations.transformers import OPTIMIZERS

STEPS, BEFORE = 14, 4  # of a run, and those that a killed one has logged at least
WORDS = ("--lr", "1e-2", "--rank", "32", "--dropout", "0.3", "--dtype", "fp32", "--save-steps", "1")
PAGING = ("--page-budget", "128KiB")  # two frames


def train(*words: str | Path) -> str:
    result = invoke("train", *words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def killed(output: Path, *words: str | Path) -> int:
    """Train in a child until it has logged some steps, and kill it; how many it logged."""
    child = os.fork()
    if child == 0:
        invoke("train", *words, "-o", output)
        os._exit(0)
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > BEFORE):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return metrics.read_text().count("\n")


def optimizer_of(output: Path) -> dict[str, Any]:
    return torch.load(output / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)


def assert_same(one: Any, other: Any) -> None:
    """Of two state dicts, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    else:
        assert one == other


def check(name: str, folder: Path, *words: str | Path) -> None:
    whole, parts = folder / f"{name}-whole", folder / f"{name}-parts"
    count = killed(parts, *words)
    train(*words, "-o", whole)
    said = train("--resume", "-o", parts)
    paged = name.startswith("paged")
    assert (" in pages, " in said, " frames for " in said) == (paged, paged)
    assert [r["loss"] for r in records(whole)] == [r["loss"] for r in records(parts)]
    assert_same(*(load_file(output / "adapter_model.safetensors") for output in (whole, parts)))
    assert_same(optimizer_of(whole), optimizer_of(parts))
    state = optimizer_of(parts)["state"]
    assert state["bits"] == (8 if name.endswith("8bit") else 32)
    assert all(name.endswith(".weight") for run in state["runs"] for name in run["names"])
    print(f"{name}: killed after {count} of {STEPS} steps, the same to the bit")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    data = folder / "data.jsonl"
    rows = [{"prompt": "one " * (i % 4 + 1), "completion": f"two {i}"} for i in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_tiny_model(folder / "tiny")
    for name in OPTIMIZERS:
        words = (model, data, *WORDS, "--steps", str(STEPS), "--optim", name)
        check(name, folder, *words, *(PAGING if name.startswith("paged") else ()))


main(Path(sys.argv[1]))
