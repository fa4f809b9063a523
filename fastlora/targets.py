"""Which modules of a model are adapted, trained whole, quantised or left alone, and why."""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fastlora.config import LoraConfig
from fastlora.nf4 import FLOATS
from fastlora.nn import Linear4bit, LoraLinear, SavedModule, is_conv1d

# modules whose forward reads the weights of the linear layers inside, without calling them
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# and classes of transformers, and of mamba_ssm, that do so with some; by name, as models on the hub
# bring code of their own under these names
_READS_SOME = {
    "BambaMixer": {"out_proj"},
    "ConditionalDetrMHAttentionMap": {"k_proj"},
    "DabDetrMHAttentionMap": {"k_linear"},
    "DetrMHAttentionMap": {"k_proj"},
    "DisentangledSelfAttention": {"in_proj"},
    "FalconH1Mixer": {"out_proj"},
    "FalconMambaMixer": {"dt_proj", "out_proj", "x_proj"},
    "Gemma3nTextAltUp": {"correction_coefs", "prediction_coefs"},
    "GraniteMoeHybridMambaLayer": {"out_proj"},
    "JambaMambaMixer": {"dt_proj"},
    "LSHSelfAttention": {"query_key", "value"},
    "LayoutLMv2Encoder": {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"},
    "LongcatFlashTopkRouter": {"classifier"},
    "Mamba": {"dt_proj", "in_proj", "out_proj", "x_proj"},
    "Mamba2": {"out_proj"},
    "Mamba2Mixer": {"out_proj"},
    "MambaMixer": {"dt_proj", "out_proj", "x_proj"},
    "MaskFormerDetrMHAttentionMap": {"k_proj"},
    "MobileBertLMPredictionHead": {"decoder", "dense"},
    "NemotronHMamba2Mixer": {"out_proj"},
    "NeoMMEForMaskedLM": {"unembedding_projection"},
    "RwkvFeedForward": {"value"},
    "RwkvSelfAttention": {"output"},
    "TDNNLayer": {"kernel"},
    "WavLMAttention": {"k_proj", "out_proj", "q_proj", "v_proj"},
    "Zamba2MambaMixer": {"out_proj"},
}
# classes that do so with slow_but_exact, where weights were trained in slices
_READS_SLICES = {"BloomAttention": {"dense"}, "BloomMLP": {"dense_4h_to_h"}}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# heads that PEFT trains whole for a task
_TASK_HEADS = {
    "QUESTION_ANS": ["qa_outputs"],
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
}


@dataclass(frozen=True)
class Plan:
    """What one adapter does to one model.

    Attributes:
        layers: path of each adapted layer -> its rank and lora_alpha.
        saved: paths of the modules that are trained whole.
        skipped: path of each linear layer that "all-linear" leaves out -> the reason.
    """

    layers: dict[str, tuple[int, float]]
    saved: list[str]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Site:
    """A module at its place.

    Attributes:
        path: its name in the model.
        module: the module itself.
        obstacle: why a linear layer here must not be replaced; empty if nothing forbids it.
        taken: whether that is because an adapter trains it whole.
    """

    path: str
    module: nn.Module
    obstacle: str
    taken: bool = False


def walk(model: nn.Module) -> Iterator[Site]:
    """Every module below the root once, at its first path, as they were before adapters.

    Nothing inside `LoraLinear` and `Linear4bit` is visited; the module in a `SavedModule` is
    visited under the path of the `SavedModule`.

    Args:
        model: the root; it is not visited itself.

    Yields:
        Modules with their paths, parents before children.
    """
    yield from _visit(model, Site("", model, ""), {id(model)})


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of any class, also one that is trained whole."""
    module = module.original_module if isinstance(module, SavedModule) else module
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_bnb(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' 4-bit layer, without importing bitsandbytes."""
    loaded = sys.modules.get("bitsandbytes.nn.modules")
    return loaded is not None and isinstance(module, loaded.Linear4bit)


def check_no_peft(model: nn.Module) -> None:
    """Check that no layer of a model belongs to PEFT, without importing PEFT.

    Args:
        model: any module.

    Raises:
        ValueError: it has adapters of PEFT.
    """
    loaded = sys.modules.get("peft.tuners.tuners_utils")
    if loaded is not None and any(isinstance(m, loaded.BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            f"the model must be without adapters of PEFT, got a {type(model).__name__} with some: "
            "use PEFT's own methods, which fastlora.patch_peft makes fast"
        )


def with_task_heads(cfg: LoraConfig) -> LoraConfig:
    """The config as PEFT completes it: the heads of its task are trained whole.

    Args:
        cfg: not changed.

    Returns:
        A new config.
    """
    heads = _TASK_HEADS.get(cfg.task_type, [])
    saved = [*(cfg.modules_to_save or []), *heads]
    return replace(cfg, modules_to_save=saved or None)


def make_plan(model: nn.Module, cfg: LoraConfig, strict: bool = True) -> Plan:
    """Find what a config means on a model; the model is not changed.

    Args:
        model: any module, with or without adapters.
        cfg: from `with_task_heads`.
        strict: whether a name or pattern that matches nothing is an error. Files written by PEFT
            may hold such names.

    Returns:
        The plan.

    Raises:
        NotImplementedError: a target is of a kind that cannot be adapted yet.
        ValueError: nothing matches, a name matches nothing, or a module cannot be adapted.
    """
    check_no_peft(model)
    sites = {site.path: site for site in walk(model)}
    skipped = _left_out(model, sites) if is_all_linear(cfg) else {}
    targets, excluded = [], []
    for path, site in sites.items():
        if _is_excluded(cfg, path):
            excluded.append(path)
        elif is_all_linear(cfg):
            targets += [path] if is_linear(site.module) and path not in skipped else []
        elif matches(cfg, path):
            targets.append(path)
    saved = [path for path in sites if path.endswith(tuple(cfg.modules_to_save or ()))]
    if strict:
        _check_names(cfg, sites, targets, excluded)
    if not targets:
        raise ValueError(
            f"target_modules must match modules of the model, got {cfg.target_modules!r} for "
            f"linear layers named {_linear_names(sites)}, with {len(excluded)} modules excluded"
        )
    for path in targets:
        _check_target(sites[path])
    for path in saved:
        _check_saved(path, sites, targets, saved)
    ranks = [*_values(cfg.rank_pattern, targets, cfg.r)]
    alphas = [*_values(cfg.alpha_pattern, targets, cfg.lora_alpha)]
    return Plan(dict(zip(targets, zip(ranks, alphas, strict=True), strict=True)), saved, skipped)


def is_all_linear(cfg: LoraConfig) -> bool:
    """Whether the config targets every linear layer but the output head."""
    targets = cfg.target_modules
    return isinstance(targets, str) and targets.lower() == "all-linear"


def matches(cfg: LoraConfig, path: str) -> bool:
    """Whether `target_modules` and `layers_to_transform` name a module, as in PEFT.

    Args:
        cfg: its target_modules is not "all-linear".
        path: name of the module.

    Returns:
        True if it is a target, exclusions aside.
    """
    targets = cfg.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    # a whole name is a target whatever its layer
    return path in targets or (has_suffix(path, targets) and _in_layers(cfg, path))


def name_list(names: str | Iterable[str], option: str) -> list[str]:
    """The names that an option takes: one, or several.

    Args:
        names: as given.
        option: what the message calls it.

    Returns:
        A new list.

    Raises:
        ValueError: they are no names.
    """
    found = [names] if isinstance(names, str) else names
    if not isinstance(found, Iterable) or not all(isinstance(n, str) and n for n in found):
        raise ValueError(f"{option} must be names of modules, got {names!r}")
    return [*found]


def has_suffix(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of the names or ends with "." and one."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def minimal_names(targets: Iterable[str], model: nn.Module) -> list[str] | str:
    """Short `target_modules` that match the given layers and nothing else.

    Args:
        targets: paths of layers.
        model: the model they are in.

    Returns:
        Sorted name suffixes, or a regular expression where no list of suffixes can tell.
    """
    targets = set(targets)
    others = {
        tail for site in walk(model) if site.path not in targets for tail in _tails(site.path)
    }
    names = {next((t for t in _tails(path) if t not in others), "") for path in targets}
    if "" in names:
        return "|".join(re.escape(path) for path in sorted(targets))
    return sorted(names)


def quantizable(
    model: nn.Module, skip_modules: Iterable[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Choose the layers that `quantize_model` replaces; the model is not changed.

    Args:
        model: any module.
        skip_modules: name suffixes of layers, or of modules around them, to leave dense.

    Returns:
        path -> layer to quantise or adopt, and path -> reason for every other linear layer.

    Raises:
        ValueError: skip_modules are no names or match nothing, or a layer has hooks or adapters.
    """
    check_no_peft(model)
    skip_modules = name_list(skip_modules, "skip_modules")
    sites = [*walk(model)]
    unknown = {name for name in skip_modules if not any(has_suffix(s.path, [name]) for s in sites)}
    if unknown - {"lm_head"}:  # the default, which not every model has
        raise ValueError(f"skip_modules must name modules of the model, got {sorted(unknown)}")
    keep = _Keep(model, skip_modules)
    chosen, skipped = {}, {}
    for site in sites:
        if not is_linear(site.module) or isinstance(site.module, Linear4bit):
            continue
        reason = site.obstacle or ("" if is_bnb(site.module) else keep.reason(site))
        if reason:
            skipped[site.path] = reason
        elif isinstance(site.module, LoraLinear):
            raise ValueError(
                f"quantize_model must run before adapters are added, got {site.path} with adapters "
                f"{[*site.module.lora_A]}"
            )
        else:
            _check_hooks(site)
            chosen[site.path] = site.module
    return chosen, skipped


class _Keep:
    """Why a linear layer stays dense when a model is quantised."""

    def __init__(self, model: nn.Module, skip_modules: list[str]) -> None:
        self.skip_modules = skip_modules
        self.output = output_embedding(model)
        self.embeddings = {
            weight_id(m.weight): path
            for path, m in model.named_modules()
            if isinstance(m, nn.Embedding)
        }
        prefix = getattr(model, "base_model_prefix", "")
        inside = isinstance(getattr(model, prefix, None), nn.Module) if prefix else False
        self.body = f"{prefix}." if inside else ""

    def reason(self, site: Site) -> str:
        """The reason, empty if there is none."""
        if site.module is self.output:
            return "output embedding"
        tied = self.embeddings.get(weight_id(site.module.weight))
        if tied is not None:
            return f"its weight is tied to {tied}"
        if not site.path.startswith(self.body):
            return "task head, outside the base model"
        parts = site.path.split(".")
        if any(
            has_suffix(".".join(parts[:n]), self.skip_modules) for n in range(1, len(parts) + 1)
        ):
            return "named in skip_modules"
        if site.module.weight.dtype not in FLOATS:
            return f"its weight is {site.module.weight.dtype}"
        return ""


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that transformers calls the output embedding."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def weight_id(weight: Tensor) -> int:
    """The same number for weights that are tied; `data_ptr` is 0 on the meta device."""
    return weight.data_ptr() or id(weight)


def _visit(parent: nn.Module, at: Site, seen: set[int]) -> Iterator[Site]:
    """Walk the children of `parent`, which stands at site `at`."""
    reader = f"{type(parent).__name__} reads its weight directly"
    obstacle = reader if isinstance(parent, _READS_WEIGHTS) else at.obstacle
    read = _read_weights(parent)
    for name, child in parent._modules.items():
        if child is None or id(child) in seen:
            continue
        seen.add(id(child))
        path = f"{at.path}.{name}" if at.path else name
        if isinstance(child, SavedModule):
            names = " and ".join(child.modules_to_save)
            site = Site(path, child, f"it is trained whole by adapter {names}", taken=True)
            yield site
            yield from _visit(child.original_module, site, seen)
            continue
        own = reader if name in read and is_linear(child) else _own_obstacle(child)
        yield Site(path, child, obstacle or own, at.taken)
        if not isinstance(child, LoraLinear | Linear4bit):
            yield from _visit(child, Site(path, child, obstacle, at.taken), seen)


def _read_weights(parent: nn.Module) -> set[str]:
    """Names of the children whose weights a module reads, also one of a subclass."""
    names = [cls.__name__ for cls in type(parent).__mro__]
    found = set().union(*(_READS_SOME.get(name, ()) for name in names))
    if getattr(parent, "slow_but_exact", False) and getattr(parent, "pretraining_tp", 1) > 1:
        found = found.union(*(_READS_SLICES.get(name, ()) for name in names))
    return found


def _own_obstacle(module: nn.Module) -> str:
    known = type(module) in (nn.Linear, Linear4bit, LoraLinear) or is_bnb(module)
    plain_conv1d = is_conv1d(module) and type(module).__module__ == "transformers.pytorch_utils"
    if known or plain_conv1d or not is_linear(module):
        return ""
    return f"its class {type(module).__name__} may have a forward of its own"


def _left_out(model: nn.Module, sites: dict[str, Site]) -> dict[str, str]:
    """What "all-linear" leaves out; heads of a task are excluded as modules to save."""
    output, skipped = output_embedding(model), {}
    for path, site in sites.items():
        if not is_linear(site.module):
            continue
        if site.module is output:
            skipped[path] = "output embedding"
        elif site.obstacle and not site.taken:  # what is taken must not be left out silently
            skipped[path] = site.obstacle
    return skipped


def _is_excluded(cfg: LoraConfig, path: str) -> bool:
    exclude = cfg.exclude_modules
    if isinstance(exclude, str) and re.fullmatch(exclude, path):
        return True
    if isinstance(exclude, list) and has_suffix(path, exclude):
        return True
    # a module that is trained whole is no target, and nothing in it is
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in cfg.modules_to_save or [])


def _in_layers(cfg: LoraConfig, path: str) -> bool:
    layers = cfg.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = [cfg.layers_pattern] if isinstance(cfg.layers_pattern, str) else cfg.layers_pattern
    # lazy, so that the first index counts: in layers.1.experts.0 the layer, not the expert
    forms = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns or []]
    for form in forms or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        found = re.match(form, path)
        if found:
            return int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _values(patterns: dict, paths: list[str], default: float) -> Iterator[float]:
    """For each path the value of the first pattern that matches its end."""
    compiled = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]
    for path in paths:
        yield next((value for form, value in compiled if form.match(path)), default)


def _tails(path: str) -> Iterator[str]:
    """Name suffixes of a path, shortest first."""
    parts = path.split(".")
    return (".".join(parts[i:]) for i in reversed(range(len(parts))))


def _linear_names(sites: dict[str, Site]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, s in sites.items() if is_linear(s.module)})


def _check_names(
    cfg: LoraConfig, sites: dict[str, Site], targets: list[str], excluded: list[str]
) -> None:
    if isinstance(cfg.target_modules, list):
        unknown = [n for n in cfg.target_modules if not any(has_suffix(p, [n]) for p in sites)]
        if unknown:
            raise ValueError(
                f"target_modules must match modules of the model, got no match for {unknown} "
                f"among linear layers named {_linear_names(sites)}"
            )
    if cfg.exclude_modules and not excluded:
        raise ValueError(
            f"exclude_modules must match modules of the model, got {cfg.exclude_modules!r}"
        )
    heads = _TASK_HEADS.get(cfg.task_type, [])  # PEFT lists all names a head may have
    for name in cfg.modules_to_save or []:
        if name not in heads and not any(path.endswith(name) for path in sites):
            raise ValueError(f"modules_to_save must match modules of the model, got {name!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(cfg, field):
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in targets):
                raise ValueError(f"{field} must match targeted modules, got {key!r}")


def _check_target(site: Site) -> None:
    name = type(site.module).__name__
    if not is_linear(site.module):
        known = isinstance(
            site.module, nn.Embedding | nn.modules.conv._ConvNd | nn.MultiheadAttention
        )
        error = NotImplementedError if known else ValueError
        raise error(
            f"target_modules must match linear layers only, got {site.path}, which is {name}"
        )
    if site.obstacle:
        raise ValueError(
            f"target_modules must match layers that can be replaced, got {site.path}, but "
            f"{site.obstacle}"
        )
    if not isinstance(site.module, LoraLinear):
        _check_hooks(site)
        dense = not isinstance(site.module, Linear4bit) and not is_bnb(site.module)
        dtype = site.module.weight.dtype
        if dense and dtype not in FLOATS:
            raise NotImplementedError(
                f"{site.path} must have a weight in fp32, fp16 or bf16, got {dtype}"
            )


def _check_hooks(site: Site) -> None:
    m = site.module
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    if hooks or "forward" in vars(m):
        raise ValueError(
            f"a layer must have no hooks when it is replaced, as they would be lost, got some on "
            f"{site.path}"
        )


def _check_saved(path: str, sites: dict[str, Site], targets: list[str], saved: list[str]) -> None:
    inner = [other for other in sites if other == path or other.startswith(f"{path}.")]
    if isinstance(sites[path].module, _CONTAINERS):
        problem = f"is a {type(sites[path].module).__name__}, which has no forward"
    elif set(inner) & set(targets):
        problem = "has layers that are targets of the adapter as well"
    elif any(path.startswith(f"{other}.") for other in saved):
        problem = "is part of another module to save"
    elif any(sites[o].taken for o in inner) and not isinstance(sites[path].module, SavedModule):
        problem = "shares modules with what another adapter trains whole"
    elif any(isinstance(sites[other].module, LoraLinear) for other in inner):
        problem = "has adapters already"
    elif any(isinstance(sites[o].module, Linear4bit) or is_bnb(sites[o].module) for o in inner):
        problem = "has 4-bit weights, which cannot be trained"
    else:
        return
    raise ValueError(
        f"modules_to_save must name modules that can be trained, got {path}, which {problem}"
    )
