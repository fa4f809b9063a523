"""The switch after which PEFT makes fast layers by itself."""

import threading
from functools import wraps
from typing import Any

from peft.tuners.lora import LoraModel

from fastlora.integrations.peft.tuner import FastLoraModel

_LOCK = threading.Lock()
_NAME = "inject_adapter"  # what every way to add an adapter comes through


def enable() -> None:
    """Let PEFT make fast LoRA layers from now on, in every model and however they are made.

    That is `get_peft_model`, `PeftModel.from_pretrained`, `add_adapter` and `load_adapter`, also of
    transformers' models, and whatever calls them. Layers that exist stay what they are, and those
    of `PeftMixedModel` are PEFT's, see `patch_peft`. Calling it again changes nothing.
    """
    with _LOCK:
        if not _is_on():
            setattr(LoraModel, _NAME, _fast(LoraModel.inject_adapter))


def disable() -> None:
    """Let PEFT make its own layers again; fast ones that exist stay fast, see `unpatch_peft`."""
    with _LOCK:
        if _is_on():
            before = vars(LoraModel)[_NAME].fastlora_before
            # LoraModel itself inherits it
            delattr(LoraModel, _NAME)
            if LoraModel.inject_adapter is not before:
                setattr(LoraModel, _NAME, before)


def _is_on() -> bool:
    return hasattr(vars(LoraModel).get(_NAME), "fastlora_before")


def _fast(before: Any) -> Any:
    @wraps(before)
    def inject_adapter(self: LoraModel, *args: Any, **kwargs: Any) -> None:
        # subclasses, such as AdaLoraModel, make layers of their own
        if type(self) is LoraModel:
            self.__class__ = FastLoraModel
            return self.inject_adapter(*args, **kwargs)
        return before(self, *args, **kwargs)

    inject_adapter.fastlora_before = before
    return inject_adapter
