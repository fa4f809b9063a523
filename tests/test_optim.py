"""AdamW: what torch computes in fp32, the reference's bits in 16 bit and with 8-bit moments."""

import pytest
import torch
from helpers import BACKENDS, DEVICE, DTYPES
from optim_helpers import SHAPES, deviation, equal, make_params, set_grads, train
from torch import nn

from fastlora import optim
from fastlora.codebooks import code_guess, dynamic_map, midpoints, unsigned_dynamic_map
from fastlora.optim import reference
from fastlora.optim.flat import BLOCK, Flat, Moments, Step, adamw_hypers, moments, nbytes

OTHERS = [name for name in BACKENDS if name != "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("FASTLORA_BACKEND", request.param)
    return request.param


def zeros(numel: int, bits: int) -> Moments:
    buffer = torch.zeros(nbytes(numel, bits), dtype=torch.uint8, device=DEVICE)
    return moments(buffer, numel, bits)


# --- against torch ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9), "maximize": True, "eps": 1e-3}])
def test_a_thousand_steps_are_torchs(backend, options):
    ours, theirs = make_params(), make_params()
    steps = range(1000)
    train(optim.AdamW(ours, lr=1e-3, weight_decay=0.05, **options), steps)
    train(torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.05, **options), steps)
    assert deviation(ours, theirs) < 1e-6


def test_groups_have_options_of_their_own(backend):
    def groups(params):
        return [
            {"params": params[:3], "lr": 1e-2, "weight_decay": 0.0},
            {"params": params[3:6], "betas": (0.8, 0.95), "eps": 1e-4},
            {"params": params[6:], "maximize": True},
        ]

    ours, theirs = make_params(), make_params()
    train(optim.AdamW(groups(ours)), range(20))
    train(torch.optim.AdamW(groups(theirs)), range(20))
    assert deviation(ours, theirs) < 1e-6


def test_a_parameter_without_gradient_stays_and_its_steps_do_not_count(backend):
    ours, theirs = make_params(), make_params()
    pairs = [(ours, optim.AdamW(ours)), (theirs, torch.optim.AdamW(theirs))]
    for params, optimizer in pairs:
        for seed in range(12):
            set_grads(params, seed)
            for i, p in enumerate(params):
                if (i + seed) % 3 == 0:
                    p.grad = None
            optimizer.step()
    assert deviation(ours, theirs) < 1e-6


@pytest.mark.parametrize("state_bits", [32, 8])
def test_no_gradient_at_all_changes_nothing(backend, state_bits):
    params = make_params()
    optimizer = optim.AdamW(params, state_bits=state_bits)
    optimizer.step()
    assert equal(params, make_params())
    train(optimizer, range(2))
    before, state = [p.detach().clone() for p in params], optimizer.state_dict()["state"]
    optimizer.zero_grad()
    optimizer.step()
    assert equal(params, before)
    assert optimizer.state_dict()["state"]["runs"][0]["steps"] == state["runs"][0]["steps"]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_moments_stay_while_there_is_no_gradient(backend, state_bits):
    params = make_params(shapes=[(256,), (4, 256), (300,)])
    optimizer = optim.AdamW(params, state_bits=state_bits)
    train(optimizer, range(3))
    (before,) = optimizer.state_dict()["state"]["runs"]
    for seed in range(3, 30):
        set_grads(params, seed)
        params[1].grad = None
        optimizer.step()
    (after,) = optimizer.state_dict()["state"]["runs"]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][256:1280], before[name][256:1280])
        assert not torch.equal(after[name][:256], before[name][:256])


def test_tensors_that_are_not_contiguous(backend):
    def params():
        base = torch.arange(60.0, device=DEVICE).view(6, 10)
        return [nn.Parameter(base.clone().T), nn.Parameter(base.clone()[:, ::2]), *make_params()]

    ours, theirs = params(), params()
    pairs = [(ours, optim.AdamW(ours)), (theirs, torch.optim.AdamW(theirs))]
    for some, optimizer in pairs:
        assert not some[0].is_contiguous()
        assert not some[1].is_contiguous()
        for seed in range(5):
            set_grads(some, seed)
            some[3].grad = torch.ones((), device=DEVICE).expand(some[3].shape)
            some[2].grad = some[2].grad.T.contiguous().T
            optimizer.step()
    assert deviation(ours, theirs) < 1e-6


