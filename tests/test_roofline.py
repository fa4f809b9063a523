"""The model of bytes and launches: closed forms, and the launches that are really made."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora import passes, plan
from fastlora.codebooks import dynamic_map
from fastlora.kernels.common import INTERPRET, Chip
from fastlora.member import Member
from fastlora.nf4 import NF4Weight

pytest.importorskip("triton")

from triton.runtime.jit import KernelInterface

from fastlora import gpu
from fastlora.benchmarks import roofline
from fastlora.benchmarks.roofline import GPUS, Problem, Way, ours, peft, unsloth
from fastlora.kernels import lora_bwd_ds_db, reduce

H200 = GPUS["H200"]


def problem(N=(4096,), R=16, dropout=False, M=8192, K=4096):
    return Problem(M, N, K, (R,) * len(N), dropout, stackable=True)


def coefficients(ledger):
    return tuple(round(ledger.per(dims), 2) for dims in ("MN", "MK"))


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "dropout", "forward", "launches", "backward", "back_launches"),
    [
        (peft, True, (16, 7), 12, (8, 15), 13),
        (peft, False, (16, 2), 11, (8, 10), 12),
        (unsloth, False, (4, 2), 6, (6, 8), 10),
    ],
)
def test_others(who, dropout, forward, launches, backward, back_launches):
    found = who(problem(dropout=dropout))
    assert [coefficients(ledger) for ledger in found] == [forward, backward]
    assert [ledger.launches for ledger in found] == [launches, back_launches]
    assert found[0].per("NK") == pytest.approx(2.766 if who is peft else 2.516, abs=5e-4)


@pytest.mark.parametrize(
    ("way", "dropout", "forward", "backward"),
    [
        (("gemm", "gemm"), False, (0, 2), (2, 2)),
        (("gemm", "gemm"), True, (0, 2), (2, 2)),
        (("addmm", "tail"), False, (4, 2), (2, 6)),
        (("addmm", "tail"), True, (4, 2), (2, 6)),
        (("augment", "tail"), True, (0, 4), (2, 6)),
    ],
)
def test_ours(way, dropout, forward, backward):
    found = ours(problem(dropout=dropout), Way(*way, ""), H200)
    # parts of ds: R fp32 numbers a row and block of columns, written and read
    parts = 8 * 16 / lora_bwd_ds_db.configs(H200.arch, 16)[0].kwargs["BLOCK_N"]
    MN, MK = backward
    assert [coefficients(ledger) for ledger in found] == [forward, (round(MN + parts, 2), MK)]
    assert found[0].per("NK") == found[1].per("NK") == roofline.DECODE


def test_the_formula_in_words():
    assert peft(problem(dropout=True))[0].formula() == "16MN + 7MK + 2.77NK"


def test_bytes_are_the_formula_times_the_sizes():
    forward, backward = peft(problem(N=(256, 128), R=8, dropout=True, M=1024, K=512))
    MN, MK, NK, factors = 1024 * 384, 1024 * 512, 384 * 512, 8 * (384 + 2 * 512)
    p = problem(N=(256, 128), R=8, dropout=True, M=1024, K=512)
    decode = roofline.BNB_DECODE * NK + 6 * factors
    assert forward.bytes(p) == 16 * MN + 2 * 7 * MK + decode
    assert backward.bytes(p) == 8 * MN + (2 * 15 + 6) * MK + decode


# --- what is really launched ------------------------------------------------------------------

# views, and memory without a value
NO_LAUNCH = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute",
    "select",    "slice", "split", "split_with_sizes", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Launches, and bytes beside those of the frozen layers' GEMMs, without running anything.

    Every tensor of a launch is moved once, twice if it is read and written.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.bytes = [], 0
        monkeypatch.setattr(
            KernelInterface, "__getitem__", lambda kernel, grid: self.kernel(kernel.__name__)
        )

    def kernel(self, name):
        def launch(*args, **kwargs):
            tensors = tree_leaves(args)
            if name == "_gemm_lora_kernel":
                tensors = args[2:6]  # not x, w and y
            self.names.append(name)
            self.bytes += sum(t.nbytes for t in unique(tensors))
            if name in ("_lora_bwd_dx_kernel", "_lora_bwd_da_kernel"):  # dx is read and written
                dx = args[0 if name == "_lora_bwd_dx_kernel" else 4]
                self.bytes += 0 if dx is None else dx.nbytes

        return launch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space != "aten" or name in NO_LAUNCH:
            return out
        self.names.append(name)
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if name in ("mm", "addmm", "addmm_") and min(tensors[-1].shape + tensors[-2].shape) > 256:
            # a frozen layer's: the sum that it is added to is what is left of its bytes
            self.bytes += tensors[0].nbytes if name != "mm" else 0
        else:
            # an output that is an input is read and written
            self.bytes += sum(t.nbytes for t in tensors)
            self.bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


def unique(tensors):
    found = {id(t): t for t in tensors if isinstance(t, torch.Tensor)}
    return found.values()


def meta_members(p):
    def weight(N):
        n, K = N * p.K, p.K
        sizes = [(n // 2, torch.uint8), (n // 64, torch.uint8), (-(-n // 64 // 256), torch.float32)]
        stats = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in sizes]
        tensors = [stats[0].view(N, K // 2), *stats[1:], dynamic_map(torch.device("meta"))]
        tensors.append(torch.empty((), device="meta"))
        return NF4Weight.unchecked(((N, K), 64, torch.bfloat16), tensors)

    def make(N, R):
        a, b = torch.empty(R, p.K, device="meta"), torch.empty(N, R, device="meta")
        return Member(weight(N), None, a, b, 2.0)

    return [make(N, R) for N, R in zip(p.N, p.R, strict=True)]


@pytest.fixture
def count(monkeypatch):
    """Launches and bytes of `passes` over the Triton backend, as on an H200."""
    for kernel in (gpu.gemm, gpu.k0, gpu.k1, gpu.k5, gpu.k6, gpu.k7, reduce):
        monkeypatch.setattr(kernel, "chip", lambda: Chip(H200.arch, H200.multiprocessors))

    def counted(p, way):
        members, drop = meta_members(p), 0.05 if p.dropout else 0.0
        x = torch.empty(p.M, p.K, dtype=torch.bfloat16, device="meta")
        state = torch.empty(2, dtype=torch.int64, device="meta") if p.dropout else None
        with Counter(monkeypatch) as forward:
            ys, s = passes.forward(gpu, way, x, members, state, drop)
        dys = [torch.empty_like(y) for y in ys]
        needs = [passes.Needs(False, False, True, True)] * len(members)
        with Counter(monkeypatch) as backward:
            passes.backward(gpu, way, dys, x, s, members, state, drop, True, needs)
        return [forward, backward]

    return counted


WAYS = [("addmm", "tail"), ("augment", "tail"), ("gemm", "gemm")]
SIZES = [  # N, R, M
    ((4096,), 16, 8192),
    ((4096,), 64, 8192),  # the largest rank of the fused pass
    ((4096,), 128, 8192),  # K5 reads dy twice, K6 and K7 are apart
    ((14336,), 16, 8192),
    ((4096,), 16, 512),  # K1 is split
    ((4096, 1024, 1024), 16, 8192),
    ((4096, 1024, 1024), 64, 8192),  # 192 ranks of a are stacked
]


@pytest.mark.skipif(INTERPRET, reason="the interpreter has configurations of its own")
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("way", WAYS, ids="/".join)
@pytest.mark.parametrize(("N", "R", "M"), SIZES, ids=str)
def test_the_model_counts_what_is_really_launched(count, N, R, M, way, dropout):
    p = problem(N, R, dropout, M)
    if way[1] == "gemm" and len(N) > 1:
        way = (way[0], "tail")  # dx of a group has one way
    model, real = ours(p, Way(*way, ""), H200), count(p, Way(*way, ""))
    drawn = int(dropout)  # the state, drawn by `ops` before the forward
    assert model[0].launches == len(real[0].names) + drawn, real[0].names
    assert model[1].launches == len(real[1].names), real[1].names
    for ledger, counted in zip(model, real, strict=True):
        assert ledger.bytes(p) == pytest.approx(counted.bytes, rel=0.02)


class DropoutOfGpus(torch.nn.Module):
    """One launch that also writes its mask; on a CPU torch's own takes several."""

    def forward(self, x):
        return torch.native_dropout(x, 0.05, True)[0]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_the_model_of_peft_is_what_peft_does(monkeypatch, dropout):
    bnb = pytest.importorskip("bitsandbytes")
    peft_package = pytest.importorskip("peft")
    M, N, K, R = 1024, 768, 512, 1
    options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
    model = torch.nn.Sequential(bnb.nn.Linear4bit(K, N, **options).bfloat16().to("cpu"))
    model.is_loaded_in_4bit = True  # as transformers says; else PEFT takes its layer for dense ones
    config = peft_package.LoraConfig(r=R, lora_dropout=dropout, target_modules=["0"])
    layer = peft_package.inject_adapter_in_model(config, model)[0]
    assert type(layer).__name__ == "Linear4bit"
    for part in (layer.lora_A, layer.lora_B):
        part.float()  # as `get_peft_model` leaves them
    if dropout:
        layer.lora_dropout["default"] = DropoutOfGpus()
    x = torch.randn(M, K).bfloat16().requires_grad_()
    leaves = [x, *layer.lora_A.parameters(), *layer.lora_B.parameters()]
    with torch.autocast("cpu", torch.bfloat16), monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *_: True)  # PEFT asks for CUDA's
        with Counter(monkeypatch) as forward:
            y = layer(x)
        dy = torch.randn_like(y)
        with Counter(monkeypatch) as backward:
            torch.autograd.grad(y, leaves, dy)
    p = Problem(M, (N,), K, (R,), dropout > 0, stackable=True)
    # torch does not see bitsandbytes' own launches: the base layer's forward, two of decoding
    for ledger, counted, unseen in zip(peft(p), (forward, backward), (4, 2), strict=True):
        assert ledger.launches == len(counted.names) + unseen, counted.names
        without = ledger.bytes(p) - ledger.per("NK") * N * K
        assert without == pytest.approx(counted.bytes, rel=0.02)


