"""The layers of a model in forward order, in a form in which layers of different models can be compared.

The paper (section 3) counts layers from the input and calls two layers common when they, and everything below them, are
the same. This module defines "the same": equal kind, hyper-parameters, shapes of parameters and buffers, and equal
modules between the layer and the one below. Attribute names and roles do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.parameter import is_lazy

from flexifed.core.describe import class_name, describe_container, describe_module, hyperparameters
from flexifed.errors import SignatureError, invalid_choice

Role = Literal["feature", "classifier"]

NORMALISATIONS: tuple[type[nn.Module], ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)
_PLAIN_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class DeclaredLayer:
    """One layer as a model declares it.

    Args:
        modules: the modules that hold the layer's parameters, in forward order, such as a convolution and its batch
            norm.
        role: `"feature"` or `"classifier"`.
        before: what is computed without parameters between the layer below and this one (an activation, a pooling, the
            way a shortcut joins), as modules or words. It counts when two layers are compared.

    Raises:
        SignatureError: `modules` or `before` is not a tuple of these, or the role is unknown.
    """

    modules: tuple[nn.Module, ...]
    role: Role = "feature"
    before: tuple[nn.Module | str, ...] = ()

    def __post_init__(self) -> None:
        _check_items("modules", self.modules, nn.Module, "torch.nn.Module")
        _check_items("before", self.before, (nn.Module, str), "torch.nn.Module or str")
        if self.role not in get_args(Role):
            raise SignatureError(invalid_choice("role", self.role, get_args(Role)))


def _check_items(name: str, items: object, types: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(items, tuple | list):
        raise SignatureError(
            f"DeclaredLayer: {name} is {_short(items)}; give a tuple of {expected}; one alone is (it,)"
        )
    for item in items:
        if not isinstance(item, types):
            raise SignatureError(f"DeclaredLayer: {name} holds {_short(item)}; give a tuple of {expected}")


def _short(value: object) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


@runtime_checkable
class DeclaresLayers(Protocol):
    """A model that declares its own layers."""

    def declared_layers(self) -> Sequence[DeclaredLayer]:
        """The layers, in forward order."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer.

    Attributes:
        slot: position of the module in the layer (not in the model) and the tensor's name there: `1.running_mean`.
        shape: its shape.
        dtype: its type. Integer tensors (`num_batches_tracked`) can't be averaged.
        buffer: whether it is a buffer, and not a parameter.
        normalisation_buffer: whether it is a buffer of a normalisation, such as running statistics.
    """

    slot: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    buffer: bool = False
    normalisation_buffer: bool = False

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.num_elements * self.dtype.itemsize

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    @property
    def can_be_averaged(self) -> bool:
        """Whether a mean of the tensor makes sense: floating-point and complex values, not counters."""
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(frozen=True)
class LayerSignature:
    """The properties that make two layers the same. Compared and hashed by `kind` and `digest`.

    The digest covers everything but the role: whether two layers are the same must not depend on what follows them, as
    a role does.
    """

    kind: str
    role: Role = field(compare=False)
    hyperparameters: tuple[tuple[str, str], ...] = field(compare=False)
    before: tuple[str, ...] = field(compare=False)
    tensors: tuple[TensorSpec, ...] = field(compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        content = repr((self.kind, self.hyperparameters, self.before, self.tensors))
        object.__setattr__(self, "digest", hashlib.sha256(content.encode()).hexdigest())

    @property
    def num_parameters(self) -> int:
        """Number of trainable values, buffers left out."""
        return sum(tensor.num_elements for tensor in self.tensors if not tensor.buffer)


@dataclass(frozen=True)
class ModelSignature:
    """An architecture: its layers in forward order, and the names of their tensors in the model.

    Two models have the identical architecture when their digests are equal.

    Attributes:
        layers: signatures of the layers, in forward order.
        names: for each layer, the `state_dict` keys of its tensors, in the order of the tensors. They do not enter the
            digest.
        tail: modules without parameters after the last layer. They enter the digest.
        digest: SHA-256 of the layers, their roles and the tail.
    """

    layers: tuple[LayerSignature, ...] = field(compare=False)
    names: tuple[tuple[str, ...], ...] = field(compare=False)
    tail: tuple[str, ...] = field(default=(), compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        layers = (f"{layer.digest} {layer.role}" for layer in self.layers)
        content = "\n".join([*layers, *self.tail])
        object.__setattr__(self, "digest", hashlib.sha256(content.encode()).hexdigest())

    @cached_property
    def state_keys(self) -> frozenset[str]:
        """The keys of the model's state dict."""
        return frozenset(name for names in self.names for name in names)

    @property
    def num_parameters(self) -> int:
        """Number of trainable values, buffers left out."""
        return sum(layer.num_parameters for layer in self.layers)