# --- against the reference -------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_every_bit_is_the_references(monkeypatch, name, dtype, state_bits, paged):
    """Parameters, moments, codes and scales, after steps without some gradients."""
    found = []
    for backend in (name, "reference"):
        monkeypatch.setenv("FASTLORA_BACKEND", backend)
        params = make_params(dtype, (*SHAPES, (160, 129)) if paged else SHAPES)
        pages = {"paged": True, "page_budget": 2**17} if paged else {}
        optimizer = optim.AdamW(params, 1e-2, state_bits=state_bits, **pages)
        for seed in range(4):
            set_grads(params, seed)
            if seed == 2:
                params[0].grad = params[5].grad = None
            optimizer.step()
        (run,) = optimizer.state_dict()["state"]["runs"]
        state = [t for t in run.values() if isinstance(t, torch.Tensor)]
        found.append(([p.detach() for p in params], state))
    (params, state), (expected_params, expected_state) = found
    assert equal(params, expected_params)
    assert equal(state, expected_state)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("bits", [32, 8])
def test_not_a_number_spreads_as_in_the_reference(monkeypatch, name, bits):
    """To its own element, and with 8-bit moments to its block: it is never swallowed."""
    from fastlora.backend import optimizer as backend_of

    monkeypatch.setenv("FASTLORA_BACKEND", name)
    found = []
    for impl in (backend_of(torch.device(DEVICE)), reference):
        w, g = (torch.ones(600, device=DEVICE) for _ in range(2))
        g[300] = float("nan")
        g[599] = float("inf")
        hypers = torch.tensor([adamw_hypers(0.1, (0.9, 0.999), 1e-8, 0.0, False, 1)])
        state = zeros(600, bits)
        impl.adamw(impl.prepare(Step(Flat((600,)), [w], [g], [0], hypers)), 0, state)
        if bits == 8:
            found.append((w, state.m_scale, state.v_scale))
        else:
            found.append((w, state.m, state.v))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got[~got.isnan()], expected[~expected.isnan()])


# --- 8-bit moments ---------------------------------------------------------------------------


def test_the_maps_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(), functional.create_dynamic_map(signed=True))
    assert torch.equal(unsigned_dynamic_map(), functional.create_dynamic_map(signed=False))


@pytest.mark.parametrize("signed", [True, False])
def test_a_guess_and_one_comparison_find_the_nearest_code(signed):
    edges = midpoints(dynamic_map() if signed else unsigned_dynamic_map())
    x = torch.randint(-(2**31), 2**31, (200_000,)).int().view(torch.float32)
    beside = [torch.nextafter(edges, torch.full_like(edges, end)) for end in (-2.0, 2.0)]
    x = torch.cat([x, torch.randn(200_000), edges, *beside, torch.tensor([0.0, -0.0, 1, -1])])
    x = x[x.abs() <= 1]
    x = x if signed else x.abs()
    guess = code_guess(signed)[(x.view(torch.int32) >> 16).long() & 0xFFFF].long()
    assert torch.equal(guess + (x > edges[guess]), torch.bucketize(x, edges))


def test_encoded_moments_are_the_nearest_codes():
    full, coded = zeros(1000, 32), zeros(1000, 8)
    full.m.normal_()
    full.v.exponential_()
    full.m[:BLOCK] = full.v[:BLOCK] = 0
    reference.encode(full, coded)
    back = reference.decode(coded)
    for got, exact, codes in (
        (back.m, full.m, dynamic_map()),
        (back.v, full.v, unsigned_dynamic_map()),
    ):
        scale = exact.abs().view(-1)[BLOCK : 2 * BLOCK].max()
        nearest = codes.to(DEVICE)[
            (exact[BLOCK : 2 * BLOCK, None] / scale - codes.to(DEVICE)).abs().argmin(1)
        ]
        torch.testing.assert_close(got[BLOCK : 2 * BLOCK], nearest * scale)
        assert (got[:BLOCK] == 0).all()


def test_a_second_moment_above_zero_never_becomes_zero():
    full, coded = zeros(BLOCK, 32), zeros(BLOCK, 8)
    full.v[0], full.v[1], full.v[2] = 1.0, 1e-12, 1e-30
    reference.encode(full, coded)
    assert coded.v[:4].tolist() == [255, 1, 1, 0]


# --- what it takes ---------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
def test_memory(backend, paged):
    params = [nn.Parameter(torch.randn(n, device=DEVICE)) for n in (4608, 1000, 12_345, 3)]
    for bits, least, most in ((32, 8.0, 8.0), (8, 2.0, 2.04)):
        optimizer = optim.AdamW(params, state_bits=bits, paged=paged)
        assert optimizer.memory() == optim.StateMemory(0, 0, 0)
        train(optimizer, range(1))
        memory = optimizer.memory()
        assert memory.parameters == sum(p.numel() for p in params)
        assert least <= memory.bytes_per_parameter <= most
        assert (memory.host_bytes > 0) == paged == (memory.device_bytes == 0)
        stores = [span.moments for s in optimizer._states for span in s.store.read()]
        taken = sum(t.numel() * t.element_size() for some in stores for t in some.tensors())
        assert taken == memory.host_bytes + memory.device_bytes


