"""Data sets by name: find them, real or synthetic, and open them.

To add a data set, write a module that provides `find` and the functions of `RealData`, one that provides those of
`SyntheticData`, and an entry in `SOURCES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol, get_args

import torch

from flexifed.config import TEXT_LENGTHS, FamilyName
from flexifed.data import agnews, cifar10, cinic10, speech_commands, synthetic, synthetic_speech, synthetic_texts
from flexifed.data.dataset import (
    Dataset,
    DatasetInfo,
    LabelledSamples,
    PartialDataWarning,
    SpeechDataset,
    Split,
    is_folder,
)
from flexifed.data.download import exclusive_download
from flexifed.data.pipeline import ImagePipeline, Pipeline, SpeechPipeline, TextPipeline
from flexifed.errors import ConfigError, DataError, FlexifedWarning, invalid_choice

__all__ = [
    "SOURCES",
    "DataChoice",
    "Dataset",
    "DatasetInfo",
    "LabelledSamples",
    "PartialDataWarning",
    "Pipeline",
    "Split",
    "find_dataset",
    "make_pipeline",
    "open_dataset",
]

DataChoice = Literal["auto", "real", "synthetic"]


class RealData(Protocol):
    """What the module of a real data set provides, besides its `find` (see `Source`)."""

    def open_real(self, info: DatasetInfo) -> Dataset:
        """Open the data that `find` described."""
        ...

    def download(self, data_dir: Path) -> None:
        """Download the data into a folder."""
        ...

    def remedy(self, data_dir: Path) -> str:
        """How to get the data into a folder, as a sentence."""
        ...

    def layout(self, data_dir: Path) -> str:
        """Which files are expected in a folder, as a sentence."""
        ...


class SyntheticData(Protocol):
    """What the module of a synthetic stand-in provides."""

    def info(self, name: str) -> DatasetInfo:
        """Describe the stand-in of a data set."""
        ...

    def open_synthetic(self, info: DatasetInfo) -> Dataset:
        """Open the stand-in that `info` described."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set comes from.

    Attributes:
        find: verifies the data in a folder, and decodes them the first time; returns None if there are none. Incomplete
            data are `real-partial`, with a `PartialDataWarning`.
        real: the module of the real data.
        stand_in: the module of the synthetic stand-in.
    """

    find: Callable[[Path], DatasetInfo | None]
    real: RealData
    stand_in: SyntheticData


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "cifar10": Source(find=cifar10.find, real=cifar10, stand_in=synthetic),
        "cinic10": Source(find=cinic10.find, real=cinic10, stand_in=synthetic),
        "agnews": Source(find=agnews.find, real=agnews, stand_in=synthetic_texts),
    }
    | {
        name: Source(find=partial(speech_commands.find, name=name), real=speech_commands, stand_in=synthetic_speech)
        for name in speech_commands.TASKS
    }
)
"""All data sets by name."""


def find_dataset(name: str, *, data: DataChoice, data_dir: str | Path, download: bool = False) -> DatasetInfo:
    """Decide which data a run uses, and verify them.

    Args:
        name: name of the data set.
        data: `real`, `synthetic`, or `auto`: real data if there are any, otherwise synthetic data. Damaged data are an
            error with `auto` too.
        data_dir: folder in which to look for real data; unused with `synthetic`.
        download: whether to download real data that are missing, damaged or incomplete.

    Raises:
        ConfigError: an unknown name or choice, or a download of synthetic data.
        DataError: `data_dir` is no folder, or real data are missing or damaged, or can't be downloaded.
    """
    source = _source(name)
    if data not in get_args(DataChoice):
        raise ConfigError(invalid_choice("data", data, get_args(DataChoice)))
    if data == "synthetic":
        if download:
            raise ConfigError(
                "download goes with real data, but data is 'synthetic'; choose auto or real, or omit download"
            )
        return source.stand_in.info(name)
    data_dir = Path(data_dir).expanduser()
    exists = is_folder(data_dir)
    try:
        info = _find_or_download(source, data_dir) if download else source.find(data_dir)
    except DataError as error:
        remedy = source.real.remedy(data_dir)
        if remedy in str(error):
            raise
        by_hand = f" {source.real.layout(data_dir)}" if download else ""
        raise DataError(f"{error} {remedy}{by_hand}") from error
    if info is not None:
        return info
    if data == "real":
        missing = "" if exists else ", which does not exist"
        raise DataError(
            f"{name}: no real data in {data_dir}{missing}. {source.real.remedy(data_dir)} "
            f"{source.real.layout(data_dir)} Or choose data=synthetic for a stand-in."
        )
    return source.stand_in.info(name)


def open_dataset(info: DatasetInfo) -> Dataset:
    """Open the data that `find_dataset` described, in any process that sees the same files.

    Raises:
        ConfigError: an unknown name.
        DataError: the files are missing, or have changed since they were found.
    """
    source = _source(info.name)
    return source.stand_in.open_synthetic(info) if info.source == "synthetic" else source.real.open_real(info)


def make_pipeline(data: Dataset, family: FamilyName, *, device: torch.device, channels_last: bool) -> Pipeline:
    """Make the pipeline that turns stored samples of a data set into the input of a family's models.

    Args:
        data: an opened data set.
        family: a model family for this kind of samples.
        device: device of the samples and the inputs.
        channels_last: memory format of images.
    """
    info = data.info
    if isinstance(data, SpeechDataset):
        return SpeechPipeline(info.mean, info.std, data.noise, device, channels_last)
    if info.in_channels is None:
        return TextPipeline(TEXT_LENGTHS[family])
    return ImagePipeline(info.mean, info.std, device, channels_last)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ConfigError(invalid_choice("dataset", name, SOURCES))
    return SOURCES[name]


def _find_or_download(source: Source, data_dir: Path) -> DatasetInfo | None:
    """Find the data; if they are missing, damaged or incomplete, download them first."""
    if not _is_complete(source, data_dir):
        with exclusive_download(data_dir):
            if not _is_complete(source, data_dir):  # another process may have downloaded them meanwhile
                source.real.download(data_dir)
    return source.find(data_dir)


def _is_complete(source: Source, data_dir: Path) -> bool:
    try:
        with warnings.catch_warnings(action="ignore", category=FlexifedWarning):
            info = source.find(data_dir)
    except DataError:
        return False
    return info is not None and info.source in ("real", "real-other")
