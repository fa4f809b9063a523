"""Adapter files: what is saved is loaded exactly, and no damage goes unseen or does harm."""

import copy
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import MODELS, Plain, clone, llama, logits, plain
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastlora import adapters
from fastlora.adapters import AdapterError, load_adapter, save_adapter
from fastlora.config import LoraConfig
from fastlora.model import add_lora, quantize_model, set_adapter, state_of, unload_lora
from fastlora.nn import LoraLinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UP = "base_model.model.layers.0.mlp.up.lora_A.weight"  # [4, 32] in `saved`


def random_lora(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)


def settings_of_plain():
    return {
        "target_modules": ["up", "down"],
        "rank_pattern": {r"layers\.1\..*up": 3},
        "alpha_pattern": {"down": 5},
        "modules_to_save": ["head"],
    }


@pytest.fixture
def base():
    return plain()


@pytest.fixture
def saved(base, tmp_path):
    """Folder with an adapter over `base`, whose trained head is not the original one."""
    model = add_lora(clone(base), random_lora(**settings_of_plain()))
    model.head.modules_to_save["default"].bias.data.add_(1)
    return save_adapter(model, tmp_path / "adapter")


def untouched(model):
    return not any(isinstance(m, LoraLinear) for m in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )


def refuse(base, folder, match, error=AdapterError):
    """Loading raises, and leaves the model as it was."""
    with pytest.raises(error, match=match):
        load_adapter(base, folder)
    assert untouched(base)


def rewrite(folder, change, metadata=None):
    """Write other tensors into a file, as PEFT would: without sums."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"} | (metadata or {}))


def edit(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def content(folder):
    """What is in the files; safetensors writes its metadata in any order."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {key: file.get_tensor(key).tolist() for key in sorted(file.keys())}
        return (folder / CONFIG).read_text(), file.metadata(), tensors


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_save_then_load_is_exact(kind, quantized, tmp_path):
    model = MODELS[kind]()
    if quantized:
        quantize_model(model)
    other = clone(model)
    head = {"llama": "lm_head", "gpt2": "ln_f", "bert": "classifier", "plain": "embed"}[kind]
    add_lora(model, random_lora(modules_to_save=[head], use_rslora=True, lora_dropout=0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    assert save_adapter(model, tmp_path) == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    assert load_adapter(other, tmp_path) is other
    assert torch.equal(logits(other), logits(model))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in other.named_parameters() if p.requires_grad} == trainable
    again = save_adapter(other, tmp_path / "again")
    assert content(again) == content(tmp_path)


def test_other_names_and_several_adapters(base, saved):
    model = load_adapter(clone(base), saved, "one")
    out = logits(model)
    add_lora(model, random_lora(target_modules=["extra.0"]), "two")
    load_adapter(model, saved, "three")
    assert state_of(model).active == "one"
    set_adapter(model, "three")
    assert torch.equal(logits(model), out)
    set_adapter(model, "two")
    assert not torch.allclose(logits(model), out)
    save_adapter(model, saved / "two")
    save_adapter(model, saved / "one", "one")
    assert content(saved / "one") == content(saved)
    other = load_adapter(clone(base), saved / "two")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="'four'"):
        save_adapter(model, saved, "four")


