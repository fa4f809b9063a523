"""`python -m benchmarks gpu`: every section runs, right before fast, and nothing found is lost."""

import json
import shutil

import pytest
import torch
from helpers import DEVICE
from typer.testing import CliRunner

from fastlora import plan
from fastlora.kernels.common import INTERPRET

pytest.importorskip("triton")

from fastlora.benchmarks import gpu, group, kernels, ways
from fastlora.benchmarks.__main__ import app
from fastlora.benchmarks.gpu import Run, Settings
from fastlora.benchmarks.run import Case, Result
from fastlora.benchmarks.spec import Work
from fastlora.benchmarks.timing import Spread

SMALL = Settings(device=DEVICE, small=True, seconds=1e9)
DTYPE = "fp16" if INTERPRET else "bf16"
TRITON = INTERPRET or DEVICE == "cuda"


def some_of_each(settings):
    """The first and the last job of every benchmark: one layer, and a group."""
    jobs = all_jobs(settings)
    first = {(job.section, job.benchmark.name): job for job in reversed(jobs)}
    last = {(job.section, job.benchmark.name): job for job in jobs}
    kept = [id(job) for job in (*first.values(), *(() if INTERPRET else last.values()))]
    return [job for job in jobs if id(job) in kept]


all_jobs = gpu.jobs


def case_of(op, sizes, mode="dropout 0", **ms):
    """A case whose providers took these times; a label's blanks are underscores."""
    results = []
    for label, value in ms.items():
        name, _, variant = label.replace("_", " ").replace("plus", "+").partition(" ")
        spread = None if value is None else Spread(value, value, value)
        status = "absent" if value is None else "ok"
        rates = {} if value is None else {"GB/s": 1000 / value}
        note = "not installed: it" if value is None else ""
        results.append(Result(name, variant, status, note, ms=spread, rates=rates))
    return Case(op, "a", sizes, "bf16", mode, Work(), results[0].label, results)


# --- a whole run ------------------------------------------------------------------------------


def test_all_sections_run_and_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "jobs", some_of_each)
    sections = {job.section for job, _, _ in gpu.benchmark(SMALL, tmp_path)}
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert sections == {"copy", "K0 decode", "ways", "layers", "kernels"}
    assert {case["section"] for case in content["cases"]} == sections
    assert content["left_out"] == []
    assert content["facts"]["packages"]["torch"] == torch.__version__
    for case in content["cases"]:
        for result in case["results"]:
            about = (case["op"], case["mode"], result)
            if result["status"] == "failed":  # said why
                assert "must have" in result["note"], about
            else:
                assert result["status"] in ("ok", "absent"), about
            if result["provider"] in ("copy", "dense", "fastlora", "addmm", "tail"):
                assert result["status"] == "ok", about
            if TRITON and result["provider"] in ("augment", "gemm"):
                assert result["status"] == "ok" or "got a group" in result["note"], about
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"## {section}\n" in text for section in sections)
    assert [*tmp_path.glob(".*")] == []


def test_the_plan_reads_what_was_written(tmp_path, monkeypatch):
    cases = [
        case_of("ways forward", {"M": 8, "N": 32, "K": 64, "R": 8}, addmm=2.0, augment=1.0),
        case_of("ways dx", {"M": 8, "N": 32, "K": 64, "R": 8}, tail=3.0, gemm=None),
        case_of(
            "ways forward", {"M": 5, "N0": 8, "N1": 4, "K": 64, "R": 8}, "dropout 0.05", addmm=1
        ),
        case_of("ways dx", {"M": 5, "N0": 8, "N1": 4, "K": 64, "R": 8}, "dropout 0.05", tail=1),
        case_of("ways forward", {"M": 9, "N": 1, "K": 1, "R": 1}, addmm=1.0),  # no dx: no row
    ]
    found = Run(SMALL, {"cpu": {}, "packages": {}}, [("ways", case) for case in cases])
    monkeypatch.setattr(gpu, "markdown", lambda found: "")
    gpu.write(found, tmp_path)

    kind = plan.device_kind(torch.device(DEVICE))
    name = kind.lower().replace(" ", "-")
    (tmp_path / "plans").mkdir()
    shutil.copy(tmp_path / f"plan-{name}.json", tmp_path / "plans" / f"{name}.json")
    monkeypatch.setattr(plan.resources, "files", lambda package: tmp_path)
    plan.measured.cache_clear()
    table = plan.measured(kind)
    plan.measured.cache_clear()
    found = {problem: (path.forward, path.dx) for problem, path in table.items()}
    assert found == {
        plan.Problem(8, (32,), 64, (8,), False, True): ("augment", "tail"),
        plan.Problem(8, (8, 4), 64, (8, 8), True, True): ("addmm", "tail"),
    }


