"""What README.md shows: its blocks, which the tests run."""

import re

from helpers import ROOT

README = (ROOT / "README.md").read_text()
# a second word names the stack that a block needs
_BLOCK = re.compile(r"^```(\w+(?: \w+)?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """Source of every block in `language`, padded so that line numbers are the README's."""
    found = [m for m in _BLOCK.finditer(README) if m[1] == language]
    return ["\n" * README.count("\n", 0, m.start(2)) + m[2] for m in found]
