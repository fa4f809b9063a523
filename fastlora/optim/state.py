"""The moments of an optimizer as a state dict, and back: by parameter name, whatever the layout.

    {"version": 1, "bits": 8 or 32, "runs": [{"names": [...], "shapes": [...], "steps": [...],
     "exp_avg": [n], "exp_avg_sq": [n], with 8 bits "exp_avg_scale", "exp_avg_sq_scale"}, ...]}

Moments of parameters that lie as they did are copied bit by bit. 8-bit moments of others are
decoded and encoded again, unless their blocks begin and end with the parameter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastlora.codebooks import dynamic_map, unsigned_dynamic_map
from fastlora.optim.flat import BLOCK, Flat, Moments, StateBits
from fastlora.optim.reference import decode, encode
from fastlora.optim.run import DeviceState, Run

VERSION = 1
_KEYS = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")  # of Moments.tensors()
# of one parameter: torch's and bitsandbytes' names
_MOMENTS = (("exp_avg", "exp_avg_sq"), ("state1", "state2"))
_WRAPPED = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class Saved:
    """A run as it was saved, on the CPU.

    Attributes:
        names: of the parameters.
        shapes: of each.
        steps: how many each has made.
        moments: of all, one after another.
    """

    names: Sequence[str]
    shapes: Sequence[Sequence[int]]
    steps: Sequence[int]
    moments: Moments

    @property
    def bits(self) -> StateBits:
        """Of a moment."""
        return self.moments.bits

    @cached_property
    def flat(self) -> Flat:
        """Where the parameters lie."""
        return Flat(tuple(math.prod(shape) for shape in self.shapes))

    @cached_property
    def full(self) -> Moments:
        """In fp32."""
        return decode(self.moments) if self.bits == 8 else self.moments


Where = Mapping[str, tuple[Saved, int]]  # of each parameter: the run and its place there


# --- writing ---------------------------------------------------------------------------------


def snapshot(states: Sequence[DeviceState], bits: StateBits) -> list[Saved]:
    """Copies of all moments on the CPU.

    Args:
        states: of an optimizer.
        bits: of a moment.

    Returns:
        One a run.
    """
    found = []
    for state in states:
        whole = [_empty(run.flat.numel, bits) for run in state.runs]
        for span in state.store.read():
            end = span.first + span.moments.numel
            whole[span.run].part(span.first, end).copy_(span.moments)
        for run, its in zip(state.runs, whole, strict=True):
            found.append(Saved([*run.names], [[*p.shape] for p in run.params], [*run.steps], its))
    return found


def dump(runs: Sequence[Saved], bits: StateBits) -> dict[str, Any]:
    """The state dict of runs: see the top of this file; empty without runs."""
    if not runs:
        return {}
    return {"version": VERSION, "bits": bits, "runs": [_dump(run) for run in runs]}


def _dump(run: Saved) -> dict[str, Any]:
    facts = {"names": [*run.names], "shapes": [[*s] for s in run.shapes], "steps": [*run.steps]}
    return {**facts, **dict(zip(_KEYS, run.moments.tensors(), strict=False))}


def _empty(numel: int, bits: StateBits) -> Moments:
    """Zero moments on the CPU, each in memory of its own, as `torch.save` wants it."""
    if bits == 32:
        return Moments(*(torch.zeros(numel, device="cpu") for _ in range(2)))
    codes = (torch.zeros(numel, dtype=torch.uint8, device="cpu") for _ in range(2))
    scales = (torch.zeros(-(-numel // BLOCK), device="cpu") for _ in range(2))
    return Moments(*codes, *scales)


# --- reading ---------------------------------------------------------------------------------


def parse(state: Mapping[Any, Any], names: Sequence[str], bits: StateBits) -> list[Saved]:
    """Runs of a state dict.

    Args:
        state: from `dump`; or of `torch.optim.AdamW` or bitsandbytes: place -> tensors of that
            parameter.
        names: of the optimizer's parameters, by place.
        bits: of the optimizer.

    Returns:
        The runs.

    Raises:
        ValueError: the state has another number of bits, or is of no known kind.
    """
    if not state:
        return []
    if "version" in state:
        if state["version"] != VERSION:
            raise ValueError(f"version must be {VERSION}, got {state['version']}")
        runs = [_parse(run) for run in state["runs"]]
    else:
        runs = [_parse_one(names, place, its) for place, its in state.items()]
    widths = {run.bits for run in runs}
    if bits not in widths or (bits == 32 and widths != {32}):
        saved = " and ".join(str(width) for width in sorted(widths))
        raise ValueError(f"state_bits must be that of the state dict ({saved}), got {bits}")
    return runs


def _parse(run: Mapping[str, Any]) -> Saved:
    tensors = [run[key].cpu() for key in _KEYS if key in run]
    return _sized(Saved(run["names"], run["shapes"], run["steps"], Moments(*tensors)))


def _sized(saved: Saved) -> Saved:
    """The same run, if its tensors are as large as its parameters."""
    numel, tensors = saved.flat.numel, saved.moments.tensors()
    blocks = [-(-numel // BLOCK)] if saved.bits == 8 else []
    expected = [(n,) for n in (numel, *blocks) for _ in range(2)]
    if [t.shape for t in tensors] != expected or len(saved.steps) != len(saved.names):
        sizes, some = [[*t.shape] for t in tensors], _some(saved.names)
        raise ValueError(
            f"moments of {some} must be those of {numel} elements, got tensors of {sizes}"
        )
    return saved


def _parse_one(names: Sequence[str], place: Any, its: Mapping[str, Any]) -> Saved:
    if not isinstance(place, int) or not 0 <= place < len(names):
        raise ValueError(f"parameters must be 0 to {len(names) - 1}, got state of {place!r}")
    its = {**its, **its.get(_WRAPPED, {})}
    keys = next((keys for keys in _MOMENTS if keys[0] in its and keys[1] in its), None)
    if keys is None:
        kinds = " or ".join(" and ".join(keys) for keys in _MOMENTS)
        raise ValueError(f"state of {names[place]} must hold {kinds}, got {[*its]}")
    m, v = (its[key].cpu() for key in keys)
    wanted = ("absmax1", "absmax2") if _is_8_bit(m) else ()
    if any(key not in its for key in wanted):
        raise ValueError(f"state of {names[place]} must hold {' and '.join(wanted)}, got {[*its]}")
    scales = [its[key].cpu().float() for key in wanted]
    flat = [t.reshape(-1) if _is_8_bit(t) else t.reshape(-1).float() for t in (m, v)]
    run = Saved([names[place]], [[*m.shape]], [int(its["step"])], Moments(*flat, *scales))
    return _sized(run)


def _is_8_bit(t: Tensor) -> bool:
    return t.dtype == torch.uint8


def check(
    runs: Sequence[Saved], shapes: Mapping[str, Sequence[int]], needed: Sequence[str]
) -> None:
    """Compare what was saved with what is there.

    Args:
        runs: from `parse`.
        shapes: of the optimizer's parameters by name.
        needed: names of those that must have been saved.

    Raises:
        ValueError: a parameter is missing, unknown or of another shape.
    """
    saved = {name: [*s] for run in runs for name, s in zip(run.names, run.shapes, strict=True)}
    missing = [name for name in needed if name not in saved]
    unknown = [name for name in saved if name not in shapes]
    if missing or unknown:
        parts = {"without state": missing, "not in this optimizer": unknown}
        facts = "; ".join(f"{what}: {_some(names)}" for what, names in parts.items() if names)
        raise ValueError(f"the state dict must be of the parameters of this optimizer, got {facts}")
    for name, shape in saved.items():
        if shape != [*shapes[name]]:
            raise ValueError(f"state of {name} must be of shape {[*shapes[name]]}, got {shape}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def restore(runs: Sequence[Saved], states: Sequence[DeviceState]) -> None:
    """Write what was saved into an optimizer; parameters that were not begin anew.

    Args:
        runs: from `parse`, checked.
        states: of the optimizer.
    """
    places = _places(runs)
    for state in states:
        spans = state.store.read()
        for number, run in enumerate(state.runs):
            where = _known(run, places)
            whole = _assemble(run, where, spans[0].moments.bits)
            for span in spans:
                if span.run == number:
                    span.moments.copy_(whole.part(span.first, span.first + span.moments.numel))
            for i, name in enumerate(run.names):
                saved, place = where.get(name, (None, 0))
                run.steps[i] = saved.steps[place] if saved else 0
        state.store.wrote()


def _places(runs: Sequence[Saved]) -> Where:
    return {name: (run, i) for run in runs for i, name in enumerate(run.names)}


def _known(run: Run, places: Where) -> Where:
    """Those of its parameters; one of another size has taken the name of another."""
    named = zip(run.names, run.flat.sizes, strict=True)
    found = {name: (places[name], size) for name, size in named if name in places}
    return {n: (old, i) for n, ((old, i), size) in found.items() if old.flat.sizes[i] == size}


def _assemble(run: Run, where: Where, bits: StateBits) -> Moments:
    """Moments of a run out of those of its parameters."""
    first, _ = where.get(run.names[0], (None, 0))
    if first is not None and first.bits == bits:
        n = len(first.names)
        same = run.names[:n] == [*first.names] and run.flat.sizes[:n] == first.flat.sizes
        if same and not any(name in where for name in run.names[n:]):
            return _longer(first.moments, run.flat.numel, bits)
    return _gather(run.names, run.flat.sizes, where, bits)


def _longer(some: Moments, numel: int, bits: StateBits) -> Moments:
    """Moments as they are, and zeros after them."""
    whole = _empty(numel, bits)
    if bits == 8:
        encode(_empty(numel, 32), whole)  # the code of zero is not 0
    whole.part(0, some.numel).copy_(some)
    return whole


def _gather(names: Sequence[str], sizes: Sequence[int], where: Where, bits: StateBits) -> Moments:
    """Moments of parameters that lie one after another, zero where nothing was saved."""
    flat = Flat(tuple(sizes))
    whole = _empty(flat.numel, 32)
    exact = []
    for name, start, size in zip(names, flat.starts, sizes, strict=False):
        if name not in where:
            continue
        saved, i = where[name]
        begin = saved.flat.starts[i]
        whole.part(start, start + size).copy_(saved.full.part(begin, begin + size))
        if saved.bits == 8 and _alone(flat, start, size) and _alone(saved.flat, begin, size):
            exact.append((start, size, saved.moments.part(begin, begin + size)))
    if bits == 32:
        return whole
    coded = _empty(flat.numel, 8)
    encode(whole, coded)
    for start, size, part in exact:
        coded.part(start, start + size).copy_(part)
    return coded


def _alone(flat: Flat, start: int, size: int) -> bool:
    """Whether no other parameter is in the blocks of this one."""
    return start % BLOCK == 0 and ((start + size) % BLOCK == 0 or start + size == flat.numel)


# --- for others ------------------------------------------------------------------------------


def bitsandbytes_state(runs: Sequence[Saved], names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The state of bitsandbytes' AdamW: each parameter has blocks of its own there.

    Args:
        runs: from `snapshot`.
        names: of the optimizer's parameters, by place.

    Returns:
        place -> step, state1, state2, and with 8 bits absmax1, absmax2, qmap1, qmap2.
    """
    where = _places(runs)
    found = {}
    for place, name in enumerate(names):
        if name not in where:
            continue
        run, i = where[name]
        alone = _gather([name], [run.flat.sizes[i]], where, run.bits)
        shaped = {"state1": alone.m.view(run.shapes[i]), "state2": alone.v.view(run.shapes[i])}
        if run.bits == 8:
            maps = {"qmap1": dynamic_map(), "qmap2": unsigned_dynamic_map()}
            shaped |= {"absmax1": alone.m_scale, "absmax2": alone.v_scale, **maps}
        found[place] = {"step": run.steps[i], **shaped}
    return found
