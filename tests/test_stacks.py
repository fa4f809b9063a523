"""Training stacks: what each needs to run on fastlora, over the package itself or its interface."""

import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from helpers import DEVICE
from model_helpers import VOCAB, llama, logits, tokens
from peft_helpers import adapted, assert_same, config, dense, output, peft
from readme import blocks
from stack_helpers import needs, plugin
from torch import nn

import fastlora
from fastlora.integrations import torchtune
from fastlora.integrations.peft.layers import FastLora

LORA = peft.tuners.lora.LoraLayer
STACKS = ("axolotl", "lightning", "llamafactory", "torchtune")


@pytest.fixture
def forgotten():
    """Leave PEFT as it was."""
    yield
    fastlora.disable()


def are_fast(model):
    layers = [m for m in model.modules() if isinstance(m, LORA)]
    assert layers
    return {isinstance(m, FastLora) for m in layers} == {True}


def test_no_stack_is_imported_before_it_is_asked_for():
    code = f"import sys, fastlora, fastlora.integrations; print({ {*STACKS} } & {{*sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# --- Axolotl ---------------------------------------------------------------------------------


@pytest.fixture
def axolotl(monkeypatch, forgotten):
    return plugin("axolotl", monkeypatch)


def test_axolotl_kernels_are_off_before_axolotl_turns_them_on(axolotl):
    cfg = {"adapter": "qlora"}
    axolotl.FastLoraPlugin().register(cfg)
    assert cfg == {"adapter": "qlora"} | dict.fromkeys(axolotl.KERNELS, False)
    assert len(axolotl.KERNELS) == 4


@pytest.mark.parametrize("hook", ["register", "pre_model_load"])
def test_axolotl_kernels_that_are_on_are_refused(axolotl, hook):
    for name in axolotl.KERNELS:
        with pytest.raises(ValueError, match=f"must be off beside fastlora, got {name}: true"):
            getattr(axolotl.FastLoraPlugin(), hook)({"adapter": "lora", name: True})


@pytest.mark.parametrize("cfg", [{}, {"adapter": None}, {"adapter": "llama-adapter"}])
def test_axolotl_without_lora_is_refused(axolotl, cfg):
    with pytest.raises(ValueError, match="adapter must be lora or qlora, got"):
        axolotl.FastLoraPlugin().register(cfg)


def test_axolotl_patches_the_model(axolotl, caplog):
    ours, cfg = axolotl.FastLoraPlugin(), {"adapter": "lora"}
    model = adapted("dense")
    expected = output(model)
    assert not are_fast(model)
    with caplog.at_level("INFO", "fastlora"):
        ours.post_lora_load(cfg, model)
    assert are_fast(model)
    assert_same(output(model), expected)
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "14 of 14 layers run on fastlora" in caplog.text


def test_axolotl_tells_the_log_what_is_not_fast(axolotl, caplog):
    model = adapted("dense", use_dora=True)
    axolotl.FastLoraPlugin().post_lora_load({"adapter": "lora"}, model)
    assert "14 of 14 layers run PEFT's own forward: adapter 'default' is no plain" in caplog.text


def test_axolotl_trainers_that_add_the_adapter_get_fast_layers(axolotl):
    ours, cfg, base = axolotl.FastLoraPlugin(), {"adapter": "lora", "rl": "dpo"}, dense()
    ours.register(cfg)
    ours.pre_model_load(cfg)
    ours.post_lora_load(cfg, base)  # DPO: no adapter yet
    assert are_fast(peft.get_peft_model(base, config()))


def test_axolotl_recipe(axolotl):
    yaml = pytest.importorskip("yaml")
    (text,) = blocks("yaml axolotl")
    cfg = yaml.safe_load(text)
    (name,) = cfg["plugins"]
    module, _, name = name.rpartition(".")
    assert module == "fastlora.integrations.axolotl"
    getattr(axolotl, name)().register(cfg)


