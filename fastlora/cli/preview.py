"""One example as it is trained on, so that a person sees what is learnt and what is only given."""

import unicodedata
from collections.abc import Sequence
from itertools import groupby, pairwise

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fastlora.cli.console import console, note
from fastlora.cli.encoding import IGNORED, Dataset, Encoded

LONGEST = 1200  # characters
_SHORTEST = 40  # of a part, however many there are
_CUT = " … "
_MARKS = "⟦", "⟧"

Part = tuple[str, bool]  # text, and whether it is learnt


def show(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str] = ()) -> None:
    """Print the first example: dim what is only given, bold what is learnt.

    Where text has no styles, as in a file, brackets stand round what is learnt.

    Args:
        dataset: at least one example.
        tokenizer: the one it was encoded with.
        labels: the classes, for examples that have one.
    """
    example = dataset.examples[0]
    parts = _parts(example, tokenizer)
    if not isinstance(example["labels"], list):
        parts += [(" → ", False), (labels[example["labels"]], True)]
    styled = console.color_system is not None
    learnt = "bold, the rest dim" if styled else f"between {_MARKS[0]} and {_MARKS[1]}"
    note("sample", f"the first of {len(dataset.examples)} examples; what is learnt is {learnt}")
    text = Text()
    for part, kept in _shortened(parts):
        before, after = _MARKS if kept and not styled else ("", "")
        text.append(before + _visible(part) + after, "bold" if kept else "dim")
    text.rstrip()
    console.print(text, soft_wrap=True)


def _parts(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    ids, labels = example["input_ids"], example["labels"]
    if not isinstance(labels, list):
        labels = [IGNORED] * len(ids)
    runs = [(learnt, len([*run])) for learnt, run in groupby(labels, lambda x: x != IGNORED)]
    ends = [sum(length for _, length in runs[:count]) for count in range(1, len(runs) + 1)]
    # a run alone may lose its first space or half of a character
    texts = ["", *(tokenizer.decode(ids[:end], skip_special_tokens=False) for end in ends)]
    return [
        (after[_shared(before, after) :], learnt)
        for (before, after), (learnt, _) in zip(pairwise(texts), runs, strict=True)
    ]


def _shared(before: str, after: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(before, after, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(before), len(after)))


def _shortened(parts: list[Part]) -> list[Part]:
    """Cut the middle of long parts, so that each is still seen to begin and end."""
    most = LONGEST // _SHORTEST
    if len(parts) > most:
        parts = [*parts[:most], (_CUT, False)]
    limit = LONGEST
    while limit > _SHORTEST and sum(min(len(text), limit) for text, _ in parts) > LONGEST:
        limit -= 1
    half = limit // 2
    return [
        (text if len(text) <= limit else text[:half] + _CUT + text[-half:], learnt)
        for text, learnt in parts
    ]


def _visible(text: str) -> str:
    """Text without what a terminal would act on."""
    return "".join(
        ascii(c)[1:-1] if c != "\n" and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c
        for c in text
    )
