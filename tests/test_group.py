"""Groups: one step for layers that share their input, never a wrong output, no memory held."""

import copy
import gc
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import DEVICE, FLOOR, assert_as_accurate
from model_helpers import llama, replica, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora import backend, ops, reference
from fastlora.config import LoraConfig
from fastlora.model import (
    add_lora,
    delete_adapter,
    disable_adapters,
    merge_lora,
    prepare_for_training,
    quantize_model,
    set_adapter,
    unload_lora,
)
from fastlora.nn import Linear4bit, LoraLinear, group_layers, group_of
from fastlora.siblings import SIBLINGS

K, NAMES = 48, ("q_proj", "k_proj", "v_proj")
SIZES = dict(zip(NAMES, (32, 16, 16), strict=True))


def layer(kind: str, N: int, r: int = 4, p: float = 0.0) -> nn.Module:
    """A layer of some kind, whose adapter changes its output."""
    base = nn.Linear(K, N, device=DEVICE).requires_grad_(False)
    if "nf4" in kind:
        base = Linear4bit.from_linear(base)
    return base if "plain" in kind else lora(base, r, p)


def lora(base: nn.Module, r: int = 4, p: float = 0.0) -> LoraLinear:
    return LoraLinear(base, r=r, lora_dropout=p, init_lora_weights=False)


class Attention(nn.Module):
    """q, k and v, of one input or of two, as models call them."""

    def __init__(self, kinds=("nf4", "nf4", "nf4"), ranks=(4, 4, 4), ps=(0.0, 0.0, 0.0)) -> None:
        super().__init__()
        for name, *of_layer in zip(NAMES, kinds, ranks, ps, strict=True):
            kind, r, p = of_layer
            setattr(self, name, layer(kind, SIZES[name], r, p))

    @property
    def layers(self) -> list[nn.Module]:
        return [getattr(self, name) for name in NAMES]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        return torch.cat([q.sin(), k * v], dim=-1)


def grouped(module: nn.Module, names=NAMES) -> nn.Module:
    group_layers(module, names)
    return module


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), K, device=DEVICE, requires_grad=True)


def step(module: nn.Module, *xs: Tensor, seed: int = 3) -> list[Tensor | None]:
    """Output, and gradients of the inputs and of all trained parameters."""
    torch.manual_seed(seed)
    y = module(*xs)
    leaves = [*xs, *(p for p in module.parameters() if p.requires_grad)]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True)]


def close(got: Tensor, expected: Tensor) -> None:
    """The same sums in another order, in fp32."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 4 * FLOOR[torch.float32] * expected.abs().max()


def all_close(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            close(g, e)


@pytest.fixture(params=["cpu", "reference"])
def impl(request, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)
    if backend.why_not(request.param, torch.device(DEVICE)):
        pytest.skip(f"no {request.param} backend on {DEVICE}")
    return backend.load(request.param)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many members each call of `linear_group` has, as they come."""
    seen, run = [], ops.linear_group

    def spy(x, members, *args):
        seen.append(len(members))
        return run(x, members, *args)

    monkeypatch.setattr(ops, "linear_group", spy)
    return seen


def count(monkeypatch, module, names) -> dict[str, int]:
    """Calls of the functions of a module."""
    counts = dict.fromkeys(names, 0)

    def counting(name, run):
        def counted(*args):
            counts[name] += 1
            return run(*args)

        return counted

    for name in names:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return counts


# --- one step, the same numbers ----------------------------------------------------------------

MIXTURES = {
    "nf4": {},
    "dense": {"kinds": ("dense", "dense", "dense")},
    "mixed bases, different ranks": {"kinds": ("nf4", "dense", "nf4"), "ranks": (8, 1, 3)},
    "one without adapter": {"kinds": ("nf4", "plain nf4", "dense")},
    "nf4 without adapters": {"kinds": ("plain nf4",) * 3},
}


@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,), ()], ids=str)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_group_computes_what_its_members_do(mixture, shape, impl, calls):
    module = Attention(**MIXTURES[mixture])
    x = torch.randn(*shape, K, device=DEVICE, requires_grad=True)
    expected = step(module, x)
    assert calls == [1, 1, 1]
    calls.clear()
    got = step(grouped(module), x)
    assert calls == [3]
    if x.numel():
        all_close(got, expected)


