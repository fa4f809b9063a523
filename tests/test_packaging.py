"""What an installed fastlora is: its parts, its metadata, what an import costs."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ROOT

import fastlora

VERSION = metadata.version("fastlora-engine")
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
TEXT = {".md", ".py", ".toml", ".cpp", ".h", ".yml", ".cfg", ""}


def run_python(code: str, *, cwd: Path = ROOT.parent, **env: str) -> str:
    """What `code` prints in a fresh interpreter that does not start in the repository."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def import_native_from(site: Path) -> list[str]:
    """Where the package that lies in `site` is found, whether its C++ runs, and why not."""
    code = """
        import sys
        # the finder of an editable install would fill in what `site` lacks
        sys.meta_path = [f for f in sys.meta_path if "__editable__" not in f.__module__]
        import fastlora
        from fastlora import native
        print(fastlora.__file__, native.available(), native.unavailable_reason(), sep="|")
    """
    printed = run_python(textwrap.dedent(code), PYTHONPATH=str(site))
    file, *rest = printed.split("|")
    assert Path(file).is_relative_to(site)
    return rest


def copy_sources(to: Path) -> Path:
    """A copy of the checkout without what was built, so that a build leaves nothing behind."""
    ignored = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "runs")
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*ignored)))


def build(kind: str, source: Path, to: Path, **env: str) -> Path:
    """Build "wheel" or "sdist" of `source` as pip would, offline."""
    code = f"from setuptools import build_meta as b; b.build_{kind}({str(to)!r})"
    to.mkdir(exist_ok=True)
    run_python(code, cwd=source, **env)
    (built,) = to.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_sources(folder / "src"), folder / "out", **NO_COMPILER)


def test_metadata():
    dist = metadata.distribution("fastlora-engine")
    assert dist.metadata["License-Expression"] == "Apache-2.0"
    assert dist.metadata["Requires-Python"] == ">=3.10"
    extras = {"hf", "peft", "bnb", "bench", "dev", "all"}
    assert extras <= set(dist.metadata.get_all("Provides-Extra"))
    (script,) = dist.entry_points.select(group="console_scripts")
    assert script.name == "fastlora"
    assert callable(script.load())


def test_core_dependencies():
    # what belongs to an extra must not be needed by everybody
    required = [r for r in metadata.requires("fastlora-engine") if "extra ==" not in r]
    names = {re.match(r"[\w-]+", r).group() for r in required}
    assert names == {"torch", "numpy", "safetensors", "triton", "typer", "rich"}
    (triton,) = (r for r in required if r.startswith("triton"))
    assert "Linux" in triton


def test_changelog_has_this_version():
    assert f"\n## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()


def test_kernels_is_not_a_top_level_package():
    spec = find_spec("kernels")  # Hugging Face has a package of that name
    assert spec is None or not Path(spec.origin).is_relative_to(ROOT)
    assert find_spec("fastlora.kernels") is not None


def test_typed():
    assert resources.files("fastlora").joinpath("py.typed").is_file()


def test_every_package_is_listed():
    # a folder that is not listed is missing from the wheel, and an editable install hides it
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in ROOT.glob("fastlora/**/__init__.py")
    }
    assert set(listed) == found | {"fastlora.benchmarks", "fastlora.kernels"}


def test_public_names_exist_and_are_documented():
    assert fastlora.__all__
    for name in fastlora.__all__:
        value = getattr(fastlora, name)
        assert not callable(value) or value.__doc__, f"fastlora.{name} has no docstring"


def test_import_is_lean():
    code = """
        import sys, fastlora.adapters, fastlora.report
        print(*sys.modules)
    """
    modules = run_python(textwrap.dedent(code)).split()
    foreign = {"transformers", "peft", "bitsandbytes", "accelerate", "datasets", "matplotlib"}
    assert not foreign & set(modules)
    assert not {"fastlora.cli", "typer"} & set(modules)
    assert not {"fastlora.gpu", "triton", "torch._dynamo"} & set(modules)  # slow, and rarely needed


def test_import_for_transformers_is_lean():
    pytest.importorskip("transformers")
    modules = run_python("import sys, fastlora.integrations.transformers; print(*sys.modules)")
    assert not {"peft", "bitsandbytes", "transformers.trainer"} & {*modules.split()}


def test_wheel_contents(wheel_without_compiler):
    rooms = {
        "fastlora": "fastlora",
        "kernels": "fastlora/kernels",
        "benchmarks": "fastlora/benchmarks",
    }
    sources = {
        f"{installed}/{path.relative_to(ROOT / room).as_posix()}"
        for room, installed in rooms.items()
        for path in (ROOT / room).rglob("*.py")
    }
    info = f"fastlora_engine-{VERSION}.dist-info"
    names = set(zipfile.ZipFile(wheel_without_compiler).namelist())
    code = {name for name in names if not name.startswith(f"{info}/")}
    plans = {str(path.relative_to(ROOT)) for path in (ROOT / "fastlora/plans").glob("*.json")}
    # nothing else: no tests, no csrc, no second top-level package
    assert code == sources | plans | {"fastlora/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_without_a_compiler_it_installs_and_says_so(wheel_without_compiler, tmp_path):
    zipfile.ZipFile(wheel_without_compiler).extractall(tmp_path)
    available, reason = import_native_from(tmp_path)
    assert available == "False"
    assert "compiler" in reason


def test_sdist_builds_the_extension(tmp_path):
    sdist = build("sdist", copy_sources(tmp_path / "src"), tmp_path / "sdist")
    subprocess.run(
        [sys.executable, "-m", "tarfile", "-e", sdist, tmp_path / "unpacked"], check=True
    )
    (source,) = (tmp_path / "unpacked").iterdir()
    assert {p.name for p in (ROOT / "csrc").iterdir()} == {
        p.name for p in (source / "csrc").iterdir()
    }
    # what is tested is that it builds and loads, and optimising takes most of the time
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    wheel = build("wheel", source, tmp_path / "wheel", CXX=str(compiler))
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    available, reason = import_native_from(tmp_path / "site")
    assert (available, reason) == ("True", "")


def test_nobody_is_sent_to_the_other_package():
    # the name without -engine belongs to somebody else on the package index
    wrong = re.compile(r"pip3? install (?:-U |--upgrade )?[\"']?fast" r"lora(?![\w-]|/)")
    for path in sorted(ROOT.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(ROOT).parent.parts)
        if path.is_file() and not hidden and path.suffix in TEXT:
            assert not wrong.search(path.read_text(errors="ignore")), path
