"""Where each parameter sits in a model: the layer that computes with it, and the block that this layer is part of.

The class and the attribute say what a weight is, whatever its full name: wrappers (PEFT's, `torch.compile`,
parametrizations) add parts to the name, which are left out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

#: Parts of a name that a wrapper adds around the module that it wraps.
WRAPPERS = {"base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
#: The trainable copies of a module that PEFT keeps beside it, by the names of adapters.
COPIES = "modules_to_save"
#: The parameters of a layer that are its weight; others are known by their own name.
WEIGHTS = {"weight", "weight_v", "weight_orig", "original", "original1"}


@dataclass(frozen=True)
class Place:
    """Where one parameter sits.

    Attributes:
        name: the parameter's name without the wrappers' parts and without the names of adapters.
        modules: what the parts of `name` name, but for the last; none for the parameter of an adapter.
        layer: the module that computes with it; None without a model.
        block: the module whose attribute the layer is, or the layer itself for a parameter that is not its weight.
        attribute: the layer's name in `block`, or the parameter's own.
        config: the Hugging Face config nearest above it, or None.
        tuner: the layer of an adapter (of PEFT) that the parameter belongs to, or None.
        adapted: for the parameter of an adapter, the place of the weight that it adapts, or None.
    """

    name: str
    modules: tuple[nn.Module, ...] = ()
    layer: nn.Module | None = None
    block: nn.Module | None = None
    attribute: str = ""
    config: Any = None
    tuner: nn.Module | None = None
    adapted: Place | None = None

    @property
    def in_block(self) -> tuple[nn.Module | None, str]:
        """The block and the layer's name in it; where that is a `torch.nn.Sequential`, of the module that holds it."""
        if not isinstance(self.block, nn.Sequential) or len(self.modules) < 3 or self.modules[-2] is not self.block:
            return self.block, self.attribute
        return self.modules[-3], ".".join(self.name.split(".")[-3:-1])

    @property
    def magnitude(self) -> bool:
        """Whether it is the magnitude of a weight-normed layer, whose direction is another parameter."""
        return self.name.rpartition(".")[2] in ("original0", "weight_g")


def places(model: nn.Module | None, names: Sequence[str]) -> dict[str, Place]:
    """The place of each name; without a model, what the name alone says.

    Raises:
        ValueError: for a parameter that the model does not have.
    """
    if model is None:
        return {name: Place(name, attribute=_owner(name.split("."))) for name in names}
    modules = dict(model.named_modules(remove_duplicate=False))
    held = {
        f"{path}.{name}" if path else name for path, module in modules.items() for name in dict(_parameters(module))
    }
    missing = sorted(set(names) - held)
    if missing:
        raise ValueError(f"model has no parameter {missing[0]}; allowed: the module whose named_parameters() these are")
    configs = _configs(modules)
    return {name: _place(name.split("."), modules, configs) for name in names}


def _parameters(module: nn.Module) -> Mapping[str, Any]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _configs(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Path -> the config nearest above it (a vision tower has its own)."""
    found: dict[str, Any] = {}
    for path, module in modules.items():
        above = found.get(path.rpartition(".")[0]) if path else None
        found[path] = getattr(module, "config", None) or above
    return found


def _owner(parts: Sequence[str]) -> str:
    """The name of the layer, or of the bare parameter, that holds the weight."""
    return parts[-2] if parts[-1] in WEIGHTS and len(parts) > 1 else parts[-1]


def _place(parts: Sequence[str], modules: Mapping[str, nn.Module], configs: Mapping[str, Any]) -> Place:
    config = configs[".".join(parts[:-1])]
    tuner = _tuner(parts, modules)
    if tuner is not None:
        return _place_in_adapter(parts, tuner, modules, config)
    path, leaf = _without_parametrization(parts)
    layer, at = modules[".".join(path)], _kept(path, modules)
    name = ".".join([*(path[i] for i in at), leaf])
    named = tuple(modules[".".join(path[: i + 1])] for i in at)
    if leaf not in WEIGHTS or not at:
        return Place(name, named, layer, layer, leaf, config)
    return Place(name, named, layer, modules[".".join(path[: at[-1]])], path[at[-1]], config)


def _place_in_adapter(parts: Sequence[str], tuner: int, modules: Mapping[str, nn.Module], config: Any) -> Place:
    """The place of a parameter of the adapter at ``parts[:tuner]``; the part after the next is the adapter's name."""
    wrapped, attribute, layer = modules[".".join(parts[:tuner])], parts[tuner], modules[".".join(parts[:-1])]
    above = [part for part in parts[:tuner] if part not in WRAPPERS]
    below = [part for part in parts[tuner + 2 :] if not part.isdigit()]
    adapted = _adapted(parts[:tuner], modules)
    name = ".".join([*above, attribute, *below])
    return Place(name, (), layer, layer, attribute, config, wrapped, adapted)


def _tuner(parts: Sequence[str], modules: Mapping[str, nn.Module]) -> int | None:
    """How many parts name the layer of an adapter that the parameter belongs to; None for other parameters.

    PEFT's layers list their own attributes; each is a dict by the adapter's name, which the user chose.
    """
    for length in range(len(parts) - 1, 0, -1):
        names = getattr(modules[".".join(parts[:length])], "adapter_layer_names", None)
        if names is not None:
            return None if parts[length] in (*WRAPPERS, COPIES) else length
    return None


def _adapted(parts: Sequence[str], modules: Mapping[str, nn.Module]) -> Place | None:
    """The place of the weight that the adapter at `parts` adapts."""
    path = [*parts]
    while ".".join([*path, "base_layer"]) in modules:
        path.append("base_layer")
    layer, bare = modules[".".join(path)], getattr(modules[".".join(parts)], "parameter_name", None)
    for leaf in (bare, "weight", "in_proj_weight"):  # a bare parameter: of fused experts
        if leaf is not None and isinstance(getattr(layer, leaf, None), nn.Parameter):
            return _place([*path, leaf], modules, {".".join(path): None})
    return None


def _without_parametrization(parts: Sequence[str]) -> tuple[list[str], str]:
    """(Path of the layer, name of its parameter): a parametrization holds the parameter under another name."""
    path, leaf = [*parts[:-1]], parts[-1]
    if "parametrizations" not in path:
        return path, leaf
    at = path.index("parametrizations")
    return path[:at], leaf if leaf == "original0" else path[at + 1]


def _kept(path: Sequence[str], modules: Mapping[str, nn.Module]) -> list[int]:
    """The positions of the parts that no wrapper has added."""
    found: list[int] = []
    for i, part in enumerate(path):
        above = type(modules[".".join(path[:i])]).__name__
        copied = i > 0 and path[i - 1] == COPIES  # the name of an adapter
        inner = part == "linear" and above.endswith("Linear")  # a linear layer in a wrapper that is one, too
        if part not in WRAPPERS and part != COPIES and not copied and not (inner and found):
            found.append(i)
    return found
