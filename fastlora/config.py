"""LoraConfig: the settings of one adapter, with PEFT's field names and PEFT's meaning."""

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

# PEFT's fields that are not supported, with the values that ask for nothing
_OFF: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": (False, None),
    "eva_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "loftq_config": ({}, None),
    "lora_bias": (False, None),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "monteclora_config": (None,),
    "qalora_group_size": (16, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
# fields of _OFF that every PEFT from 0.18 on knows and writes
_WRITTEN_OFF = sorted(
    _OFF.keys()
    - {"kasa_config", "lora_ga_config", "monteclora_config", "use_bdlora", "velora_config"}
)
_IGNORED = ("peft_type", "peft_version", "runtime_config")  # say nothing about the adapter itself
_PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": None}  # where ours are others
# where an adapter comes from and how it is used: people edit these in files
_PROVENANCE = ("auto_mapping", "base_model_name_or_path", "inference_mode", "revision")
_TASKS = (
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
)


@dataclass
class LoraConfig:
    """Settings of a LoRA adapter; fields are named as in PEFT and mean the same.

    Lists may be given as list, tuple or set; they are kept sorted, without duplicates.

    Source: PEFT's `LoraConfig`, https://huggingface.co/docs/peft/package_reference/lora.

    Attributes:
        r: rank.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: probability in [0, 1) of dropping an element of a layer's input.
        target_modules: name suffixes, a regular expression for whole names, or "all-linear".
        exclude_modules: name suffixes or a regular expression; wins over `target_modules`.
        bias: only "none".
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        use_dora: only False.
        modules_to_save: name endings of modules that are trained whole and saved.
        init_lora_weights: True, False or "gaussian"; see `nn.LoraLinear`.
        layers_to_transform: indices of the layers to adapt, with a list of suffixes only.
        layers_pattern: names of the module lists that `layers_to_transform` counts in.
        rank_pattern: name or regular expression of a name's end -> rank, before `r`.
        alpha_pattern: the same for `lora_alpha`.
        fan_in_fan_out: accepted and written for PEFT; the layer itself tells.
        task_type: PEFT's task name; heads it trains are added to `modules_to_save`.
        base_model_name_or_path: where the base model came from.
        revision: of the base model.
        inference_mode: add the adapter without gradients.
        auto_mapping: kept for PEFT.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Normalise lists and check every field.

        Raises:
            NotImplementedError: `bias` or `init_lora_weights` asks for what is not supported.
            ValueError: a field is out of range or contradicts another.
        """
        self.target_modules = _names("target_modules", self.target_modules, regex=True)
        if not self.target_modules:
            raise ValueError(
                "target_modules must name modules, such as ['q_proj', 'v_proj'] or 'all-linear', "
                f"got {self.target_modules!r}"
            )
        self.exclude_modules = _names("exclude_modules", self.exclude_modules, regex=True)
        self.modules_to_save = _names("modules_to_save", self.modules_to_save)
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name) or {}
            if not isinstance(pattern, Mapping) or not all(isinstance(k, str) for k in pattern):
                raise ValueError(f"{name} must be a dict of names, got {pattern!r}")
            setattr(self, name, dict(pattern))
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        for key, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        self._check_choices()
        self._check_layers()
        self._check_patterns()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraConfig":
        """Read the fields of a PEFT config, such as an `adapter_config.json`.

        Absent fields mean what they mean in PEFT: r and lora_alpha are 8.

        Args:
            values: field -> value.

        Returns:
            The config.

        Raises:
            NotImplementedError: a field asks for what is not supported; names field and value.
            ValueError: a field is unknown, out of range, or the config is not one of LoRA.
        """
        peft_type = values.get("peft_type", "LORA")
        if peft_type != "LORA":
            raise ValueError(f"peft_type must be LORA, got {peft_type}")
        known = {f.name for f in fields(cls)}
        for name, value in values.items():
            if name in _OFF and value not in _OFF[name]:
                raise NotImplementedError(f"{name}={value!r} is not supported, train plain LoRA")
            if name not in known and name not in _OFF and name not in _IGNORED and value:
                raise ValueError(f"the config must have fields of LoRA only, got {name}={value!r}")
        given = {name: value for name, value in values.items() if name in known}
        return cls(**_PEFT_DEFAULTS | given)

    def to_dict(self) -> dict[str, Any]:
        """The fields PEFT reads, sorted, ready for JSON.

        Returns:
            field -> value, with the fields of PEFT 0.18 at their defaults where unsupported.
        """
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}
        values |= {name: _OFF[name][0] for name in _WRITTEN_OFF}
        values["peft_type"] = "LORA"
        return dict(sorted(values.items()))

    def digest(self) -> str:
        """sha256 of the settings, to find an edited or damaged file.

        A field at its default does not count, so that files stay valid when fields are added.

        Returns:
            Hexadecimal; equal for configs that differ only in where the adapter comes from.
        """
        values = {name: getattr(self, name) for name in ("r", "lora_alpha", "target_modules")}
        for f in fields(self):
            value = getattr(self, f.name)
            default = f.default if f.default is not MISSING else f.default_factory()
            if f.name not in _PROVENANCE and value != default:
                values[f.name] = value
        text = json.dumps(sorted(values.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_choices(self) -> None:
        if self.bias != "none":
            raise NotImplementedError(f"bias={self.bias!r} is not supported, use 'none'")
        init = self.init_lora_weights
        if not isinstance(init, bool) and init != "gaussian":
            raise NotImplementedError(
                f"init_lora_weights={init!r} is not supported, use True, False or 'gaussian'"
            )
        if self.use_dora:
            raise NotImplementedError("use_dora=True is not supported, train plain LoRA or rsLoRA")
        for name in ("use_dora", "use_rslora", "fan_in_fan_out", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.task_type is not None:
            task = getattr(self.task_type, "value", self.task_type)  # PEFT's is an enum
            if task not in _TASKS:
                raise ValueError(f"task_type must be one of {_TASKS}, got {task!r}")
            self.task_type = task

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        indices = layers if isinstance(layers, list | tuple | set) else [layers]
        if layers is not None and not all(_is_index(i) for i in indices):
            raise ValueError(f"layers_to_transform must hold indices >= 0, got {layers!r}")
        if indices is layers:
            self.layers_to_transform = sorted({*indices})
        patterns = self.layers_pattern
        if isinstance(patterns, list | tuple) and all(isinstance(p, str) for p in patterns):
            self.layers_pattern = [*patterns]  # in order: the first that matches counts
        elif patterns is not None and not isinstance(patterns, str):
            raise ValueError(f"layers_pattern must be a list of names, got {patterns!r}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} needs target_modules to be a list, got {self.target_modules!r}"
                )
        if self.layers_pattern and layers is None:
            raise ValueError(f"layers_pattern needs layers_to_transform, got {self.layers_pattern}")

    def _check_patterns(self) -> None:
        """Every regular expression compiles."""
        forms = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        patterns = [(n, form) for n, form in forms.items() if isinstance(form, str)]
        patterns += [("rank_pattern", key) for key in self.rank_pattern]
        patterns += [("alpha_pattern", key) for key in self.alpha_pattern]
        listed = self.layers_pattern or []
        patterns += [
            ("layers_pattern", p) for p in ([listed] if isinstance(listed, str) else listed)
        ]
        for name, pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{name} must be a regular expression, got {pattern!r}: {error}"
                ) from error


def _names(name: str, value: Any, regex: bool = False) -> Any:
    if value is None or (regex and isinstance(value, str)):
        return value
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a list of names, got {value!r}")
    value = list(value)
    if not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} must hold names, got {value!r}")
    return sorted(set(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_rank(name: str, rank: Any) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {rank!r}")


def _check_alpha(name: str, alpha: Any) -> None:
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {alpha!r}")
