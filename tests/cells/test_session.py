"""What a cell writes: its rows, its shards, its log and its TensorBoard events."""

from __future__ import annotations

import os
import struct
from contextlib import closing
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from flexifed.cells.run import CellRun
from flexifed.config import (
    CellConfig,
    ModelConfig,
    PartitionConfig,
    PlacementOptions,
    SharingConfig,
    TrainingConfig,
)
from flexifed.data import synthetic
from flexifed.errors import ResourceError, ResultsError
from flexifed.federation.cell import make_shards
from flexifed.federation.rounds import Federation, LocalHosts, RoundResult
from flexifed.orchestra.placement import place_cell
from flexifed.orchestra.trial import CellTrial, PlacedRun
from flexifed.report.runs import changed_settings, forerunner, stored_cells
from flexifed.report.study import load
from flexifed.results.runlog import RunLog
from flexifed.results.store import ResultsFolder


class Hosts(LocalHosts):
    """Hosts in this process that begin a cell when they are told to, as actors do."""

    def __init__(self, failure: Exception | None = None) -> None:
        self._failure = failure

    def begin(self, config: CellConfig, info: Any, placement: Any, shards: Any) -> None:
        if self._failure:
            raise self._failure
        super().__init__(config, info, shards)

    def shut_down(self) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path) -> CellRun:
    config = CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme="max_common",
        model=ModelConfig(width=0.02),
        partition=PartitionConfig(num_clients=8, num_shards=1000, windows_per_shard=2, max_train=8, max_test=6),
        training=TrainingConfig(local_epochs=1),
    )
    ResultsFolder(tmp_path).prepare()
    return CellRun(config=config, info=synthetic.info(), profile="test", rounds=1, results=tmp_path)


def trial(run: CellRun, hosts: Hosts) -> CellTrial:
    trial = CellTrial.__new__(CellTrial)
    trial.setup({"placed": PlacedRun(run, place_cell(run.config, PlacementOptions(), [{"CPU": 1.0}]))})
    trial._hosts = hosts  # type: ignore[assignment]
    return trial


def logged(run: CellRun) -> list[str]:
    """The lines of the log, without the date and the time."""
    lines = (ResultsFolder(run.results).run_folder(run.name) / "log.txt").read_text().splitlines()
    return [line.split(" ", 2)[2] for line in lines]


def play(run: CellRun) -> list[RoundResult]:
    """Play a cell to its end; returns what its clients measured."""
    playing, results = trial(run, Hosts()), []
    with pytest.MonkeyPatch.context() as patch:
        play_round = Federation.play_round
        patch.setattr(Federation, "play_round", lambda *a, **k: results.append(play_round(*a, **k)) or results[-1])
        while not playing.step()["done"]:
            pass
    playing.cleanup()
    return results


@pytest.mark.parametrize("clients_per_round", [None, 3])
def test_rows_are_what_was_measured_of_whom_and_on_how_many_samples(
    run: CellRun, clients_per_round: int | None
) -> None:
    run = replace(run, config=replace(run.config, sharing=SharingConfig(clients_per_round=clients_per_round)))
    results, shards = play(run), make_shards(run.config, run.info)
    rows = pd.read_parquet(ResultsFolder(run.results).rounds_file(run.name))
    assert len(rows) == len(results) * len(shards)
    assert rows["train_s"].notna().sum() == (clients_per_round or 8)
    for row in rows.to_dict("records"):
        result = results[row["round"]]
        measured = result.clients[row["client"]]
        assert measured.client == row["client"]
        for name in ("accuracy", "loss", "eval_s", "bytes_up", "bytes_down"):
            assert row[name] == getattr(measured, name), name
        for name in ("train_loss", "train_s", "train_started"):
            assert row[name] == getattr(measured, name) or (getattr(measured, name) is None and pd.isna(row[name])), (
                name
            )
        assert row["round_s"] == result.round_s
        assert row["model"] == run.config.model_name(row["client"])
        assert row["version"] == run.config.version(row["client"])
        assert (row["num_train"], row["num_test"]) == (8, 6)


