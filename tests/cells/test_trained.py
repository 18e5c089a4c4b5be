"""The trained models of a run: they are those that the run scored last, whichever processes its clients lived in."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import flexifed
from flexifed.cells.run import CellRun
from flexifed.cells.session import CellSession, open_log
from flexifed.cells.trained import INDEX, TrainedClients, load_clients
from flexifed.cli import main
from flexifed.config import (
    SCHEMES,
    CellConfig,
    DatasetName,
    FamilyName,
    ModelConfig,
    PartitionConfig,
    SchemeName,
    SharingConfig,
    TrainingConfig,
)
from flexifed.data import find_dataset, make_pipeline, open_dataset
from flexifed.errors import ConfigError, FlexifedWarning, ResultsError
from flexifed.federation.cell import make_shards
from flexifed.federation.checkpoint import MANIFEST, state_sha256
from flexifed.federation.rounds import Federation, LocalHosts
from flexifed.profiles import PROFILES
from flexifed.results.rounds_file import read_metadata
from flexifed.results.store import ResultsFolder
from flexifed.results.tables import read_table, write_table

ROUNDS = 3


def cell(
    results: Path,
    scheme: SchemeName = "max_common",
    *,
    dataset: DatasetName = "cifar10",
    family: FamilyName = "vgg",
    clients_per_round: int | None = None,
    keep_final: bool = True,
) -> CellRun:
    config = CellConfig(
        dataset=dataset,
        family=family,
        scheme=scheme,
        model=ModelConfig(width=0.03),
        partition=PartitionConfig(num_clients=4, num_shards=200, windows_per_shard=1, max_train=16, max_test=12),
        training=TrainingConfig(local_epochs=1, batch_size=8),
        sharing=SharingConfig(clients_per_round=clients_per_round),
    )
    info = find_dataset(dataset, data="synthetic", data_dir=Path("nowhere"))
    ResultsFolder(results).prepare()
    return CellRun(config=config, info=info, profile="test", rounds=ROUNDS, results=results, keep_final=keep_final)


def play(run: CellRun, rounds: int | None = None, *, clients_per_host: int = 4) -> Path:
    """Begin or resume a cell, and stop it after `rounds` rounds, or at its end; returns its folder."""
    shards = make_shards(run.config, run.info)
    hosts = LocalHosts(run.config, run.info, shards, clients_per_host)
    with closing(open_log(run, "in process")) as log:
        session = CellSession(run, "in process", hosts, shards, log)
        for _ in range(rounds or ROUNDS + 1):
            if session.play_round().round_index == run.rounds:
                break
        else:
            session.stop()
    return ResultsFolder(run.results).run_folder(run.name)


def scored(run: CellRun, round_index: int) -> list[float]:
    """The clients' accuracies in a round, as the run wrote them."""
    rows = ResultsFolder(run.results).read([run.name])
    return rows[rows["round"] == round_index].sort_values("client")["accuracy"].tolist()


