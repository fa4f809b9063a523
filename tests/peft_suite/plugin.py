"""What PEFT's tests run with: their packages, no hub, tests of LoRA only, fast layers or not."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

forwards = 0  # that were fast
# last, so that only what is not installed comes from there
sys.path.append(os.environ["FASTLORA_SITE_PACKAGES"])
_CONFIG = re.compile(r"[A-Za-z0-9]+Config(?=[-\]])")


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are imported."""
    for name in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{name}: one of PEFT's")
    from tests import testing_utils  # PEFT's

    testing_utils.hub_online_once = _offline
    if os.environ["FASTLORA_ENABLE"] == "1":
        _enable()


def _enable() -> None:
    """Fast layers from now on, and a count of their forwards."""
    import fastlora
    from fastlora.integrations.peft import fast

    forward = fast.forward

    def counted(*args: Any) -> Any:
        global forwards
        forwards += 1
        return forward(*args)

    fast.forward = counted
    fastlora.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Each process writes how many forwards were fast."""
    with Path(os.environ["FASTLORA_COUNTS"]).open("a") as file:
        file.write(f"{forwards}\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is parametrised by the settings of other tuners."""
    others, kept = [], []
    for item in items:
        settings = _CONFIG.findall(item.name)
        (others if settings and "LoraConfig" not in settings else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


@contextmanager
def _offline(model_id: str) -> Iterator[None]:
    """In the place of what lets a test go to the hub, and wait there where there is no network."""
    yield
