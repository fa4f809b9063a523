"""One linear layer of a call, and a call's layers as flat lists, which autograd and graphs want."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from fastlora.nf4 import FLOATS, NF4Weight

T = TypeVar("T")

_DENSE, _FLAT, _NESTED = 0, 1, 2
_TENSORS = {_DENSE: 1, _FLAT: 2, _NESTED: 5}  # of one weight


@dataclass(frozen=True, eq=False)
class Member:
    """A linear layer, with or without LoRA, over a dense or an NF4 weight.

    Attributes:
        weight: [N, K].
        bias: [N], any float dtype.
        a: [R, K], any float dtype. The down-projection; None without LoRA.
        b: [N, R], any float dtype. The up-projection; None without LoRA.
        scale: alpha / R, no unit.
    """

    weight: Tensor | NF4Weight
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 0.0

    @property
    def quantised(self) -> bool:
        """Whether the weight is NF4."""
        return isinstance(self.weight, NF4Weight)

    @property
    def N(self) -> int:
        """out_features."""
        return self.weight.shape[0]

    @property
    def K(self) -> int:
        """in_features."""
        return self.weight.shape[1]

    @property
    def R(self) -> int:
        """Rank, 0 without LoRA."""
        return 0 if self.a is None else self.a.shape[0]


@dataclass(frozen=True)
class Flat:
    """Members as lists: the tensors, and the numbers that say what they are.

    Attributes:
        tensors: of each member: those of the weight, then bias, a and b where there are.
        facts: of each member seven integers: kind of weight, N, K, block size, index of the
            dtype it was quantised from, whether there is a bias, whether there is LoRA.
        scales: one per member.
    """

    tensors: list[Tensor]
    facts: list[int]
    scales: list[float]


_FACTS = 7


def flatten(members: Sequence[Member]) -> Flat:
    """Members as lists."""
    flat = Flat([], [], [])
    for m in members:
        if m.quantised:
            shape, blocksize, dtype = m.weight.facts
            tensors = [t for t in m.weight.tensors() if t is not None]
            kind = [_NESTED if m.weight.nested else _FLAT, *shape, blocksize, FLOATS.index(dtype)]
        else:
            tensors, kind = [m.weight], [_DENSE, *m.weight.shape, 0, 0]
        flat.tensors.extend(tensors)
        flat.tensors.extend(t for t in (m.bias, m.a, m.b) if t is not None)
        flat.facts.extend([*kind, int(m.bias is not None), int(m.a is not None)])
        flat.scales.append(m.scale)
    return flat


def unflatten(flat: Flat) -> list[Member]:
    """The members again."""
    facts, parts = _chunks(flat.facts), split(flat.tensors, flat.facts)
    return [_member(*of_one) for of_one in zip(facts, parts, flat.scales, strict=True)]


def sizes(facts: Sequence[int]) -> list[tuple[int, int]]:
    """N and K of each member, from `Flat.facts`."""
    return [(N, K) for _, N, K, *_ in _chunks(facts)]


def owners(facts: Sequence[int]) -> list[int]:
    """The member that each of `Flat.tensors` belongs to, from `Flat.facts`."""
    return [
        i
        for i, (kind, _, _, _, _, has_bias, has_lora) in enumerate(_chunks(facts))
        for _ in range(_TENSORS[kind] + has_bias + 2 * has_lora)
    ]


def split(tensors: Sequence[T], facts: Sequence[int]) -> list[dict[str, T | list[T]]]:
    """What belongs to each member: "weight" (a list), and "bias", "a", "b" where there are.

    Args:
        tensors: as long as `Flat.tensors`: those, or one value for each, such as its gradient.
        facts: `Flat.facts`.

    Returns:
        name -> value, one dict per member, in the order of the list.
    """
    parts, i = [], 0
    for kind, _, _, _, _, has_bias, has_lora in _chunks(facts):
        part = {"weight": [*tensors[i : i + _TENSORS[kind]]]}
        i += _TENSORS[kind]
        for name in ("bias",) * has_bias + ("a", "b") * has_lora:
            part[name] = tensors[i]
            i += 1
        parts.append(part)
    return parts


def _member(fact: Sequence[int], part: dict, scale: float) -> Member:
    kind, N, K, blocksize, dtype, *_ = fact
    weight = part["weight"]
    if kind == _DENSE:
        weight = weight[0]
    else:
        tensors = [*weight, None, None, None][:5]
        weight = NF4Weight.unchecked(((N, K), blocksize, FLOATS[dtype]), tensors)
    return Member(weight, part.get("bias"), part.get("a"), part.get("b"), scale)


def _chunks(facts: Sequence[int]) -> list[Sequence[int]]:
    return [facts[i : i + _FACTS] for i in range(0, len(facts), _FACTS)]
