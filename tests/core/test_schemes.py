from __future__ import annotations

import pickle
from collections import OrderedDict
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flexifed.config import FAMILIES, SCHEMES
from flexifed.core.aggregate import aggregate
from flexifed.core.schemes import SharingPlan, max_common, sharing_plan
from flexifed.core.signature import DeclaredLayer, ModelSignature, signature
from flexifed.core.trie import Node
from flexifed.errors import ConfigError
from flexifed.models import build_model, model_signature

Clients = list[tuple[str, ...]]

LAYERS = {
    "linear": lambda: [nn.Linear(4, 4)],
    "linear, no bias": lambda: [nn.Linear(4, 4, bias=False)],
    "conv": lambda: [nn.Conv2d(4, 4, 3)],
    "conv, stride 2": lambda: [nn.Conv2d(4, 4, 3, stride=2)],
    "conv, padding 1": lambda: [nn.Conv2d(4, 4, 3, padding=1)],
    "conv, 1x1": lambda: [nn.Conv2d(4, 4, 1)],
    "conv, norm": lambda: [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)],
    "conv, norm with another eps": lambda: [nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, eps=1e-3)],
    "pool, conv": lambda: [nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)],
    "relu, conv": lambda: [nn.ReLU(), nn.Conv2d(4, 4, 3)],
}


def build(layers: tuple[str, ...], prefix: str = "") -> nn.Module:
    with torch.device("meta"):
        modules = [module for layer in layers for module in LAYERS[layer]()]
    return nn.Sequential(OrderedDict((f"{prefix}{position}", module) for position, module in enumerate(modules)))


@st.composite
def families(draw: st.DrawFn) -> Clients:
    """Up to 8 clients of up to 4 architectures, made of so few kinds of layers that prefixes are often in common."""
    kinds = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3, unique=True))
    paths = draw(st.lists(st.lists(st.sampled_from(kinds), min_size=1, max_size=5), min_size=1, max_size=4))
    for path in paths:
        if path[-1].startswith("linear"):
            path.append("conv")  # or the linear layers at the end would be the classifier, whose role counts
    return [tuple(path) for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=8))]


def num_common(models: Clients) -> int:
    depth = 0
    while all(depth < len(model) for model in models) and len({model[: depth + 1] for model in models}) == 1:
        depth += 1
    return depth


def averaged_with(clients: Clients, scheme: str) -> list[list[set[int]]]:
    """The paper's definitions, applied to clients: for each client and layer, the clients it is averaged over."""
    partners: list[list[set[int]]] = [[set() for _ in layers] for layers in clients]
    everyone = list(range(len(clients)))

    def average(group: list[int], start: int, stop: int) -> None:
        for client in group if len(group) > 1 else ():
            for depth in range(start, stop):
                partners[client][depth] = set(group)

    def max_common(group: list[int], done: int) -> None:
        stop = num_common([clients[client] for client in group])
        average(group, done, stop)
        deeper = [client for client in group if len(clients[client]) > stop]
        for layer in {clients[client][stop] for client in deeper}:
            max_common([client for client in deeper if clients[client][stop] == layer], stop)

    def identical(start: int) -> None:
        for layers in set(clients):
            average([client for client in everyone if clients[client] == layers], start, len(layers))

    if scheme == "max_common":
        max_common(everyone, 0)
    if scheme in ("basic_common", "clustered_common"):
        average(everyone, 0, num_common(clients))
    if scheme == "clustered_common":
        identical(num_common(clients))
    if scheme == "clustered_fl":
        identical(0)
    return partners


def planned_partners(plan: SharingPlan) -> list[list[set[int]]]:
    return [
        [set() if group is None else set(plan.members(plan.groups[group])) for group in plan.group_of[architecture]]
        for architecture in plan.architecture_of
    ]


def classifier_partners(plan: SharingPlan, client: int) -> list[set[int]]:
    layers = plan.signatures[client].layers
    return [
        partners
        for partners, layer in zip(planned_partners(plan)[client], layers, strict=True)
        if layer.role == "classifier"
    ]


