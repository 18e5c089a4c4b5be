from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from flexifed.core.signature import DeclaredLayer, signature
from flexifed.errors import SignatureError
from flexifed.models import build_model, model_signature


class Declared(nn.Module):
    """Registers its modules from the output to the input, and declares them the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.stem = nn.Conv2d(3, 4, 3)

    def declared_layers(self) -> list[DeclaredLayer]:
        return [
            DeclaredLayer((self.stem, self.norm)),
            DeclaredLayer((self.head,), "classifier", (nn.ReLU(), nn.Flatten())),
        ]


class Declaring(nn.Module):
    """Declares as layers what `declare` makes of its two linear layers."""

    def __init__(self, declare: Callable[[nn.Linear, nn.Linear], list[DeclaredLayer]]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.declare = declare

    def declared_layers(self) -> list[DeclaredLayer]:
        return self.declare(self.first, self.second)


class Counting(nn.Module):
    """Puts something into its state dict beside its parameters."""

    def __init__(self, state: object) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.state = state

    def get_extra_state(self) -> object:
        return self.state


def between(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), module, nn.Conv2d(4, 4, 3))


def kinds(model: nn.Module) -> list[str]:
    return [layer.kind for layer in signature(model).layers]


def roles(*modules: nn.Module) -> str:
    return "".join(layer.role[0] for layer in signature(nn.Sequential(*modules)).layers)


def test_declared_order_overrides_registration_order() -> None:
    in_order = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    assert kinds(Declared()) == ["Conv2d + BatchNorm2d", "Linear"]
    assert signature(Declared()) == signature(in_order)
    assert signature(Declared()).names[1] == ("head.weight", "head.bias")


def test_undeclared_models_are_read_in_registration_order() -> None:
    model = nn.Module()
    model.late, model.early = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)
    assert kinds(model) == ["Linear", "Conv2d"]


def test_names_are_the_keys_of_the_state_dict() -> None:
    model = between(nn.BatchNorm2d(4))
    assert sorted(name for names in signature(model).names for name in names) == sorted(model.state_dict())
    assert signature(model).state_keys == model.state_dict().keys()


def test_number_of_parameters_is_the_models_own() -> None:
    model = between(nn.BatchNorm2d(4))
    assert signature(model).num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_non_persistent_buffers_do_not_count() -> None:
    model = nn.Linear(2, 2)
    before = signature(model).names
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    assert signature(model).names == before


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_normalisation_joins_the_layer_before_it(norm: nn.Module) -> None:
    assert kinds(between(norm)) == [f"Conv2d + {type(norm).__name__}", "Conv2d"]


def test_normalisation_without_a_layer_right_before_it_is_a_layer() -> None:
    leading = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    after_activation = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    assert kinds(leading) == ["BatchNorm2d", "Conv2d"]
    assert kinds(after_activation) == ["Conv2d", "BatchNorm2d"]


def test_what_stands_before_a_layer_counts_for_it_and_not_for_the_layer_below() -> None:
    pooled, plain = signature(between(nn.MaxPool2d(2))), signature(between(nn.ReLU()))
    assert pooled.layers[0] == plain.layers[0]
    assert pooled.layers[1] != plain.layers[1]


def test_what_stands_after_the_last_layer_counts_for_the_architecture_only() -> None:
    bare, softmax = (nn.Sequential(nn.Linear(2, 2), *tail) for tail in ((), (nn.Softmax(1),)))
    assert signature(bare).layers == signature(softmax).layers
    assert signature(bare) != signature(softmax)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dilation=2)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, bias=False)),
        (nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)),
        (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, dtype=torch.float64)),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=1e-3)),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)),
        (nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        (nn.GroupNorm(1, 4), nn.GroupNorm(2, 4)),
        (nn.ReLU(), nn.Tanh()),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True)),
    ],
    ids=repr,
)
def test_hyper_parameters_and_shapes_tell_layers_apart(first: nn.Module, second: nn.Module) -> None:
    assert signature(between(first)) != signature(between(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.ReLU(), nn.ReLU(inplace=True)),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, inplace=True)),
        (nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval()),
        (nn.Dropout(), nn.Dropout(inplace=True)),
    ],
    ids=repr,
)
def test_what_does_not_change_the_function_does_not_count(first: nn.Module, second: nn.Module) -> None:
    assert signature(between(first)) == signature(between(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.AvgPool2d(2), nn.AvgPool2d(2, ceil_mode=True)),
        (nn.AvgPool2d(3, padding=1), nn.AvgPool2d(3, padding=1, count_include_pad=False)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), nn.Upsample(None, 2, "bilinear", align_corners=True)),
    ],
    ids=["ceil_mode", "count_include_pad", "align_corners"],
)
def test_hyper_parameters_that_a_module_does_not_print_count_too(first: nn.Module, second: nn.Module) -> None:
    assert signature(between(first)) != signature(between(second))


class Pooling(Enum):
    MEAN = 1
    MAX = 2


@dataclass
class Config:
    """What all parts of a model may keep, whatever they use of it."""

    num_layers: int


def pooled(value: object) -> nn.Module:
    """Layers with a module between them that has an attribute."""
    module = nn.Identity()
    module.value = value
    return between(module)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.int64(2), np.int64(4)),
        ((np.int64(2), 2), (np.int64(4), 2)),
        (np.float32(0.5), np.float32(0.25)),
        (Pooling.MEAN, Pooling.MAX),
        ([Pooling.MEAN], [Pooling.MAX]),
        ({2, 3}, {2, 4}),
        ({Pooling.MEAN}, {Pooling.MAX}),
        (2j, 4j),
        (range(2), range(4)),
        ([partial(functional.gelu)], [partial(functional.gelu, approximate="tanh")]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_in_numpys_numbers_enumerations_and_collections_count(first: object, second: object) -> None:
    assert signature(pooled(first)) != signature(pooled(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (2, np.int64(2)),
        ((2, 2), (np.int64(2), np.int32(2))),
        (((2, 3), [2]), ((np.int64(2), 3), [np.int8(2)])),
        (0.5, np.float64(0.5)),
        (True, np.bool_(True)),
        ({2, 3, 400}, {400, 3, 2}),
        (Config(num_layers=2), Config(num_layers=4)),
        ({"calls": 2}, {"calls": 4}),
        (torch.zeros(2), torch.ones(2)),
        (object(), object()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_equal_values_are_equal_however_they_are_written_and_other_objects_count_by_class(
    first: object, second: object
) -> None:
    assert signature(pooled(first)) == signature(pooled(second))


def test_containers_before_a_declared_layer_count_with_what_they_hold() -> None:
    first, second = (
        Declaring(
            lambda below, above, activation=activation: [
                DeclaredLayer((below,)),
                DeclaredLayer((above,), before=(nn.Sequential(activation),)),
            ]
        )
        for activation in (nn.ReLU(), nn.Tanh())
    )
    assert signature(first) != signature(second)


def test_words_before_a_declared_layer_count() -> None:
    first, second = (
        Declaring(lambda below, above, word=word: [DeclaredLayer((below, above), before=(word,))])
        for word in ("added", "concatenated")
    )
    assert signature(first) != signature(second)


def test_values_do_not_count() -> None:
    torch.manual_seed(0)
    assert signature(nn.Linear(3, 3)) == signature(nn.Linear(3, 3))


def test_meta_models_have_the_signature_of_real_ones() -> None:
    real = build_model("vgg13_bn", num_classes=10, width=0.05)
    assert signature(real) == model_signature("vgg13_bn", num_classes=10, width=0.05)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)], "fcc"),
        ([nn.Linear(4, 4), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)], "ffc"),
        ([nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Conv2d(4, 2, 1)], "fff"),
        ([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)], "ffc"),
        ([nn.Linear(4, 2)], "c"),
    ],
)
def test_classifier_is_the_run_of_linear_layers_at_the_end(modules: list[nn.Module], expected: str) -> None:
    assert roles(*modules) == expected


def test_tied_tensors_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(SignatureError, match=r"'0\.weight' and '1\.weight' are one tied tensor; untie them"):
        signature(model)


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Sequential(), nn.BatchNorm2d(2, affine=False, track_running_stats=False)]
)
def test_models_without_layers_are_refused(model: nn.Module) -> None:
    with pytest.raises(SignatureError, match=f"{type(model).__name__} has no layer with parameters"):
        signature(model)


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda first, second: [DeclaredLayer((first,))], "to no declared layer: second.bias, second.weight"),
        (
            lambda first, second: [DeclaredLayer((first, second)), DeclaredLayer((first,))],
            r"layer 1 \(Linear\) holds a tensor \(0\.weight\) that is not in .* or also belongs to another layer",
        ),
        (lambda first, second: [DeclaredLayer((nn.Linear(2, 2),))], r"layer 0 \(Linear\) holds a tensor"),
    ],
    ids=["left out", "twice", "of another model"],
)
def test_declarations_that_do_not_fit_the_model_are_refused(declare, message: str) -> None:
    with pytest.raises(SignatureError, match=message):
        signature(Declaring(declare))


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda first, second: DeclaredLayer(first), r"modules is a Linear; give a tuple of torch.nn.Module"),
        (
            lambda first, second: DeclaredLayer((first, "relu")),
            r"modules holds 'relu'; give a tuple of torch.nn.Module",
        ),
        (
            lambda first, second: DeclaredLayer((first,), before="relu"),
            "before is 'relu'; give a tuple of torch.nn.Mod",
        ),
        (lambda first, second: DeclaredLayer((first,), before=nn.ReLU()), "before is a ReLU; give a tuple"),
        (lambda first, second: DeclaredLayer((first,), before=(torch.relu,)), "before holds a builtin_function_or_"),
        (lambda first, second: DeclaredLayer((first,), "head"), "role is 'head'; choose one of: feature, classifier"),
        (lambda first, second: (first, second), r"Declaring.declared_layers\(\) does not return a list of flexifed"),
        (lambda first, second: None, r"Declaring.declared_layers\(\) does not return a list of flexifed.DeclaredLayer"),
        (
            lambda first, second: [DeclaredLayer((nn.Sequential(first), second))],
            "to no declared layer: first.bias, first.weight; a layer has the tensors of the modules that it lists, not",
        ),
    ],
)
def test_slips_in_a_declaration_are_explained(declare, message: str) -> None:
    with pytest.raises(SignatureError, match=message):
        signature(Declaring(declare))


def test_a_model_that_declares_its_layers_is_not_read_through_a_wrapper_that_does_not() -> None:
    with pytest.raises(SignatureError, match=r"Declared declares its layers, but the DataParallel that contains it do"):
        signature(nn.DataParallel(Declared()))


@pytest.mark.parametrize("model", [nn.LazyLinear(3), nn.Sequential(nn.Conv2d(1, 1, 1), nn.LazyBatchNorm2d())])
def test_lazy_models_without_shapes_are_refused(model: nn.Module) -> None:
    with pytest.raises(SignatureError, match="has no shape yet; run the lazy model once before its layers are read"):
        signature(model)


def test_roles_tell_architectures_apart_but_not_layers() -> None:
    first, second = (
        signature(Declaring(lambda first, second, role=role: [DeclaredLayer((first,), role), DeclaredLayer((second,))]))
        for role in ("feature", "classifier")
    )
    assert first.layers == second.layers
    assert first.digest != second.digest


class Activated(nn.Module):
    """Two linear layers with a function between them, which is an attribute."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = Between(activation)
        self.outer = nn.Linear(2, 2)


