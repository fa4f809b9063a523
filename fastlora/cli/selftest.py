"""What `fastlora doctor` looks at: the machine, and whether its kernels compute what they must."""

import platform
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

import fastlora
from fastlora import backend, native, reference

PACKAGES = (
    "triton",
    "safetensors",
    "transformers",
    "accelerate",
    "gguf",
    "peft",
    "bitsandbytes",
)

N, K, M, R = 96, 128, 33, 8
TOLERANCE = 1e-4  # of the largest element, fp32; the suite of the repository is stricter


def facts() -> dict[str, str]:
    """What is here, by name; an empty string for a package that is not."""
    return {
        "fastlora": _version("fastlora-engine"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "C++ kernels": _kernels(),
        **{str(device): _describe(device) for device in _devices()},
        **{name: _version(name) for name in PACKAGES},
    }


def problems() -> dict[str, str]:
    """What is wrong, by check and device; an empty string where nothing is."""
    checks = {"NF4 bytes and values": _nf4, "LoRA forward and gradients": _lora}
    found = {}
    for device in _devices():
        for name, check in checks.items():
            try:
                problem = check(device)
            # such as a forced backend that does not run here, or a kernel that does not compile
            except RuntimeError as error:
                problem = str(error)
            found[f"{name}, {device}"] = problem
    return found


def _kernels() -> str:
    try:
        return native.isa() if native.available() else native.unavailable_reason()
    except RuntimeError as error:  # FASTLORA_CPU_ISA names what does not run here
        return str(error)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _devices() -> list[torch.device]:
    """The CPU and every GPU."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpu = torch.cuda.get_device_properties(device)
    missing = backend.why_not("triton", device)
    kernels = f"no Triton kernels: {missing}" if missing else "Triton kernels"
    memory, capability = f"{gpu.total_memory / 2**30:.0f} GiB", f"{gpu.major}.{gpu.minor}"
    return f"{gpu.name}, {memory}, capability {capability}, {kernels}"


def _nf4(device: torch.device) -> str:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    packed, absmax, _ = reference.quantize_blocks(w, 64)
    # on the device, because the mean of the scales depends on the order of its sum
    codes, absmax2, offset = (t.cpu() for t in reference.quantize_stats(absmax.to(device)))
    q = fastlora.quantize_nf4(w.to(device))
    for name, got, want in (
        ("codes", q.qweight, packed.view(N, K // 2)),
        ("scales", q.absmax, codes),
        ("scales of scales", q.absmax2, absmax2),
    ):
        if not torch.equal(got.cpu(), want):
            return f"{name} differ from the reference"
    stats = codes, q.absmax2.cpu(), q.code2.cpu(), q.offset.cpu()
    values = reference.dequantize_blocks(packed, *stats, 64, N * K, torch.float32).view(N, K)
    if not torch.equal(fastlora.dequantize_nf4(q).cpu(), values):
        return "decoded weights differ from the reference"
    return "" if torch.allclose(q.offset.cpu(), offset) else "the offset differs from the reference"


def _lora(device: torch.device) -> str:
    make = torch.Generator().manual_seed(0)
    shapes = {"y": (M, N), "x": (M, K), "a": (R, K), "b": (N, R)}
    dy, *inputs = (torch.randn(shape, generator=make) for shape in shapes.values())
    q = fastlora.quantize_nf4(torch.randn(N, K, generator=make).to(device))
    w = fastlora.dequantize_nf4(q).cpu().double()

    def run(op: Callable[..., Tensor], to: dict[str, object]) -> list[Tensor]:
        leaves = [t.to(**to).requires_grad_() for t in inputs]
        y = op(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(**to))]

    got = run(lambda x, a, b: fastlora.ops.lora_linear(x, q, a, b, 0.5), {"device": device})
    want = run(lambda x, a, b: x @ w.T + 0.5 * (x @ a.T) @ b.T, {"dtype": torch.float64})
    for name, g, exact in zip(("y", "dx", "da", "db"), got, want, strict=True):
        error = (g.cpu().double() - exact).abs().max() / exact.abs().max()
        if not error <= TOLERANCE:
            return f"{name} is off by {error:.1e} of its largest element"
    return ""
