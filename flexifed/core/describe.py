"""Modules as text, by which layers of different models are compared."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import nn

_NOT_HYPERPARAMETERS = {"training", "inplace"}
_SHOWN_BY_CHILDREN = {"num_layers", "depth"}
"""Attributes of a module with children that hold their number, which the children show anyway."""
_PLAIN = (bool, int, float, complex, str, bytes, range, slice, torch.dtype, np.generic)


def class_name(module: nn.Module) -> str:
    """The class name, such as `Conv2d`; outside PyTorch with its module, since two classes may share a name."""
    cls = type(module)
    return cls.__name__ if cls.__module__.startswith("torch.nn.") else f"{cls.__module__}.{cls.__qualname__}"


def describe_module(module: nn.Module) -> str:
    """Describe a module without parameters, with hyper-parameters and children: `MaxPool2d(kernel_size=2, ...)`."""
    attributes = [f"{name}={value}" for name, value in hyperparameters(module)]
    return f"{class_name(module)}({', '.join([*attributes, *map(describe_module, module.children())])})"


def describe_container(module: nn.Module) -> str:
    """Describe a module that contains the layers after it: `Block(residual=True)`."""
    attributes = [f"{name}={value}" for name, value in hyperparameters(module)]
    return f"{class_name(module)}({', '.join(attributes)})"


def hyperparameters(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The public attributes of a module, such as `stride` and `eps`, as text: see `_describe_value`."""
    has_children = next(module.children(), None) is not None
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _NOT_HYPERPARAMETERS or (has_children and name in _SHOWN_BY_CHILDREN):
            continue
        yield name, _describe_value(value)


def _describe_value(value: Any, within: tuple[object, ...] = ()) -> str:
    """Describe a value: numbers, text, enumerations, functions, and tuples, lists and sets of them.

    Of other objects only the class is told. A config that all parts of a model keep, for example, would tell apart the
    layers of models of different depth, and a dictionary may be a cache.

    Args:
        value: any object.
        within: the functions that the value is part of, which it may refer to in turn.
    """
    if _is_plain(value):
        return repr(_without_numpy(value))
    if any(value is outer for outer in within):
        return "itself"
    if _is_function(value):
        return _describe_function(value, within)
    name = type(value).__qualname__
    if isinstance(value, Enum):
        return f"{name}.{value.name}"
    if isinstance(value, tuple | list | set | frozenset):
        items = [_describe_value(item, within) for item in value]
        return f"{name}({', '.join(items if isinstance(value, tuple | list) else sorted(items))})"
    return name


def _describe_function(function: Any, within: tuple[object, ...]) -> str:
    """A function's name, and what else decides its values: all lambdas have the same name.

    Args:
        function: a function, a class, or a `functools.partial`.
        within: as in `_describe_value`.
    """

    def describe(value: object) -> str:
        return _describe_value(value, (*within, function))

    if isinstance(function, partial):
        keywords = {name: describe(value) for name, value in sorted(function.keywords.items())}
        return f"partial({describe(function.func)}, {[describe(value) for value in function.args]}, {keywords})"
    name = f"{function.__module__}.{function.__qualname__}"
    if (code := getattr(function, "__code__", None)) is None:
        return name
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    captured = [describe(cell.cell_contents) for cell in function.__closure__ or ()]
    return f"{name} {_describe_code(code)} {[describe(value) for value in defaults]} {captured}"


def _describe_code(code: CodeType) -> str:
    """Bytecode with its constants and names, equal in all processes: constants can be code and sets, too."""

    def describe(constant: object) -> str:
        if isinstance(constant, CodeType):
            return _describe_code(constant)
        return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)

    return repr((code.co_code, [describe(constant) for constant in code.co_consts], code.co_names))


def _is_function(value: object) -> bool:
    return isinstance(value, partial) or (callable(value) and hasattr(value, "__qualname__"))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, _PLAIN)


def _without_numpy(value: Any) -> Any:
    """A plain value with NumPy's numbers as Python's, which mean the same."""
    if isinstance(value, np.generic):
        return value.item()
    return type(value)(map(_without_numpy, value)) if type(value) in (tuple, list) else value