class Between(nn.Module):
    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.linear = nn.Linear(2, 2)


def captured(slope: object) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: functional.leaky_relu(values, slope)


def calling(function: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: function(values)


def nested(slope: float) -> Callable[[torch.Tensor], torch.Tensor]:
    by_slope = {
        0.1: lambda values: (lambda: functional.leaky_relu(values, 0.1))(),
        0.9: lambda values: (lambda: functional.leaky_relu(values, 0.9))(),
    }
    return by_slope[slope]


def calling_itself(depth: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def again(values: torch.Tensor, left: int = depth) -> torch.Tensor:
        return again(values.relu(), left - 1) if left else values

    return again


FUNCTIONS: dict[str, Callable[[], tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]]] = {
    "captured": lambda: (captured(0.1), captured(0.9)),
    "captured function": lambda: (calling(torch.relu), calling(torch.tanh)),
    "default": lambda: tuple(lambda values, slope=slope: values * slope for slope in (0.1, 0.9)),
    "keyword default": lambda: tuple(lambda values, *, slope=slope: values * slope for slope in (0.1, 0.9)),
    "partial": lambda: tuple(partial(functional.leaky_relu, negative_slope=slope) for slope in (0.1, 0.9)),
    "function of a partial": lambda: (partial(functional.leaky_relu), partial(functional.hardtanh)),
    "nested code": lambda: (nested(0.1), nested(0.9)),
    "recursive": lambda: (calling_itself(1), calling_itself(2)),
}


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_are_told_apart_by_all_that_decides_their_values(functions) -> None:
    first, second = functions()
    assert signature(Activated(first)) != signature(Activated(second))
    assert signature(Activated(first)) == signature(Activated(functions()[0])), "made again, it is the same function"


def test_the_number_of_children_does_not_count_even_beside_a_parameter_of_its_own() -> None:
    def model(depth: int) -> nn.Module:
        model = nn.Module()
        model.depth = depth
        model.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        return model

    shallow, deep = signature(model(2)), signature(model(4))
    assert shallow.layers == deep.layers[:3]
    assert signature(nn.LSTM(2, 2, num_layers=1)) != signature(nn.LSTM(2, 2, num_layers=2))


@pytest.mark.parametrize("state", [{"calls": 3}, torch.tensor(3)], ids=["dict", "tensor"])
def test_extra_state_is_refused(state: object) -> None:
    with pytest.raises(SignatureError, match="'_extra_state' is a module's extra state, which clients can't share"):
        signature(Counting(state))


def test_declared_layers_that_are_no_method_are_refused() -> None:
    model = nn.Linear(1, 1)
    model.declared_layers = [DeclaredLayer((model,))]
    with pytest.raises(SignatureError, match=r"Linear\.declared_layers is not a method; make it one"):
        signature(model)


def test_digest_is_the_same_in_every_process() -> None:
    program = "from flexifed.models import model_signature; print(model_signature('vgg11_bn', num_classes=10).digest)"
    other_process = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert other_process.stdout.strip() == model_signature("vgg11_bn", num_classes=10).digest


def test_signature_survives_pickling() -> None:
    original = model_signature("vgg11_bn", num_classes=10, width=0.1)
    assert len(original.state_keys) == 8 * 7 + 3 * 2  # also fills the cache, which is pickled too
    restored = pickle.loads(pickle.dumps(original))
    assert (restored, restored.layers, restored.names, restored.tail) == (
        original,
        original.layers,
        original.names,
        original.tail,
    )
    assert hash(restored) == hash(original)


class Block(nn.Module):
    """Convolutions, with or without a shortcut around them."""

    def __init__(self, residual: bool, depth: int = 1) -> None:
        super().__init__()
        self.residual, self.depth = residual, depth
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))