def accuracy(clients: TrainedClients, client: int, model: torch.nn.Module) -> float:
    """The accuracy on a client's test shard, in plain PyTorch."""
    data = open_dataset(clients.info)
    pipeline = make_pipeline(data, clients.config.family, device=torch.device("cpu"), channels_last=True)
    samples, labels = data.test.take(clients.shards(client).test)
    with torch.no_grad():
        return (model(pipeline.prepare(samples)).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("clients_per_round", [None, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_models_are_those_that_the_run_scored_last(
    tmp_path: Path, scheme: SchemeName, clients_per_round: int | None
) -> None:
    run = cell(tmp_path, scheme, clients_per_round=clients_per_round)
    clients = load_clients(play(run, clients_per_host=2))
    assert (len(clients), clients.rounds, clients.is_final) == (4, ROUNDS, True)
    assert clients.config == run.config
    assert clients.info == run.info
    assert not clients.model(0).training
    expected = scored(run, ROUNDS)
    assert [accuracy(clients, client, clients.model(client)) for client in range(4)] == pytest.approx(expected)
    assert clients.accuracies() == dict(enumerate(expected))
    for client, shards in enumerate(make_shards(run.config, run.info)):
        np.testing.assert_array_equal(clients.shards(client).train, shards.train)
        np.testing.assert_array_equal(clients.shards(client).test, shards.test)


@pytest.mark.parametrize(
    ("model", "sharing"),
    [
        ({}, {"batch_norm_buffers": "local"}),
        ({}, {"classifier": "never", "clients_per_round": 2}),
        ({}, {"classifier": "always", "reduce_block": 2}),
        ({"versions": ("v1", "v4")}, {"clients_per_round": 1, "batch_norm_buffers": "local"}),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_states_are_those_that_the_clients_hold(
    tmp_path: Path, scheme: SchemeName, model: dict[str, Any], sharing: dict[str, Any]
) -> None:
    run = cell(tmp_path, scheme)
    config = replace(run.config, model=replace(run.config.model, **model), sharing=SharingConfig(**sharing))
    run = replace(run, config=config, rounds=2)
    play(run, 1, clients_per_host=2)
    folder = play(run, 1)  # other hosts
    shards = make_shards(config, run.info)
    federation = Federation(config, run.info, LocalHosts(config, run.info, shards))
    for _ in range(2):
        federation.play_round()
    clients = load_clients(folder)
    assert clients.rounds == 2
    assert tuple(state_sha256(clients.state(client)) for client in range(4)) == federation.state_sha256()


@pytest.mark.parametrize("clients_per_round", [None, 1])
def test_a_stopped_run_has_the_models_of_its_last_checkpoint(tmp_path: Path, clients_per_round: int | None) -> None:
    run = cell(tmp_path, clients_per_round=clients_per_round)
    clients = load_clients(play(run, 2))
    assert (clients.rounds, clients.is_final, clients.accuracies()) == (2, False, {})
    found = [accuracy(clients, client, clients.model(client)) for client in range(4)]
    play(run)
    assert found == pytest.approx(scored(run, 2))


@pytest.mark.parametrize(
    ("dataset", "family"), [("cifar10", "vgg"), ("agnews", "charcnn"), ("speech_commands", "resnet")]
)
def test_exported_files_need_only_build_model(tmp_path: Path, dataset: DatasetName, family: FamilyName) -> None:
    run = cell(tmp_path / "results", dataset=dataset, family=family)
    folder = play(run)
    clients = load_clients(folder)
    target = clients.export(tmp_path / "models")
    assert target == tmp_path / "models" / run.name
    description = json.loads((target / INDEX).read_text())
    assert (description["run"], description["rounds"], description["is_final"]) == (run.name, ROUNDS, True)
    assert CellConfig.from_dict(description["metadata"]["config"]) == run.config
    assert len(description["clients"]) == 4
    assert clients.accuracies() == {client: entry["accuracy"] for client, entry in enumerate(description["clients"])}
    assert "machine" not in description["metadata"]
    for client, entry in enumerate(description["clients"]):
        assert accuracy(clients, client, clients.model(client)) == pytest.approx(entry["accuracy"])
        assert hashlib.sha256((target / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
        model = flexifed.build_model(**entry["build_model"])
        model.load_state_dict(load_file(target / entry["file"]))
        assert accuracy(clients, client, model.eval()) == pytest.approx(entry["accuracy"])
    assert sorted(path.name for path in target.iterdir()) == sorted(
        [INDEX, *(entry["file"] for entry in description["clients"])]
    )


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(cell(tmp_path), checkpoint_every=1)
    folder = play(run, 2)
    (folder / "checkpoints" / "round-000002" / MANIFEST).write_bytes(b"{}")
    with pytest.warns(FlexifedWarning, match=r"max_common.*checkpoint round-000002 is skipped"):
        assert load_clients(folder).rounds == 1
    assert main(["export", str(folder), "--to", str(tmp_path / "models")]) == 0
    assert f"warning: {run.name}: checkpoint round-000002 is skipped" in capsys.readouterr().out


def test_a_run_that_is_under_way_may_be_writing_a_checkpoint_and_replaces_others(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = replace(cell(tmp_path), checkpoint_every=1)
    folder = play(run, 1)
    clients = load_clients(folder)
    writing = folder / "checkpoints" / "round-000002"
    writing.mkdir()
    assert load_clients(folder).rounds == 1
    assert not recwarn.list
    play(run)
    with pytest.raises(ResultsError, match=r"the run has replaced .*round-000001 since it was found; load its clients"):
        clients.state(0)
    assert load_clients(folder).rounds == ROUNDS


def test_a_finished_run_that_is_trained_further_is_not_at_its_last_round(tmp_path: Path) -> None:
    run = cell(tmp_path, keep_final=False)
    play(run)
    folder = play(replace(run, rounds=2 * ROUNDS), 1)
    clients = load_clients(folder)
    assert (clients.rounds, clients.is_final) == (1, False)
    clients.state(0)


def without_rows(folder: Path) -> Path:
    shutil.rmtree(folder.parent.parent / "rounds")
    return folder


def lose_the_checkpoints(folder: Path) -> None:
    for path in (folder / "checkpoints").rglob(MANIFEST):
        path.unlink()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.with_name("another"), "another is not the folder of a run; give one of .*/runs$"),
        (lambda folder: folder.parent, "is not the folder of a run; give one of the folders in .*/runs$"),
        (lambda folder: folder.parent.parent, "is not the folder of a run; give one of the folders in .*/runs$"),
        (lambda folder: folder.parent.parent.parent, r"give one of the folders in .*/results/runs$"),
        (lambda folder: Path("/"), "is not the folder of a run"),
        (lambda folder: without_rows(folder), "has no results yet, or has lost them: there is no .*parquet"),
        (
            lambda folder: lose_the_checkpoints(folder) or folder,
            r"no checkpoint .* were deleted\); run the same command with --fresh, or with more --rounds",
        ),
    ],
)
def test_what_is_no_run_or_has_no_checkpoint_is_refused(
    tmp_path: Path, prepare: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ResultsError, match=message):
        load_clients(prepare(play(cell(tmp_path / "results"))))


def test_a_run_without_a_state_says_why_and_what_makes_one(tmp_path: Path) -> None:
    run = cell(tmp_path, keep_final=False)
    folder = play(run, 2)
    lose_the_checkpoints(folder)
    with pytest.raises(ResultsError, match=r"\(it has not got that far\); run the same command to train them"):
        load_clients(folder)
    play(run)
    with pytest.raises(ResultsError, match=r"\(it was run with --no-keep-final, or its .*\); .* --fresh, or with more"):
        load_clients(folder)
    play(replace(run, rounds=ROUNDS + 1, keep_final=True))
    assert load_clients(folder).rounds == ROUNDS + 1, "as the message says"


def test_a_link_to_a_run_is_followed(tmp_path: Path) -> None:
    folder = play(cell(tmp_path / "results"))
    (tmp_path / "link").symlink_to(folder)
    assert load_clients(tmp_path / "link").folder == folder.resolve()


def test_samples_that_the_run_did_not_use_are_refused(tmp_path: Path) -> None:
    run = cell(tmp_path)
    path = ResultsFolder(run.results).shards_file(run.name)
    folder = play(run)
    table = read_table(path)
    for changed, message in [
        (table.slice(1), "does not have the samples that the run used, so it has been changed; .*make_shards"),
        (
            table.rename_columns(["client", "split", "other"]),
            "samples can't be read from .*shards.parquet.*index.*make_shards",
        ),
    ]:
        write_table(path, changed)
        with pytest.raises(ResultsError, match=message):
            load_clients(folder).shards(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "abc"}, "not the settings of a cell"),
        ({"config": {}}, "not the settings of a cell"),
        ({"rounds": ...}, "the metadata of .* are not those of a run .*; run the cell again"),
        ({"data": {}}, "the metadata of .* are not those of a run .*; run the cell again"),
        ({"state_sha256": ["0"]}, r"not those of a run \(1 digests of 4 clients\)"),
    ],
)
def test_metadata_that_are_not_a_runs_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = cell(tmp_path)
    folder = play(run)
    path = ResultsFolder(run.results).rounds_file(run.name)
    changed = {name: value for name, value in (read_metadata(path) | change).items() if value is not ...}
    metadata = {b"flexifed": json.dumps(changed)}
    write_table(path, read_table(path).replace_schema_metadata(metadata))
    with pytest.raises((ConfigError, ResultsError), match=message):
        load_clients(folder)


def test_a_state_that_does_not_fit_the_settings_is_refused(tmp_path: Path) -> None:
    clients = load_clients(play(cell(tmp_path)))
    other = replace(clients, config=replace(clients.config, model=ModelConfig(width=0.06)))
    with pytest.raises(ResultsError, match=r"client 1 in .* is not a vgg13_bn with the settings of the run's metadata"):
        other.model(1)


def test_building_a_model_leaves_random_numbers_alone(tmp_path: Path) -> None:
    clients = load_clients(play(cell(tmp_path)))
    before = torch.get_rng_state()
    clients.model(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_values_than_the_run_ended_with_are_refused(tmp_path: Path) -> None:
    clients = load_clients(play(cell(tmp_path)))
    others = replace(clients, metadata={**clients.metadata, "state_sha256": ["0" * 64] * 4})
    with pytest.raises(ResultsError, match=r"client 2 in .* does not have the values with which the run ended"):
        others.state(2)


@pytest.mark.parametrize("client", [-1, 4, True, None, "1"])
def test_a_client_that_the_run_does_not_have_is_refused(tmp_path: Path, client: Any) -> None:
    clients = load_clients(play(cell(tmp_path)))
    for method in (clients.state, clients.model, clients.shards):
        with pytest.raises(ConfigError, match=f"client is {client!r}; this run has clients 0 to 3"):
            method(client)


# Settings


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_config_comes_back_from_json(profile: Any) -> None:
    config = CellConfig(
        dataset="agnews",
        family="vdcnn",
        scheme="standalone",
        model=replace(profile.model, versions=("v1", "v4")),
        partition=profile.partition,
        training=profile.training,
    )
    assert CellConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("change", [{"temperature": 1}, {"training": {"temperature": 1}}, {"training": 1}])
def test_settings_of_another_version_are_refused(change: dict[str, Any]) -> None:
    settings = {"dataset": "cifar10", "family": "vgg", "scheme": "standalone"}
    assert CellConfig.from_dict(settings).seed == 0, "missing settings have their defaults"
    with pytest.raises(ConfigError, match=r"not the settings of a cell: .*; use the version that wrote them"):
        CellConfig.from_dict(settings | change)


# Command line


def test_the_command_exports_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished, stopped = cell(tmp_path / "results"), cell(tmp_path / "results", "standalone")
    folders = [str(play(finished)), str(play(stopped, 2))]
    assert main(["export", *folders, "--to", str(tmp_path / "models")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'models' / finished.name}: 4 models after 3 rounds",
        f"{tmp_path / 'models' / stopped.name}: 4 models after 2 of 3 rounds",
    ]
    assert {path.name for path in (tmp_path / "models").iterdir()} == {finished.name, stopped.name}


def test_bad_runs_are_all_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(play(cell(tmp_path / "results")))
    again = str(play(cell(tmp_path / "again")))
    for arguments, messages in [
        ([], ["no run is given; name folders of runs"]),
        (
            ["nowhere/runs/none", good, str(tmp_path)],
            ["2 of 3 runs can't be exported, so nothing was written:", "none is not", f"{tmp_path} is not"],
        ),
        ([good, again], [f"several of the runs are called {Path(good).name}; export them one by one"]),
    ]:
        assert main(["export", *arguments, "--to", str(tmp_path / "models")]) == 2
        told = capsys.readouterr().err
        assert all(message in told for message in messages), told
        assert not (tmp_path / "models").exists()


def test_an_export_that_fails_half_way_leaves_no_description(tmp_path: Path) -> None:
    clients = load_clients(play(cell(tmp_path / "results")))
    target = clients.export(tmp_path / "models")
    assert clients.export(tmp_path / "models") == target, "again"
    (target / "client-000002.safetensors").unlink()
    (target / "client-000002.safetensors").mkdir()
    with pytest.raises(ResultsError, match=r"can't write .*client-000002.safetensors"):
        clients.export(tmp_path / "models")
    assert not (target / INDEX).exists(), "which would describe a mixture"


def test_models_that_can_not_be_written_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = play(cell(tmp_path / "results"))
    (tmp_path / "models").write_text("a file in the way")
    assert main(["export", str(folder), "--to", str(tmp_path / "models")]) == 2
    assert f"can't write {tmp_path / 'models' / folder.name}" in capsys.readouterr().err
