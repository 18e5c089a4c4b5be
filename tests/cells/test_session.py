"""What a cell's log says, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexifed.cells.run import CellRun
from flexifed.config import CellConfig, ModelConfig, PartitionConfig, TrainingConfig
from flexifed.data import synthetic
from flexifed.errors import ResourceError
from flexifed.federation.rounds import LocalHosts
from flexifed.orchestra.placement import PlacementOptions, place_cell
from flexifed.orchestra.trial import CellTrial, PlacedRun
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
        partition=PartitionConfig(num_clients=4, num_shards=2000, windows_per_shard=1),
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


def test_the_log_says_what_happens_in_order(run: CellRun) -> None:
    playing = trial(run, Hosts())
    while not playing.step()["done"]:
        pass
    playing.cleanup()
    assert [line.split()[0] for line in logged(run)] == ["begin", "all", "round", "round", "end"]


def test_a_failure_of_hosts_to_begin_is_in_the_log(run: CellRun) -> None:
    failing = trial(run, Hosts(ResourceError("their process sees none")))
    result = failing.step()
    assert result["done"]
    assert (result["report"].state, result["report"].reason) == ("failed", "their process sees none")
    assert [line.split()[0] for line in logged(run)] == ["begin", "failed:"]
    assert logged(run)[-1] == "failed: their process sees none"
    assert failing._log is None, "it is closed"
