"""LoraConfig refuses what is out of range, by name, and keeps its digest."""

import dataclasses
import json

import pytest

from fastlora.config import LoraConfig

REFUSED = [  # settings, what the message says
    ({"r": 0}, "r must be an integer >= 1, got 0"),
    ({"r": 4.0}, "r must be an integer >= 1, got 4.0"),
    ({"r": True}, "r must be an integer >= 1, got True"),
    ({"lora_alpha": 0}, "lora_alpha must be a number > 0, got 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a number > 0, got nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha must be a number > 0, got inf"),
    ({"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), got 1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout must be in [0, 1), got -0.1"),
    ({"lora_dropout": None}, "lora_dropout must be in [0, 1), got None"),
    ({"target_modules": None}, "target_modules must name modules"),
    ({"target_modules": []}, "target_modules must name modules"),
    ({"target_modules": ["a", 1]}, "target_modules must hold names"),
    ({"target_modules": "("}, "target_modules must be a regular expression"),
    ({"exclude_modules": "["}, "exclude_modules must be a regular expression"),
    ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
    ({"rank_pattern": {"a": 0}}, "rank_pattern['a'] must be an integer >= 1, got 0"),
    ({"rank_pattern": [1]}, "rank_pattern must be a dict of names, got [1]"),
    ({"rank_pattern": {"*": 1}}, "rank_pattern must be a regular expression"),
    ({"alpha_pattern": {"a": -1}}, "alpha_pattern['a'] must be a number > 0, got -1"),
    ({"use_rslora": 1}, "use_rslora must be True or False, got 1"),
    ({"task_type": "CAUSAL"}, "task_type must be one of"),
    ({"layers_to_transform": 1}, "layers_to_transform needs target_modules to be a list"),
    ({"target_modules": ["a"], "layers_to_transform": [-1]}, "layers_to_transform must hold"),
    ({"target_modules": ["a"], "layers_to_transform": 1.5}, "layers_to_transform must hold"),
    ({"target_modules": ["a"], "layers_to_transform": "1"}, "layers_to_transform must hold"),
    ({"target_modules": ["a"], "layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    (
        {"target_modules": ["a"], "layers_to_transform": 1, "layers_pattern": 5},
        "layers_pattern must be a list of names, got 5",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_refused_by_name(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        LoraConfig(**settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_unsupported_by_name(settings, named):
    with pytest.raises(NotImplementedError, match=named):
        LoraConfig(**settings)


CHANGES = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
    "use_rslora": True,
    "modules_to_save": ["head"],
    "init_lora_weights": "gaussian",
    "rank_pattern": {"a": 2, "b": 3},
    "alpha_pattern": {"a": 2},
    "fan_in_fan_out": True,
    "task_type": "CAUSAL_LM",
}
PROVENANCE = {
    "auto_mapping": {"parent_library": "x"},
    "base_model_name_or_path": "here",
    "inference_mode": True,
    "revision": "main",
}


def test_digest_tells_settings_apart_but_not_where_they_come_from():
    base = LoraConfig()
    digests = {LoraConfig(**{name: value}).digest() for name, value in CHANGES.items()}
    assert len(digests | {base.digest()}) == len(CHANGES) + 1
    assert LoraConfig(**PROVENANCE).digest() == base.digest()
    layers = {"target_modules": ["a"], "layers_to_transform": [1]}
    assert LoraConfig(**layers).digest() != LoraConfig(target_modules=["a"]).digest()
    covered = CHANGES.keys() | PROVENANCE.keys() | {"layers_to_transform", "layers_pattern"}
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert covered | {"bias", "use_dora"} == fields
    # the first pattern that matches wins
    swapped = LoraConfig(rank_pattern={"b": 3, "a": 2})
    assert swapped.digest() != LoraConfig(rank_pattern={"a": 2, "b": 3}).digest()


def test_digest_does_not_change_between_versions():
    digest = "8b2d28a7c34f7fdde1bf3e05d4a6dd6be7b2a9509cb72eee26472b57e5abb738"
    assert LoraConfig(r=8, lora_alpha=16.0, target_modules=["v", "q"]).digest() == digest


def test_json_round_trip_is_exact():
    changes = CHANGES | {"lora_alpha": 0.1, "rank_pattern": {"z": 1, "a.*": 2}}
    config = LoraConfig(**changes, **PROVENANCE)
    read = LoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config
    assert [*read.rank_pattern] == ["z", "a.*"]
    assert read.digest() == config.digest()
    config.to_dict()["rank_pattern"].clear()
    assert config == read