@needs("axolotl")
def test_axolotl_itself(forgotten):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    yaml = pytest.importorskip("yaml")
    (text,) = blocks("yaml axolotl")
    recipe = yaml.safe_load(text)
    (name,) = recipe["plugins"]
    settings = {key: value for key, value in recipe.items() if key != "plugins"}
    machine = {
        "capabilities": {"bf16": True, "n_gpu": 1, "compute_capability": "sm_90"},
        "env_capabilities": {"torch_version": "2.13.0"},
    }
    kernels = import_module("fastlora.integrations.axolotl").KERNELS
    alone = validate_config(DictDefault(settings), **machine)
    assert all(alone[kernel] for kernel in kernels), "Axolotl turns them on itself"
    cfg, manager = DictDefault(recipe), PluginManager.get_instance()
    manager.register(name)
    manager.plugins[name].register(cfg)
    cfg = validate_config(cfg, **machine)
    assert not any(cfg[kernel] for kernel in kernels)
    model = adapted("dense")
    manager.pre_model_load(cfg)
    manager.post_lora_load(cfg, model)
    assert are_fast(model)


# --- LLaMA-Factory ---------------------------------------------------------------------------


def test_llamafactory_kernel(monkeypatch):
    plugin("llamafactory", monkeypatch)
    registry = import_module("llamafactory.v1.plugins.model_plugins.kernels.registry").Registry
    kernel, model = registry.get("fastlora"), adapted("dense")
    expected = output(model)
    assert kernel.apply(model=model) is model
    assert are_fast(model)
    assert_same(output(model), expected)
    with pytest.raises(ValueError, match="model must have LoRA layers of PEFT"):
        kernel.apply(model=dense())


@needs("llamafactory")
def test_llamafactory_itself():
    """By the names that a config of v1 has, after its own way to an adapter."""
    from llamafactory.v1.plugins.model_plugins.kernels.interface import KernelPlugin
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

    import_module("fastlora.integrations.llamafactory")
    model = PeftPlugin("lora")(dense(), {"name": "lora", "r": 4}, True)
    assert not are_fast(model)
    model = KernelPlugin("auto")(model=model, include_kernels="fastlora")
    assert are_fast(model)


@needs("llamafactory")
def test_llamafactory_recipes(forgotten, monkeypatch):
    """Each with its training replaced by what it does to add an adapter."""
    from llamafactory.train import tuner
    from llamafactory.v1.plugins.model_plugins import peft as v1
    from llamafactory.v1.plugins.model_plugins.kernels.interface import apply_default_kernels
    from llamafactory.v1.trainers import sft_trainer

    yaml = pytest.importorskip("yaml")
    (text,) = blocks("yaml llamafactory")
    kernels = yaml.safe_load(text)["kernel_config"]
    assert kernels.pop("name") == "auto"
    made = []

    def run(**kernels):
        model = v1.get_lora_model(dense(), {"r": 4}, is_train=True)
        made.append(apply_default_kernels(model, **kernels))

    monkeypatch.setattr(tuner, "run_exp", run)
    monkeypatch.setattr(sft_trainer, "run_sft", lambda: run(**kernels))
    for source in blocks("python llamafactory"):
        exec(compile(source, "README.md", "exec"), {})
        fastlora.disable()
    assert [are_fast(model) for model in made] == [True, True]


# --- Lightning -------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_lightning_callback(package, monkeypatch):
    if package != "lightning":
        monkeypatch.setitem(sys.modules, "lightning", None)
        monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    callback = plugin("lightning", monkeypatch, package).FastLora()
    assert type(callback).__mro__[1].__module__.partition(".")[0] in (package, "stack_helpers")
    module = nn.Module()
    module.model = adapted("dense")
    assert callback.report is None
    callback.on_fit_start(None, module)
    assert are_fast(module)
    assert callback.report.fast == 14
    assert callback.report.rows[0].layer.startswith("model.base_model.")


