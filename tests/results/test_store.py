"""Rows on the disk: what a file holds, that it is complete at any moment, and what a run is known by."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from copy import copy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexifed.cells.run import CellRun
from flexifed.config import CellConfig, CellName, ModelConfig, PlacementOptions
from flexifed.data import synthetic
from flexifed.errors import ResultsError
from flexifed.grid import GridOptions
from flexifed.request import GridRequest
from flexifed.results.rounds_file import RoundsWriter, read_metadata, read_summary
from flexifed.results.schema import SCHEMA
from flexifed.results.store import ResultsFolder
from flexifed.results.tables import write_table

REQUIRED = [
    "run_id",
    "dataset",
    "data_source",
    "family",
    "scheme",
    "seed",
    "profile",
    "round",
    "client",
    "version",
    "model",
    "accuracy",
    "loss",
    "train_loss",
    "num_train",
    "num_test",
    "bytes_up",
    "bytes_down",
    "train_s",
    "eval_s",
    "round_s",
    "device",
]
CONFIG = CellConfig(dataset="cifar10", family="vgg", scheme="standalone")
REST: dict[str, Any] = {"profile": "quick", "rounds": 6, "results": Path("results")}


def row(round_index: int, client: int = 0, **changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "run_id": "0123456789abcdef",
        "dataset": "cifar10",
        "data_source": "synthetic",
        "family": "vgg",
        "scheme": "max_common",
        "seed": 0,
        "profile": "smoke",
        "round": round_index,
        "client": client,
        "version": "v1",
        "model": "vgg11_bn",
        "accuracy": 0.5,
        "loss": 1.25,
        "train_loss": 2.5,
        "num_train": 100,
        "num_test": 20,
        "bytes_up": 7,
        "bytes_down": 7,
        "train_s": 0.1,
        "train_started": 1.7e9,
        "eval_s": 0.01,
        "round_s": 0.2,
        "device": "cpu",
        "actor": 0,
    }
    return values | changes


@pytest.fixture
def folder(tmp_path: Path) -> ResultsFolder:
    results = ResultsFolder(tmp_path / "table1")
    results.prepare()
    return results


def written(folder: ResultsFolder, cell: str, rounds: int) -> RoundsWriter:
    """The writer of a cell whose file has this many rounds of two clients."""
    writer = RoundsWriter(folder.rounds_file(cell), {"run_id": cell})
    for index in range(rounds):
        writer.append([row(index, client) for client in range(2)])
    writer.flush()
    return writer


# ----------------------------------------------------------------------------------------------------------- columns


def test_a_file_has_the_columns_that_readers_rely_on_with_their_types(folder: ResultsFolder) -> None:
    writer = RoundsWriter(folder.rounds_file("one"), {})
    writer.append([row(0), row(1, train_loss=None, train_s=None, train_started=None)])
    schema = pq.read_schema(folder.rounds_file("one"))
    assert schema.equals(SCHEMA)
    assert set(REQUIRED) <= set(schema.names)
    frame = pd.read_parquet(folder.rounds)
    assert frame[REQUIRED].iloc[0].to_dict() == {name: row(0)[name] for name in REQUIRED}
    assert list(frame["train_loss"].isna()) == [False, True]
    kinds = frame.dtypes.map(lambda dtype: dtype.kind)
    assert set(kinds[["accuracy", "loss", "train_loss", "train_s", "eval_s", "round_s"]]) == {"f"}
    assert set(kinds[["seed", "round", "client", "num_train", "num_test", "bytes_up", "bytes_down"]]) == {"i"}


def test_only_measurements_of_training_are_nullable() -> None:
    assert {field.name for field in SCHEMA if field.nullable} == {"train_loss", "train_s", "train_started"}


@pytest.mark.parametrize("name", ["accuracy", "run_id", "round"])
def test_a_row_without_a_required_value_is_not_written(folder: ResultsFolder, name: str) -> None:
    writer = RoundsWriter(folder.rounds_file("one"), {})
    with pytest.raises(ValueError, match=name):
        writer.append([row(0, **{name: None})])
    assert not folder.rounds_file("one").exists()


# ---------------------------------------------------------------------------------------------- complete at any moment


def test_rows_of_all_cells_are_read_with_one_call_while_other_files_are_being_written(folder: ResultsFolder) -> None:
    assert pd.read_parquet(folder.rounds).empty
    written(folder, "one", rounds=3)
    written(folder, "two", rounds=2)
    (folder.rounds / ".two.parquet.123").write_bytes(b"PAR1 half a file")
    (folder.rounds / ".three.parquet.123").write_bytes(b"")
    rows = pd.read_parquet(folder.rounds)
    assert sorted(rows["round"]) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert len(folder.read(["one", "two", "no such cell"])) == 10
    assert len(folder.read(["two"])) == 4


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.rounds_file("cell")
    written(folder, "cell", 3).flush()
    before = path.read_bytes()
    written(folder, "cell", 40).flush()
    newer = path.with_suffix(".new")
    os.replace(path, newer)
    path.write_bytes(before)
    open_file = pa.OSFile

    def open_and_replace(name: str) -> pa.OSFile:
        file = open_file(name)
        os.replace(newer, path)
        return file

    monkeypatch.setattr(pa, "OSFile", open_and_replace)
    assert folder.rows_before("cell", 100).num_rows == 2 * 3
    monkeypatch.undo()
    assert not newer.exists()
    assert folder.rows_before("cell", 100).num_rows == 2 * 40


def test_every_append_that_writes_leaves_all_rows_so_far(folder: ResultsFolder) -> None:
    writer = RoundsWriter(folder.rounds_file("one"), {})
    for index in range(3):
        writer.append([row(index)])
        writer.flush()
        assert list(pd.read_parquet(folder.rounds)["round"]) == [*range(index + 1)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_slow_writes_become_rarer_and_the_last_flush_writes_all_rows(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()

    def slow(path: Path, table: Any) -> None:
        clock.now += 1
        write_table(path, table)

    monkeypatch.setattr("flexifed.results.rounds_file.time.monotonic", clock)
    monkeypatch.setattr("flexifed.results.rounds_file.write_table", slow)
    writer = RoundsWriter(folder.rounds_file("one"), {})
    seen = []
    for index in range(200):
        writer.append([row(index)])
        clock.now += 1
        seen.append(folder.last_round("one"))
    assert seen == [0] * 100 + [100] * 100, "a second of writing, then a hundred seconds of other work"
    writer.flush()
    assert len(folder.read(["one"])) == 200


def test_a_round_takes_no_more_memory_than_its_rows(folder: ResultsFolder) -> None:
    writer = RoundsWriter(folder.rounds_file("one"), {})
    writer.append([row(0)])
    writer._write_after = float("inf")
    before = pa.total_allocated_bytes()
    rounds = 1000
    for index in range(1, rounds):
        writer.append([row(index, client) for client in range(4)])
    assert (pa.total_allocated_bytes() - before) / rounds < 4 * 400
    assert len(writer._rows) < 100
    writer.flush()
    assert len(folder.read(["one"])) == 4 * (rounds - 1) + 1


def test_a_longer_file_is_kept_until_there_are_as_many_rounds(folder: ResultsFolder) -> None:
    written(folder, "one", rounds=3)
    writer = RoundsWriter(folder.rounds_file("one"), {}, at_least=folder.last_round("one"))
    lengths = []
    for index in range(4):
        writer.append([row(index)])
        writer._write_after = 0
        lengths.append(len(folder.read(["one"])))
    assert lengths == [6, 6, 3, 4], "three rounds of two clients, until there are three rounds of one client"


def failing(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "pyarrow.parquet.write_table"])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    writer = written(folder, "one", rounds=2)
    before = folder.rounds_file("one").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(step, failing(OSError(28, "No space left on device")))
        with pytest.raises(ResultsError) as caught:
            writer.flush()
    assert str(caught.value) == (
        f"can't write {folder.rounds_file('one')}: No space left on device; make room or fix the folder, "
        "then run the same command again"
    )
    assert folder.rounds_file("one").read_bytes() == before
    assert [path.name for path in folder.rounds.iterdir()] == ["one.parquet"]
    writer.append([row(2)])
    writer.flush()
    assert folder.last_round("one") == 2


def test_an_interrupted_write_leaves_no_other_file(folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = written(folder, "one", rounds=2)
    monkeypatch.setattr("pyarrow.parquet.write_table", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        writer.flush()
    assert [path.name for path in folder.rounds.iterdir()] == ["one.parquet"]


def test_a_flipped_bit_raises_an_error_or_changes_nothing(folder: ResultsFolder) -> None:
    written(folder, "one", rounds=20)
    path, whole = folder.rounds_file("one"), folder.rows_before("one", 20)
    content = path.read_bytes()
    errors = 0
    for place in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert folder.rows_before("one", 20).equals(whole), place
        except ResultsError:
            errors += 1
    assert errors > len(content) / 20


def test_a_file_is_flushed_to_disk_before_it_replaces_the_old_one(
    folder: ResultsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (steps.append("fsync"), fsync(file)))
    monkeypatch.setattr(
        os, "replace", lambda old, new: (steps.append(Path(old).name[0] + " replaced"), rename(old, new))
    )
    write_table(folder.rounds_file("one"), SCHEMA.empty_table())
    assert steps == ["fsync", ". replaced", "fsync"], "the file, then its name"


def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResultsError) as caught:
        ResultsFolder(tmp_path / "file" / "table1").prepare()
    assert str(caught.value) == (
        f"can't write results to {tmp_path / 'file' / 'table1'}: Not a directory; choose another --results-dir"
    )


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not parquet at all"])
@pytest.mark.parametrize("read", [ResultsFolder.last_round, lambda folder, cell: folder.read([cell])])
def test_a_damaged_file_is_an_error_with_the_remedy(folder: ResultsFolder, damage: bytes, read: Any) -> None:
    folder.rounds_file("one").write_bytes(damage)
    with pytest.raises(ResultsError, match=r"can't read .*one\.parquet: .*; move it away, and its cell is run again"):
        read(folder, "one")


def test_a_cell_without_a_file_has_no_last_round(folder: ResultsFolder) -> None:
    assert folder.last_round("one") is None


def test_metadata_are_stored_and_can_be_added_to(folder: ResultsFolder) -> None:
    metadata = {"config": {"seed": 3, "model": {"width": 0.5}}, "versions": {"torch": "x"}, "name": "Ünïcode"}
    writer = RoundsWriter(folder.rounds_file("one"), metadata)
    writer.append([row(0)])
    assert read_metadata(folder.rounds_file("one")) == metadata
    writer.note(state_sha256=("ab", "cd"))
    writer.flush()
    assert read_metadata(folder.rounds_file("one")) == metadata | {"state_sha256": ["ab", "cd"]}
    raw = pq.read_schema(folder.rounds_file("one")).metadata[b"flexifed"]
    assert json.loads(raw)["config"]["seed"] == 3


@pytest.mark.parametrize("metadata", [b"{broken", b"[1, 2]", b"\xff\xfe", b"7"])
def test_damaged_metadata_are_an_error_that_names_the_file(folder: ResultsFolder, metadata: bytes) -> None:
    path = folder.rounds_file("one")
    table = pa.Table.from_pylist([row(0)], schema=SCHEMA)
    write_table(path, table.replace_schema_metadata({b"flexifed": metadata}))
    for read in (read_metadata, read_summary):
        with pytest.raises(ResultsError, match=f"can't read {path}: its metadata are damaged .*; move it away"):
            read(path)


def test_rows_that_another_program_has_saved_in_other_types_are_read_alike(folder: ResultsFolder) -> None:
    for name in ("one", "two"):
        RoundsWriter(folder.rounds_file(name), {}).append([row(0)])
    before = folder.read(["one", "two"])
    table = pq.read_table(folder.rounds_file("two"))
    others = {"round": pa.int64(), "scheme": pa.large_string()}
    changed = pa.schema([pa.field(field.name, others.get(field.name, field.type)) for field in table.schema])
    pq.write_table(table.cast(changed), folder.rounds_file("two"))
    pd.testing.assert_frame_equal(folder.read(["one", "two"]), before)


@pytest.mark.parametrize("value", ["first", 0.5, None], ids=["text", "fraction", "null"])
def test_rows_of_another_kind_are_an_error_that_names_the_file(folder: ResultsFolder, value: object) -> None:
    path = folder.rounds_file("one")
    RoundsWriter(path, {}).append([row(0)])
    table = pq.read_table(path)
    spoiled = table.set_column(table.column_names.index("round"), "round", pa.array([value]))
    pq.write_table(spoiled, path)
    with pytest.raises(ResultsError, match=f"can't read {path}"):
        folder.read(["one"])


# -------------------------------------------------------------------------------------------------------------- run id


def variations(config: Any) -> Iterator[tuple[str, Any]]:
    """The config with one field changed, for every field of it and of the configs in it. Checks are passed over."""
    for field in fields(config):
        value = getattr(config, field.name)
        inner = variations(value) if is_dataclass(value) else [("", f"not {value}")]
        for name, changed in inner:
            other = copy(config)
            object.__setattr__(other, field.name, changed)
            yield f"{field.name}.{name}".rstrip("."), other


def test_every_field_of_the_config_is_in_the_run_id() -> None:
    ids = {name: config.run_id("data") for name, config in variations(CONFIG)}
    assert {"seed", "device", "model.width", "training.scoring", "sharing.reduce_block", "numerics.threads"} <= set(ids)
    assert len({*ids.values(), CONFIG.run_id("data")}) == len(ids) + 1


def test_of_the_data_only_the_fingerprint_is_in_the_run_id() -> None:
    info = synthetic.info()
    elsewhere = replace(info, location="/elsewhere", layout="python")
    others = replace(info, fingerprint="other")
    ids = [CellRun(config=CONFIG, info=one, **REST).run_id for one in (info, elsewhere, others)]
    assert ids[0] == ids[1] != ids[2]


def test_integers_and_floats_of_equal_value_give_the_same_run_id() -> None:
    one, same = (replace(CONFIG, model=ModelConfig(width=width)) for width in (1, 1.0))
    assert one.run_id("data") == same.run_id("data")


@pytest.mark.parametrize(
    "option",
    [
        {"profile": "paper"},
        {"rounds": 77},
        {"results_dir": Path("elsewhere")},
        {"data_dir": Path("elsewhere")},
        {"address": "auto"},
        {"placement": PlacementOptions(gpus_per_client=0.5)},
        {"placement": PlacementOptions(clients_per_actor=4)},
        {"placement": PlacementOptions(streams=2)},
        {"placement": PlacementOptions(cuda_ipc=False)},
        {"max_concurrent": 1},
        {"only": ("*/*/standalone",)},
        {"seeds": (0, 1)},
    ],
    ids=str,
)
def test_options_that_change_no_number_are_not_in_the_run_id(option: dict[str, Any]) -> None:
    name = CellName("cifar10", "vgg", "standalone")
    infos = {"cifar10": synthetic.info()}
    requests = [
        GridRequest(options, [name], infos, ResultsFolder(options.results_dir.absolute()))
        for options in (GridOptions(), GridOptions(**option))
    ]
    plain, other = (request.runs_for("cpu")[0] for request in requests)
    assert (plain.run_id, plain.name) == (other.run_id, other.name)
    assert plain.run_id in plain.name


def test_a_machine_that_does_not_see_the_folder_says_so_and_creates_none(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path / "shared" / "table1")
    with pytest.raises(ResultsError, match=f"{platform.node()} does not see {folder.root}.*FLEXIFED_RESULTS_DIR"):
        folder.check_shared()
    assert not folder.root.exists()
    folder.prepare()
    folder.check_shared()
