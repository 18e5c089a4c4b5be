"""The batches of an epoch do not depend on how many samples are prepared at once: one batch, several, or all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexifed.config import FamilyName, TrainingConfig
from flexifed.data import find_dataset, make_pipeline, open_dataset
from flexifed.data.pipeline import ImagePipeline
from flexifed.errors import DataError
from flexifed.training.batches import epoch_batches

CPU = torch.device("cpu")
IMAGES = ImagePipeline((0.5,), (0.25,), CPU, channels_last=False)


def test_images_that_are_not_stored_as_bytes_are_refused() -> None:
    with pytest.raises(DataError, match=r"images are torch\.float32; a data set stores pixels as uint8, from 0"):
        IMAGES.prepare(torch.rand(2, 1, 32, 32))


def all_batches(
    samples: torch.Tensor, at_once: int, **options: object
) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    """The batches of two epochs, and the generators' states afterwards."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    labels = torch.arange(len(samples))
    epochs = [
        list(
            epoch_batches(
                samples,
                labels,
                batches=generators[0],
                augmentation=generators[1],
                prepared_at_once=at_once,
                **options,  # type: ignore[arg-type]
            )
        )
        for _ in range(2)
    ]
    batches = [list(batch) for epoch in epochs for batch in epoch]
    return batches, torch.cat([generator.get_state() for generator in generators])


def assert_equal(expected: list[list[torch.Tensor]], actual: list[list[torch.Tensor]]) -> None:
    for expected_batch, batch in zip(expected, actual, strict=True):
        for expected_tensor, tensor in zip(expected_batch, batch, strict=True):
            assert torch.equal(expected_tensor, tensor)
            assert expected_tensor.stride() == tensor.stride()


@given(count=st.integers(1, 40), size=st.integers(1, 48), num_batches=st.integers(1, 5), augment=st.booleans())
def test_batches_do_not_depend_on_how_many_samples_are_prepared_at_once(
    count: int, size: int, num_batches: int, augment: bool
) -> None:
    samples = torch.randint(256, (count, 1, 5, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    config = TrainingConfig(batch_size=size, augment=augment)
    expected, generators = all_batches(samples, size, config=config, pipeline=IMAGES)
    assert [len(targets) for _, targets in expected] == 2 * [len(part) for part in torch.arange(count).split(size)]
    for epoch in (expected[: len(expected) // 2], expected[len(expected) // 2 :]):
        assert sorted(torch.cat([targets for _, targets in epoch]).tolist()) == list(range(count))
    for at_once in (num_batches * size, count):
        batches, generators_then = all_batches(samples, at_once, config=config, pipeline=IMAGES)
        assert_equal(expected, batches)
        assert torch.equal(generators, generators_then)


@pytest.mark.parametrize(
    ("name", "family"), [("cifar10", "vgg"), ("agnews", "charcnn"), ("agnews", "vdcnn"), ("speech_commands", "vgg")]
)
def test_batches_do_not_depend_on_it_for_any_kind_of_samples(name: str, family: FamilyName, tmp_path: object) -> None:
    data = open_dataset(find_dataset(name, data="synthetic", data_dir=tmp_path))  # type: ignore[arg-type]
    pipeline = make_pipeline(data, family, device=CPU, channels_last=True)
    samples, _ = data.train.take(np.arange(70))
    options = {"config": TrainingConfig(batch_size=24), "pipeline": pipeline}
    expected, generators = all_batches(samples, 24, **options)
    batches, generators_then = all_batches(samples, 70, **options)
    assert_equal(expected, batches)
    assert torch.equal(generators, generators_then)
    first, second = expected[: len(expected) // 2], expected[len(expected) // 2 :]
    assert not torch.equal(first[0][0], second[0][0]), "another order"
