"""Damaged files lead to an error or to correct data, never to a crash, a hang, or the execution of code in them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_data import BINARY, NAMES, PYTHON, Explosive, publish, python_version, write_binary, write_python

from flexifed.config import CellConfig, ModelConfig, PartitionConfig, TrainingConfig
from flexifed.data import cifar10, find_dataset, open_dataset
from flexifed.errors import DataError, ResultsError
from flexifed.federation.cell import make_shards
from flexifed.federation.checkpoint import MANIFEST, Checkpoints, read_tensors
from flexifed.federation.rounds import Federation, LocalHosts

FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
LONG = settings(FUZZ, max_examples=3000)
SAMPLES = 8
Records = Mapping[str, NDArray[np.uint8]]


# Data


@pytest.fixture(scope="module")
def records(pytestconfig: pytest.Config) -> Records:
    """A few samples of each file: the first ones of the real file if there is one, else random pixels."""
    data_dir = pytestconfig.getoption("--data-dir") or os.environ.get("FLEXIFED_DATA_DIR")
    real = Path(data_dir) / BINARY if data_dir else None
    samples = {}
    for index, name in enumerate(NAMES):
        if real is not None and real.exists():
            samples[name] = np.fromfile(real / f"{name}.bin", np.uint8, SAMPLES * 3073).reshape(SAMPLES, 3073)
        else:
            samples[name] = np.random.default_rng(index).integers(0, 256, (SAMPLES, 3073), dtype=np.uint8)
            samples[name][:, 0] %= 10
    return samples


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, records: Records) -> Records:
    publish(monkeypatch, records)
    return records


def check_data(data_dir: Path, records: Records, *, intact: bool) -> None:
    """Damaged files are rejected; intact ones give the samples unchanged."""
    if not intact:
        with pytest.raises(DataError, match="is not the published set"):
            find_dataset("cifar10", data="auto", data_dir=data_dir)
        return
    dataset = open_dataset(find_dataset("cifar10", data="real", data_dir=data_dir))
    expected = np.concatenate([records[name] for name in cifar10.TRAIN_FILES])
    images, labels = dataset.train.take(np.arange(len(dataset.train)))
    assert labels.tolist() == expected[:, 0].tolist()
    assert images.numpy().tobytes() == expected[:, 1:].tobytes()


def fuzz_binary(tmp_path: Path, records: Records, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / BINARY, ignore_errors=True)
    folder = write_binary(tmp_path, records)
    name = data.draw(st.sampled_from(NAMES), "file")
    before = (folder / f"{name}.bin").read_bytes()
    after = data.draw(damaged(before), "content")
    (folder / f"{name}.bin").write_bytes(after)
    check_data(tmp_path, records, intact=after == before)


def fuzz_python(tmp_path: Path, records: Records, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / PYTHON, ignore_errors=True)
    folder = write_python(tmp_path, records)
    info = cifar10.find(tmp_path)
    assert info is not None
    name = data.draw(st.sampled_from([*NAMES, "batches.meta"]), "file")
    before = python_version(records)[name]
    witness = tmp_path / "witness"
    code = pickle.dumps(Explosive(witness))
    contents = st.one_of(damaged(before), damaged(code), st.sampled_from([code, code + before, before + code]))
    after = data.draw(contents, "content")
    (folder / name).write_bytes(after)
    check_data(tmp_path, records, intact=after == before)
    if after != before:  # the file has changed since it was verified
        with pytest.raises(DataError, match="verified when the run began"):
            open_dataset(info)
    assert not witness.exists()


@FUZZ
@given(data=st.data())
def test_binary_data(tmp_path: Path, published: Records, data: st.DataObject) -> None:
    fuzz_binary(tmp_path, published, data)


@FUZZ
@given(data=st.data())
def test_python_data(tmp_path: Path, published: Records, data: st.DataObject) -> None:
    fuzz_python(tmp_path, published, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fuzz", [fuzz_binary, fuzz_python])
@LONG
@given(data=st.data())
def test_data_for_longer(tmp_path: Path, published: Records, fuzz: Any, data: st.DataObject) -> None:
    fuzz(tmp_path, published, data)


# Checkpoints

RUN_ID = "0123456789abcdef"
CONFIG = CellConfig(
    dataset="cifar10",
    family="vgg",
    scheme="max_common",
    model=ModelConfig(width=0.02),
    partition=PartitionConfig(num_clients=8, num_shards=2000, windows_per_shard=1),
    training=TrainingConfig(local_epochs=1),
)


def federation() -> Federation:
    info = find_dataset("cifar10", data="synthetic", data_dir=Path("nowhere"))
    return Federation(CONFIG, info, LocalHosts(CONFIG, info, make_shards(CONFIG, info), clients_per_host=4))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two committed checkpoints of a small cell, written as a run writes them."""
    root = tmp_path_factory.mktemp("cell") / "checkpoints"
    checkpoints, running = Checkpoints(root, RUN_ID), federation()
    for _ in range(2):
        running.play_round()
        checkpoints.commit(running.next_round, running.save(checkpoints.begin(running.next_round)))
    return root