def test_whole_layers_take_what_won(monkeypatch):
    sizes = {"M": 8, "N": 32, "K": 64, "R": 8}
    problem = ways.problem_of(sizes, "dropout 0")
    table = {problem: plan.Path("gemm", "gemm", "measured in this run")}
    device = torch.device(DEVICE)
    before = plan.choose("triton", device, problem)
    with plan.forced(table):
        assert plan.choose("triton", device, problem) == table[problem]
        assert plan.choose("reference", device, problem) == plan.PLAIN
        other = ways.problem_of(sizes, "dropout 0.05")
        assert plan.choose("triton", device, other).reason != "measured in this run"
    assert plan.choose("triton", device, problem) == before


def test_what_there_is_no_time_for_is_named(tmp_path):
    assert [*gpu.benchmark(Settings(DEVICE, True, seconds=0), tmp_path)] == []
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["cases"] == []
    assert len(content["left_out"]) == len(gpu.jobs(SMALL))
    assert content["left_out"][0] == "copy: copy copy"


def test_every_case_is_on_disk_before_the_next_begins(tmp_path):
    running = gpu.benchmark(SMALL, tmp_path)
    for count in (1, 2, 3):
        next(running)
        assert len(json.loads((tmp_path / "gpu.json").read_text())["cases"]) == count
    running.close()  # as if killed
    assert len(json.loads((tmp_path / "gpu.json").read_text())["cases"]) == 3


def test_the_most_important_comes_first():
    jobs = gpu.jobs(Settings("cpu"))
    sections = list(dict.fromkeys(job.section for job in jobs))
    assert sections == ["copy", "K0 decode", "ways", "layers", "kernels"]
    layers = [job.shape for job in jobs if job.section == "layers"]
    assert all("@8192 r=16" in shape for shape in layers[: len(gpu._layers(False))])
    assert {shape.split("@")[1] for shape in layers} == {
        f"{M} r=16" for M in (512, 2048, 8192, 16384)
    } | {"8192 r=64"}


# --- right before fast ------------------------------------------------------------------------


def spoiled(provider, name):
    def build(problem, mode):
        call = provider.build(problem, mode)

        def spoil():
            results = {n: t.detach().clone() for n, t in call().items()}
            results[name][-1, -1] += 0.1 * results[name].abs().max()
            return results

        return spoil

    return gpu.replace(provider, name="spoiled", build=build)


@pytest.mark.parametrize("name", ["y1", "dx", "da0", "db1"])
def test_a_wrong_layer_is_not_timed(name):
    shapes = {"two": group.sizes_of(5, (32, 16), 64, 4)}
    bench = group.group_benchmark(shapes, torch.device("cpu"))
    ours = next(p for p in bench.providers if p.name == "fastlora")
    bench = gpu.replace(bench, providers=(ours, spoiled(ours, name)))
    options = gpu.Options(ops=("layer",), dtypes=(DTYPE,), small=True, rounds=1, seconds=0)
    for case in gpu.run(options, {"layer": bench}):
        good, bad = case.results
        assert (good.status, bad.status, bad.ms) == ("ok", "wrong", None), case
        assert bad.note.startswith(f"{name} is off by")


@pytest.mark.parametrize("kernel", kernels.KERNELS, ids=lambda kernel: kernel.name)
def test_a_wrong_kernel_is_not_timed(kernel):
    shapes = {"one": group.sizes_of(5, (32,), 64, 4)}
    bench = next(
        b for b in kernels.kernel_benchmarks(shapes, torch.device("cpu")) if b.name == kernel.name
    )
    copy, ours = bench.providers
    names = {"K1": ["s"], "K5": ["ds", "db"], "K6": ["da"], "K6+K7": ["da", "dx"], "K7": ["dx"]}
    wrong = [spoiled(ours, name) for name in names[kernel.name.split()[0]]]
    bench = gpu.replace(bench, providers=(copy, ours, *wrong))
    options = gpu.Options(ops=(kernel.name,), dtypes=("fp32",), small=True, rounds=1, seconds=0)
    for case in gpu.run(options, {bench.name: bench}):
        statuses = [result.status for result in case.results]
        assert statuses == ["ok", "ok"] + ["wrong"] * len(wrong), case


