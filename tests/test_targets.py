"""Target selection means what it means in PEFT, compared with PEFT itself; refusals are by name."""

import pytest
import torch
from model_helpers import MODELS, Plain, Tied, bert, gpt2, llama, nested, plain
from torch import nn

from fastlora.config import LoraConfig
from fastlora.model import add_lora, quantize_model
from fastlora.nn import LoraLinear
from fastlora.targets import (
    has_suffix,
    make_plan,
    minimal_names,
    quantizable,
    walk,
    with_task_heads,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# PEFT reads a property of transformers that is about to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ATTENTION = ["q_proj", "v_proj"]
CASES = [  # model, settings
    ("llama", {"target_modules": ATTENTION}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": "ALL-LINEAR", "exclude_modules": ["down_proj", "1.mlp.up_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": r".*\.layers\.1\..*(q|up)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"}),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "1.self_attn.k_proj"]}),
    ("llama", {"target_modules": [*ATTENTION, "lm_head"]}),
    ("llama", {"target_modules": ATTENTION, "layers_to_transform": 1}),
    (
        "llama",
        {"target_modules": ATTENTION, "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    (
        "llama",
        {
            "target_modules": ATTENTION,
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
    ),
    # a whole name is a target whatever its layer
    (
        "llama",
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
    ),
    (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3, "up_proj": 5},
            "alpha_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 7, "down_proj": 9},
        },
    ),
    # the first pattern that matches wins
    (
        "llama",
        {"target_modules": ATTENTION, "rank_pattern": {r".*": 2, "q_proj": 3}, "use_rslora": True},
    ),
    ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    (
        "gpt2",
        {
            "target_modules": ["c_fc"],
            "layers_to_transform": [1],
            "layers_pattern": "h",
            "fan_in_fan_out": True,
        },
    ),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    (
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["pooler"], "task_type": "TOKEN_CLS"},
    ),
    ("plain", {"target_modules": "all-linear"}),
    ("plain", {"target_modules": ["up", "extra.0"], "modules_to_save": ["head"]}),
    ("plain", {"target_modules": "all-linear", "modules_to_save": ["extra"]}),
    # the layer counts, not the expert
    ("plain", {"target_modules": ["up"], "layers_to_transform": [1]}),
    (
        "plain",
        {"target_modules": ["up"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ),
    ("plain", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "experts"}),
    ("nested", {"target_modules": ["up"], "layers_to_transform": [1]}),
    ("nested", {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("nested", {"target_modules": ["up"]}),
    ("nested", {"target_modules": ["up", "upper"], "rank_pattern": {"up": 2}}),
    ("nested", {"target_modules": "all-linear", "exclude_modules": ["up"]}),
]


def peft_layers(model, settings):
    """What PEFT does to a model: path -> (rank, alpha), and the paths of modules to save."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    modules = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules()}
    layers = {
        n: (m.r["default"], m.lora_alpha["default"])
        for n, m in modules.items()
        if isinstance(m, LoraLayer)
    }
    return layers, {n for n, m in modules.items() if isinstance(m, ModulesToSaveWrapper)}


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_targets_as_in_peft(kind, settings):
    build = MODELS.get(kind, nested)
    cfg = with_task_heads(LoraConfig(r=4, lora_alpha=6, **settings))
    plan = make_plan(build(), cfg)
    layers, saved = peft_layers(build(), settings)
    assert plan.layers == layers
    assert {*plan.saved} == saved


@pytest.mark.parametrize(("kind", "settings"), CASES[:3] + CASES[16:17] + CASES[19:20])
def test_add_lora_adapts_the_plan(kind, settings):
    model = MODELS[kind]()
    add_lora(model, LoraConfig(r=4, lora_alpha=6, **settings))
    layers, _ = peft_layers(MODELS[kind](), settings)
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert {n: (m.r["default"], m.lora_alpha["default"]) for n, m in adapted.items()} == layers


@pytest.mark.parametrize("kind", MODELS)
def test_minimal_names_match_their_targets_only(kind):
    model = MODELS[kind]()
    plan = make_plan(model, LoraConfig())
    names = minimal_names(plan.layers, model)
    assert isinstance(names, list)
    assert {s.path for s in walk(model) if has_suffix(s.path, names)} == {*plan.layers}


def test_minimal_names_fall_back_to_a_regular_expression():
    model = nn.ModuleDict(
        {"proj": nn.Linear(4, 4), "block": nn.ModuleDict({"proj": nn.Linear(4, 4)})}
    )
    pattern = minimal_names(["proj"], model)
    assert isinstance(pattern, str)
    assert [*make_plan(model, LoraConfig(target_modules=pattern)).layers] == ["proj"]


REFUSED = [  # model, settings, what the message names
    (plain, {"target_modules": ["up", "q_prj"]}, r"\['q_prj'\]"),
    (plain, {"target_modules": r"nothing.*"}, "nothing"),
    (plain, {"target_modules": ["embed"]}, "embed, which is Embedding"),
    (plain, {"target_modules": ["mlp"]}, r"layers\.0\.mlp, which is Block"),
    (plain, {"target_modules": ["up"], "exclude_modules": ["gone"]}, "gone"),
    (plain, {"target_modules": ["up"], "exclude_modules": ["up"]}, "excluded"),
    (plain, {"target_modules": ["up"], "modules_to_save": ["haed"]}, "haed"),
    (
        plain,
        {"target_modules": ["head"], "modules_to_save": ["layers"]},
        "layers, which is a ModuleList",
    ),
    (
        plain,
        {"target_modules": ["up"], "modules_to_save": ["lp"]},
        r"layers\.0\.mlp, which has layers",
    ),
    (
        plain,
        {"target_modules": ["up"], "modules_to_save": ["extra", "extra.0"]},
        r"extra\.0, which is part",
    ),
    (plain, {"target_modules": ["up"], "rank_pattern": {"dwon": 4}}, "dwon"),
    (plain, {"target_modules": ["up"], "alpha_pattern": {"down": 4}}, "'down'"),
    (plain, {"target_modules": ["up"], "layers_to_transform": [9]}, r"\['up'\]"),
    (
        bert,
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["clasifier"]},
        "clasifier",
    ),
]


@pytest.mark.parametrize(("build", "settings", "named"), REFUSED)
def test_refused_by_name_before_anything_changes(build, settings, named):
    model = build()
    before = {n: (type(m), id(m)) for n, m in model.named_modules()}
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, NotImplementedError), match=named):
        add_lora(model, LoraConfig(**settings))
    assert {n: (type(m), id(m)) for n, m in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_embedding_target_is_a_known_gap():
    with pytest.raises(NotImplementedError, match="embed"):
        add_lora(plain(), LoraConfig(target_modules=["embed"]))


class Subclass(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Readers(nn.Module):
    """Layers whose weights somebody else reads, or whose class or hooks do more."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.special = Subclass(8, 8)
        self.plain = nn.Linear(8, 8)


READ = ["attn.out_proj", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2"]


def test_layers_read_by_their_owner_are_left_out_with_a_reason():
    plan = make_plan(Readers(), LoraConfig())
    assert [*plan.layers] == ["plain"]
    assert {*plan.skipped} == {*READ, "special"}
    assert "MultiheadAttention" in plan.skipped["attn.out_proj"]
    assert "TransformerEncoderLayer" in plan.skipped["encoder.linear1"]
    assert "Subclass" in plan.skipped["special"]
    chosen, skipped = quantizable(Readers(), ())
    assert [*chosen] == ["plain"]
    assert skipped == plan.skipped


@pytest.mark.parametrize("path", [*READ, "special"])
def test_layers_read_by_their_owner_are_refused_when_named(path):
    with pytest.raises(ValueError, match=path):
        add_lora(Readers(), LoraConfig(target_modules=[path]))


def test_hooks_would_be_lost():
    model = plain()
    model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"no hooks.*head"):
        add_lora(model, LoraConfig())
    with pytest.raises(ValueError, match=r"no hooks.*head"):
        quantize_model(model)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())


def test_old_weight_norm_is_a_hook():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[0])
    with pytest.raises(ValueError, match="no hooks"):
        quantize_model(model)


def mamba():
    cfg = transformers.MambaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(cfg)


def jamba():
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, attn_layer_offset=1)
    cfg = transformers.JambaConfig(
        **sizes, **heads, attn_layer_period=2, num_experts=1, mamba_d_state=4, mamba_dt_rank=32
    )
    return transformers.JambaForCausalLM(cfg)


def bloom():
    cfg = transformers.BloomConfig(vocab_size=32, hidden_size=64, n_layer=1, n_head=2)
    cfg.pretraining_tp, cfg.slow_but_exact = 2, True
    return transformers.BloomForCausalLM(cfg)


OWNED = [  # model, paths of layers that their owner reads
    (mamba, [f"backbone.layers.0.mixer.{n}" for n in ("dt_proj", "out_proj", "x_proj")]),
    (jamba, ["model.layers.0.mamba.dt_proj"]),
    (
        bloom,
        ["transformer.h.0.mlp.dense_4h_to_h", "transformer.h.0.self_attention.dense"],
    ),
]


@pytest.mark.parametrize(("build", "read"), OWNED)
def test_weights_that_their_owner_reads_are_left_alone(build, read):
    """A 4-bit layer has none to read; and an adapter over it would never be asked."""
    torch.manual_seed(0)
    model = build()
    plan = make_plan(model, LoraConfig(target_modules="all-linear"))
    assert {path: "reads its weight" in why for path, why in plan.skipped.items()} == {
        "lm_head": False,
        **dict.fromkeys(read, True),
    }
    quantize_model(model)
    assert model(torch.arange(9)[None]).logits.isfinite().all()
    add_lora(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model(torch.arange(9)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    name = read[0].rpartition(".")[2]
    with pytest.raises(ValueError, match=rf"{name}.*reads its weight directly"):
        add_lora(build(), LoraConfig(target_modules=[name]))


def test_bloom_is_quantised_whole_where_it_is_not_sliced():
    model = bloom()
    for module in model.modules():
        if hasattr(module, "slow_but_exact"):
            module.slow_but_exact = False
    assert {*quantizable(model, ())[1]} == {"lm_head"}


QUANTIZED = [  # model, skip_modules, paths left dense and a word of the reason
    (lambda: llama(), ("lm_head",), {"lm_head": "output embedding"}),
    (lambda: llama(tied=True), (), {"lm_head": "output embedding"}),
    (gpt2, (), {"lm_head": "output embedding"}),
    (bert, (), {"classifier": "task head"}),
    (Tied, (), {"out": "tied to embed"}),
    (Plain, (), {}),
    (
        Plain,
        ("head", "extra", "layers.0.mlp.up"),
        dict.fromkeys(("head", "extra.0", "extra.2", "layers.0.mlp.up"), "named"),
    ),
    (Plain, ["mlp"], {f"layers.{i}.mlp.{n}": "named" for i in range(3) for n in ("up", "down")}),
]


@pytest.mark.parametrize(("build", "skip", "dense"), QUANTIZED)
def test_what_is_quantised(build, skip, dense):
    model = build()
    chosen, skipped = quantizable(model, skip)
    assert {*skipped} == {*dense}
    assert all(word in skipped[path] for path, word in dense.items())
    linear = {
        s.path
        for s in walk(model)
        if "Linear" in type(s.module).__name__ or "Conv1D" in type(s.module).__name__
    }
    assert {*chosen} == linear - {*dense}


def test_skip_modules_must_match():
    with pytest.raises(ValueError, match="haed"):
        quantize_model(plain(), skip_modules=("haed",))


def test_a_target_in_a_module_that_another_adapter_trains_is_refused():
    model = plain()
    add_lora(model, LoraConfig(target_modules=["up"], modules_to_save=["extra"]), "a")
    for targets in (["extra.0"], "all-linear"):
        with pytest.raises(ValueError, match=r"extra\.0, but it is trained whole by adapter a"):
            add_lora(model, LoraConfig(target_modules=targets), "b")
    with pytest.raises(ValueError, match=r"extra\.2, which shares modules"):
        add_lora(model, LoraConfig(target_modules=["up"], modules_to_save=["extra.2"]), "b")
    add_lora(model, LoraConfig(target_modules="all-linear", modules_to_save=["extra"]), "b")
    assert torch.is_tensor(model.extra.modules_to_save["b"][0].weight)
