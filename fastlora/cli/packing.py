"""Several examples in one row, each as if it were alone.

No mask goes with a packed row: transformers sees from position ids that restart where an example
ends, and lets no token attend past that border.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.cli.console import UserError, reported
from fastlora.cli.encoding import IGNORED, Encoded

# examples of two probe rows: long before short, so that what leaks into the second weighs most
_PROBE_LENGTHS = ((12, 5), (4, 7))
# how far logits may be off by rounding, relative to their size
_TOLERANCE = 1e-3
# in half precision it grows with the layers; there they may also be off by this share of what they
# are off where nothing keeps examples apart
_SHARE_IN_HALF = 0.2


def pack(examples: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Lay examples together in rows, by best fit, the longest first; none is split.

    Args:
        examples: with a label for each token.
        max_length: tokens in a row at most.

    Returns:
        The rows, in the order of their first examples: input_ids, labels that are ignored where an
        example begins, position_ids that restart there.

    Raises:
        ValueError: an example is longer than a row.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    if max(lengths, default=0) > max_length:
        raise ValueError(f"examples must have at most {max_length} tokens, got {max(lengths)}")
    return [_row([examples[index] for index in row]) for row in _best_fit(lengths, max_length)]


@dataclass(frozen=True)
class PackedCollator:
    """Pads packed rows on the right.

    Attributes:
        pad_id: any token id; padding is never looked at.
    """

    pad_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad a batch: input_ids, position_ids and labels, each int64 [B, L]."""
        length = max(len(row["input_ids"]) for row in batch)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": []}
        for row in batch:
            missing = length - len(row["input_ids"])
            # positions that restart make padding an example of its own
            fills = ([self.pad_id] * missing, [*range(missing)], [IGNORED] * missing)
            for (name, column), fill in zip(columns.items(), fills, strict=True):
                column.append(row[name] + fill)
        return {name: torch.tensor(column) for name, column in columns.items()}


def check(model: nn.Module) -> None:
    """Check that a model keeps packed examples apart, by running some packed and alone.

    Args:
        model: a causal language model as it will be trained: prepared, since a cache, which
            preparation turns off, hides the borders. Its mode and the state of the random numbers
            are left as they were.

    Raises:
        UserError: a token sees past the border of its example.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            apart = _keeps_apart(model.eval())
    finally:
        for module, mode in modes:
            module.training = mode
    if not apart:
        raise UserError(
            "packing must be of a model that keeps packed examples apart, "
            f"got {type(model).__name__}, which does not; use --group-by-length"
        )


def _best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    # space left -> rows that have it; the spaces in order, so that the search is short
    open_rows: dict[int, list[int]] = {}
    spaces: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect.bisect_left(spaces, lengths[index])
        if at < len(spaces):
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = space - lengths[index]
        if left not in open_rows:
            bisect.insort(spaces, left)
        open_rows.setdefault(left, []).append(row)
    return sorted(sorted(row) for row in rows)


def _row(examples: Sequence[Encoded]) -> Encoded:
    row: Encoded = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        # the last token of the example before would predict it
        row["labels"] += [IGNORED, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row


def _keeps_apart(model: nn.Module) -> bool:
    random = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    probes = [
        [torch.randint(vocabulary, (length,), generator=random).tolist() for length in lengths]
        for lengths in _PROBE_LENGTHS
    ]
    rows = [_row([{"input_ids": ids, "labels": ids} for ids in row]) for row in probes]
    batch = PackedCollator(0)(rows)
    ids, positions = batch["input_ids"], batch["position_ids"]
    # from the rows, what belongs to examples and not to padding
    kept = torch.tensor(
        [[column < sum(row) for column in range(ids.shape[1])] for row in _PROBE_LENGTHS]
    )
    packed = _logits(model, ids, positions)[kept]
    joined = _logits(model, ids, torch.arange(ids.shape[1]).expand_as(ids))[kept]
    alone = torch.cat(
        [
            _logits(model, torch.tensor([example]), torch.arange(len(example))[None])[0]
            for row in probes
            for example in row
        ]
    )
    allowed = _TOLERANCE * alone.norm()
    if model.dtype in (torch.float16, torch.bfloat16):
        allowed = max(allowed, _SHARE_IN_HALF * (joined - alone).norm())
    # what is not finite is not close either
    return bool((packed - alone).norm() <= allowed)


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    device = model.device
    # a model may not take position ids
    with reported(TypeError, about="packing must be of a model that takes position_ids, got "):
        output = model(input_ids=ids.to(device), position_ids=positions.to(device))
    return output.logits.cpu().double()