def vgg(name: str, **options: float) -> ModelSignature:
    return model_signature(name, num_classes=10, **{"width": 0.1, **options})


@given(clients=families())
@settings(max_examples=100, deadline=None)
def test_plans_agree_with_the_papers_definitions(clients: Clients) -> None:
    models = [signature(build(layers, prefix=f"of_client_{client}_")) for client, layers in enumerate(clients)]
    for scheme in SCHEMES:
        assert (scheme, planned_partners(sharing_plan(models, scheme))) == (scheme, averaged_with(clients, scheme))


@given(clients=families())
@settings(max_examples=30, deadline=None)
def test_every_shared_layer_has_a_group_of_its_own_though_layers_repeat(clients: Clients) -> None:
    plan = sharing_plan([build(layers) for layers in clients], "max_common")
    for client, partners in enumerate(averaged_with(clients, "max_common")):
        names = [name for names in plan.shared_names(client).values() for name in names]
        assert len(plan.shared_names(client)) == sum(map(bool, partners))
        assert len(names) == len(set(names))


@given(clients=families())
@settings(max_examples=30, deadline=None)
def test_members_of_a_group_average_equally_many_tensors_under_their_own_names(clients: Clients) -> None:
    models = [build(layers, prefix=f"of_client_{client}_") for client, layers in enumerate(clients)]
    plan = sharing_plan(models, "max_common")
    for group in plan.groups:
        members = plan.members(group)
        assert plan.num_members(group) == len(members) >= 2
        for client in members:
            state, names = models[client].state_dict(), plan.shared_names(client)[group.index]
            assert [tuple(state[name].shape) for name in names] == [spec.shape for spec in group.specs]


@pytest.mark.parametrize("family", ["vgg", "vgg_plain"])
def test_vggs_have_1_6_and_7_convolutions_in_common(family: str) -> None:
    versions = [vgg(name) for name in FAMILIES[family]]
    plan = sharing_plan(versions, "max_common")
    common = {
        (first, second): sum(second in partners for partners in planned_partners(plan)[first])
        for first, second in combinations(range(4), 2)
    }
    assert common == {(0, 1): 1, (0, 2): 1, (0, 3): 1, (1, 2): 6, (1, 3): 6, (2, 3): 7}
    assert common == {pair: plan.trie.common_depth(*pair) for pair in common}


@pytest.mark.parametrize(("pair", "tensors"), [((0, 1), 7), ((1, 2), 42), ((1, 3), 42), ((2, 3), 49)])
def test_vggs_with_batch_norm_have_as_many_tensors_in_common_as_the_reproducers_models(
    pair: tuple[int, int], tensors: int
) -> None:
    first, second = (vgg(FAMILIES["vgg"][version]) for version in pair)
    depth = sharing_plan([first, second], "basic_common").trie.common_depth(0, 1)
    assert sum(len(names) for names in first.names[:depth]) == tensors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_classifier_never_leaves_it_personal_and_changes_nothing_else(scheme: str) -> None:
    clients = [vgg("vgg11"), vgg("vgg11"), vgg("vgg13")]
    plain, never = (sharing_plan(clients, scheme, classifier=option) for option in ("prefix", "never"))
    for client in range(3):
        assert classifier_partners(never, client) == [set(), set(), set()]
        assert planned_partners(never)[client][:-3] == planned_partners(plain)[client][:-3]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_classifier_prefix_shares_it_among_identical_models_only(scheme: str) -> None:
    plan = sharing_plan([vgg("vgg11"), vgg("vgg11"), vgg("vgg13")], scheme)
    expected = set() if scheme in ("standalone", "basic_common") else {0, 1}
    assert classifier_partners(plan, 0) == [expected] * 3
    assert classifier_partners(plan, 2) == [set()] * 3


