"""Completions: one after the other as they come, or of many prompts at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from fastlora.cli.console import UserError, reported
from fastlora.cli.data import Message
from fastlora.cli.encoding import CHAT, prompt_ids
from fastlora.cli.models import Base

Prompt = str | list[Message]
_ANSWER = "fastlora"  # what the assistant says to find out what follows it


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen.

    Attributes:
        temperature: of the softmax; 0: the likeliest token is taken.
        top_p: share of the probability that is drawn from, the likeliest first.
    """

    temperature: float = 0.0
    top_p: float = 1.0


GREEDY = Choice()


def stream(
    base: Base, prompt: Prompt, template: str, max_new_tokens: int, choice: Choice = GREEDY
) -> str:
    """Complete one prompt and print the tokens as they come.

    Args:
        base: the model, with or without an adapter, in eval mode.
        prompt: what to complete.
        template: as in training.
        max_new_tokens: at most.
        choice: of tokens.

    Returns:
        The completion.
    """
    printer = TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    rows = encoded(base, [prompt], template)
    try:
        output = _generate(
            base, rows, _stops(base, template, prompt), max_new_tokens, choice, printer
        )
    except KeyboardInterrupt:
        print(flush=True)  # what follows begins a line
        raise
    return base.tokenizer.decode(output[0], skip_special_tokens=True)


def complete(
    base: Base,
    prompts: Sequence[Prompt],
    template: str,
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Complete prompts greedily.

    Args:
        base: the model, with or without an adapter, in eval mode.
        prompts: what to complete.
        template: as in training.
        max_new_tokens: of each completion.
        batch_size: prompts at once; padded on the left.
        advance: told how many prompts are done, after every batch.

    Returns:
        A completion for each prompt.
    """
    rows = encoded(base, prompts, template)
    stops = _stops(base, template, *prompts[:1])
    # of about the same length together: less padding
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    completions = [""] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        output = _generate(base, [rows[index] for index in chosen], stops, max_new_tokens)
        texts = base.tokenizer.batch_decode(output, skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            completions[index] = text
        if advance is not None:
            advance(len(chosen))
    return completions


def complete_lines(
    base: Base, prompts: Sequence[Prompt], template: str, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Complete prompts greedily and take the first line that is not empty.

    Args:
        base: the model, with or without an adapter, in eval mode.
        prompts: what to complete.
        template: as in training.
        max_new_tokens: of each completion.
        batch_size: prompts at once; padded on the left.

    Returns:
        One line for each prompt, without surrounding space.
    """
    texts = complete(base, prompts, template, max_new_tokens, batch_size)
    return [text.strip().split("\n")[0].rstrip() for text in texts]


def encoded(base: Base, prompts: Sequence[Prompt], template: str) -> list[list[int]]:
    """Prompts as token ids.

    Args:
        base: has the tokenizer.
        prompts: what to complete.
        template: as in training.

    Returns:
        Token ids of each.

    Raises:
        UserError: one has no tokens, or does not fit the chat template.
    """
    rows = [prompt_ids(base.tokenizer, template, prompt) for prompt in prompts]
    if not all(rows):
        raise UserError("prompt must have at least one token, got none")
    return rows


@torch.inference_mode()
def _generate(
    base: Base,
    rows: Sequence[list[int]],
    stops: list[int],
    max_new_tokens: int,
    choice: Choice = GREEDY,
    streamer: TextStreamer | None = None,
) -> Tensor:
    """New token ids, int64 [B, up to max_new_tokens]; prompts are padded on the left."""
    length = max(map(len, rows))
    pad = base.pad_id or 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    sampling = {}
    if choice.temperature:
        sampling = {"temperature": choice.temperature, "top_p": choice.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
        # training switches the model's own default off
        use_cache=True,
        do_sample=bool(choice.temperature),
        **sampling,
    )
    with (
        _own_defaults_off(base),
        reported(torch.OutOfMemoryError, about="the GPU must have enough memory: "),
    ):
        output = base.model.generate(
            input_ids=ids.to(base.model.device),
            attention_mask=mask.to(base.model.device),
            generation_config=config,
            streamer=streamer,
        )
    return output[:, length:]


@contextmanager
def _own_defaults_off(base: Base) -> Iterator[None]:
    """Greedy is greedy: many a model comes with a repetition penalty, which would count too."""
    before = base.model.generation_config
    base.model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.model.generation_config = before


def _stops(base: Base, template: str, *prompts: Prompt) -> list[int]:
    """Tokens that end a completion."""
    own = base.model.generation_config.eos_token_id
    stops = {base.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if any(template == CHAT or not isinstance(prompt, str) for prompt in prompts):
        stops.add(_end_of_turn(base))
    return sorted(stops - {None})


def _end_of_turn(base: Base) -> int | None:
    """The token by which the chat template ends an answer, where it has a token for that.

    In many a base model it is another one than the end of a text.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = base.tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # it takes the conversation that is asked about, but not this one
        return None
    _, _, end = text.rpartition(_ANSWER)
    ids = base.tokenizer(end.strip(), add_special_tokens=False).input_ids
    special = {*base.tokenizer.all_special_ids, *base.tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else None
