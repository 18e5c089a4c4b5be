from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flexifed.config import SCHEMES
from flexifed.core.aggregate import (
    aggregate,
    apply_group_state,
    blocks_of,
    combine_blocks,
    shared_tensors,
    sum_block,
)
from flexifed.core.schemes import SharingPlan, sharing_plan
from flexifed.errors import ConfigError, FlexifedError, SignatureError

State = dict[str, torch.Tensor]

SHALLOW = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1, bias=False))
DEEP = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(3, 1, 1))
LINEAR = nn.Linear(2, 3, bias=False)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
WEIGHTS = st.one_of(st.just(0.0), st.integers(1, 5000).map(float), st.floats(1e-3, 1e6))


def random_state(model: nn.Module, seed: int) -> State:
    """A state of the model whose values vary in size and sign; its counters are the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.full_like(tensor, seed)
        if tensor.dtype == torch.int64
        else torch.randn(tensor.shape, generator=generator) * 10 ** torch.randn(tensor.shape, generator=generator)
        for key, tensor in model.state_dict().items()
    }


def mixed_family(scheme: str = "max_common", **options: str) -> tuple[SharingPlan, list[State]]:
    models = [SHALLOW, DEEP, SHALLOW, DEEP, SHALLOW]
    return sharing_plan(models, scheme, **options), [random_state(model, seed) for seed, model in enumerate(models)]


@st.composite
def one_architecture(draw: st.DrawFn) -> tuple[SharingPlan, list[State], list[float]]:
    """Clients with any finite values, and weights of which at least one is positive."""
    num_clients = draw(st.integers(2, 6))
    values = draw(st.lists(st.lists(FLOATS, min_size=6, max_size=6), min_size=num_clients, max_size=num_clients))
    weights = draw(st.lists(WEIGHTS, min_size=num_clients, max_size=num_clients).filter(any))
    states = [{"weight": torch.tensor(row, dtype=torch.float32).reshape(3, 2)} for row in values]
    return sharing_plan([LINEAR] * num_clients, "clustered_fl"), states, weights


def same_bits(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[key].numpy().tobytes() == second[key].numpy().tobytes() for key in first
    )


def assert_within_an_ulp(actual: torch.Tensor, expected: np.ndarray, members: np.ndarray) -> None:
    """At most one float32 ulp apart, plus what float64 sums lose where the members nearly cancel each other."""
    ulp = np.maximum(np.abs(expected) * 2.0**-23, 2.0**-149)
    lost_in_float64 = 4 * len(members) * np.finfo(np.float64).eps * np.abs(members).max(axis=0)
    assert (np.abs(actual.double().numpy() - expected) <= ulp + lost_in_float64).all()


def stacked(states: Sequence[State]) -> np.ndarray:
    return np.stack([state["weight"].double().numpy() for state in states])


@given(one_architecture())
@settings(max_examples=100, deadline=None)
def test_mean_agrees_with_numpy_and_lies_between_the_members(case) -> None:
    plan, states, weights = case
    for given_weights in (None, weights):
        mean = aggregate(plan, states, given_weights)[0]["weight"]
        values = stacked(states)
        assert_within_an_ulp(mean, np.average(values, axis=0, weights=given_weights), values)
        counted = values if given_weights is None else values[np.array(given_weights) > 0]
        assert (counted.min(axis=0) <= mean.numpy()).all()
        assert (mean.numpy() <= counted.max(axis=0)).all()


@given(one_architecture())
@settings(max_examples=60, deadline=None)
def test_aggregating_twice_gives_the_bits_of_aggregating_once(case) -> None:
    plan, states, weights = case
    once = aggregate(plan, states, weights)
    for state, state_again in zip(once, aggregate(plan, once, weights), strict=True):
        assert same_bits(state, state_again)


@given(one_architecture(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_of_clients_changes_at_most_an_ulp(case, random) -> None:
    plan, states, weights = case
    order = random.sample(range(len(states)), len(states))
    in_order = aggregate(plan, states, weights)[0]["weight"]
    permuted = aggregate(plan, [states[k] for k in order], [weights[k] for k in order])[0]["weight"]
    assert_within_an_ulp(permuted, in_order.double().numpy(), stacked(states))


@given(one_architecture(), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_blocks_change_at_most_an_ulp_and_are_summed_first(case, reduce_block: int) -> None:
    plan, states, weights = case
    blocked = aggregate(plan, states, weights, reduce_block=reduce_block)
    assert_within_an_ulp(
        blocked[0]["weight"], aggregate(plan, states, weights)[0]["weight"].double().numpy(), stacked(states)
    )
    blocks = [
        sum_block([(shared_tensors(plan, client, states[client]), weights[client]) for client in block])
        for block in blocks_of(range(len(states)), reduce_block)
    ]
    by_hand = combine_blocks(plan, blocks)
    for client, state in enumerate(states):
        assert same_bits(apply_group_state(plan, client, state, by_hand), blocked[client])


def test_blocks_are_consecutive_clients() -> None:
    assert [list(block) for block in blocks_of(range(5), 2)] == [[0, 1], [2, 3], [4]]


def test_combining_leaves_the_sums_of_blocks_as_they_are() -> None:
    plan, states = mixed_family()
    blocks = [
        sum_block([(shared_tensors(plan, client, states[client]), 2.0) for client in block])
        for block in blocks_of(range(5), 2)
    ]
    first, second = combine_blocks(plan, blocks), combine_blocks(plan, blocks)
    assert first.keys() == second.keys() == {group.index for group in plan.groups}
    for group in first:
        assert all(torch.equal(mean, same) for mean, same in zip(first[group], second[group], strict=True))


def test_a_block_of_one_client_sends_the_clients_own_tensors() -> None:
    plan, states = mixed_family()
    contribution = shared_tensors(plan, 0, states[0])
    block = sum_block([(contribution, 3.0)])
    for group, tensors in contribution.items():
        assert block[group].weight == 3.0
        assert all(sent is own for sent, own in zip(block[group].tensors, tensors, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reduce_block", [1, 2, 9])
def test_inputs_are_never_changed(scheme: str, reduce_block: int) -> None:
    plan, states = mixed_family(scheme)
    before = [{key: tensor.clone() for key, tensor in state.items()} for state in states]
    aggregate(plan, states, [1, 2, 3, 4, 5], reduce_block=reduce_block)
    assert all(same_bits(old, state) for old, state in zip(before, states, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_personal_tensors_are_those_of_the_input_and_averaged_ones_are_new(scheme: str) -> None:
    plan, states = mixed_family(scheme)
    everything = {id(tensor) for state in states for tensor in state.values()}
    for client, (old, new) in enumerate(zip(states, aggregate(plan, states), strict=True)):
        averaged = {name for names in plan.shared_names(client).values() for name in names}
        assert list(new) == list(old)
        assert {key for key in new if new[key] is not old[key]} == averaged
        assert not any(id(new[key]) in everything for key in averaged)
        assert new["1.num_batches_tracked"] is old["1.num_batches_tracked"]


def test_every_layer_is_averaged_over_the_clients_that_have_its_prefix() -> None:
    plan, states = mixed_family()
    new = aggregate(plan, states)
    for key, sharers in {"0.weight": range(5), "1.running_var": range(5), "2.weight": (0, 2, 4)}.items():
        mean = torch.stack([states[client][key] for client in sharers]).double().mean(0).float()
        for client in sharers:
            torch.testing.assert_close(new[client][key], mean, rtol=3e-7, atol=0)
            assert client == 0 or new[client][key].data_ptr() != new[0][key].data_ptr()
    torch.testing.assert_close(new[1]["3.bias"], (states[1]["3.bias"] + states[3]["3.bias"]) / 2)
    assert torch.equal(new[1]["3.bias"], new[3]["3.bias"])


def test_local_running_statistics_stay_with_the_client() -> None:
    plan, states = mixed_family(batch_norm_buffers="local")
    for old, new in zip(states, aggregate(plan, states), strict=True):
        assert new["1.running_mean"] is old["1.running_mean"]
        assert new["1.weight"] is not old["1.weight"]


def test_one_architecture_under_clustered_fl_is_plain_fedavg() -> None:
    states = [random_state(DEEP, seed) for seed in range(4)]
    for new in aggregate(sharing_plan([DEEP] * 4, "clustered_fl"), states):
        for key in new.keys() - {"1.num_batches_tracked"}:
            assert torch.equal(new[key], torch.stack([state[key] for state in states]).double().mean(0).float())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128], ids=str
)
@pytest.mark.parametrize("reduce_block", [1, 2])
def test_means_keep_the_type_of_the_parameters(dtype: torch.dtype, reduce_block: int) -> None:
    models = [nn.Linear(4, 3, dtype=dtype) for _ in range(3)]
    states, weights = [model.state_dict() for model in models], [1.0, 2.5, 4.0]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    (mean, *_) = aggregate(sharing_plan(models, "max_common"), states, weights, reduce_block=reduce_block)
    for key in mean:
        expected = sum(state[key].to(wide) * weight for state, weight in zip(states, weights, strict=True)) / 7.5
        assert mean[key].dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mean[key].to(wide), expected, rtol=eps, atol=eps)


def test_sums_of_half_precision_do_not_overflow() -> None:
    model = nn.Linear(2, 2, bias=False).half()
    states = [{"weight": torch.full((2, 2), 60_000.0, dtype=torch.float16)} for _ in range(5)]
    assert (aggregate(sharing_plan([model] * 5, "max_common"), states)[0]["weight"] == 60_000).all()


def test_weights_belong_to_clients_and_not_to_positions_in_a_group() -> None:
    plan, states = mixed_family(weighting="samples")
    new = aggregate(plan, states, [0, 10, 0, 30, 7])
    assert torch.equal(new[0]["2.weight"], states[4]["2.weight"])
    torch.testing.assert_close(new[1]["3.bias"], 0.25 * states[1]["3.bias"] + 0.75 * states[3]["3.bias"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1], "the plan is for 5 clients, but 2 weights were given"),
        ([1, 1, -2, 1, 1], "the weight of client 2 is -2; weights are 0 or between 1e-100 and 1e100"),
        ([1, float("nan"), 1, 1, 1], "the weight of client 1 is nan; weights are 0 or between 1e-100 and 1e100"),
        ([1, 1, 1, 1, float("inf")], "the weight of client 4 is inf; weights are 0 or between 1e-100 and 1e100"),
        ([1, 1, 1, 1, 1e308], "the weight of client 4 is 1e+308; weights are 0 or between 1e-100 and 1e100"),
        ([5e-324, 1, 1, 1, 1], "the weight of client 0 is 5e-324; weights are 0 or between 1e-100 and 1e100"),
        ([0] * 5, "the weights of all clients are 0; at least one client has to take part"),
        ({4: 1, 3: 1, 2: 1, 1: 1, 0: 1}, "weights is a dict; give a list with one number for each client, in order"),
        (5, "weights is 5; give a list with one number for each client, in order"),
        ({1, 2, 3, 4, 5}, "weights is a set; give a list with one number for each client, in order"),
        (None, "the plan's weighting is 'samples'; give weights, each client's number of samples"),
    ],
)
def test_weights_from_which_no_mean_can_be_computed_are_refused(weights: list[float] | None, message: str) -> None:
    plan, states = mixed_family(weighting="samples")
    with pytest.raises(ConfigError) as error:
        aggregate(plan, states, weights)
    assert str(error.value) == message


def test_wrong_numbers_of_states_and_blocks_are_refused() -> None:
    plan, states = mixed_family()
    with pytest.raises(ConfigError, match="the plan is for 5 clients, but 4 states were given"):
        aggregate(plan, states[:4])
    with pytest.raises(ConfigError, match="reduce_block is 0; it must be a whole number of at least 1"):
        aggregate(plan, states, reduce_block=0)


def test_a_group_without_contributions_is_refused() -> None:
    plan, _ = mixed_family()
    with pytest.raises(ConfigError, match=r"weights of clients \[0, 1, 2, 3, 4\] add up to 0; every group needs"):
        combine_blocks(plan, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("2.weight"),
            "state of client 1 does not fit its model: missing 2.weight, unknown none",
        ),
        (lambda state: state.update(a=torch.ones(1)), "client 1 does not fit its model: missing none, unknown a"),
        (
            lambda state: [state.pop(key) for key in list(state)[:5]],
            "missing 0.bias, 0.weight, 1.bias and 2 more, unknown none",
        ),
        (
            lambda state: state.update({"0.bias": torch.ones(3)}),
            r"client 1: 0.bias is torch.float32 of shape \(3,\), but its model has torch.float32 of shape \(2,\)",
        ),
        (
            lambda state: state.update({"0.bias": torch.ones(2).half()}),
            r"client 1: 0.bias is torch.float16 of shape \(2,\), but its model has torch.float32 of shape \(2,\)",
        ),
        (
            lambda state: state.update({"0.bias": np.ones(2, dtype=np.float32)}),
            r"client 1: 0.bias is a ndarray; give tensors, as state_dict\(\) has them",
        ),
    ],
    ids=["missing key", "unknown key", "many missing keys", "shape", "dtype", "array"],
)
def test_states_that_do_not_fit_the_model_are_refused(change, message: str) -> None:
    plan, states = mixed_family()
    change(states[1])
    with pytest.raises(SignatureError, match=message):
        aggregate(plan, states)


def test_means_do_not_keep_the_graph_of_states_that_require_gradients() -> None:
    models = [nn.Linear(2, 2) for _ in range(3)]
    states = [model.state_dict(keep_vars=True) for model in models]
    assert not any(tensor.requires_grad for tensor in aggregate(sharing_plan(models, "max_common"), states)[0].values())


def test_clients_without_weight_receive_means_but_do_not_enter_them() -> None:
    plan, states = mixed_family()
    weights = [1.0, 0.0, 1.0, 0.0, 1.0]
    new = aggregate(plan, states, weights)
    for group in plan.groups:
        members = plan.members(group)
        names = {client: plan.shared_names(client)[group.index] for client in members}
        taking_part = [client for client in members if weights[client]]
        for position in range(len(group.specs)):
            values = {client: states[client][names[client][position]] for client in members}
            mean = torch.stack([values[client].double() for client in taking_part]).mean(0) if taking_part else None
            for client in members:
                expected = values[client] if mean is None else mean.to(values[client].dtype)
                torch.testing.assert_close(new[client][names[client][position]], expected)
    assert any(set(plan.members(group)) == {1, 3} for group in plan.groups), "these stay as they are"


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (lambda models, states: models, "client 0 has a Sequential instead of a state; give its state_dict()"),
        (lambda models, states: states[0], "states is a dict; give a list with one state dict for each client"),
        (lambda models, states: iter(states), "states is a list_iterator; give a list with one state dict for each"),
        (
            lambda models, states: [model.to("meta").state_dict() for model in models],
            "client 0: 0.weight is on the meta device, so it has no values to average",
        ),
    ],
    ids=["models", "one state", "iterator", "meta"],
)
def test_what_is_not_a_list_of_states_is_refused(states, message: str) -> None:
    models = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    plan = sharing_plan(models, "max_common")
    with pytest.raises(FlexifedError) as error:
        aggregate(plan, states(models, [dict(model.state_dict()) for model in models]))
    assert message in str(error.value)


def test_large_tensors_are_averaged_a_few_rows_at_a_time_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [nn.Linear(300, 500) for _ in range(3)]  # 500 rows are not a multiple of those that fit at once
    states = [model.state_dict() for model in models]
    plan = sharing_plan(models, "clustered_fl")
    (mean, *_) = aggregate(plan, states)
    for name in mean:
        sums = states[0][name].double() + states[1][name].double() + states[2][name].double()
        assert torch.equal(mean[name], (sums / 3).float())
    monkeypatch.setattr("flexifed.core.aggregate._SUMMED_AT_ONCE", 7)
    assert all(torch.equal(mean[name], aggregate(plan, states)[0][name]) for name in mean)


def test_a_client_of_weight_zero_does_not_enter_the_mean() -> None:
    plan = sharing_plan([LINEAR, LINEAR], "clustered_fl")
    states = [{"weight": torch.full((3, 2), value)} for value in (float("nan"), 1.0)]
    assert torch.equal(aggregate(plan, states, [0, 1])[0]["weight"], states[1]["weight"])
