"""A check for every data set that is decoded once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flexifed.data import DatasetInfo, open_dataset
from flexifed.data.cache import FOLDER


def assert_same_from_every_cache(find: Callable[[], DatasetInfo], data_dir: Path) -> None:
    """Find and open a set with a cold, a warm and a deleted cache, and one deleted in between: three decodings."""
    infos, contents = [], []
    for state in ("cold", "warm", "deleted", "deleted before it is opened"):
        if state == "deleted":
            shutil.rmtree(data_dir / FOLDER)
        infos.append(find())
        if state == "deleted before it is opened":
            shutil.rmtree(data_dir / FOLDER)
        dataset = open_dataset(infos[-1])
        samples = [split.take(np.arange(len(split)))[0].numpy().tobytes() for split in (dataset.train, dataset.test)]
        contents.append([*samples, dataset.train.labels.tolist(), dataset.test.labels.tolist()])
    assert infos == infos[:1] * 4
    assert contents == contents[:1] * 4
