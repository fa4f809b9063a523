"""What `patch_peft` tells of a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PatchRow:
    """What runs a layer.

    Attributes:
        layer: its path in the model.
        weight: kind of base weight, such as "bfloat16" or "bitsandbytes nf4".
        adapters: names; active ones have a star.
        path: "fast"; "peft" where PEFT's own forward runs now; "base" without an adapter.
        reason: why it is not "fast".
    """

    layer: str
    weight: str
    adapters: str
    path: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """The layers of a model at the time of the call; `patch_peft` again gives a newer one.

    Attributes:
        rows: one for each layer with adapters, also of other kinds than LoRA, and for each 4-bit
            layer of bitsandbytes without any.
    """

    rows: tuple[PatchRow, ...]

    @property
    def fast(self) -> int:
        """How many layers with adapters run on `fastlora.ops`."""
        return sum(row.path == "fast" for row in self.rows)

    @property
    def fallbacks(self) -> dict[str, str]:
        """Path of each layer that runs PEFT's own forward -> the reason."""
        return {row.layer: row.reason for row in self.rows if row.path == "peft"}

    def __str__(self) -> str:
        """A table, a layer a line."""
        lines = [tuple(vars(row).values()) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [[c.ljust(n) for c, n in zip(line, widths, strict=True)] for line in lines]
        ours = len(self.rows) - len(self.fallbacks)
        head = f"{ours} of {len(self.rows)} layers run on fastlora"
        return "\n".join([head, *("  ".join(cells).rstrip() for cells in padded)])
