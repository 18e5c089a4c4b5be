"""The mean of what clients share, as a pure function whose bits do not depend on where clients run.

For a group G and each tensor of its layer, with weight w_k of client k (1, or its number of samples):

    mean = (sum over k in G of w_k * x_k) / (sum over k in G of w_k)

The sum is taken in float64, in client order, and rounded once, to the tensor's own type (PyTorch rounds to the 16-bit
types by way of float32). A client of weight 0 has no part in it, whatever its values. The sum is a fixed tree of two
levels: blocks of `reduce_block` consecutive clients are summed first (each in the process where its clients live), then
the blocks in order. With `reduce_block=1` a block is one client and its sum is what the client holds.

Source: FlexiFed, section 4; the weights are FedAvg's (McMahan et al. 2017, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import torch

from flexifed.core.schemes import Group, SharingPlan
from flexifed.errors import ConfigError, SignatureError

_SUMMED_AT_ONCE = 2**16  # numbers; as float64 half a megabyte

T = TypeVar("T")
State = Mapping[str, torch.Tensor]
GroupState = dict[int, tuple[torch.Tensor, ...]]
"""The values of each group (by index), one tensor for each that the plan averages. The whole shared global state."""


@dataclass(frozen=True)
class BlockSum:
    """The weighted sum over the members that a block of clients has in one group.

    Tensors are float64, or, for a block of one client, still that client's own values: `weight` has not been applied
    to them, so that they travel in their own type.
    """

    tensors: tuple[torch.Tensor, ...]
    weight: float
    weighted: bool


BlockSums = dict[int, BlockSum]


def shared_tensors(plan: SharingPlan, client: int, state: State) -> GroupState:
    """What a client contributes: views into its state, by group. Nothing is copied.

    Raises:
        SignatureError: the state is not one of the client's model (missing or unknown keys, other shapes).
    """
    _check_state(plan, client, state)
    return {group: tuple(state[name] for name in names) for group, names in plan.shared_names(client).items()}


def sum_block(members: Iterable[tuple[GroupState, float]]) -> BlockSums:
    """Sum one block of consecutive clients.

    Args:
        members: (what the client contributes, its weight), in client order. They are consumed one by one, so that a
            generator keeps no more than two of them in memory.

    Returns:
        By group, the sum over those members that are in the group.
    """
    members = iter(members)
    ahead = list(islice(members, 2))
    if len(ahead) == 1:
        contribution, weight = ahead[0]
        return {group: BlockSum(tensors, weight, weighted=False) for group, tensors in contribution.items()}
    sums: BlockSums = {}
    for contribution, weight in chain(ahead, members):
        for group, tensors in contribution.items():
            _add_to(sums, group, BlockSum(tensors, weight, weighted=False))
    return sums


def combine_blocks(plan: SharingPlan, blocks: Iterable[BlockSums], groups: Sequence[Group] | None = None) -> GroupState:
    """The mean of every group, from the sums of its blocks.

    Args:
        blocks: in client order.
        groups: those whose mean is wanted, all of the plan's by default. Others that a block holds are passed over.

    Raises:
        ConfigError: the weights of a group add up to nothing, or nobody contributed to it.
    """
    wanted = plan.groups if groups is None else groups
    parts: dict[int, list[BlockSum]] = {group.index: [] for group in wanted}
    for block in blocks:
        for index, one in block.items():
            if one.weight and index in parts:
                parts[index].append(one)
    means: GroupState = {}
    for group in wanted:
        summed = parts[group.index]
        weight = sum(one.weight for one in summed)
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"the weights of clients {list(plan.members(group))} add up to {weight}; "
                "every group needs a finite sum above 0"
            )
        means[group.index] = tuple(
            _mean(summed, position, spec.dtype, weight) for position, spec in enumerate(group.specs)
        )
    return means


def aggregate(
    plan: SharingPlan,
    states: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    reduce_block: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """Average what the plan shares, and leave the rest as it is.

    Args:
        plan: from `sharing_plan`.
        states: one state dict for each client, in client order. They are not changed.
        weights: one number for each client, its number of training samples under FedAvg's rule; None counts all alike.
            Weights that are given count, whatever the plan's weighting says.
        reduce_block: size of the blocks that are summed first; it can change the last bit, nothing else.

    Returns:
        New state dicts, in client order. Averaged tensors are new, each client's its own; personal tensors are the very
        ones of the input.

    Raises:
        ConfigError: a wrong number of states or weights, a weight that is negative or not finite, a group without
            weight, or no weights for a plan whose weighting is `samples`.
        SignatureError: a state does not fit its client's model.

    >>> from flexifed.core.schemes import sharing_plan
    >>> models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    >>> for value, model in enumerate(models):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    >>> [state["weight"].item() for state in aggregate(sharing_plan(models, "max_common"),
    ...                                                [model.state_dict() for model in models], weights=[1, 3])]
    [0.75, 0.75]
    """
    numbers = check_weights(plan, weights)
    if len(states) != plan.num_clients:
        raise ConfigError(f"the plan is for {plan.num_clients} clients, but {len(states)} states were given")
    if not isinstance(reduce_block, int) or reduce_block < 1:
        raise ConfigError(f"reduce_block is {reduce_block!r}; it must be a whole number of at least 1")
    means = combine_blocks(
        plan,
        (
            sum_block([(shared_tensors(plan, client, states[client]), numbers[client]) for client in block])
            for block in blocks_of(range(plan.num_clients), reduce_block)
        ),
    )
    new_states = []
    for client, state in enumerate(states):
        own_means = {group: tuple(mean.clone() for mean in means[group]) for group in plan.shared_names(client)}
        new_states.append(apply_group_state(plan, client, state, own_means))
    return new_states


def apply_group_state(plan: SharingPlan, client: int, state: State, means: GroupState) -> dict[str, torch.Tensor]:
    """A client's state with the tensors of its groups put in place of its own. Nothing is copied or changed."""
    new = dict(state)
    for group, names in plan.shared_names(client).items():
        new.update(zip(names, means[group], strict=True))
    return new


