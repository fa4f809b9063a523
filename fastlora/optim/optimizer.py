"""AdamW for adapters: all parameters in one launch, moments in 32 or 8 bits, resident or paged."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.optim import state
from fastlora.optim.budget import MemoryBudgetError
from fastlora.optim.collect import (
    Collector,
    check_group,
    check_saved,
    copy_back,
    is_trained,
    runs_of,
)
from fastlora.optim.flat import StateBits, nbytes
from fastlora.optim.pool import PoolStats
from fastlora.optim.run import DeviceState
from fastlora.optim.store import PageBudget, Paged, Paging, make_store


@dataclass(frozen=True)
class StateMemory:
    """How much memory the moments take.

    Attributes:
        parameters: elements that have moments.
        device_bytes: on the devices of the parameters between two steps, with frames that are kept.
        host_bytes: in pages.
    """

    parameters: int
    device_bytes: int
    host_bytes: int

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of both moments of an element: 8 in 32 bits, 2.03 in 8 bits."""
        return (self.device_bytes + self.host_bytes) / max(self.parameters, 1)


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, for parameters in fp32, fp16 or bf16.

    Takes the place of `torch.optim.AdamW`: groups with options of their own, schedulers, closures,
    hooks, `GradScaler` and gradient clipping work as there. What differs:

    * all parameters of a device and dtype are updated by one launch;
    * moments are fp32 whatever the parameter is, or 8-bit codes in blocks of 256. The update is
      computed in fp32 and rounded once;
    * with `paged` the moments lie in host memory and visit the device page by page during `step`,
      with the same results to the bit. For parameters on a CPU it is the same, pages being copied
      to a second buffer, which is of use with `page_folder`;
    * `state_dict` is a snapshot on the CPU, indexed by parameter name: give
      `model.named_parameters()`, or parameters are called by group and place, such as "0.3". What
      `torch.optim.AdamW` or bitsandbytes saved loads too.

    Parameters that ask for no gradient take no memory. Sparse and complex gradients and sharded
    parameters (DTensor) are errors.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; Dettmers et al. 2022,
    arXiv:2110.02861 (8-bit moments).

    Args:
        params: parameters, (name, parameter) pairs, or groups as dicts.
        lr: learning rate.
        betas: decay of the first and of the second moment, each in [0, 1).
        eps: is added to the root of the second moment.
        weight_decay: share of lr by which parameters shrink a step.
        maximize: go up the gradient.
        state_bits: 32, or 8 for 2.03 bytes a parameter instead of 8.
        paged: keep the moments in host memory.
        page_budget: bytes of each device that pages may take during a step; "auto", also when not
            given, takes up to 128 MiB.
        page_folder: keep the pages in a nameless file in this folder instead of memory.
        keep_frames: leave pages on the device between steps, which then copies fewer of them.

    Raises:
        ValueError: an option is out of range, paging is set up without `paged`, or a parameter has
            another dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        state_bits: StateBits = 32,
        paged: bool = False,
        page_budget: PageBudget | None = None,
        page_folder: str | Path | None = None,
        keep_frames: bool = False,
    ) -> None:
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits must be 8 or 32, got {state_bits}")
        self.state_bits: StateBits = state_bits
        self._paging = _paging(paged, page_budget, page_folder, keep_frames)
        self._states: list[DeviceState] = []
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": maximize})

    @property
    def paged(self) -> bool:
        """Whether paging was asked for."""
        return self._paging is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those that are there keep their moments.

        Args:
            param_group: "params", and options that differ from the defaults.

        Raises:
            ValueError: an option is out of range, a parameter has another dtype, or its name is
                that of another.
        """
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            self._check_names()
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss anew, with gradients; it is called once.

        Returns:
            What the closure returned, None without one.

        Raises:
            ValueError: a gradient is sparse, of another dtype or on another device than its
                parameter; nothing was changed.
            MemoryBudgetError: a device has no room for two pages; nothing was changed. After
                another error in the middle of it, such as one of the device, a step may have been
                made by half.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._make_states()
        collector = Collector(self.param_groups)
        work = [(s, [collector.step(run) for run in s.runs]) for s in self._states]
        work = [
            (s, steps) for s, steps in work if any(g is not None for t in steps for g in t.grads)
        ]
        _open([device_state for device_state, _ in work])
        for device_state, steps in work:
            device_state.update(steps)
            for run, step in zip(device_state.runs, steps, strict=True):
                copy_back(run, step)
        return loss

    def memory(self) -> StateMemory:
        """How much memory the moments take; none before the first step."""
        numel = device = host = 0
        for device_state in self._states:
            sizes = [run.flat.numel for run in device_state.runs]
            taken = sum(nbytes(size, self.state_bits) for size in sizes)
            numel += sum(sizes)
            if isinstance(device_state.store, Paged):
                host += taken
                device += device_state.store.pool.held_bytes
            else:
                device += taken
        return StateMemory(numel, device, host)

    def page_stats(self) -> list[PoolStats]:
        """What paging did so far on each device; empty without paging and before the first step."""
        stores = (s.store for s in self._states)
        return [store.pool.stats() for store in stores if isinstance(store, Paged)]

    def named_params(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter by its name, or where it has none by group and place, such as "0.3"."""
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            yield from zip(names, group["params"], strict=True)

    # --- state dicts -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot on the CPU: flat moments in their own dtype, and which parameters they are of.

        Returns:
            "state", see `optim.state`, and "param_groups": tensors, numbers and names, which
            `torch.load` reads with `weights_only`.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        runs = state.snapshot(self._states, self.state_bits)
        found = {"state": state.dump(runs, self.state_bits), "param_groups": self._options()}
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, found)
            found = found if changed is None else changed
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take moments and options over; whether and how this optimizer pages does not change.

        Args:
            state_dict: from this class, whatever its pages were; or from `torch.optim.AdamW` or
                bitsandbytes' AdamW with the same parameters in the same order.

        Raises:
            ValueError: parameters are missing, unknown or of another shape, or the moments have
                another number of bits; nothing was changed.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = state_dict["param_groups"]
        sizes, theirs = ([len(g["params"]) for g in some] for some in (self.param_groups, groups))
        if sizes != theirs:
            raise ValueError(f"groups must have {sizes} parameters, got {theirs}")
        for group, saved in zip(self.param_groups, groups, strict=True):
            check_saved({**group, **saved, "params": []})
        named = dict(self.named_params())
        runs = state.parse(state_dict["state"], [*named], self.state_bits)
        if runs:
            shapes = {name: p.shape for name, p in named.items()}
            # others write nothing of parameters that never had a gradient
            ours = "version" in state_dict["state"]
            needed = [name for name, p in named.items() if is_trained(p)] if ours else []
            state.check(runs, shapes, needed)
            self._make_states()
            state.restore(runs, self._states)
        else:
            self._drop_states()
        for group, saved in zip(self.param_groups, groups, strict=True):
            own = {key: group[key] for key in ("params", "param_names") if key in group}
            group.update({**copy.deepcopy(saved), **own})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: moments as in a state dict, the copy makes its own pages."""
        own = {"state_bits": self.state_bits, "_paging": self._paging, "_states": []}
        saved = state.snapshot(self._states, self.state_bits)
        return {**super().__getstate__(), **own, "saved": saved}

    def __setstate__(self, found: dict[str, Any]) -> None:
        """Of a copy; its groups hold copies of the parameters."""
        found = {**found}
        saved = found.pop("saved")
        super().__setstate__(found)
        if saved:
            self._make_states()
            state.restore(saved, self._states)

    def _options(self) -> list[dict[str, Any]]:
        """Groups with places in place of parameters, as torch writes them."""
        found, first = [], 0
        for group in self.param_groups:
            places = range(first, first + len(group["params"]))
            options = {key: value for key, value in group.items() if key != "params"}
            found.append({**copy.deepcopy(options), "params": [*places]})
            first = places.stop
        return found

    def _check_names(self) -> None:
        names = [name for name, _ in self.named_params()]
        if len(names) > len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"names of parameters must differ, got {twice} twice")

    def _make_states(self) -> None:
        """Moments for all parameters that are trained: zero for those that had none."""
        have = {id(p) for s in self._states for run in s.runs for p in run.params}
        some = (p for group in self.param_groups for p in group["params"])
        if all(id(p) in have or not is_trained(p) for p in some):  # in nearly every step
            return
        wanted = {name: p for name, p in self.named_params() if is_trained(p) or id(p) in have}
        saved = state.snapshot(self._states, self.state_bits)
        self._drop_states()
        for device, runs in runs_of(wanted).items():
            store = make_store([r.flat.numel for r in runs], self.state_bits, device, self._paging)
            self._states.append(DeviceState(device, runs, store))
        state.restore(saved, self._states)

    def _drop_states(self) -> None:
        for device_state in self._states:
            device_state.store.close()
        self._states = []


def _open(states: Sequence[DeviceState]) -> None:
    """Take all memory of a step, or none, so that no step is made by half."""
    try:
        for device_state in states:
            device_state.store.open()
    except MemoryBudgetError:
        for device_state in states:
            device_state.store.close()
        raise


def _paging(
    paged: bool, budget: PageBudget | None, folder: str | Path | None, keep: bool
) -> Paging | None:
    given = {"page_budget": budget is not None, "page_folder": folder is not None}
    names = [name for name, there in {**given, "keep_frames": keep}.items() if there]
    if not paged and names:
        raise ValueError(f"paged must be True where pages are set up, got {', '.join(names)}")
    if not paged:
        return None
    if budget not in (None, "auto") and (not isinstance(budget, int) or budget < 1):
        raise ValueError(f'page_budget must be a number of bytes or "auto", got {budget!r}')
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"page_folder must be a folder, got {str(folder)!r}")
    return Paging(
        "auto" if budget is None else budget, None if folder is None else Path(folder), keep
    )


def to_bitsandbytes(optimizer: AdamW) -> dict[str, Any]:
    """A state dict for bitsandbytes' AdamW or AdamW8bit; `load_state_dict` reads theirs.

    Args:
        optimizer: ours.

    Returns:
        Per parameter step, state1, state2, and with 8 bits absmax1, absmax2, qmap1, qmap2, on the
        CPU. There a parameter begins a block of its own: where it does not here, its 8-bit moments
        are decoded and encoded again.
    """
    runs = state.snapshot(optimizer._states, optimizer.state_bits)
    names = [name for name, _ in optimizer.named_params()]
    found = state.bitsandbytes_state(runs, names)
    return {"state": found, "param_groups": optimizer._options()}


class AdamW8bit(AdamW):
    """`AdamW` with `state_bits=8`; takes its other arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, state_bits=8, **kwargs)


class PagedAdamW(AdamW):
    """`AdamW` with `paged=True`; takes its other arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, paged=True, **kwargs)


class PagedAdamW8bit(AdamW):
    """`AdamW` with `state_bits=8` and `paged=True`; takes its other arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, state_bits=8, paged=True, **kwargs)
