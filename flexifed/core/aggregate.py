"""The average of the layers that clients share: a pure function whose bits do not depend on where clients run.

For a group G and each tensor x of its layer, where client k has the weight w_k (1, or its number of samples):

    mean = (sum over k in G of w_k * x_k) / (sum over k in G of w_k)

The sum is computed in float64, in client order, and rounded once, to the tensor's own type (PyTorch rounds to 16-bit
types by way of float32). A client of weight 0 is left out, whatever its values. The sum is a fixed tree of two levels:
blocks of `reduce_block` consecutive clients are summed first, each in the process where its clients live, then the
blocks in order. With `reduce_block=1` a block is one client, and its sum is the client's own values.

Source: FlexiFed, section 4; the weights are FedAvg's (McMahan et al. 2017, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import torch

from flexifed.core.schemes import Group, SharingPlan
from flexifed.errors import ConfigError, SignatureError

_SUMMED_AT_ONCE = 2**16  # values; half a megabyte as float64
_LEAST_WEIGHT = 1e-100  # times a value, and its inverse too, a weight neither overflows nor loses digits in float64

T = TypeVar("T")
State = Mapping[str, torch.Tensor]
GroupState = dict[int, tuple[torch.Tensor, ...]]
"""The values of groups, by index: one for each tensor of the group that the plan averages. With all groups of a plan,
this is the whole shared global state."""


@dataclass(frozen=True)
class BlockSum:
    """The weighted sum over those clients of a block that are members of one group.

    Attributes:
        tensors: float64 sums, or, for a block of one client, that client's own values, to which `weight` has not been
            applied, so that they are sent in their own type.
        weight: sum of the clients' weights.
        weighted: whether `weight` has been applied to the tensors.
    """

    tensors: tuple[torch.Tensor, ...]
    weight: float
    weighted: bool


BlockSums = dict[int, BlockSum]


def shared_tensors(plan: SharingPlan, client: int, state: State) -> GroupState:
    """The tensors that a client contributes to each of its groups: views into its state, nothing is copied.

    Raises:
        SignatureError: the state does not fit the client's model (missing or unknown keys, other shapes or types).
    """
    _check_state(plan, client, state)
    return {group: tuple(state[name] for name in names) for group, names in plan.shared_names(client).items()}


def sum_block(members: Iterable[tuple[GroupState, float]]) -> BlockSums:
    """Sum one block of consecutive clients.

    Args:
        members: for each client its contribution (from `shared_tensors`) and its weight, in client order. They are
            consumed one by one, so that with a generator no more than two of them are in memory.

    Returns:
        For each group, the sum over those clients of the block that are its members.
    """
    members = iter(members)
    first_two = list(islice(members, 2))
    if len(first_two) == 1:
        contribution, weight = first_two[0]
        return {group: BlockSum(tensors, weight, weighted=False) for group, tensors in contribution.items()}
    sums: BlockSums = {}
    for contribution, weight in chain(first_two, members):
        for group, tensors in contribution.items():
            _add_to(sums, group, BlockSum(tensors, weight, weighted=False))
    return sums


def combine_blocks(plan: SharingPlan, blocks: Iterable[BlockSums], groups: Sequence[Group] | None = None) -> GroupState:
    """Compute the mean of every group from the sums of its blocks.

    Args:
        plan: from `sharing_plan`.
        blocks: sums of the blocks, in client order.
        groups: the groups to average. Default: all groups of the plan. Other groups in the blocks are skipped.

    Raises:
        ConfigError: the weights of a group do not add up to a finite number above 0, or no client contributed to it.
    """
    if groups is None:
        groups = plan.groups
    sums: dict[int, list[BlockSum]] = {group.index: [] for group in groups}
    for block in blocks:
        for index, block_sum in block.items():
            if block_sum.weight and index in sums:
                sums[index].append(block_sum)
    means: GroupState = {}
    for group in groups:
        group_sums = sums[group.index]
        weight = sum(block_sum.weight for block_sum in group_sums)
        if not 0 < weight < math.inf:
            raise ConfigError(
                f"the weights of clients {list(plan.members(group))} add up to {weight}; "
                "every group needs a finite sum above 0"
            )
        means[group.index] = tuple(
            _mean(group_sums, position, spec.dtype, weight) for position, spec in enumerate(group.specs)
        )
    return means


def aggregate(
    plan: SharingPlan,
    states: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    reduce_block: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """Average the layers that the plan shares, and leave the personal layers as they are.

    Clients that take no part in a round have the weight 0: they don't enter a mean, but receive it. A layer none of
    whose clients takes part stays as it is.

    Args:
        plan: from `sharing_plan`.
        states: one state dict for each client, in client order. They are not changed.
        weights: one number for each client, its number of training samples under FedAvg's rule; None weights all
            clients alike. Weights that are given apply whatever the plan's weighting is.
        reduce_block: number of clients in the blocks that are summed first. It can change the last bit, nothing else.

    Returns:
        New state dicts, in client order. Averaged tensors are new, with a copy for each client; personal tensors are
        the input's own.

    Raises:
        ConfigError: the number of states or weights is wrong, a weight is out of range, all weights are 0,
            `reduce_block` is below 1, or there are no weights for a plan whose weighting is `samples`.
        SignatureError: a state does not fit its client's model, or has no values (the `meta` device).

    >>> from flexifed.core.schemes import sharing_plan
    >>> models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    >>> for value, model in enumerate(models):
    ...     _ = torch.nn.init.constant_(model.weight, value)
    >>> [state["weight"].item() for state in aggregate(sharing_plan(models, "max_common"),
    ...                                                [model.state_dict() for model in models], weights=[1, 3])]
    [0.75, 0.75]
    """
    numbers = check_weights(plan, weights)
    if not isinstance(states, Sequence):
        raise ConfigError(f"states is a {type(states).__name__}; give a list with one state dict for each client")
    if len(states) != plan.num_clients:
        raise ConfigError(f"the plan is for {plan.num_clients} clients, but {len(states)} states were given")
    if not isinstance(reduce_block, int) or reduce_block < 1:
        raise ConfigError(f"reduce_block is {reduce_block!r}; it must be a whole number of at least 1")
    blocks = (
        sum_block([(shared_tensors(plan, client, states[client]), numbers[client]) for client in block])
        for block in blocks_of(range(plan.num_clients), reduce_block)
    )
    means = combine_blocks(plan, blocks, plan.groups_with(client for client, number in enumerate(numbers) if number))
    new_states = []
    for client, state in enumerate(states):
        own_groups = plan.shared_names(client).keys() & means.keys()
        copies = {group: tuple(mean.clone() for mean in means[group]) for group in own_groups}
        new_states.append(apply_group_state(plan, client, state, copies))
    return new_states


def apply_group_state(plan: SharingPlan, client: int, state: State, means: GroupState) -> dict[str, torch.Tensor]:
    """A client's state in which the means of its groups replace its own tensors. Nothing is copied or changed.

    Groups without a mean, none of whose clients has taken part in a round yet, keep the client's own tensors.
    """
    new = dict(state)
    for group, names in plan.shared_names(client).items():
        if group in means:
            new.update(zip(names, means[group], strict=True))
    return new


def blocks_of(clients: Sequence[T], reduce_block: int) -> list[Sequence[T]]:
    """Split clients into blocks of `reduce_block` consecutive ones, which are summed first."""
    return [clients[start : start + reduce_block] for start in range(0, len(clients), reduce_block)]


def check_weights(plan: SharingPlan, weights: Sequence[float] | None) -> list[float]:
    """The weight of each client, 1 for all if none are given.

    Raises:
        ConfigError: as in `aggregate`.
    """
    if weights is None:
        if plan.weighting == "samples":
            raise ConfigError("the plan's weighting is 'samples'; give weights, each client's number of samples")
        return [1.0] * plan.num_clients
    if isinstance(weights, Mapping | Set):
        raise ConfigError(
            f"weights is a {type(weights).__name__}; give a list with one number for each client, in order"
        )
    if not hasattr(weights, "__len__"):
        raise ConfigError(f"weights is {weights!r}; give a list with one number for each client, in order")
    if len(weights) != plan.num_clients:
        raise ConfigError(f"the plan is for {plan.num_clients} clients, but {len(weights)} weights were given")
    for client, weight in enumerate(weights):
        if not isinstance(weight, int | float | np.number):
            raise ConfigError(
                f"the weight of client {client} is {weight!r}; weights are plain numbers, such as a tensor's `tolist()`"
            )
        if weight and not _LEAST_WEIGHT <= weight <= 1 / _LEAST_WEIGHT:
            raise ConfigError(f"the weight of client {client} is {weight!r}; weights are 0 or between 1e-100 and 1e100")
    if not any(weights):
        raise ConfigError("the weights of all clients are 0; at least one client has to take part")
    return [float(weight) for weight in weights]


@torch.no_grad()
def _add_to(totals: BlockSums, group: int, addend: BlockSum) -> None:
    """`totals[group] += addend` in float64 (complex128 for complex values); only tensors made here change in place."""
    if addend.weight == 0:
        return
    total = totals.get(group)
    if total is None:
        copies = tuple(_weighted(tensor, addend).to(_double(tensor), copy=True) for tensor in addend.tensors)
        totals[group] = BlockSum(copies, addend.weight, weighted=True)
        return
    for accumulated, tensor in zip(total.tensors, addend.tensors, strict=True):
        accumulated.add_(_weighted(tensor, addend))
    totals[group] = BlockSum(total.tensors, total.weight + addend.weight, weighted=True)


@torch.no_grad()
def _mean(sums: Sequence[BlockSum], position: int, dtype: torch.dtype, weight: float) -> torch.Tensor:
    """The mean of one tensor of a group, computed a few rows at a time: their float64 sum then stays in the cache."""
    shape = sums[0].tensors[position].shape
    tensors = [block_sum.tensors[position] for block_sum in sums]
    if not shape:
        tensors = [tensor.view(1) for tensor in tensors]
    first = tensors[0]
    mean = torch.empty_like(first, dtype=dtype)
    rows = max(1, len(first))
    if first.device.type == "cpu":
        rows = max(1, _SUMMED_AT_ONCE * len(first) // max(1, first.numel()))
    for start in range(0, len(first), rows):
        chunk = slice(start, start + rows)
        addends = tensors if rows >= len(first) else [tensor[chunk] for tensor in tensors]
        total = _weighted(addends[0], sums[0]).to(_double(first), copy=True)
        for block_sum, addend in zip(sums[1:], addends[1:], strict=True):
            total.add_(_weighted(addend, block_sum))
        # Divide by a tensor: to divide by a number, a GPU multiplies with its reciprocal, and the result can differ
        # from a CPU's.
        mean[chunk] = total.div_(torch.full((), weight, dtype=total.dtype, device=total.device))
    return mean.view(shape)


def _weighted(tensor: torch.Tensor, block_sum: BlockSum) -> torch.Tensor:
    """A tensor of a block's sum with the weight applied.

    The product is rounded before it is added: a multiplication fused into the sum gives other bits on some machines.
    """
    if block_sum.weighted or block_sum.weight == 1:
        return tensor
    return tensor.to(_double(tensor)) * block_sum.weight


def _double(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


def _check_state(plan: SharingPlan, client: int, state: State) -> None:
    """Check the keys of a state, then shapes and types."""
    expected = plan.signatures[client]
    if not isinstance(state, Mapping):
        raise SignatureError(f"client {client} has a {type(state).__name__} instead of a state; give its state_dict()")
    if state.keys() != expected.state_keys:
        missing, unknown = expected.state_keys - state.keys(), state.keys() - expected.state_keys
        raise SignatureError(
            f"the state of client {client} does not fit its model: "
            f"missing {_first_names(missing)}, unknown {_first_names(unknown)}"
        )
    for layer, names in zip(expected.layers, expected.names, strict=True):
        for spec, name in zip(layer.tensors, names, strict=True):
            if not isinstance(state[name], torch.Tensor):
                raise SignatureError(
                    f"client {client}: {name} is a {type(state[name]).__name__}; give tensors, as state_dict() has them"
                )
            if tuple(state[name].shape) != spec.shape or state[name].dtype != spec.dtype:
                raise SignatureError(
                    f"client {client}: {name} is {state[name].dtype} of shape {tuple(state[name].shape)}, "
                    f"but its model has {spec.dtype} of shape {spec.shape}"
                )
            if state[name].is_meta:
                raise SignatureError(f"client {client}: {name} is on the meta device, so it has no values to average")


def _first_names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "") or "none"
