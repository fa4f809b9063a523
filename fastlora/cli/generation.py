"""Completions of many prompts at once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TextStreamer

from fastlora.cli.console import UserError
from fastlora.cli.encoding import prompt_ids
from fastlora.cli.models import Base


def stream(base: Base, prompt: str, template: str, max_new_tokens: int) -> None:
    """Complete one prompt greedily and print the tokens as they come.

    Args:
        base: the model, with or without an adapter, in eval mode.
        prompt: what to complete.
        template: as in training.
        max_new_tokens: at most.
    """
    printer = TextStreamer(base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    _generate(base, [prompt], template, max_new_tokens, printer)


def complete_lines(
    base: Base,
    prompts: Sequence[str],
    template: str,
    max_new_tokens: int,
    batch_size: int,
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
    completions = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        output = _generate(base, rows, template, max_new_tokens)
        texts = base.tokenizer.batch_decode(output, skip_special_tokens=True)
        completions += [text.strip().split("\n")[0].rstrip() for text in texts]
    return completions


@torch.inference_mode()
def _generate(
    base: Base,
    prompts: Sequence[str],
    template: str,
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> Tensor:
    """New token ids, int64 [B, up to max_new_tokens]; prompts are padded on the left."""
    eos = base.tokenizer.eos_token_id
    rows = [prompt_ids(base.tokenizer, template, prompt) for prompt in prompts]
    if not all(rows):
        raise UserError("prompt must have at least one token, got none")
    length = max(map(len, rows))
    ids = torch.tensor([[eos] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    output = base.model.generate(
        input_ids=ids.to(base.model.device),
        attention_mask=mask.to(base.model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
        streamer=streamer,
        # training switches the model's own default off
        use_cache=True,
        # greedy, whatever the model's own generation config says
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return output[:, length:]
