"""`fastlora bench`: every entry runs, wrong providers are found, and the times are taken fairly."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastlora.benchmarks import facts, run, timing
from fastlora.benchmarks.registry import BENCHMARKS
from fastlora.benchmarks.report import write_json
from fastlora.benchmarks.run import Options
from fastlora.benchmarks.spec import Provider
from fastlora.cli import app

QUICK = Options(small=True, dtypes=("fp32",), rounds=1, seconds=0)


def bench(*args):
    return CliRunner().invoke(app, ["bench", *args])


def run_with(op, *providers, **options):
    """Results by label of one op's baseline and these providers."""
    benchmark = BENCHMARKS[op]
    benchmark = replace(benchmark, providers=(benchmark.baseline, *providers))
    cases = [*run.run(replace(QUICK, ops=(op,), **options), {op: benchmark})]
    return {r.label: r for case in cases for r in case.results}


def provider_of(op, label):
    return next(p for p in BENCHMARKS[op].providers if p.label == label)


# --- every entry ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", BENCHMARKS)
def test_every_provider_is_right_and_timed(op, dtype):
    for case in run.run(replace(QUICK, ops=(op,), dtypes=(dtype,))):
        assert len(case.results) == len(BENCHMARKS[op].providers)
        for provider, result in zip(BENCHMARKS[op].providers, case.results, strict=True):
            assert result.status == ("absent" if provider.absent() else "ok"), result
            assert (result.ms is None) == (result.status == "absent")


@pytest.mark.gpu
def test_every_provider_is_right_and_timed_on_a_gpu():
    cases = [*run.run(replace(QUICK, device="cuda", dtypes=("bf16",)))]
    timed = [r for case in cases for r in case.results if r.status != "absent"]
    assert all(r.status == "ok" and r.peak_mib >= 0 for r in timed)


def test_json(tmp_path):
    path = tmp_path / "result.json"
    done = bench("all", "--small", "--rounds", "3", "--seconds", "0", "--json", str(path))
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80

    content = json.loads(path.read_text())
    assert set(content) == {"schema", "facts", "options", "cases"}
    assert content["schema"] == 1
    assert content["facts"]["packages"]["torch"] == torch.__version__
    assert content["facts"]["cpu"]["threads"] == torch.get_num_threads()
    cases = [(case["op"], case["mode"], case["dtype"]) for case in content["cases"]]
    assert cases == [
        ("quantize", "call", "bf16"),
        ("dequantize", "call", "bf16"),
        ("linear", "fwd", "bf16"),
        ("linear", "fwd+bwd", "bf16"),
        ("step", "plain", "bf16"),
        ("step", "dropout", "bf16"),
        ("optimizer", "call", "bf16"),
        ("optimizer", "call", "bf16"),
    ]
    for case in content["cases"]:
        assert case["shape"] in BENCHMARKS[case["op"]].small
        first = case["results"][0]
        assert case["baseline"] == f"{first['provider']} {first['variant']}".strip()
        for result in case["results"]:
            if result["status"] == "ok":
                assert result["rounds"] == 3
                for spread in result["ms"], result["ratio"]:
                    assert 0 < spread["q1"] <= spread["median"] <= spread["q3"]
                assert set(result["rates"]) == set(BENCHMARKS[case["op"]].rates)
                assert all(d["error"] <= d["bound"] for d in result["deviations"])
        assert case["results"][0]["ratio"] == {"median": 1, "q1": 1, "q3": 1}


def test_rates_are_work_over_time():
    linear = run_with("linear", modes=("fwd+bwd",))["dense"]
    flops = 2 * 2 * 5 * 64 * 128  # y and dx of M, N, K = 5, 64, 128
    assert linear.rates["GFLOP/s"] == pytest.approx(flops / linear.ms.median / 1e6)
    copy = run_with("quantize")["copy"]
    weights = 64 * 128
    moved = 4 * weights + weights / 2 + weights / 64 + 4  # fp32, codes, one group of scales
    assert copy.rates["Gw/s"] == pytest.approx(weights / copy.ms.median / 1e6)
    assert copy.rates["GB/s"] == pytest.approx(moved / copy.ms.median / 1e6)


# --- parity -----------------------------------------------------------------------------------


