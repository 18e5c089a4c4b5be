"""Lost processes, lost nodes and stops while a command runs: the numbers stay those of an undisturbed run."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from test_resume import TIMINGS, cell, checkpoints, digests, log, play, rows

from flexifed.cells.run import CellRun
from flexifed.config import CellConfig, PlacementOptions
from flexifed.data import DatasetInfo
from flexifed.errors import ClientError, DeviceMemoryError
from flexifed.federation.checkpoint import MANIFEST
from flexifed.federation.rounds import LocalHosts
from flexifed.orchestra import cluster
from flexifed.orchestra.actors import ActorHosts, GroupLostError, LostError
from flexifed.orchestra.client_actor import ClientActor, device_memory_explained
from flexifed.orchestra.ledger import CellReport, Ledger
from flexifed.orchestra.lending import Lending
from flexifed.orchestra.placement import CellPlacement, Resources, place_cell
from flexifed.orchestra.sweep import _make_scratch, _stop_files, run_grid
from flexifed.orchestra.trial import CellTrial, PlacedRun
from flexifed.results.store import ResultsFolder

ROOT = Path(__file__).parents[2]
Hook = Callable[[], None]


class RecordingObserver:
    """An observer that records its calls."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rounds: list[int | None] = []

    def cell_started(self, name: str) -> None: ...

    def reported(self, report: CellReport) -> None:
        self.rounds.append(report.round_index)

    def noted(self, message: str, name: str | None = None) -> None:
        self.notes.append(message)


