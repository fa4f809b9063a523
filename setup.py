"""Builds the C++ CPU kernels; everything else is in pyproject.toml."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

NOT_BUILT = (
    "fastlora: the C++ kernels were not built ({error}), so the slower PyTorch reference will run "
    "on CPUs; install a C++17 compiler and install fastlora again to have them"
)
# without -ffp-contract=off gcc fuses products and sums, and the bytes are no longer exact
UNIX = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-g0",
]
MSVC = ["/O2", "/std:c++17", "/fp:precise"]


class BuildKernels(build_ext):
    """Build, or say in one sentence why not and let the install go on."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one extension."""
        ext.extra_compile_args = MSVC if self.compiler.compiler_type == "msvc" else UNIX
        compile_some = self.compiler.compile

        def compile_each(sources: list[str], **settings: object) -> list[str]:
            # setuptools builds extensions side by side, the files of one after one another
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                done = pool.map(lambda source: compile_some([source], **settings), sources)
                return [output for outputs in done for output in outputs]

        self.compiler.compile = compile_each
        try:
            super().build_extension(ext)
        except (CCompilerError, BaseError, OSError) as error:
            print(NOT_BUILT.format(error=error), file=sys.stderr)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: the library is loaded by ctypes and has no module init for a linker to demand."""
        return []


setup(
    ext_modules=[
        Extension(
            "fastlora._native",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            language="c++",
            # it uses no Python at all, so one library serves every version
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
