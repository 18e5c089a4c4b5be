"""Speech Commands from a small set in the published layout, written here, and from the real files in `data_dir`."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchaudio.transforms import MelSpectrogram

from flexifed.config import CellConfig, ModelConfig, PartitionConfig, TrainingConfig
from flexifed.data import Dataset, DatasetInfo, find_dataset, make_pipeline, open_dataset, speech_commands
from flexifed.data.augment import ShiftAndNoise
from flexifed.data.pipeline import SpeechPipeline
from flexifed.data.speech_commands import NAME_12
from flexifed.data.speech_commands_12 import COMMANDS, SILENCE, UNKNOWN
from flexifed.data.speech_commands_files import NAME, V1, V2, Version, read_list
from flexifed.data.wav import read_clip, read_wav
from flexifed.errors import DataError, FlexifedWarning
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import Federation, LocalHosts

CLIPS_OF_WORD = 7
PARTIAL = pytest.mark.filterwarnings("ignore::flexifed.errors.FlexifedWarning")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A separate cache for each test, never in the folder of real data."""
    monkeypatch.setenv("FLEXIFED_CACHE_DIR", str(tmp_path / "cache"))


def write_wav(file: Path, samples: NDArray[np.int16], rate: int = 16_000, subtype: str = "PCM_16") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, samples, rate, subtype=subtype, format="WAV")


def write_set(folder: Path, version: Version) -> None:
    """Write seven clips of each word, some short, one long; the last is for testing, the one before for validation."""
    generator = np.random.default_rng(0)
    for word in version.words:
        for clip in range(CLIPS_OF_WORD):
            length = (16_000, 9_000, 1, 16_001)[clip % 4]
            write_wav(folder / word / f"{clip}_nohash_0.wav", generator.integers(-9_999, 9_999, length, dtype=np.int16))
    for name in ("hum", "rain"):
        write_wav(folder / "_background_noise_" / f"{name}.wav", generator.integers(-99, 99, 50_000, dtype=np.int16))
    for name, clip in (("validation_list.txt", CLIPS_OF_WORD - 2), ("testing_list.txt", CLIPS_OF_WORD - 1)):
        (folder / name).write_text("".join(f"{word}/{clip}_nohash_0.wav\n" for word in version.words))


@pytest.fixture(scope="session")
def both_versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    for version in (V1, V2):
        write_set(folder / version.folder, version)
    return folder


@pytest.fixture
def folder(both_versions: Path, tmp_path: Path) -> Path:
    """A copy of the small v0.02 that a test may damage."""
    target = tmp_path / "data" / "SpeechCommands" / V2.folder
    shutil.copytree(both_versions / V2.folder, target)
    return target


def find(data_dir: Path, name: str = NAME) -> DatasetInfo:
    info = speech_commands.find(data_dir, name)
    assert info is not None
    return info


def opened(data_dir: Path, name: str = NAME) -> Dataset:
    with warnings.catch_warnings(action="ignore", category=FlexifedWarning):
        return open_dataset(find(data_dir, name))


def all_of(split: object) -> tuple[torch.Tensor, torch.Tensor]:
    return split.take(np.arange(len(split)))  # type: ignore[attr-defined, no-any-return, arg-type]


# Finding, splitting, decoding


def test_a_folder_without_the_set_gives_none(tmp_path: Path) -> None:
    assert speech_commands.find(tmp_path) is None
    assert speech_commands.find(tmp_path / "absent") is None


@PARTIAL
def test_training_is_all_but_the_testing_list(both_versions: Path) -> None:
    dataset = opened(both_versions)
    info = dataset.info
    assert (info.layout, info.num_classes, info.in_channels) == ("v0.01", 30, 1)
    assert (info.num_train, info.num_test) == (30 * 6, 30) == (len(dataset.train), len(dataset.test))
    for split, clips in ((dataset.train, range(CLIPS_OF_WORD - 1)), (dataset.test, (CLIPS_OF_WORD - 1,))):
        samples, labels = all_of(split)
        assert (samples.dtype, labels.dtype) == (torch.int16, torch.int64)
        assert labels.tolist() == split.labels.tolist()
        files = [(label, both_versions / V1.folder / word / f"{clip}_nohash_0.wav")
                 for label, word in enumerate(V1.words) for clip in clips]  # fmt: skip
        for sample, label, (expected_label, file) in zip(samples.numpy(), labels.tolist(), files, strict=True):
            expected, rate = soundfile.read(file, dtype="int16")
            assert rate == 16_000
            assert label == expected_label
            assert sample.tolist() == [*expected[:16_000], *[0] * (16_000 - len(expected))]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("version", [V1, V2], ids=["v0.01", "v0.02"])
