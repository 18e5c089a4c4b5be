"""A cell that is stopped and resumed ends with the numbers of an undisturbed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from flexifed.cells.run import CellRun
from flexifed.cells.session import CellSession, open_log
from flexifed.cells.trained import load_clients
from flexifed.config import (
    SCHEMES,
    CellConfig,
    ModelConfig,
    NumericsConfig,
    PartitionConfig,
    PlacementOptions,
    SchemeName,
    SharingConfig,
    TrainingConfig,
)
from flexifed.core import schemes
from flexifed.data import find_dataset
from flexifed.errors import ResultsError
from flexifed.federation.cell import make_shards, state_bytes
from flexifed.federation.checkpoint import MANIFEST, SHARED, Checkpoints, read_tensors
from flexifed.federation.rounds import Federation, LocalHosts
from flexifed.orchestra import estimate
from flexifed.orchestra.placement import CellPlacement, place_cell
from flexifed.report.study import load_results
from flexifed.results.rounds_file import read_metadata
from flexifed.results.store import ResultsFolder
from flexifed.results.tables import write_table

ROUNDS = 5
TIMINGS = ["train_s", "train_started", "eval_s", "round_s"]


def cell(
    results: Path,
    scheme: SchemeName = "max_common",
    *,
    rounds: int = ROUNDS,
    keep_final: bool = True,
    clients_per_round: int | None = None,
) -> CellRun:
    config = CellConfig(
        dataset="cifar10",
        family="vgg",
        scheme=scheme,
        model=ModelConfig(width=0.02),
        partition=PartitionConfig(num_clients=4, num_shards=2000, windows_per_shard=1),
        training=TrainingConfig(local_epochs=1),
        sharing=SharingConfig(clients_per_round=clients_per_round),
    )
    info = find_dataset("cifar10", data="synthetic", data_dir=Path("nowhere"))
    ResultsFolder(results).prepare()
    return CellRun(
        config=config,
        info=info,
        profile="test",
        rounds=rounds,
        results=results,
        checkpoint_every=2,
        keep_final=keep_final,
    )


def play(run: CellRun, rounds: int | None = None, clients_per_host: int = 4, stop: bool = False) -> None:
    """Begin or resume a cell, for `rounds` rounds or to its end; only with `stop` is the session asked to stop."""
    shards = make_shards(run.config, run.info)
    with closing(open_log(run, "in process")) as log:
        session = CellSession(
            run, "in process", LocalHosts(run.config, run.info, shards, clients_per_host), shards, log
        )
        played = 0
        while played != rounds:
            played += 1
            if session.play_round().round_index == run.rounds:
                break
        if stop:
            session.stop()


def rows(run: CellRun) -> pd.DataFrame:
    return ResultsFolder(run.results).read([run.name])


def digests(run: CellRun) -> object:
    return read_metadata(ResultsFolder(run.results).rounds_file(run.name))["state_sha256"]


def log(run: CellRun) -> str:
    return (ResultsFolder(run.results).run_folder(run.name) / "log.txt").read_text()


def checkpoints(run: CellRun) -> Path:
    return ResultsFolder(run.results).run_folder(run.name) / "checkpoints"


@pytest.mark.parametrize(
    ("scheme", "clients_per_round"),
    [("standalone", None), ("basic_common", None), ("max_common", None), ("standalone", 2), ("max_common", 1)],
)
@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_stopped_cell_ends_with_the_same_numbers(
    tmp_path: Path, scheme: SchemeName, clients_per_round: int | None, stop_after: int
) -> None:
    reference = cell(tmp_path / "undisturbed", scheme, clients_per_round=clients_per_round)
    stopped = cell(tmp_path / "stopped", scheme, clients_per_round=clients_per_round)
    play(reference)
    play(stopped, stop_after)
    before = rows(stopped)
    play(stopped, clients_per_host=2)
    after = rows(stopped)
    pd.testing.assert_frame_equal(
        after.drop(columns=[*TIMINGS, "actor"]), rows(reference).drop(columns=[*TIMINGS, "actor"])
    )
    assert digests(stopped) == digests(reference)
    committed = ROUNDS if stop_after == ROUNDS else stop_after // 2 * 2
    assert (f"resuming with round {committed}" in log(stopped)) == (committed > 0)
    pd.testing.assert_frame_equal(after[after["round"] < committed], before[before["round"] < committed])
    assert [folder.name for folder in checkpoints(stopped).iterdir()] == [f"round-{ROUNDS:06d}"]


@pytest.mark.parametrize(
    ("scheme", "clients_per_round"), [("standalone", None), ("max_common", None), ("max_common", 1)]
)
@pytest.mark.parametrize("stop_after", [None, 1])
def test_more_rounds_go_on_from_where_a_finished_cell_ended(
    tmp_path: Path, scheme: SchemeName, clients_per_round: int | None, stop_after: int | None
) -> None:
    reference = cell(tmp_path / "undisturbed", scheme, clients_per_round=clients_per_round)
    short = cell(tmp_path / "raised", scheme, rounds=3, clients_per_round=clients_per_round)
    raised = cell(tmp_path / "raised", scheme, clients_per_round=clients_per_round)
    play(reference)
    play(short)
    before = rows(short)
    trained = before["train_s"].notna().groupby(before["round"]).sum()
    assert trained.tolist() == [clients_per_round or 4] * 3 + [0]
    if stop_after is not None:
        play(raised, stop_after)
    play(raised, clients_per_host=2)
    after = rows(raised)
    pd.testing.assert_frame_equal(
        after.drop(columns=[*TIMINGS, "actor"]), rows(reference).drop(columns=[*TIMINGS, "actor"])
    )
    assert digests(raised) == digests(reference)
    pd.testing.assert_frame_equal(after[after["round"] < 3], before[before["round"] < 3])
    trained = after["train_s"].notna().groupby(after["round"]).sum()
    assert trained.tolist() == [clients_per_round or 4] * ROUNDS + [0]
    scores = ["client", "accuracy", "loss"]
    assert after[after["round"] == 3][scores].equals(before[before["round"] == 3][scores])
    assert f"resuming with round {3 if stop_after is None else 4}, " in log(raised)
    assert [folder.name for folder in checkpoints(raised).iterdir()] == [f"round-{ROUNDS:06d}"]


def test_without_a_final_state_more_rounds_begin_anew_and_say_so(tmp_path: Path) -> None:
    short = cell(tmp_path, rounds=2, keep_final=False)
    play(short)
    assert not checkpoints(short).exists()
    raised = cell(tmp_path, rounds=3)
    play(raised)
    assert "there are rows but no checkpoint: starting with round 0" in log(raised)
    assert sorted(rows(raised)["round"].unique()) == [0, 1, 2, 3]


@pytest.mark.parametrize("clients_per_round", [None, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_size_of_a_state_is_known_beforehand(
    tmp_path: Path, scheme: SchemeName, clients_per_round: int | None
) -> None:
    run = replace(cell(tmp_path, scheme, clients_per_round=clients_per_round), checkpoint_every=1)
    stored = []
    for _ in range(ROUNDS):
        play(run, 1)
        newest = max(checkpoints(run).iterdir())
        stored.append(sum(tensor.nbytes for path in newest.glob("*.s*") for tensor in read_tensors(path).values()))
    assert stored == [state_bytes(run.config, run.info, next_round) for next_round in range(1, ROUNDS + 1)]
    assert stored == sorted(stored, reverse=True), "the first state is the largest"


class Clock:
    """Replaces the module `time` in sessions; rounds and checkpoints take as long as a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def takes(self, seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: object, **options: object) -> object:
            self.now += seconds
            return work(*args, **options)

        return timed


