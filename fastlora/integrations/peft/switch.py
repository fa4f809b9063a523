"""The switch after which PEFT makes fast layers by itself."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from fastlora.integrations.peft import swap
from fastlora.integrations.peft.tuner import FAST_TUNERS

_NAME = "inject_adapter"  # what every way to add an adapter comes through
_LOCK = threading.Lock()
_on = False
# our hook on a class -> the method it took the place of, None where the class inherits it
_before: dict[Callable, Callable | None] = {}


def enable() -> None:
    """Let PEFT make fast LoRA layers from now on, in every model and however they are made.

    That is `get_peft_model`, `PeftModel.from_pretrained`, `add_adapter` and `load_adapter`, also of
    transformers' models, and whatever calls them. Layers that exist stay what they are. Tuners that
    build on LoRA's, such as AdaLoRA, make their own layers; 4-bit ones of bitsandbytes under them
    are taken over too, and not repacked. Calling it again changes nothing.
    """
    global _on
    with _LOCK:
        _on = True
        for theirs, ours in FAST_TUNERS.items():
            before = vars(theirs).get(_NAME)
            if before not in _before:
                hook = _hook(theirs, ours, before)
                _before[hook] = before
                setattr(theirs, _NAME, hook)


def disable() -> None:
    """Let PEFT make its own layers again; fast ones that exist stay fast, see `unpatch_peft`."""
    global _on
    with _LOCK:
        _on = False
        for theirs in FAST_TUNERS:
            hook = vars(theirs).get(_NAME)
            if hook not in _before:  # below somebody else's, where it does nothing from now on
                continue
            before = _before.pop(hook)
            if before is None:
                delattr(theirs, _NAME)
            else:
                setattr(theirs, _NAME, before)


def _hook(theirs: type[BaseTuner], ours: type[BaseTuner], before: Callable | None) -> Callable:
    @wraps(theirs.inject_adapter)
    def inject_adapter(self: BaseTuner, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if _on and type(self) is theirs:
            self.__class__ = ours
            return self.inject_adapter(model, *args, **kwargs)
        if _on:  # subclasses, such as AdaLoraModel, make layers of their own
            swap.take_over_bases(model)
        if before is None:  # looked up now, since others may have changed it
            return super(theirs, self).inject_adapter(model, *args, **kwargs)
        return before(self, model, *args, **kwargs)

    return inject_adapter
