"""Layers that read the same input compute together, though the model calls them one by one.

The member that is called first computes for all of them (`ops.linear_group`: one autograd node, one
dropout mask); the others take their outputs when they are called with the same tensor. A member
takes only what it would compute itself: x, weights, adapter, autograd and autocast must be what
they were at the first call. Otherwise it computes anew, alone or for those it still shares with.

What nobody took is dropped at the next call of any grouped layer in the same thread, with x, or at
the end of the backward that computed it anew.
"""

import threading
import weakref
from collections.abc import Iterable, Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastlora import ops
from fastlora.member import Member

_GROUP, _HOME = "fastlora_group", "fastlora_home"  # attributes of a layer, and of its parent


class Settings(NamedTuple):
    """Settings that the adapter of a layer runs with.

    Attributes:
        adapter: its name.
        dropout: its probability now, in [0, 1).
        scale: alpha / R, no unit.
    """

    adapter: str
    dropout: float
    scale: float

    def joins(self, other: "Settings") -> bool:
        """Whether layers with these compute as one: they have one adapter and one dropout mask."""
        return (self.adapter, self.dropout) == (other.adapter, other.dropout)


class GroupedLinear(nn.Linear):
    """A linear layer that may be a member of a `Group`; without one it computes alone."""

    @property
    def keeper(self) -> nn.Module:
        """The module that remembers the group: it stays when adapters come and go."""
        return self

    @property
    def group(self) -> "Group | None":
        """The group that the layer belongs to."""
        return group_of(self)

    @property
    def lora(self) -> Settings | None:
        """Settings of the running adapter; None without one."""
        return None

    @property
    def runs_itself(self) -> bool:
        """Whether the layer computes, and no other layer in its place."""
        return True

    def sources(self) -> list[Tensor]:
        """All tensors that the output depends on, beside x; the weight is the first."""
        raise NotImplementedError

    def member(self) -> Member:
        """The layer with its running adapter as `ops.linear_group` takes it."""
        raise NotImplementedError

    def alone(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K], without a group."""
        settings = self.lora
        p = settings.dropout if settings else 0.0
        return ops.linear_group(x, [self.member()], p)[0]

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K]; see `ops.linear_group`."""
        # a graph of torch.compile sees all layers at once
        if torch.compiler.is_compiling() or self.group is None:
            return self.alone(x)
        y = _together(self, x)
        return self.alone(x) if y is None else y