@pytest.mark.parametrize(
    ("round_s", "save_s", "expected"),
    [
        (30.0, 0.0, [2, 4, 6, 8]),
        (70.0, 0.0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (25.0, 6.0, [3]),  # and the next after 6 s / 0.03 = 200 s, eight rounds later
    ],
)
def test_checkpoints_come_by_time_and_take_a_small_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, round_s: float, save_s: float, expected: list[int]
) -> None:
    clock, committed = Clock(), []
    monkeypatch.setattr("flexifed.cells.session.time", clock)
    monkeypatch.setattr(Federation, "play_round", clock.takes(round_s, Federation.play_round))
    monkeypatch.setattr(Federation, "save", clock.takes(save_s, lambda federation, folder: {}))
    monkeypatch.setattr(Checkpoints, "commit", lambda self, next_round, files: committed.append(next_round))
    run = replace(cell(tmp_path, rounds=12), checkpoint_every=None)
    play(run, 8)
    assert committed == expected


def test_rows_are_written_before_the_checkpoint_that_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexifed.results.rounds_file._WRITE_SHARE", 1e-9)  # only the first come by themselves
    run = cell(tmp_path)
    play(run, 4)
    play(run)
    assert "resuming with round 4" in log(run)
    assert sorted(rows(run)["round"].unique()) == list(range(ROUNDS + 1))


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    run = cell(tmp_path)
    play(run, 4)
    assert sorted(folder.name for folder in checkpoints(run).iterdir()) == ["round-000002", "round-000004"]