def test_basic_common_shares_the_classifier_where_all_models_are_identical() -> None:
    assert classifier_partners(sharing_plan([vgg("vgg11")] * 3, "basic_common"), 0) == [{0, 1, 2}] * 3


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "standalone"])
def test_classifier_always_shares_layers_of_equal_shape_across_versions(scheme: str) -> None:
    clients = [vgg("vgg11"), vgg("vgg19"), model_signature("vgg13", num_classes=7, width=0.1)]
    plan = sharing_plan(clients, scheme, classifier="always")
    assert classifier_partners(plan, 0) == [{0, 1, 2}, {0, 1, 2}, {0, 1}]
    assert classifier_partners(plan, 2) == [{0, 1, 2}, {0, 1, 2}, set()]
    assert planned_partners(plan)[0][:-3] == planned_partners(sharing_plan(clients, scheme))[0][:-3]


def test_standalone_shares_nothing_even_with_classifier_always() -> None:
    plan = sharing_plan([vgg("vgg11_bn")] * 3, "standalone", classifier="always")
    assert plan.groups == ()
    assert plan.bytes_per_round(0) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("buffers", ["average", "local"])
def test_running_statistics_are_averaged_or_local_and_counters_always_local(scheme: str, buffers: str) -> None:
    plan = sharing_plan([vgg("vgg11_bn")] * 2, scheme, batch_norm_buffers=buffers)
    shared = {name.rpartition(".")[2] for names in plan.shared_names(0).values() for name in names}
    statistics = {"running_mean", "running_var"} if buffers == "average" else set()
    assert shared == (set() if scheme == "standalone" else {"weight", "bias"} | statistics)


def test_a_layer_of_statistics_only_is_personal_when_they_are_local() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 4, 1))
    plan = sharing_plan([model, model], "clustered_fl", batch_norm_buffers="local")
    assert planned_partners(plan)[0] == [set(), {0, 1}]


@pytest.mark.parametrize(
    ("scheme", "options", "is_shared"),
    [
        ("clustered_fl", {}, lambda key: True),
        ("clustered_fl", {"batch_norm_buffers": "local"}, lambda key: "running" not in key),
        ("clustered_fl", {"classifier": "never"}, lambda key: key.startswith("features")),
        ("basic_common", {}, lambda key: key.startswith("features.0.")),
        ("basic_common", {"classifier": "always"}, lambda key: key.startswith(("features.0.", "classifier."))),
        ("max_common", {"batch_norm_buffers": "local"}, lambda key: "running" not in key),
        ("standalone", {}, lambda key: False),
    ],
)
def test_bytes_per_round_are_those_of_the_shared_tensors(scheme, options, is_shared) -> None:
    first, second, deeper = (
        build_model(name, num_classes=10, width=0.1, device="meta") for name in ("vgg11_bn", "vgg11_bn", "vgg19_bn")
    )
    plan = sharing_plan([first, second, deeper], scheme, **options)
    expected = sum(
        tensor.numel() * tensor.element_size()
        for key, tensor in first.state_dict().items()
        if is_shared(key) and not key.endswith("num_batches_tracked")
    )
    assert plan.bytes_per_round(0) == plan.bytes_per_round(1) == expected


