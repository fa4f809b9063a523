"""Facts about the machine and helpers shared by all Triton kernels."""

import os

# TRITON_INTERPRET=1 runs kernels on CPU tensors; Triton fixes the choice when it is imported
INTERPRET: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