def test_x_is_read_once_and_one_node_serves_all(impl, monkeypatch):
    expected = {"lora_down": 1, "lora_bwd_ds_db": 3}
    if impl is backend.load("cpu"):  # one product for all of dx, the LoRA part included
        expected |= {"linear_packed": 3, "linear_dx_packed": 1, "lora_bwd_da": 1}
    else:
        # the terms first: those of the outputs, and that of dx, to which the products are added
        expected |= {"lora_term": 3, "linear_added": 3, "linear_dx": 4, "lora_bwd_da": 1}
    counts = count(monkeypatch, impl, expected)
    module, x = grouped(Attention()), inputs()
    ys = [child(x) for child in module.layers]
    assert counts["lora_down"] == 1
    assert ys[0].grad_fn is ys[1].grad_fn is ys[2].grad_fn
    sum(y.sum() for y in ys).backward()
    assert counts == expected


def test_the_members_share_one_mask(impl, monkeypatch):
    """Against plain PyTorch in fp64, with the mask of the one state that was drawn."""
    p, states, draw = 0.4, [], torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda *a, **k: states.append(draw(*a, **k)) or states[-1]
    )
    module, x = grouped(Attention(ps=(p,) * 3)), inputs(9)
    got = step(module, x)
    (state,) = states
    mask = reference.dropout(torch.ones(9, K, dtype=torch.float64), state.cpu(), p).to(DEVICE)
    assert 0 < (mask == 0).double().mean() < 1

    def plain(dtype):
        leaves = [x.detach().to(dtype).requires_grad_()]
        ys = []
        for child in module.layers:
            a, b = (
                part["default"].weight.detach().to(dtype).requires_grad_()
                for part in (child.lora_A, child.lora_B)
            )
            w = child.base_layer.dequantize().to(dtype)
            y = nn.functional.linear(leaves[0], w, child.bias.to(dtype))
            dropped = leaves[0] * mask.to(dtype)
            ys.append(y + child.scaling["default"] * dropped @ a.T @ b.T)
            leaves += [a, b]
        y = torch.cat([ys[0].sin(), ys[1] * ys[2]], dim=-1)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    for g, eager, exact in zip(got, plain(torch.float32), plain(torch.float64), strict=True):
        assert_as_accurate(g, eager, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, calls):
    module, x = Attention(kinds=("dense", "nf4", "dense")), inputs()

    def run():
        with torch.autocast(DEVICE, dtype):
            y = module(x)
        return [
            y,
            *torch.autograd.grad(y.float().sum(), [x, module.q_proj.lora_A["default"].weight]),
        ]

    expected = run()
    grouped(module)
    for g, e in zip(run(), expected, strict=True):
        assert g.dtype == e.dtype
        assert (g - e).abs().max() <= 4 * FLOOR[dtype] * e.abs().max()
    assert calls == [1, 1, 1, 3]


# --- nothing is stale --------------------------------------------------------------------------


def optimizer_step(module, x):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def load(module, x, assign=False):
    state = {n: t.clone() for n, t in module.state_dict().items()}
    state["k_proj.lora_B.default.weight"] += 1
    module.load_state_dict(state, assign=assign)


def other_tensor(module, x):
    """Another parameter that was written to as often."""
    old = module.k_proj.lora_B["default"].weight
    with torch.no_grad():
        new = nn.Parameter(old + 1)
        while new._version < old._version:
            new.add_(0)
    assert new._version == old._version
    module.k_proj.lora_B["default"].weight = new


def other_adapter(module, x):
    module.k_proj.add_adapter("other", 2, 4, init_lora_weights=False)
    module.k_proj.set_adapter("other")


