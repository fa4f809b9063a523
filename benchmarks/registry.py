"""All benchmarks, one entry per op. A new op is a `Benchmark` in a new file, and its name here."""

from fastlora.benchmarks import linear, nf4, optimizer, step
from fastlora.benchmarks.spec import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    b.name: b for b in (nf4.QUANTIZE, nf4.DEQUANTIZE, linear.LINEAR, step.STEP, optimizer.OPTIMIZER)
}