@needs("lightning")
def test_lightning_itself(tmp_path):
    """Two fits, the second from a checkpoint of the first, take the steps of a plain loop."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    from fastlora.integrations.lightning import FastLora as Patches

    class Tuned(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = adapted("dense").cpu()
            self.losses = []

        def training_step(self, batch):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch):
            self.model(input_ids=batch)

        def configure_optimizers(self):
            named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
            return fastlora.optim.AdamW(named, lr=1e-2)

    rows = torch.randint(VOCAB, (8, 9), generator=torch.Generator().manual_seed(3))
    loader = DataLoader(rows, batch_size=2)

    def fit(epochs, **kwargs):
        module, patches = Tuned(), Patches()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[patches, ModelCheckpoint(tmp_path, filename="last")],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, loader, **kwargs)
        assert patches.report.fast == 14
        return module.losses

    first = fit(1)
    second = fit(2, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    plain = Tuned()
    optimizer = plain.configure_optimizers()
    for batch in [*loader, *loader]:
        plain.training_step(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert first + second == pytest.approx(plain.losses, rel=1e-5)


@needs("lightning")
def test_lightning_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,) = blocks("python lightning")
    names = {
        "AdamW": fastlora.optim.AdamW,
        "DataLoader": torch.utils.data.DataLoader,
        "peft_model": adapted("dense"),
        "tokens": tokens(),
    }
    exec(compile(source, "README.md", "exec"), names)
    assert are_fast(names["peft_model"])


# --- torchtune -------------------------------------------------------------------------------

KINDS = ("gemma", "gemma2", "llama", "mistral", "qwen2")
NAMES = {
    "q_proj": "attn.q_proj",
    "k_proj": "attn.k_proj",
    "v_proj": "attn.v_proj",
    "o_proj": "attn.output_proj",
    "gate_proj": "mlp.w1",
    "down_proj": "mlp.w2",
    "up_proj": "mlp.w3",
}


def adapter(model):
    """An adapter for a tiny Llama as torchtune has it: every tensor random."""
    state = {}
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear:
            *_, name = path.split(".")
            number = "".join(filter(str.isdigit, path))
            place = "output" if name == "lm_head" else f"layers.{number}.{NAMES[name]}"
            state[f"{place}.lora_a.weight"] = torch.randn(4, layer.in_features)
            state[f"{place}.lora_b.weight"] = torch.randn(layer.out_features, 4) / 8
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_torchtune_there_and_back(kind):
    model = llama()
    model.config.model_type = kind
    state = adapter(model)
    theirs = torchtune.to_peft(state, model.config)
    assert len(theirs) == len(state) == 30
    back = torchtune.from_peft(theirs, model.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_torchtune_pairs_that_rotate_together_stay_together(kind, name, heads):
    model, size = llama(), 16
    model.config.model_type = kind
    state = adapter(model)
    theirs = torchtune.to_peft(state, model.config)
    b = state[f"layers.1.attn.{name}.lora_b.weight"]
    got = theirs[f"base_model.model.model.layers.1.self_attn.{name}.lora_B.weight"]
    if kind == "qwen2":  # rotates as transformers does
        assert torch.equal(got, b)
        return
    for head in range(heads):
        for i in range(size // 2):
            start = head * size
            assert torch.equal(got[start + i], b[start + 2 * i])
            assert torch.equal(got[start + size // 2 + i], b[start + 2 * i + 1])


def test_torchtune_adapters_load_in_peft_and_here(tmp_path):
    model = llama()
    # as a model has them, and in no order that a file could take
    state = {key: nn.Parameter(tensor.T).T for key, tensor in adapter(model).items()}
    before, base = logits(model), llama()
    base.load_state_dict(model.state_dict())
    folder = torchtune.save_as_peft(state, tmp_path / "adapter", model.config, lora_alpha=6)
    fastlora.load_adapter(model, folder)
    theirs = peft.PeftModel.from_pretrained(base, str(folder))
    assert (logits(model) - before).abs().max() > 0.1
    assert_same(logits(model), logits(theirs))
    assert fastlora.adapters._parse_config(folder / "adapter_config.json").lora_alpha == 6


@pytest.mark.parametrize(
    ("key", "shape", "error", "text"),
    [
        ("layers.0.attn.q_proj.magnitude", (64,), NotImplementedError, "DoRA is not supported"),
        ("layers.0.attn.q_proj.weight", (64, 64), ValueError, "keys of a LoRA adapter only, got"),
        ("layers.0.moe.w1.lora_a.weight", (4, 64), ValueError, "keys of a LoRA adapter only, got"),
        ("layers.0.attn.q_proj.lora_b.weight", (60, 4), ValueError, r"be \[64, R\], got \[60, 4\]"),
        ("layers.0.attn.k_proj.lora_b.weight", (64, 4), ValueError, r"be \[32, R\], got \[64, 4\]"),
    ],
)
def test_torchtune_refuses(key, shape, error, text):
    with pytest.raises(error, match=text):
        torchtune.to_peft({key: torch.zeros(shape)}, llama().config)


def test_torchtune_refuses_peft_keys_of_other_adapters():
    with pytest.raises(NotImplementedError, match="DoRA is not supported"):
        torchtune.from_peft({"base.lora_magnitude_vector": torch.zeros(2)}, llama().config)
    with pytest.raises(ValueError, match="keys of a LoRA adapter only, got base_model"):
        torchtune.from_peft({"base_model.model.x.lora_A.weight": torch.zeros(2)}, llama().config)


def test_torchtune_refuses_models_it_does_not_know():
    shape = SimpleNamespace(model_type="phi3")
    with pytest.raises(NotImplementedError, match=r"model_type must be one of .*, got 'phi3'"):
        torchtune.to_peft({"layers.0.mlp.w2.lora_b.weight": torch.zeros(4, 2)}, shape)


def test_torchtune_refuses_several_ranks(tmp_path):
    state = adapter(llama())
    state["layers.0.mlp.w1.lora_a.weight"] = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"state must have layers of one rank, got \[2, 4\]"):
        torchtune.save_as_peft(state, tmp_path, llama().config, lora_alpha=8)
    assert not [*tmp_path.iterdir()]


def small(kind):
    """A model in transformers, and in torchtune with adapters, of the same weights."""
    import transformers
    from torchtune.models import convert_weights, gemma, gemma2, llama2, mistral, qwen2
    from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune
    from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

    head = {"head_dim": 24} if "gemma" in kind else {}
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **head,
    )
    config.query_pre_attn_scalar = 24  # torchtune takes the size of a head
    model = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    modules = {"llama": llama2, "gemma": gemma, "gemma2": gemma2, "mistral": mistral}
    make = getattr(modules.get(kind, qwen2), "lora_" + ("llama2" if kind == "llama" else kind))
    theirs = make(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        True,
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        intermediate_dim=96,
        max_seq_len=32,
        norm_eps=1e-6,
        lora_rank=4,
        lora_alpha=6.0,
        **head,
        **({"rope_base": 10000.0} if kind == "qwen2" else {}),
    )
    to_tune = {"qwen2": qwen2_hf_to_tune, "gemma2": gemma2_hf_to_tune}
    facts = dict(num_heads=4, num_kv_heads=2, dim=64, **head)
    base = to_tune.get(kind, convert_weights.hf_to_tune)(model.state_dict(), **facts)
    theirs.load_state_dict(base, strict=False)
    return model, theirs.eval(), facts


@needs("torchtune")
@pytest.mark.parametrize("kind", KINDS)
def test_torchtune_itself(kind, tmp_path):
    """Its model and transformers' compute the same, without an adapter and with one."""
    from torchtune.models.convert_weights import tune_to_peft_adapter_weights

    model, theirs, facts = small(kind)
    with torch.no_grad():
        apart = (logits(model) - theirs(tokens().cpu()).to(DEVICE)).abs().max()
    # sums and rotations in another order; torchtune's Gemma 2 is not quite the same
    assert apart < (2e-3 if kind == "gemma2" else 1e-4)
    state = {k: v for k, v in adapter(model).items() if k in theirs.state_dict()}
    assert len(state) == 28
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():
        expected = theirs(tokens().cpu()).to(DEVICE)
    folder = torchtune.save_as_peft(state, tmp_path, model.config, lora_alpha=6)
    assert (logits(model) - expected).abs().max() > 0.1
    fastlora.load_adapter(model, folder)
    assert (logits(model) - expected).abs().max() < 1e-4 + 4 * apart
    own, ours = tune_to_peft_adapter_weights(state, **facts), torchtune.to_peft(state, model.config)
    assert own.keys() == ours.keys()
    # torchtune 0.6 reorders the adapters of Qwen 2 too, whose weights it leaves in order
    assert all(torch.equal(own[key], ours[key]) for key in own) is (kind != "qwen2")
