"""Compile kernels for a device that is not there, and read what the compiler made of them.

    with pretend("sm_90") as compiled:
        lora_down(x, a, state, threshold)  # a real launcher, on CPU tensors
    print(compiled[0].shared, compiled[0].problems())

What is compiled is what a GPU of that kind would get, since the launcher itself chooses the
configuration and Triton specialises on the arguments. Nothing is launched, so results hold
whatever was in memory. Needs a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.kernels.common import SHARED_BYTES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler left it. Counts are static: of the code, not of a run.

    Attributes:
        kernel: name of the function.
        target: key of `TARGETS`.
        threads: in a program.
        stages: of the software pipeline, as asked for.
        registers: a thread has; on AMD only those of vectors.
        spills: loads and stores of local memory, on AMD spilled registers.
        shared: bytes a program takes.
        loads: of global memory, width in bytes, or "async" (through shared memory) and "tma".
        stores: to global memory, width in bytes, or "tma".
        matrix: instructions of the matrix units by kind: mma, wgmma, tcgen05, mfma.
        instructions: all.
        loop: instructions of the longest innermost loop, 0 if there is none.
        unreachable: the compiler found code that can never run: it has dropped something.
        overwritten: a load of the pipeline goes where a matrix product may still read.
        ir: its input to the assembler, PTX or AMD's assembly.
    """

    kernel: str
    target: str
    threads: int
    stages: int
    registers: int
    spills: int
    shared: int
    loads: dict[str, int]
    stores: dict[str, int]
    matrix: dict[str, int]
    instructions: int
    loop: int
    unreachable: bool
    overwritten: bool
    ir: str

    def problems(self) -> list[str]:
        """Why this kernel must not be shipped, nothing if it may."""
        limit = SHARED_BYTES[self.target]
        found = {
            f"{self.spills} spills": self.spills > 0,
            f"{self.shared} bytes of shared memory, there are {limit}": self.shared > limit,
            "no store": not self.stores,
            "unreachable code": self.unreachable,
            "a buffer too few": self.overwritten,
        }
        return [what for what, bad in found.items() if bad]


class _Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device
        return self._target

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def pretend(target: str) -> Iterator[list[Compiled]]:
    """Compile what is launched inside for another device, instead of running it.

    Args:
        target: key of `TARGETS`.

    Yields:
        A list that receives a `Compiled` at every launch.
    """
    compiled: list[Compiled] = []
    run, before = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled.append(_read(kernel, target))  # not returned: nobody can start it

    JITFunction.run = compile_only
    driver.set_active(_Driver(target))
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver.set_active(before)


def _read(kernel: Any, target: str) -> Compiled:
    asm, metadata = kernel.asm, kernel.metadata
    read = _read_nvidia if "cubin" in asm else _read_amd
    return Compiled(
        kernel=metadata.name,
        target=target,
        threads=metadata.num_warps * TARGETS[target].warp_size,
        stages=metadata.num_stages,
        shared=metadata.shared,
        unreachable=bool(re.search(r"^\s*unreachable", asm["llir"], re.MULTILINE)),
        overwritten=overwritten(asm["ttgir"]),
        **read(asm),
    )


# --- NVIDIA ----------------------------------------------------------------------------------

_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


def _read_nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    ptx, sass, usage = asm["ptx"], *_disassemble(asm["cubin"])
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    names = [_opcode(text) for _, text in code]
    # a program ends with an endless loop and is filled up with NOP
    while names and names[-1] in ("NOP", "BRA"):
        names.pop()
    heads = Counter(name.split(".")[0] for name in names)
    jumps = [(int(j[1], 16), a) for a, text in code if (j := re.search(r"BRA\b.*?0x(\w+)", text))]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": heads["LDL"] + heads["STL"],
        "loads": _widths(ptx, "ld")
        | _some("async", len(re.findall(r"cp\.async\.c[ag]", ptx)))
        | _some("tma", len(re.findall(r"cp\.async\.bulk\.tensor\S*shared::\w+\.global", ptx))),
        "stores": _widths(ptx, "st")
        | _some("tma", len(re.findall(r"cp\.async\.bulk\.tensor\S*\.global\.shared", ptx))),
        "matrix": _some("mma", len(re.findall(r"\bmma\.sync", ptx)))
        | _some("wgmma", len(re.findall(r"wgmma\.mma_async", ptx)))
        | _some("tcgen05", len(re.findall(r"tcgen05\.mma", ptx))),
        "instructions": len([name for name in names if name != "NOP"]),
        "loop": _longest_loop(jumps, [a for a, text in code if _opcode(text) != "NOP"]),
        "ir": ptx,
    }