CHANGES = {
    "x in place": lambda module, x: x.add_(1),
    "optimizer step": optimizer_step,
    "state dict": load,
    "state dict by assignment": lambda module, x: load(module, x, assign=True),
    "other tensor": other_tensor,
    "scale": lambda module, x: module.k_proj.scaling.update(default=0.5),
    "other adapter": other_adapter,
    "no adapter": lambda module, x: module.k_proj.set_adapter(None),
    "dropout switched off": lambda module, x: module.eval(),
    "other dropout": lambda module, x: module.k_proj.lora_dropout.update(default=0.9),
    "x wants a gradient": lambda module, x: x.requires_grad_(),
    "a is frozen": lambda module, x: module.k_proj.lora_A.requires_grad_(False),
    "unloaded": lambda module, x: setattr(module, "k_proj", module.k_proj.base_layer),
    "replaced": lambda module, x: setattr(module, "k_proj", layer("nf4", 16)),
}
# autograd refuses the backward of what was computed with them before
CHANGES_OF_WEIGHTS = {
    "bytes": lambda module, x: module.k_proj.base_layer.qweight.fill_(3),
    "statistics": lambda module, x: module.k_proj.base_layer.absmax.fill_(3),
    "bias": lambda module, x: module.k_proj.base_layer.bias.add_(3),
    "dense weight": lambda module, x: module.v_proj.base_layer.weight.mul_(2),
}


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", [*CHANGES, *CHANGES_OF_WEIGHTS])
def test_a_change_between_two_members_is_seen(name, p):
    alone = Attention(kinds=("nf4", "nf4", "dense"), ps=(p,) * 3)
    results = []
    for module in (grouped(copy.deepcopy(alone)), alone):
        x = torch.randn(3, 5, K, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        torch.manual_seed(0)
        module.q_proj(x)
        torch.manual_seed(5)
        (CHANGES | CHANGES_OF_WEIGHTS)[name](module, x)
        outs = []
        for child in (module.k_proj, module.v_proj):
            torch.manual_seed(0)
            outs.append(child(x))
        leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
        if name in CHANGES:
            loss = sum(y.sum() for y in outs)
            outs += torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append(outs)
    for got, expected in zip(*results, strict=True):
        got, expected = (torch.zeros(1) if t is None or not t.any() else t for t in (got, expected))
        assert got.requires_grad or not expected.requires_grad
        close(got, expected)


def recording(kind):
    """A way to run code in which members do not share with those outside."""
    return {
        "no gradients": torch.no_grad,
        "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
        "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
            lambda t: t, lambda t: t
        ),
        "inference mode": torch.inference_mode,
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["no gradients", "autocast", "saved tensors hooks", "inference mode"]
)
def test_members_in_another_context_compute_anew(kind, calls):
    module, x = grouped(Attention(kinds=("dense", "nf4", "nf4"))), inputs()
    module.q_proj(x)
    with recording(kind):
        k = module.k_proj(x)
    assert len(calls) == 2
    assert k.dtype == (torch.bfloat16 if kind == "autocast" else torch.float32)
    assert k.requires_grad == ("gradients" not in kind and "inference" not in kind)
    assert k.is_inference() == ("inference" in kind)


def test_no_output_is_given_twice():
    module, x = grouped(Attention(ps=(0.5,) * 3)), inputs()
    first = [child(x) for child in module.layers]
    second = [child(x) for child in module.layers]
    for a, b in zip(first, second, strict=True):
        assert a is not b
        assert not torch.equal(a, b), "the mask of the call before"
    for child in (module.q_proj, module.k_proj):
        assert not torch.equal(child(x), child(x))


# --- who is in ---------------------------------------------------------------------------------


def forward_of_its_own(child):
    child.forward = lambda x: type(child).forward(child, x)


class Mine(LoraLinear):
    def forward(self, x):
        return super().forward(x)


HOOKS = {
    "forward hook": lambda child: child.register_forward_hook(lambda *a: None),
    "forward pre-hook": lambda child: child.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda child: child.register_full_backward_hook(lambda *a: None),
    "backward pre-hook": lambda child: child.register_full_backward_pre_hook(lambda *a: None),
    "forward of its own": forward_of_its_own,
    "accelerate": lambda child: setattr(child, "_hf_hook", object()),
    "subclass": lambda child: setattr(child, "__class__", Mine),
}


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hooked_member_computes_alone(kind, who, calls):
    module, x = Attention(), inputs()
    expected = step(module, x)
    calls.clear()
    HOOKS[kind](module.layers[who])
    all_close(step(grouped(module), x), expected)
    assert sorted(calls) == [1, 2]


