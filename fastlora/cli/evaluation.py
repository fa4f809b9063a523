"""How good a model is on a data set: loss and perplexity, or how well it tells classes apart."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.causal_lm import without_logits
from fastlora.cli.encoding import IGNORED, Collator, Dataset
from fastlora.cli.models import Base

Advance = Callable[[int], None]
# what forwards of transformers return unless they are told not to: memory, and another loss
_OFF = ("use_cache", "output_router_logits")


@dataclass(frozen=True)
class Classified:
    """What a classifier makes of a data set, in the order of its examples.

    Attributes:
        loss: mean cross entropy in nats.
        truth: right class of each example.
        predicted: class that the model gives it.
    """

    loss: float
    truth: list[int]
    predicted: list[int]


def score(
    base: Base, dataset: Dataset, batch_size: int, advance: Advance | None = None
) -> dict[str, float]:
    """Evaluate a model; neither it nor the state of random numbers is changed.

    Args:
        base: a language model, or a classifier, which has labels; in any mode.
        dataset: encoded for it.
        batch_size: examples at once.
        advance: told how many examples are done, after every batch.

    Returns:
        Of a language model: loss, the mean nats over all labelled tokens; perplexity; and the
        numbers of tokens and examples. Of a classifier: loss, the mean nats over the examples;
        accuracy; precision, recall and f1, means over the classes; and the number of examples.
    """
    if base.labels:
        return totals(classify(base, dataset, batch_size, advance))
    total, tokens = 0.0, 0
    with _evaluating(base.model), without_logits(base.model):
        for _, batch in _batches(base, dataset, batch_size, advance):
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            if count:
                total += base.model(**batch).loss.item() * count
                tokens += count
    loss = total / tokens if tokens else math.nan
    return {
        "loss": loss,
        # beyond that it is no number
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "tokens": tokens,
        "examples": len(dataset.examples),
    }


def classify(
    base: Base, dataset: Dataset, batch_size: int, advance: Advance | None = None
) -> Classified:
    """Let a classifier predict; neither it nor the state of random numbers is changed.

    Args:
        base: a classifier.
        dataset: encoded for it.
        batch_size: examples at once.
        advance: told how many examples are done, after every batch.

    Returns:
        Its predictions.
    """
    total, predicted = 0.0, [0] * len(dataset.examples)
    with _evaluating(base.model):
        for rows, batch in _batches(base, dataset, batch_size, advance):
            truth = batch.pop("labels")
            logits = base.model(**batch).logits.float()
            total += F.cross_entropy(logits, truth, reduction="sum").item()
            for row, index in zip(rows, logits.argmax(-1).tolist(), strict=True):
                predicted[row] = index
    truth = [example["labels"] for example in dataset.examples]
    return Classified(total / len(truth), truth, predicted)


def totals(classified: Classified) -> dict[str, float]:
    """The figures of a classifier over all classes that are there or were predicted."""
    from sklearn.metrics import precision_recall_fscore_support

    truth, predicted = classified.truth, classified.predicted
    means = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    right = sum(a == b for a, b in zip(truth, predicted, strict=True))
    return {
        "loss": classified.loss,
        "accuracy": right / len(truth),
        **dict(zip(("precision", "recall", "f1"), map(float, means[:3]), strict=True)),
        "examples": len(truth),
    }


def by_class(classified: Classified, labels: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """The figures of each class that is there or was predicted.

    Args:
        classified: predictions.
        labels: the names of all classes.

    Returns:
        Name of a class -> precision, recall, f1, and the number of its examples.
    """
    from sklearn.metrics import precision_recall_fscore_support

    classes = sorted({*classified.truth, *classified.predicted})
    columns = precision_recall_fscore_support(
        classified.truth, classified.predicted, labels=classes, average=None, zero_division=0
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    names = "precision", "recall", "f1", "examples"
    return {
        labels[index]: dict(zip(names, row, strict=True))
        for index, row in zip(classes, rows, strict=True)
    }


def _batches(
    base: Base, dataset: Dataset, batch_size: int, advance: Advance | None
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Indices of examples, and what the model is given; the longest first: no memory for later."""
    collate = Collator(base.pad_id)
    parameters = inspect.signature(base.model.forward).parameters
    off = {name: False for name in _OFF if name in parameters}
    lengths = [len(example["input_ids"]) for example in dataset.examples]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([dataset.examples[row] for row in rows])
        yield rows, {**{name: t.to(base.model.device) for name, t in batch.items()}, **off}
        if advance is not None:
            advance(len(rows))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # no inference mode: what a model keeps from it could not be used in training
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