def signature(model: nn.Module) -> ModelSignature:
    """Read a model as a sequence of layers.

    If the model has `declared_layers()`, these are its layers. Any other model is read in registration order:

    - A module with parameters or buffers of its own begins a layer.
    - A normalisation right after a layer belongs to that layer.
    - Modules with neither, such as activations, count for the layer after them. So do modules that contain others, such
      as a residual block, with their class and attributes.
    - The linear layers at the end of the model are its classifier; if it has no other layers, only the last one is.

    What a `forward` computes outside of modules can't be read, nor where a block ends. Attributes do not count if they
    are private, or if the model itself has them and no tensor of its own; of those that are objects, such as a config,
    only the class counts. A model to which that matters should declare its layers.

    Args:
        model: on any device, `meta` included; only shapes are read.

    Raises:
        SignatureError: two layers hold the same tensor, a tensor belongs to no layer, there is no layer at all, a lazy
            model has no shapes yet, or a model that declares its layers is inside one that does not.

    >>> small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(layer.kind, layer.role, layer.before) for layer in signature(small).layers]
    [('Conv2d + BatchNorm2d', 'feature', ()), ('Linear', 'classifier', ('ReLU()',))]
    """
    key_of = _state_keys(model)
    tail: tuple[str, ...] = ()
    if isinstance(model, DeclaresLayers):
        declared = _declared_layers(model)
    else:
        _check_nothing_declared_inside(model)
        declared, tail = _registered_layers(model)
    layers: list[LayerSignature] = []
    names: list[tuple[str, ...]] = []
    for layer in declared:
        tensors, layer_names = [], []
        for position, module in enumerate(layer.modules):
            for spec, tensor in _own_tensors(module, position):
                key = key_of.pop(id(tensor), None)
                if key is None:
                    raise SignatureError(
                        f"layer {len(layers)} ({_kind(layer)}) holds a tensor ({spec.slot}) that is not in the model's "
                        "state dict or also belongs to another layer; give every layer tensors of its own"
                    )
                tensors.append(spec)
                layer_names.append(key)
        layers.append(
            LayerSignature(
                kind=_kind(layer),
                role=layer.role,
                hyperparameters=tuple(pair for module in layer.modules for pair in hyperparameters(module)),
                before=tuple(item if isinstance(item, str) else describe_module(item) for item in layer.before),
                tensors=tuple(tensors),
            )
        )
        names.append(tuple(layer_names))
    if key_of:
        raise SignatureError(
            f"these tensors belong to no declared layer: {', '.join(sorted(key_of.values()))}; a layer has the tensors "
            "of the modules that it lists, not those of their children, so list each module that has some"
        )
    if not layers:
        raise SignatureError(f"{type(model).__name__} has no layer with parameters, so there is nothing to share")
    return ModelSignature(layers=tuple(layers), names=tuple(names), tail=tail)


def _declared_layers(model: DeclaresLayers) -> tuple[DeclaredLayer, ...]:
    """The layers of a model that declares them."""
    if not callable(model.declared_layers):
        raise SignatureError(f"{type(model).__name__}.declared_layers is not a method; make it one")
    declared: object = model.declared_layers()
    if not isinstance(declared, tuple | list) or not all(isinstance(layer, DeclaredLayer) for layer in declared):
        raise SignatureError(
            f"{type(model).__name__}.declared_layers() does not return a list of flexifed.DeclaredLayer, one for each "
            "layer, in forward order"
        )
    return tuple(declared)


def _check_nothing_declared_inside(model: nn.Module) -> None:
    """Refuse to read a model in registration order if a part of it, such as a wrapped model, declares another order."""
    for inner in model.modules():
        if isinstance(inner, DeclaresLayers):
            raise SignatureError(
                f"{type(inner).__name__} declares its layers, but the {type(model).__name__} that contains it does "
                f"not; give the {type(inner).__name__} itself, or a {type(model).__name__} with declared_layers()"
            )


def _registered_layers(model: nn.Module) -> tuple[tuple[DeclaredLayer, ...], tuple[str, ...]]:
    """The layers of a model that declares none, and the modules without parameters after the last one."""
    layers: list[DeclaredLayer] = []
    before: list[nn.Module | str] = []
    for _, module in model.named_modules(remove_duplicate=False):  # one activation may be used in many places
        if not any(True for _ in _own_tensors(module, 0)):
            if next(module.children(), None) is None:
                before.append(module)
            elif module is not model and type(module) not in _PLAIN_CONTAINERS:
                before.append(describe_container(module))
        elif isinstance(module, NORMALISATIONS) and layers and not before:
            layers[-1] = DeclaredLayer((*layers[-1].modules, module), before=layers[-1].before)
        else:
            layers.append(DeclaredLayer((module,), before=tuple(before)))
            before = []
    tail = tuple(item if isinstance(item, str) else describe_module(item) for item in before)
    num_linear = 0
    while num_linear < len(layers) and isinstance(layers[-1 - num_linear].modules[0], nn.Linear):
        num_linear += 1
    num_classifier = num_linear if num_linear < len(layers) else min(1, len(layers))
    first_classifier = len(layers) - num_classifier
    return tuple(
        DeclaredLayer(layer.modules, "classifier" if index >= first_classifier else "feature", layer.before)
        for index, layer in enumerate(layers)
    ), tail


def _state_keys(model: nn.Module) -> dict[int, str]:
    """The state-dict key of each tensor, by the tensor's `id`."""
    keys: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if is_lazy(tensor):
            raise SignatureError(f"{key!r} has no shape yet; run the lazy model once before its layers are read")
        if key.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX:
            raise SignatureError(f"{key!r} is a module's extra state, which clients can't share; keep it elsewhere")
        if not isinstance(tensor, torch.Tensor):
            raise SignatureError(f"the state dict's entry {key!r} is not a tensor but a {type(tensor).__name__}")
        if id(tensor) in keys:
            raise SignatureError(f"{keys[id(tensor)]!r} and {key!r} are one tied tensor; untie them to share layers")
        keys[id(tensor)] = key
    return keys


def _own_tensors(module: nn.Module, position: int) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """The parameters and persistent buffers of a module itself, without those of its children."""
    is_normalisation = isinstance(module, NORMALISATIONS)
    for name, parameter in module.named_parameters(recurse=False):
        yield TensorSpec(f"{position}.{name}", tuple(parameter.shape), parameter.dtype), parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            spec = TensorSpec(f"{position}.{name}", tuple(buffer.shape), buffer.dtype, True, is_normalisation)
            yield spec, buffer


def _kind(layer: DeclaredLayer) -> str:
    return " + ".join(class_name(module) for module in layer.modules)
