"""`linear_cross_entropy`: loss and all gradients against fp64, in many chunks; what is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, assert_as_accurate
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import loss
from fastlora.loss import linear_cross_entropy
from fastlora.nn import Linear4bit, LoraLinear, SavedModule

IGNORED = -100
SHAPES = [  # leading dimensions of hidden, K, V
    ((2, 9), 16, 97),  # chunks of 7 end in the middle of a row
    ((1,), 8, 5),
    ((3, 2, 4), 32, 64),
    ((0, 7), 16, 33),  # no batch
    ((14,), 24, 5000),  # more columns than are widened at once
]
CHUNK = 7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of at most 7 tokens, softmax of at most 2 at once."""

    def set_for(V):
        monkeypatch.setattr(loss, "_CHUNK_BYTES", dict.fromkeys(loss._CHUNK_BYTES, CHUNK * 4 * V))
        tile = -(-2 * 4 * V // torch.get_num_threads())
        monkeypatch.setattr(loss, "_TILE_BYTES", tile)

    return set_for


def make(shape, K, V, dtype):
    """hidden, weight, bias and labels of one head, a third of the labels ignored."""
    hidden = torch.randn(*shape, K, device=DEVICE, dtype=dtype)
    weight = (torch.randn(V, K, device=DEVICE) * 2 * K**-0.5).to(dtype)
    bias = torch.randn(V, device=DEVICE, dtype=dtype)
    labels = torch.randint(V, shape, device=DEVICE)
    labels[torch.rand(shape, device=DEVICE) < 1 / 3] = IGNORED
    return hidden, weight, bias, labels


def plain(hidden, weight, bias, labels, **kwargs):
    """The same loss from all logits, in fp64 where hidden is."""
    z = F.linear(hidden, weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    return F.cross_entropy(z.flatten(0, -2), labels.flatten(), **kwargs)


def gradients(call, tensors, dy=0.7):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, torch.full_like(y, dy))


def check(got, hidden, weight, bias, labels):
    """Compare the sum of losses and its gradients with plain ones in the dtype and in fp64."""
    parts = [hidden, weight, bias][: len(got) - 1]
    rest = [weight, bias][len(got) - 2 :]

    def call(*t):
        return plain(*t, *(r.to(t[0].dtype) for r in rest), labels, reduction="sum")

    eager, exact = gradients(call, parts), gradients(call, [t.double() for t in parts])
    for g, e, x in zip(got, eager, exact, strict=True):
        assert_as_accurate(g, e, x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "K", "V"), SHAPES, ids=str)
def test_loss_and_gradients(shape, K, V, dtype, frozen, small_chunks):
    small_chunks(V)
    hidden, weight, bias, labels = make(shape, K, V, dtype)

    def call(h, w=weight, b=bias):
        return linear_cross_entropy(h, w, labels, b, num_items=5)

    got = gradients(call, [hidden] if frozen else [hidden, weight, bias])
    assert got[0].dtype == torch.float32
    check([5 * g for g in got], hidden, weight, bias, labels)


def heads(V, K):
    dense = nn.Linear(K, V)
    lora = LoraLinear(nn.Linear(K, V), r=4, init_lora_weights=False)
    lora.base_layer.requires_grad_(False)
    q = Linear4bit.from_linear(nn.Linear(K, V, bias=False))
    saved = SavedModule(nn.Linear(K, V))
    saved.original_module.requires_grad_(False)
    return {
        "dense": dense,
        "frozen": copy.deepcopy(dense).requires_grad_(False),
        "half frozen": half_frozen(K, V),
        "lora": lora,
        "4-bit": q,
        "lora over 4-bit": LoraLinear(q, r=4, init_lora_weights=False),
        "trained whole": saved,
        "weight plus another": sum_of_weights(K, V),
        "sigmoid": Ended(dense, nn.Sigmoid()),
        "tanh": Ended(dense, nn.Tanh()),
        "part of a sigmoid": Ended(nn.Linear(K, V + 2), nn.Sigmoid(), V),
    }


