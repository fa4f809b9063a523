"""Write training checkpoints in child processes that die at any moment; the parent loads them.

Run by test_cli_resume.py in a process of its own, as it forks.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from cli_helpers import save_tiny_model

import fastlora
from fastlora.cli import checkpoints, encoding, models, training
from fastlora.cli.data import read
from fastlora.cli.guards import Interrupts
from fastlora.cli.settings import TrainSettings
from fastlora.cli.trainer import AdapterTrainer

KILLS = 50


def trained(folder: Path) -> AdapterTrainer:
    """A trainer after one step, which wrote its first checkpoint."""
    (folder / "data.jsonl").write_text(json.dumps({"prompt": "one", "completion": "two"}))
    settings = TrainSettings(
        model=str(save_tiny_model(folder / "tiny")),
        data=folder / "data.jsonl",
        output=folder / "run",
        steps=1,
        dtype="fp32",
    )
    base = models.load(models.find(settings.model), settings)
    data = encoding.encode(read(settings.data), base.tokenizer, settings.template, 64)
    fastlora.add_lora(base.model, training.lora_config(settings))
    trainer = training._trainer(base, training.Task(data), settings, Interrupts())
    trainer.train()
    return trainer


def save_for_ever(trainer: AdapterTrainer, started: Path) -> None:
    while True:
        trainer.state.global_step += 1
        trainer._save_checkpoint(trainer.model, None)
        started.touch()


def loads(output: Path, trainer: AdapterTrainer) -> bool:
    """Whether the newest complete checkpoint is there and whole; its neighbours are removed."""
    newest = checkpoints.newest(output)
    if newest is None:
        return False
    fastlora.load_adapter(trainer.model, newest)
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(newest / name, weights_only=True)
    step = json.loads((newest / "trainer_state.json").read_text())["global_step"]
    checkpoints.clear(output, after=step)
    return step == checkpoints.step_of(newest)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = trained(folder)
    output, started, dice, bad, moved = folder / "run", folder / "started", random.Random(0), 0, 0
    for _ in range(KILLS):
        started.unlink(missing_ok=True)
        before = checkpoints.newest(output)
        trainer.state.global_step = checkpoints.step_of(before)
        child = os.fork()
        if child == 0:
            save_for_ever(trainer, started)
        while not started.exists():
            time.sleep(0.001)
        time.sleep(dice.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        bad += not loads(output, trainer)
        moved += checkpoints.newest(output) != before
    assert moved == KILLS, "every child must have come to a checkpoint of its own"
    print(f"{KILLS} kills, {bad} unloadable")


main(Path(sys.argv[1]))