def run_cells(
    runs: list[CellRun], options: PlacementOptions, observer: RecordingObserver, **grid_options: bool
) -> dict[str, str]:
    def place(run: CellRun, nodes: object) -> CellPlacement:
        return place_cell(run.config, options, nodes)  # type: ignore[arg-type]

    for run in runs:
        ResultsFolder(run.results).prepare()
    nodes: list[Resources] = cluster.nodes()
    return run_grid([PlacedRun(run, place(run, nodes)) for run in runs], observer, place=place, **grid_options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> CellRun:
    run = cell(tmp_path_factory.mktemp("undisturbed"))
    play(run)
    return run


def assert_equal(run: CellRun, undisturbed: CellRun) -> None:
    dropped = [*TIMINGS, "actor"]
    pd.testing.assert_frame_equal(rows(run).drop(columns=dropped), rows(undisturbed).drop(columns=dropped))
    assert digests(run) == digests(undisturbed)


# ------------------------------------------------------------------------------------------ a trial without Ray


class BrittleHosts:
    """Replaces `ActorHosts`: computes in process, and each of the calls in `failing` fails once."""

    failing: ClassVar[list[tuple[str, int, Exception]]] = []
    alive: ClassVar[int] = 0
    exchange = "in process"

    def __init__(self, group: object) -> None:
        BrittleHosts.alive += 1
        self._calls: Counter[str] = Counter()

    def begin(self, config: CellConfig, info: DatasetInfo, placement: CellPlacement, shards: Sequence[Any]) -> None:
        self._inner = LocalHosts(config, info, shards, len(placement.clients[0]))
        self.clients = self._inner.clients
        self._fail("begin")

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            self._fail(name)
            return getattr(self._inner, name)(*args, **options)

        return call

    def _fail(self, name: str) -> None:
        self._calls[name] += 1
        for fault in BrittleHosts.failing:
            if fault[:2] == (name, self._calls[name]):
                BrittleHosts.failing.remove(fault)
                raise fault[2]

    def shut_down(self) -> None:
        BrittleHosts.alive -= 1


def test_a_full_gpu_is_found_behind_the_error_that_it_led_to() -> None:
    def recording() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(DeviceMemoryError, match="client 3, starting: CUDA out of memory"):  # noqa: SIM117
        with device_memory_explained([3], "starting"):
            recording()
    with pytest.raises(RuntimeError, match=r"^something else$"), device_memory_explained([3], "starting"):
        raise RuntimeError("something else")


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Callable[[CellRun], CellTrial]:
    monkeypatch.setattr("flexifed.orchestra.trial.ActorHosts", BrittleHosts)
    monkeypatch.setattr("ray.util.get_current_placement_group", lambda: "a group")
    monkeypatch.setattr("flexifed.orchestra.cluster.nodes", lambda: [{"CPU": 4, "GPU": 1}])
    BrittleHosts.failing, BrittleHosts.alive = [], 0

    def make(run: CellRun) -> CellTrial:
        cell_trial = CellTrial.__new__(CellTrial)
        placement = CellPlacement(clients=((0, 1), (2, 3)), cpus_per_actor=1, gpus_per_actor=0.5)
        cell_trial.setup({"placed": PlacedRun(run, placement)})
        return cell_trial

    return make


def step_to_end(trial: CellTrial) -> list[CellReport]:
    reports: list[CellReport] = []
    while not reports or not reports[-1].is_over_for_now:
        reports += trial.step()["reports"]
    trial.cleanup()
    assert BrittleHosts.alive == 0
    return reports


@pytest.mark.parametrize(
    ("call", "count", "resumed_round"),
    [
        ("begin", 1, 0),
        ("play_round", 4, 2),
        ("save", 1, 0),
        ("save", 2, 2),
        ("state_sha256", 1, 5),
    ],
)
def test_a_cell_that_is_lost_begins_again_from_its_last_checkpoint(
    tmp_path: Path,
    trial: Callable[[CellRun], CellTrial],
    call: str,
    count: int,
    resumed_round: int,
    undisturbed: CellRun,
) -> None:
    BrittleHosts.failing = [(call, count, LostError("a process is gone: why"))]
    run = cell(tmp_path / "lost")
    reports = step_to_end(trial(run))
    index = [report.state for report in reports].index("lost")
    assert reports[index].reason == "a process is gone: why"
    assert [report.state for report in reports].count("lost") == 1
    assert [report.round_index for report in reports[index + 1 :]] == [*range(resumed_round, run.rounds + 1)]
    assert (f"resuming with round {resumed_round}" in log(run)) == (resumed_round > 0)
    assert reports[-1].state == "finished"
    assert_equal(run, undisturbed)


@pytest.mark.parametrize(
    ("step_s", "expected"),
    [(0.0, [[0], [1], [2], [None], [2], [3], [4], [5]]), (600.0, [[0, 1, 2, None], [2, 3, 4, 5]])],
)
def test_a_step_plays_rounds_for_its_time_and_ends_with_a_loss(
    tmp_path: Path,
    trial: Callable[[CellRun], CellTrial],
    monkeypatch: pytest.MonkeyPatch,
    step_s: float,
    expected: list[list[int | None]],
) -> None:
    monkeypatch.setattr("flexifed.orchestra.trial.STEP_S", step_s)
    BrittleHosts.failing = [("play_round", 4, LostError("a process is gone: why"))]
    run = cell(tmp_path / "lost")
    steps, playing = [], trial(run)
    while not steps or not steps[-1][-1].is_over_for_now:
        steps.append(playing.step()["reports"])
    playing.cleanup()
    assert [[report.round_index for report in reports] for reports in steps] == expected
    reports = [report for reports in steps for report in reports]
    assert [report.at for report in reports] == sorted(report.at for report in reports)


def test_the_user_hears_once_that_a_checkpoint_is_damaged(
    tmp_path: Path, trial: Callable[[CellRun], CellTrial], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cell(tmp_path / "damaged")
    with monkeypatch.context() as patch:
        patch.setattr("flexifed.orchestra.trial.STEP_S", 0.0)
        stopped = trial(run)
        for _ in range(4):
            stopped.step()
        stopped.cleanup()
    (checkpoints(run) / "round-000004" / MANIFEST).write_bytes(b"{}")
    observer = RecordingObserver()
    ledger = Ledger(observer, {run.name: tmp_path})
    for report in step_to_end(trial(run)):
        ledger.heard(report)
    [note] = observer.notes
    assert note.startswith("checkpoint round-000004 is skipped")
    assert "resuming with round 2" in log(run)


def test_a_cell_that_lost_its_placement_group_is_left_to_tune(
    tmp_path: Path, trial: Callable[[CellRun], CellTrial], undisturbed: CellRun
) -> None:
    BrittleHosts.failing = [("begin", 1, GroupLostError("a node is gone"))]
    run = cell(tmp_path / "lost")
    first = trial(run)
    with pytest.raises(GroupLostError):
        first.step()
    assert BrittleHosts.alive == 0
    assert step_to_end(trial(run))[-1].state == "finished"
    assert_equal(run, undisturbed)


def test_the_stop_file_of_a_killed_command_is_removed(tmp_path: Path) -> None:
    file = ResultsFolder(cell(tmp_path).results).stop_file
    file.touch()
    with _stop_files({file}, lambda: False, RecordingObserver()) as stopping:
        assert not file.exists()
        assert not stopping()


def test_files_of_killed_commands_in_tmp_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    for name in (f"{ended.pid}-left", "1-anothers", "oldname"):
        (tmp_path / f"flexifed-tune-{name}").mkdir()
    first = _make_scratch()
    assert _make_scratch() != first, "a command may have several"
    remaining = {path.name.removeprefix("flexifed-tune-").split("-")[0] for path in tmp_path.iterdir()}
    assert remaining == {"1", "oldname", str(os.getpid())}


def test_a_cell_stops_after_its_round_and_none_begins(
    tmp_path: Path, trial: Callable[[CellRun], CellTrial], undisturbed: CellRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cell(tmp_path / "stopped")
    stopped = trial(run)
    with monkeypatch.context() as patch:
        patch.setattr("flexifed.orchestra.trial.STEP_S", 0.0)
        [report] = stopped.step()["reports"]
    assert report.state == "playing"
    ResultsFolder(run.results).stop_file.touch()
    [report] = step_to_end(stopped)
    assert (report.state, report.round_index) == ("stopped", 1)
    assert (checkpoints(run) / "round-000002").exists()
    assert [report.round_index for report in step_to_end(trial(run))] == [None]
    ResultsFolder(run.results).stop_file.unlink()
    assert [report.round_index for report in step_to_end(trial(run))] == [2, 3, 4, 5]
    assert_equal(run, undisturbed)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DeviceMemoryError("client 3, round 1, training: out of memory"), "client 3, round 1, training: out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "the driver: CUDA out of memory",
        ),
    ],
)
def test_a_cell_out_of_memory_names_a_placement_with_more(
    tmp_path: Path, trial: Callable[[CellRun], CellTrial], error: Exception, message: str
) -> None:
    BrittleHosts.failing = [("play_round", 2, error)]
    run = cell(tmp_path / "full")
    report = step_to_end(trial(run))[-1]
    assert report.state == "out_of_memory"
    assert report.roomier == CellPlacement(clients=((0, 1, 2, 3),), cpus_per_actor=1, gpus_per_actor=1.0)
    assert report.reason == (
        f"{message}; a GPU had up to 4 clients of this cell, in 2 processes; "
        "ask for --gpus-per-client 0.25 --clients-per-actor 4, or let --retry-out-of-memory do so"
    )
    assert report.reason in log(run)