def test_global_hooks_switch_groups_off(calls):
    module, x = grouped(Attention()), inputs()
    handle = nn.modules.module.register_module_full_backward_hook(lambda *a: None)
    try:
        module(x)
    finally:
        handle.remove()
    assert calls == [1, 1, 1]
    module(x)
    assert calls == [1, 1, 1, 3]


def test_members_of_other_settings_compute_alone(calls):
    module = Attention(ps=(0.1, 0.1, 0.2))
    module, x = grouped(module), inputs()
    module(x)
    assert calls == [2, 1]
    calls.clear()
    module.eval()(x)
    assert calls == [3]


def test_a_layer_that_came_later_computes_alone(calls):
    module, x = grouped(Attention()), inputs()
    module.k_proj = layer("nf4", 16)
    module(x)
    assert calls == [2, 1]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_first_member_without_adapter_draws_no_mask(p, calls):
    """Else a recomputation could draw another number of masks, once the group is divided."""
    module, x = grouped(Attention(kinds=("plain nf4", "nf4", "nf4"), ps=(p,) * 3)), inputs()
    state = torch.get_rng_state()
    module.q_proj(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == [1 if p else 3]


@pytest.mark.parametrize("which", ["adapters disabled", "adapter of some"])
def test_layers_without_running_adapter_compute_alone(which, calls):
    module, x = grouped(Attention()), inputs()
    expected = [child.base_layer(x) for child in module.layers]
    calls.clear()
    model = nn.ModuleList([module])
    if which == "adapters disabled":
        with disable_adapters(model):
            got = [child(x) for child in module.layers]
        assert calls == [1, 1, 1]
    else:
        module.q_proj.set_adapter(None)
        got = [child(x) for child in module.layers][:1]
        assert calls == [1, 2]
    for g, e in zip(got, expected, strict=False):
        close(g, e)


def test_what_cannot_be_computed_is_left_to_its_owner(calls):
    """q is not to fail because of k."""
    module = Attention(kinds=("dense", "dense", "nf4"))
    grouped(module).k_proj.bfloat16()
    x = inputs()
    module.q_proj(x)
    assert calls == [2]
    with pytest.raises(ValueError, match="w must have the dtype of x"):
        module.k_proj(x)
    module.v_proj(x)
    assert calls == [2, 1]


def test_inference_mode_is_not_grouped(calls):
    module, x = grouped(Attention()), inputs().detach()
    with torch.inference_mode():
        module(x)
        made = x + 1
    assert calls == [1, 1, 1]
    with torch.no_grad():
        module(made)
    assert calls == [1] * 6


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
def test_a_compiled_module_computes_the_same():
    module, x = grouped(Attention()), inputs()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    all_close(step(compiled, x), step(module, x))


# --- members that read something else ----------------------------------------------------------


def test_cross_attention_divides_the_group_once(calls):
    module, x, other = Attention(), inputs(), inputs(2, 5)
    expected = step(module, x, other)
    calls.clear()
    grouped(module)
    for _ in range(3):
        all_close(step(module, x, other), expected)
    assert calls == [3, 2, 1, 2, 1, 2]
    assert group_of(module.q_proj) is None
    assert group_of(module.k_proj) is group_of(module.v_proj)
    assert group_of(module.k_proj).names == ("k_proj", "v_proj")


def test_x_that_changed_in_place_is_another_tensor(calls):
    module, x = grouped(Attention()), inputs().detach()
    module.q_proj(x)
    module.k_proj(x.add_(1))
    module.v_proj(x)
    assert calls == [3, 2]


def test_outputs_that_are_never_taken_divide_the_group_at_the_second_time(calls):
    module, x = grouped(Attention()), inputs()
    for _ in range(2):
        module.q_proj(x)
        module.k_proj(x)
    assert calls == [3, 3]
    for _ in range(2):
        module.q_proj(x)
        module.k_proj(x)
    assert calls == [3, 3, 2, 2]
    assert group_of(module.v_proj) is None


def test_an_interrupted_step_does_not_divide_the_group(calls):
    module, x = grouped(Attention()), inputs()
    for _ in range(3):
        module.q_proj(x)  # something raised here
        module(inputs())
    assert calls == [3] * 6


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_recomputation_does_what_the_forward_did(first, use_reentrant, p):
    """Also in the step in which the group finds out that it has to be divided."""
    module = Attention(kinds=("plain nf4" if first else "nf4", "nf4", "nf4"), ps=(p,) * 3)
    run = Checkpointed(module, use_reentrant)
    x, other = inputs(), inputs()
    steps = []
    for m in (run, Checkpointed(grouped(copy.deepcopy(module)), use_reentrant)):
        for seed in range(4):
            torch.manual_seed(seed)
            leaves = [x, other, *(q for q in m.parameters() if q.requires_grad)]
            first_loss, second_loss = (m(x, other).square().sum() for _ in range(2))
            for leaf in leaves:
                leaf.grad = None
            first_loss.backward()
            second_loss.backward()
            steps.append([leaf.grad for leaf in leaves])
    if p == 0:
        for expected, got in zip(steps[:4], steps[4:], strict=True):
            all_close(got, expected)
    m.module.q_proj(x)
    m.module.k_proj(other)
    assert group_of(m.module.q_proj) is None
    assert group_of(m.module.k_proj).names == ("k_proj", "v_proj")


@pytest.mark.parametrize("first", [True, False])
def test_a_recomputation_in_a_thread_of_its_own_holds_nothing(first):
    """As on a GPU, where autograd keeps a thread: no later call of it may let go what is left."""
    module = grouped(Attention(kinds=("plain nf4" if first else "nf4", "nf4", "nf4")))
    x, other = inputs(), inputs()
    with ThreadPoolExecutor(1) as thread:
        for _ in range(2):
            loss = Checkpointed(module, use_reentrant=False)(x, other).square().sum()
            thread.submit(loss.backward).result()
        del loss
        module.q_proj(x)
        module.k_proj(other)
        assert group_of(module.q_proj) is None


def test_a_graph_may_be_recomputed_twice():
    module, x, other = Attention(), inputs(), inputs()
    expected = step(module, x, other)[1:]
    y = Checkpointed(grouped(module), use_reentrant=False)(x, other)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    leaves = [x, other, *(p for p in module.parameters() if p.requires_grad)]
    for _ in range(2):
        all_close(torch.autograd.grad(y, leaves, dy, retain_graph=True), expected)


def test_groups_that_are_taken_away_do_not_come_back():
    module, x = grouped(Attention()), inputs()
    module.q_proj(x)
    prepare_for_training(module, group=[("q_proj", "k_proj")])
    module.k_proj(inputs())  # q's call of before has waited for it
    assert group_of(module.q_proj) is group_of(module.k_proj)
    assert group_of(module.k_proj).names == ("q_proj", "k_proj")
    assert group_of(module.v_proj) is None


class Checkpointed(nn.Module):
    """Layers whose activations are computed again in the backward."""

    def __init__(self, module: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, *xs: Tensor) -> Tensor:
        return checkpoint(self.module, *xs, use_reentrant=self.use_reentrant)


# --- nothing is held ---------------------------------------------------------------------------


def alive(*tensors: Tensor):
    """Counts which of these are left; to be called without other references to them."""
    refs = [weakref.ref(t.untyped_storage()) for t in tensors]
    return lambda: sum(r() is not None for r in refs)


def interrupted(module: nn.Module, x: Tensor) -> weakref.ref:
    """A step in which something raises after the first member; a reference to its graph."""
    try:
        y = module.q_proj(x * 2)
        node = weakref.ref(y.grad_fn) if y.grad_fn is not None else None
        raise MemoryError
    except MemoryError:
        return node


def test_all_taken_is_nothing_held():
    module = grouped(Attention())
    y = module(inputs())
    node = weakref.ref(module.q_proj(inputs()).grad_fn)
    assert node() is not None
    module(inputs())
    del y
    assert node() is None


@pytest.mark.parametrize("mode", ["the group itself", "another group", "evaluation"])
def test_an_interrupted_step_is_forgotten_at_the_next_call(mode):
    gc.disable()
    try:
        module, other = grouped(Attention()), grouped(Attention())
        node = interrupted(module, inputs())
        assert node() is not None
        if mode == "evaluation":
            with torch.inference_mode():
                other.k_proj(inputs())
        else:
            (other if mode == "another group" else module).k_proj(inputs())
        assert node() is None
    finally:
        gc.enable()


def test_without_gradients_outputs_go_with_x():
    gc.disable()
    try:
        module, x = grouped(Attention()), inputs()
        made = []
        run = ops.linear_group
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                ops, "linear_group", lambda *a: made.append(alive(*(ys := run(*a)))) or ys
            )
            y = module.q_proj(x)
            assert made[0]() == 3
            del x
            assert made[0]() == 1
            del y
            assert made[0]() == 0
    finally:
        gc.enable()


