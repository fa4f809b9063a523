"""Examples as token ids; what is trained on goes by position, never by token value."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastlora.cli.console import UserError, note, reported
from fastlora.cli.data import Chat, Data, Example, Labelled, Message, Pair, Text
from fastlora.cli.settings import CHAT, PROMPT

IGNORED = -100  # torch's cross entropy skips this label
# input_ids and labels: one for each token, or the index of the class
Encoded = dict[str, Any]

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# numbers sort by value, as classes mostly do
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)


@dataclass(frozen=True)
class Dataset:
    """Encoded examples, and what the length limit did to them.

    Attributes:
        examples: input_ids and labels of each; labels are IGNORED where nothing is trained on, or
            one class index.
        cut: examples that lost their end.
        dropped: examples that are missing, because the limit left nothing to train on.
    """

    examples: list[Encoded]
    cut: int
    dropped: int

    @property
    def tokens(self) -> int:
        """All tokens of all examples."""
        return sum(len(example["input_ids"]) for example in self.examples)

    @cached_property
    def digest(self) -> str:
        """sha256 of all ids and labels: a run goes on with the very same examples."""
        total = hashlib.sha256()
        for example in self.examples:
            total.update(json.dumps([example["input_ids"], example["labels"]]).encode())
        return total.hexdigest()


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, template: str, prompt: str | list[Message]
) -> list[int]:
    """The token ids that stand before a completion, in training and in generation.

    Args:
        tokenizer: the model's; adds what it adds at the start of a text.
        template: contains {prompt}; the two characters backslash and n stand for a line break. Or
            `chat`: the prompt is what the user says in the tokenizer's chat template.
        prompt: the user's; a conversation goes into the chat template, whatever `template` says.

    Returns:
        Token ids without an end of sequence.

    Raises:
        UserError: the chat template is missing, or does not take the conversation.
    """
    if isinstance(prompt, str) and template == CHAT:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        text = _render(tokenizer, prompt, "prompt", add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    text = template.replace("\\n", "\n").replace(PROMPT, prompt)
    ids = tokenizer(text, verbose=False).input_ids
    # some tokenizers close every text
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode(
    data: Data, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int
) -> Dataset:
    """Tokenise what a causal language model is trained on.

    Completions and texts end with the end-of-sequence token, and answers in a conversation with
    what ends a turn in the chat template.

    Args:
        data: texts, prompts or conversations.
        tokenizer: the model's.
        template: see `prompt_ids`.
        max_length: tokens; the end of what is longer is cut.

    Returns:
        The encoded examples. Prompts, and all but the assistant's turns of a conversation, carry
        no labels.

    Raises:
        UserError: the tokenizer lacks what the data needs, the chat template does not take a
            conversation, or the limit leaves nothing.
    """
    if data.form == "label":
        raise UserError(
            "a language model must be trained on text, on prompt and completion or on messages, "
            f"got text and label in {data.path}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer must have an end-of-sequence token, got none")
    encoded, cut = [], 0
    for row in data.rows:
        ids, labels = _tokens(row, tokenizer, template)
        # nothing predicts the first token
        labels = [IGNORED, *labels[1:max_length]]
        if any(label != IGNORED for label in labels):
            cut += len(ids) > max_length
            encoded.append({"input_ids": ids[:max_length], "labels": labels})
    return _dataset(encoded, cut, data, "completions", max_length)


def encode_labelled(
    data: Data, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int
) -> Dataset:
    """Tokenise texts and number their classes.

    Args:
        data: texts with labels.
        tokenizer: the model's; adds its special tokens, and they stay where a text is cut.
        labels: the classes, in the order of their indices.
        max_length: tokens with the special ones; the end of what is longer is cut.

    Returns:
        The encoded examples; their labels are class indices.

    Raises:
        UserError: the data has no labels or one that is not in `labels`, or the limit leaves
            nothing.
    """
    indices = {label: index for index, label in enumerate(labels)}
    special = tokenizer.num_special_tokens_to_add()
    encoded, cut = [], 0
    for row in _labelled(data):
        if row.label not in indices:
            choices = ", ".join(labels)
            raise UserError(f"{row.where}: label must be one of {choices}, got {row.label!r}")
        ids = tokenizer(row.text, verbose=False).input_ids
        if min(len(ids), max_length) > special:
            cut += len(ids) > max_length
            if len(ids) > max_length:
                ids = tokenizer(row.text, truncation=True, max_length=max_length).input_ids
            encoded.append({"input_ids": ids, "labels": indices[row.label]})
    return _dataset(encoded, cut, data, "text", max_length)


def label_set(data: Data) -> list[str]:
    """The classes of labelled data.

    Args:
        data: texts with labels.

    Returns:
        Each label once; numbers by value, other names in alphabetical order.

    Raises:
        UserError: the data has no labels, or only one.
    """
    labels = {row.label for row in _labelled(data)}
    if len(labels) < 2:
        raise UserError(
            f"label must have at least 2 values, got only {min(labels)!r} in {data.path}"
        )
    numbers = all(_NUMBER.fullmatch(label) for label in labels)
    return sorted(labels, key=lambda label: (float(label) if numbers else 0.0, label))


def describe(dataset: Dataset, max_length: int) -> None:
    """Print what there is to train on, and what the length limit took away."""
    lost = [
        f"{count} {what} {max_length} tokens"
        for count, what in (
            (dataset.cut, "cut at"),
            (dataset.dropped, "dropped, nothing learnt in"),
        )
        if count
    ]
    parts = [f"{len(dataset.examples)} examples", f"{dataset.tokens} tokens", *lost]
    note("data", ", ".join(parts))


def _dataset(encoded: list[Encoded], cut: int, data: Data, what: str, max_length: int) -> Dataset:
    if not encoded:
        raise UserError(
            f"max-length must leave room for {what}, got {max_length} and no row of {data.path} "
            "that is short enough"
        )
    return Dataset(encoded, cut, len(data.rows) - len(encoded))


def _labelled(data: Data) -> list[Labelled]:
    rows = [row for row in data.rows if isinstance(row, Labelled)]
    if len(rows) < len(data.rows):
        raise UserError(f"classes must be learnt from text and label, got neither in {data.path}")
    return rows


def _tokens(
    row: Example, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a whole example."""
    if isinstance(row, Pair) and template == CHAT:
        turns = (("user", row.prompt), ("assistant", row.completion))
        row = Chat(row.where, [{"role": role, "content": content} for role, content in turns])
    if isinstance(row, Chat):
        return _chat(row, tokenizer)
    if isinstance(row, Pair):
        prompt = prompt_ids(tokenizer, template, row.prompt)
        learnt = tokenizer(row.completion, add_special_tokens=False, verbose=False).input_ids
    else:
        assert isinstance(row, Text)
        prompt, learnt = [], prompt_ids(tokenizer, PROMPT, row.text)
    learnt = [*learnt, tokenizer.eos_token_id]
    return prompt + learnt, [IGNORED] * len(prompt) + learnt


