"""The loss curve of a run."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fastlora.atomic import replace_file
from fastlora.cli.progress import Record

CURVE_FILE = "loss.png"
_MANY = 30  # points, beyond which a curve is smoothed as well


def save_curve(records: Sequence[Record], title: str, scored: str, path: Path) -> None:
    """Draw the loss over the steps, of training and of what was scored.

    Args:
        records: of metrics.jsonl.
        title: above the picture.
        scored: what the evaluations are of.
        path: PNG; replaced when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    # no pyplot, which would keep the figure and ask for a display
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    steps = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    scores = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if steps:
        x, y = zip(*steps, strict=True)
        many = len(y) > _MANY
        axes.plot(x, y, color="tab:blue", alpha=0.35 if many else 1, lw=1.2, label="training")
        if many:
            axes.plot(x, _smooth(y), color="tab:blue", lw=1.8, label="training, smoothed")
    if scores:
        axes.plot(*zip(*scores, strict=True), "o-", color="tab:orange", label=scored)
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean, without the pull of its start (Kingma and Ba 2014, arXiv:1412.6980)."""
    keep = 1 - 20 / len(values)  # over about a twentieth of the curve
    total, smooth = 0.0, []
    for count, value in enumerate(values, 1):
        total = keep * total + (1 - keep) * value
        smooth.append(total / (1 - keep**count))
    return smooth