def test_loading_over_an_adapter(base, saved):
    model = add_lora(clone(base), random_lora(**settings_of_plain(), lora_dropout=0.5))
    load_adapter(model, saved)
    assert torch.equal(logits(model), logits(load_adapter(clone(base), saved)))
    assert model.layers[0]["mlp"].up.lora_dropout == {"default": 0.5}
    rslora = add_lora(clone(base), random_lora(**settings_of_plain(), use_rslora=True))
    out = logits(rslora)
    load_adapter(rslora, save_adapter(rslora, saved / "rslora"))
    assert torch.equal(logits(rslora), out)
    others = [
        {"r": 2},
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"target_modules": ["up"], "alpha_pattern": {}},
        {"modules_to_save": None},
        {"modules_to_save": ["head", "extra"]},
        {"alpha_pattern": {}},
    ]
    for change in others:
        model = add_lora(clone(base), random_lora(**settings_of_plain() | change))
        before = {n: p.clone() for n, p in model.state_dict().items()}
        with pytest.raises(AdapterError, match="'default' must have the same rank and scale"):
            load_adapter(model, saved)
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_keys_and_metadata(saved):
    with safe_open(saved / WEIGHTS, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    blocks = [f"layers.{i}.{m}" for i in range(3) for m in ("mlp", "experts.0", "experts.1")]
    wanted = {
        f"base_model.model.{b}.{layer}.lora_{part}.weight"
        for b in blocks
        for layer in ("up", "down")
        for part in "AB"
    }
    assert keys == wanted | {"base_model.model.head.weight", "base_model.model.head.bias"}
    assert metadata.keys() == {"format", "fastlora"}
    assert metadata["format"] == "pt"


@pytest.mark.parametrize("key", [UP, "base_model.model.head.bias"])
def test_missing_extra_and_renamed_tensors(base, saved, key):
    original = (saved / WEIGHTS).read_bytes()
    rewrite(saved, lambda t: t.pop(key))
    refuse(base, saved, rf"{key}'\] missing and \[\] unexpected")
    (saved / WEIGHTS).write_bytes(original)
    rewrite(saved, lambda t: t.update({"base_model.model.more.weight": torch.zeros(2)}))
    refuse(base, saved, r"\[\] missing and \['base_model\.model\.more\.weight'\] unexpected")
    (saved / WEIGHTS).write_bytes(original)
    rewrite(saved, lambda t: t.update({key.removeprefix("base_model."): t.pop(key)}))
    refuse(base, saved, rf"{key}'\] missing and \['model\..*'\] unexpected")


def test_all_keys_renamed(base, saved):
    def rename(tensors):
        for key in [*tensors]:
            tensors[key.replace("lora_", "LoRA_")] = tensors.pop(key)

    rewrite(saved, rename)
    refuse(base, saved, "and 33 more missing")


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((4, 33), r"\[4, 33\]"),
        ((5, 32), r"\[5, 32\]"),
        ((32, 4), r"\[32, 4\]"),
        ((128,), r"\[128\]"),
    ],
)
def test_wrong_shape_or_rank(base, saved, shape, named):
    rewrite(saved, lambda t: t.update({UP: torch.zeros(shape)}))
    refuse(base, saved, rf"{UP} must be \[4, 32\] .* got {named}")


def test_wrong_shape_of_a_saved_module(base, saved):
    rewrite(saved, lambda t: t.update({"base_model.model.head.bias": torch.zeros(96)}))
    refuse(base, saved, r"head\.bias must be \[97\]")


