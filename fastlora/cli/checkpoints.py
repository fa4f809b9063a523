"""Checkpoints of a run: folders that are complete, or seen not to be and passed over.

transformers' own search takes the highest number, also that of an empty folder.
"""

import json
import re
import shutil
from pathlib import Path

from fastlora.atomic import sha256_of
from fastlora.cli.console import note

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # what killed processes leave, see atomic.py


def folder_of(output: Path, step: int) -> Path:
    """Where the checkpoint of a step is, as Trainer calls it."""
    return output / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(_NAME.fullmatch(folder.name)[1])


def seal(folder: Path, examples: str) -> None:
    """Write the last file of a checkpoint: size and sha256 of every other, and of the examples.

    Args:
        folder: complete, not under its final name yet.
        examples: digest of what is trained on.
    """
    sums = {
        file.name: [file.stat().st_size, sha256_of(file)]
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": sums, "examples": examples}, indent=2))


def examples_of(folder: Path) -> str:
    """Digest of what the run of a complete checkpoint trains on."""
    return json.loads((folder / MANIFEST).read_text())["examples"]


def progress_of(folder: Path) -> float:
    """Epochs that the run of a complete checkpoint has trained."""
    return json.loads((folder / TRAINER_STATE).read_text())["epoch"]


def newest(output: Path) -> Path | None:
    """The newest complete checkpoint; what is passed over is said.

    Args:
        output: of a run.

    Returns:
        Its folder; None where there is none.
    """
    for folder in reversed(_all(output)):
        problem = damage(folder)
        if not problem:
            return folder
        note("passed", f"{folder} over: {problem}")
    return None


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint.

    Args:
        folder: of the checkpoint.

    Returns:
        The reason why it cannot be used; empty if it is complete.
    """
    try:
        sums = json.loads((folder / MANIFEST).read_text())["files"]
        for name, (size, digest) in sums.items():
            file = folder / name
            if file.stat().st_size != size:
                return f"{name} must be {size} bytes, got {file.stat().st_size}"
            if sha256_of(file) != digest:
                return f"{name} is not what was written"
    except OSError as error:
        return f"no {Path(error.filename).name}" if error.filename else str(error)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return f"{MANIFEST} is damaged"
    return "" if sums else f"{MANIFEST} is empty"


def prune(output: Path, keep: int, best: int | None) -> None:
    """Remove old checkpoints.

    Args:
        output: of the run.
        keep: how many of the newest stay.
        best: step of one that stays besides; None: there is none.
    """
    for folder in _all(output)[:-keep]:
        if step_of(folder) != best:
            shutil.rmtree(folder)


def clear(output: Path, after: int = -1) -> None:
    """Remove what killed processes left, and checkpoints beyond a step, which come anew.

    Args:
        output: of the run.
        after: the step; -1: all checkpoints of an earlier run go.
    """
    for folder in _all(output):
        if step_of(folder) > after:
            shutil.rmtree(folder)
    for path in output.iterdir() if output.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _all(output: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    found = output.iterdir() if output.is_dir() else ()
    folders = [path for path in found if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)