def blocks_of(clients: Sequence[T], reduce_block: int) -> list[Sequence[T]]:
    """Cut consecutive clients into the blocks that are summed first."""
    return [clients[start : start + reduce_block] for start in range(0, len(clients), reduce_block)]


def check_weights(plan: SharingPlan, weights: Sequence[float] | None) -> list[float]:
    """One weight for each client, 1 where none are given.

    Raises:
        ConfigError: as for `aggregate`.
    """
    if weights is None:
        if plan.weighting == "samples":
            raise ConfigError("the plan's weighting is 'samples'; give weights, each client's number of samples")
        return [1.0] * plan.num_clients
    if len(weights) != plan.num_clients:
        raise ConfigError(f"the plan is for {plan.num_clients} clients, but {len(weights)} weights were given")
    for client, weight in enumerate(weights):
        if not isinstance(weight, int | float | np.number):
            raise ConfigError(
                f"the weight of client {client} is {weight!r}; weights are plain numbers, such as a tensor's `tolist()`"
            )
        if not 0 <= weight < math.inf:
            raise ConfigError(f"the weight of client {client} is {weight!r}; weights are finite and not negative")
    return [float(weight) for weight in weights]


@torch.no_grad()
def _add_to(totals: BlockSums, group: int, one: BlockSum) -> None:
    """`totals[group] += one`, in float64 (complex128 for complex values), in place in what was made here."""
    if one.weight == 0:
        return
    total = totals.get(group)
    if total is None:
        copies = tuple(_weighted(tensor, one).to(_double(tensor), copy=True) for tensor in one.tensors)
        totals[group] = BlockSum(copies, one.weight, weighted=True)
        return
    for accumulated, tensor in zip(total.tensors, one.tensors, strict=True):
        accumulated.add_(_weighted(tensor, one))
    totals[group] = BlockSum(total.tensors, total.weight + one.weight, weighted=True)


@torch.no_grad()
def _mean(parts: Sequence[BlockSum], position: int, dtype: torch.dtype, weight: float) -> torch.Tensor:
    """The mean of one tensor of a group. Some rows at a time: their sum, in double precision, stays in the cache."""
    shape = parts[0].tensors[position].shape
    tensors = [one.tensors[position] for one in parts]
    if not shape:
        tensors = [tensor.view(1) for tensor in tensors]
    first = tensors[0]
    mean = torch.empty_like(first, dtype=dtype)
    rows = max(1, len(first))
    if first.device.type == "cpu":
        rows = max(1, _SUMMED_AT_ONCE * len(first) // max(1, first.numel()))
    for start in range(0, len(first), rows):
        part = slice(start, start + rows)
        pieces = tensors if rows >= len(first) else [tensor[part] for tensor in tensors]
        total = _weighted(pieces[0], parts[0]).to(_double(first), copy=True)
        for one, piece in zip(parts[1:], pieces[1:], strict=True):
            total.add_(_weighted(piece, one))
        # By a tensor: by a number a GPU multiplies with its reciprocal, which can be another value than a CPU's.
        mean[part] = total.div_(torch.full((), weight, dtype=total.dtype, device=total.device))
    return mean.view(shape)


def _weighted(tensor: torch.Tensor, one: BlockSum) -> torch.Tensor:
    """With the weight applied: a rounding of its own, since a multiplication fused into the sum differs by machine."""
    return tensor if one.weighted or one.weight == 1 else tensor.to(_double(tensor)) * one.weight


def _double(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _check_state(plan: SharingPlan, client: int, state: State) -> None:
    """Keys first, then shapes."""
    expected = plan.signatures[client]
    if state.keys() != expected.state_keys:
        missing, unknown = expected.state_keys - state.keys(), state.keys() - expected.state_keys
        raise SignatureError(
            f"the state of client {client} is not one of its model: missing {_some(missing)}, unknown {_some(unknown)}"
        )
    for layer, names in zip(expected.layers, expected.names, strict=True):
        for spec, name in zip(layer.tensors, names, strict=True):
            if tuple(state[name].shape) != spec.shape or state[name].dtype != spec.dtype:
                raise SignatureError(
                    f"client {client}: {name} is {state[name].dtype} of shape {tuple(state[name].shape)}, "
                    f"but its model has {spec.dtype} of shape {spec.shape}"
                )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "") or "none"
