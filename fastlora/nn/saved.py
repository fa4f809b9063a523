"""Modules that are trained whole beside the adapters."""

import copy
from typing import Any

from torch import nn

from fastlora.nn.switch import Switch, replica


class SavedModule(nn.Module):
    """A module with one trained copy per adapter, PEFT's `modules_to_save`.

    Attributes:
        switch: whether the running thread has switched the copies off.

    Args:
        original: the module, kept untouched.
        adapter_name: the first adapter.
    """

    switch: Switch

    def __init__(self, original: nn.Module, adapter_name: str = "default") -> None:
        super().__init__()
        self.original_module, self.switch = original, Switch()
        self.modules_to_save = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.add_adapter(adapter_name)
        self.set_adapter(adapter_name)
        self.train(original.training)

    def __getattr__(self, name: str) -> Any:
        """Other attributes, such as `weight`, are those of the module that runs."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "modules_to_save" not in self._modules:  # while unpickling
                raise
            return getattr(self.running_module, name)

    @property
    def running_module(self) -> nn.Module:
        """The active copy, or the original."""
        if self.active_adapter is None or self.switch.depth:
            return self.original_module
        return self.modules_to_save[self.active_adapter]

    def add_adapter(self, name: str) -> None:
        """Add a copy of the original, without gradient until `set_adapter`.

        Args:
            name: of the adapter.

        Raises:
            ValueError: the name is taken.
        """
        if name in self.modules_to_save:
            raise ValueError(f"adapter name must be new, got {name!r}")
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(False)

    def delete_adapter(self, name: str) -> None:
        """Remove a copy; if it was the active one, the original runs.

        Args:
            name: of the adapter.
        """
        if self.active_adapter == name:
            self.set_adapter(None)
        del self.modules_to_save[name]

    def set_adapter(self, name: str | None) -> None:
        """Make one copy active and trainable, the others neither.

        Args:
            name: of the adapter; None runs the original.

        Raises:
            KeyError: there is no such copy.
        """
        if name is not None and name not in self.modules_to_save:
            raise KeyError(f"adapter must be one of {[*self.modules_to_save]}, got {name!r}")
        self.active_adapter = name
        for adapter, module in self.modules_to_save.items():
            module.requires_grad_(adapter == name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active copy."""
        return self.running_module(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> nn.Module:
        return replica(self, super()._replicate_for_data_parallel())
