"""The profiles are the protocols that they are named after. A change of one is a change of what its name means."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from flexifed.config import CellConfig, ModelConfig, PartitionConfig, TrainingConfig
from flexifed.profiles import PROFILES

PUBLISHED = {"local_epochs": 10, "batch_size": 64, "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def test_authors_is_the_published_program() -> None:
    """8 of 20 shards, a tenth of one in a round; 502 rounds of 10 local epochs; crop and flip; models at full width."""
    profile = PROFILES["authors"]
    assert profile.rounds == 502
    assert asdict(profile.partition) == {
        "num_clients": 8,
        "num_shards": 20,
        "windows_per_shard": 10,
        "max_train": None,
        "max_test": None,
        "dirichlet_alpha": None,
    }
    assert asdict(profile.training).items() >= {**PUBLISHED, "augment": True}.items()
    assert asdict(profile.model) == {"width": 1.0, "init": "own", "versions": None}


def test_paper_differs_in_its_clients_only() -> None:
    """Appendix A.4: 40 clients and 40 shards."""
    paper, authors = PROFILES["paper"], PROFILES["authors"]
    assert (paper.partition.num_clients, paper.partition.num_shards) == (40, 40)
    assert paper.partition.windows_per_shard == authors.partition.windows_per_shard
    assert (paper.rounds, paper.model, paper.training) == (authors.rounds, authors.model, authors.training)


def test_thin_is_what_its_records_were_made_with() -> None:
    profile = PROFILES["thin"]
    assert (profile.rounds, profile.model) == (60, ModelConfig(width=0.125))
    assert profile.partition == PartitionConfig(num_shards=50, windows_per_shard=1)
    assert profile.training == TrainingConfig(local_epochs=1, batch_size=32, augment=False)


@pytest.mark.parametrize(
    ("name", "run_id"),
    [
        ("smoke", "752785c45bbc3aaa"),
        ("quick", "bd35bf44166d19fc"),
        ("thin", "abed5f01852d3fbb"),
        ("authors", "79e2329b3263e6ee"),
        ("paper", "a4c0a2e3c8a017b4"),
    ],
)
def test_runs_of_a_profile_keep_their_ids(name: str, run_id: str) -> None:
    """Or finished runs would begin again."""
    profile = PROFILES[name]
    settings: dict[str, Any] = {"model": profile.model, "partition": profile.partition, "training": profile.training}
    config = CellConfig(dataset="cifar10", family="vgg", scheme="max_common", **settings)
    assert config.run_id("data") == run_id