# --- times ------------------------------------------------------------------------------------


def test_times_agree_with_the_plan():
    device, p = plan.DEVICES["H200"], problem()
    for way, expected in plan.forward_seconds(device, p).items():
        ledger = ours(p, Way(way, "tail", ""), H200)[0]
        if way == "gemm":  # another GEMM: no bytes of its own
            assert not any(step.own for step in ledger.steps)
            continue
        own = roofline.Ledger(tuple(step for step in ledger.steps if step.own))
        assert roofline.seconds(device, p, own) == pytest.approx(expected, rel=0.01)
    tail = ours(p, Way("addmm", "tail", ""), H200)[1]
    own = roofline.Ledger(tuple(step for step in tail.steps if step.own))
    expected = plan.dx_seconds(device, p)["tail"]
    assert roofline.seconds(device, p, own) == pytest.approx(expected, rel=1e-6)


def test_a_prediction():
    found = roofline.predict("llama-3-8b", "q,o", "H200", problem())
    assert found.dense == 2 * 2 * 8192 * 4096 * 4096 / 800e12
    M, N, K, device = 8192, 4096, 4096, plan.DEVICES["H200"]
    forward = 16 * M * N + 2 * M * K + roofline.BNB_DECODE * N * K + 6 * 16 * (N + K)
    assert found.peft[0] == pytest.approx(found.dense / 2 + forward / device.bandwidth)
    assert found.dense < found.ours < sum(found.unsloth) < sum(found.peft)
    assert found.way == (
        min(found.forward, key=found.forward.get),
        min(found.dx, key=found.dx.get),
    )


def test_report(tmp_path: Path):
    sheets = list(roofline.report(tmp_path))
    text = (tmp_path / "roofline.md").read_text()
    assert roofline.CAVEAT in text
    assert all(sheet.title in text for sheet in sheets)
    assert all(len(row) == len(sheet.columns) for sheet in sheets for row in sheet.rows)
    content = json.loads((tmp_path / "roofline.json").read_text())
    layers = sum(map(len, roofline.MODELS.values()))
    assert len(content["predictions"]) == layers * len(GPUS) * len(roofline.RANKS) * 2
    for row in content["predictions"]:
        times = [row["dense"], *row["peft"], *row["forward"].values(), *row["dx"].values()]
        assert all(math.isfinite(t) and t > 0 for t in times)
