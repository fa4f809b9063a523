"""`fastlora bench step`: contenders are what they are called; their parts and their memory."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import fastlora
from fastlora.benchmarks import breakdown, peak, run
from fastlora.benchmarks.registry import BENCHMARKS
from fastlora.benchmarks.run import Options
from fastlora.benchmarks.spec import Provider
from fastlora.cli import app

pytest.importorskip("transformers")

STEP = BENCHMARKS["step"]
QUICK = Options(ops=("step",), small=True, dtypes=("fp32",), modes=("plain",), rounds=1, seconds=0)
SIZES = STEP.small["tiny"]
LABELS = [provider.label for provider in STEP.providers]


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    return STEP.problem(SIZES, torch.device("cpu"), torch.float32)


def built(problem, label, mode="plain"):
    provider = next(p for p in STEP.providers if p.label == label)
    if provider.absent():
        pytest.skip(f"not installed: {provider.absent()}")
    return provider.build(problem, mode)


def kinds(model):
    return Counter(
        type(m).__module__.partition(".")[0] + "." + type(m).__name__ for m in model.modules()
    )


def test_contenders_are_what_they_are_called(problem):
    layers = 7 * SIZES["layers"]
    both = kinds(built(problem, "peft+bitsandbytes").model)
    assert both["bitsandbytes.Linear4bit"] == both["peft.Linear4bit"] == layers
    dense = kinds(built(problem, "peft dense").model)
    assert dense["peft.Linear"] == layers
    assert not dense["bitsandbytes.Linear4bit"]
    for label in ("fastlora", "fastlora full logits"):
        found = kinds(built(problem, label).model)
        assert found["fastlora.LoraLinear"] == found["fastlora.Linear4bit"] == layers
    for label in LABELS:
        model = built(problem, label).model
        logits = model(input_ids=problem.tokens, labels=problem.tokens).logits
        assert (logits is None) == (label == "fastlora" or "chunked loss" in label), label


@pytest.mark.parametrize("mode", STEP.modes)
@pytest.mark.parametrize("label", LABELS)
def test_a_step_trains_the_adapters_and_nothing_else(label, mode, problem):
    step = built(problem, label, mode)
    before = {n: p.detach().clone() for n, p in step.model.named_parameters()}
    first, second = step(), step()
    assert first["loss"] != second["loss"]
    changed = {n for n, p in step.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".lora_" in n}
    assert len(changed) == len(step.parts) == 14 * SIZES["layers"]


@pytest.mark.parametrize("label", LABELS)
def test_dropout_is_on_in_its_mode(label, problem):
    def loss(mode, seed):
        torch.manual_seed(seed)
        return built(problem, label, mode)()["loss"]

    assert loss("dropout", 1) != loss("dropout", 2)
    assert loss("plain", 1) == loss("plain", 2)


def spoiled(change):
    """Ours with something changed in it."""
    good = next(p for p in STEP.providers if p.label == "fastlora")

    def build(problem, mode):
        step = good.build(problem, mode)
        change(step)
        return step

    return replace(good, name="spoiled", build=build)


def other_weights(step):
    step.model.model.layers[1].mlp.up_proj.base_layer.qweight.data ^= 1


def other_adapter(step):
    step.parts[-1].data *= -1


def no_scale(step):
    for m in step.model.modules():
        if isinstance(m, fastlora.nn.LoraLinear):
            m.scaling["default"] = 1.0


def other_tokens(step):
    step.tokens = step.tokens.flip(0, 1)


@pytest.mark.parametrize("change", [other_weights, other_adapter, no_scale, other_tokens])
def test_a_wrong_contender_is_reported_and_not_timed(change):
    benchmark = replace(STEP, providers=(STEP.providers[-1], spoiled(change)))
    (case,) = run.run(QUICK, {"step": benchmark})
    right, wrong = case.results
    assert right.status == "ok"
    assert (wrong.status, wrong.ms) == ("wrong", None)


def test_tokens_a_second_and_other_sizes():
    benchmark = replace(STEP, providers=STEP.providers[-1:])
    options = replace(QUICK, sizes=(("batch", 3), ("R", 2)))
    (case,) = run.run(options, {"step": benchmark})
    (result,) = case.results
    assert case.sizes == {**SIZES, "batch": 3, "R": 2}
    assert result.rates["tok/s"] == pytest.approx(3 * SIZES["length"] / result.ms.median * 1e3)


def test_without_the_packages_of_any_contender_there_is_no_model():
    absent = Provider("absent", None, packages=("no_such_package",))
    benchmark = replace(STEP, providers=(absent,), problem=None)
    (case,) = run.run(QUICK, {"step": benchmark})
    assert [result.status for result in case.results] == ["absent"]


# what computes what, whoever the contender is
OPS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "aten::_log_softmax": "loss",
    "aten::rsqrt": "norms",
    "aten::cos": "rotary",
    "aten::silu": "activation",
    "aten::silu_backward": "activation",
    "aten::embedding": "rest",
    "aten::_foreach_addcdiv_": "optimizer",
    "aten::addcdiv_": "optimizer",
    "_LinearBackward": "linear layers",
}


def forwards(model):
    """Every class of the model's modules that has a forward -> that forward."""
    classes = {c for m in model.modules() for c in type(m).__mro__ if "forward" in vars(c)}
    return {c: vars(c)["forward"] for c in classes}


@pytest.mark.parametrize("label", LABELS)
def test_operators_belong_to_their_parts(label, problem):
    step = built(problem, label)
    step()
    before = forwards(step.model)
    events = breakdown.trace(step)
    seen = {name: {part for event, part in events if event.name == name} for name in OPS}
    for name, parts in seen.items():
        assert parts <= {OPS[name]}, name
    assert sum(map(bool, seen.values())) >= 8
    products = Counter(part for event, part in events if event.name in ("aten::mm", "aten::addmm"))
    assert {*products} <= {"linear layers", "loss"}
    # the head's product and its gradient, all at once or in chunks
    assert products["loss"] == 2
    assert forwards(step.model) == before


def test_parts_are_printed_and_written(tmp_path):
    path = tmp_path / "step.json"
    words = ("step", "--small", "--mode", "plain", "--profile", "--rounds", "1", "--seconds", "0")
    done = CliRunner().invoke(app, ["bench", *words, "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "…" not in done.output  # names take several lines instead
    (case,) = json.loads(path.read_text())["cases"]
    for result in case["results"]:
        if result["status"] == "ok":
            assert {*result["parts"]} == {*breakdown.PARTS}
            assert all(ms >= 0 for ms in result["parts"].values())
    for part in breakdown.PARTS:
        assert f"\n{part} " in done.output


def test_memory_is_that_of_a_process_with_its_weights():
    provider = STEP.providers[-1]
    sizes = {**SIZES, "vocab": 40000, "hidden": 256}
    got = peak.peak_mib(STEP, provider, sizes, "cpu", "fp32", "plain")
    embedding = 40000 * 256 * 4 / 2**20
    assert embedding < got < 6 * embedding


def test_a_process_that_fails_is_reported():
    with pytest.raises(RuntimeError, match="fastlora: KeyError: 'fp8'"):
        peak.peak_mib(STEP, STEP.providers[-1], SIZES, "cpu", "fp8", "plain")
