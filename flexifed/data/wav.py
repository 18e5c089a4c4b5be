"""Spoken words in wav files: one format, and an error for everything else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from flexifed.errors import DataError

SAMPLE_RATE = 16_000
"""Samples a second."""

_EXPECTED = f"a whole wav file of 16-bit mono samples, {SAMPLE_RATE:,} a second"


def read_wav(file: Path, max_samples: int = -1) -> NDArray[np.int16]:
    """The samples of a wav file, shape (samples,), as they are.

    Args:
        file: 16-bit, mono, 16,000 samples a second.
        max_samples: read no more than so many.

    Raises:
        DataError: it is another kind of file, holds no samples, or ends before its time.
    """
    import soundfile  # only who decodes speech waits for its import

    try:
        with open(file, "rb") as opened:
            data_bytes = _data_bytes(opened, file)
        with soundfile.SoundFile(file) as sound:
            if (sound.subtype, sound.channels, sound.samplerate) != ("PCM_16", 1, SAMPLE_RATE):
                kind = f"{sound.subtype}, {sound.channels} channels, {sound.samplerate:,} samples a second"
                raise _no_wav(file, f"it is {kind}")
            if sound.frames * 2 != data_bytes:
                raise _no_wav(file, f"{sound.frames:,} samples can be read of {data_bytes:,} bytes of them")
            samples: NDArray[np.int16] = sound.read(max_samples, dtype="int16")
    except (OSError, soundfile.SoundFileError) as error:
        raise _no_wav(file, str(error)) from error
    if not len(samples):
        raise _no_wav(file, "it holds no samples")
    return samples


def read_clip(file: Path) -> NDArray[np.int16]:
    """The first second of a wav file, shape (16000,), with zeros after what is shorter; see `read_wav`."""
    samples = read_wav(file, SAMPLE_RATE)
    return np.pad(samples, (0, SAMPLE_RATE - len(samples)))


def _data_bytes(opened: BinaryIO, file: Path) -> int:
    """The size of the samples in a wav file whose chunks fill it, so that none of them can be cut or too short.

    The size of all, which stands at the beginning, is passed over: players do so too, and the chunks' own say more.

    Raises:
        DataError: the chunks end before the file does, or after it.
    """
    num_bytes = os.fstat(opened.fileno()).st_size
    header = opened.read(12)
    if header[:4] != b"RIFF" or header[8:] != b"WAVE":
        raise _no_wav(file, f"it has {num_bytes:,} bytes and does not begin like a wav file")
    data_bytes, end = 0, len(header)
    while end < num_bytes:
        opened.seek(end)
        chunk = opened.read(8)
        size = int.from_bytes(chunk[4:], "little")
        data_bytes += size if chunk[:4] == b"data" else 0
        end += 8 + size + size % 2
    if end > num_bytes:
        raise _no_wav(file, f"it has {num_bytes:,} bytes of the {end:,} that its chunks announce")
    return data_bytes


def _no_wav(file: Path, reason: str) -> DataError:
    return DataError(f"{file} can't be used: {reason}. Expected {_EXPECTED}.")
