"""How far a merged model is from the one that was trained: logits, perplexity."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor

import fastlora
from fastlora.cli import encoding
from fastlora.cli.console import console, reported
from fastlora.cli.data import Data
from fastlora.cli.models import Base
from fastlora.cli.settings import TrainSettings

SENTENCES = (
    "The river had risen in the night, and by morning the lower fields were under water.",
    "To make the dough, mix 500 g of flour with 325 ml of water, 10 g of salt and some yeast.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    'Question: what is 17 times 23?\nAnswer: 17 * 23 = 391. {"result": 391}',
    "Der Zug nach Hamburg fährt heute von Gleis 7, etwa zwanzig Minuten später als geplant.",
)
# logits of the unmerged model that are kept: 512 MiB in fp32
_MOST_LOGITS = 2**27
# share of what the adapter does, from which on a drift is warned of
_LOST = 0.5


@dataclass(frozen=True)
class Drift:
    """How far the logits of a merged model are from those of the unmerged one.

    Attributes:
        positions: where they were compared: tokens, or texts of a classifier.
        largest: largest absolute difference.
        mean: mean absolute difference.
        kl: mean Kullback-Leibler divergence of the merged from the unmerged one, in nats.
        same: positions with the same likeliest token or class.
        loss: mean cross entropy of the texts' next tokens in the merged one, in nats; NaN for a
            classifier.
    """

    positions: int
    largest: float
    mean: float
    kl: float
    same: int
    loss: float

    @property
    def perplexity(self) -> float:
        """Of the texts, in the merged model."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class Measured:
    """A model before its adapter was merged.

    Attributes:
        rows: token ids of the texts.
        logits: of each, [T, V] or [1, classes].
        untrained: how far the model without its adapter is from it.
    """

    rows: list[list[int]]
    logits: list[Tensor]
    untrained: Drift


def measure(base: Base, settings: TrainSettings, data: Data | None) -> Measured:
    """Logits of a model with its adapter, and what the adapter is worth.

    Args:
        base: with the adapter.
        settings: of its run: template and length of the texts.
        data: texts besides the built-in sentences; None: only those.

    Returns:
        What `report` compares with.
    """
    rows = _rows(base, replace(settings, max_length=min(settings.max_length, base.positions)), data)
    with console.status("measuring the model as trained"):
        logits = [_logits(base, row) for row in rows]
        with fastlora.disable_adapters(base.model):
            untrained = compare(logits, (_logits(base, row) for row in rows), rows)
    return Measured(rows, logits, untrained)


def report(before: Measured, merged: Base, format: str) -> None:
    """Measure a merged model and print how far it is from the unmerged one.

    Args:
        before: from `measure`.
        merged: as it was written, loaded in the dtype that the unmerged one computed in.
        format: bf16, fp16, fp32 or nf4.
    """
    rows = before.rows
    with console.status("measuring the merged model"):
        found = compare(before.logits, (_logits(merged, row) for row in rows), rows)
    unmerged = compare(before.logits, before.logits, rows)
    _show(found, before.untrained, unmerged, format, merged.model.dtype, bool(merged.labels))


def compare(before: Iterable[Tensor], after: Iterable[Tensor], rows: Iterable[list[int]]) -> Drift:
    """Compare logits.

    Args:
        before: of each text, [T, V] or [1, classes].
        after: the same of the merged model.
        rows: token ids of each text, [T].

    Returns:
        Their differences.
    """
    positions = elements = same = predicted = 0
    largest = total = divergence = loss = 0.0
    for p, q, row in zip(before, after, rows, strict=True):
        gap = (p - q).abs()
        largest = max(largest, gap.max().item())
        total += gap.double().sum().item()
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(p)
        elements += p.numel()
        if len(p) == len(row) > 1:  # a classifier has no next token
            loss -= log_q[:-1].gather(1, torch.tensor(row[1:])[:, None]).sum().item()
            predicted += len(row) - 1
    # rounding must not make a divergence of nothing negative
    kl = max(0.0, divergence / positions)
    mean_loss = loss / predicted if predicted else math.nan
    return Drift(positions, largest, total / elements, kl, same, mean_loss)


def _rows(base: Base, settings: TrainSettings, data: Data | None) -> list[list[int]]:
    """Token ids of the texts to measure on, as many as their logits leave room for."""
    rows = [
        base.tokenizer(text, verbose=False).input_ids[: settings.max_length] for text in SENTENCES
    ]
    if data is not None:
        if base.labels:
            dataset = encoding.encode_labelled(
                data, base.tokenizer, base.labels, settings.max_length
            )
        else:
            dataset = encoding.encode(data, base.tokenizer, settings.template, settings.max_length)
        rows += [example["input_ids"] for example in dataset.examples]
    if base.labels:
        return rows
    head = base.model.get_output_embeddings()
    room = _MOST_LOGITS // head.weight.shape[0]
    kept = []
    for row in rows:
        kept.append(row[:room])
        room -= len(kept[-1])
        if not room:
            break
    return kept


@torch.inference_mode()
def _logits(base: Base, row: list[int]) -> Tensor:
    """Fp32 on the CPU: [T, V], or [1, classes] of a classifier."""
    ids = torch.tensor([row], device=base.model.device)
    with reported(torch.OutOfMemoryError, about="the GPU must have enough memory: "):
        logits = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.reshape(-1, logits.shape[-1]).float().cpu()


def _show(
    drift: Drift,
    untrained: Drift,
    unmerged: Drift,
    format: str,
    computed: torch.dtype,
    classifies: bool,
) -> None:
    """The drift beside what the adapter is worth: as far off is a merge that has lost it."""
    what, where = ("class", "texts") if classifies else ("token", "positions")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold cyan")
    table.add_column("from the unmerged model", style="cyan", no_wrap=True)
    for head in ("merged", "without adapter"):
        table.add_column(head, justify="right", no_wrap=True)
    both = drift, untrained
    table.add_row("largest difference of logits", *(f"{d.largest:.3g}" for d in both))
    table.add_row("mean difference of logits", *(f"{d.mean:.3g}" for d in both))
    table.add_row("mean KL divergence, nats", *(f"{d.kl:.3g}" for d in both))
    table.add_row(f"same likeliest {what}", *(f"{d.same / d.positions:.2%}" for d in both))
    console.print("", table)
    others = drift.positions - drift.same
    verdict = f"the same {what} as the unmerged one everywhere"
    if others:
        verdict = (
            f"another {what} than the unmerged one at {others:,} of {drift.positions:,} {where}"
        )
    dtype = str(computed).removeprefix("torch.")
    console.print(
        f"\nRead again from disk, the merged model chooses {verdict}; both computed in {dtype}."
    )
    if not classifies:
        console.print(
            f"Perplexity of the texts: {unmerged.perplexity:.2f} unmerged, {drift.perplexity:.2f} "
            f"merged, {untrained.perplexity:.2f} without adapter."
        )
    # in 16 bits that is seen only of an adapter that does next to nothing
    if format == "nf4" and drift.kl > untrained.kl * _LOST > 0:
        console.print(
            "\nMuch of what was trained is lost: by KL divergence the merged model is "
            f"{drift.kl / untrained.kl:.0%} as far off as the one without adapter. NF4's steps can "
            "be wider than what an adapter changes; merge to 16 bits to keep it.",
            style="yellow",
        )
