"""Data sets by name: finding them, real or synthetic, and opening them.

A further data set is a module with the functions of `Source` and an entry in `SOURCES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Literal, get_args

import torch

from flexifed.config import TEXT_LENGTHS, FamilyName
from flexifed.data import agnews, cifar10, cinic10, speech_commands, synthetic, synthetic_speech, synthetic_texts
from flexifed.data.dataset import Dataset, DatasetInfo, LabelledSamples, PartialDataWarning, SpeechDataset, Split
from flexifed.data.download import alone
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
Find = Callable[[Path], DatasetInfo | None]
PipelineMaker = Callable[[Dataset, FamilyName, torch.device, bool], Pipeline]


@dataclass(frozen=True, kw_only=True)
class Source:
    """How one data set is found, got and opened.

    Attributes:
        find: verify the data under a folder, and decode them for the first time; None where there is nothing. Data that
            are only partly there are `real-partial`, with a `PartialDataWarning`.
        open_real: open what `find` has found.
        download: get the data into a folder.
        remedy: how to get the data into a folder, as a sentence.
        layout: which files are looked for in a folder, as a sentence.
        synthetic: describe the stand-in.
        open_synthetic: open it.
        pipeline: makes what a model of a family takes of the samples, real or not; see `make_pipeline`.
    """

    find: Find
    open_real: Callable[[DatasetInfo], Dataset]
    download: Callable[[Path], None]
    remedy: Callable[[Path], str]
    layout: Callable[[Path], str]
    synthetic: Callable[[], DatasetInfo]
    open_synthetic: Callable[[DatasetInfo], Dataset]
    pipeline: PipelineMaker


def _image_pipeline(data: Dataset, family: FamilyName, device: torch.device, channels_last: bool) -> Pipeline:
    return ImagePipeline(data.info.mean, data.info.std, device, channels_last)


def _text_pipeline(data: Dataset, family: FamilyName, device: torch.device, channels_last: bool) -> Pipeline:
    return TextPipeline(TEXT_LENGTHS[family])


def _speech_pipeline(data: Dataset, family: FamilyName, device: torch.device, channels_last: bool) -> Pipeline:
    if not isinstance(data, SpeechDataset):
        raise TypeError(f"{data.info.name} was opened without background noise")
    return SpeechPipeline(data.info.mean, data.info.std, data.noise, device, channels_last)


def _joined(
    real: ModuleType, stand_in: ModuleType, name: str, pipeline: PipelineMaker, find: Find | None = None
) -> Source:
    """Put together what the modules of a data set and of its stand-in have."""
    return Source(
        find=real.find if find is None else find,
        open_real=real.open_real,
        download=real.download,
        remedy=real.remedy,
        layout=real.layout,
        synthetic=partial(stand_in.info, name),
        open_synthetic=stand_in.open_synthetic,
        pipeline=pipeline,
    )


def _speech_source(name: str) -> Source:
    find = partial(speech_commands.find, name=name)
    return _joined(speech_commands, synthetic_speech, name, _speech_pipeline, find)


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "cifar10": _joined(cifar10, synthetic, "cifar10", _image_pipeline),
        "cinic10": _joined(cinic10, synthetic, "cinic10", _image_pipeline),
        "agnews": _joined(agnews, synthetic_texts, "agnews", _text_pipeline),
        "speech_commands": _speech_source("speech_commands"),
        "speech_commands_12": _speech_source("speech_commands_12"),
    }
)


def find_dataset(name: str, *, data: DataChoice, data_dir: Path, download: bool = False) -> DatasetInfo:
    """Decide which data a run uses, and verify them.

    Args:
        name: the data set.
        data: `real`, `synthetic`, or `auto`: real where they are found, else synthetic. Damaged data are an error
            under `auto` too.
        data_dir: the folder in which real data are looked for; unused for `synthetic`.
        download: get real data that are missing, damaged, or only partly there.

    Raises:
        ConfigError: an unknown name or choice, or a download of synthetic data.
        DataError: real data are missing, damaged, or can't be downloaded.
    """
    source = _source(name)
    if data not in get_args(DataChoice):
        raise ConfigError(invalid_choice("data", data, get_args(DataChoice)))
    if data == "synthetic":
        if download:
            raise ConfigError("download goes with real data, but data is 'synthetic'; choose auto or real, or leave it")
        return source.synthetic()
    data_dir = data_dir.expanduser()
    try:
        info = _find_or_download(source, data_dir) if download else source.find(data_dir)
    except DataError as error:
        remedy = source.remedy(data_dir)
        if remedy in str(error):
            raise
        by_hand = f" {source.layout(data_dir)}" if download else ""
        raise DataError(f"{error} {remedy}{by_hand}") from error
    if info is not None:
        return info
    if data == "real":
        missing = "" if data_dir.exists() else ", which does not exist"
        raise DataError(
            f"{name}: no real data in {data_dir}{missing}. {source.remedy(data_dir)} {source.layout(data_dir)} "
            "Or choose data=synthetic for a stand-in."
        )
    return source.synthetic()


def open_dataset(info: DatasetInfo) -> Dataset:
    """Open data that `find_dataset` has found, in any process that sees the same files.

    Raises:
        ConfigError: an unknown name.
        DataError: the files are not where they were found, or not as they were.
    """
    source = _source(info.name)
    return source.open_synthetic(info) if info.source == "synthetic" else source.open_real(info)


def make_pipeline(data: Dataset, family: FamilyName, *, device: torch.device, channels_last: bool) -> Pipeline:
    """What makes of stored samples on a device the input of a family's models.

    Args:
        data: an opened data set.
        family: takes this data set's kind of samples.
        device: where samples are, and inputs will be.
        channels_last: memory format of images.
    """
    return _source(data.info.name).pipeline(data, family, device, channels_last)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ConfigError(invalid_choice("dataset", name, SOURCES))
    return SOURCES[name]


def _find_or_download(source: Source, data_dir: Path) -> DatasetInfo | None:
    """Find the data; where they are missing, damaged, or only partly there, download them first."""
    if not _is_whole(source, data_dir):
        with alone(data_dir):
            if not _is_whole(source, data_dir):  # another process may have got them meanwhile
                source.download(data_dir)
    return source.find(data_dir)


def _is_whole(source: Source, data_dir: Path) -> bool:
    try:
        with warnings.catch_warnings(action="ignore", category=FlexifedWarning):
            info = source.find(data_dir)
    except DataError:
        return False
    return info is not None and info.source in ("real", "real-other")
