"""Named settings of a whole experiment: from a check that the software runs, in seconds, to the paper's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from flexifed.config import ModelConfig, PartitionConfig, TrainingConfig

ProfileName = Literal["smoke", "quick", "thin", "authors", "paper"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Defaults for all settings that decide numbers, and the number of rounds."""

    rounds: int
    model: ModelConfig = field(default_factory=ModelConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "smoke": Profile(
            # Takes seconds: checks that the software runs at all.
            rounds=2,
            model=ModelConfig(width=0.03125),
            partition=PartitionConfig(num_shards=100, windows_per_shard=1, max_train=16, max_test=8),
            training=TrainingConfig(local_epochs=1),
        ),
        "quick": Profile(
            # Takes minutes for the whole grid: shows that the software runs, nothing about the science.
            # Few samples, so that all data sets cost the same; small batches and equal initial weights, so that models
            # begin to learn from them. With a larger learning rate VDCNN-49 diverges on some processors.
            rounds=4,
            model=ModelConfig(width=0.0625, init="shared"),
            partition=PartitionConfig(num_shards=100, windows_per_shard=1, max_train=96, max_test=24),
            training=TrainingConfig(local_epochs=1, batch_size=16, learning_rate=0.02, augment=False),
        ),
        "thin": Profile(
            # Thin models on real data, half an hour a row and seed, or more: enough for the schemes to separate.
            # Small shards, used whole in every round, and no augmentation: a client alone soon runs out of new samples,
            # as it does with a full shard after hundreds of rounds. Chosen on seed 100, then frozen.
            rounds=60,
            model=ModelConfig(width=0.125),
            partition=PartitionConfig(num_shards=50, windows_per_shard=1),
            training=TrainingConfig(local_epochs=1, batch_size=32, augment=False),
        ),
        "authors": Profile(rounds=502),  # the protocol of the published program: 8 clients, 20 shards
        "paper": Profile(
            # The paper's appendix A.4.
            rounds=502,
            partition=PartitionConfig(num_clients=40, num_shards=40),
        ),
    }
)
assert tuple(PROFILES) == get_args(ProfileName)
