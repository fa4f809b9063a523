"""A frozen linear layer with LoRA adapters."""

import math
import sys

import torch
from torch import Tensor, nn

from fastlora.member import Member
from fastlora.nn.group import GroupedLinear, Settings
from fastlora.nn.linear4bit import Linear4bit
from fastlora.nn.switch import Switch, replica


class LoraLinear(GroupedLinear):
    """A frozen linear layer with LoRA adapters: y = x w^T + bias + scaling * drop(x) a^T b^T.

    Parts are named as in PEFT: `base_layer`, `lora_A.<adapter>.weight` [R, K],
    `lora_B.<adapter>.weight` [N, R]. Adapters are fp32. One adapter is active at a time, or none.

    Source: Hu et al. 2021, arXiv:2106.09685.

    Attributes:
        switch: whether the running thread has switched the adapters off.

    Args:
        base: `nn.Linear`, `Linear4bit`, or transformers' `Conv1D` (its weight is read transposed).
        r: rank R of the first adapter.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an element of x on its way to the adapter.
        use_rslora: scale by lora_alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv:2312.03732).
        use_dora: not supported yet.
        init_lora_weights: True: a as `nn.Linear`, b zero; "gaussian": a normal with standard
            deviation 1 / r, b zero; False: both as `nn.Linear`, so that the output changes.
        adapter_name: name of the first adapter.

    Raises:
        NotImplementedError: use_dora is set.
        TypeError: base is another kind of module.
        ValueError: an adapter setting is out of range.
    """

    switch: Switch

    def __init__(
        self,
        base: nn.Module,
        r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
    ) -> None:
        nn.Module.__init__(self)
        if use_dora:
            raise NotImplementedError("use_dora=True is not supported, train plain LoRA or rsLoRA")
        if isinstance(base, LoraLinear) or not (isinstance(base, nn.Linear) or is_conv1d(base)):
            raise TypeError(
                f"base must be nn.Linear, Linear4bit or Conv1D, got {type(base).__name__}"
            )
        self.base_layer, self.switch = base, Switch()
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.active_adapter: str | None = None
        self.out_features, self.in_features = self.weight.shape
        self.add_adapter(adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        self.set_adapter(adapter_name)
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight [N, K]; a NaN placeholder over `Linear4bit`."""
        return self.base_layer.weight.T if is_conv1d(self.base_layer) else self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias [N]."""
        return self.base_layer.bias

    def add_adapter(
        self,
        name: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Add an adapter, not active and without gradient until `set_adapter`.

        Args:
            name: of the adapter; no dots, as it becomes part of parameter names.
            r: rank.
            lora_alpha: numerator of the scale.
            lora_dropout: probability in [0, 1).
            use_rslora: scale by lora_alpha / sqrt(r).
            init_lora_weights: True, False or "gaussian", as in the class.

        Raises:
            ValueError: a setting is out of range or the name is taken.
        """
        if name in self.lora_A or not name or "." in name:
            raise ValueError(f"adapter name must be new, not empty and without dots, got {name!r}")
        if r < 1 or not 0 <= lora_dropout < 1:
            raise ValueError(
                f"r must be >= 1 and lora_dropout in [0, 1), got {r} and {lora_dropout}"
            )
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}"
            )
        made = {"bias": False, "device": self.weight.device, "dtype": torch.float32}
        down = nn.Linear(self.in_features, r, **made)
        up = nn.Linear(r, self.out_features, **made)
        if init_lora_weights == "gaussian":
            nn.init.normal_(down.weight, std=1 / r)
        if init_lora_weights:
            nn.init.zeros_(up.weight)
        self.lora_A[name] = down.requires_grad_(False)
        self.lora_B[name] = up.requires_grad_(False)
        self.r[name], self.lora_alpha[name], self.lora_dropout[name] = r, lora_alpha, lora_dropout
        self.scaling[name] = lora_alpha / (math.sqrt(r) if use_rslora else r)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; if it was the active one, none is.

        Args:
            name: of the adapter.

        Raises:
            KeyError: there is no such adapter.
        """
        self._check_known(name)
        if self.active_adapter == name:
            self.set_adapter(None)
        parts = self.lora_A, self.lora_B, self.r, self.lora_alpha, self.lora_dropout, self.scaling
        for part in parts:
            del part[name]

    def set_adapter(self, name: str | None) -> None:
        """Make one adapter active and trainable, the others neither.

        Args:
            name: of the adapter; None leaves the base layer alone.

        Raises:
            KeyError: there is no such adapter.
        """
        if name is not None:
            self._check_known(name)
        self.active_adapter = name
        for part in (self.lora_A, self.lora_B):
            for adapter, linear in part.items():
                linear.requires_grad_(adapter == name)

    def delta_weight(self, name: str) -> Tensor:
        """What an adapter adds to the weight.

        Args:
            name: of the adapter.

        Returns:
            fp32 [N, K]: scaling * b a.

        Raises:
            KeyError: there is no such adapter.
        """
        a, b = self._adapter(name)
        return self.scaling[name] * (b @ a)

    def merged_weight(self, name: str) -> Tensor:
        """The base weight with an adapter added.

        Args:
            name: of the adapter.

        Returns:
            fp32 [N, K], not rounded yet.

        Raises:
            KeyError: there is no such adapter.
        """
        quantised = isinstance(self.base_layer, Linear4bit)
        base = self.base_layer.dequantize(torch.float32) if quantised else self.weight.detach()
        a, b = self._adapter(name)
        return torch.addmm(base.float(), b, a, alpha=self.scaling[name])

    @property
    def running_adapter(self) -> str | None:
        """Name of the adapter that a forward applies; None inside `disabled` or without one."""
        return None if self.switch.depth else self.active_adapter

    @property
    def keeper(self) -> nn.Module:
        """The base layer, which remembers the group while adapters come and go."""
        return self._modules["base_layer"]

    @property
    def runs_itself(self) -> bool:
        """Whether an adapter runs; else the base layer is called."""
        return self.running_adapter is not None

    @property
    def lora(self) -> Settings | None:
        """Settings of the running adapter; None without one."""
        name = self.running_adapter
        if name is None:
            return None
        dropout = self.lora_dropout[name] if self.training else 0.0
        return Settings(name, dropout, self.scaling[name])

    def sources(self) -> list[Tensor]:
        """All tensors that the output depends on, beside x; the weight is the first."""
        base, name = self.keeper, self.running_adapter
        tensors = base.sources() if isinstance(base, Linear4bit) else [base.weight]
        if base.bias is not None and not isinstance(base, Linear4bit):
            tensors.append(base.bias)
        if name is not None:
            tensors += [part[name].weight for part in (self.lora_A, self.lora_B)]
        return tensors

    def member(self) -> Member:
        """The layer with its running adapter as `ops.linear_group` takes it."""
        quantised = isinstance(self.base_layer, Linear4bit)
        weight = self.base_layer.nf4 if quantised else self.weight
        name = self.running_adapter
        if name is None:
            return Member(weight, self.bias)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return Member(weight, self.bias, a, b, self.scaling[name])

    def alone(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K], without a group: of the base layer where no adapter runs."""
        return self.base_layer(x) if self.running_adapter is None else super().alone(x)

    def extra_repr(self) -> str:
        """What `print` shows beside the class name."""
        return f"{super().extra_repr()}, r={self.r}, active={self.active_adapter}"

    def reset_parameters(self) -> None:
        """Does nothing: the base layer is frozen, and adapters are initialised when added."""

    def _replicate_for_data_parallel(self) -> nn.Module:
        return replica(self, super()._replicate_for_data_parallel())

    def _adapter(self, name: str) -> tuple[Tensor, Tensor]:
        """a [R, K] and b [N, R] in fp32, without gradient."""
        self._check_known(name)
        return tuple(part[name].weight.detach().float() for part in (self.lora_A, self.lora_B))

    def _check_known(self, name: str) -> None:
        if name not in self.lora_A:
            raise KeyError(f"adapter must be one of {[*self.lora_A]}, got {name!r}")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer with a transposed weight [K, N]."""
    loaded = sys.modules.get("transformers.pytorch_utils")
    return loaded is not None and isinstance(module, loaded.Conv1D)