def spoiled(op, label, result, change):
    """A provider with one result changed, and the list of its calls."""
    good, calls = provider_of(op, label), []

    def build(problem, mode):
        call = good.build(problem, mode)

        def spoil():
            calls.append(mode)
            results = {name: t.detach().clone() for name, t in call().items()}
            change(results[result])
            return results

        return spoil

    return replace(good, name="spoiled", build=build), calls


def flip_one_code(packed):
    packed.view(-1)[-1] ^= 1


def add_to_last(t):
    t[-1, -1] += 0.02 * t.abs().max()


@pytest.mark.parametrize(
    ("op", "label", "result", "change"),
    [
        ("quantize", "fastlora", "packed", flip_one_code),
        ("dequantize", "fastlora", "w", add_to_last),
        ("linear", "fastlora lora", "y", add_to_last),
        ("linear", "fastlora lora", "dx", add_to_last),
        ("linear", "fastlora lora+dropout", "da", add_to_last),
        ("linear", "fastlora lora+dropout", "db", lambda t: t.mul_(1.001)),
        ("linear", "fastlora lora+dropout", "y", lambda t: t.fill_(float("nan"))),
    ],
)
def test_a_wrong_provider_is_reported_and_not_timed(op, label, result, change):
    wrong, calls = spoiled(op, label, result, change)
    got = run_with(op, wrong, modes=BENCHMARKS[op].modes[-1:])[wrong.label]
    assert (got.status, got.ms, got.rounds) == ("wrong", None, 0)
    assert got.note.startswith(f"{result} is off by ")
    # the mask of dropout is probed once, then there is one call to check
    assert len(calls) == (2 if "dropout" in label else 1)


def test_a_layer_that_drops_nothing_is_no_layer_with_dropout():
    cheat = replace(provider_of("linear", "fastlora lora"), name="cheat", variant="lora+dropout")
    got = run_with("linear", cheat, modes=("fwd",))["cheat lora+dropout"]
    assert got.status == "wrong"
    assert got.note.startswith("dropped share is off by 0.05")


def test_a_provider_that_raises_does_not_end_the_run():
    def build(problem, mode):
        raise NotImplementedError("fp32 must be another dtype\nand more")

    results = run_with("quantize", Provider("broken", build), provider_of("quantize", "fastlora"))
    broken = results["broken"]
    assert (broken.status, broken.ms) == ("failed", None)
    assert broken.note == "NotImplementedError: fp32 must be another dtype"
    assert results["fastlora"].status == "ok"


def test_an_absent_package_is_reported():
    absent = Provider("absent", None, packages=("torch", "no_such_package"))
    got = run_with("quantize", absent)["absent"]
    assert (got.status, got.note) == ("absent", "not installed: no_such_package")


@pytest.mark.parametrize(("name", "code"), [("fastlora", 1), ("other", 0)])
def test_exit_code_of_a_wrong_provider(name, code, monkeypatch):
    wrong, _ = spoiled("quantize", "fastlora", "packed", flip_one_code)
    benchmark = BENCHMARKS["quantize"]
    wrong = (benchmark.baseline, replace(wrong, name=name))
    monkeypatch.setitem(BENCHMARKS, "quantize", replace(benchmark, providers=wrong))
    done = bench("quantize", "--small", "--rounds", "1", "--seconds", "0")
    assert done.exit_code == code
    assert f"{name}: wrong, packed is off by" in done.output


# --- timing -----------------------------------------------------------------------------------


class DriftingClock:
    """A machine that gets slower with every round; call i takes i + 1 times as long as call 0."""

    cold = False

    def __init__(self):
        self.order, self.round = [], 0

    def ms(self, call, repeats):
        which = call()
        self.order.append(which)
        self.round += which == 0
        return (which + 1) * 10.0 * self.round


def test_providers_take_turns():
    clock = DriftingClock()
    times = timing.interleaved([lambda i=i: i for i in range(3)], clock, rounds=4, seconds=0)
    warm_up, rounds = clock.order[:3], clock.order[3:]
    assert warm_up == [0, 1, 2]
    assert rounds == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert [len(t) for t in times] == [4, 4, 4]


