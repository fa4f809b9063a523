"""State dicts of the optimizers: by name, from and to other layouts, torch, bitsandbytes."""

import copy
import io
import pickle

import pytest
import torch
from optim_helpers import deviation, equal, make_params, train
from torch import nn

from fastlora import optim
from fastlora.optim import to_bitsandbytes

VARIANTS = (optim.AdamW, optim.AdamW8bit, optim.PagedAdamW, optim.PagedAdamW8bit)
SHAPES = ((64, 48), (5,), (16, 256), (200, 130), (1,), (256,))  # pages of 64 KiB: several
BUDGET = 2**17


def named(dtype=torch.float32, shapes=SHAPES):
    params = make_params(dtype, shapes, device="cpu")
    return [(f"layer.{i}.weight", p) for i, p in enumerate(params)]


def values(some):
    return [p.detach().clone() for _, p in some]


def make(cls, some, **options):
    if issubclass(cls, optim.PagedAdamW | optim.PagedAdamW8bit):
        options.setdefault("page_budget", BUDGET)
    return cls(some, lr=1e-2, **options)


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moments_of(optimizer):
    runs = optimizer.state_dict()["state"]["runs"]
    return [t for run in runs for t in run.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", VARIANTS)
def test_saved_and_resumed_it_goes_on_bit_by_bit(cls, dtype):
    some = named(dtype)
    optimizer = make(cls, some)
    train(optimizer, range(3))
    saved, then = through_file(optimizer.state_dict()), values(some)
    train(optimizer, range(3, 6))

    others = named(dtype)
    for (_, p), value in zip(others, then, strict=True):
        p.data.copy_(value)
    resumed = make(cls, others)
    resumed.load_state_dict(saved)
    assert resumed.paged == optimizer.paged
    assert bool(resumed.memory().host_bytes) == optimizer.paged
    assert resumed.memory() == optimizer.memory()
    train(resumed, range(3, 6))
    assert equal(values(others), values(some))
    assert equal(moments_of(resumed), moments_of(optimizer))


@pytest.mark.parametrize("bits", [8, 32])
def test_any_paging_loads_from_any_other(bits):
    settings = [{}, *({"paged": True, "page_budget": n} for n in (BUDGET, 3 * BUDGET, "auto"))]
    optimizer = optim.AdamW(named(), state_bits=bits)
    train(optimizer, range(3))
    expected = optimizer.state_dict()
    for options in settings:
        loaded = optim.AdamW(named(), state_bits=bits, **options)
        loaded.load_state_dict(expected)
        assert equal(moments_of(loaded), moments_of(optimizer))
        expected = loaded.state_dict()


def test_a_snapshot_does_not_change_with_later_steps():
    for cls in VARIANTS:
        optimizer = make(cls, named())
        train(optimizer, range(2))
        snapshot = optimizer.state_dict()
        before = copy.deepcopy(snapshot)
        train(optimizer, range(2, 4))
        runs = [d["state"]["runs"][0] for d in (snapshot, before)]
        assert torch.equal(*(run["exp_avg"] for run in runs))
        assert snapshot["state"]["runs"][0]["steps"] == [2] * len(SHAPES)


def test_moments_keep_their_dtype():
    optimizer = make(optim.AdamW, named(torch.bfloat16))
    train(optimizer, range(2))
    loaded = make(optim.AdamW, named(torch.bfloat16))
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    assert {t.dtype for t in moments_of(loaded)} == {torch.float32}


@pytest.mark.parametrize("bits", [8, 32])
def test_parameters_are_found_by_name_in_another_order(bits):
    some = named()
    optimizer = optim.AdamW(some, state_bits=bits)
    train(optimizer, range(3))
    saved = optimizer.state_dict()
    loaded = optim.AdamW([*reversed(named())], state_bits=bits)
    loaded.load_state_dict(saved)
    back = optim.AdamW(named(), state_bits=bits)
    back.load_state_dict(loaded.state_dict())
    if bits == 32:
        assert equal(moments_of(back), moments_of(optimizer))
    decoded = [_decoded(o) for o in (back, optimizer)]
    assert deviation(*decoded) < 0.02  # two roundings to 8 bits


def _decoded(optimizer):
    from fastlora.optim import state
    from fastlora.optim.reference import decode

    (run,) = state.snapshot(optimizer._states, optimizer.state_bits)
    full = decode(run.moments) if run.bits == 8 else run.moments
    return [full.m, full.v]


def test_options_come_with_it():
    first, second = named()[:3], named()[3:]
    groups = [{"params": first, "lr": 0.5, "weight_decay": 0.25}, {"params": second}]
    optimizer = optim.AdamW(groups, betas=(0.8, 0.9))
    saved = through_file(optimizer.state_dict())
    loaded = optim.AdamW([{"params": named()[:3]}, {"params": named()[3:]}])
    loaded.load_state_dict(saved)
    assert [g["lr"] for g in loaded.param_groups] == [0.5, 1e-3]
    assert loaded.param_groups[0]["weight_decay"] == 0.25
    assert loaded.param_groups[1]["betas"] == (0.8, 0.9)
    assert loaded.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]