def test_what_a_package_raises_ends_its_turn_only():
    def broken(problem, mode):
        raise AttributeError("no such thing")

    provider = gpu._guarded(gpu.Provider("broken", broken))
    with pytest.raises(RuntimeError, match="AttributeError: no such thing"):
        provider.build(None, "")


@pytest.mark.skipif(not TRITON, reason="needs a GPU or TRITON_INTERPRET=1")
def test_every_candidate_is_timed(tmp_path):
    settings = Settings(DEVICE, True, 1e9, tune=True)
    for _, case, _ in gpu.benchmark(settings, tmp_path):
        assert all(result.status == "ok" for result in case.results), case
    content = json.loads((tmp_path / "tune.json").read_text())
    tuned = {case["section"] for case in content["cases"]}
    assert {"tune K0 decode", "tune K1 s", "tune K6+K7 da, dx", "tune GEMM dx"} < tuned
    assert "tune K1 s" in (tmp_path / "tune.md").read_text()


# --- targets ----------------------------------------------------------------------------------

AT = {"M": 8192, "N": 4096, "K": 4096, "R": 16}


def lines_of(*cases):
    found = Run(Settings("cuda"), {}, list(cases))
    return [target.line() for target in gpu.targets(found)]


def test_targets():
    layer = case_of(
        "layer", AT, dense=1.0, fastlora=1.05, peftplusbitsandbytes_fp32=1.26,
        dense_graph=1.0, fastlora_graph=1.1, peftplusbitsandbytes_fp32_graph=None,
    )  # fmt: skip
    assert lines_of(("layers", layer)) == [
        "pass: a dropout 0, x dense 1.05, at most 1.08",
        "FAIL: a dropout 0, times as fast as PEFT 1.20, at least 1.25",
        "FAIL: a dropout 0 graph, x dense 1.10, at most 1.08",
        "not measured: a dropout 0 graph, times as fast as PEFT, at least 1.25 (not installed: it)",
    ]
    layer = case_of(
        "layer", AT, "dropout 0.05", dense=1.0, fastlora=1.0, peftplusbitsandbytes_fp32=1.6
    )
    assert "pass: a dropout 0.05, times as fast as PEFT 1.60, at least 1.5" in lines_of(
        ("layers", layer)
    )
    assert lines_of(("layers", case_of("layer", {**AT, "M": 512}, dense=1.0, fastlora=1.0))) == []


def test_the_target_of_decoding():
    copy, slow, fast = (
        case_of("x", AT, **ms) for ms in ({"copy": 1.0}, {"fastlora": 1.3}, {"fastlora": 1.1})
    )
    assert lines_of(("copy", copy), ("K0 decode", slow), ("K0 decode", fast)) == [
        "FAIL: K0 a, share of the bandwidth of a copy 0.77, at least 0.85",
        "pass: K0 a, share of the bandwidth of a copy 0.91, at least 0.85",
    ]
    assert lines_of(("K0 decode", fast))[0].startswith("not measured: K0 a")


# --- the command ------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_ends_with_one_line(tmp_path):
    done = CliRunner().invoke(app, ["gpu", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "there is no GPU here; --device cpu --small tries the command out"
    ]
    assert done.stdout == ""


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "jobs", lambda settings: all_jobs(settings)[:2])
    out = tmp_path / "new" / "folder"
    done = CliRunner().invoke(app, ["gpu", "--out", str(out), "--device", DEVICE, "--small"])
    assert done.exit_code == 0, done.output
    assert "K0 decode" in done.stdout
    assert (out / "gpu.md").is_file()


def test_the_roofline_command(tmp_path):
    done = CliRunner().invoke(app, ["roofline", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "not measurements" in done.stdout
    assert (tmp_path / "roofline.md").is_file()
