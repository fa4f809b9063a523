"""Which layers of a model read the same input, by their names."""

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from fastlora.nn import is_conv1d

# what the models of transformers call them
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


def find(root: nn.Module, group: bool | Sequence[Sequence[str]]) -> list[tuple[nn.Module, list]]:
    """Linear layers of one module, with equal in_features, that are named as siblings.

    A layer that stands at several places is left out.

    Args:
        root: the model.
        group: True for the usual names, False for none, or tuples of names.

    Returns:
        Each parent with the names of two or more of its children.

    Raises:
        ValueError: `group` is something else, or names of a tuple are not found beside another.
    """
    if isinstance(group, bool):
        return [*_find(root, SIBLINGS)] if group else []
    given = [names if isinstance(names, str) else tuple(names) for names in group]
    if any(isinstance(names, str) or len({*names}) < max(2, len(names)) for names in given):
        raise ValueError(f"group must be True, False or tuples of different names, got {group!r}")
    found = [*_find(root, given)]
    for names in given:
        unknown = {*names}.difference(*(some for _, some in found))
        if unknown:
            raise ValueError(
                f"group must name linear layers that stand beside one another and have equal "
                f"in_features, got {names} of which {sorted(unknown)} do not"
            )
    twice = Counter((id(parent), name) for parent, names in found for name in names)
    if twice and max(twice.values()) > 1:
        raise ValueError(f"group must name each layer once, got {group!r}")
    return found


def _find(
    root: nn.Module, wanted: Sequence[Sequence[str]]
) -> Iterator[tuple[nn.Module, list[str]]]:
    places = Counter(id(m) for parent in root.modules() for m in parent._modules.values())
    for parent in root.modules():
        for names in wanted:
            alike: dict[int, list[str]] = {}
            for name in names:
                layer = parent._modules.get(name)
                if places[id(layer)] == 1 and (isinstance(layer, nn.Linear) or is_conv1d(layer)):
                    alike.setdefault(_in_features(layer), []).append(name)
            yield from ((parent, found) for found in alike.values() if len(found) > 1)


def _in_features(layer: nn.Module) -> int:
    return layer.nx if is_conv1d(layer) else layer.in_features