class OtherBlock(Block):
    """Another class, which might have a `forward` of its own."""


@pytest.mark.parametrize(
    ("block", "other_block"),
    [
        (Block(residual=True), Block(residual=False)),
        (Block(residual=True), OtherBlock(residual=True)),
        (
            nn.TransformerEncoderLayer(16, 2, 32, activation="relu"),
            nn.TransformerEncoderLayer(16, 2, 32, activation="gelu"),
        ),
        (nn.TransformerEncoderLayer(16, 2, 32), nn.TransformerEncoderLayer(16, 2, 32, norm_first=True)),
    ],
)
def test_what_contains_a_layer_counts_for_it(block: nn.Module, other_block: nn.Module) -> None:
    first, second = (signature(nn.Sequential(nn.Conv2d(3, 4, 3), module)) for module in (block, other_block))
    assert first.layers[0] == second.layers[0]
    assert first.layers[1] != second.layers[1]
    assert first.digest != second.digest


def test_containers_of_more_layers_have_the_first_ones_in_common() -> None:
    shallow, deep = (signature(nn.Sequential(Block(residual=True, depth=depth))).layers for depth in (2, 4))
    assert shallow == deep[:2]
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    encoder = partial(nn.TransformerEncoder, layer, enable_nested_tensor=False)
    shallow, deep = (signature(nn.Sequential(encoder(depth))).layers for depth in (1, 3))
    assert shallow == deep[: len(shallow)]


def test_plain_containers_do_not_count() -> None:
    flat = signature(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)))
    nested = signature(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.ModuleList([nn.Linear(4, 2)])))
    assert flat == nested


def test_bytes_are_those_of_the_tensors_type() -> None:
    half, single = (signature(nn.Linear(3, 2, dtype=dtype)).layers[0] for dtype in (torch.bfloat16, torch.float32))
    assert [spec.num_bytes for spec in half.tensors] == [12, 4]
    assert [spec.num_bytes for spec in single.tensors] == [24, 8]