def test_layers_with_other_attribute_names_are_averaged_under_their_own_names() -> None:
    stem = nn.Sequential(OrderedDict(stem=nn.Linear(2, 2), head=nn.Linear(2, 1)))
    base = nn.Sequential(OrderedDict(base=nn.Linear(2, 2), scores=nn.Linear(2, 1)))
    plan = sharing_plan([stem, base], "clustered_fl")
    assert plan.architecture_of == (0, 0)
    first, second = aggregate(plan, [stem.state_dict(), base.state_dict()])
    assert first.keys() == stem.state_dict().keys()
    assert second.keys() == base.state_dict().keys()
    torch.testing.assert_close(first["stem.weight"], (stem.stem.weight + base.base.weight).detach() / 2)
    assert torch.equal(first["stem.weight"], second["base.weight"])
    assert torch.equal(first["head.bias"], second["scores.bias"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_and_nodes_do_not_grow_with_clients(scheme: str) -> None:
    versions = [vgg(name) for name in FAMILIES["vgg"]]
    few, many = (sharing_plan(versions * copies, scheme) for copies in (2, 200))
    assert many.group_of == few.group_of
    assert [group.architectures for group in many.groups] == [group.architectures for group in few.groups]
    nodes_of_few, nodes_of_many = ({id(node) for path in plan.trie.paths for node in path} for plan in (few, many))
    assert len(nodes_of_many) == len(nodes_of_few) <= sum(len(version.layers) for version in versions)
    assert len({id(signature) for signature in many.signatures}) == 4


def test_children_are_the_nodes_one_layer_above() -> None:
    trie = sharing_plan([vgg(name) for name in FAMILIES["vgg"]], "max_common").trie
    (root,) = trie.children(None)
    assert [child.architectures for child in trie.children(root)] == [(0,), (1, 2, 3)]
    assert trie.children(trie.paths[0][-1]) == ()


def test_plan_survives_pickling() -> None:
    plan = sharing_plan([vgg("vgg11_bn"), vgg("vgg13_bn"), vgg("vgg11_bn")], "clustered_common")
    restored = pickle.loads(pickle.dumps(plan))
    assert restored.groups == plan.groups
    assert restored.group_of == plan.group_of
    assert planned_partners(restored) == planned_partners(plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"scheme": "max"},
            "scheme is 'max'; choose one of: standalone, clustered_fl, basic_common, clustered_common, max_common",
        ),
        ({"weighting": "size"}, "weighting is 'size'; choose one of: uniform, samples"),
        ({"batch_norm_buffers": None}, "batch_norm_buffers is None; choose one of: average, local"),
        ({"classifier": True}, "classifier is True; choose one of: prefix, never, always"),
        ({"models": []}, "a sharing plan needs at least one client; models is empty"),
    ],
)
def test_arguments_that_make_no_plan_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        sharing_plan(**{"models": [nn.Linear(1, 1)], "scheme": "max_common", **arguments})
    assert str(error.value) == message