# --- conversations ---------------------------------------------------------------------------


def _chat(row: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    template = _template(tokenizer)
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer must be a fast one to learn from messages, "
            f"got {type(tokenizer).__name__}; or use data with prompt and completion"
        )
    if _MARKS_ANSWERS.search(template):
        return _marked(row, tokenizer)
    text = _render(tokenizer, row.messages, row.where)
    spans = _answers(row, text, tokenizer)
    ids, begins = _pieces(text, [start for start, _ in spans], tokenizer)
    learnt = [any(start <= begin < end for start, end in spans) for begin in begins]
    return ids, _masked(ids, learnt)


def _marked(row: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """By the tags that the template itself puts around what the assistant says."""
    output = _apply(
        tokenizer,
        row.messages,
        row.where,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    return output["input_ids"], _masked(output["input_ids"], output["assistant_masks"])


def _masked(ids: Sequence[int], learnt: Sequence[bool | int]) -> list[int]:
    return [token if kept else IGNORED for token, kept in zip(ids, learnt, strict=True)]


def _answers(row: Chat, text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Where each turn of the assistant begins and ends in the text of the conversation."""
    spans = []
    for index, turn in enumerate(row.messages):
        if turn["role"] == "assistant":
            where = f"{row.where}, turn {index + 1}"
            if index == 0:
                raise UserError(f"{where}: the assistant must answer a turn, got none before it")
            before = _render(tokenizer, row.messages[:index], where, add_generation_prompt=True)
            after = _render(tokenizer, row.messages[: index + 1], where)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"{where}: the chat template must leave a turn as it is when others follow, "
                    "got one that rewrites it; use data with prompt and completion"
                )
            # what follows the end of the turn is the template's, and nobody generates it
            spans.append((len(before), max(len(before), len(after.rstrip()))))
    return spans


def _pieces(
    text: str, starts: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of a text, and the character each begins at; an answer starts with a new token.

    The ids before a start are those that the text before it has alone, as in generation.
    """
    ids, begins, ends = _with_offsets(text, tokenizer)
    for start in starts:
        before = sum(begin < start for begin in begins)
        # where one token ends and the next begins, nothing was merged; elsewhere spaces may be
        # counted to neither, so that only the ids tell
        clear = 0 < before < len(ids) and ends[before - 1] == start == begins[before]
        if not clear and _with_offsets(text[:start], tokenizer)[0] != ids[:before]:
            return _broken(text, starts, tokenizer)
    return ids, begins


def _broken(
    text: str, starts: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """As `_pieces`, each piece tokenised alone."""
    ids, begins = [], []
    for start, end in itertools.pairwise((0, *starts, len(text))):
        piece, offsets, _ = _with_offsets(text[start:end], tokenizer)
        ids += piece
        # a token of spaces alone may be counted to what follows it
        begins += [min(start + offset, end - 1) for offset in offsets]
    return ids, begins


def _with_offsets(
    text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[int]]:
    # the template has written what stands at the start of a text
    output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    begins, ends = ([pair[side] for pair in output.offset_mapping] for side in (0, 1))
    return output.input_ids, begins, ends


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer must have a chat template, got none; "
            f"use data with prompt and completion, and a template with {PROMPT}"
        )
    with reported(ValueError):
        return tokenizer.get_chat_template()


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[Message], where: str, **extra: Any
) -> str:
    return _apply(tokenizer, turns, where, tokenize=False, **extra)


def _apply(
    tokenizer: PreTrainedTokenizerBase, turns: list[Message], where: str, **extra: Any
) -> Any:
    _template(tokenizer)
    # templates refuse what they do not take by an error of their own, or stumble over it
    about = f"{where}: the chat template must take the conversation, got "
    with reported(ImportError, LookupError, TemplateError, TypeError, ValueError, about=about):
        return tokenizer.apply_chat_template(turns, **extra)


# --- batches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collator:
    """Pads a batch on the right.

    Attributes:
        pad_id: any token id; often that of the end of sequence, so masks go by length.
    """

    pad_id: int

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad a batch: input_ids, attention_mask int64 [B, L], labels int64 [B, L] or [B]."""
        length = max(len(example["input_ids"]) for example in batch)
        ids, mask = (torch.full((len(batch), length), fill) for fill in (self.pad_id, 0))
        for row, example in enumerate(batch):
            ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
            mask[row, : len(example["input_ids"])] = 1
        labels = [example["labels"] for example in batch]
        if isinstance(labels[0], list):
            labels = [row + [IGNORED] * (length - len(row)) for row in labels]
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}