@pytest.mark.parametrize("victim", [MANIFEST, SHARED, "clients-000000.safetensors", "shared-000000.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing"])
def test_damage_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path, victim: str, damage: str) -> None:
    run = cell(tmp_path)
    play(run, 4)
    path = checkpoints(run) / "round-000004" / victim
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:-1], "flipped": flipped, "empty": b""}[damage])
    notes: list[str] = []
    checkpoint = Checkpoints(checkpoints(run), run.run_id).latest(notes.append)
    assert checkpoint is not None
    assert checkpoint.next_round == 2
    assert [note.split(":")[0] for note in notes] == ["checkpoint round-000004 is skipped"]


def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path) -> None:
    run = cell(tmp_path)
    play(run, 3)
    notes: list[str] = []
    assert Checkpoints(checkpoints(run), "another").latest(notes.append) is None
    assert notes == [f"checkpoint round-000002 is skipped: it belongs to run {run.run_id}"]


def test_a_checkpoint_whose_rows_are_lost_is_not_used(tmp_path: Path) -> None:
    run = cell(tmp_path)
    play(run, 3)
    ResultsFolder(run.results).rounds_file(run.name).unlink()
    play(run)
    assert "rows of the rounds before it are missing" in log(run)
    assert sorted(rows(run)["round"].unique()) == list(range(ROUNDS + 1))


@pytest.mark.parametrize("without_file", [False, True])
def test_a_run_whose_clients_would_get_other_samples_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_file: bool
) -> None:
    run = cell(tmp_path)
    path = ResultsFolder(run.results).shards_file(run.name)
    play(run, 3)
    before = path.read_bytes()
    if without_file:
        path.unlink()
    shards = make_shards(run.config, run.info)
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.make_shards", lambda *_: [shards[1], shards[0], *shards[2:]])
        with pytest.raises(ResultsError, match=rf"have other samples now .* numpy {np.__version__}\), or .* --fresh"):
            play(run)
    assert path.exists() != without_file, "nothing is written"
    path.write_bytes(before[:-40])
    play(run)
    assert path.read_bytes() == before
    assert sorted(rows(run)["round"].unique()) == list(range(ROUNDS + 1))


def test_a_run_whose_scheme_has_been_edited_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cell(tmp_path)
    play(run, 3)
    with monkeypatch.context() as patch:
        edited = {
            **schemes.SCHEMES,
            run.config.scheme: lambda node, architecture, _: (architecture,) if node.depth else (),
        }
        patch.setattr("flexifed.core.schemes.SCHEMES", edited)
        with pytest.raises(ResultsError, match=r"share other layers now .* undo edits of its scheme .* --fresh"):
            play(run)
        with pytest.raises(ResultsError, match="shared other layers in the run than they would now"):
            load_clients(ResultsFolder(run.results).run_folder(run.name))
    play(run)
    assert sorted(rows(run)["round"].unique()) == list(range(ROUNDS + 1))


def test_a_run_that_goes_on_elsewhere_says_what_computed_which_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cell(tmp_path)
    path = ResultsFolder(run.results).rounds_file(run.name)
    play(run, 3)
    (first,) = read_metadata(path)["attempts"]
    assert first["from_round"] == 0
    play(run, 1)
    assert read_metadata(path)["attempts"] == [first], "the same machine and versions"
    assert "other hardware" not in log(run)
    (device,) = first["computed_on"]
    monkeypatch.setattr(LocalHosts, "device_names", lambda _: [device.rsplit(" in ", 1)[0] + " in another host"])
    play(run, 1)
    assert read_metadata(path)["attempts"] == [first], "the same kind of processor"
    monkeypatch.setattr(LocalHosts, "device_names", lambda _: ["another processor"])
    play(run)
    metadata = read_metadata(path)
    assert metadata["attempts"] == [first, {**first, "from_round": 2, "computed_on": ["another processor"]}]
    assert metadata["computed_on"] == ["another processor"]
    assert "from round 2 on other hardware or under other versions" in log(run)


def test_a_file_written_before_attempts_were_recorded_counts_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cell(tmp_path)
    path = ResultsFolder(run.results).rounds_file(run.name)
    play(run, 3)
    stored = read_metadata(path)
    (before,) = stored.pop("attempts")
    table = pq.read_table(path, partitioning=None).replace_schema_metadata({b"flexifed": json.dumps(stored)})
    write_table(path, table)
    monkeypatch.setattr(LocalHosts, "device_names", lambda _: ["another processor"])
    play(run)
    assert read_metadata(path)["attempts"] == [
        before,
        {**before, "from_round": 2, "computed_on": ["another processor"]},
    ]


