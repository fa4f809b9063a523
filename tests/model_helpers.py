"""Tiny models that the tests of whole models and adapter files share."""

import copy

import torch
from helpers import DEVICE
from torch import Tensor, nn

VOCAB = 97


class Block(nn.Module):
    """Two linear layers and a residual, as plain PyTorch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Plain(nn.Module):
    """A model without transformers: blocks, experts inside layers, a head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"mlp": Block(width), "experts": nn.ModuleList([Block(width), Block(width)])}
            )
            for _ in range(3)
        )
        self.extra = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer["mlp"](x)
            x = x + sum(expert(x) for expert in layer["experts"])
        return self.head(self.extra(x))


class Tied(nn.Module):
    """An embedding whose weight the head shares, and one module object at two paths."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.first = nn.Linear(width, width)
        self.again = self.first
        self.blocks = nn.ModuleList([Block(width)] * 2)
        self.out = nn.Linear(width, VOCAB, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.again(self.first(self.embed(tokens)))
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Nested(nn.Module):
    """Layers in layers, and names that end alike."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"layers": nn.ModuleList([Block(width), Block(width)])}) for _ in range(2)
        )
        self.model.setup = nn.Linear(width, width)
        self.model.upper = nn.Linear(width, width)
        self.model.up = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.model.layers:
            for block in layer["layers"]:
                x = block(x)
        return self.model.up(self.model.upper(self.model.setup(x)))


def nested() -> nn.Module:
    return Nested().to(DEVICE).eval()


def llama(tied: bool = False, layers: int = 2, **settings) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        **settings,
    )
    return LlamaForCausalLM(config).to(DEVICE).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=VOCAB)
    return GPT2LMHeadModel(config).to(DEVICE).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=VOCAB,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config).to(DEVICE).eval()


def plain() -> nn.Module:
    return Plain().to(DEVICE).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "plain": plain}


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def logits(model: nn.Module) -> Tensor:
    """Output [2, 9, vocab] (or [2, labels]) for fixed tokens, in eval mode, without gradient."""
    with torch.no_grad():
        y = model.eval()(tokens())
    return y if isinstance(y, Tensor) else y.logits


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def replica(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes of a model for each device: parameters are plain tensors."""
    new = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(new, name, None if parameter is None else parameter.clone())
    new._modules = {name: replica(child) for name, child in module._modules.items()}
    return new
