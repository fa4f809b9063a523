"""Examples as token ids; what is trained on goes by position, never by token value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastlora.cli.console import UserError, note
from fastlora.cli.data import Example
from fastlora.cli.settings import PROMPT

IGNORED = -100  # torch's cross entropy skips this label
Encoded = dict[str, list[int]]


@dataclass(frozen=True)
class Dataset:
    """Encoded examples, and what the length limit did to them.

    Attributes:
        examples: input_ids and labels of each; labels are IGNORED where nothing is trained on.
        cut: examples that lost the end of their completion or text.
        dropped: examples that are missing, because their prompt alone fills the limit.
    """

    examples: list[Encoded]
    cut: int
    dropped: int

    @property
    def tokens(self) -> int:
        """All tokens of all examples."""
        return sum(len(example["input_ids"]) for example in self.examples)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, template: str, prompt: str) -> list[int]:
    """The token ids that stand before a completion, in training and in generation.

    Args:
        tokenizer: the model's; adds what it adds at the start of a text.
        template: contains {prompt}; the two characters backslash and n stand for a line break.
        prompt: the user's.

    Returns:
        Token ids without an end of sequence.
    """
    ids = tokenizer(template.replace("\\n", "\n").replace(PROMPT, prompt)).input_ids
    # some tokenizers close every text
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
) -> Dataset:
    """Tokenise examples; completions and texts end with the end-of-sequence token.

    Args:
        examples: what to train on.
        tokenizer: the model's.
        template: see `prompt_ids`.
        max_length: tokens; the end of what is longer is cut.

    Returns:
        The encoded examples. Prompts carry no labels.

    Raises:
        UserError: the tokenizer has no end-of-sequence token, or the limit leaves nothing.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer must have an end-of-sequence token, got none")
    encoded, cut = [], 0
    for example in examples:
        prompt, completion = _split(example, tokenizer, template)
        ids = (prompt + completion)[:max_length]
        # nothing predicts the first token
        masked = max(1, len(prompt))
        if len(ids) > masked:
            cut += len(prompt) + len(completion) > max_length
            encoded.append({"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]})
    if not encoded:
        raise UserError(
            f"max-length must leave room for completions, got {max_length} and no shorter prompt"
        )
    return Dataset(encoded, cut, len(examples) - len(encoded))


def describe(dataset: Dataset, max_length: int) -> None:
    """Print what there is to train on, and what the length limit took away."""
    lost = [
        f"{count} {what} at {max_length} tokens"
        for count, what in ((dataset.cut, "cut"), (dataset.dropped, "dropped, prompt too long"))
        if count
    ]
    parts = [f"{len(dataset.examples)} examples", f"{dataset.tokens} tokens", *lost]
    note("data", ", ".join(parts))


def _split(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[int]]:
    eos = tokenizer.eos_token_id
    if example.prompt is None:
        text = prompt_ids(tokenizer, PROMPT, example.completion)
        return [], [*text, eos]
    completion = tokenizer(example.completion, add_special_tokens=False).input_ids
    return prompt_ids(tokenizer, template, example.prompt), [*completion, eos]


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right.

    Attributes:
        pad_id: any token id; often that of the end of sequence, so masks go by length.
    """

    pad_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad a batch: input_ids, attention_mask and labels, each int64 [B, L]."""
        shape = len(batch), max(len(example["input_ids"]) for example in batch)
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, example in enumerate(batch):
            length = len(example["input_ids"])
            ids[row, :length] = torch.tensor(example["input_ids"])
            labels[row, :length] = torch.tensor(example["labels"])
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
