"""Which client has which version, and what tells two configs apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexifed.config import FAMILIES, CellConfig, ModelConfig, PartitionConfig, TrainingConfig
from flexifed.errors import ConfigError
from flexifed.grid import make_cells


def cell(num_clients: int = 8, versions: Any = None) -> CellConfig:
    return CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="max_common",
        model=ModelConfig(versions=versions),
        partition=PartitionConfig(num_clients=num_clients),
    )


def test_clients_have_all_four_versions_in_turn() -> None:
    config = cell(num_clients=6)
    assert config.client_versions == (0, 1, 2, 3, 0, 1)
    assert [config.version(client) for client in range(6)] == ["v1", "v2", "v3", "v4", "v1", "v2"]
    assert [config.model_name(client) for client in (0, 3, 5)] == ["vgg11_bn", "vgg19_bn", "vgg13_bn"]
    assert config.model_names == FAMILIES["vgg"]


def test_clients_have_the_chosen_versions_in_turn() -> None:
    config = cell(num_clients=5, versions=("v1", "v4"))
    assert config.client_versions == (0, 3, 0, 3, 0)
    assert [config.version(client) for client in range(3)] == ["v1", "v4", "v1"]
    assert config.model_names == ("vgg11_bn", "vgg19_bn")
    assert cell(num_clients=1, versions=["v3"]).model_names == ("vgg16_bn",)


def test_the_choice_of_all_versions_is_no_choice() -> None:
    chosen = cell(versions=("v1", "v2", "v3", "v4"))
    assert chosen == cell()
    assert chosen.run_id("data") == cell().run_id("data")


def test_settings_of_models_and_labels_tell_runs_apart() -> None:
    config = cell()
    ids = {
        config.run_id("data"),
        cell(versions=("v1", "v4")).run_id("data"),
        cell(versions=("v1",)).run_id("data"),
        *(replace(config, partition=PartitionConfig(dirichlet_alpha=alpha)).run_id("data") for alpha in (0.1, 0.5)),
    }
    assert len(ids) == 5


@pytest.mark.parametrize("versions", [(), ("v5",), ("v4", "v1"), ("v1", "v1"), "v1", ("v1", 2), 1])
def test_versions_that_are_none_unknown_unordered_or_repeated_are_refused(versions: object) -> None:
    with pytest.raises(ConfigError, match=r"versions is .*; give at least one of v1, v2, v3, v4, each once and in"):
        ModelConfig(versions=versions)  # type: ignore[arg-type]


def test_more_versions_than_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match="versions is v1 v4, but there are only 1 clients"):
        cell(num_clients=1, versions=("v1", "v4"))


@pytest.mark.parametrize("alpha", [0, 1e-4, 1e6, -1.0, float("nan"), "0.5", True])
def test_concentrations_that_are_no_numbers_or_out_of_bounds_are_refused(alpha: object) -> None:
    with pytest.raises(ConfigError, match=r"dirichlet_alpha is .*at least 0.001 and below 1e\+06"):
        PartitionConfig(dirichlet_alpha=alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, {"width": 0.5}, TrainingConfig()])
def test_a_group_of_settings_of_another_class_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^model is .*; give a ModelConfig$"):
        CellConfig(dataset="cifar10", family="vgg", scheme="max_common", model=value)


@pytest.mark.parametrize("rows", [(), (("cifar10", "vgg"), ("cifar10", "vgg"))])
def test_a_grid_needs_rows_that_differ(rows: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(ConfigError, match=r"^rows is \(.*\); give at least one \(data set, family\), each once$"):
        make_cells(rows)
