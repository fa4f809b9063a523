"""Shapes of real models, by name."""

# [N, K] of one linear layer: out_features, in_features
LAYERS = {
    "smollm2-135m.up": {"N": 1536, "K": 576},
    "llama-1b.q": {"N": 2048, "K": 2048},
    "llama-8b.q": {"N": 4096, "K": 4096},
    "llama-8b.up": {"N": 14336, "K": 4096},
}
SMALL_LAYERS = {"small": {"N": 64, "K": 128}}

# linear layers of one block by [N, K]: "q,o" are alike, "q+k+v" read one input as one group
MODELS = {
    "llama-3-8b": {
        "q,o": {"N": (4096,), "K": 4096},
        "k,v": {"N": (1024,), "K": 4096},
        "gate,up": {"N": (14336,), "K": 4096},
        "down": {"N": (4096,), "K": 14336},
        "q+k+v": {"N": (4096, 1024, 1024), "K": 4096},
        "gate+up": {"N": (14336, 14336), "K": 4096},
    },
    "qwen2.5-7b": {
        "q,o": {"N": (3584,), "K": 3584},
        "k,v": {"N": (512,), "K": 3584},
        "gate,up": {"N": (18944,), "K": 3584},
        "down": {"N": (3584,), "K": 18944},
        "q+k+v": {"N": (3584, 512, 512), "K": 3584},
        "gate+up": {"N": (18944, 18944), "K": 3584},
    },
    "qwen3-8b": {
        "q,o": {"N": (4096,), "K": 4096},
        "k,v": {"N": (1024,), "K": 4096},
        "gate,up": {"N": (12288,), "K": 4096},
        "down": {"N": (4096,), "K": 12288},
        "q+k+v": {"N": (4096, 1024, 1024), "K": 4096},
        "gate+up": {"N": (12288, 12288), "K": 4096},
    },
}

TOKENS = (1, 16, 512, 2048)  # decoding, a small batch, one sequence, a training batch


def with_tokens(
    layers: dict[str, dict[str, int]], tokens: tuple[int, ...]
) -> dict[str, dict[str, int]]:
    """Every layer at every number of tokens: "layer@M" -> M, N, K."""
    return {f"{name}@{m}": {"M": m, **sizes} for name, sizes in layers.items() for m in tokens}
