"""The loss of transformers' causal language models in training, without their logits.

While a prepared model runs forward with labels, its output head hands the hidden states on in a
stand-in for logits, and its loss function takes them out and computes the loss in chunks
(`loss.linear_cross_entropy`). Whatever else a model does to the stand-in raises: nothing is
trained on another loss than the model's own.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports all of dynamo

from fastlora.loss import is_hooked, linear_cross_entropy

_HOOKS = "fastlora_chunked_loss"  # attribute of the model: what takes its hooks off again
_ALWAYS = "fastlora_without_logits"  # attribute of the model: it makes none in eval mode either
# what models do to their logits before the loss -> the value that does nothing
_LOGIT_OPS = {
    "final_logit_softcapping": None,
    "logit_scale": None,
    "logits_scaling": None,
    "lm_head_multiplier": None,
    "output_multiplier": None,
    "unpadded_vocab_size": None,
    "z_loss_coefficient": 0.0,
}


def chunk_loss(root: nn.Module) -> None:
    """Compute the loss in chunks from now on, wherever `why_not` has no reason against it.

    Args:
        root: the model, unwrapped; one that is prepared stays as it is.
    """
    model = _language_model(root)
    has_head = model is not None and model.get_output_embeddings() is not None
    if has_head and _HOOKS not in vars(root):
        before = root.register_forward_pre_hook(_arm, with_kwargs=True)
        after = root.register_forward_hook(_disarm, with_kwargs=True, always_call=True)
        vars(root)[_HOOKS] = before, after


def unchunk_loss(root: nn.Module) -> None:
    """Compute the loss as the model does it.

    Args:
        root: the model, unwrapped.
    """
    for module in (root, _language_model(root)):  # a PEFT model, or what it was made from
        for handle in vars(module).pop(_HOOKS, ()) if module is not None else ():
            handle.remove()


@contextmanager
def without_logits(root: nn.Module) -> Iterator[None]:
    """Compute the loss in chunks inside a `with` block, in eval mode too and prepared or not.

    As in training that is a forward with labels, and only where `why_not` has no other reason
    against it than that chunked_loss is off.

    Args:
        root: the model, unwrapped; afterwards it is as before.

    Yields:
        Nothing.
    """
    prepared = _HOOKS in vars(root)
    chunk_loss(root)
    inside = _ALWAYS in vars(root)
    vars(root)[_ALWAYS] = True
    try:
        yield
    finally:
        if not inside:
            del vars(root)[_ALWAYS]
        for handle in () if prepared else vars(root).pop(_HOOKS, ()):
            handle.remove()


def why_not(root: nn.Module) -> str:
    """Why the loss is computed from whole logits; empty where it is computed in chunks.

    Args:
        root: the model, unwrapped.

    Returns:
        The reason, in words that follow "because".
    """
    model = _language_model(root)
    if model is None:
        return "it is no causal language model of transformers"
    head = model.get_output_embeddings()
    if head is None:
        return "it has no output head"
    if "loss_function" not in _names(model):
        return f"{type(model).__name__} computes its loss itself"
    if model.loss_function is not _plain_loss():
        return "it has a loss function of its own"
    config = model.config.get_text_config(decoder=True)
    for name, neutral in _LOGIT_OPS.items():
        value = getattr(config, name, neutral)
        if value != neutral:
            return f"its logits depend on {name}={value}"
    if not hasattr(head, "out_features"):
        return f"its output head is a {type(head).__name__}"
    if is_hooked(head):
        return "its output head has hooks"
    prepared = _HOOKS in vars(root) or _HOOKS in vars(model)
    return "" if prepared else "chunked_loss is off"


class NoLogits:
    """What stands for logits that are not computed: it can be handed on, and nothing else.

    Args:
        hidden: [..., K]. What the head was given.
        head: the output head.
    """

    def __init__(self, hidden: Tensor, head: nn.Module) -> None:
        self.hidden, self.head = hidden, head
        self.used = False

    @property
    def shape(self) -> torch.Size:
        """That of the logits, [..., V]."""
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    @property
    def device(self) -> torch.device:
        """Where they would be."""
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """What they would be."""
        return self.hidden.dtype

    def to(self, *_: Any, **__: Any) -> "NoLogits":
        """The same: the loss is computed where the hidden states are, in fp32."""
        return self

    def float(self) -> "NoLogits":
        """The same."""
        return self

    def contiguous(self) -> "NoLogits":
        """The same."""
        return self

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "chunked_loss=True must be for models that give their logits to the loss and no other "
            "use, got another: call prepare_for_training(model, chunked_loss=False)"
        )

    # expressions and statements look these up in the class
    __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _refuse
    __getitem__ = __setitem__ = __len__ = __iter__ = __bool__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        """No other attribute of tensors is there."""
        if name.startswith("__"):  # protocols that Python and others ask for
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        """No function of torch takes it."""
        cls._refuse(None)


def _language_model(root: nn.Module) -> nn.Module | None:
    """The transformers model, also in a PEFT model; None for other modules."""
    model = root.get_base_model() if hasattr(root, "get_base_model") else root
    known = _plain_loss() is not None and hasattr(type(model), "get_output_embeddings")
    return model if known and hasattr(type(model), "loss_function") else None


def _plain_loss() -> Callable[..., Tensor] | None:
    """transformers' loss of causal language models, where transformers is imported."""
    loaded = sys.modules.get("transformers.loss.loss_utils")
    return None if loaded is None else loaded.ForCausalLMLoss


