"""Optimizers in the hands of torch, accelerate and transformers: what works as with torch's own."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fastlora
from fastlora.optim import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, lora_plus_groups

KINDS = [AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit]
SHAPES = [(3,), (17, 5), (300,), (0, 4), (8, 64)]  # blocks of 256 begin and end inside of them
RELATIVE = 1e-6  # to the largest magnitude of a tensor: what fp32 AdamW promises over many steps


pytestmark = pytest.mark.usefixtures("one_thread")


def parameters():
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def give_gradients(params, step):
    g = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


def assert_close(ours, theirs):
    for mine, its in zip(ours, theirs, strict=True):
        if its.numel():
            assert (mine - its).abs().max() <= RELATIVE * its.abs().max()


def assert_equal(ours, theirs):
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)


def moments(optimizer):
    """All that is saved of the state, as tensors."""
    (run,) = optimizer.state_dict()["state"]["runs"]
    tensors = [value for value in run.values() if isinstance(value, torch.Tensor)]
    return [*tensors, torch.tensor(run["steps"])]


def train(params, optimizer, steps, scheduler=None):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


# --- torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdamW, PagedAdamW])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
        # writes betas too
        lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=60),
    ],
    ids=["lambda", "cosine", "one cycle"],
)
def test_schedules(schedule, kind):
    ours, theirs = parameters(), parameters()
    a, b = kind(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    train(ours, a, range(50), schedule(a))
    train(theirs, b, range(50), schedule(b))
    assert_close(ours, theirs)
    for key in ("lr", "betas", "initial_lr"):
        assert a.param_groups[0][key] == b.param_groups[0][key]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_the_scaler_skips_changes_nothing(kind):
    ours = parameters()
    optimizer = kind(ours, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, bad in enumerate([False, True, False]):
        # gradients of the scaled loss
        loss = sum((p * torch.randn(p.shape)).sum() for p in ours)
        scaler.scale(loss).backward()
        if bad:
            ours[1].grad[3, 2] = torch.inf
        before = [p.detach().clone() for p in ours]
        kept = moments(optimizer) if step else []
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if bad:
            assert_equal(ours, before)
            assert_equal(moments(optimizer), kept)
            assert scaler.get_scale() == 2.0
        else:
            assert not torch.equal(ours[1], before[1])
    (run,) = optimizer.state_dict()["state"]["runs"]
    assert run["steps"] == [2] * len(SHAPES)


def test_the_scaler_and_clipping_follow_torch():
    """A power of two as the scale costs no bits."""
    ours, theirs = parameters(), parameters()
    pairs = [(ours, AdamW(ours, lr=1e-2)), (theirs, torch.optim.AdamW(theirs, lr=1e-2))]
    for params, optimizer in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(20):
            give_gradients(params, step)
            scaler.scale(torch.zeros(()))  # makes the scale
            for p in params:
                p.grad *= 1024
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(params, 0.5)
            assert norm > 0.5
            scaler.step(optimizer)
            scaler.update()
    assert_close(ours, theirs)


def test_closure():
    params = parameters()
    optimizer = AdamW(params, lr=1e-2)
    calls = []

    def closure():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        calls.append(loss.item())
        return loss

    returned = [optimizer.step(closure).item() for _ in range(3)]
    assert returned == calls
    assert calls[0] > calls[1] > calls[2]
    assert optimizer.step() is None


def test_hooks():
    params = parameters()
    optimizer = AdamW(params)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(params, optimizer, range(1))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {key: value for key, value in state.items() if key != "more"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(state)
    assert seen == ["before", "after", "save", "loaded"]


@pytest.mark.parametrize("kind", [AdamW, PagedAdamW])
def test_groups_added_later_begin_anew(kind):
    ours, theirs = parameters(), parameters()
    a, b = (kind(ours[:3], lr=1e-2), torch.optim.AdamW(theirs[:3], lr=1e-2))
    for params, optimizer in ((ours, a), (theirs, b)):
        train(params[:3], optimizer, range(5))
        optimizer.add_param_group({"params": params[3:], "lr": 1e-3, "weight_decay": 0.5})
        train(params, optimizer, range(5, 10))
    assert_close(ours, theirs)
    # what was saved has both, and loads into an optimizer that has had both from the start
    fresh = kind([{"params": ours[:3]}, {"params": ours[3:]}])
    fresh.load_state_dict(a.state_dict())
    assert fresh.param_groups[1]["weight_decay"] == 0.5
    before = [p.detach().clone() for p in ours]
    train(ours, a, [10])
    after = [p.detach().clone() for p in ours]
    with torch.no_grad():
        for p, old in zip(ours, before, strict=True):
            p.copy_(old)
    train(ours, fresh, [10])
    assert_equal(ours, after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["copy", "pickle"],
)
def test_copies_go_on_alike_and_alone(duplicate, kind):
    params = parameters()
    optimizer = kind(params, lr=1e-2)
    train(params, optimizer, range(3))
    others, other = duplicate((params, optimizer))
    assert type(other) is kind
    assert other.paged is optimizer.paged
    train(others, other, range(3, 6))
    assert not torch.equal(params[0], others[0])
    assert moments(optimizer)[-1].tolist() == [3] * len(SHAPES)
    train(params, optimizer, range(3, 6))
    assert_equal(params, others)
    assert_equal(moments(optimizer), moments(other))


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
def test_without_gradient_or_decay_a_coordinate_stays_where_it_is(kind):
    """In 8 bits too, among neighbours of all magnitudes that share its block."""
    p = nn.Parameter(torch.randn(700))
    still = torch.rand(700) < 0.1
    before, scales = p.detach().clone(), 10.0 ** torch.linspace(-6, 2, 700)
    optimizer = kind([p], lr=1e-2, weight_decay=0.0)
    for _ in range(500):
        p.grad = torch.where(still, 0.0, torch.randn(700) * scales)
        optimizer.step()
    assert torch.equal(p[still], before[still])
    assert (p != before)[~still].all()


# --- LoRA+ -----------------------------------------------------------------------------------


def test_lora_plus_groups_of_our_layers():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    fastlora.add_lora(model, fastlora.LoraConfig(r=4, target_modules=["0"]))
    model[2].requires_grad_()
    rest, up = lora_plus_groups(model, 1e-3, ratio=8.0, weight_decay=0.1)
    assert [name for name, _ in rest["params"]] == ["0.lora_A.default.weight", "2.weight", "2.bias"]
    assert [name for name, _ in up["params"]] == ["0.lora_B.default.weight"]
    assert [(g["lr"], g["weight_decay"]) for g in (rest, up)] == [(1e-3, 0.1), (8e-3, 0.1)]
    optimizer = AdamW([rest, up])
    assert [name for name, _ in optimizer.named_params()][-1] == "0.lora_B.default.weight"
    model[0].lora_A["default"].requires_grad_(False)
    model[2].requires_grad_(False)
    (only,) = lora_plus_groups(model, 1e-3)
    assert only["lr"] == 16e-3


def test_lora_plus_groups_of_peft():
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8))
    net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    _, up = lora_plus_groups(net, 1e-3)
    names = [name.removeprefix("base_model.model.") for name, _ in up["params"]]
    assert names == ["0.lora_embedding_B.default", "1.lora_B.default.weight"]


def test_lora_plus_groups_without_b_are_refused():
    with pytest.raises(ValueError, match="lora_B or lora_embedding_B, got none among 2"):
        lora_plus_groups(nn.Linear(4, 4), 1e-3)
    with pytest.raises(ValueError, match="ratio must be above 0, got 0"):
        lora_plus_groups(nn.Linear(4, 4), 1e-3, ratio=0)


# --- accelerate ------------------------------------------------------------------------------


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True)
    # shared by all of a process
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind, accelerator, tmp_path):
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 2))
    optimizer = kind(model.named_parameters(), lr=1e-2)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, 20)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    params = [*model.parameters()]

    def steps(seeds):
        for seed in seeds:
            x = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))
            accelerator.backward(model(x).square().mean())
            accelerator.clip_grad_norm_(params, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    steps(range(4))
    accelerator.save_state(str(tmp_path))
    steps(range(4, 8))
    expected = [p.detach().clone() for p in params]
    steps(range(8, 10))
    accelerator.load_state(str(tmp_path))
    assert optimizer.optimizer.paged is kind.__name__.startswith("Paged")
    steps(range(4, 8))
    assert_equal(params, expected)


@pytest.mark.usefixtures("accelerator")
def test_the_scaler_of_accelerate_skips_steps():
    from accelerate.optimizer import AcceleratedOptimizer

    params = parameters()
    ours = AdamW8bit(params, lr=1e-2)
    optimizer = AcceleratedOptimizer(ours, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    for bad in (False, True, False):
        optimizer.scaler.scale(sum((p * torch.randn(p.shape)).sum() for p in params)).backward()
        if bad:
            params[0].grad[1] = torch.nan
        before = [p.detach().clone() for p in params]
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped is bad
        assert torch.equal(before[0], params[0]) is bad
    assert moments(ours)[-1].tolist() == [2] * len(SHAPES)


# --- transformers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("transformers")


@pytest.fixture
def llama(hf):
    def make():
        torch.manual_seed(0)
        config = hf.LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        return hf.LlamaForCausalLM(config)

    return make


@pytest.fixture
def arguments(hf, tmp_path):
    def make(**values):
        defaults = dict(
            output_dir=str(tmp_path),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=0.1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        return hf.TrainingArguments(**defaults | values)

    return make


def trainer_of(hf, model, args, pair):
    rows = torch.randint(32, (8, 12), generator=torch.Generator().manual_seed(3)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    return hf.Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=pair)


def adapted(model, package):
    if package == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules="all-linear")
        return peft.get_peft_model(model, config)
    fastlora.add_lora(model, fastlora.LoraConfig(r=4))
    return fastlora.prepare_for_training(model)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_trainer_resumes_to_the_bit(name, hf, llama, arguments, tmp_path):
    """A model of PEFT's, whose checkpoints hold adapters."""
    from fastlora.integrations.transformers import OPTIMIZERS, optimizer_cls_and_kwargs

    def trainer():
        model = adapted(llama(), "peft")
        pair = optimizer_cls_and_kwargs(arguments(), name, model, lora_plus_ratio=4.0)
        assert pair[0] is OPTIMIZERS[name]
        return trainer_of(hf, model, arguments(), pair)

    whole, resumed = trainer(), trainer()
    whole.train()
    optimizer = whole.optimizer.optimizer
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert [g["initial_lr"] for g in optimizer.param_groups] == [1e-2, 4e-2]
    assert all(".lora_" in n for n, _ in optimizer.named_params()), "moments are known by name"
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal(*([p for p in t.model.parameters() if p.requires_grad] for t in (whole, resumed)))
    assert_equal(*(moments(t.optimizer.optimizer) for t in (whole, resumed)))
    assert bool(resumed.optimizer.optimizer.page_stats()) is name.startswith("paged")