def test_two_versions_and_skewed_labels_are_in_the_rows_and_in_what_reports_say(run: CellRun) -> None:
    config = replace(
        run.config,
        model=replace(run.config.model, versions=("v1", "v4")),
        partition=replace(run.config.partition, num_clients=3, dirichlet_alpha=0.5),
    )
    run = replace(run, config=config, profile="smoke")
    play(run)
    folder = ResultsFolder(run.results)
    rows = pd.read_parquet(folder.rounds_file(run.name))
    of_client = rows.groupby("client")[["version", "model"]].first()
    assert of_client["version"].tolist() == ["v1", "v4", "v1"]
    assert of_client["model"].tolist() == ["vgg11_bn", "vgg19_bn", "vgg11_bn"]
    (stored,) = stored_cells(folder)
    assert changed_settings(stored).items() >= {"model.versions": "v1 v4", "partition.dirichlet_alpha": 0.5}.items()
    (study,) = load(folder)
    assert study.summary().mean.columns.tolist() == ["v1", "v4"]
    assert "another experiment than the paper's Table 1" in study.contents()[0]
    assert forerunner(folder, config, "smoke", run.info.fingerprint) is None
    others = replace(config, model=replace(config.model, versions=None))
    found = forerunner(folder, others, "smoke", run.info.fingerprint)
    assert found is not None
    assert found[1] == "model.versions v1 v4 -> None"

    damaged = folder.rounds_file(run.name)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert forerunner(folder, others, "smoke", run.info.fingerprint) is None


def test_the_samples_of_each_client_are_stored(run: CellRun) -> None:
    play(run)
    stored = pd.read_parquet(ResultsFolder(run.results).run_folder(run.name) / "shards.parquet")
    for client, shards in enumerate(make_shards(run.config, run.info)):
        for split, indices in (("train", shards.train), ("test", shards.test)):
            rows = stored[(stored["client"] == client) & (stored["split"] == split)]
            assert rows["index"].tolist() == indices.tolist()


def read_events(folder: Path) -> list[Event]:
    """TensorBoard's records: eight bytes of length, four of its checksum, the event, and four of the event's."""
    events = []
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def test_tensorboard_shows_the_means_of_each_round_at_that_round(run: CellRun) -> None:
    results = play(run)
    events = read_events(ResultsFolder(run.results).run_folder(run.name))
    shown = {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}
    expected = {}
    for result in results:
        for version in range(4):
            accuracies = [result.clients[client].accuracy for client in (version, version + 4)]
            expected[result.round_index, f"accuracy/v{version + 1}"] = sum(accuracies) / 2
        expected[result.round_index, "seconds/round"] = result.round_s
    expected[0, "train_loss"] = sum(client.train_loss for client in results[0].clients) / 8
    assert shown == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [0]


def test_a_resumed_cell_hides_events_of_the_rounds_that_it_plays_again(tmp_path: Path) -> None:
    for step in (0, 3):
        with closing(RunLog(tmp_path)) as log:
            log.scalars({"train_loss": 1.0}, step)
    starts = [event.step for event in read_events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [0, 3], "TensorBoard drops what earlier files hold from there on"


def test_events_can_be_read_before_the_log_is_closed(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path)) as log:
        log.scalars({"train_loss": 1.0}, 0)
        assert [value.tag for event in read_events(tmp_path) for value in event.summary.value] == ["train_loss"]


def test_a_line_is_on_the_disk_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), synced.append(descriptor)))

    class HalfFull(FileIO):
        def write(self, line: bytes) -> int:
            return super().write(line[: len(line) // 2])

    with closing(RunLog(tmp_path)) as log:
        log.write("first")
        assert synced == [log._file.fileno()]
        before = (tmp_path / "log.txt").read_bytes()
        log._file.close()
        log._file = HalfFull(tmp_path / "log.txt", "ab")
        with pytest.raises(ResultsError, match="No space left on device"):
            log.write("second")
    assert (tmp_path / "log.txt").read_bytes() == before


def test_the_log_says_what_happens_in_order(run: CellRun) -> None:
    play(run)
    assert [line.split()[0] for line in logged(run)] == ["begin", "all", "round", "round", "end"]


def test_a_failure_of_hosts_to_begin_is_in_the_log(run: CellRun) -> None:
    failing = trial(run, Hosts(ResourceError("their process sees none")))
    result = failing.step()
    assert result["done"]
    [report] = result["reports"]
    assert (report.state, report.reason) == ("failed", "their process sees none")
    assert [line.split()[0] for line in logged(run)] == ["begin", "failed:"]
    assert logged(run)[-1] == "failed: their process sees none"
    assert failing._log is None, "it is closed"
