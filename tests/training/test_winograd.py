"""Winograd's convolutions agree with direct ones except for rounding, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from flexifed.config import CellConfig, FamilyName, ModelConfig, NumericsConfig, PartitionConfig, TrainingConfig
from flexifed.data import synthetic
from flexifed.errors import ConfigError
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import Federation, LocalHosts
from flexifed.models import build_model
from flexifed.training import winograd
from flexifed.training.winograd import WinogradConv2d, convolve, is_suitable, use_winograd
from flexifed.training.workspace import Workspace

INFO = synthetic.info()

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def operands(
    count: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    bias: bool = True,
    seed: int = 0,
) -> Operands:
    """Images, weight and bias, whose convolution has values of order 1."""
    generator = torch.Generator().manual_seed(0)
    in_channels, out_channels = channels
    images = torch.randn(count, in_channels, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(out_channels, in_channels, 3, 3, generator=generator, dtype=torch.float64)
    offsets = torch.randn(out_channels, generator=generator, dtype=torch.float64)
    tensors = (images, weight / (3 * in_channels**0.5), offsets)
    images, weight, offsets = (tensor.to(dtype).requires_grad_() for tensor in tensors)
    return images, weight, offsets if bias else None


def direct(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.conv2d(images, weight, bias, padding=1)


def with_gradients(outputs: torch.Tensor, inputs: Operands) -> list[torch.Tensor]:
    """The outputs, and the gradients of all inputs for a random gradient of the outputs."""
    gradient = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [tensor for tensor in inputs if tensor is not None]
    return [outputs.detach(), *torch.autograd.grad(outputs, leaves, gradient.to(outputs.dtype))]


@given(
    count=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    bias=st.booleans(),
    channels_last=st.booleans(),
    numbers_at_once=st.sampled_from([1, 300, 10**6]),
    tiles_at_once=st.sampled_from([1, 7]),
)
@settings(max_examples=150)
def test_outputs_and_gradients_are_those_of_a_direct_convolution(
    count: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    bias: bool,
    channels_last: bool,
    numbers_at_once: int,
    tiles_at_once: int,
) -> None:
    inputs = operands(count, channels, size, torch.float64, bias=bias)
    images, weight, offsets = inputs
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "_NUMBERS_AT_ONCE", numbers_at_once)
        patch.setattr(winograd, "_TILES_AT_ONCE", tiles_at_once)
        patch.setattr(winograd, "_FEWEST_TILES", 1)
        ours = convolve(images.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), offsets)
        ours_and_gradients = with_gradients(ours, inputs)
    for tensor, exact in zip(ours_and_gradients, with_gradients(direct(*inputs), inputs), strict=True):
        torch.testing.assert_close(tensor, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("count", "size", "tile"), [(8, 8, 4), (32, 4, 4), (4, 6, 2), (32, 2, 2)])
def test_even_sizes_are_tiled(count: int, size: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "conv2d", lambda *_, **__: pytest.fail("a direct convolution"))
    outputs = convolve(*operands(count, (1, 1), (size, size), torch.float32))
    assert outputs.grad_fn.transforms.tile == tile


@pytest.mark.parametrize(
    ("count", "size", "autocast"),
    [(32, 5, False), (7, 8, False), (31, 4, False), (3, 6, False), (31, 2, False), (32, 4, True)],
    ids=["odd", "7 of 4 tiles", "31 of a tile", "3 of 9 tiles", "31 of a small tile", "autocast"],
)
def test_where_it_would_not_be_faster_a_convolution_is_pytorchs_own_to_the_bit(
    count: int, size: int, autocast: bool
) -> None:
    inputs = operands(count, (3, 5), (size, size), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for tensor, exact in zip(
            with_gradients(convolve(*inputs), inputs), with_gradients(direct(*inputs), inputs), strict=True
        ):
            assert torch.equal(tensor, exact)


@pytest.mark.parametrize("channels", [128, 256])
@pytest.mark.parametrize(("size", "limit"), [(2, 1e-6), (6, 1e-6), (4, 5e-6), (8, 5e-6)])
def test_rounding_is_that_of_float32(channels: int, size: int, limit: float) -> None:
    """Root mean square errors of outputs and gradients, relative to their size; those of TF32 would be 3e-4."""
    inputs = operands(32, (channels, channels), (size, size), torch.float32)
    images, weight, bias = (tensor.detach().double().requires_grad_() for tensor in inputs if tensor is not None)
    exact = with_gradients(direct(images, weight, bias), (images, weight, bias))
    for tensor, exact_tensor in zip(with_gradients(convolve(*inputs), inputs), exact, strict=True):
        error = (tensor.double() - exact_tensor).square().mean().sqrt()
        assert error < limit * exact_tensor.square().mean().sqrt()


@pytest.mark.parametrize(
    ("grid", "numbers", "sizes"),
    [
        ((4, 4), 36 * 64, [16, 16, 16, 16]),  # 16 tiles of 2,304 numbers each: 600,000 are 16 images
        ((8, 8), 36 * 512, [1] * 64),
        ((1, 1), 36 * 512, [64]),  # no fewer than 64 tiles
        ((2, 3), 36 * 512, [11, 11, 11, 11, 11, 9]),
    ],
)
def test_images_are_split_into_parts_that_stay_in_the_cache(
    grid: tuple[int, int], numbers: int, sizes: list[int]
) -> None:
    parts = list(winograd._parts(64, grid, numbers))
    assert [len(range(64)[part]) for part in parts] == sizes


def test_matrices_are_on_the_cpu_whatever_the_default_device_is() -> None:
    winograd._transforms.cache_clear()
    with torch.device("meta"):
        winograd._transforms(4, torch.float32)
    assert convolve(*operands(32, (1, 1), (4, 4), torch.float32)).isfinite().all()


def test_second_derivatives_are_refused() -> None:
    images, weight, bias = operands(32, (1, 1), (4, 4), torch.float64)
    (gradient,) = torch.autograd.grad(convolve(images, weight, bias).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=1, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(127, 128, 3, padding=1),
        nn.Conv2d(128, 127, 3, padding=1),
    ],
    ids=["1x1", "no padding", "stride", "dilation", "groups", "circular", "few in", "few out"],
)
def test_other_convolutions_stay_as_they_are(convolution: nn.Conv2d) -> None:
    assert is_suitable(nn.Conv2d(128, 128, 3, padding=1))
    assert not is_suitable(convolution)
    use_winograd(convolution)
    assert type(convolution) is nn.Conv2d


def test_a_convolution_stays_the_same_module_wherever_it_is_used() -> None:
    convolution = nn.Conv2d(128, 128, 3, padding=1)
    calls = []
    convolution.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(convolution, nn.ReLU(), convolution)
    use_winograd(model)
    model(torch.zeros(1, 128, 4, 4))
    assert isinstance(convolution, WinogradConv2d)
    assert len(calls) == 2
    use_winograd(alone := nn.Conv2d(128, 128, 3, padding=1))
    assert isinstance(alone, WinogradConv2d)


@pytest.mark.parametrize(("name", "count"), [("vgg11_bn", 6), ("vgg19_bn", 13), ("resnet20", 0)])
def test_a_model_keeps_its_own_tensors_and_their_names(name: str, count: int) -> None:
    model = build_model(name, num_classes=10, device="meta")
    before = list(model.state_dict(keep_vars=True).items())
    use_winograd(model)
    after = list(model.state_dict(keep_vars=True).items())
    assert [key for key, _ in before] == [key for key, _ in after]
    assert all(old is new for (_, old), (_, new) in zip(before, after, strict=True))
    assert sum(isinstance(module, WinogradConv2d) for module in model.modules()) == count


def cell(family: FamilyName = "vgg", **numerics: object) -> CellConfig:
    """VGGs of a quarter of the width, whose last convolutions have 128 channels; 8 images a round, in batches of 4."""
    return CellConfig(
        dataset="cifar10",
        family=family,
        scheme="max_common",
        model=ModelConfig(width=0.25),
        partition=PartitionConfig(num_clients=4, num_shards=500, windows_per_shard=10, max_train=80, max_test=8),
        training=TrainingConfig(local_epochs=1, batch_size=4),
        numerics=NumericsConfig(**numerics),
    )


def states_after_a_round(config: CellConfig, clients_per_host: int = 4) -> dict[int, dict[str, torch.Tensor]]:
    hosts = LocalHosts(config, INFO, make_shards(config, INFO), clients_per_host=clients_per_host)
    federation = Federation(config, INFO, hosts)
    federation.play_round()
    return {
        client.index: dict(client.state(host._complete(federation.shared)))
        for host in hosts._hosts
        for client in host._clients
    }


@pytest.mark.parametrize(
    ("numerics", "count"),
    [({}, 3), ({"winograd": True}, 3), ({"winograd": False}, 0), ({"precision": "bf16"}, 0)],
    ids=["default", "on", "off", "bf16"],
)
def test_winograd_is_the_default_and_only_in_float32(numerics: dict[str, object], count: int) -> None:
    workspace = Workspace(
        build_model("vgg11_bn", num_classes=10, width=0.25), TrainingConfig(), NumericsConfig(**numerics)
    )
    assert sum(isinstance(module, WinogradConv2d) for module in workspace.model.modules()) == count


def test_models_on_other_devices_than_cpus_do_not_change() -> None:
    model = build_model("vgg11_bn", num_classes=10, device="meta")
    assert not any(
        isinstance(module, WinogradConv2d)
        for module in Workspace(model, TrainingConfig(), NumericsConfig()).model.modules()
    )


@pytest.mark.parametrize("family", ["vgg", "vgg_plain"])  # the second has a ReLU in place right after a convolution
def test_a_round_gives_nearly_pytorchs_weights_and_the_same_bits_wherever_clients_run(
    family: FamilyName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_FEWEST_TILES", 1)
    ours, apart, plain = (
        states_after_a_round(cell(family, winograd=True)),
        states_after_a_round(cell(family, winograd=True), clients_per_host=1),
        states_after_a_round(cell(family, winograd=False)),
    )
    differ = 0
    for client, state in ours.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, apart[client][name])
            torch.testing.assert_close(tensor, plain[client][name], rtol=1e-3, atol=1e-4)
            differ += not torch.equal(tensor, plain[client][name])
    assert differ, "or it would not have to be a setting"


def test_winograd_is_part_of_a_run_id_where_it_is_used() -> None:
    used = CellConfig(dataset="cifar10", family="vgg", scheme="standalone")
    switched_off = replace(used, numerics=NumericsConfig(winograd=False))
    assert switched_off.run_id("data") == "e300a5ecd3b72999"  # as before this setting existed
    assert used.run_id("data") != switched_off.run_id("data")
    for unused in (replace(used, device="cuda"), replace(used, numerics=NumericsConfig(precision="bf16"))):
        off = replace(unused, numerics=replace(unused.numerics, winograd=False))
        assert off.run_id("data") == unused.run_id("data")


def test_winograd_is_on_or_off() -> None:
    with pytest.raises(ConfigError, match="winograd is 1"):
        cell(winograd=1)