def test_either_version_is_found_in_either_place(
    version: Version, nested: bool, both_versions: Path, tmp_path: Path
) -> None:
    parent = tmp_path / "SpeechCommands" if nested else tmp_path
    shutil.copytree(both_versions / version.folder, parent / version.folder)
    with pytest.warns(FlexifedWarning, match="210 of 64,721 clips, 30 of|245 of 105,829 clips, 35 of"):
        info = find(tmp_path)
    assert (info.source, info.layout, info.num_classes) == ("real-partial", version.name, len(version.words))


def test_the_complete_set_of_another_release_than_the_papers_is_marked(
    both_versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(both_versions / V2.folder, tmp_path / V2.folder)
    monkeypatch.setattr(speech_commands, "VERSIONS", (V1, replace(V2, num_clips=245, num_test=35)))
    info = find(tmp_path)
    assert (info.source, info.layout, info.num_classes) == ("real-other", "v0.02", 35)
    twelve = find_dataset(NAME_12, data="real", data_dir=tmp_path)
    assert twelve.source == "real", "both versions have the same twelve classes"


def test_complete_set_is_real(both_versions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_commands, "VERSIONS", (replace(V1, num_clips=210, num_test=30), V2))
    assert find(both_versions).source == "real"
    assert opened(both_versions).info.source == "real"


@PARTIAL
def test_contents_decide_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    data_dir = folder.parent.parent
    before = find(data_dir)
    shutil.copytree(data_dir, tmp_path / "elsewhere")
    assert find(tmp_path / "elsewhere").fingerprint == before.fingerprint
    write_wav(folder / "bed" / "0_nohash_0.wav", np.ones(16_000, np.int16))
    assert find(data_dir).fingerprint != before.fingerprint
    with pytest.raises(DataError, match=r"can't be opened now.*the same data under the same path"):
        open_dataset(before)


@PARTIAL
@pytest.mark.parametrize(("name", "prefix"), [(NAME, "speech_commands-v0.01"), (NAME_12, "speech_commands_12-1-v0.01")])
def test_fingerprint_never_changes(name: str, prefix: str, tmp_path: Path) -> None:
    """Run ids contain it: a code change that changes it loses all runs."""
    folder = tmp_path / V1.folder
    for number, word in enumerate(V1.words):
        for clip in range(2):
            write_wav(folder / word / f"{clip}.wav", np.arange(9_999 + clip, dtype=np.int16) * (number + 1))
    write_wav(folder / "_background_noise_" / "hum.wav", np.arange(100_000).astype(np.int16))
    (folder / "validation_list.txt").touch()
    (folder / "testing_list.txt").write_text("".join(f"{word}/1.wav\n" for word in V1.words))
    digest = "9c6d5a3ac9bd3c7f65790137cc0d7f8703cf7cfd9e50f4b7e3c5437b7088993f"
    assert find(tmp_path, name).fingerprint == f"{prefix}-{digest}"


@PARTIAL
def test_the_set_opens_on_a_machine_that_has_not_decoded_it(
    both_versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = find(both_versions)
    expected = all_of(open_dataset(info).test)
    monkeypatch.setenv("FLEXIFED_CACHE_DIR", str(tmp_path / "another machine"))
    again = all_of(open_dataset(info).test)
    assert all(torch.equal(first, second) for first, second in zip(expected, again, strict=True))


@PARTIAL
def test_a_cell_ends_the_same_with_a_cold_a_warm_and_a_deleted_cache(
    both_versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CellConfig(
        dataset=NAME,
        family="vgg",
        scheme="max_common",
        model=ModelConfig(width=0.03125),
        partition=PartitionConfig(num_clients=4, num_shards=4, windows_per_shard=1),
        training=TrainingConfig(local_epochs=1, batch_size=16),
    )

    def digests() -> tuple[str, ...]:
        info = find(both_versions)
        federation = Federation(config, info, LocalHosts(config, info, make_shards(config, info)))
        federation.play_round()
        return federation.state_sha256()

    cold, warm = digests(), digests()
    shutil.rmtree(tmp_path / "cache")
    assert cold == warm == digests()


@PARTIAL
def test_normalisation_is_what_training_clips_have(both_versions: Path) -> None:
    dataset = opened(both_versions)
    inputs = make_pipeline(dataset, "vgg", device=CPU, channels_last=False).prepare(all_of(dataset.train)[0])
    assert inputs.mean().item() == pytest.approx(0, abs=0.01)
    assert inputs.std().item() == pytest.approx(1, abs=0.01)


# Damage


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


CLIP = Path("tree/2_nohash_0.wav")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / CLIP).write_bytes(b""), "tree/2_nohash_0.wav can't be used: it has 0 bytes and "),
        (lambda folder: cut(folder / "tree/0_nohash_0.wav"), "0_nohash_0.wav can't be used: it has 16,022 bytes of"),
        (lambda folder: (folder / CLIP).write_text("no sound"), "does not begin like a wav file. Expected a complete"),
        (lambda folder: write_wav(folder / CLIP, np.zeros(0, np.int16)), "2_nohash_0.wav can't be used: it holds no s"),
        (lambda folder: write_wav(folder / CLIP, np.zeros(99, np.int16), 8_000), "1 channels, 8,000 samples per sec"),
        (lambda folder: write_wav(folder / CLIP, np.zeros((9, 2), np.int16)), "it is PCM_16, 2 channels"),
        (lambda folder: write_wav(folder / CLIP, np.zeros(9, np.int16), subtype="FLOAT"), "it is FLOAT, 1 channels"),
        (lambda folder: ((folder / CLIP).unlink(), (folder / CLIP).mkdir()), "2_nohash_0.wav can't be used: .*dir"),
        (lambda folder: shutil.rmtree(folder / "tree"), "not as published: tree/ is missing.*each of 35 words"),
        (lambda folder: shutil.rmtree(folder / "_background_noise_"), "_background_noise_/ is missing"),
        (lambda folder: write_wav(folder / "_background_noise_/hum.wav", np.zeros(9, np.int16)), "at least 5 s"),
        (lambda folder: (folder / "extra").mkdir(), "extra/ is not a word of v0.02"),
        (lambda folder: [file.unlink() for file in (folder / "up").iterdir()], "up/ holds no wav file"),
        (lambda folder: (folder / "testing_list.txt").unlink(), "testing_list.txt is missing"),
        (lambda folder: (folder / "validation_list.txt").unlink(), "validation_list.txt is missing"),
        (lambda folder: (folder / "testing_list.txt").write_text(""), "testing_list.txt names none of the clips"),
        (lambda folder: (folder / "testing_list.txt").write_text("\nbed\n"), "testing_list.txt, line 2: 'bed' is not "),
        (lambda folder: (folder / "testing_list.txt").write_bytes(b"\xff"), "testing_list.txt can't be read as a list"),
        (lambda folder: shutil.copy(folder / "testing_list.txt", folder / "validation_list.txt"), "both name backwar"),
    ],
)  # fmt: skip
def test_damage_is_an_error_that_says_what_and_where(
    change: Callable[[Path], object], message: str, folder: Path
) -> None:
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        speech_commands.find(folder.parent.parent)
    assert str(folder) in str(caught.value)


