"""Read spoken words from wav files of one format; anything else is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from flexifed.errors import DataError

SAMPLE_RATE = 16_000
"""Samples per second."""

_EXPECTED = f"a complete wav file of 16-bit mono samples, {SAMPLE_RATE:,} per second"


def read_wav(file: Path, max_samples: int = -1) -> NDArray[np.int16]:
    """Read the samples of a wav file, shape (samples,), unprocessed.

    Args:
        file: wav file of 16-bit mono samples, 16,000 per second.
        max_samples: maximum number of samples to read; -1 for all.

    Raises:
        DataError: the file has another format, holds no samples, or is truncated.
    """
    import soundfile  # slow to import, and only needed to decode speech

    try:
        with open(file, "rb") as opened:
            data_bytes = _data_bytes(opened, file)
        with soundfile.SoundFile(file) as sound:
            if (sound.subtype, sound.channels, sound.samplerate) != ("PCM_16", 1, SAMPLE_RATE):
                kind = f"{sound.subtype}, {sound.channels} channels, {sound.samplerate:,} samples per second"
                raise _invalid_wav(file, f"it is {kind}")
            if sound.frames * 2 != data_bytes:
                raise _invalid_wav(
                    file, f"{sound.frames:,} samples can be read, but it holds {data_bytes:,} bytes of them"
                )
            samples: NDArray[np.int16] = sound.read(max_samples, dtype="int16")
    except (OSError, soundfile.SoundFileError) as error:
        raise _invalid_wav(file, str(error)) from error
    if not len(samples):
        raise _invalid_wav(file, "it holds no samples")
    return samples


def read_clip(file: Path) -> NDArray[np.int16]:
    """Read the first second of a wav file, shape (16000,), padded with zeros at the end; see `read_wav`."""
    samples = read_wav(file, SAMPLE_RATE)
    return np.pad(samples, (0, SAMPLE_RATE - len(samples)))


def _data_bytes(opened: BinaryIO, file: Path) -> int:
    """Return the size of the samples in a wav file, and check that its chunks fill the file, so that none is truncated.

    The total size in the file's header is ignored, as players do too: the sizes of the chunks say more.

    Raises:
        DataError: the chunks don't end where the file ends.
    """
    num_bytes = os.fstat(opened.fileno()).st_size
    header = opened.read(12)
    if header[:4] != b"RIFF" or header[8:] != b"WAVE":
        raise _invalid_wav(file, f"it has {num_bytes:,} bytes and does not begin like a wav file")
    data_bytes, end = 0, len(header)
    while end < num_bytes:
        opened.seek(end)
        chunk = opened.read(8)
        size = int.from_bytes(chunk[4:], "little")
        data_bytes += size if chunk[:4] == b"data" else 0
        end += 8 + size + size % 2
    if end > num_bytes:
        raise _invalid_wav(file, f"it has {num_bytes:,} bytes of the {end:,} that its chunks declare")
    return data_bytes


def _invalid_wav(file: Path, reason: str) -> DataError:
    return DataError(f"{file} can't be used: {reason}. Expected {_EXPECTED}.")