def test_a_deleted_model_leaves_nothing():
    gc.disable()
    try:
        module = grouped(Attention())
        node, child = interrupted(module, inputs()), weakref.ref(module.q_proj)
        del module
        assert node() is None
        assert child() is None
    finally:
        gc.enable()


def test_threads_do_not_disturb_one_another(calls):
    """One is between q and k while the other runs through."""
    module, x = grouped(Attention()), inputs()
    expected = [child.alone(x) for child in module.layers]
    calls.clear()
    q = module.q_proj(x)
    thread = threading.Thread(target=lambda: module(inputs()))
    thread.start()
    thread.join()
    got = [q, module.k_proj(x), module.v_proj(x)]
    assert calls == [3, 3]
    all_close(got, expected)


# --- copies ------------------------------------------------------------------------------------


def saved_and_loaded(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_the_model_is_grouped_by_itself(kind, calls):
    model = nn.Sequential(grouped(Attention()))
    interrupted(model[0], x := inputs())
    again = COPIES[kind](model)
    assert group_of(again[0].q_proj).parent is again[0]
    assert group_of(again[0].q_proj) is group_of(again[0].k_proj)
    assert group_of(model[0].q_proj).parent is model[0]
    with torch.no_grad():
        again[0].k_proj.lora_B["default"].weight.zero_()
    calls.clear()
    got = step(again, x)
    assert calls == [3]
    expected = [child.alone(x) for child in again[0].layers]
    close(got[0], torch.cat([expected[0].sin(), expected[1] * expected[2]], dim=-1))


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_layer_stands_alone(kind, calls):
    module, x = grouped(Attention()), inputs()
    again = COPIES[kind](module.k_proj)
    assert len(pickle.dumps(module.k_proj)) < len(pickle.dumps(module)) / 2
    assert group_of(again).parent is None
    module.q_proj(x)
    y = again(x)
    assert calls == [3, 1]
    close(y, module.k_proj(x))
    assert calls == [3, 1]


def test_replicas_stand_alone(calls):
    module, x = grouped(Attention()), inputs()
    all_close([replica(module)(x)], [module(x)])
    assert calls == [1, 1, 1, 3]


# --- whole models ------------------------------------------------------------------------------


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).to(DEVICE)