def test_sizes_in_a_header_that_were_changed_give_the_samples_or_an_error(tmp_path: Path) -> None:
    file, samples = tmp_path / "clip.wav", np.arange(1, 1_001, dtype=np.int16)
    write_wav(file, samples)
    content = file.read_bytes()
    assert content[36:40] == b"data"
    total_size = int.from_bytes(content[4:8], "little")
    for size in (0, 4, 36, total_size // 2, total_size - 2, total_size + 2, 2 * total_size, 2**32 - 1):
        file.write_bytes(content[:4] + size.to_bytes(4, "little") + content[8:])
        assert read_wav(file).tolist() == samples.tolist(), "the total size is ignored"
    for size in (0, 2, 1_000, 1_998, 2_002, 4_000, 2**32 - 1):
        file.write_bytes(content[:40] + size.to_bytes(4, "little") + content[44:])
        with pytest.raises(
            DataError, match=r"clip\.wav can't be used: it has 2,044 bytes of the [\d,]+ that its chunks"
        ):
            read_wav(file)
    shorter = content[: len(content) // 2]
    file.write_bytes(shorter[:4] + (len(shorter) - 8).to_bytes(4, "little") + shorter[8:])
    with pytest.raises(DataError, match=r"clip\.wav can't be used: it has 1,022 bytes of the 2,044 that its chunks"):
        read_wav(file)


@PARTIAL
def test_hidden_and_other_files_are_skipped(folder: Path) -> None:
    before = find(folder.parent.parent)
    for name in ("._0_nohash_0.wav", "notes.txt"):
        (folder / "tree" / name).write_text("not a clip")
    (folder / ".hidden").mkdir()
    (folder / "README.md").write_text("as published")
    assert find(folder.parent.parent) == before


def test_a_list_may_name_missing_clips(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("bed/a.wav\r\n\nup/b.wav")
    assert read_list(tmp_path / "list.txt", V1.words) == {"bed/a.wav", "up/b.wav"}


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_for_a_list_give_clips_or_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    try:
        clips = read_list(tmp_path / "list.txt", V1.words)
    except DataError as caught:
        error = str(caught)
    else:
        assert all(clip.split("/")[0] in V1.words for clip in clips)
        return
    assert "list.txt" in error


# Twelve classes


@PARTIAL
@pytest.mark.parametrize("version", [V1, V2], ids=["v0.01", "v0.02"])
def test_twelve_classes_have_their_shares(version: Version, both_versions: Path, tmp_path: Path) -> None:
    (tmp_path / version.folder).symlink_to(both_versions / version.folder)
    words, twelve = opened(tmp_path), opened(tmp_path, NAME_12)
    assert twelve.info.num_classes == 12
    assert twelve.info.fingerprint != words.info.fingerprint
    assert (twelve.info.num_train, twelve.info.num_test) == (60 + 6 + 6, 10 + 1 + 1)
    for split, word_split, commands in ((twelve.train, words.train, 60), (twelve.test, words.test, 10)):
        samples, labels = all_of(split)
        counts = np.bincount(labels, minlength=12)
        assert counts.tolist() == [commands // 10] * 12 if commands == 60 else [1] * 12
        clips, word_labels = all_of(word_split)
        word_of = {clip.tobytes(): version.words[label] for clip, label in zip(clips.numpy(), word_labels, strict=True)}
        for sample, label in zip(samples.numpy(), labels.tolist(), strict=True):
            word = word_of.get(sample.tobytes())
            if label == SILENCE:
                assert word is None
                assert 0 < np.abs(sample.astype(int)).max() < 100, "the noise has this amplitude"
            elif label == UNKNOWN:
                assert word is not None
                assert word not in COMMANDS
            else:
                assert word == COMMANDS[label - 2]


@PARTIAL
def test_twelve_classes_are_a_pure_function_of_each_index(both_versions: Path) -> None:
    train = opened(both_versions, NAME_12).train
    samples, labels = all_of(train)
    indices = np.array([71, 0, 66, 35, 70, 71])
    again, again_labels = opened(both_versions, NAME_12).train.take(indices)
    assert torch.equal(again, samples[indices])
    assert torch.equal(again_labels, labels[indices])
    assert len({sample.numpy().tobytes() for sample in samples[labels == SILENCE]}) == 6
    with pytest.raises(IndexError, match="sample 72 of a split of 72"):
        train.take(np.array([72]))


# From waveforms to spectrograms


@pytest.fixture
def pipeline() -> SpeechPipeline:
    noise = np.random.default_rng(1).integers(-3_000, 3_000, 40_000, dtype=np.int16)
    return SpeechPipeline((-4.0,), (3.0,), noise, CPU, channels_last=True)


def waveforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-20_000, 20_000, (count, 16_000), dtype=np.int16))


def test_features_equal_those_of_torchaudio(pipeline: SpeechPipeline) -> None:
    samples = waveforms(70)
    samples[3, 5_000:] = 0
    samples[4] = 0
    inputs = pipeline.prepare(samples)
    assert inputs.shape == (70, 1, 32, 32)
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    plain = MelSpectrogram(sample_rate=16_000, n_fft=1_024, hop_length=512, n_mels=32)
    for sample, spectrogram in zip(samples, inputs, strict=True):
        expected = ((plain(sample / 32_768) + 1e-6).log() + 4) / 3
        torch.testing.assert_close(spectrogram[0], expected, rtol=0, atol=1e-4)


def test_features_of_a_clip_do_not_depend_on_its_batch(pipeline: SpeechPipeline) -> None:
    samples = waveforms(70)
    inputs = pipeline.prepare(samples)
    assert torch.equal(pipeline.prepare(samples[13:14]), inputs[13:14])
    assert torch.equal(pipeline.prepare(samples[5:45]), inputs[5:45])


def test_same_draws_give_the_same_inputs(pipeline: SpeechPipeline) -> None:
    samples = waveforms(20)
    before = samples.clone()
    generator = torch.Generator().manual_seed(0)
    first = pipeline.augment(samples, pipeline.draw(20, generator))
    second = pipeline.augment(samples, pipeline.draw(20, generator))
    assert torch.equal(first, pipeline.augment(samples, pipeline.draw(20, torch.Generator().manual_seed(0))))
    assert not torch.equal(first, second)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(samples, before)
    assert torch.equal(pipeline.prepare(samples), pipeline.prepare(samples)), "scoring is deterministic"


def varied(variation: ShiftAndNoise, clean: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    return variation.apply(clean, variation.draw(len(clean), generator or torch.Generator().manual_seed(0)))


def test_no_shift_and_no_volume_change_nothing() -> None:
    clean = waveforms(5) / 32_768
    noise = torch.full((30_000,), 0.5)
    for options in ({"noise_probability": 0.0}, {"max_volume": 0.0}):
        assert torch.equal(varied(ShiftAndNoise(noise, 16_000, max_shift=0, **options), clean), clean)


def test_variation_is_that_of_the_data_sets_own_training_program() -> None:
    """Warden 2018: shifts of up to 100 ms at 16 kHz; noise for 80 % of the clips, at a volume of up to a tenth."""
    variation = ShiftAndNoise(torch.zeros(16_000), 16_000)
    assert (variation.max_shift, variation.noise_probability, variation.max_volume) == (1_600, 0.8, 0.1)


@given(st.integers(0, 2_000), st.integers(0, 2**32))
@settings(max_examples=25)
def test_shift_is_at_most_max_shift_and_pads_with_silence(max_shift: int, seed: int) -> None:
    clean = torch.zeros(8, 16_000)
    clean[:, 0], clean[:, 8_000], clean[:, 15_999] = 0.25, 0.5, 0.75
    generator = torch.Generator().manual_seed(seed)
    moved = varied(ShiftAndNoise(torch.zeros(16_000), 16_000, max_shift=max_shift), clean, generator)
    for waveform in moved:
        shift = int(waveform.argmax()) - 8_000 if waveform.max() == 0.5 else None
        if shift is None:  # the end is still present, so the waveform moved to the left or not at all
            shift = int(waveform.argmax()) - 15_999
        assert abs(shift) <= max_shift
        expected = {0: 0.25, 8_000: 0.5, 15_999: 0.75}
        assert {int(place): waveform[place].item() for place in waveform.nonzero()[:, 0]} == {
            place + shift: value for place, value in expected.items() if 0 <= place + shift < 16_000
        }


def test_noise_is_added_to_most_waveforms_at_up_to_max_volume() -> None:
    silence, noise = torch.zeros(2_000, 100), torch.ones(150)
    noisy = varied(ShiftAndNoise(noise, 100, max_shift=0), silence)
    volumes = noisy[:, 0]
    assert torch.equal(noisy, volumes[:, None].expand(-1, 100))
    assert 0.76 < (volumes > 0).double().mean() < 0.84
    assert 0.09 < volumes.max() <= 0.1
    assert volumes[volumes > 0].mean().item() == pytest.approx(0.05, abs=0.005)


def test_noise_is_cut_from_anywhere_and_sums_are_clipped() -> None:
    ramp = torch.arange(1_001) / 1_000
    silence = torch.zeros(3_000, 1)
    quiet = ShiftAndNoise(ramp, 1, max_shift=0, noise_probability=1.0, max_volume=1e-3)
    assert varied(quiet, silence).max() > 9e-4
    loud = ShiftAndNoise(torch.ones(9), 4, max_shift=0, noise_probability=1.0)
    assert torch.equal(varied(loud, torch.ones(9, 4)), torch.ones(9, 4))


# The stand-in


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        (NAME, "1a5bb4f631d030440d61314b8ff5103eb52aa65a652dafe48698edacfe26b1e5"),
        (NAME_12, "da052a23541dd5bd8c474b17f0b50ea8c68eaf239e9d7e32b89141000cd1ae82"),
    ],
)
def test_stand_in_never_changes(name: str, digest: str, tmp_path: Path) -> None:
    """The fingerprint stands for the bytes: if a digest changes, increase `synthetic_speech.VERSION`."""
    info = find_dataset(name, data="auto", data_dir=tmp_path)
    dataset = open_dataset(info)
    assert info.fingerprint == f"{name}-synthetic-1"
    indices = np.arange(0, info.num_test, 97)
    content = b"".join(split.take(indices)[0].numpy().tobytes() for split in (dataset.train, dataset.test))
    assert hashlib.sha256(content).hexdigest() == digest


@pytest.mark.parametrize("name", [NAME, NAME_12])
def test_stand_in_matches_its_description(name: str, tmp_path: Path) -> None:
    info = find_dataset(name, data="synthetic", data_dir=tmp_path)
    dataset = open_dataset(info)
    assert (len(dataset.train), len(dataset.test)) == (info.num_train, info.num_test)
    if name == NAME:
        assert (info.num_train, info.num_test, info.num_classes) == (V1.num_clips - V1.num_test, V1.num_test, 30)
    assert set(dataset.test.labels.tolist()) == set(range(info.num_classes))
    samples, labels = dataset.train.take(np.arange(1_500))
    assert (samples.shape, samples.dtype) == ((1_500, 16_000), torch.int16)
    assert labels.tolist() == dataset.train.labels[:1_500].tolist()
    assert torch.equal(dataset.train.take(np.array([99, 3]))[0], samples[[99, 3]])
    assert len({sample.numpy().tobytes() for sample in samples}) == 1_500
    assert samples.int().abs().max() < 32_000, "no value comes near the limits of int16"
    inputs = make_pipeline(dataset, "resnet", device=CPU, channels_last=False).prepare(samples)
    assert inputs.mean().item() == pytest.approx(0, abs=0.05)
    assert inputs.std().item() == pytest.approx(1, abs=0.05)


def test_stand_in_can_be_learned(tmp_path: Path) -> None:
    """The nearest class mean of spectrograms is far above chance (1 in 30), and not perfect."""
    dataset = open_dataset(find_dataset(NAME, data="synthetic", data_dir=tmp_path))
    pipeline = make_pipeline(dataset, "vgg", device=CPU, channels_last=False)
    samples, labels = dataset.train.take(np.arange(1_800))
    inputs = pipeline.prepare(samples).flatten(1)
    means = torch.stack([inputs[labels == label].mean(0) for label in range(30)])
    test_samples, test_labels = dataset.test.take(np.arange(600))
    nearest = torch.cdist(pipeline.prepare(test_samples).flatten(1), means).argmin(1)
    assert 0.4 < (nearest == test_labels).double().mean() < 0.95


# Download


def test_download_unpacks_to_the_folder_that_torchaudio_uses(
    both_versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / speech_commands.V1_ARCHIVE.name
    with tarfile.open(archive, "w:gz") as tar:
        for entry in sorted((both_versions / V1.folder).iterdir()):
            tar.add(entry, f"./{entry.name}")
    checksum = f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}"
    monkeypatch.setattr(speech_commands, "V1_ARCHIVE", replace(speech_commands.V1_ARCHIVE, checksum=checksum))
    monkeypatch.setattr(speech_commands, "VERSIONS", (replace(V1, num_clips=210, num_test=30), V2))
    info = find_dataset(NAME, data="real", data_dir=tmp_path, download=True)
    assert (info.source, info.layout) == ("real", "v0.01")
    assert (tmp_path / "SpeechCommands" / V1.folder / "testing_list.txt").exists()


def test_checksum_is_that_of_torchaudio() -> None:
    from torchaudio.datasets import speechcommands

    assert speech_commands.V1_ARCHIVE.checksum == f"sha256:{speechcommands._CHECKSUMS[V1.url]}"


def test_error_for_missing_data_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        find_dataset(NAME_12, data="real", data_dir=tmp_path)
    for part in (V1.url, V2.url, "--download", "1.5 GB", str(tmp_path / "SpeechCommands" / V1.folder)):
        assert part in str(caught.value)


# The real files


@pytest.fixture(scope="module")
def real(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Dataset, Path]]:
    """The version's folder, the opened data set, and the cache folder."""
    cache = tmp_path_factory.mktemp("real-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXIFED_CACHE_DIR", str(cache))
        located = speech_commands._locate(data_dir)
        if located is None:
            pytest.skip(f"no Speech Commands in {data_dir}")
        yield located[1], opened(data_dir), cache