def test_before_the_first_step_there_is_no_state():
    optimizer = optim.AdamW(named())
    saved = through_file(optimizer.state_dict())
    assert saved["state"] == {}
    train(optimizer, range(2))
    optimizer.load_state_dict(saved)
    assert optimizer.memory().parameters == 0
    fresh = optim.AdamW(named())
    train(fresh, range(1))
    (run,) = fresh.state_dict()["state"]["runs"]
    assert run["steps"] == [1] * len(SHAPES)


@pytest.mark.parametrize("cls", VARIANTS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_like_the_original(cls, copied):
    some = named()
    optimizer = make(cls, some)
    train(optimizer, range(2))
    twin = copied(optimizer)
    train(optimizer, range(2, 4))
    train(twin, range(2, 4))
    assert equal(twin.param_groups[0]["params"], [p for _, p in some])
    assert twin.paged == optimizer.paged


def test_hooks_are_called():
    optimizer, called = optim.AdamW(named()), []
    optimizer.register_state_dict_pre_hook(lambda o: called.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: called.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["more"] == 1
    optimizer.load_state_dict(saved)
    assert called == ["save", "load", "loaded"]


@pytest.mark.parametrize("cls", VARIANTS)
def test_parameters_that_are_added_later_begin_anew(cls):
    some = named()
    optimizer = make(cls, some[:3])
    train(optimizer, range(2))
    (before,) = optimizer.state_dict()["state"]["runs"]
    optimizer.add_param_group({"params": some[3:], "lr": 1e-3})
    for _, p in some:
        p.grad = None
    some[3][1].grad = torch.zeros_like(some[3][1])
    optimizer.step()
    (after,) = optimizer.state_dict()["state"]["runs"]
    assert after["steps"] == [2, 2, 2, 1, 0, 0]
    n = sum(p.numel() for _, p in some[:3]) // 256 * 256  # whole blocks of those before
    assert torch.equal(after["exp_avg"][:n], before["exp_avg"][:n])
    train(optimizer, range(2, 4))
    assert len(optimizer.page_stats()) <= 1  # one budget

    others = named()
    for (_, p), (_, q) in zip(others, some, strict=True):
        p.data.copy_(q)
    resumed = make(cls, [{"params": others[:3]}, {"params": others[3:]}])
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for o in (optimizer, resumed):
        train(o, range(4, 6))
    assert equal(values(others), values(some))


def test_frozen_parameters_have_no_moments_until_they_are_trained():
    some = named()
    frozen = nn.Parameter(torch.zeros(9, dtype=torch.uint8), requires_grad=False)
    some[0][1].requires_grad_(False)
    optimizer = optim.AdamW([*some, ("codes", frozen)])
    for _, p in some[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.memory().parameters == sum(p.numel() for _, p in some[1:])
    loaded = optim.AdamW([*named(), ("codes", frozen)])
    with pytest.raises(ValueError, match=r"without state: layer.0.weight"):
        loaded.load_state_dict(optimizer.state_dict())
    some[0][1].requires_grad_(True)
    train_one = torch.ones_like(some[0][1])
    some[0][1].grad = train_one
    optimizer.step()
    (run,) = optimizer.state_dict()["state"]["runs"]
    assert run["steps"] == [1, 2, 2, 2, 2, 2]


def test_names_that_are_there_twice_are_refused():
    first, second = named()[:1], named()[:1]
    with pytest.raises(ValueError, match=r"names .* must differ, got layer.0.weight twice"):
        optim.AdamW([{"params": first}, {"params": second}])


def test_parameters_that_left_their_group_stay():
    some = named()
    optimizer = optim.AdamW(some)
    train(optimizer, range(2))
    left = optimizer.param_groups[0]["params"].pop()
    optimizer.param_groups[0]["param_names"].pop()
    before = left.detach().clone()
    train(optimizer, range(2, 3))
    left.grad = torch.ones_like(left)
    optimizer.step()
    assert torch.equal(left, before)


def test_loaded_options_are_copies_and_checked():
    first, second = optim.AdamW(named(), lr=torch.tensor(0.1)), optim.AdamW(named())
    second.load_state_dict(first.state_dict())
    first.param_groups[0]["lr"].fill_(5)
    assert second.param_groups[0]["lr"].item() == pytest.approx(0.1)
    saved = first.state_dict()
    saved["param_groups"][0]["lr"] = -1
    with pytest.raises(ValueError, match="lr must be 0 or more, got -1"):
        second.load_state_dict(saved)
    adam = torch.optim.Adam([p for _, p in named()], weight_decay=0.1)
    with pytest.raises(ValueError, match="weight decay must be decoupled"):
        second.load_state_dict(adam.state_dict())


# --- what others saved -----------------------------------------------------------------------


def test_from_torch():
    ours, theirs = named(), named()
    other = torch.optim.AdamW([p for _, p in theirs], lr=1e-2)
    train(other, range(3))
    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        p.data.copy_(q)
    optimizer = optim.PagedAdamW(ours, page_budget=BUDGET)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    train(optimizer, range(3, 6))
    train(other, range(3, 6))
    assert deviation(values(ours), values(theirs)) < 1e-6


def test_amsgrad_is_refused():
    other = torch.optim.AdamW([p for _, p in named()], amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad must be off"):
        optim.AdamW(named()).load_state_dict(other.state_dict())


@pytest.mark.parametrize("bits", [8, 32])
def test_to_and_from_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")
    shapes = ((64, 64), (16, 256), (8, 1024))  # each fills blocks, and 4096 elements: 8 bits there
    ours, theirs = named(shapes=shapes), named(shapes=shapes)
    optimizer = optim.AdamW(ours, lr=1e-2, state_bits=bits)
    kind = bnb.optim.AdamW8bit if bits == 8 else bnb.optim.AdamW
    other = kind([p for _, p in theirs], lr=1e-2)
    train(optimizer, range(3))
    other.load_state_dict(to_bitsandbytes(optimizer))
    back = optim.AdamW(named(shapes=shapes), state_bits=bits)
    back.load_state_dict(through_file(other.state_dict()))
    assert equal(moments_of(back), moments_of(optimizer))

    for (_, p), (_, q) in zip(ours, theirs, strict=True):
        q.data.copy_(p)
    train(optimizer, range(3, 5))
    train(other, range(3, 5))
    assert deviation(values(ours), values(theirs)) < 1e-3


def test_from_bitsandbytes_whose_small_tensors_have_32_bits():
    bnb = pytest.importorskip("bitsandbytes")
    shapes = ((64, 64), (100,), (3,))
    other = bnb.optim.AdamW8bit([p for _, p in named(shapes=shapes)])
    train(other, range(2))
    optimizer = optim.AdamW8bit(named(shapes=shapes))
    optimizer.load_state_dict(other.state_dict())
    (run,) = optimizer.state_dict()["state"]["runs"]
    assert run["steps"] == [2, 2, 2]
    first = other.state[other.param_groups[0]["params"][0]]
    assert torch.equal(run["exp_avg"][:4096].view(64, 64), first["state1"])
    assert torch.equal(run["exp_avg_sq_scale"][:16], first["absmax2"])


# --- what does not fit -----------------------------------------------------------------------


def saved_by(cls=optim.AdamW, **options):
    optimizer = cls(named(), **options)
    train(optimizer, range(1))
    return optimizer.state_dict()


def test_wrong_parameters_are_named():
    saved = saved_by()
    others = named()
    others[1] = ("layer.1.bias", others[1][1])
    optimizer = optim.AdamW(others)
    train(optimizer, [7])
    before = moments_of(optimizer)
    message = "without state: layer.1.bias; not in this optimizer: layer.1.weight"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert equal(moments_of(optimizer), before)


def test_wrong_shapes_are_named():
    others = [(name, nn.Parameter(p.detach().T.clone())) for name, p in named()[:1]]
    optimizer = optim.AdamW([*others, *named()[1:]])
    message = r"state of layer.0.weight must be of shape \[48, 64\], got \[64, 48\]"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved_by())


def test_wrong_groups_and_widths():
    with pytest.raises(ValueError, match=r"groups must have \[2, 4\] parameters, got \[6\]"):
        optim.AdamW([{"params": named()[:2]}, {"params": named()[2:]}]).load_state_dict(saved_by())
    for bits, other in ((8, 32), (32, 8)):
        saved = saved_by(state_bits=bits)
        message = rf"state_bits must be that of the state dict \({bits}\), got {other}"
        with pytest.raises(ValueError, match=message):
            optim.AdamW(named(), state_bits=other).load_state_dict(saved)


def test_a_damaged_state_is_refused():
    saved = saved_by()
    saved["state"]["runs"][0]["exp_avg"] = saved["state"]["runs"][0]["exp_avg"][:-1]
    with pytest.raises(
        ValueError, match=r"moments of layer.0.weight, .* must be those of 33430 elements"
    ):
        optim.AdamW(named()).load_state_dict(saved)
    wrong = {"step": 1, "state1": torch.zeros(64, 48, dtype=torch.uint8)}
    wrong["state2"] = wrong["state1"]
    saved["state"] = {0: wrong}
    with pytest.raises(ValueError, match=r"state of layer.0.weight must hold absmax1 and absmax2"):
        optim.AdamW8bit(named()).load_state_dict(saved)
    wrong |= {"absmax1": torch.ones(1), "absmax2": torch.ones(1)}
    with pytest.raises(ValueError, match=r"moments of layer.0.weight must be those of 3072"):
        optim.AdamW8bit(named()).load_state_dict(saved)
    saved = saved_by()
    saved["state"]["version"] = 9
    with pytest.raises(ValueError, match="version must be 1, got 9"):
        optim.AdamW(named()).load_state_dict(saved)
    sgd = torch.optim.SGD([p for _, p in named()], momentum=0.9)
    train(sgd, range(1))
    with pytest.raises(
        ValueError, match=r"state of layer.0.weight must hold exp_avg and exp_avg_sq"
    ):
        optim.AdamW(named()).load_state_dict(sgd.state_dict())