MODELS = {"llama": (llama, ("lm_head", "k_proj")), "t5": (t5, ("lm_head", "k"))}
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}


def prepared(kind, quantized=True, **settings):
    """A model twice: without groups and with them."""
    make, dense = MODELS[kind]
    model = make()
    if quantized:
        quantize_model(model, skip_modules=dense)
    add_lora(model, LoraConfig(**LORA | settings))
    other = prepare_for_training(copy.deepcopy(model))
    return prepare_for_training(model, group=False), other


def losses(model: nn.Module, steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps of training, and the first gradients.

    Each step makes the rounding of those before it about three times as large, in the gradients of
    t5 more than in its losses: what a group adds is seen in the first.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.05)
    values, grads = [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        grads = grads or {n: p.grad.clone() for n, p in trained.items()}
        optimizer.step()
        values.append(loss.item())
    return values, grads


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_trains_as_without_groups(kind, quantized, checkpointing, calls):
    results = []
    for model in prepared(kind, quantized, exclude_modules=r".*\.1\..*v(_proj)?"):
        if checkpointing != "none":
            model.enable_input_require_grads()
            settings = {"use_reentrant": checkpointing == "reentrant"}
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)(settings)
        results.append(losses(model.train()))
    (expected, expected_grads), (got, grads) = results
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected[0] != expected[1]
    assert {*grads} == {*expected_grads}
    for name, grad in grads.items():
        assert grad.any(), name
        close(grad, expected_grads[name])
    assert max(calls) == 3


