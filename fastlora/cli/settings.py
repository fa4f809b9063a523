"""The settings of a training run, once: names, defaults, ranges and help."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from fastlora.cli.console import UserError, check_text, reported
from fastlora.codebooks import BLOCKSIZES

Quantize = Literal["nf4", "none"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Scheduler = Literal["linear", "cosine", "constant"]
PROMPT = "{prompt}"
SETTINGS_FILE = "settings.json"

_adapter, _base, _data, _optimisation, _run = (
    functools.partial(typer.Option, rich_help_panel=panel)
    for panel in ("Adapter", "Base model", "Data", "Optimisation", "Run")
)
_count = {"metavar": "N", "min": 1}
_share = {"metavar": "X", "min": 0, "max": 1}
_amount = {"metavar": "X", "min": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run. Each field is an option of the command line."""

    rank: Annotated[int, _adapter(help="Rank of the adapters.", **_count)] = 16
    alpha: Annotated[float, _adapter(help="Updates are scaled by alpha / rank.", **_amount)] = 32
    dropout: Annotated[float, _adapter(help="Dropout on the adapters' input.", **_share)] = 0.0
    target_modules: Annotated[
        str,
        _adapter(
            metavar="NAMES",
            help="Layers to adapt: all-linear, names (q_proj,v_proj) or a regular expression.",
        ),
    ] = "all-linear"
    rslora: Annotated[bool, _adapter("--rslora", help="Scale by alpha / sqrt(rank).")] = False

    quantize: Annotated[Quantize, _base(help="How the frozen weights are kept.")] = "nf4"
    blocksize: Annotated[
        int,
        _base(metavar="N", help="Weights that share one NF4 scale: a power of 2 from 32 to 4096."),
    ] = 64
    double_quant: Annotated[
        bool, _base("--double-quant/--flat", help="Quantise the NF4 scales too.")
    ] = True
    dtype: Annotated[
        Dtype,
        _base(
            metavar="TYPE",
            help="Compute in fp32, bf16 or fp16; auto: bf16 where the hardware has it, else fp32.",
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool,
        _base("--gradient-checkpointing", help="Recompute activations: less memory, more time."),
    ] = False
    chunked_loss: Annotated[
        bool,
        _base("--chunked-loss/--full-logits", help="Compute the loss without all logits at once."),
    ] = True

    max_length: Annotated[
        int, _data(metavar="N", min=2, help="Tokens per example; longer ones are cut.")
    ] = 1024
    template: Annotated[
        str,
        _data(
            metavar="TEXT",
            help=r"What a prompt becomes, before the completion; \n is a line break.",
        ),
    ] = r"{prompt}\n"

    epochs: Annotated[
        float | None,
        _optimisation(help="Passes over the data.", show_default="1", **_amount),
    ] = None
    steps: Annotated[
        int | None, _optimisation(help="Optimizer steps, instead of epochs.", **_count)
    ] = None
    lr: Annotated[float, _optimisation(help="Peak learning rate.", **_amount)] = 2e-4
    scheduler: Annotated[Scheduler, _optimisation(help="Learning rate after warmup.")] = "linear"
    warmup: Annotated[
        float, _optimisation(help="Warmup in steps, or below 1 as a share of them.", **_amount)
    ] = 0.03
    batch_size: Annotated[int, _optimisation(help="Examples in a batch.", **_count)] = 8
    accumulation: Annotated[int, _optimisation(help="Batches in a step.", **_count)] = 1
    clip: Annotated[
        float, _optimisation(help="Largest norm of the gradients; 0: any.", **_amount)
    ] = 1.0
    weight_decay: Annotated[float, _optimisation(help="AdamW's decay.", **_amount)] = 0.0

    seed: Annotated[
        int, _run(metavar="N", min=0, max=2**32 - 1, help="Seed of everything random.")
    ] = 0
    logging_steps: Annotated[int, _run(help="Steps a line of metrics.jsonl.", **_count)] = 1

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise UserError("epochs and steps must not both be given")
        if self.epochs == 0:
            raise UserError("epochs must be above 0, got 0")
        if self.template.count(PROMPT) != 1:
            raise UserError(f"template must contain {PROMPT} exactly once, got {self.template!r}")
        check_text(self.template, "template")
        if self.blocksize not in BLOCKSIZES:
            raise UserError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")

    def save(self, folder: Path) -> None:
        """Write settings.json.

        Args:
            folder: made with its parents where it is missing.

        Raises:
            UserError: it cannot be made or written to.
        """
        text = json.dumps(dataclasses.asdict(self), indent=2)
        with reported(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, **given: Any) -> "TrainSettings":
        """The settings of a finished run.

        Args:
            folder: output of a training; without settings.json (as for an adapter from elsewhere)
                the defaults stand.
            **given: values to use instead; None: the saved one.

        Returns:
            The settings.

        Raises:
            UserError: settings.json is not readable, or a value does not fit its field.
        """
        path = folder / SETTINGS_FILE
        try:
            saved = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} must be readable JSON, got {error}") from error
        if not isinstance(saved, dict):
            raise UserError(f"{path} must hold a JSON object, got {type(saved).__name__}")
        hints = get_type_hints(cls)
        chosen = {name: value for name, value in saved.items() if name in hints}
        for name, value in chosen.items():
            _check_type(f"{path}: {name}", value, hints[name])
        return cls(**chosen | {name: value for name, value in given.items() if value is not None})


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Check a value from JSON against a type, a union of types or a Literal."""
    choices = get_args(hint) or (hint,)
    kinds = {choice for choice in choices if isinstance(choice, type)}
    # as for type checkers, a whole number may stand for a float; but not a bool for an int
    if float in kinds:
        kinds.add(int)
    if type(value) not in kinds and not any(value == c for c in choices if c not in kinds):
        expected = " or ".join(getattr(c, "__name__", repr(c)) for c in choices)
        raise UserError(f"{name} must be {expected}, got {value!r}")


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of its settings.

    Args:
        command: has a parameter `settings`, annotated with a dataclass of typer options.

    Returns:
        The function for typer, with the fields in the place of `settings`.
    """
    hints = get_type_hints(command, include_extras=True)
    cls = hints.pop("settings")
    names = [field.name for field in dataclasses.fields(cls)]
    own = [
        p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY)
        for p in inspect.signature(command).parameters.values()
        if p.name != "settings"
    ]
    added = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hint
        )
        for field in dataclasses.fields(cls)
        for hint in [get_type_hints(cls, include_extras=True)[field.name]]
    ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        settings = cls(**{name: values.pop(name) for name in names})
        command(**values, settings=settings)

    run.__signature__ = inspect.Signature(own + added)
    run.__annotations__ = {p.name: p.annotation for p in own + added}
    return run