@pytest.fixture
def root(tmp_path: Path, written: Path) -> Path:
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def resumed_round(root: Path) -> int | None:
    """The next round of the checkpoint that a run would resume from, all of whose tensors must be readable."""
    notes: list[str] = []
    checkpoint = Checkpoints(root, RUN_ID).latest(notes.append)
    if checkpoint is None:
        return None
    for name in checkpoint.files:
        assert read_tensors(checkpoint.folder / name)
    assert all("is skipped" in note for note in notes)
    return checkpoint.next_round


def fuzz_checkpoint(root: Path, written: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in (written / "round-000002").iterdir())), "file")
    path = root / "round-000002" / name
    before = (written / "round-000002" / name).read_bytes()
    after = data.draw(damaged(before), "content")
    path.write_bytes(after)
    resumed = resumed_round(root)
    path.write_bytes(before)
    if name == MANIFEST and resumed == 2:  # whitespace may have changed, but not the content
        assert json.loads(after)["content"] == json.loads(before)["content"]
    else:
        assert resumed == (2 if after == before else 1)


@FUZZ
@given(data=st.data())
def test_checkpoints(root: Path, written: Path, data: st.DataObject) -> None:
    fuzz_checkpoint(root, written, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(data=st.data())
def test_checkpoints_for_longer(root: Path, written: Path, data: st.DataObject) -> None:
    fuzz_checkpoint(root, written, data)


def signed(content: object) -> str:
    """A manifest with a correct checksum of its content."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digest, "content": content})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FILE_NAMES = st.sampled_from(["../round-000001/manifest.json", "/dev/zero", "pipe", ".", "", "shared.safetensors"])
MANIFESTS = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "run_id": st.just(RUN_ID) | JSON,
            "next_round": st.sampled_from([2, 2.0, True, -1, 10**30, "2", None]),
            "files": st.dictionaries(FILE_NAMES, st.text(max_size=4) | JSON, min_size=1, max_size=3) | JSON,
        }
    ),
)


@FUZZ
@given(manifest=MANIFESTS)
def test_a_manifest_with_arbitrary_content(root: Path, manifest: object) -> None:
    """Devices and pipes are not opened, as reading them would never end."""
    folder = root / "round-000002"
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    (folder / MANIFEST).write_text(signed(manifest))
    lists_no_files = isinstance(manifest, dict) and manifest.get("files") == {} and manifest.get("next_round") == 2
    assert resumed_round(root) == 1 or lists_no_files


def test_a_deeply_nested_manifest(root: Path) -> None:
    for nested in ("[" * 200_000, '{"sha256": "", "content": ' + "[" * 200_000):
        (root / "round-000002" / MANIFEST).write_text(nested)
        assert resumed_round(root) == 1


@FUZZ
@given(manifest=JSON)
def test_a_manifest_without_a_checksum(root: Path, manifest: object) -> None:
    (root / "round-000002" / MANIFEST).write_text(json.dumps(manifest))
    assert resumed_round(root) == 1


@FUZZ
@given(data=st.data())
def test_tensors_that_match_a_forged_manifest(root: Path, written: Path, data: st.DataObject) -> None:
    """A manifest with a forged checksum does not reveal damage, so the reader itself must cope with any content."""
    names = [path.name for path in (written / "round-000002").glob("*.safetensors")]
    name = data.draw(st.sampled_from(sorted(names)), "file")
    before = (written / "round-000002" / name).read_bytes()
    path = root / "round-000002" / name
    path.write_bytes(data.draw(damaged(before), "content"))
    with suppress(ResultsError):
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_tensors(path).values())


def test_tensors_of_another_cell_with_a_correct_checksum(root: Path) -> None:
    folder = root / "round-000002"
    content = (folder / "clients-000000.safetensors").read_bytes()
    (folder / "shared.safetensors").write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())["content"]
    manifest["files"]["shared.safetensors"] = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_text(signed(manifest))
    checkpoint = Checkpoints(root, RUN_ID).latest(pytest.fail)
    assert checkpoint is not None
    with pytest.raises(ResultsError, match="does not hold all tensors of this cell"):
        federation().restore(checkpoint)