def test_cross_attention_of_a_model_is_divided():
    _, model = prepared("t5")
    losses(model.train(), steps=1)
    names = {n: group_of(m) and group_of(m).names for n, m in model.named_modules()}
    block = "decoder.block.0.layer"
    assert names[f"{block}.0.SelfAttention.q"] == ("q", "k", "v")
    assert names[f"{block}.1.EncDecAttention.q"] is None
    assert names[f"{block}.1.EncDecAttention.v"] == ("k", "v")
    assert names[f"{block}.2.DenseReluDense.wi_0"] == ("wi_0", "wi_1")


@pytest.mark.parametrize("kind", MODELS)
def test_generation_with_a_cache(kind):
    plain, model = prepared(kind)
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    prompt = tokens()[:, :4]
    expected = plain.eval().generate(prompt, **settings)
    assert torch.equal(model.eval().generate(prompt, **settings), expected)
    assert torch.equal(model.generate(prompt, **settings), expected)


def test_adapters_come_and_go(calls):
    def logits(model):
        with torch.no_grad():
            return model.eval()(tokens()).logits

    plain, model = prepared("llama", target_modules=["q_proj", "k_proj", "v_proj", "up_proj"])

    def both(change):
        torch.manual_seed(1)
        change(plain)
        expected = logits(plain)
        torch.manual_seed(1)
        change(model)
        calls.clear()
        close(logits(model), expected)
        return max(calls)

    some = LoraConfig(**LORA, target_modules=["q_proj", "v_proj"])
    with disable_adapters(plain), disable_adapters(model):
        close(logits(model), logits(plain))
    assert both(lambda m: add_lora(m, some, "some")) == 3
    assert both(lambda m: set_adapter(m, "some")) == 2
    assert both(lambda m: delete_adapter(m, "default")) == 2
    assert both(lambda m: add_lora(m, LoraConfig(**LORA), "all")) == 2
    assert both(lambda m: set_adapter(m, "all")) == 3
    assert both(lambda m: merge_lora(m, quantize=True)) == 2  # k is dense
    assert both(lambda m: add_lora(m, LoraConfig(**LORA))) == 3
    assert both(unload_lora) == 2
    assert both(lambda m: add_lora(m, LoraConfig(**LORA))) == 3
    merge_lora(plain)
    expected, calls[:] = logits(plain), []
    close(logits(merge_lora(model)), expected)
    assert not calls


