"""The settings of a training run, once: names, defaults, ranges and help."""

import dataclasses
import difflib
import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from fastlora.atomic import replace_file
from fastlora.cli.console import (
    UsageError,
    UserError,
    check_text,
    parse_size,
    reported,
    require,
)
from fastlora.cli.data import parse_fields
from fastlora.codebooks import BLOCKSIZES
from fastlora.optim.budget import MIN_PAGE

Quantize = Literal["nf4", "none"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Scheduler = Literal["linear", "cosine", "constant"]
Optimizer = Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "adafactor", "sgd"]
PROMPT = "{prompt}"
CHAT = "chat"
AUTO = "auto"
SETTINGS_FILE = "settings.yaml"

_adapter, _base, _data, _optimisation, _evaluation, _run = (
    functools.partial(typer.Option, rich_help_panel=panel)
    for panel in ("Adapter", "Base model", "Data", "Optimisation", "Evaluation", "Run")
)
_count = {"metavar": "N", "min": 1}
_share = {"metavar": "X", "min": 0, "max": 1}
_amount = {"metavar": "X", "min": 0}
_PAGING = ("page_budget", "page_folder")
_PAGED = "paged_"  # prefix of optimizers
_EITHER = (("epochs", "steps"), ("eval_data", "eval_share"), ("packing", "group_by_length"))
# what a resumed run may do otherwise than the run it goes on with
_FREE_TO_CHANGE = {
    *("epochs", "steps", "output", "eval_steps", "save_steps", "keep", "logging_steps"),
    *("report_to", *_PAGING),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run. Each field is an argument or option of the command line and a YAML key."""

    model: Annotated[
        str | None,
        typer.Argument(help="A Hugging Face folder, a .gguf file, or a name on the hub."),
    ] = None
    data: Annotated[
        Path | None,
        typer.Argument(
            help="JSONL or CSV with prompt and completion, messages, text, or text and label."
        ),
    ] = None

    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for the adapter and all else; needed, here or in YAML."
        ),
    ] = None

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
    rslora: Annotated[
        bool, _adapter("--rslora/--no-rslora", help="Scale by alpha / sqrt(rank).")
    ] = False

    quantize: Annotated[
        Quantize, _base(metavar="KIND", help="How the frozen weights are kept: nf4 or none.")
    ] = "nf4"
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
            help="Compute in fp32, bf16 or fp16; auto: bf16 for language models where the hardware "
            "has it, else fp32.",
        ),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool,
        _base(
            "--gradient-checkpointing/--no-gc",
            help="Recompute activations: less memory, more time.",
        ),
    ] = False
    chunked_loss: Annotated[
        bool,
        _base("--chunked-loss/--full-logits", help="Compute the loss without all logits at once."),
    ] = True

    fields: Annotated[
        str | None,
        _data(
            metavar="NAMES",
            help="What fields are called in the data, with commas between: prompt=question.",
        ),
    ] = None
    labels: Annotated[
        str | None,
        _data(
            metavar="NAMES",
            help="The classes, in order, for text and label: bad,good.",
            show_default="those in the data",
        ),
    ] = None
    template: Annotated[
        str,
        _data(
            metavar="TEXT",
            help=r"What a prompt becomes, before the completion; \n is a line break. "
            "Or chat: a turn in the model's chat template.",
        ),
    ] = r"{prompt}\n"
    max_length: Annotated[
        int, _data(metavar="N", min=2, help="Tokens per example; longer ones are cut.")
    ] = 1024
    packing: Annotated[
        bool,
        _data(
            "--packing/--no-packing",
            help="Fill rows of max-length with several examples that do not see each other.",
        ),
    ] = False
    group_by_length: Annotated[
        bool,
        _data(
            "--group-by-length/--no-grouping",
            help="Batches of examples of about the same length: less padding.",
        ),
    ] = False

    epochs: Annotated[
        float | None,
        _optimisation(metavar="X", help="Passes over the data.", show_default="1", min=0),
    ] = None
    steps: Annotated[
        int | None, _optimisation(help="Optimizer steps, instead of epochs.", **_count)
    ] = None
    lr: Annotated[float, _optimisation(help="Peak learning rate.", **_amount)] = 2e-4
    scheduler: Annotated[Scheduler, _optimisation(help="Learning rate after warmup.")] = "linear"
    warmup: Annotated[
        float, _optimisation(help="Warmup in steps, or below 1 as a share of them.", **_amount)
    ] = 0.03
    batch_size: Annotated[
        int, _optimisation(help="Examples in a batch, or rows of packed ones.", **_count)
    ] = 8
    accumulation: Annotated[int, _optimisation(help="Batches in a step.", **_count)] = 1
    clip: Annotated[
        float, _optimisation(help="Largest norm of the gradients; 0: any.", **_amount)
    ] = 1.0
    weight_decay: Annotated[float, _optimisation(help="Decay of the weights.", **_amount)] = 0.0
    optim: Annotated[
        Optimizer,
        _optimisation(
            metavar="NAME",
            help="adamw, adamw8bit, paged_adamw, paged_adamw8bit (fastlora's own; paged: moments "
            "are in host memory), adafactor or sgd.",
        ),
    ] = "adamw"
    lora_plus_ratio: Annotated[
        float | None,
        _optimisation(
            metavar="X",
            help="LoRA+: B learns at so many times the rate of A.",
            show_default="1",
            min=0,
        ),
    ] = None
    page_budget: Annotated[
        str | None,
        _optimisation(
            metavar="SIZE",
            help="Memory of the GPU that pages of moments may take: auto, or such as 256MiB.",
            show_default="auto",
        ),
    ] = None
    page_folder: Annotated[
        Path | None,
        _optimisation(
            help="Keep the moments in a file in this folder.", show_default="in host memory"
        ),
    ] = None

    eval_data: Annotated[
        Path | None, _evaluation(help="Held-out examples in a file of their own.")
    ] = None
    eval_share: Annotated[
        float, _evaluation(help="Or hold out this share of the data.", **_share)
    ] = 0.0
    eval_examples: Annotated[
        int | None,
        _evaluation(help="Evaluate on at most so many.", show_default="all", **_count),
    ] = None
    eval_steps: Annotated[
        int | None,
        _evaluation(help="Evaluate every N steps.", show_default="before and after only", **_count),
    ] = None
    early_stopping: Annotated[
        int | None,
        _evaluation(
            help="Stop after N evaluations without a better loss, and keep the best adapter.",
            **_count,
        ),
    ] = None

    save_steps: Annotated[int, _run(help="Steps between checkpoints.", **_count)] = 100
    keep: Annotated[int, _run(help="Checkpoints to keep.", **_count)] = 2
    logging_steps: Annotated[int, _run(help="Steps a line of metrics.jsonl.", **_count)] = 1
    report_to: Annotated[
        str,
        _run(metavar="NAMES", help="Trackers that Trainer reports to, such as tensorboard,wandb."),
    ] = "none"
    seed: Annotated[
        int, _run(metavar="N", min=0, max=2**32 - 1, help="Seed of everything random.")
    ] = 0

    def __post_init__(self) -> None:
        self._check_needs()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option(field.name)} must be finite, got {value}")
        if self.epochs == 0:
            raise UserError("epochs must be above 0, got 0")
        if self.warmup > 1 and self.warmup % 1:
            raise UserError(f"warmup must be whole steps or a share below 1, got {self.warmup}")
        check_template(self.template)
        if self.blocksize not in BLOCKSIZES:
            raise UserError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize}")
        if self.eval_share == 1:
            raise UserError("eval-share must be below 1, got 1")
        if self.page_bytes is not None and self.page_bytes < 2 * MIN_PAGE:
            raise UserError(f"page-budget must be at least 128KiB, got {self.page_budget}")
        if self.lora_plus_ratio == 0:
            raise UserError("lora-plus-ratio must be above 0, got 0")
        if self.labels is not None and len({*self.classes}) < max(2, len(self.classes)):
            raise UserError(f"labels must be two or more that differ, got {self.labels!r}")

    def _check_needs(self) -> None:
        """Settings that exclude or need each other."""
        for one, other in _EITHER:
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"{option(one)} and {option(other)} must not both be given")
        for name in ("eval_steps", "eval_examples"):
            if getattr(self, name) and not (self.eval_data or self.eval_share):
                raise UserError(f"{option(name)} must have eval-data or eval-share, got neither")
        if self.early_stopping and not self.eval_steps:
            raise UserError("early-stopping must have eval-steps, got none")
        if self.lora_plus_ratio is not None and "adamw" not in self.optim:
            raise UserError(f"lora-plus-ratio must be for one of the adamw, got {self.optim}")
        for name in _PAGING:
            if getattr(self, name) is not None and not self.optim.startswith(_PAGED):
                raise UserError(f"{option(name)} must be for a paged optimizer, got {self.optim}")

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels, one by one; empty for a language model."""
        return tuple(name.strip() for name in (self.labels or "").split(",") if name.strip())

    @property
    def page_bytes(self) -> int | None:
        """The page budget in bytes; None: the optimizer's own choice."""
        if self.page_budget in (None, AUTO):
            return None
        with reported(ValueError, about="page-budget: "):
            return parse_size(self.page_budget)

    @property
    def field_names(self) -> dict[str, str]:
        """Our name of a field -> the file's, where they differ; see `data.parse_fields`."""
        return parse_fields(self.fields) if self.fields else {}

    def save(self, folder: Path) -> None:
        """Write settings.yaml, which `--config` reads.

        Args:
            folder: made with its parents where it is missing.

        Raises:
            UserError: it cannot be made or written to.
        """
        require("yaml")
        import yaml

        values = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
            if value is not None
        }
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        with reported(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / SETTINGS_FILE, text.encode())

    @classmethod
    def load(cls, folder: Path, **given: Any) -> "TrainSettings":
        """The settings of an earlier run.

        Args:
            folder: output of a training; without settings.yaml (as for an adapter from elsewhere)
                the defaults stand.
            **given: values to use instead; None: the saved one.

        Returns:
            The settings.

        Raises:
            UserError: settings.yaml is not readable, or a value does not fit its field.
        """
        path = folder / SETTINGS_FILE
        # keys that are not known are those of a later version
        saved = read_yaml(path) if path.exists() else {}
        try:
            settings = _parser().main([], default_map=saved, standalone_mode=False)
        except (UsageError, UserError) as error:
            text = error.format_message() if isinstance(error, UsageError) else str(error)
            raise UserError(f"{path}: {text}") from error
        return dataclasses.replace(settings, **{k: v for k, v in given.items() if v is not None})

    def resumed(self, given: Mapping[str, Any]) -> "TrainSettings":
        """These settings, of a run that goes on, with what was given anew.

        Args:
            given: field -> value.

        Returns:
            The settings.

        Raises:
            UserError: a value was given that would make it another run.
        """
        # the length is one setting in two units
        length = {"epochs": None, "steps": None} if {"epochs", "steps"} & given.keys() else {}
        # whether pages are used changes no result; without them their settings have no meaning
        paged = given.get("optim", self.optim).startswith(_PAGED)
        paging = {} if paged else dict.fromkeys(_PAGING)
        wanted = dataclasses.replace(self, **length | paging | dict(given)).absolute()
        for name in given.keys() - _FREE_TO_CHANGE:
            before, now = getattr(self, name), getattr(wanted, name)
            if name == "dtype" and now == "auto":
                wanted = dataclasses.replace(wanted, dtype=self.dtype)
            elif name == "optim" and now.removeprefix(_PAGED) == before.removeprefix(_PAGED):
                continue
            elif now != before:
                raise UserError(
                    f"{option(name)} must be that of the run to resume, {before}, got {now}"
                )
        return wanted

    def absolute(self) -> "TrainSettings":
        """The same with absolute paths, so that they can be used in another folder."""
        values = {f.name: _absolute(getattr(self, f.name)) for f in dataclasses.fields(self)}
        model = self.model
        if model is not None and os.path.exists(model):
            values["model"] = str(Path(model).absolute())
        return dataclasses.replace(self, **values)