def test_dtypes_have_runs_of_their_own(backend):
    dtypes = DTYPES * 2
    params = [make_params(dtype, [(7, 40)])[0] for dtype in dtypes]
    optimizer = optim.AdamW(params, state_bits=8, paged=True, page_budget=2**17)
    train(optimizer, range(3))
    alone = [[make_params(dtype, [(7, 40)])[0] for _ in range(2)] for dtype in DTYPES]
    for some in alone:
        single = optim.AdamW(some, state_bits=8)
        for seed in range(3):
            set_grads(params, seed)
            grads = [p.grad for p in params if p.dtype == some[0].dtype]
            for p, grad in zip(some, grads, strict=True):
                p.grad = grad
            single.step()
        assert equal([p for p in params if p.dtype == some[0].dtype], some)


def test_names_people_type():
    for cls, bits, paged in [
        (optim.AdamW8bit, 8, False),
        (optim.PagedAdamW, 32, True),
        (optim.PagedAdamW8bit, 8, True),
    ]:
        optimizer = cls(make_params(), lr=1e-2, weight_decay=0.0)
        assert (optimizer.state_bits, optimizer.paged) == (bits, paged)
        assert optimizer.param_groups[0]["lr"] == 1e-2


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be 0 or more, got -1.0"),
        ({"lr": float("nan")}, "lr must be 0 or more, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": -1e-8}, "eps must be 0 or more"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more, got -1"),
        ({"state_bits": 16}, "state_bits must be 8 or 32, got 16"),
        ({"page_budget": 1 << 20}, "paged must be True where pages are set up, got page_budget"),
        ({"paged": True, "page_budget": "64MiB"}, "page_budget must be a number of bytes or"),
        ({"paged": True, "page_budget": -5}, "page_budget must be a number of bytes or"),
        ({"paged": True, "page_folder": "nowhere"}, "page_folder must be a folder, got 'nowhere'"),
        ({"keep_frames": True}, "paged must be True where pages are set up, got keep_frames"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        optim.AdamW(make_params(), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_bad_parameters(dtype):
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=f"parameters must be fp32, fp16 or bf16, got {dtype}"):
        optim.AdamW([p])
    optimizer = optim.AdamW(make_params())
    with pytest.raises(ValueError, match="parameters must be fp32"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


def test_bad_gradients_change_nothing():
    params = make_params()
    optimizer = optim.AdamW([("fc.weight", params[0]), ("fc.bias", params[3])])
    set_grads(params, 0)
    params[3].grad = params[3].grad.to_sparse()
    with pytest.raises(
        ValueError, match=r"gradients must be dense, got that of fc.bias in torch.sparse_coo"
    ):
        optimizer.step()
    params[3].grad = None
    if not hasattr(params[3], "grad_dtype"):
        return  # before torch 2.10 a gradient has the dtype of its parameter
    params[3].grad_dtype = None
    params[3].grad = torch.ones(300, dtype=torch.float16, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"gradient of fc.bias must be torch.float32 on .*, got torch.float16"
    ):
        optimizer.step()
    assert equal(params, make_params())


def test_a_parameter_that_moved_is_named():
    layer = nn.Linear(4, 4, device=DEVICE)
    optimizer = optim.AdamW(layer.named_parameters())
    train(optimizer, range(1))
    layer.half()
    set_grads(layer.parameters(), 1)
    with pytest.raises(
        ValueError, match=r"weight must stay torch.float32 on .*, got torch.float16"
    ):
        optimizer.step()


def test_a_parameter_that_changed_its_size_is_named():
    """Its moments would be those of others, and of memory behind the last one."""
    params = make_params()
    optimizer = optim.AdamW(params)
    train(optimizer, range(1))
    params[0].data = params[0].data[:2]
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=r"0.0 must keep its 3072 elements, .* got 96"):
        optimizer.step()


def test_nothing_to_train_pages_too():
    optimizer = optim.PagedAdamW([nn.Parameter(torch.empty(0, device=DEVICE))])
    train(optimizer, range(2))
    assert optimizer.memory().host_bytes == 0


def test_kept_frames_are_counted():
    params = make_params(shapes=[(100_000,)])
    optimizer = optim.AdamW(params, paged=True, page_budget=2**18, keep_frames=True)
    train(optimizer, range(1))
    (stats,) = optimizer.page_stats()
    assert optimizer.memory().device_bytes == stats.frames * stats.page_bytes > 0


def test_a_budget_below_two_of_the_smallest_pages():
    params = make_params(shapes=[(100_000,)])
    optimizer = optim.AdamW(params, paged=True, page_budget=2**16)
    set_grads(params, 0)
    with pytest.raises(
        optim.MemoryBudgetError, match=r"page budget must be at least .*, got 65536"
    ):
        optimizer.step()
    assert equal(params, make_params(shapes=[(100_000,)]))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        p = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="parameters must be whole, got a DTensor"):
            optim.AdamW([p])
    finally:
        torch.distributed.destroy_process_group()
