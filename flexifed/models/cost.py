"""The cost of running a model: its multiply-adds, counted without computing anything."""

from __future__ import annotations

import copy

import torch
from torch import nn

from flexifed.config import FAMILIES, FAMILY_INPUTS, TEXT_LENGTHS
from flexifed.models import build_model


def multiply_adds(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-adds of one sample's forward pass in convolutions and linear layers; other layers are not counted.

    A multiplication and an addition together count once, as in He et al. 2016 (table 1), who call them a FLOP. Training
    takes about three times as many: the backward pass computes two products of the same size.

    Args:
        model: on any device. A copy without values is run, so that nothing is allocated and the model does not change.
        example: an input of shape (batch, ...), of which only shape and type are read.

    >>> multiply_adds(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), torch.zeros(2, 3, 32, 32))
    221184
    """
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)
        # Each value of the output is the sum over one output channel's weights.
        total += output[0].numel() * module.weight[0].numel()

    shapes = _without_values(model).eval()
    for module in shapes.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        shapes(example.to("meta"))
    return total


def model_multiply_adds(name: str, *, num_classes: int, width: float = 1.0) -> int:
    """Multiply-adds of a named model for one input of its family's size: a 3x32x32 image, or a whole text.

    >>> model_multiply_adds("resnet20", num_classes=10)
    40551040
    """
    family = next(family for family, versions in FAMILIES.items() if name in versions)
    if FAMILY_INPUTS[family] == "text":
        example = torch.empty(1, TEXT_LENGTHS[family], dtype=torch.int64, device="meta")
    else:
        example = torch.empty(1, 3, 32, 32, device="meta")
    return multiply_adds(build_model(name, num_classes=num_classes, width=width, device="meta"), example)


def _without_values(model: nn.Module) -> nn.Module:
    """A copy on the `meta` device: `deepcopy` takes its tensors from the memo, and never copies the model's own."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        shape = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(model, memo)