@pytest.mark.parametrize("r", [3, 5])
def test_rank_of_the_config_disagrees(base, saved, r):
    rewrite(saved, lambda t: None)  # without sums, as a file of PEFT's
    edit(saved, r=r)
    refuse(base, saved, rf"lora_A\.weight must be \[{r}, 32\] by the model and the rank")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn], ids=str
)
def test_wrong_dtype(base, saved, dtype):
    rewrite(saved, lambda t: t.update({UP: t[UP].to(dtype)}))
    refuse(base, saved, rf"{UP} must be fp32, fp16 or bf16, got {dtype}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_files_in_16_bit_load_into_fp32(base, saved, dtype):
    rewrite(saved, lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    layer = load_adapter(base, saved).layers[0]["mlp"].up
    stored = load_file(saved / WEIGHTS)[UP]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert torch.equal(layer.lora_A["default"].weight.cpu(), stored.float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf(base, saved, value):
    rewrite(saved, lambda t: t[UP].view(-1)[5:7].fill_(value))
    refuse(base, saved, rf"{UP} must be finite, got 2 NaN or Inf")


def test_nan_is_not_saved_and_the_old_file_stays(base, saved):
    files = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = load_adapter(base, saved)
    model.layers[0]["mlp"].up.lora_A["default"].weight.data[0, 0] = math.nan
    with pytest.raises(AdapterError, match=rf"{UP} must be finite, got 1"):
        save_adapter(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == files


def test_what_is_not_whole_is_not_saved(base, tmp_path):
    model = add_lora(base, random_lora())
    layer = model.layers[0]["mlp"].up
    layer.lora_A["default"].weight.data = torch.empty(0)  # what sharding leaves behind
    with pytest.raises(AdapterError, match=rf"{UP} must be \[4, 32\], got \[0\]"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_truncated_anywhere(base, saved):
    data = (saved / WEIGHTS).read_bytes()
    lengths = {len(data) * i // 64 for i in range(64)} | {0, 1, 7, 8, 9, 20, len(data) - 1}
    for length in sorted(lengths):
        (saved / WEIGHTS).write_bytes(data[:length])
        refuse(base, saved, WEIGHTS)
    (saved / WEIGHTS).write_bytes(data + b"\0")
    refuse(base, saved, WEIGHTS)


def test_one_flipped_bit_anywhere(base, saved):
    data = (saved / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    generator = torch.Generator().manual_seed(0)
    in_header = torch.randint(header * 8, (128,), generator=generator).tolist()
    in_data = torch.randint(header * 8, len(data) * 8, (128,), generator=generator).tolist()
    for bit in in_header + in_data:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (saved / WEIGHTS).write_bytes(flipped)
        with pytest.raises(AdapterError):
            load_adapter(base, saved)
        assert untouched(base), bit
    (saved / WEIGHTS).write_bytes(data)
    load_adapter(base, saved)


@pytest.mark.parametrize("tail", [1, 100, 4096])
def test_zeros_at_the_end_as_after_a_power_cut(base, saved, tail):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:-tail] + bytes(tail))
    refuse(base, saved, "another sha256")


EDITS = [
    {"lora_alpha": 9},
    {"use_rslora": True},
    {"alpha_pattern": {}},
    {"alpha_pattern": {"down": 6}},
    {"lora_dropout": 0.1},
    {"target_modules": ["up", "down", "extra.0"]},
    {"layers_to_transform": [0, 1, 2]},
]


@pytest.mark.parametrize("change", EDITS, ids=str)
def test_edited_settings_are_found(base, saved, change):
    edit(saved, **change)
    refuse(base, saved, f"{CONFIG} must hold the settings")


def test_where_the_base_lies_may_be_edited(base, saved):
    edit(saved, base_model_name_or_path="elsewhere", revision="main", inference_mode=False)
    load_adapter(base, saved)
    assert state_of(base).configs["default"].base_model_name_or_path == "elsewhere"


def test_sums_are_all_there_or_none(base, saved):
    with safe_open(saved / WEIGHTS, "pt") as file:
        stamp = file.metadata()["fastlora"]
    for metadata in (
        {"fastlora": stamp[:-1]},
        {"fastlora": ""},
        {"fastlora": stamp, "more": "1"},
        {"gastlora": stamp},
        {"fastlora": stamp, "format": "np"},
    ):
        rewrite(saved, lambda t: None, metadata)
        refuse(base, saved, "intact metadata")
    rewrite(saved, lambda t: None, {"fastlora": stamp})
    load_adapter(base, saved)


UNSUPPORTED = [
    {"use_dora": True},
    {"lora_bias": True},
    {"bias": "all"},
    {"init_lora_weights": "pissa"},
    {"layer_replication": [[0, 2]]},
    {"target_parameters": ["experts.up"]},
    {"trainable_token_indices": [1]},
    {"alora_invocation_tokens": [1]},
    {"use_qalora": True},
    {"kasa_config": {"beta": 1}},
]


@pytest.mark.parametrize("change", UNSUPPORTED, ids=str)
def test_unsupported_settings_are_refused_by_name(base, saved, change):
    rewrite(saved, lambda t: None)
    edit(saved, **change)
    ((field, value),) = change.items()
    refuse(base, saved, rf"{CONFIG}: {field}={value!r} is".replace("[", r"\["), NotImplementedError)


def test_fields_nobody_knows_are_refused_unless_they_ask_for_nothing(base, saved):
    rewrite(saved, lambda t: None)
    edit(saved, new_in_peft=None, another=False, third={})
    load_adapter(clone(base), saved)
    edit(saved, new_in_peft=True)
    refuse(base, saved, "new_in_peft=True")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "must be JSON"),
        (b'{"r": 4,', "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b"[1]", "JSON object, got list"),
        (b"{}", "target_modules"),
        (b'{"r": "4", "target_modules": ["up"]}', "r must be an integer"),
        (b'{"target_modules": ["up"], "peft_type": "IA3"}', "peft_type must be LORA"),
        (b'{"target_modules": 5}', "target_modules must be a list"),
        (b'{"target_modules": "("}', "target_modules must be a regular expression"),
    ],
)
def test_broken_config(base, saved, text, match):
    rewrite(saved, lambda t: None)
    (saved / CONFIG).write_bytes(text)
    refuse(base, saved, match)


def test_missing_files(base, saved, tmp_path):
    refuse(base, tmp_path / "nowhere", WEIGHTS, FileNotFoundError)
    (saved / CONFIG).unlink()
    refuse(base, saved, CONFIG, FileNotFoundError)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS])
def test_pickles_are_never_run(base, saved, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (saved / WEIGHTS).unlink()
    (saved / name).write_bytes(pickle.dumps(Evil()))
    refuse(base, saved, "pickle" if name.endswith("bin") else "must begin with a header")
    assert not (tmp_path / "evil").exists()


def test_a_pickle_given_as_path(base, saved):
    (saved / "adapter.pt").write_bytes(pickle.dumps(1))
    refuse(base, saved / "adapter.pt", "pickle")


def header_of(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = {
    "header of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header past the end": struct.pack("<Q", 1000) + b"{}",
    "not JSON": struct.pack("<Q", 4) + b"{{{{" + bytes(8),
    "overlapping": header_of({"a": A, "b": A}) + bytes(8),
    "past the end": header_of({"a": A | {"data_offsets": [0, 800], "shape": [200]}}) + bytes(8),
    "negative": header_of({"a": A | {"data_offsets": [-8, 0]}}) + bytes(8),
    "reversed": header_of({"a": A | {"data_offsets": [8, 0]}}) + bytes(8),
    "huge shape": header_of({"a": A | {"shape": [2**62, 2**62]}}) + bytes(8),
    "unknown dtype": header_of({"a": A | {"dtype": "F33"}}) + bytes(8),
    "no tensors": header_of({}),
    "many keys": header_of(
        {f"../{i}": A | {"shape": [0], "data_offsets": [0, 0]} for i in range(9999)}
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_malicious_files(base, saved, kind):
    (saved / WEIGHTS).write_bytes(BAD_FILES[kind])
    refuse(base, saved, WEIGHTS)


def test_a_gigabyte_of_header_is_not_read(base, saved):
    with (saved / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)  # sparse
    refuse(base, saved, "1073741824")


def test_another_base_model(saved):
    refuse(Plain(16), saved, rf"{UP} must be \[4, 16\]")
    refuse(llama(), saved, "target_modules must match", ValueError)
    short = plain()
    del short.layers[2]
    refuse(short, saved, "unexpected")
    with torch.device("meta"):
        empty = Plain()
    refuse(empty, saved, "on the meta device", ValueError)


def test_a_name_that_is_taken_by_nn(base, saved):
    with pytest.raises(ValueError, match="adapter_name"):
        load_adapter(base, saved, "a.b")
    assert untouched(base)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_blocks_under_compile_have_their_usual_keys(base, saved):
    model = load_adapter(clone(base), saved)
    for layer in model.layers:
        layer["mlp"] = torch.compile(layer["mlp"], backend="eager")
    assert content(save_adapter(model, saved / "compiled")) == content(saved)
    load_adapter(model, saved)


@pytest.mark.parametrize("fail_at", ["write", "fsync", "replace"])
@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("same_config", [True, False])
def test_a_failing_disk_leaves_an_adapter(base, saved, monkeypatch, fail_at, times, same_config):
    old = logits(load_adapter(clone(base), saved))
    settings = settings_of_plain() if same_config else {"r": 7, "target_modules": ["extra.0"]}
    model = add_lora(clone(base), random_lora(**settings))
    new = logits(model)
    calls = 0

    def failing(real):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls > times:
                raise OSError(28, "No space left on device")
            return real(*args)

        return call

    target = {"write": (adapters, "write_file"), "fsync": (os, "fsync"), "replace": (os, "replace")}
    owner, name = target[fail_at]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    if fail_at != "fsync" and times == 2:
        save_adapter(model, saved)
    else:
        with pytest.raises(OSError, match="No space"):
            save_adapter(model, saved)
    monkeypatch.undo()
    # the rename of the tensors is what counts
    committed = times >= {"write": 2, "fsync": 99, "replace": 1}[fail_at]
    assert torch.equal(logits(load_adapter(clone(base), saved)), new if committed else old)
    if not committed:
        assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]
    save_adapter(model, saved)
    assert torch.equal(logits(load_adapter(clone(base), saved)), new)


def test_leftovers_of_killed_processes_are_removed(base, saved):
    old, new = (saved / f".{WEIGHTS}.{name}.tmp" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    save_adapter(load_adapter(base, saved), saved)
    assert not old.exists()
    assert new.exists()


def test_a_torn_pair_is_not_confused_with_an_edited_one(base, saved):
    (saved / f".{CONFIG}.0123456789abcdef.x.tmp").write_bytes((saved / CONFIG).read_bytes())
    edit(saved, lora_alpha=9)
    refuse(base, saved, "must hold the settings")


KILLER = Path(__file__).with_name("kill_while_saving.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment_leaves_an_adapter(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", KILLER, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kills at random, 0 unloadable" in done.stdout
    assert "0 unloadable of 12 exits between system calls" in done.stdout


def test_int_buffers_of_saved_modules(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    other = copy.deepcopy(model)
    add_lora(model, random_lora(target_modules=["0"], modules_to_save=["1"]))
    model.train()(torch.randn(4, 8))
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert other[1].num_batches_tracked == 1
    x = torch.randn(3, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))
    rewrite(
        tmp_path, lambda t: t.update({"base_model.model.1.num_batches_tracked": torch.tensor(1.0)})
    )
    with pytest.raises(AdapterError, match=r"num_batches_tracked must be torch\.int64"):
        load_adapter(copy.deepcopy(unload_lora(other)), tmp_path)