def _names(model: nn.Module) -> tuple[str, ...]:
    """Names that the forward of a model's class refers to, without its decorators."""
    return inspect.unwrap(type(model).forward).__code__.co_names


@_disable_dynamo
def _arm(root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a forward: a training step with labels makes no logits."""
    wanted = root.training or _ALWAYS in vars(root)
    if not wanted or _labels(root, args, kwargs) is None or why_not(root):
        return
    model = _language_model(root)
    head = model.get_output_embeddings()
    vars(head)["forward"] = partial(_hand_on, head)
    model.loss_function = partial(_loss, vars(model).get("_loss_function"))


@_disable_dynamo
def _disarm(root: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """After a forward, also one that raised: the model as it was, an output without logits."""
    model = _language_model(root)
    armed = None if model is None else vars(model).get("_loss_function")
    if not isinstance(armed, partial) or armed.func is not _loss:
        return output
    (own,) = armed.args
    del model._loss_function
    if own is not None:
        model.loss_function = own
    vars(model.get_output_embeddings()).pop("forward", None)
    return _without_logits(output)


def _labels(root: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    if "labels" in kwargs or not args:
        return kwargs.get("labels")
    return inspect.signature(root.forward).bind_partial(*args).arguments.get("labels")


def _hand_on(head: nn.Module, hidden: Tensor) -> NoLogits:
    """In place of the head's forward, once: the loss calls the head itself."""
    del vars(head)["forward"]
    return NoLogits(hidden, head)


def _loss(
    own: Callable[..., Tensor] | None,
    logits: Tensor | NoLogits,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`ForCausalLMLoss`, of hidden states where there are no logits; own: what the model was given.

    Models that were given none find theirs by the name of their kind, and do so again afterwards.
    """
    if not isinstance(logits, NoLogits):
        plain = own or _plain_loss()
        return plain(
            logits,
            labels,
            vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )
    logits.used = True
    if vocab_size != logits.shape[-1]:
        raise ValueError(
            f"the output head must have vocab_size={vocab_size} columns, got {logits.shape[-1]}"
        )
    targets = labels if shift_labels is None else shift_labels
    return linear_cross_entropy(
        logits.hidden,
        logits.head,
        targets.reshape(logits.shape[:-1]),
        shift=shift_labels is None,
        ignore_index=ignore_index,
        num_items=num_items_in_batch,
    )


def _without_logits(output: Any) -> Any:
    """An output of transformers, whose stand-in becomes None, or is left out of a tuple."""
    if isinstance(output, tuple):
        _check_used(output)
        return tuple(value for value in output if not isinstance(value, NoLogits))
    if not dataclasses.is_dataclass(output):
        return output
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    _check_used(values.values())
    unmade = {name: None for name, value in values.items() if isinstance(value, NoLogits)}
    return dataclasses.replace(output, **unmade)


def _check_used(values: Any) -> None:
    """A stand-in that never met the loss function means a loss from elsewhere, or none."""
    for value in values:
        if isinstance(value, NoLogits) and not value.used:
            value._refuse()
