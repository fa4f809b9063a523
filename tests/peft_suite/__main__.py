"""PEFT's own tests of LoRA, as they are and after `fastlora.enable()`: `make test-peft`.

The tests are those of the installed PEFT's source distribution; models of the hub that they name
are tiny ones of the same architecture with random weights. A test that ends in another way when
LoRA layers are fast is an error, unless `EXPECTED` says why.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastlora.cli.demo_model import cache_dir

# what only PEFT's tests need, without what these need, which is there or not asked for
PACKAGES = (
    *("datasets", "diffusers", "parameterized", "pandas", "pyarrow", "dill", "multiprocess"),
    *("xxhash", "python-dateutil", "six", "attrs", "tzdata"),
)
FILES = (
    *("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models"),
    *("seq_classifier", "initialization", "tuners_utils", "low_level_api", "lora_variants"),
    *("target_parameters", "trainable_tokens", "mixed", "xlora", "lorafa", "loraplus", "arrow"),
    *("lora_conversion", "lora_ga", "bdlora", "velora", "lora_intruders", "other", "helpers"),
    *("quantization", "mapping"),
)
EXPECTED = {  # why a test ends differently -> parts of its name
    "classes show that they are fast: lora.FastLoraLinear, FastLoraModel": (
        "::TestLayerRepr::test_repr_lora_",
        "::test_module_type_",
        "::test_adapter_model_type_",
        "::test_model_target_parameters",
        "::test_target_parameters_and_target_modules",
        "::test_model_status_with_",
        "::test_modules_to_save_targets_lora_layer_raises",
    ),
    "the error comes before weights are changed, in other words": (
        "::test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises",
    ),
}


def prepare(folder: Path) -> None:
    """Put the tests, what they need and the models into a folder, once."""
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    peft = f"peft=={version('peft')}"
    source = ["--no-deps", "--no-binary", ":all:", "--dest", folder, peft]
    subprocess.run([*pip, "download", *source], check=True)
    # dill, which tests use, knows its packages by this name
    target = ["--no-deps", "--target", folder / "site-packages", *PACKAGES]
    subprocess.run([*pip, "install", *target], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    shutil.move(folder / archive.name.removesuffix(".tar.gz") / "tests", folder)
    (folder / "tests" / "__init__.py").touch()
    subprocess.run([sys.executable, Path(__file__).with_name("models.py")], cwd=folder, check=True)
    (folder / "ready").touch()


def run(folder: Path, enabled: bool) -> tuple[dict[str, str], int]:
    """The outcome of each test, and how many forwards of LoRA layers were fast."""
    counts = folder / "counts"
    counts.unlink(missing_ok=True)
    report = folder / ("fast.xml" if enabled else "plain.xml")
    report.unlink(missing_ok=True)
    tests = [folder / "tests" / f"test_{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-p", "plugin", "--no-header"]
    command += ["-p", "no:cacheprovider", "--tb=no", "-W", "ignore", "-r", "N"]
    environment = {
        "PYTHONPATH": str(Path(__file__).parent),
        "FASTLORA_SITE_PACKAGES": str(folder / "site-packages"),
        "FASTLORA_ENABLE": str(int(enabled)),
        "FASTLORA_COUNTS": str(counts),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [*command, f"--junitxml={report}", *(t for t in tests if t.exists())],
        cwd=folder,
        env=os.environ | environment,
        check=False,  # the report has every outcome
    )
    outcomes = {_name(case): _outcome(case) for case in ET.parse(report).iter("testcase")}
    return outcomes, sum(map(int, counts.read_text().split()))


def compare(plain: dict[str, str], fast: dict[str, str]) -> tuple[Table, list[str]]:
    """A table of both runs by file, and the names of tests whose difference is not expected."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold cyan")
    for head in ("file", "tests", "passed", "passed fast", "skipped", "failed in both"):
        table.add_column(head, justify="left" if head == "file" else "right", no_wrap=True)
    rows: dict[str, Counter] = {}
    for name, before in plain.items():
        after = fast.get(name, "missing")
        file = name.partition("::")[0].removeprefix("test_")
        row = rows.setdefault(file, Counter())
        row["tests"] += 1
        row["passed"] += before == "passed"
        row["passed fast"] += after == "passed"
        row["skipped"] += before == after == "skipped"
        row["failed in both"] += before == after and before in ("failure", "error")
    rows["all"] = sum(rows.values(), Counter())
    for file, row in rows.items():
        table.add_row(file, *(f"{row[column.header]:,}" for column in table.columns[1:]))
    different = [name for name in plain if plain[name] != fast.get(name)]
    different += [name for name in fast if name not in plain]
    expected = [part for parts in EXPECTED.values() for part in parts]
    return table, [name for name in different if not any(part in name for part in expected)]


def main() -> None:
    """Run both, print the table, and fail where a difference is not expected."""
    folder = cache_dir() / f"peft-suite-{version('peft')}"
    prepare(folder)
    plain, none = run(folder, enabled=False)
    fast, forwards = run(folder, enabled=True)
    table, wrong = compare(plain, fast)
    console = Console(highlight=False, markup=False, soft_wrap=True, width=100)
    console.print(f"\nPEFT {version('peft')}'s own tests, and again with fast layers\n\n", table)
    console.print(f"\n{forwards:,} forwards of LoRA layers were fast, without enable() {none}")
    for why, parts in EXPECTED.items():
        names = ", ".join(part.strip(":") for part in parts)
        console.print(f"expected to differ, as {why}: {names}")
    for name in wrong:
        console.print(f"different: {name}: {plain.get(name)} -> {fast.get(name)}", style="red")
    # of fewer something is wrong with what the tests need
    if sum(outcome == "passed" for outcome in plain.values()) < len(plain) / 2 or not forwards:
        sys.exit("most of PEFT's tests must pass, and run fast layers, for a comparison to count")
    sys.exit(f"{len(wrong)} tests end differently with fast layers" if wrong else 0)


def _name(case: ET.Element) -> str:
    file, _, kind = case.get("classname", "").removeprefix("tests.").partition(".")
    return "::".join(part for part in (file, kind, case.get("name")) if part)


def _outcome(case: ET.Element) -> str:
    found = [child.tag for child in case if re.fullmatch("failure|error|skipped", child.tag)]
    return found[0] if found else "passed"


if __name__ == "__main__":
    main()