@pytest.mark.parametrize("named", [True, False])
def test_trainer_trains_as_with_torch(named, hf, llama, arguments):
    """Also what decays: all but biases and norms, with a model and without."""
    from fastlora.integrations.transformers import optimizer_cls_and_kwargs

    models = [llama(), llama()]
    pair = optimizer_cls_and_kwargs(arguments(), "adamw", models[0] if named else None)
    ours = trainer_of(hf, models[0], arguments(), pair)
    theirs = trainer_of(hf, models[1], arguments(optim="adamw_torch"), None)
    for trainer in (ours, theirs):
        trainer.train()
    decays = [[g["weight_decay"] for g in t.optimizer.param_groups] for t in (ours, theirs)]
    assert decays[0] == decays[1] == [0.1, 0.0]
    assert_close(*([*model.parameters()] for model in models))


def test_arguments_reach_the_optimizer(llama, arguments, tmp_path):
    from fastlora.integrations.transformers import optimizer_cls_and_kwargs

    args = arguments(adam_epsilon=1e-6)
    kind, kwargs = optimizer_cls_and_kwargs(args, page_budget=1 << 20, page_folder=tmp_path)
    assert kind is PagedAdamW8bit
    assert kwargs == {
        "lr": 1e-2,
        "betas": (0.9, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "page_budget": 1 << 20,
        "page_folder": tmp_path,
    }


def test_what_the_helper_refuses(llama, arguments):
    from fastlora.integrations.transformers import optimizer_cls_and_kwargs

    known = "adamw, adamw8bit, paged_adamw, paged_adamw8bit"
    with pytest.raises(ValueError, match=f"name must be one of {known}, got 'lion'"):
        optimizer_cls_and_kwargs(arguments(), "lion")
    with pytest.raises(ValueError, match=r"model must be given for lora_plus_ratio 4\.0, got none"):
        optimizer_cls_and_kwargs(arguments(), lora_plus_ratio=4.0)
    args = arguments()
    args.fsdp = "full_shard"
    with pytest.raises(NotImplementedError, match="args must be without fsdp and deepspeed"):
        optimizer_cls_and_kwargs(args)
