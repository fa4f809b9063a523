"""The switch after which PEFT makes fast layers by itself."""

import threading
from functools import wraps
from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from fastlora.integrations.peft.tuner import FAST_TUNERS

_LOCK = threading.Lock()
_NAME = "inject_adapter"  # what every way to add an adapter comes through


def enable() -> None:
    """Let PEFT make fast LoRA layers from now on, in every model and however they are made.

    That is `get_peft_model`, `PeftModel.from_pretrained`, `add_adapter` and `load_adapter`, also of
    transformers' models, and whatever calls them. Layers that exist stay what they are. Calling it
    again changes nothing.
    """
    with _LOCK:
        for theirs, ours in FAST_TUNERS.items():
            if not _is_on(theirs):
                setattr(theirs, _NAME, _fast(theirs, ours))


def disable() -> None:
    """Let PEFT make its own layers again; fast ones that exist stay fast, see `unpatch_peft`."""
    with _LOCK:
        for theirs in filter(_is_on, FAST_TUNERS):
            before = vars(theirs)[_NAME].fastlora_before
            # the class itself may inherit it
            delattr(theirs, _NAME)
            if theirs.inject_adapter is not before:
                setattr(theirs, _NAME, before)


def _is_on(theirs: type[BaseTuner]) -> bool:
    return hasattr(vars(theirs).get(_NAME), "fastlora_before")


def _fast(theirs: type[BaseTuner], ours: type[BaseTuner]) -> Any:
    before = theirs.inject_adapter

    @wraps(before)
    def inject_adapter(self: BaseTuner, *args: Any, **kwargs: Any) -> None:
        # subclasses, such as AdaLoraModel, make layers of their own
        if type(self) is theirs:
            self.__class__ = ours
            return self.inject_adapter(*args, **kwargs)
        return before(self, *args, **kwargs)

    inject_adapter.fastlora_before = before
    return inject_adapter