def test_real_clips_are_what_soundfile_reads(real: tuple[Path, Dataset, Path]) -> None:
    folder, dataset, _ = real
    testing = set((folder / "testing_list.txt").read_text().split())
    files = sorted(file for file in folder.glob("[!_]*/*.wav"))
    train = [file for file in files if f"{file.parent.name}/{file.name}" not in testing]
    test = [file for file in files if f"{file.parent.name}/{file.name}" in testing]
    assert (len(train), len(test)) == (dataset.info.num_train, dataset.info.num_test)
    words = sorted({file.parent.name for file in files})
    for split, split_files in ((dataset.train, train), (dataset.test, test)):
        assert split.labels.tolist() == [words.index(file.parent.name) for file in split_files]
        indices = np.arange(0, len(split), max(1, len(split) // 100))
        for sample, index in zip(split.take(indices)[0].numpy(), indices, strict=True):
            expected, _ = soundfile.read(split_files[index], dtype="int16")
            assert sample[: len(expected)].tolist() == expected.tolist()
            assert not sample[len(expected) :].any()


def test_real_features_are_normalised(real: tuple[Path, Dataset, Path]) -> None:
    _, dataset, _ = real
    pipeline = make_pipeline(dataset, "vgg", device=CPU, channels_last=True)
    inputs = pipeline.prepare(dataset.train.take(np.arange(0, len(dataset.train), 5))[0])
    assert inputs.isfinite().all()
    assert inputs.mean().item() == pytest.approx(0, abs=0.1)
    assert inputs.std().item() == pytest.approx(1, abs=0.1)
    drawn = pipeline.draw(200, torch.Generator().manual_seed(0))
    assert pipeline.augment(dataset.train.take(np.arange(200))[0], drawn).isfinite().all()


def test_real_twelve_classes(real: tuple[Path, Dataset, Path], data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dataset, cache = real
    monkeypatch.setenv("FLEXIFED_CACHE_DIR", str(cache))
    twelve = opened(data_dir, NAME_12)
    words = sorted(path.name for path in folder.glob("[!_]*/"))
    for split, word_split in ((twelve.train, dataset.train), (twelve.test, dataset.test)):
        word_counts = np.bincount(word_split.labels, minlength=len(words))
        expected = [word_counts[words.index(command)] for command in COMMANDS]
        tenth = -(-sum(expected) // 10)
        assert np.bincount(split.labels).tolist() == [tenth, tenth, *expected]
        assert all_of(split)[0].int().abs().amax(1).min() > 0


def real_wav(data_dir: Path) -> bytes:
    located = speech_commands._locate(data_dir)
    if located is None:
        pytest.skip(f"no Speech Commands in {data_dir}")
    return min(located[1].glob("[!_]*/*.wav")).read_bytes()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_real_clip_with_changed_bytes_is_read_or_rejected(data_dir: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Any file gives an error that names it, or the samples in it."""
    original = real_wav(data_dir)
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        place = data.draw(st.one_of(st.integers(0, 43), st.integers(0, len(content) - 1)), "place")
        content[place] = data.draw(st.integers(0, 255), "byte")
    length = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))), "length")
    file = tmp_path / "changed.wav"
    file.write_bytes(content[:length])
    try:
        clip = read_clip(file)
    except DataError as caught:
        clip, error = None, str(caught)
    if clip is None:
        assert "changed.wav" in error
        assert "Expected a complete wav file of 16-bit mono samples, 16,000 per second" in error
        return
    assert (clip.shape, clip.dtype) == ((16_000,), np.int16)
    assert length == len(original) or content[40:44] != original[40:44], "a truncated file is rejected"
    if bytes(content[:44]) == original[:44]:
        samples = np.frombuffer(bytes(content[44:]), "<i2")[:16_000]
        assert clip[: len(samples)].tolist() == samples.tolist()
        assert not clip[len(samples) :].any()


def test_real_clip_is_16_bit_mono(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.wav").write_bytes(content := real_wav(data_dir))
    assert read_wav(tmp_path / "clip.wav").tobytes() == content[44:]