def chain(*sizes: int, classifiers: int = 1) -> nn.Module:
    """Linear layers of these sizes, of which the last ones are the classifier."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.ModuleList(nn.Linear(size, size) for size in sizes)

        def declared_layers(self) -> list[DeclaredLayer]:
            features = len(sizes) - classifiers
            return [
                DeclaredLayer((layer,), "feature" if index < features else "classifier")
                for index, layer in enumerate(self.linear)
            ]

    return Chain()


@pytest.mark.parametrize("classifier", ["never", "always"])
def test_a_layer_that_is_another_models_classifier_has_no_partner_there(classifier: str) -> None:
    models = [chain(4, 4, classifiers=1), chain(4, 4, classifiers=0)]
    partners = planned_partners(sharing_plan(models, "max_common", classifier=classifier))
    assert partners == [[{0, 1}, set()]] * 2
    assert planned_partners(sharing_plan(models, "max_common")) == [[{0, 1}, {0, 1}]] * 2


@pytest.mark.parametrize("classifier", ["never", "always"])
def test_basic_common_averages_over_all_or_nobody_whatever_the_roles(classifier: str) -> None:
    models = [chain(4, classifiers=1), chain(4, 5, classifiers=1), chain(4, 6, classifiers=1)]
    partners = planned_partners(sharing_plan(models, "basic_common", classifier=classifier))
    assert [layers[0] for layers in partners] == [set()] * 3


def test_classifier_always_matches_layers_by_their_place_in_the_classifier() -> None:
    models = [chain(size, 8, 8, classifiers=2) for size in (3, 4)]
    plan = sharing_plan(models, "max_common", classifier="always")
    assert plan.group_of[0] == plan.group_of[1]
    assert len({*plan.group_of[0]}) == 3, "nothing for the features, and a group for each classifier layer"


def test_classifier_always_tells_kinds_of_equal_shapes_apart() -> None:
    class Other(nn.Linear):
        pass

    models = [
        nn.Sequential(nn.Conv2d(1, 1, size), nn.Flatten(), last(4, 2)) for size, last in ((1, nn.Linear), (2, Other))
    ]
    assert not sharing_plan(models, "max_common", classifier="always").groups


def test_local_buffers_are_those_of_normalisations_and_no_others() -> None:
    def model() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("scale", torch.ones(3))
        return model

    (names,) = sharing_plan([model(), model()], "max_common", batch_norm_buffers="local").shared_names(0).values()
    assert "scale" in names


def first_layer_only(node: Node, architecture: int, num_architectures: int) -> tuple[int, ...]:
    """A scheme as somebody else would write it."""
    return node.architectures if node.depth == 0 else ()


def test_a_scheme_can_be_a_function_of_ones_own() -> None:
    models = [chain(4, 5), chain(4, 6), chain(4, 6)]
    plan = sharing_plan(models, first_layer_only)
    assert plan.scheme == "first_layer_only"
    assert planned_partners(plan) == [[{0, 1, 2}, set()]] * 3
    assert planned_partners(sharing_plan(models, max_common)) == planned_partners(sharing_plan(models, "max_common"))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            lambda node, architecture, count: range(count),
            "averages layer 1 of architecture 0 over [0, 1]; it must be one",
        ),
        (
            lambda node, architecture, count: (1 - architecture,),
            "averages layer 0 of architecture 0 over [1]; it must be",
        ),
        (
            lambda node, architecture, count: node.architectures if architecture == 0 else (),
            "averages Linear over architectures [0, 1], but answers otherwise for [1]; it must give all",
        ),
        (lambda node, architecture, count: None, "returns None for layer 0 of architecture 0; it must return a tuple"),
        (lambda node, architecture, count: 0, "returns 0 for layer 0 of architecture 0; it must return a tuple"),
        (lambda node, architecture, count: (0.5,), "returns (0.5,) for layer 0 of architecture 0; it must return a"),
    ],
    ids=["not in common", "without itself", "one-sided", "nothing", "a number", "a fraction"],
)
def test_schemes_that_contradict_themselves_are_refused(scheme, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        sharing_plan([chain(4, 5), chain(4, 6)], scheme)
    assert message in str(error.value)


def test_a_scheme_may_answer_with_any_collection_of_whole_numbers() -> None:
    models = [chain(4, 5), chain(4, 6), chain(4, 6)]
    plan = sharing_plan(models, lambda node, architecture, count: {np.int64(index) for index in node.architectures})
    assert plan.groups == sharing_plan(models, max_common).groups


def test_plans_have_one_digest_where_they_average_the_same() -> None:
    models = [chain(4, 5), chain(4, 5), chain(4, 6, 7), chain(4, 6, 8)]
    digests = {scheme: sharing_plan(models, scheme).digest for scheme in SCHEMES}
    assert len(set(digests.values())) == len(SCHEMES)
    assert sharing_plan(models, lambda node, *_: node.architectures).digest == digests["max_common"]
    assert sharing_plan(models[:3], "max_common").digest == sharing_plan(models[:3], "clustered_common").digest
    assert sharing_plan([*models[1:], models[0]], "max_common").digest not in digests.values()


def test_a_plans_text_is_short() -> None:
    models = [build_model(name, num_classes=10, width=0.03) for name in FAMILIES["vgg"]]
    assert len(repr(sharing_plan(models, "max_common"))) < 300


def test_common_prefix_does_not_depend_on_what_follows_it() -> None:
    shallow, deep = (nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))) for depth in (2, 3))
    assert planned_partners(sharing_plan([shallow, deep], "max_common"))[0] == [{0, 1}, {0, 1}]
