"""Shapes of real models, by name."""

# [N, K] of one linear layer: out_features, in_features
LAYERS = {
    "smollm2-135m.up": {"N": 1536, "K": 576},
    "llama-1b.q": {"N": 2048, "K": 2048},
    "llama-8b.q": {"N": 4096, "K": 4096},
    "llama-8b.up": {"N": 14336, "K": 4096},
}
SMALL_LAYERS = {"small": {"N": 64, "K": 128}}

TOKENS = (1, 16, 512, 2048)  # decoding, a small batch, one sequence, a training batch


def with_tokens(
    layers: dict[str, dict[str, int]], tokens: tuple[int, ...]
) -> dict[str, dict[str, int]]:
    """Every layer at every number of tokens: "layer@M" -> M, N, K."""
    return {f"{name}@{m}": {"M": m, **sizes} for name, sizes in layers.items() for m in tokens}
