"""Facts about the machine and the software that a measurement is worth nothing without."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastlora import native

PACKAGES = ("fastlora-engine", "torch", "triton", "bitsandbytes", "peft", "transformers")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def machine_facts(device: str) -> dict[str, Any]:
    """What a reader of the results has to know, without anything private: no host name, no path.

    Args:
        device: where the benchmark runs, such as "cpu" or "cuda:1".

    Returns:
        JSON-ready facts; a package that is not installed is None.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "gpu": None if device == "cpu" else _gpu(device),
        "backend": os.environ.get("FASTLORA_BACKEND"),
        "native_isa": native.isa() if native.available() else None,
    }


def _command() -> str:
    """The command line, with only the last part of every path."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    return " ".join(["fastlora", *words])


def _commit() -> str | None:
    """Commit of the source that runs, with "+" if files differ from it; None outside of git."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    dirty = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{_git(here.parent, 'rev-parse', 'HEAD')}{'+' if dirty else ''}"


def _git(folder: Path, *args: str) -> str | None:
    """Output of git, None if it fails or is not installed."""
    return _output(["git", "-C", str(folder), *args])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    usable = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(usable),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def _cpuinfo() -> dict[str, str]:
    """Facts about the first core; empty where the system has no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _gpu(device: str) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = _output(query)
    return {
        "name": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "multiprocessors": facts.multi_processor_count,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