def test_a_driver_whose_gpu_is_broken_leaves_the_cell_to_another_process(
    tmp_path: Path, trial: Callable[[CellRun], CellTrial], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`\n")
    BrittleHosts.failing = [("play_round", 2, error)]
    monkeypatch.setattr("flexifed.orchestra.trial.has_broken_gpu", lambda: True)
    monkeypatch.setattr("flexifed.orchestra.trial.STEP_S", 600.0)  # so that both rounds are in one step
    run = cell(tmp_path / "broken")
    broken = trial(run)
    with pytest.raises(
        GroupLostError, match=r"can't use its GPU any more: CUDA error: unc[a-z]+ ECC error encountered$"
    ):
        broken.step()
    assert BrittleHosts.alive == 0
    assert "failed" not in log(run), "the cell continues"


def test_actors_are_ended_even_if_the_drivers_gpu_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    killed: list[str] = []
    hosts = ActorHosts.__new__(ActorHosts)
    hosts._actors, hosts._transport = ["one", "other"], Lending(torch.device("cpu"))
    monkeypatch.setattr("flexifed.orchestra.lending.collect", broken)
    monkeypatch.setattr(ray, "kill", killed.append)
    hosts.shut_down()
    assert killed == ["one", "other"]


# ------------------------------------------------------------------------------------------------------ out of memory


class FailingHost:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def play_round(self, *_: object, **__: object) -> None:
        raise ClientError(3, 1, "training", "a long traceback") from self._error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ..."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ArithmeticError("the loss is nan"), False),
    ],
)
def test_a_full_device_is_told_from_other_failures(error: Exception, full: bool) -> None:
    actor = ClientActor()
    actor._host = FailingHost(error)  # type: ignore[assignment]
    reason = str(error).splitlines()[0].split(". ")[0] if full else "a long traceback"
    with pytest.raises(DeviceMemoryError if full else ClientError) as raised:
        actor.play_round(1, True)
    assert str(raised.value) == f"client 3, round 1, training: {reason}"


def needs_half_a_gpu() -> Hook:
    """A hook for every worker: training is out of memory on less than half a GPU."""

    def hook() -> None:  # nested, so that it travels by value
        import torch

        from flexifed.federation import client

        train = client.train

        def failing_train(*args: object, **options: object) -> float:
            if ray.get_runtime_context().get_assigned_resources()["GPU"] < 0.5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
            return train(*args, **options)  # type: ignore[arg-type]

        client.train = failing_train

    return hook


@pytest.fixture
def one_gpu() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": needs_half_a_gpu()},
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("one_gpu")
def test_out_of_memory_names_the_share_to_ask_for_or_asks_for_it(tmp_path: Path, undisturbed: CellRun) -> None:
    run, observer = cell(tmp_path / "full"), RecordingObserver()
    options = PlacementOptions(gpus_per_client=0.25, clients_per_actor=1)
    [reason] = run_cells([run], options, observer).values()
    _, message = reason.split(", ", 1)  # without the client's number, which may be any
    assert message == (
        "round 0, training: CUDA out of memory; a GPU had up to 4 clients of this cell, in 4 processes; "
        "ask for --gpus-per-client 0.25 --clients-per-actor 2, or let --retry-out-of-memory do so"
    )
    assert run_cells([run], options, observer, retry_out_of_memory=True) == {}
    assert "to be tried again: 2 actors of up to 2 clients, each 1 CPU and 0.5 GPU" in observer.notes[-1]
    assert_equal(run, undisturbed)


# -------------------------------------------------------------------------------------------------------------- nodes


def hold_second_round(markers: Path, go_on: Path) -> Hook:
    """A hook for every worker: its second training waits, so that a test can remove its node in the middle of it."""

    def hook() -> None:  # nested, so that it travels by value
        import time

        from flexifed.federation import client

        train, calls = client.train, []

        def waiting_train(*args: object, **options: object) -> float:
            calls.append(1)
            if len(calls) == 2:
                (markers / ray.get_runtime_context().get_node_id()).touch()
                while not go_on.exists():
                    time.sleep(0.05)
            return train(*args, **options)  # type: ignore[arg-type]

        client.train = waiting_train

    return hook


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("clients_per_actor", [2, 1], ids=["room is left", "to be placed again"])
def test_a_node_that_goes_in_the_middle_of_a_round_changes_no_number(
    tmp_path: Path, clients_per_actor: int, undisturbed: CellRun
) -> None:
    markers, go_on = tmp_path / "markers", tmp_path / "go-on"
    markers.mkdir()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    workers = {worker.node_id: worker for worker in (nodes.add_node(num_cpus=2) for _ in range(2))}
    try:
        ray.init(
            address=nodes.address,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": hold_second_round(markers, go_on)},
        )
        nodes.wait_for_nodes()

        def remove() -> None:
            while not (training := {path.name for path in markers.iterdir()} & set(workers)):
                time.sleep(0.05)
            nodes.remove_node(workers[min(training)], allow_graceful=False)
            go_on.touch()

        thread = threading.Thread(target=remove, daemon=True)
        thread.start()
        run, observer = cell(tmp_path / "lost"), RecordingObserver()
        options = PlacementOptions(clients_per_actor=clients_per_actor)
        assert run_cells([run], options, observer) == {}
        thread.join()
        assert [note for note in observer.notes if "all its clients go back to the last checkpoint" in note]
        assert bool([note for note in observer.notes if "cells continue in new placements" in note]) == (
            clients_per_actor == 1
        )
        assert_equal(run, undisturbed)
    finally:
        ray.shutdown()
        nodes.shutdown()


# ----------------------------------------------------------------------------------------------------- asked to stop


def test_a_cell_that_is_asked_to_stop_commits_its_last_round(tmp_path: Path, undisturbed: CellRun) -> None:
    run = cell(tmp_path / "stopped")
    play(run, 3, stop=True)
    before = rows(run)
    assert sorted(folder.name for folder in checkpoints(run).iterdir()) == ["round-000002", "round-000003"]
    play(run)
    assert "resuming with round 3, from round-000003" in log(run)
    pd.testing.assert_frame_equal(rows(run).head(len(before)), before)
    assert_equal(run, undisturbed)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["once", "terminated", "twice"]
)
def test_a_command_that_is_asked_to_stop_leaves_a_checkpoint_and_no_process(
    tmp_path: Path, signals: list[signal.Signals]
) -> None:
    arguments = [
        "--profile",
        "smoke",
        "--data",
        "synthetic",
        "--only",
        "cifar10/vgg/max_common",
        "--only",
        "cifar10/vgg/standalone",
    ]
    twice = len(signals) == 2
    arguments += ["--rounds", "400", "--local-epochs", "40" if twice else "1", "--results-dir", str(tmp_path)]
    command = psutil.Popen(
        [sys.executable, str(ROOT / "experiments" / "table1.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not (logs := [*tmp_path.glob("table1/runs/*/log.txt")]) or " round 0/400 " not in logs[0].read_text():
        assert command.poll() is None, command.stdout.read()
        time.sleep(0.1)
    processes = command.children(recursive=True)
    assert processes
    for number in signals:
        if number == signal.SIGINT:  # a terminal sends it to all
            os.killpg(command.pid, number)
        else:
            command.send_signal(number)
        time.sleep(1.0)  # signals that come faster count as one
    output = command.communicate()[0]
    assert command.returncode == 130
    assert "run the same command again" in output
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
    assert "Traceback" not in output
    folder = ResultsFolder(tmp_path / "table1")
    assert not folder.stop_file.exists()
    [name] = [path.stem for path in folder.rounds.glob("*.parquet")]  # the other cell was not begun
    run_folder = folder.run_folder(name)
    assert "stopping after the round" in output
    assert ("stopped as requested" in (run_folder / "log.txt").read_text()) == (not twice)
    if not twice:
        committed = [path.name for path in (run_folder / "checkpoints").iterdir()]
        assert committed == [f"round-{(folder.last_round(name) or 0) + 1:06d}"]


# -------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_kills_at_random_change_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks" / "kills.py"))["main"]
    arguments = ["--kills", "6", "--seed", "1", "--rounds", "30", "--results-dir", str(tmp_path)]
    status = main([*arguments, "--only", "cifar10/vgg/max_common", "--only", "cifar10/vgg/standalone"])
    output = capsys.readouterr().out
    assert status == 0, output
    assert len([line for line in output.splitlines() if "  kill " in line]) == 6