def check_template(template: str) -> None:
    """Check a template of prompts.

    Args:
        template: "chat", or text with {prompt}.

    Raises:
        UserError: it is neither.
    """
    if template != CHAT and template.count(PROMPT) != 1:
        raise UserError(f"template must be chat or contain {PROMPT} exactly once, got {template!r}")
    check_text(template, "template")


def read_yaml(path: Path) -> dict[str, str]:
    """Read a YAML file as words of a command line, so that one parser converts and checks both.

    Args:
        path: a mapping. Lists become words with commas between, mappings key=value.

    Returns:
        key -> text; keys without a value are left out.

    Raises:
        UserError: it is not readable, no YAML, or no mapping.
    """
    require("yaml")
    import yaml

    try:
        # leaves every scalar as it is written: elsewhere in PyYAML 2e-4 is text and no is False
        values = yaml.load(path.read_text("utf-8-sig"), yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} must be readable YAML, got {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} must hold keys with values, got {type(values).__name__}")
    words = {key: _word(f"{path}: {key}", value) for key, value in values.items()}
    return {key: word for key, word in words.items() if word not in ("", "~", "null")}


def use_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of `--config`: what the command line does not give comes from the file.

    Args:
        context: of the command.
        path: YAML with the names of settings as keys, with _ or -.

    Returns:
        The path.

    Raises:
        UserError: the file is not readable, or has a key that does not exist.
    """
    if path is None:
        return None
    names = [field.name for field in dataclasses.fields(TrainSettings)]
    words = {}
    for key, word in read_yaml(path).items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f", did you mean {near[0]}" if near else f"; there are {', '.join(names)}"
            raise UserError(f"{path}: keys must be settings, got {key}{hint}")
        words[name] = word
    context.default_map = words
    return path


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one argument or option for each setting.

    Args:
        command: has parameters `settings` (TrainSettings) and `given` (the settings that the
            command line or the file of `--config` gave, field -> value).

    Returns:
        The function for typer, with the settings in place of the two.
    """
    hints = get_type_hints(command, include_extras=True)
    own = [
        p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY)
        for p in inspect.signature(command).parameters.values()
        if p.name not in ("settings", "given")
    ]
    fields = {field.name: field for field in dataclasses.fields(TrainSettings)}
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=fields[name].default, annotation=hint
        )
        for name, hint in get_type_hints(TrainSettings, include_extras=True).items()
    ]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @functools.wraps(command)
    def run(context: typer.Context, **values: Any) -> Any:
        chosen = {name: values.pop(name) for name in fields}
        sources = {name: context.get_parameter_source(name).name for name in fields}
        for pair in _EITHER:
            for one, other in (pair, pair[::-1]):
                # what the command line gives excludes what the file gave in its place
                if chosen[one] and (sources[one], sources[other]) == ("COMMANDLINE", "DEFAULT_MAP"):
                    chosen[other], sources[other] = fields[other].default, "DEFAULT"
        given = {n: v for n, v in chosen.items() if sources[n] in ("COMMANDLINE", "DEFAULT_MAP")}
        return command(**values, settings=TrainSettings(**chosen), given=given)

    run.__signature__ = inspect.Signature([context, *own, *added])
    run.__annotations__ = {p.name: p.annotation for p in (context, *own, *added)}
    return run


@functools.cache
def _parser() -> Any:
    """A command that does nothing but to make settings of its options."""
    app = typer.Typer(add_completion=False)
    app.command()(with_settings(lambda settings, given: settings))
    return typer.main.get_command(app)


def _word(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={_word(name, inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ",".join(_word(name, inner) for inner in value)
    check_text(value, name)
    return value


def _absolute(value: Any) -> Any:
    return value.absolute() if isinstance(value, Path) else value


def option(name: str) -> str:
    """A setting's name as the command line has it."""
    return name.replace("_", "-")