def overwritten(ttgir: str) -> bool:
    """Whether a pipelined load is written over what an asynchronous product reads.

    Loads run so many turns ahead as stand before the loop. A product that is not waited for in its
    turn still reads while the next load is written: then there must be one buffer more. Triton 3.6
    forgets it for a tensor that is used elsewhere too.

    Args:
        ttgir: a kernel after the pipeliner.

    Returns:
        Whether there is a buffer too few.
    """
    if not re.search(r"pendings = [1-9]", ttgir):
        return False
    buffer = r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x"
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir))
    before = ttgir.partition("scf.for")[0]
    loads = re.findall(r"async\w*_copy_global_to_local .*?, (%\w+)", before)
    ahead = Counter(_viewed(name, views) for name in loads)
    operands = re.findall(r"warp_group_dot (%\w+), (%\w+)", ttgir)
    read = {_viewed(name, views) for pair in operands for name in pair}
    return any(
        name in read and int(count) <= ahead[name] for name, count in re.findall(buffer, ttgir)
    )


def _viewed(name: str, views: dict[str, str]) -> str:
    """The buffer that a view of a view shows."""
    while name in views:
        name = views[name]
    return name


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS of a kernel, and the resources it takes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run(
                [tool, what, file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("--dump-sass", "--dump-resource-usage")
        )


def _opcode(text: str) -> str:
    """Name of an instruction, without the predicate before it."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _widths(ptx: str, what: str) -> dict[str, int]:
    """How often global memory is accessed with which width in bytes."""
    found = re.findall(rf"\b{what}\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s", ptx)
    return dict(Counter(str(int(n or 1) * _BYTES[bits]) for n, bits in found))


# --- AMD -------------------------------------------------------------------------------------


def _read_amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]
    # a line is a label or an instruction; its number stands for the address
    lines = text.splitlines()
    code = [(i, w[0], w[-1]) for i, line in enumerate(lines) if (w := _instruction(line))]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    jumps = [(labels[to], i) for i, name, to in code if "branch" in name and to in labels]
    names = Counter(name for _, name, _ in code)
    return {
        "registers": _amd_number(text, "vgpr_count"),
        "spills": _amd_number(text, "vgpr_spill_count") + _amd_number(text, "sgpr_spill_count"),
        "loads": _amd_widths(names, "load"),
        "stores": _amd_widths(names, "store"),
        "matrix": _some("mfma", sum(n for name, n in names.items() if name.startswith("v_mfma"))),
        "instructions": len(code),
        "loop": _longest_loop(jumps, [i for i, _, _ in code]),
        "ir": text,
    }


def _instruction(line: str) -> list[str] | None:
    words = line.split(";")[0].split()
    return words if re.match(r"\s+(?:[svd]|global|buffer|flat|scratch)\w*_", line) else None


def _amd_number(text: str, what: str) -> int:
    return int(re.search(rf"\.{what}:\s*(\d+)", text)[1])


def _amd_widths(names: Counter[str], what: str) -> dict[str, int]:
    widths = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    found: Counter[str] = Counter()
    for name, n in names.items():
        if m := re.match(
            rf"(?:global|buffer)_{what}_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)", name
        ):
            found[str(widths[m[1]])] += n
    return dict(found)


# --- both ------------------------------------------------------------------------------------


def _longest_loop(jumps: list[tuple[int, int]], addresses: list[int]) -> int:
    """Instructions of the longest loop that holds no other.

    Args:
        jumps: where each jump leads and where it stands.
        addresses: of all instructions.

    Returns:
        A count, 0 if nothing jumps back.
    """
    loops = [(to, at) for to, at in jumps if to < at]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return max((sum(to <= a <= at for a in addresses) for to, at in inner), default=0)


def _some(name: str, count: int) -> dict[str, int]:
    return {name: count} if count else {}
