"""`optimizer`: a step of AdamW over all parameters of an adapter, or over one large tensor.

"copy" moves as many bytes as a step with fp32 moments has to: parameters and moments are read and
written, gradients read. "transfer" copies fp32 moments to the device and back, both ways at once on
a GPU: what paging costs at least when nothing stays on the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import optim
from fastlora.benchmarks.parity import deviation
from fastlora.benchmarks.spec import Benchmark, Call, Deviation, Provider, Sizes, Work

LR, WEIGHT_DECAY, EPS = 0.1, 0.01, 1e-8
BUDGET = 128 << 20  # bytes of the device that paged moments may take
# layers L, rank R, hidden size H, width of k and v, and of the MLP F; or elements of one tensor
SHAPES = {
    "smollm2-135m.adapter": {"L": 30, "R": 16, "H": 576, "KV": 192, "F": 1536},
    "llama-3-8b.adapter": {"L": 32, "R": 16, "H": 4096, "KV": 1024, "F": 14336},
    "one.160M": {"n": 160_000_000},
}
SMALL = {
    "small.adapter": {"L": 2, "R": 4, "H": 64, "KV": 32, "F": 128},
    "small.one": {"n": 100_000},
}


@dataclass(frozen=True)
class StepProblem:
    """Parameters and gradients.

    Attributes:
        params: of any shape.
        grads: of each, in its dtype.
    """

    params: list[Tensor]
    grads: list[Tensor]

    def copies(self) -> list[nn.Parameter]:
        """Parameters to be updated, with the gradients, which are shared."""
        found = [nn.Parameter(p.clone()) for p in self.params]
        for p, grad in zip(found, self.grads, strict=True):
            p.grad = grad
        return found

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel() for p in self.params)

    @cached_property
    def truth(self) -> list[Tensor]:
        """The first 1000 elements of each parameter after the first step, fp64."""
        found = []
        for p, grad in zip(self.params, self.grads, strict=True):
            w, g = (t.view(-1)[:1000].double() for t in (p, grad))
            found.append(w * (1 - LR * WEIGHT_DECAY) - LR * g / (g.abs() + EPS))
        return found


def parameter_shapes(sizes: Sizes) -> Iterator[tuple[int, ...]]:
    """Shapes of the tensors: A and B of the seven linear layers of each block, or one tensor.

    Args:
        sizes: as in `SHAPES`.

    Yields:
        Shapes.
    """
    if "n" in sizes:
        yield (sizes["n"],)
        return
    H, KV, F, R = (sizes[name] for name in ("H", "KV", "F", "R"))
    for _ in range(sizes["L"]):
        for N, K in ((H, H), (KV, H), (KV, H), (H, H), (F, H), (F, H), (H, F)):
            yield (R, K)
            yield (N, R)


def _problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> StepProblem:
    shapes = [*parameter_shapes(sizes)]
    make = partial(torch.randn, device=device, dtype=dtype)
    return StepProblem([make(shape) for shape in shapes], [make(shape) for shape in shapes])


def _work(sizes: Sizes, itemsize: int, mode: str) -> Work:
    numel = sum(torch.Size(shape).numel() for shape in parameter_shapes(sizes))
    return Work(bytes=numel * (3 * itemsize + 16))


def _check(problem: StepProblem, mode: str, provider: Provider, call: Call) -> list[Deviation]:
    got, dtype = call(), problem.params[0].dtype
    if not got:
        return []  # nothing but bytes was moved
    # of the largest parameter, which is some fifty times the update; bitsandbytes' is 1e-3 off
    bound = max(torch.finfo(dtype).eps, 1e-4)
    heads = torch.cat([t.detach().view(-1)[:1000] for t in got.values()])
    return [deviation("w", heads, torch.cat(problem.truth), bound)]


def _step(problem: StepProblem, mode: str, make: Callable[..., Any]) -> Call:
    params = problem.copies()
    optimizer = make(params, lr=LR, weight_decay=WEIGHT_DECAY, eps=EPS)
    results = {str(i): p for i, p in enumerate(params)}

    def call() -> dict[str, Tensor]:
        optimizer.step()
        return results

    return call


def _bitsandbytes(problem: StepProblem, mode: str, name: str) -> Call:
    from bitsandbytes import optim as bnb

    return _step(problem, mode, getattr(bnb, name))


def _copy(problem: StepProblem, mode: str) -> Call:
    half = problem.numel * (3 * problem.params[0].itemsize + 16) // 2
    source = torch.randint(256, (half,), dtype=torch.uint8, device=problem.params[0].device)
    target = torch.empty_like(source)

    def call() -> dict[str, Tensor]:
        target.copy_(source)
        return {}

    return call


def _transfer(problem: StepProblem, mode: str) -> Call:
    device = problem.params[0].device
    pin = device.type == "cuda"
    size = min(8 * problem.numel, BUDGET // 2)  # at a time
    turns = -(-8 * problem.numel // size)
    there, back = (torch.zeros(size, dtype=torch.uint8, pin_memory=pin) for _ in range(2))
    first, second = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))

    def on_host() -> dict[str, Tensor]:
        for _ in range(turns):
            first.copy_(there)
            back.copy_(second)
        return {}

    if not pin:
        return on_host
    current, streams = torch.cuda.current_stream(device), [torch.cuda.Stream(device) for _ in "io"]

    def on_device() -> dict[str, Tensor]:
        pairs = ((first, there), (back, second))
        for stream in streams:
            stream.wait_stream(current)
        for _ in range(turns):
            for stream, (target, source) in zip(streams, pairs, strict=True):
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
        for stream in streams:
            current.wait_stream(stream)
        return {}

    return on_device


def _ours(variant: str, **options: Any) -> Provider:
    return Provider("fastlora", partial(_step, make=partial(optim.AdamW, **options)), variant)


def _peer(name: str, variant: str) -> Provider:
    packages = ("bitsandbytes",)
    return Provider("bitsandbytes", partial(_bitsandbytes, name=name), variant, packages)


_PAGED = {"paged": True, "page_budget": BUDGET}

OPTIMIZER = Benchmark(
    name="optimizer",
    summary="one step of AdamW; GB/s counts the bytes of a step with fp32 moments",
    shapes=SHAPES,
    small=SMALL,
    problem=_problem,
    providers=(
        Provider("torch", partial(_step, make=partial(torch.optim.AdamW, fused=True)), "fused"),
        Provider("torch", partial(_step, make=partial(torch.optim.AdamW, foreach=True)), "foreach"),
        _ours("fp32"),
        _ours("8 bit", state_bits=8),
        _ours("paged fp32", **_PAGED),
        _ours("paged 8 bit", state_bits=8, **_PAGED),
        _peer("AdamW", "fp32"),
        _peer("AdamW8bit", "8 bit"),
        Provider("copy", _copy),
        Provider("transfer", _transfer),
    ),
    check=_check,
    work=_work,
    rates=("GB/s",),
)
