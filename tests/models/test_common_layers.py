"""The layers that versions of a family have in common, and properties of the models of all families."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from flexifed.config import DATASET_INPUTS, DATASETS, FAMILIES, FAMILY_INPUTS, CellConfig
from flexifed.core.schemes import sharing_plan
from flexifed.core.signature import DeclaredLayer, ModelSignature
from flexifed.errors import ConfigError
from flexifed.models import MODELS, build_model, model_signature
from flexifed.models.base import FamilyModel

# The convolutions that V1 has in common with any deeper version, V2 with any deeper version, and V3 with V4; and the
# tensors in the models of the reproducers, who count batch norm as five and a fixed table of one-hot vectors as one.
CONVOLUTIONS = {"vgg": (1, 6, 7), "resnet": (7, 11, 15), "charcnn": (2, 3, 4), "vdcnn": (3, 5, 11)}
TENSORS = {"vgg": (7, 42, 49), "resnet": (42, 66, 90), "charcnn": (15, 22, 29), "vdcnn": (17, 31, 73)}


def common_prefixes(family: str) -> dict[tuple[int, int], tuple[ModelSignature, int]]:
    """For each pair of versions, the signature of the first and the number of layers that they have in common."""
    versions = [model_signature(name, num_classes=10) for name in FAMILIES[family]]
    trie = sharing_plan(versions, "max_common").trie
    return {pair: (versions[pair[0]], trie.common_depth(*pair)) for pair in combinations(range(4), 2)}


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_versions_have_the_convolutions_of_the_papers_families_in_common(family: str) -> None:
    in_common = {
        pair: sum(layer.kind.startswith("Conv") for layer in model.layers[:depth])
        for pair, (model, depth) in common_prefixes(family).items()
    }
    assert in_common == {pair: CONVOLUTIONS[family][pair[0]] for pair in in_common}


@pytest.mark.parametrize("family", TENSORS)
def test_versions_have_as_many_tensors_in_common_as_the_reproducers_models(family: str) -> None:
    fixed_table = 1 if family == "charcnn" else 0  # one-hot vectors are computed here, and not stored or sent
    in_common = {
        pair: sum(len(names) for names in model.names[:depth]) + fixed_table
        for pair, (model, depth) in common_prefixes(family).items()
    }
    assert in_common == {pair: TENSORS[family][pair[0]] for pair in in_common}


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_nothing_of_the_classifier_is_in_common(family: str) -> None:
    for model, depth in common_prefixes(family).values():
        assert {layer.role for layer in model.layers[:depth]} == {"feature"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [0.001, 0.1, 0.5])
def test_width_changes_neither_depth_nor_what_is_shared(family: str, width: float) -> None:
    full, scaled = (
        sharing_plan([model_signature(name, num_classes=10, width=factor) for name in FAMILIES[family]], "max_common")
        for factor in (1.0, width)
    )
    assert scaled.group_of == full.group_of
    assert [group.architectures for group in scaled.groups] == [group.architectures for group in full.groups]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pair", [(0, 3), (1, 2), (2, 3)])
def test_common_layers_compute_the_same_when_drawn_from_one_seed(small, family: str, pair: tuple[int, int]) -> None:
    names = [FAMILIES[family][version] for version in pair]
    first, second = (small.build(name) for name in names)
    depth = sharing_plan([first, second], "max_common").trie.common_depth(0, 1)
    outputs: list[list[torch.Tensor]] = []
    for name, model in zip(names, (first, second), strict=True):
        seen: list[torch.Tensor] = []
        for layer in model.declared_layers()[: depth + 1]:
            layer.modules[0].register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].clone()))
        layer = model.declared_layers()[depth - 1]
        layer.modules[-1].register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output.clone()))
        model.train()(small.inputs(name))
        outputs.append(seen[: depth + 1])  # the inputs of all common layers, and the output of the last one
    assert len(outputs[0]) == depth + 1
    assert all(torch.equal(first_output, second_output) for first_output, second_output in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_declared_layers_are_the_weight_layers_in_forward_order(small, name: str) -> None:
    model = small.build(name, width=0.05)
    called: list[nn.Module] = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda module, *_: called.append(module))
    model.eval()(small.inputs(name))
    assert called == [module for layer in model.declared_layers() for module in layer.modules]


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_at_the_end_are_the_classifier(name: str) -> None:
    layers = build_model(name, num_classes=10, device="meta").declared_layers()
    for layer in layers:
        assert (layer.role == "classifier") == isinstance(layer.modules[0], nn.Linear)
    assert layers[-1].modules[0].out_features == 10


def test_weights_without_a_rule_are_refused() -> None:
    class Unknown(FamilyModel):
        def declared_layers(self) -> list[DeclaredLayer]:
            return [DeclaredLayer((nn.Bilinear(1, 1, 1),))]

    with pytest.raises(TypeError, match=r"no rule for the weights of Bilinear\(.*; override Unknown.initialise"):
        Unknown().initialise(torch.Generator())


def test_every_version_of_every_family_can_be_built() -> None:
    assert {name for family in FAMILIES for name in FAMILIES[family]} == set(MODELS)


def test_every_family_and_data_set_says_what_its_inputs_are() -> None:
    assert FAMILY_INPUTS.keys() == FAMILIES.keys()
    assert DATASET_INPUTS.keys() == set(DATASETS)


def test_a_family_that_can_not_read_the_data_set_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        CellConfig(dataset="cifar10", family="vdcnn", scheme="max_common")
    assert (
        str(error.value) == "family vdcnn takes texts, but cifar10 holds images; choose one of: vgg, vgg_plain, resnet"
    )