def test_ratios_are_taken_within_a_round(monkeypatch):
    def constant(value):
        return Provider(f"p{value}", lambda problem, mode: lambda: value)

    class Clock(DriftingClock):
        """Slower by round, in whatever order a round is."""

        def ms(self, call, repeats):
            self.order.append(call())
            return (call() + 1) * 10.0 * (1 + (len(self.order) - 1) // 2)

    monkeypatch.setattr(run, "clock_for", lambda device, cold: Clock())
    benchmark = replace(
        BENCHMARKS["quantize"],
        providers=(constant(0), constant(1)),
        check=lambda problem, mode, provider, call: [],
    )
    options = replace(QUICK, ops=("quantize",), rounds=5)
    (case,) = run.run(options, {"quantize": benchmark})
    slow = case.results[1]
    assert slow.ms.q1 < slow.ms.median < slow.ms.q3
    assert slow.ratio == timing.Spread(2.0, 2.0, 2.0)


def test_a_time_budget_goes_past_the_least_rounds():
    clock = timing.CpuClock(cold=False)
    (times,) = timing.interleaved([lambda: sum(range(1000))], clock, rounds=1, seconds=0.1)
    assert len(times) > 5


def test_short_calls_are_repeated_within_a_sample_unless_cold():
    def samples(cold):
        count = 0

        def call():
            nonlocal count
            count += 1

        timing.interleaved([call], timing.CpuClock(cold), rounds=1, seconds=0)
        return count

    assert samples(cold=False) > 100
    assert samples(cold=True) == 2  # one to warm up


def test_spread():
    assert timing.Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == timing.Spread(3.0, 2.0, 4.0)
    assert timing.Spread.of([7.0]) == timing.Spread(7.0, 7.0, 7.0)


# --- what is kept -----------------------------------------------------------------------------


def test_nothing_private_is_kept(monkeypatch):
    command = ["/home/me/bin/fastlora", "bench", "linear", "--json", "/home/me/x.json"]
    monkeypatch.setattr(sys, "argv", command)
    kept = facts.machine_facts("cpu")
    assert kept["command"] == "fastlora bench linear --json x.json"
    text = json.dumps(kept)
    assert str(Path.home()) not in text
    assert str(Path(facts.__file__).parent) not in text


def test_no_commit_of_another_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(facts, "__file__", str(tmp_path / "facts.py"))
    assert facts._commit() is None


def test_an_unfinished_write_leaves_the_old_file(monkeypatch, tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(fd):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {}, QUICK, [])
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["nothing"],
            "op must be one of dequantize, linear, optimizer, quantize, step, got nothing",
        ),
        (["quantize", "--dtype", "fp8"], "dtype must be one of bf16, fp16, fp32, got fp8"),
        (["quantize", "--shape", "llama"], "shape must be one of llama-1b.q, llama-8b.q, "),
        (
            ["linear", "--provider", "copy"],
            "provider must be one of bitsandbytes, dense, fastlora, ",
        ),
        (["linear", "--mode", "bwd"], "mode must be one of fwd, fwd+bwd, got bwd"),
        (
            ["linear", "--device", "tpu"],
            "device must be cpu or a CUDA device that is there, got tpu",
        ),
        (
            ["linear", "--device", "cuda:99"],
            "device must be cpu or a CUDA device that is there, got",
        ),
        (
            ["linear", "--rounds", "0"],
            "rounds must be at least 1 and seconds not negative, got 0 and",
        ),
        (
            ["linear", "--json", "no/such/folder/x.json"],
            "--json must name a file in a folder that ",
        ),
        (["linear", "--rounds", "many"], "Invalid value for '--rounds'"),
        (["step", "--mode", "fwd"], "mode must be one of dropout, plain, got fwd"),
        (["step", "--size", "batch"], "size must be NAME=N with a whole number, got batch"),
        (["step", "--size", "rank=8"], "size must be at least 1 and of one of R, batch, heads,"),
        (["step", "--size", "batch=0"], "size must be at least 1 and of one of R, batch, heads,"),
        (["linear", "--profile"], "profile must be of an op that has parts: step"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(args, message):
    done = bench(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"fastlora: {message}")
    assert done.stderr.count("\n") == 1


def test_a_shape_is_chosen_by_layer_or_by_layer_and_tokens():
    linear = BENCHMARKS["linear"]
    one = run._chosen_shapes(linear, Options(shapes=("llama-8b.up@512",)))
    assert one == {"llama-8b.up@512": {"M": 512, "N": 14336, "K": 4096}}
    layer = run._chosen_shapes(linear, Options(shapes=("llama-8b.up",)))
    assert [sizes["M"] for sizes in layer.values()] == [1, 16, 512, 2048]
