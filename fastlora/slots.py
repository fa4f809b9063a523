"""Where the modules of a model are held, so that one can be replaced wherever it is."""

from torch import nn

from fastlora.nn import keep_group

Slots = dict[int, list[tuple[nn.Module, str]]]


def find(root: nn.Module) -> Slots:
    """Every (parent, name) that holds a module: a shared module has several.

    Args:
        root: the model.

    Returns:
        id of each module below the root -> its places.
    """
    slots: Slots = {}
    for parent in root.modules():
        for name, child in parent._modules.items():
            slots.setdefault(id(child), []).append((parent, name))
    return slots


def replace(slots: Slots, old: nn.Module, new: nn.Module) -> None:
    """Put a module into all places of another, also in its group.

    Args:
        slots: from `find`; it still knows the places by the old module.
        old: the module to replace.
        new: what takes its place.
    """
    keep_group(old, new)
    for parent, name in slots[id(old)]:
        setattr(parent, name, new)