def half_frozen(K, V):
    head = nn.Linear(K, V)
    head.weight.requires_grad_(False)
    return head


class Ended(nn.Sequential):
    """A head whose last op needs its result again in the backward."""

    def __init__(self, linear, end, V=None):
        super().__init__(linear, end)
        self.out_features = V or linear.out_features

    def forward(self, x):
        return super().forward(x)[..., : self.out_features]


class Plus(nn.Module):
    """A weight and another: autograd hands both the same tensor as their gradient."""

    def __init__(self, w):
        super().__init__()
        self.other = nn.Parameter(torch.randn_like(w))

    def forward(self, w):
        return w + self.other


def sum_of_weights(K, V):
    head = nn.Linear(K, V)
    return nn.utils.parametrize.register_parametrization(head, "weight", Plus(head.weight))


@pytest.mark.parametrize("hidden_grad", [True, False])
@pytest.mark.parametrize("name", heads(8, 8))
def test_heads(name, hidden_grad, small_chunks):
    V, K = 70, 64
    small_chunks(V)
    head = heads(V, K)[name].to(DEVICE)
    hidden, *_, labels = make((2, 9), K, V, torch.float32)
    results = []
    for chunked in (True, False):
        head.zero_grad()
        h = hidden.clone().requires_grad_(hidden_grad)
        if chunked:
            y = linear_cross_entropy(h, head, labels)
        else:
            y = F.cross_entropy(head(h).flatten(0, 1), labels.flatten())
        if y.requires_grad:
            y.backward()
        grads = {n: p.grad for n, p in head.named_parameters()}
        results.append([y.detach(), h.grad, *grads.values()])
    (y, dh, *got), (expected_y, expected_dh, *expected) = results
    assert (dh is None) == (not hidden_grad)
    trained = [p for p in head.parameters() if p.requires_grad]
    assert sum(g is not None for g in got) == len(trained)
    for g, e in zip((y, dh, *got), (expected_y, expected_dh, *expected), strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_labels_shifted_and_divided_as_in_transformers(dtype, small_chunks):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    small_chunks(97)
    hidden, weight, _, labels = make((3, 8), 16, 97, dtype)
    for num_items in (None, 11, torch.tensor(11)):
        got = gradients(
            lambda h: linear_cross_entropy(h, weight, labels, shift=True, num_items=num_items),  # noqa: B023
            [hidden],
        )
        eager, exact = (
            gradients(
                lambda h: loss_utils.ForCausalLMLoss(
                    h @ weight.to(h).T,
                    labels,
                    97,
                    num_items_in_batch=num_items,  # noqa: B023
                ),
                [hidden.to(to)],
            )
            for to in (dtype, torch.float64)
        )
        for g, e, x in zip(got, eager, exact, strict=True):
            assert_as_accurate(g, e, x.double())


def test_logits_far_apart():
    """Losses of hundreds, and of almost nothing: p - 1 must not be rounded away."""
    for dtype in DTYPES:
        weight = torch.tensor([[100.0], [0.0], [-100.0], [97.0]], device=DEVICE, dtype=dtype)
        labels = torch.tensor([2, 0, 1, 0], device=DEVICE)
        hidden = torch.tensor([[3.0], [2.0], [-1.0], [1.0]], device=DEVICE, dtype=dtype)
        for i in range(4):
            part, label = hidden[i : i + 1], labels[i : i + 1]
            got = gradients(lambda h: linear_cross_entropy(h, weight, label), [part])  # noqa: B023
            exact = gradients(
                lambda h: F.cross_entropy(h @ weight.double().T, label),  # noqa: B023
                [part.double()],
            )
            for g, x in zip(got, exact, strict=True):
                torch.testing.assert_close(g.double(), x, rtol=1e-2, atol=1e-6)


def test_a_label_that_is_almost_certain():
    """p - 1 is -3e-4, of which nothing is left where p is rounded to 16 bits first."""
    weight = torch.tensor([[8.0], [0.0]], device=DEVICE)
    hidden, label = torch.ones(1, 1, device=DEVICE), torch.tensor([0], device=DEVICE)
    exact = gradients(lambda h: F.cross_entropy(h @ weight.double().T, label), [hidden.double()])
    for dtype in DTYPES:
        w = weight.to(dtype)
        got = gradients(lambda h: linear_cross_entropy(h, w, label), [hidden.to(dtype)])  # noqa: B023
        torch.testing.assert_close(got[1].double(), exact[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_fp16_sums_over_many_tokens_are_finite(autocast):
    """Their mean is far below the largest fp16 number, their sum above it."""
    hidden = torch.full((20000, 8), 10.0, device=DEVICE, dtype=torch.float16)
    weight = torch.randn(8, 8, device=DEVICE, dtype=torch.float16)
    bias = torch.randn(8, device=DEVICE, dtype=torch.float16)
    labels = torch.full((20000,), 3, device=DEVICE)
    parts = [hidden, weight, bias]
    exact = gradients(lambda h, w, b: plain(h, w, b, labels), [t.double() for t in parts], dy=64)
    with torch.autocast(DEVICE, torch.float16, enabled=autocast):
        got = gradients(
            lambda h, w, b: linear_cross_entropy(h, w, labels, b),
            [t.float() for t in parts] if autocast else parts,
            dy=64,
        )
    for g, x in zip(got, exact, strict=True):
        torch.testing.assert_close(g.double(), x, rtol=1e-2, atol=1e-2 * x.abs().max().item())


def test_fp16_keeps_the_gradients_of_unlikely_labels():
    """p is 8e-7 in each of 600 tokens: nothing of it would be left after a division by 600."""
    hidden = torch.ones(600, 1, device=DEVICE, dtype=torch.float16)
    weight = torch.tensor([[14.0], [0.0]], device=DEVICE, dtype=torch.float16)
    labels = torch.zeros(600, dtype=torch.int64, device=DEVICE)
    exact = gradients(
        lambda h, w: F.cross_entropy(h @ w.T, labels), [hidden.double(), weight.double()], 2.0**16
    )
    got = gradients(lambda h, w: linear_cross_entropy(h, w, labels), [hidden, weight], 2.0**16)
    for g, x in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(g.double(), x, rtol=0.05, atol=0)


def test_another_ignored_label(small_chunks):
    small_chunks(20)
    hidden, weight, bias, labels = make((13,), 8, 20, torch.float32)
    labels[labels == IGNORED] = 3
    got = linear_cross_entropy(hidden, weight, labels, bias, ignore_index=3)
    expected = plain(hidden, weight, bias, labels, ignore_index=3)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(2, 5), (0, 5)])
def test_without_a_label_the_mean_is_nan_and_gradients_are_zero(shape):
    hidden, weight, bias, _ = make(shape, 8, 20, torch.float32)
    labels = torch.full(shape, IGNORED, device=DEVICE)
    y, *grads = gradients(
        lambda h, w, b: linear_cross_entropy(h, w, labels, b), [hidden, weight, bias]
    )
    assert y.isnan()
    expected = gradients(lambda h, w, b: plain(h, w, b, labels), [hidden, weight, bias])[1:]
    for grad, e in zip(grads, expected, strict=True):
        assert torch.equal(grad, e)
        assert not grad.any()


def test_used_twice_and_accumulated(small_chunks):
    small_chunks(33)
    hidden, weight, bias, labels = make((4, 6), 16, 33, torch.float32)
    results = []
    for op in (lambda *a: linear_cross_entropy(*a[:2], a[3], a[2]), plain):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        for part in (slice(0, 3), slice(3, 4)):
            y = op(h[part], w, bias, labels[part])
            (y * y + 3 * y).backward(retain_graph=True)
            y.backward()
        results.append((h.grad, w.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_second_derivatives_are_refused():
    hidden, weight, _, labels = make((5,), 8, 20, torch.float32)
    h = hidden.requires_grad_()
    y = linear_cross_entropy(h, weight, labels)
    (dh,) = torch.autograd.grad(y * y, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


class Counting(nn.Linear):
    """A head that knows what it was called with."""

    def __init__(self, K, V):
        super().__init__(K, V, device=DEVICE)
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), torch.is_grad_enabled()))
        return super().forward(x)


def test_only_tokens_with_labels_in_even_chunks(small_chunks):
    small_chunks(50)
    hidden, *_ = make((30,), 8, 50, torch.float32)
    labels = torch.full((30,), IGNORED, device=DEVICE)
    labels[5:20] = 1
    head = Counting(8, 50)
    linear_cross_entropy(hidden.requires_grad_(), head, labels).backward()
    assert head.calls == [(5, True)] * 3  # 15 tokens, at most 7 a chunk


def test_no_graph_where_nothing_asks_for_gradients(small_chunks, monkeypatch):
    small_chunks(50)
    monkeypatch.setattr(torch.autograd, "grad", None)
    hidden, *_, labels = make((30,), 8, 50, torch.float32)
    head = Counting(8, 50)
    with torch.no_grad():
        y = linear_cross_entropy(hidden.requires_grad_(), head, labels)
    assert not y.requires_grad
    torch.testing.assert_close(y, plain(hidden, head.weight, head.bias, labels).detach())
    y = linear_cross_entropy(hidden.detach(), head.requires_grad_(False), labels)
    assert not y.requires_grad
    assert not any(grad for _, grad in head.calls)


def largest(call):
    """Bytes of the largest tensor that is made while a call runs."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Sizes(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given, found = (storages(x) for x in ((args, kwargs), out))
            made = [size for at, size in found.items() if at not in given]
            self.most = max([self.most, *made])
            return out

    def storages(values):
        parts = [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor)]
        return {part.data_ptr(): part.size() for part in parts}

    with Sizes() as sizes:
        call()
    return sizes.most


@pytest.mark.parametrize("K", [4, 64])
def test_neither_all_logits_nor_the_gradient_of_a_frozen_head(K, small_chunks):
    M, V = 100, 500
    small_chunks(V)
    hidden, weight, bias, labels = make((M,), K, V, torch.float32)
    h = hidden.requires_grad_()
    chunk = CHUNK * V * 4
    assert largest(lambda: linear_cross_entropy(h, weight, labels, bias).backward()) <= max(
        chunk, hidden.nbytes
    )
    assert largest(lambda: plain(h, weight, bias, labels).backward()) >= M * V * 4
    w = weight.requires_grad_()
    assert largest(lambda: linear_cross_entropy(h, w, labels, bias).backward()) >= weight.nbytes


@pytest.mark.skipif(DEVICE != "cpu", reason="only CPUs lack 16-bit products")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_16_bit_head_is_widened_in_parts(dtype, small_chunks, monkeypatch):
    V, K = 500, 64
    small_chunks(V)
    monkeypatch.setattr(loss, "_cpu_bf16", lambda: False)
    monkeypatch.setattr(loss, "_WIDE_COLUMNS", 60)
    hidden, weight, bias, labels = make((100,), K, V, dtype)
    h = hidden.requires_grad_()
    made = largest(lambda: linear_cross_entropy(h, weight, labels, bias).backward())
    assert made <= max(60 * K * 4, CHUNK * V * 4, hidden.numel() * 4)
    got = gradients(lambda h: linear_cross_entropy(h, weight, labels, bias, num_items=1), [hidden])
    check(got, hidden, weight, bias, labels)


def test_hooks_of_parameters_run_once(small_chunks):
    small_chunks(20)
    hidden, *_, labels = make((20,), 8, 20, torch.float32)
    head, calls = nn.Linear(8, 20, device=DEVICE), []
    head.weight.register_hook(calls.append)
    linear_cross_entropy(hidden, head, labels).backward()
    assert len(calls) == 1
    assert torch.equal(calls[0], head.weight.grad)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast(dtype, small_chunks):
    small_chunks(60)
    hidden, weight, bias, labels = make((2, 9), 16, 60, torch.float32)
    head = nn.Linear(16, 60, device=DEVICE)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    with torch.autocast(DEVICE, dtype):
        got = gradients(lambda h: linear_cross_entropy(h, head, labels), [hidden])
        eager = gradients(
            lambda h: F.cross_entropy(head(h).float().flatten(0, 1), labels.flatten()), [hidden]
        )
    exact = gradients(lambda h: plain(h, weight.double(), bias.double(), labels), [hidden.double()])
    for g, e, x in zip(got, eager, exact, strict=True):
        assert g.dtype == torch.float32  # with the error of 16 bits
        assert_as_accurate(g.to(dtype), e.to(dtype), x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_of_a_16_bit_head(dtype):
    hidden, weight, bias, labels = make((9,), 16, 60, dtype)
    expected = gradients(lambda h: plain(h, weight, bias, labels), [hidden])
    with torch.autocast(DEVICE, dtype):
        got = gradients(lambda h: linear_cross_entropy(h, weight, labels, bias), [hidden])
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype
        torch.testing.assert_close(g, e, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_checkpointing(reentrant, small_chunks):
    small_chunks(33)
    hidden, *_, labels = make((20,), 16, 33, torch.float32)
    head = LoraLinear(nn.Linear(16, 33), r=4, init_lora_weights=False).to(DEVICE)
    head.base_layer.requires_grad_(False)

    def call(h):
        return linear_cross_entropy(h.tanh(), head, labels)

    expected = gradients(call, [hidden])
    got = gradients_backward(lambda h: checkpoint(call, h, use_reentrant=reentrant), hidden)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


def gradients_backward(call, hidden):
    h = hidden.clone().requires_grad_()
    y = call(h)
    y.backward(torch.full_like(y, 0.7))
    return y.detach(), h.grad


def test_saved_tensors_of_chunks_are_not_the_callers(small_chunks):
    """Hooks that move what is saved elsewhere see the gradients, once, and not every chunk."""
    small_chunks(33)
    hidden, weight, bias, labels = make((20,), 16, 33, torch.float32)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, bias)
    assert sorted(t.numel() for t in seen if t.is_floating_point()) == sorted(
        [int((labels != IGNORED).sum()) * 16, 33 * 16]
    )


# dynamo looks at the .grad of what goes over a break in the graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_in_a_compiled_function(small_chunks):
    small_chunks(33)
    hidden, weight, bias, labels = make((20,), 16, 33, torch.float32)

    def call(h, w):
        return 2 * linear_cross_entropy(h * 2, w, labels, bias)

    expected = gradients(call, [hidden, weight])
    got = gradients(torch.compile(call, backend="aot_eager"), [hidden, weight])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


H, W, L = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(2, 3, dtype=torch.int64)
BAD = {
    r"hidden must be \[..., K\], head \[V, K\], bias \[V\], got \[\[2, 3, 8\], \[5, 7\]\]": (
        (H, torch.zeros(5, 7), L)
    ),
    r"bias \[V\], got \[\[2, 3, 8\], \[5, 8\], \[6\]\]": (H, W, L, torch.zeros(6)),
    "got Linear and a bias": (H, nn.Linear(8, 5), L, torch.zeros(5)),
    "a module that has out_features, got ReLU": (H, nn.ReLU(), L),
    "out_features, got function": (H, F.relu, L),
    r"labels must be \[...\] for hidden \[..., K\], got \[2, 2\] for \[2, 3, 8\]": (H, W, L[:, :2]),
    "integers, got torch.float32 and torch.float32": (H, W, L.float()),
    "got torch.float64 and torch.int64": (H.double(), W.double(), L),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*BAD[message])


def test_labels_out_of_range_raise():
    for label in (5, -1):
        with pytest.raises((IndexError, RuntimeError)):
            linear_cross_entropy(H, W, torch.full((2, 3), label))


def test_it_is_an_op():
    assert fastlora.ops.linear_cross_entropy is linear_cross_entropy
