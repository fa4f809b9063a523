"""Save adapters in child processes that die at any moment; the parent loads what they left.

Run by test_adapters.py in a process of its own, as it forks.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from fastlora.adapters import load_adapter, save_adapter
from fastlora.config import LoraConfig
from fastlora.model import add_lora

KILLS = 20
SYSTEM_CALLS = 12  # fsync and replace calls of one save, and then some


def build(r: int | None = None, value: float = 0.0) -> nn.Module:
    """A model, with an adapter of rank r full of one value."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    if r:
        add_lora(
            model, LoraConfig(r=r, lora_alpha=r, target_modules=["0"] if r == 4 else ["0", "1"])
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.fill_(value)
    return model


def loads(folder: Path) -> bool:
    """Whether the folder holds one of the two adapters, complete."""
    try:
        model = load_adapter(build(), folder)
    except Exception as error:  # counted and shown, whatever it is
        print(f"{type(error).__name__}: {error}")
        return False
    values = {p.flatten()[0].item() for p in model.parameters() if p.requires_grad}
    counts = len([p for p in model.parameters() if p.requires_grad])
    return (values, counts) in (({1.0}, 2), ({2.0}, 4))


def in_child(action) -> int:
    """Start a child process that runs `action` and ends without cleaning up."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    return child


def save_for_ever(models: list[nn.Module], folder: Path) -> None:
    while True:
        for model in models:
            save_adapter(model, folder)


def exit_at(call: int, model: nn.Module, folder: Path) -> None:
    """Save, and end without a trace before system call number `call`."""
    calls = 0

    def dying(real):
        def counted(*args):
            nonlocal calls
            calls += 1
            if calls > call:
                os._exit(9)
            return real(*args)

        return counted

    os.fsync, os.replace = dying(os.fsync), dying(os.replace)
    save_adapter(model, folder)


def main(folder: Path) -> None:
    """Print how many attempts left something that cannot be loaded."""
    models = [build(4, 1.0), build(8, 2.0)]
    save_adapter(models[0], folder)
    dice, bad = random.Random(0), 0
    for _ in range(KILLS):
        child = in_child(lambda: save_for_ever(models, folder))
        time.sleep(dice.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        bad += not loads(folder)
    print(f"{KILLS} kills at random, {bad} unloadable")
    bad = finished = 0
    for call in range(SYSTEM_CALLS):
        for old, new in ((0, 1), (1, 0)):
            for leftover in folder.glob(".*.tmp"):  # it could stand in for what is lost now
                leftover.unlink()
            save_adapter(models[old], folder)
            child = in_child(lambda call=call, new=new: exit_at(call, models[new], folder))
            finished += os.waitpid(child, 0)[1] == 0
            bad += not loads(folder)
    assert finished, "no child came to the end, so SYSTEM_CALLS must grow"
    print(f"{bad} unloadable of {SYSTEM_CALLS} exits between system calls")


main(Path(sys.argv[1]))