def test_distributed_data_parallel(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/f", rank=0, world_size=1)
    try:
        plain, model = prepared("llama")
        wrapped = nn.parallel.DistributedDataParallel(model)
        expected, expected_grads = losses(plain)
        got, grads = losses(wrapped)
    finally:
        dist.destroy_process_group()
    assert got == pytest.approx(expected, rel=1e-5)
    for name, grad in grads.items():
        close(grad, expected_grads[name.removeprefix("module.")])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    new, old = "activation_checkpointing", "gradient_checkpointing"
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **(
            {new if hasattr(transformers.TrainingArguments, new) else old: True}
            if checkpointing
            else {}
        ),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=DEVICE == "cpu",
    )
    data = [{"input_ids": row, "labels": row} for row in tokens().cpu().repeat(6, 1)]
    weights = []
    for model in prepared("llama"):
        if checkpointing:
            model.enable_input_require_grads()
        transformers.Trainer(model, arguments, train_dataset=data).train()
        weights.append({n: p for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in weights[0].items():
        close(weights[1][name], expected)


# --- prepare_for_training ----------------------------------------------------------------------


def names_of(model: nn.Module) -> set[tuple[str, ...]]:
    found = {group_of(m) for m in model.modules()} - {None}
    return {group.names for group in found}


@pytest.mark.parametrize("names", SIBLINGS, ids=str)
def test_siblings_are_found_by_their_names(names):
    parent = nn.Module()
    for name in (*names, "other"):
        parent.add_module(name, nn.Linear(8, 4))
    model = nn.Sequential(parent)
    prepare_for_training(model)
    assert names_of(model) == {names}
    assert group_of(parent.other) is None


def test_siblings_have_equal_in_features_and_are_linear():
    parent = nn.Module()
    parent.q_proj, parent.k_proj, parent.v_proj = (nn.Linear(n, 4) for n in (8, 6, 6))
    parent.gate_proj, parent.up_proj = nn.Linear(8, 4), nn.Conv1d(8, 4, 1)
    parent.query = parent.key = nn.Linear(8, 4)  # one layer at two places
    prepare_for_training(parent)
    assert names_of(parent) == {("k_proj", "v_proj")}


@pytest.mark.parametrize("order", ["before", "after", "before quantisation"])
def test_groups_are_made_before_and_after_adapters(order, calls):
    model = llama(layers=1)
    if order == "before quantisation":
        prepare_for_training(model)
    quantize_model(model)
    if order == "before":
        prepare_for_training(model)
    add_lora(model, LoraConfig(**LORA))
    if order == "after":
        prepare_for_training(model)
    model(tokens())
    assert sorted(calls) == [1, 1, 2, 3]


def test_dense_layers_are_grouped_once_they_have_adapters(calls):
    model = prepare_for_training(llama(layers=1))
    model(tokens())
    assert not calls
    model(tokens()) if add_lora(model, LoraConfig(**LORA)) else None
    assert sorted(calls) == [1, 1, 2, 3]


def test_preparing_again_replaces_groups():
    model = add_lora(llama(layers=1), LoraConfig(**LORA))
    usual = {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    for _ in range(2):
        prepare_for_training(model)
        assert names_of(model) == usual
    prepare_for_training(model, group=[("k_proj", "v_proj")])
    assert names_of(model) == {("k_proj", "v_proj")}
    prepare_for_training(model, group=False)
    assert names_of(model) == set()
    assert not any("fastlora_home" in vars(m) for m in model.modules())


BAD_GROUPS = {
    r"\('q_proj', 'nope'\) of which \['nope', 'q_proj'\] do not": [("q_proj", "nope")],
    r"of which \['nope'\] do not": [("gate_proj", "up_proj", "nope")],
    r"of which \['down_proj'\] do not": [("gate_proj", "up_proj", "down_proj")],
    "tuples of different names, got 'q_proj'": "q_proj",
    r"tuples of different names, got \('q_proj', 'k_proj'\)": ("q_proj", "k_proj"),
    r"tuples of different names, got \[\('q_proj',\)\]": [("q_proj",)],
    r"tuples of different names, got \[\('k_proj', 'k_proj'\)\]": [("k_proj", "k_proj")],
    "group must name each layer once": [("q_proj", "k_proj"), ("k_proj", "v_proj")],
}


@pytest.mark.parametrize("message", BAD_GROUPS)
def test_bad_groups_change_nothing(message):
    model = prepare_for_training(llama(layers=1))
    model.config.use_cache = True
    before = names_of(model)
    with pytest.raises(ValueError, match=message):
        prepare_for_training(model, gradient_checkpointing=True, group=BAD_GROUPS[message])
    assert names_of(model) == before
    assert model.config.use_cache
    assert not model.is_gradient_checkpointing


def test_layers_of_bitsandbytes_are_grouped_once_adopted(calls):
    bnb = pytest.importorskip("bitsandbytes")
    parent = nn.Module()
    parent.gate_proj, parent.up_proj = (
        bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2)
    )
    prepare_for_training(parent.to(DEVICE))
    add_lora(parent, LoraConfig(r=2))
    x = torch.randn(3, 64, device=DEVICE)
    parent.gate_proj(x), parent.up_proj(x)
    assert calls == [2]
