"""Which path is chosen: by the roofline or by what was measured, and for a stated reason."""

import json
from dataclasses import replace

import pytest
import torch

import fastlora
from fastlora import plan
from fastlora.member import Member

CPU = torch.device("cpu")
# of a size that no shipped table has
GATE = plan.Problem(M=4096, N=(14336,), K=4096, R=(16,), dropout=True, stackable=True)


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    """Choices are cached for the life of a process; tests change what they are made from."""
    yield
    for cached in (plan._choose, plan.measured, plan.device_kind):
        cached.cache_clear()


def chosen(problem, kind="NVIDIA H200"):
    return plan._choose(kind, problem)


def test_other_backends_have_one_path():
    assert plan.choose("reference", CPU, GATE) == plan.PLAIN
    assert plan.choose("cpu", CPU, GATE) == plan.PACKED


def test_bytes_decide_where_nothing_was_measured():
    """2MK for a copy of x against 4MN for y, at the price of R more columns in the GEMM."""
    assert chosen(GATE).forward == "augment"
    down = replace(GATE, N=(4096,), K=14336)
    assert chosen(down).forward == "addmm"
    group = replace(GATE, N=(14336, 14336), R=(16, 16))
    assert chosen(group).forward == "augment"
    assert chosen(group).dx == "tail"
    assert "not measured on NVIDIA H200" in chosen(GATE).reason


def test_what_cannot_run_is_not_chosen():
    h200 = plan.DEVICES["H200"]
    assert set(plan.forward_seconds(h200, GATE)) == {"addmm", "augment", "gemm"}
    assert "augment" not in plan.forward_seconds(h200, replace(GATE, stackable=False))
    assert "augment" not in plan.forward_seconds(h200, replace(GATE, R=(5,)))
    mixed = replace(GATE, N=(64, 64), R=(16, 0))
    assert "augment" not in plan.forward_seconds(h200, mixed)
    for odd in ({"K": 4097}, {"R": (5,)}, {"itemsize": 4}, {"R": (512,)}, {"row_major": False}):
        assert "gemm" not in plan.forward_seconds(h200, replace(GATE, **odd))
        assert "gemm" not in plan.dx_seconds(h200, replace(GATE, **odd))
    assert "gemm" not in plan.dx_seconds(h200, mixed)


def test_a_faster_gemm_would_be_taken():
    """The Triton GEMM is chosen where it wins, not on principle."""
    facts = replace(plan.DEVICES["H200"], gemm=1.0)
    seconds = plan.forward_seconds(facts, GATE)
    assert min(seconds, key=seconds.get) == "gemm"


def test_no_adapter_needs_no_path():
    assert chosen(replace(GATE, R=(0,))).reason == "no adapter: the GEMM alone"


def test_what_was_measured_is_taken(tmp_path, monkeypatch):
    row = {"M": 4096, "N": [14336], "K": 4096, "R": [16], "dropout": True, "stackable": True}
    (tmp_path / "plans").mkdir()
    file = tmp_path / "plans" / "nvidia-h200.json"
    file.write_text(json.dumps([row | {"forward": "gemm", "dx": "gemm"}]))
    monkeypatch.setattr(plan.resources, "files", lambda _: tmp_path)
    assert chosen(GATE) == plan.Path("gemm", "gemm", "measured on NVIDIA H200")
    assert "roofline" in chosen(replace(GATE, M=8192)).reason
    assert "roofline" in chosen(GATE, kind="NVIDIA A100-SXM4-80GB").reason


def test_shipped_tables_can_be_read():
    folder = plan.resources.files("fastlora").joinpath("plans")
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    assert names
    for name in names:
        kind = name.removesuffix(".json").replace("-", " ")
        table = plan.measured(kind)
        assert len(table) == len(json.loads((folder / name).read_text()))
        device = plan.DEVICES["A100"]  # any: what can run is the same on all
        for problem, path in table.items():
            assert plan.bucket(problem.M) == problem.M
            assert path.forward in plan.forward_seconds(device, problem)
            assert path.dx in plan.dx_seconds(device, problem)


def test_an_h200_takes_what_was_measured_on_it():
    path = chosen(replace(GATE, M=8192))
    assert path.reason == "measured on NVIDIA H200"
    assert (path.forward, path.dx) == ("augment", "tail")


@pytest.mark.parametrize(("M", "size"), [(0, 1), (1, 1), (3, 4), (64, 64), (65, 128), (8192, 8192)])
def test_buckets(M, size):
    assert plan.bucket(M) == size


def test_the_problem_of_a_call():
    w = torch.randn(8, 64)
    nested, flat = fastlora.quantize_nf4(w), fastlora.quantize_nf4(w, double_quant=False)
    a, b = torch.zeros(4, 64), torch.zeros(8, 4)
    problem = plan.problem(100, [Member(nested, None, a, b), Member(nested)], 0.1, 2)
    assert problem == plan.Problem(128, (8, 8), 64, (4, 0), dropout=True, stackable=True)
    assert not plan.problem(1, [Member(nested), Member(flat)], 0.0, 2).stackable
    assert not plan.problem(1, [Member(w)], 0.0, 2).stackable