def test_an_estimate_is_of_the_rounds_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_seconds_per_sample", lambda *_: (0.25, 0.0))
    run, nodes = cell(tmp_path), [{"CPU": 1.0}]
    placement = place_cell(run.config, PlacementOptions(), nodes)
    all_rounds_s = estimate.grid_seconds([run], placement, nodes, at_once=1)
    assert all_rounds_s == ROUNDS * 4 * 25 * 0.25
    play(run, 3)
    assert estimate.grid_seconds([run], placement, nodes, at_once=1) == all_rounds_s * 3 / 5, (
        "from the checkpoint before round 2"
    )


@pytest.mark.parametrize(
    ("hosts", "cpus", "expected"),
    [
        # In each of four rounds one client trains and four are scored; in the fifth, they are only scored.
        ([(0, 1, 2, 3)], 4, 4 * 14 + 4),
        ([(0, 1), (2, 3)], 4, 4 * 12 + 2),
        ([(0,), (1,), (2,), (3,)], 4, 4 * 11 + 1),
        ([(0,), (1,), (2,), (3,)], 1, 4 * 14 + 4),
    ],
)
def test_a_round_lasts_as_long_as_its_busiest_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: list[tuple[int, ...]], cpus: float, expected: float
) -> None:
    monkeypatch.setattr(estimate, "_client_seconds", lambda *_: (10.0, 1.0))
    run = cell(tmp_path, rounds=4, clients_per_round=1)
    placement = CellPlacement(clients=tuple(hosts), cpus_per_actor=1, gpus_per_actor=0)
    assert estimate.grid_seconds([run], placement, [{"CPU": cpus}], at_once=1) == expected
    assert estimate.grid_seconds([run, run], placement, [{"CPU": 2 * cpus}], at_once=2) == expected


def test_cells_take_turns_and_the_longest_is_not_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([40.0, 360.0, 40.0, 40.0] + 5 * [40.0])
    monkeypatch.setattr(estimate, "cell_times", lambda *_: estimate.CellTimes(next(seconds), 0.0))
    run, placement = cell(tmp_path), CellPlacement(clients=((0, 1, 2, 3),), cpus_per_actor=1, gpus_per_actor=0)
    assert estimate.grid_seconds(4 * [run], placement, [{"CPU": 4.0}], at_once=4) == 360
    assert estimate.grid_seconds(5 * [run], placement, [{"CPU": 4.0}], at_once=4) == 80


def test_an_estimate_adds_up_what_each_client_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def seconds_per_sample(name: str, config: CellConfig, info: object) -> tuple[float, float]:
        timed.append(config)
        return {"vgg11_bn": 1.0, "vgg13_bn": 2.0, "vgg16_bn": 4.0, "vgg19_bn": 8.0}[name], 0.5

    monkeypatch.setattr(estimate, "_seconds_per_sample", seconds_per_sample)
    run = cell(tmp_path, rounds=2)
    config = replace(
        run.config,
        partition=replace(run.config.partition, windows_per_shard=3),
        training=TrainingConfig(local_epochs=2, batch_size=64),
        numerics=NumericsConfig(threads=2),
    )
    train, test = (
        len(samples) for samples in (make_shards(config, run.info)[0].train, make_shards(config, run.info)[0].test)
    )
    placement = CellPlacement(clients=((0, 3), (1, 2)), cpus_per_actor=2, gpus_per_actor=0)
    busiest = 2 * (2 * (train // 3) * (1.0 + 8.0)) + 3 * test * 0.5 * 2
    work = 2 * (2 * (train // 3) * 15.0) + 3 * test * 0.5 * 4
    run = replace(run, config=config)
    assert estimate.grid_seconds([run], placement, [{"CPU": 4.0}], at_once=1) == busiest
    assert estimate.grid_seconds([run], placement, [{"CPU": 2.0}], at_once=1) == work, "two threads of a client"
    (same,) = {
        (part.model.width, part.numerics, part.training.local_epochs, part.training.batch_size, part.device)
        for part in timed
    }
    assert same == (run.config.model.width, config.numerics, 1, train // 3, "cpu")


def test_a_run_that_is_trained_on_stays_in_the_tables_as_it_was(tmp_path: Path) -> None:
    results = tmp_path / "table1"
    short, long = cell(results, rounds=2), cell(results)
    play(short)
    before = load_results(tmp_path)
    for count in (2, 1):  # the second time, its file belongs to an unfinished run
        play(long, count)
        (study,) = load_results(tmp_path)
        assert len(rows(long)) > len(before[0].finished)
        pd.testing.assert_frame_equal(study.finished, before[0].finished)
        assert study.rounds == 2
        assert study.unfinished.empty
        assert study.contents()[-1].startswith("  cifar10/vgg/max_common seed 0: round ")
        assert study.contents()[-1].endswith(f" of {ROUNDS}")
        assert study.table() == before[0].table()
    play(long)
    (study,) = load_results(tmp_path)
    assert study.rounds == ROUNDS
    assert len(study.contents()) == 1