class Group:
    """Children of one module that are expected to read the same input.

    They are looked up at each call, by name, so that they may be replaced.

    Args:
        parent: the module, held weakly; None in a copy of a layer without its parent.
        names: of its children, in the order in which their outputs are computed.
    """

    def __init__(self, parent: nn.Module | None, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._home = None if parent is None else weakref.ref(parent)
        self._wasted = 0  # calls in a row after which an output was left over
        self._leaving: list[str] = []
        self._recomputable: weakref.WeakSet = weakref.WeakSet()

    def __reduce__(self) -> tuple:
        """Copies and pickles: the copy of the parent, if there is one, makes itself known."""
        return Group, (None, self.names)

    @property
    def parent(self) -> nn.Module | None:
        """The module whose children the members are."""
        return None if self._home is None else self._home()

    def children(self) -> dict[str, nn.Module]:
        """The children that are there now; none in a copy of a layer without its parent."""
        parent = self.parent
        modules = {} if parent is None else parent._modules
        return {name: modules[name] for name in self.names if modules.get(name) is not None}

    def members(
        self, layer: GroupedLinear, x: Tensor, autocast: bool
    ) -> "dict[GroupedLinear, _State]":
        """Those for whom `layer` can compute.

        Args:
            layer: the caller.
            x: [..., K], its input.
            autocast: whether autocast is on for the device of x.

        Returns:
            layer -> its state, in the group's order; empty if the caller cannot compute together.
        """
        if _has_any_global_hook():
            return {}
        states = {c: _State(c) for c in self.children().values() if self._is_ready(c)}
        states = {c: state for c, state in states.items() if state.fits(layer, x, autocast)}
        if layer not in states:
            return {}
        # one adapter and one dropout mask: the caller's. A caller without adapter draws no mask, so
        # that a recomputation draws as many as the forward, even if the group was divided since
        undropped = (s.lora for s in states.values() if s.lora and not s.lora.dropout)
        lead = states[layer].lora or next(undropped, None)
        return {
            c: state
            for c, state in states.items()
            if state.lora is None or (lead and state.lora.joins(lead))
        }

    def waste(self, names: list[str], certain: bool) -> None:
        """Learn that these members did not take what was computed for them.

        Where it is certain that they read another tensor, or at the second time in a row, they
        become a group of their own, for good.

        Args:
            names: of the members.
            certain: whether one of them was called with another tensor.
        """
        self._wasted += 1
        if not self._leaving and (certain or self._wasted > 1):
            self._leaving = names
        self.settle()

    def served(self) -> None:
        """Learn that all members took what was computed for them."""
        self._wasted = 0

    def settle(self) -> None:
        """Let those go that are to leave, unless what was computed may have to be repeated.

        Checkpointing compares what a recomputation saves with what the forward saved.
        """
        if not self._leaving or self._recomputable or torch._C._current_graph_task_id() != -1:
            return
        # not those that were taken away or put into another group meanwhile
        own = [name for name, child in self.children().items() if group_of(child) is self]
        for leaving in (False, True):
            group_layers(self.parent, [n for n in own if (n in self._leaving) is leaving])

    def may_be_recomputed(self, node: torch.autograd.graph.Node) -> None:
        """Remember a node of autograd until its backward has run or its graph is gone.

        Args:
            node: that of the outputs.
        """
        nodes, held = self._recomputable, weakref.ref(node)
        nodes.add(node)
        node.register_hook(lambda *_: nodes.discard(held()))

    def _is_ready(self, child: nn.Module) -> bool:
        return (
            isinstance(child, GroupedLinear)
            and type(child).forward is GroupedLinear.forward
            and child.group is self
            and child.runs_itself
            and not is_hooked(child)
        )


class _State:
    """What the output of a layer depends on, beside x."""

    def __init__(self, layer: GroupedLinear) -> None:
        self.in_features, self.lora = layer.in_features, layer.lora
        self.sources = layer.sources()
        # tensors made in inference mode have no version
        self.facts = [
            None if t.is_inference() else (t._version, t.requires_grad) for t in self.sources
        ]

    def is_same(self, other: "_State") -> bool:
        """Whether the output is the same."""
        return (
            self.lora == other.lora
            and self.facts == other.facts
            and all(map(is_, self.sources, other.sources))
        )

    def fits(self, caller: GroupedLinear, x: Tensor, autocast: bool) -> bool:
        """Whether the layer could read x: else only the layer, not the caller, may raise for it."""
        first, last = self.sources[0], self.sources[-1]
        return (
            self.in_features == caller.in_features
            and (autocast or first.dtype in (x.dtype, torch.uint8))
            and first.device == last.device == x.device
            and None not in self.facts
        )


class _Call:
    """What the first member computed for the others."""

    def __init__(
        self,
        group: Group,
        x: Tensor,
        context: tuple,
        outputs: dict[GroupedLinear, tuple[_State, Tensor]],
    ) -> None:
        self.group, self.version, self.context = group, x._version, context
        self.waiting = {id(layer) for layer in outputs}
        self.outputs = kept = {id(layer): output for layer, output in outputs.items()}
        # a graph keeps its x alive: this serves where there is none, and a model that is deleted
        self._x, self._parent = (weakref.ref(o, lambda _: kept.clear()) for o in (x, group.parent))

    def reads(self, x: Tensor) -> bool:
        """Whether x is what was read, unchanged."""
        return self._x() is x and x._version == self.version

    def take(self, layer: GroupedLinear, context: tuple) -> Tensor | None:
        """The output of a layer, once, if it would compute the same now."""
        state, y = self.outputs.get(id(layer), (None, None))
        if y is None or context != self.context or not state.is_same(_State(layer)):
            return None
        del self.outputs[id(layer)]
        self.waiting.remove(id(layer))
        if not self.waiting:
            _last.call = None
            self.group.served()
        return y

    def end(self, layer: GroupedLinear, x: Tensor) -> None:
        """Drop what is left, because `layer` is called with x."""
        _last.call = None
        self.outputs.clear()
        children = self.group.children()
        names = [name for name, child in children.items() if id(child) in self.waiting]
        self.group.waste(names, certain=id(layer) in self.waiting and not self.reads(x))


class _Last(threading.local):
    """The one call of a thread whose outputs are not all taken."""

    call: _Call | None = None


_last = _Last()


def _together(layer: GroupedLinear, x: Tensor) -> Tensor | None:
    """The output of a layer that has a group; None if it has to compute alone."""
    call = _last.call
    if x.is_inference() or torch.is_inference_mode_enabled():  # versions are not counted there
        if call is not None and not call.reads(x):
            call.end(layer, x)
        return None
    context = autocast, _, hooks, *_ = _context(x)
    if call is not None and call.reads(x):
        y = call.take(layer, context)
        if y is not None:
            return y
    group, members = _find(layer, x, autocast is not None)
    if len(members) < 2:
        return None
    if call is not None:
        call.end(layer, x)
        group, members = _find(layer, x, autocast is not None)  # it may have been divided
        if len(members) < 2:
            return None
    p = next((state.lora.dropout for state in members.values() if state.lora), 0.0)
    ys = ops.linear_group(x, [m.member() for m in members], p)
    outputs = dict(zip(members, zip(members.values(), ys, strict=True), strict=True))
    _, y = outputs.pop(layer)
    if hooks is not None and y.grad_fn is not None:
        group.may_be_recomputed(y.grad_fn)
    _last.call = call = _Call(group, x, context, outputs)
    if torch._C._current_graph_task_id() != -1:
        # a recomputation stops early, and on a GPU the thread of autograd may have no next call
        torch.autograd.Variable._execution_engine.queue_callback(call.outputs.clear)
    return y


def _find(
    layer: GroupedLinear, x: Tensor, autocast: bool
) -> tuple[Group | None, dict[GroupedLinear, _State]]:
    """The group of a layer, and those for whom it can compute."""
    if layer.group is not None:
        layer.group.settle()
    group = layer.group  # another one, if it was divided
    return group, {} if group is None else group.members(layer, x, autocast)


def group_layers(parent: nn.Module, names: Sequence[str]) -> None:
    """Make children of a module a group, or no group if there is only one.

    Args:
        parent: the module.
        names: of its children.
    """
    keepers = [_keeper(parent._modules[name]) for name in names]
    if len(keepers) < 2:
        for keeper in keepers:
            ungroup(keeper)
        return
    group = Group(parent, names)
    for keeper in keepers:
        vars(keeper)[_GROUP] = group
    vars(parent)[_HOME] = _Home(parent)


def ungroup(module: nn.Module) -> None:
    """Take a module out of its group, or make it no parent of groups.

    Args:
        module: any module.
    """
    for name in (_GROUP, _HOME):
        vars(module).pop(name, None)


def group_of(layer: nn.Module) -> Group | None:
    """The group of a layer, also of a dense one that has no adapter yet."""
    return vars(_keeper(layer)).get(_GROUP)


def keep_group(old: nn.Module, new: nn.Module) -> None:
    """Let a module that replaces another one under its name be in the same group.

    Args:
        old: the module that goes.
        new: the module that comes.
    """
    group = group_of(old)
    if group is not None:
        vars(_keeper(new))[_GROUP] = group


class _Home:
    """In a parent: tells the groups of its children where they are, in copies and pickles too.

    The groups do not say so themselves, or the copy of one layer would copy everything around it.
    """

    def __init__(self, parent: nn.Module | None, groups: Iterable[Group] = ()) -> None:
        self._parent = None if parent is None else weakref.ref(parent)
        for group in groups:
            group._home = self._parent

    def __reduce__(self) -> tuple:
        parent = None if self._parent is None else self._parent()
        children = () if parent is None else parent.children()
        groups = {id(g): g for g in map(group_of, children) if g is not None}
        return _Home, (parent, [*groups.values()])


def _keeper(module: nn.Module) -> nn.Module:
    return module.keeper if isinstance(module, GroupedLinear) else module


def is_hooked(module: nn.Module) -> bool:
    """Whether others run before or after a module, or instead of it (accelerate)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_hf_hook" in module.__dict__
    )


def _context(x: Tensor) -> tuple:
    """What an output depends on beside x and the layer: its first entry is autocast's dtype.

    Outputs that are made under other hooks on saved tensors, as by checkpointing, or on another
    stream are not shared.
    """
    autocast = ops.autocast_dtype(x.device)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return autocast, torch.is_grad_enabled(), hooks, x.requires_grad, stream
